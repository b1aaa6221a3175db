"""Whatever is given, files and words alike: an answer or a one-line error, soon, and no file half written."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpquant.cli import build_parser, main
from dpquant.commands.completion import vocabulary
from dpquant.config import shipped_configs
from emulation.errors import InputError
from emulation.formats import get_format
from emulation.qtorch_backend import qtorch_round
from hwmodels.profile import find_profile
from tests.test_cli import write_config

LIMIT_S = 60
FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,  # what fails here fails everywhere
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Hung(BaseException):
    """No answer in time; no command may catch it."""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """qtorch's kernels, once for all: on a busy machine compiling them takes longer than an answer may."""
    with contextlib.suppress(InputError):  # no compiler: then commands say so
        qtorch_round(torch.ones(1), get_format("float8_e4m3fn"), "nearest")


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends(*words: str) -> tuple[int, str]:
    """Exit code and what was said of a command that must end well or with one-line errors."""
    out, err = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    said = err.getvalue()
    assert code in (0, 1, 2), (words, code, said)
    assert "defect" not in said, (words, said)
    assert "Traceback" not in said
    if code == 2:
        assert out.getvalue() == ""
        assert said.startswith("error: ") or "\nerror: " in said
    return code, said


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of every kind."""
    folder = tmp_path_factory.mktemp("seeds")
    shutil.copy(find_profile("h100"), folder / "profile.yaml")
    shutil.copy(shipped_configs()["digits"], folder / "config.yaml")
    (folder / "spec.yaml").write_text("base: digits\nseeds: [0, 1]\ngrid: {format: [luq_fp4, fp8]}\n")
    (folder / "measured.csv").write_text("gemm_dtype,m,n,k,latency_us\nbfloat16,4096,4096,4096,220\nfp8,1,2,3,4e-1\n")
    np.save(folder / "data.npy", np.linspace(-1, 1, 60).reshape(6, 10))
    assert main(["train", str(write_config(folder)), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder


ROLES = {
    "profile.yaml": [["hardware", "check"], ["hardware", "show"], ["estimate", "--model", "digits_cnn", "--hardware"]],
    "config.yaml": [["privacy"], ["train", "--hardware", "no_such_chip"]],
    "spec.yaml": [["sweep", "--dry-run"]],
    "measured.csv": [["hardware", "validate", "h100", "--data"]],
    "data.npy": [["formats", "--data"]],
}
RUN_FILES = ("run.json", "records.jsonl", "config.yaml", "ledger.jsonl")
RUN_COMMANDS = (["report"], ["report", "--json"], ["report", "--csv"], ["privacy"], ["report", "--html", "page.html"])

# --- words

JUNK = st.sampled_from(
    [
        "",
        "-",
        "--",
        "=",
        "0",
        "-1",
        "nan",
        "inf",
        "1e999",
        "9" * 500,
        "ü",
        "\udcff",
        "a,b",
        ",",
        ":",
        "../..",
        "/dev/null",
    ]
) | st.text(st.characters(exclude_characters="\x00"), max_size=12)
VOCABULARY = vocabulary(build_parser())
NEVER = ("train", "sweep", "audit", "privacy", "hardware calibrate")  # with sound words they would work for long


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    route = draw(st.sampled_from([route for route in VOCABULARY if route]))
    words, at = route.split(), VOCABULARY[route]
    for option in draw(st.lists(st.sampled_from(sorted(set(at.options) - {"--debug"})), max_size=4)):
        values = ("digits_cnn",) if option == "--model" else at.options[option]  # the quickest
        sound = st.sampled_from(values) if values and route not in NEVER else JUNK
        words += [option] if values is None else [option, draw(sound | JUNK)]
    names = st.sampled_from(at.names) if at.names and route not in NEVER else JUNK
    return words + draw(st.lists(names | JUNK, max_size=2))


def measures_nothing(*args: object, **options: object) -> None:
    raise InputError("nothing could be measured in the budget", hint="a longer one")


@FUZZ
@given(words=command_lines())
def test_words(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hwmodels.calibrate.calibrate", measures_nothing
    )  # sound words would have it measure for minutes
    if "--model" in words and not {"--hardware", "--help"} & set(words):
        words = [*words, "--hardware", "b200"]  # not all of them: this is no test of patience
    ends(*words)


# --- files


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file after a few accidents."""
    data = sound
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "insert", "drop", "swap", "lines", "repeat", "nest"])):
            case "cut":
                data = data[:place]
            case "insert":
                data = data[:place] + draw(st.binary(min_size=1, max_size=6)) + data[place:]
            case "drop":
                data = data[:place] + data[place + draw(st.integers(1, 40)) :]
            case "swap":
                new = draw(
                    st.sampled_from([b"null", b"[]", b"{}", b"-1", b"1e999", b".nan", b"true", b'"', b"9" * 400])
                )
                data = data[:place] + new + data[place + len(new) :]
            case "lines":
                data = data.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\x85", b"\n\t"])))
            case "repeat":
                data = data + data[place:]
            case "nest":
                data = (
                    data[:place]
                    + draw(st.sampled_from([b"[", b"{"])) * draw(st.sampled_from([1, 40, 5000]))
                    + data[place:]
                )
    return data


@FUZZ
@given(data=st.data(), role=st.sampled_from(sorted(ROLES)))
def test_damaged_files(seeds: Path, tmp_path: Path, data: st.DataObject, role: str) -> None:
    file = tmp_path / role
    file.write_bytes(data.draw(damaged((seeds / role).read_bytes())))
    ends(*data.draw(st.sampled_from(ROLES[role])), str(file))


@FUZZ
@given(data=st.data(), name=st.sampled_from(RUN_FILES), words=st.sampled_from(RUN_COMMANDS))
def test_damaged_runs(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, name: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(seeds / "run", run)
    (run / name).write_bytes(data.draw(damaged((seeds / "run" / name).read_bytes())))
    code, _ = ends(*words, str(run))
    page = tmp_path / "page.html"
    if page.exists():
        assert page.read_text(encoding="utf-8").endswith("</html>\n")
        page.unlink()
    assert code == 0 or "--html" not in words or not page.exists()
    shutil.copy(seeds / "run" / name, run / name)


@settings(FUZZ, max_examples=25)
@given(data=st.data(), name=st.sampled_from([*RUN_FILES, "checkpoint.pt"]))
def test_damaged_runs_are_not_gone_on_with_unnoticed(
    seeds: Path, tmp_path: Path, data: st.DataObject, name: str
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(seeds / "run", run)
    (run / name).write_bytes(data.draw(damaged((seeds / "run" / name).read_bytes())))
    code, _ = ends("train", "--resume", str(run))
    if code == 0:
        assert ends("report", str(run))[0] == 0


# --- what files can be

BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def make(kind: str, file: Path) -> None:
    """A file, or what stands in its place."""
    match kind:
        case "bomb":
            file.write_text(BOMB)
        case "deep":
            file.write_text("[" * 200_000)
        case "10 MB":
            file.write_bytes(b"a: 1\n" * 2_000_000)
        case "one line of 10 MB":
            file.write_bytes(b"a" * 10_000_000)
        case "latin-1":
            file.write_bytes("title: Größe\n".encode("latin-1"))
        case "UTF-16":
            file.write_bytes("title: x\n".encode("utf-16"))
        case "binary":
            file.write_bytes(bytes(range(256)) * 50)
        case "empty":
            file.write_bytes(b"")
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "endless":
            file.symlink_to("/dev/zero")
        case "loop":
            file.symlink_to(file)
        case "nowhere":
            file.symlink_to(file.with_name("gone"))


KINDS = [
    "bomb", "deep", "10 MB", "one line of 10 MB", "latin-1", "UTF-16", "binary", "empty", "folder", "pipe", "endless",
    "loop", "nowhere",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ROLES)
def test_odd_files(tmp_path: Path, role: str, kind: str) -> None:
    file = tmp_path / role
    make(kind, file)
    for words in ROLES[role]:
        code, _ = ends(*words, str(file))
        assert code in (1, 2), words


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_odd_runs(seeds: Path, tmp_path: Path, name: str, kind: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    (run / name).unlink()
    make(kind, run / name)
    for words in (["report"], ["privacy"]):
        code, _ = ends(*words, str(run))
        assert code == 2 or name in ("config.yaml", "ledger.jsonl", "records.jsonl")


@pytest.mark.parametrize("kind", ["10 MB", "pipe", "endless", "folder"])
def test_odd_checkpoints(seeds: Path, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(seeds / "run", run)
    records = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text(records[0])
    (run / "checkpoint.pt").unlink()
    make(kind, run / "checkpoint.pt")
    assert ends("train", "--resume", str(run))[0] == 2


@pytest.mark.parametrize("role", ["profile.yaml", "config.yaml", "spec.yaml", "measured.csv"])
@pytest.mark.parametrize(
    "change", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b], ids=["Windows", "BOM"]
)
def test_line_ends_and_marks_of_other_systems(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, change: object
) -> None:
    answers = []
    for folder, made in (("ours", lambda b: b), ("theirs", change)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / role
        file.write_bytes(made((seeds / role).read_bytes()))  # type: ignore[operator]
        words = [word for word in ROLES[role][0] if word != "check"]
        words = ["hardware", "show"] if role == "profile.yaml" else words
        assert main([*words, str(file), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]


# --- places that cannot be written or read


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that may be read but not written, by a user for whom that holds."""
    folder = Path(tempfile.mkdtemp(prefix="dpquant-"))
    root = os.geteuid() == 0
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def drop(folder: Path, mode: int) -> None:
    """Gives up the right to write in ``folder``, or to read in it."""
    folder.chmod(mode)
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_unreadable(seeds: Path, unprivileged: Path) -> None:
    for role in ROLES:
        shutil.copy(seeds / role, unprivileged / role)
        (unprivileged / role).chmod(0)
    shutil.copytree(seeds / "run", unprivileged / "run")
    for name in RUN_FILES:
        (unprivileged / "run" / name).chmod(0)
    ends("privacy", "digits", "--noise-multiplier", "1", "--accountant", "rdp")  # loads what it needs while it may
    drop(unprivileged, 0o755)
    for role, several in ROLES.items():
        for words in several:
            code, said = ends(*words, str(unprivileged / role))
            assert code in (1, 2)
            assert code == 1 or "Permission denied" in said or "cannot be read" in said, (words, said)
    for words in (["report"], ["privacy"], ["train", "--resume"]):
        assert ends(*words, str(unprivileged / "run"))[0] == 2


def test_read_only(seeds: Path, unprivileged: Path) -> None:
    shutil.copytree(seeds / "run", unprivileged / "run")
    for path in (unprivileged / "run").iterdir():
        path.chmod(0o444)
    (unprivileged / "run").chmod(0o555)
    config = write_config(unprivileged)
    for path in unprivileged.glob("*.*"):
        path.chmod(0o444)
    before = sorted(path for path in unprivileged.rglob("*"))
    drop(unprivileged, 0o555)
    run = str(unprivileged / "run")
    assert ends("report", run)[0] == 0, "looking needs no right to write"
    for words in (
        ["report", run, "--html", str(unprivileged / "page.html")],
        ["train", str(config), "--out", str(unprivileged / "new")],
        ["train", "--resume", run],
        ["hardware", "calibrate", "--device", "cpu", "--seconds", "1", "--out", str(unprivileged / "mine.yaml")],
    ):
        code, said = ends(*words)
        assert code == (0 if "--resume" in words else 2), (words, said)  # the run is complete
    assert sorted(unprivileged.rglob("*")) == before


@pytest.mark.parametrize("place", ["folder", "no/such/folder/page.html", "loop"])
def test_pages_are_whole_or_not_there(seeds: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    code, _ = ends("report", str(seeds / "run"), "--html", str(tmp_path / place))
    assert code == (0 if place == "loop" else 2)  # a link is replaced
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_page(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, said = ends("report", str(seeds / "run"), "--html", str(page))
    assert code == 2
    assert "No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text() == "old"


def test_names_in_files_are_never_imported(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("trap:net", "trap.net", "!!python/name:trap.net"):
        text = (seeds / "config.yaml").read_text()
        (tmp_path / "config.yaml").write_text(text.replace("digits_cnn", name))
        assert ends("train", "config.yaml")[0] == 2
        assert ends("estimate", "--model", name.replace(":", "."), "--hardware", "h100")[0] == 2


def test_csv_is_csv(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(seeds / "run"), "--csv"]) == 0
    assert len({len(row) for row in csv.reader(io.StringIO(capsys.readouterr().out))}) == 1
