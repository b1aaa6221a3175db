"""Completion as the shells themselves do it."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dpquant.cli import build_parser, main
from dpquant.commands.completion import vocabulary
from tests.test_cli import Capture, refused

CASES = (
    ("dpquant est", ["estimate"]),
    ("dpquant hardware sh", ["show"]),
    ("dpquant hardware show h1", ["h100"]),
    ("dpquant estimate --hardware-", ["--hardware-dir"]),
    ("dpquant estimate --model resnet1", ["resnet18"]),
    ("dpquant estimate --model gpt2 --clipping gh", ["ghost"]),
    ("dpquant formats nvf", ["nvfp4"]),
    ("dpquant train dig", ["digits"]),
    ("dpquant report report --ht", ["--html"]),
)


def script(capsys: Capture, shell: str) -> str:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def test_vocabulary_is_the_command_line() -> None:
    words = vocabulary(build_parser())
    assert {"", "estimate", "hardware", "hardware calibrate"} <= set(words)
    assert "estimate" in words[""].names
    assert words["estimate"].options["--by"] == ("layer", "phase", "memory")
    assert words["estimate"].options["--json"] is None
    assert "h100" in (words["train"].options["--hardware"] or ())
    assert words["train"].options["--out"] == ()


def test_bash(capsys: Capture) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    text = script(capsys, "bash")
    for line, expected in CASES:
        words = line.split(" ")
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _dpquant; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run([bash, "-c", text + ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected, line


def test_fish(capsys: Capture, tmp_path: Path) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("no fish here")
    (tmp_path / "dpquant.fish").write_text(script(capsys, "fish"))
    asks = "".join(f"; complete -C '{line}'; echo ==" for line, _ in CASES)
    done = subprocess.run(
        [fish, "--no-config", "-c", "source dpquant.fish" + asks],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        check=True,
    )
    assert done.stderr == ""
    answers = [part.split() for part in done.stdout.split("==\n")]
    assert answers[: len(CASES)] == [expected for _, expected in CASES]


class Terminal:
    """A shell on a terminal of its own: what is typed, and what it shows."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        environment = os.environ | {"HOME": str(folder), "TERM": "dumb", "PS1": ""}
        self._shell = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment, start_new_session=True
        )
        os.close(theirs)

    def type(self, text: str, until: str) -> str:
        """What is shown after ``text`` was typed, up to ``until``."""
        os.write(self._ours, text.encode())
        shown, deadline = "", time.monotonic() + 60
        while until not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([self._ours], [], [], 1)[0]:
                shown += os.read(self._ours, 4096).decode(errors="replace")
        return shown

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._ours)


def test_zsh(capsys: Capture, tmp_path: Path) -> None:
    """As documented: the script lies in a folder of ``fpath`` as ``_dpquant``, and compinit finds it."""
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("no zsh here")
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions/_dpquant").write_text(script(capsys, "zsh"))
    (tmp_path / ".zshrc").write_text(
        "fpath=($PWD/functions $fpath); autoload -U compinit; compinit -u -D; unsetopt prompt_cr\n"
        'dpquant() { print -r -- "<$@>" }\nprint re""ady\n'
    )
    terminal = Terminal([zsh, "-i"], tmp_path)
    try:
        terminal.type("", "ready")
        for line, expected in CASES:
            shown = terminal.type(f"{line}\t\n", ">\r\n")
            assert shown.split("<")[-1].split(">")[0].split()[-1:] == expected, line
    finally:
        terminal.close()


def test_other_answers(capsys: Capture) -> None:
    assert "'fish'" in refused(capsys, "completion", "fsh")[1]
    assert main(["completion", "bash", "--json"]) == 0
    assert '"hardware show"' in capsys.readouterr().out
    assert main(["completion", "bash", "--csv"]) == 0
    assert "hardware show,h100" in capsys.readouterr().out
