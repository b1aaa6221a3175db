"""What every command prints for programs: JSON with the documented keys and a version, CSV, and no talk if quiet."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from dpquant.cli import main
from tests.test_cli import DOCUMENTED, ESTIMATE, Capture, answer, write_config

SMALL = ["estimate", "--model", "digits_cnn", "--hardware", "b200", "--format", "fp8"]
ATTACK = ["audit", "digits", "--mechanism", "analysis", "--trials", "100", "--examples", "8", "--seed", "0"]

COMMANDS = {
    "`estimate`": [*ESTIMATE, "--format", "fp8"],
    "`estimate --pareto`": [*SMALL, "--pareto"],
    "`estimate --break-even`": [*SMALL, "--break-even"],
    "`estimate --sweep`": [*SMALL, "--sweep", "batch-size=64"],
    "`estimate --cost-model paper`": [*SMALL, "--cost-model", "paper"],
    "`formats`": ["formats"],
    "`formats --data`": ["formats", "--data", "normal"],
    "`hardware list`": ["hardware", "list"],
    "`hardware show`": ["hardware", "show", "h100"],
    "`hardware check`": ["hardware", "check", "bad.yaml"],
    "`hardware validate`": ["hardware", "validate", "h100", "--data", "measured.csv"],
    "`hardware calibrate`": ["hardware", "calibrate", "--device", "cpu", "--seconds", "1", "--out", "mine.yaml"],
    "`privacy`": ["privacy", "digits", "--accountant", "rdp", "--noise-multiplier", "1"],
    "`privacy RUN`": ["privacy", "run"],
    "`audit`": ATTACK,
    "`report` and `train`": ["report", "run"],
    "`completion`": ["completion", "bash"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a bad profile and measurements."""
    folder = tmp_path_factory.mktemp("answers")
    assert main(["train", str(write_config(folder)), "--out", str(folder / "run"), "--quiet"]) == 0
    (folder / "bad.yaml").write_text("extends: h100\nmemry: {}\n")
    (folder / "measured.csv").write_text("gemm_dtype,m,n,k,latency_us\nbfloat16,4096,4096,4096,220\n")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "mine.yaml").unlink(missing_ok=True)


def documented(heading: str) -> dict[str, str]:
    """Key -> what the page says of it."""
    section = DOCUMENTED.read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    return {key: is_ for _, cell, is_, _ in lines for key in re.findall(r"`(\w+)`", cell)}


def problems(heading: str, data: dict[str, Any]) -> list[str]:
    """Where the page and an answer differ."""
    says, printed = documented(heading), set(data) - {"schema"}
    for name in ("rows", "runs"):
        printed |= set(data[name][0]) if name in data else set()
    found = [f"not documented: {key}" for key in sorted(printed - set(says))]
    found += [f"not printed: {key}" for key in sorted(set(says) - printed)]
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and key not in ("rows", "runs"):
            found += [f"not documented: {key}.{inner}" for inner in value[0] if f"`{inner}`" not in says.get(key, "")]
    return found


SLOW = ("`hardware calibrate`", "`audit`")
CASES = [pytest.param(h, marks=pytest.mark.long) if h in SLOW else h for h in COMMANDS]


@pytest.mark.parametrize("heading", CASES)
def test_json_is_as_documented(capsys: Capture, heading: str) -> None:
    data = answer(capsys, *COMMANDS[heading], code=heading == "`hardware check`")
    assert data["schema"] == 1
    assert problems(heading, data) == []


def test_every_answer_has_a_section() -> None:
    headings = re.findall(r"^### (.*)$", DOCUMENTED.read_text(encoding="utf-8"), flags=re.MULTILINE)
    elsewhere = {"`sweep`", "`formats --compare`"}  # with a sweep; with kernels that take a minute to compile
    assert set(headings) == set(COMMANDS) | elsewhere


def test_the_comparison_sees_what_differs() -> None:
    whole: dict[str, Any] = {"schema": 1, "files": 1, "problems": [{"file": 1, "line": 1, "message": 1, "hint": 1}]}
    assert problems("`hardware check`", whole) == []
    assert problems("`hardware check`", {"schema": 1, "files": 1}) == ["not printed: problems"]
    assert problems("`hardware check`", whole | {"more": 1}) == ["not documented: more"]
    whole["problems"][0]["column"] = 3
    assert problems("`hardware check`", whole) == ["not documented: problems.column"]


def test_train_prints_the_run(capsys: Capture) -> None:
    one = answer(capsys, "train", "--resume", "run")
    assert set(one) - {"schema"} == set(documented("`report` and `train`")) - {"runs"}


@pytest.mark.parametrize("heading", CASES)
def test_csv_and_quiet(capsys: Capture, heading: str) -> None:
    capsys.readouterr()
    code = main([*COMMANDS[heading], "--csv", "--quiet"])
    captured = capsys.readouterr()
    assert code == (heading == "`hardware check`")
    assert captured.err == ""
    rows = list(csv.reader(io.StringIO(captured.out)))
    assert len(rows) > 1
    assert all(re.fullmatch(r"\w+", key) for key in rows[0])
    assert {len(row) for row in rows} == {len(rows[0])}
