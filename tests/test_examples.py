"""The examples run as they stand, and what they print is what they promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def shown(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """What an example prints, run as a script in an empty folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name)])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"own_model", "own_hardware", "own_format", "compare_chips"}
    assert {f"test_{name}" for name in names} <= set(globals())


def test_own_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = shown("own_model.py", capsys, monkeypatch, tmp_path)
    epochs = re.findall(r"epoch \d: 2 of 4 layers .*accuracy ([\d.]+)%, epsilon ([\d.]+)", out)
    assert len(epochs) == 3
    assert all(0 < float(epsilon) <= 8 for _, epsilon in epochs)
    assert float(epochs[-1][0]) > 60, "far above the 10 % of chance, for all its noise"
    saved = re.search(r"accuracy ([\d.]+)% with them", out)
    assert saved is not None
    assert saved[1] == epochs[-1][0], "the stock model with the saved weights is the model that was trained"
    assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "weights.pt", weights_only=True).values())


def test_own_hardware(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = shown("own_hardware.py", capsys, monkeypatch, tmp_path)
    assert "my_chip.yaml:8: unknown key 'bandwith_bytes_per_s'" in out
    assert "did you mean 'bandwidth_bytes_per_s'?" in out
    steps = {name: float(ms) for name, ms in re.findall(r"(b200|my_chip) +([\d.]+) ms a step", out)}
    assert steps["my_chip"] > steps["b200"], "half the bandwidth"


def test_own_format(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = shown("own_format.py", capsys, monkeypatch, tmp_path)
    sqnr = {name: float(db) for name, db in re.findall(r"(\w+) +[\d.]+ bits +([\d.]+) dB", out)}
    assert sqnr["float4_e2m1fn"] < sqnr["float5_e3m1"] < sqnr["float6_e3m2fn"], "a bit between two"
    assert "mxfp5" in sqnr
    trained = re.search(r"accuracy ([\d.]+)%, epsilon ([\d.]+)", out)
    assert trained is not None
    assert float(trained[1]) > 20, "after one epoch, twice chance at least"
    assert 1 < float(trained[2]) < 4


def test_compare_chips(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = shown("compare_chips.py", capsys, monkeypatch, tmp_path)
    rows = re.findall(r"^(\w+) +\w+ +[\d.]+ ms +([\d.]+)x +([\d.]+)x", out, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == ["a100", "h100", "l40s", "b200"]
    assert all(float(reachable) >= float(speedup) for _, speedup, reachable in rows)
