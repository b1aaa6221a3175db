"""What README.md and docs/ show is so: commands and Python run, YAML is valid, outputs are those, links lead somewhere.

- Every line ``dpquant ...`` of a fenced block is run; runs that take minutes are cut short (``long``: as they stand).
- In a ``console`` block ``$ dpquant ...`` is followed by what it prints on stdout at 80 columns; a line ``...`` stands
  for any lines. ``python tests/test_docs.py`` writes these outputs anew.
- ``python`` blocks of a page run one after another, with stand-ins for ``model``, ``train_loader`` and ``test_loader``;
  both sides of a ``diff`` block run.
- A ``yaml`` block that starts with ``extends:`` is a hardware profile, one with ``data:`` a run.
"""

import contextlib
import io
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant.cli import build_parser, main
from dpquant.config import load_config
from dpquant.models import build_model
from emulation.errors import InputError
from hwmodels.profile import check
from hwmodels.strict_yaml import load_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash", "shell", "console")
CUT_SHORT = {
    ("train",): ["--epochs", "1", "--scheduler", "static"],
    ("audit",): ["--mechanism", "analysis", "--trials", "100", "--examples", "16"],
    ("sweep",): ["--dry-run"],
    ("hardware", "calibrate"): ["--device", "cpu", "--seconds", "2"],
}
NEEDS_FILES = ("fashion_mnist", "cifar10", "emnist")
"""Words of commands that need data sets which do not ship: their options are parsed, and that is all."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it starts on."""

    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a shell block; ``output`` is what the page says it prints, where it says so."""

    line: int
    words: list[str]
    code: int
    output: str | None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for found in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", page, flags=re.MULTILINE | re.DOTALL):
        indent = len(found[1])
        text = "".join(line[indent:] if line.strip() else line for line in found[3].splitlines(keepends=True))
        yield Block(page[: found.start()].count("\n") + 2, found[2], text)


def commands(block: Block) -> Iterator[Command]:
    """The ``dpquant`` commands of a shell block; a comment ``exit code 1`` says how it is to end."""
    if block.language not in SHELL:
        return
    lines = re.sub(r" *\\\n *", " ", block.text).splitlines()
    shown = block.language == "console"
    for number, line in enumerate(lines):
        command = line.removeprefix("$ ").removeprefix(".venv/bin/")
        if not re.match(r"dpquant( |$)", command) or (shown and not line.startswith("$ ")):
            continue
        words = shlex.split(command, comments=True)[1:]
        words = words[: next((i for i, word in enumerate(words) if word in (">", "|")), None)]
        code = re.search(r"# .*exit code (\d+)", command)
        output = None
        if shown:
            following = lines[number + 1 :]
            end = next((i for i, other in enumerate(following) if other.startswith("$ ")), len(following))
            output = "\n".join(following[:end])
        yield Command(block.line + number, words, int(code[1]) if code else 0, output)


def run(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, "\n".join(line.rstrip() for line in out.getvalue().splitlines()), err.getvalue()


def same(shown: str, printed: str) -> bool:
    """Whether a page's output is what was printed; a line ``...`` is any lines."""
    lines = shown.strip("\n").splitlines()
    pattern = "".join(r"(?:.*\n)?" if line == "..." else re.escape(line) + "\n" for line in lines)
    return re.fullmatch(pattern, printed.strip("\n") + "\n", flags=re.DOTALL) is not None


def shortened(words: list[str]) -> list[str]:
    """The command, cut short where it would take minutes."""
    for start, more in CUT_SHORT.items():
        if "--resume" not in words and tuple(words[: len(start)]) == start:
            return [*words, *more]
    return words


def refusal(words: list[str]) -> str | None:
    """Why the parser refuses a command, if it does."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, unknown = build_parser().parse_known_args(words)
    except InputError as error:
        return str(error)
    except SystemExit:  # --help, --version
        return None
    return f"unknown {unknown[0]}" if unknown else None


def command_problems(name: str, page: str, *, whole: bool) -> Iterator[str]:
    """What is wrong with the commands of a page, run in order in the current folder."""
    for command in (command for block in blocks(page) for command in commands(block)):
        at = f"{name}:{command.line}: dpquant {shlex.join(command.words)}"
        if set(command.words) & set(NEEDS_FILES):
            if why := refusal(command.words):
                yield f"{at}: {why}"
            continue
        for word in command.words[1:]:
            if word.startswith("runs/") and "--out" not in command.words and not Path(word).exists():
                run([*shortened(["train", "digits"]), "--out", word, "--quiet"])
        words = command.words if whole or command.output is not None else shortened(command.words)
        code, out, err = run(words)
        if code != command.code:
            yield f"{at}: exit code {code}: {err.strip()[-500:]}"
        elif command.output is not None and not same(command.output, out):
            yield f"{at}: prints\n{out}\nand not\n{command.output}"


def inline_problems(name: str, page: str) -> Iterator[str]:
    """Commands inside the text that do not parse; words in capitals are placeholders."""
    for number, line in enumerate(page.splitlines(), 1):
        for text in re.findall(r"`(dpquant [^`]+)`", line):
            if not re.search(r"\b[A-Z]{2,}\b|\.\.\.|[|<>]", text) and (why := refusal(shlex.split(text)[1:])):
                yield f"{name}:{number}: {text}: {why}"


def stand_ins() -> dict[str, Any]:
    """What Python blocks take for granted: a small model and its data."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(512, 1, 8, 8), torch.randint(0, 10, (512,)))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return {
        "model": model,
        "train_loader": DataLoader(data, batch_size=128),
        "test_loader": DataLoader(data, batch_size=128),
        "module": build_model("resnet18", stem="cifar"),
        "example": torch.zeros(1, 3, 32, 32),
    }


def execute(name: str, block: Block, text: str, names: dict[str, Any]) -> Iterator[str]:
    """Runs a Python text with fewer epochs, and Opacus with a faster accountant, than it asks for."""
    for pattern, short in ((r"\bepochs=\d+", "epochs=2"), (r"\brange\(\d+\)", "range(2)"), ('"prv"', '"rdp"')):
        text = re.sub(pattern, short, text)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * (block.line - 1) + text, name, "exec"), names)
    except Exception as error:
        yield f"{name}:{block.line}: {type(error).__name__}: {error}"


def python_problems(name: str, page: str) -> Iterator[str]:
    """What is wrong with the Python blocks of a page, and with both sides of its diffs."""
    names = stand_ins()
    for block in blocks(page):
        if block.language == "python":
            yield from execute(name, block, block.text, names)
        elif block.language == "diff":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Opacus's own, of its side
                for sign in "-+":
                    yield from execute(name, block, side(block.text, sign), stand_ins())


def side(diff: str, sign: str) -> str:
    """The text before (``-``) or after (``+``) a diff."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def yaml_problems(name: str, page: str) -> Iterator[str]:
    """What is wrong with the YAML blocks of a page."""
    for block in blocks(page):
        if block.language != "yaml":
            continue
        path = Path("block.yaml")
        path.write_text(block.text)
        try:
            data, _ = load_yaml(path)
            if "extends" in (data or {}):
                yield from (f"{name}:{block.line}: {problem}" for problem in check(path))
            elif "data" in (data or {}):
                load_config(path)
        except InputError as error:
            yield f"{name}:{block.line}: {error}"


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def link_problems(path: Path, page: str) -> Iterator[str]:
    """Links to files or headings that are not there."""
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", page):
        file = (path.parent / target) if target else path
        if not file.exists():
            yield f"{path.name}: {target} is not there"
        elif anchor and anchor not in anchors(page if file == path else file.read_text()):
            yield f"{path.name}: {target} has no heading #{anchor}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages assume to be there: a chip of one's own, data, a run configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_chips").mkdir()
    for name in ("my_chip.yaml", "my-chip.yaml", "my_chips/my_chip.yaml"):
        (tmp_path / name).write_text("extends: h100\ntitle: mine\n")
    (tmp_path / "my.yaml").write_text((ROOT / "configs/runs/digits.yaml").read_text())
    (tmp_path / "measured.csv").write_text("gemm_dtype,m,n,k,latency_us\nbfloat16,4096,4096,4096,220\n")
    return tmp_path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands(path: Path, folder: Path) -> None:
    assert list(command_problems(path.name, path.read_text(), whole=False)) == []


@pytest.mark.long
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_as_they_stand(path: Path, folder: Path) -> None:
    assert list(command_problems(path.name, path.read_text(), whole=True)) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_and_links(path: Path, folder: Path) -> None:
    page = path.read_text()
    assert list(inline_problems(path.name, page)) == []
    assert list(python_problems(path.name, page)) == []
    assert list(yaml_problems(path.name, page)) == []
    assert list(link_problems(path, page)) == []


def test_no_page_is_out_of_reach() -> None:
    link = re.compile(r"\]\(([^)#\s]+\.md)")
    linked = {(path.parent / target).resolve() for path in PAGES for target in link.findall(path.read_text())}
    assert [path.name for path in (ROOT / "docs").glob("*.md") if path.resolve() not in linked] == []


def test_the_reference_is_that_of_the_code() -> None:
    page = runpy.run_path(str(ROOT / "docs/reference.py"))["reference"]()
    assert page == (ROOT / "docs/reference.md").read_text(), "python docs/reference.py writes it anew"


def test_the_keys_of_configurations_are_those_of_the_code() -> None:
    """As the page is written from it, every key with its meaning; what it takes is what a resolved file holds."""
    names = runpy.run_path(str(ROOT / "docs/configuration.py"))
    page = names["configuration"]()
    assert page == (ROOT / "docs/configuration.md").read_text(), "python docs/configuration.py writes it anew"
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 and all(row) for row in rows), rows
    data = load_config("digits").data
    resolved = {f"{k}.{n}" if n else k for k, v in data.items() for n in (v if isinstance(v, dict) else (None,))}
    assert {row[0].strip("`") for row in rows} == resolved
    assert {"`training.cuda_graphs`", "`training.keep_freed_memory`"} <= {row[0] for row in rows}


def test_accuracies_of_the_front_page_are_those_of_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = (ROOT / "docs/results.md").read_text()
    for start, sweep in (("Fashion-MNIST", "fashion_anchor .*norm: none"), ("CIFAR-10", "cifar10_anchor ")):
        found = re.search(rf"`dpquant sweep {sweep}.*?` \| (\d+) \| ([\d.]+ ± [\d.]+) \| [^|]+ \| ([\d.]+)", results)
        assert found is not None, sweep
        assert found[1] == "5", "the page says over five seeds"
        assert re.search(rf"{start} {found[2]} %( over five seeds)? \(published {found[3]} %\)", readme), found[0]


def picture_problems(svg: str) -> Iterator[str]:
    """What is wrong with a picture of the parts: something fetched, files not there, no text, no background."""
    tree = ElementTree.fromstring(svg)
    tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
    if {"image", "script", "foreignObject", "use"} & set(tags) or "@import" in svg or re.search(r"url\((?!#)", svg):
        yield "is not whole in itself"
    if tags.count("text") < 20 or not tree.findall(".//{*}rect[@class='page']") or "title" not in tags:
        yield "has no text, title or background of its own"
    modules = re.findall(r">(\w+/\w+\.py)<", svg)
    yield from (f"{module} is not there" for module in modules or ["no module"] if not (ROOT / module).exists())


def test_the_picture_is_whole_and_names_what_is_there() -> None:
    svg = (ROOT / "docs/how-it-works.svg").read_text()
    assert list(picture_problems(svg)) == []
    for page in (ROOT / "README.md", ROOT / "docs/architecture.md"):
        assert "how-it-works.svg)" in page.read_text()
    assert list(picture_problems(svg.replace("cost.py", "costs.py"))) == ["hwmodels/costs.py is not there"]
    assert list(picture_problems(svg.replace("url(#head)", "url(http://x.org/a)"))) == ["is not whole in itself"]
    assert list(picture_problems(svg.replace('class="page"', ""))) == ["has no text, title or background of its own"]


def test_public_names_are_documented() -> None:
    """Each has a sentence, and each argument that a docstring lists is one that there is."""
    page = runpy.run_path(str(ROOT / "docs/reference.py"))["reference"]()
    entries = re.split(r"^#{3,4} ", page, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    for entry in entries:
        name = entry.splitlines()[0]
        described = re.sub(r"```text.*?```", "", entry, flags=re.DOTALL)
        assert any(line.rstrip().endswith((".", ":", ";")) for line in described.splitlines()[1:]), name
        call = re.search(r"```text\n(.*?)```", entry, flags=re.DOTALL)
        listed = re.search(r"\*Args\*\n\n(.*?)(?:\n\n|\Z)", entry, flags=re.DOTALL)
        if call and listed:
            names = re.findall(r"^- `([\w, ]+)`:", listed[1], flags=re.MULTILINE)
            for argument in (one.strip() for group in names for one in group.split(",")):
                assert re.search(rf"\b{argument}\b", call[1]), f"{name} has no argument {argument}"


def test_five_lines_change() -> None:
    """What README.md says of the step from Opacus."""
    (diff,) = (block.text for block in blocks((ROOT / "README.md").read_text()) if block.language == "diff")
    signs = [line[0] for line in diff.splitlines() if line]
    assert signs.count("+") == 5
    assert signs.count("-") == 6, "and the line that asks Opacus for ghost clipping goes"


# --- the guards see what they are for


def test_a_broken_command_is_seen(folder: Path) -> None:
    def found(text: str) -> list[str]:
        return [*command_problems("page", text, whole=False), *inline_problems("page", text)]

    assert found("```\ndpquant hardware list --quiet\n```\nand `dpquant formats fp8`, `dpquant report RUN`") == []
    assert "page:2: dpquant hardware lst: exit code 2" in found("```\ndpquant hardware lst\n```\n")[0]
    assert "--jsno" in found("```sh\n$ dpquant hardware \\\n  list --jsno  # all\n```\n")[0]
    assert "exit code 2" in found("   ```\n   .venv/bin/dpquant privacy no_such_run\n   ```\n")[0]
    assert found("```\ndpquant hardware lst  # ends with exit code 2\n```\n") == []
    assert "--epochz" in found("```\ndpquant train fashion_mnist --epochz 3\n```\n")[0]
    assert "fp44" not in str(found("`dpquant formats fp44`")), "what is not run is only parsed"
    assert "--sunny" in found("such as `dpquant formats --sunny`")[0]


def test_a_wrong_output_is_seen(folder: Path) -> None:
    def found(output: str) -> list[str]:
        return list(command_problems("page", f"```console\n$ dpquant --version\n{output}\n```\n", whole=False))

    version = run(["--version"])[1]
    assert found(version) == []
    assert found("...") == []
    assert "and not\ndpquant 99" in found("dpquant 99")[0]
    assert same("a\n...\nd", "a\nb\nc\nd")
    assert same("a\n...\nd", "a\nd")
    assert not same("a\n...\nd", "a\nb\nc")
    assert not same("a", "a\nb")


def test_broken_python_yaml_and_links_are_seen(folder: Path) -> None:
    assert list(python_problems("page", "```python\nmodel(next(iter(train_loader))[0])\n```\n")) == []
    assert "page:2: NameError" in next(python_problems("page", "```python\nno_such_name\n```\n"))
    assert "ZeroDivisionError" in next(python_problems("page", "```diff\n 1\n-1 / 0\n+2\n```\n"))
    assert "capacity" in next(yaml_problems("page", "```yaml\nextends: h100\nmemory: {capacity: 3}\n```\n"))
    assert "mdoel" in next(yaml_problems("page", "```yaml\nmdoel: {name: digits_cnn}\ndata: {name: digits}\n```\n"))
    assert "given twice" in next(yaml_problems("page", "```yaml\na: 1\na: 2\n```\n"))
    readme = ROOT / "README.md"
    links = "# A title\n[a](LICENSE) [b](#a-title) [c](https://x.org) [d](docs/hardware.md#add-a-chip)"
    assert list(link_problems(readme, links)) == []
    assert "nowhere.md" in next(link_problems(readme, "[a](docs/nowhere.md)"))
    assert "#nothing" in next(link_problems(readme, "[a](docs/hardware.md#nothing)"))


# --- writing outputs anew


def rewritten(page: str) -> str:
    """The page with the outputs of its ``console`` blocks as they are now; what ``...`` leaves out stays left out."""
    for block in blocks(page):
        text = block.text
        for command in commands(block):
            if command.output is None or not command.output.strip():
                continue
            printed = run(command.words)[1].strip("\n").splitlines()
            shown = command.output.strip("\n").splitlines()
            if "..." in shown:
                cut = shown.index("...")
                printed = [*printed[:cut], "...", *printed[len(printed) - (len(shown) - cut - 1) :]]
            text = text.replace("\n".join(("", *shown, "")), "\n".join(("", *printed, "")), 1)
        page = page.replace(block.text, text)
    return page


def test_outputs_are_written_anew(folder: Path) -> None:
    first, second = (
        "```console\n$ dpquant " + rest + "\n```\n" for rest in ("--version\n0", "hardware list\nx\n...\ny")
    )
    new = rewritten(first + second)
    lines = run(["hardware", "list"])[1].strip("\n").splitlines()
    assert new == first.replace("\n0\n", f"\n{run(['--version'])[1]}\n") + second.replace(
        "x\n...\ny", "\n".join((lines[0], "...", lines[-1]))
    )


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        for page_path in PAGES:
            page_path.write_text(rewritten(page_path.read_text()))
    for writer in ("reference.py", "configuration.py"):
        runpy.run_path(str(ROOT / "docs" / writer), run_name="__main__")
