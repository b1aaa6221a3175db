"""Pictures for papers: real files of the kind asked for, with every plot in them."""

import sys
from pathlib import Path

import pytest

from dpquant.cli import main
from dpquant.figures import KINDS, picture
from emulation.errors import InputError
from tests.test_report import LAYERS, record, run

pytest.importorskip("matplotlib")

MAGIC = {".png": b"\x89PNG\r\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    drawn = picture([run([record(1), record(2, LAYERS)])], kind)
    assert drawn.startswith(MAGIC[kind])
    assert len(drawn) > 5000


def test_every_plot_is_there() -> None:
    text = picture([run([record(e) for e in range(1, 5)])], ".svg").decode()
    for words in ("layers in luq_fp4", "released sensitivity", "test accuracy", "test loss", "budget 8", "target 1.5x"):
        assert words in text, words
    assert all(name in text for name in LAYERS)
    several = picture([run([record(1)]), run([record(1, test_accuracy=None, energy_joules=None)])], ".svg").decode()
    assert "tiny (1): layers" in several
    assert "tiny (2): layers" in several


def test_the_curves_of_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "--model", "digits_cnn", "--hardware", "b200", "--format", "fp8,nvfp4", "--batch-size", "64"]
    assert main([*words, "--png", str(tmp_path / "a.svg")]) == 2
    assert "--pareto" in capsys.readouterr().err
    assert main([*words, "--pareto", "--png", str(tmp_path / "a.txt")]) == 2
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--pareto", "--png", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for part in ("b200, float8_e4m3fn", "b200, nvfp4", "best", "drawn", "static, 90 % of draws", "layers quantized"):
        assert part in text, part


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"kind of picture '\.pgn'") as caught:
        picture([run([record(1)])], ".pgn")
    assert "'.png'" in str(caught.value.hint)
    with pytest.raises(InputError, match="no epoch"):
        picture([run([])])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="needs matplotlib") as caught:
        picture([run([record(1)])])
    assert "dpquant[plots]" in str(caught.value.hint)


def test_nothing_is_written_where_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere", "--png", str(tmp_path / "a.png")]) == 2
    assert list(tmp_path.iterdir()) == []
