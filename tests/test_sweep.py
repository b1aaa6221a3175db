"""Sweeps: every combination once, checked before anything runs, resumable; intervals as textbooks have them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpquant import sweep
from dpquant.cli import main
from dpquant.rundir import load_run
from emulation.errors import InputError
from tests.test_cli import DOCUMENTED, Capture, answer, refused, shown, write_config


def spec(folder: Path, text: str) -> str:
    write_config(folder)
    (folder / "spec.yaml").write_text(f"base: tiny.yaml\n{text}")
    return str(folder / "spec.yaml")


def test_every_combination_once(tmp_path: Path) -> None:
    grid = "seeds: [3, 4]\ngrid: {schedule.fraction: [0.25, 0.5], training.epochs: [1, 2, 3]}\n"
    cells = sweep.read_cells(spec(tmp_path, grid))
    found = [(c.settings["schedule.fraction"], c.settings["training.epochs"], c.seed) for c in cells]
    assert sorted(found) == [(f, e, s) for f in (0.25, 0.5) for e in (1, 2, 3) for s in (3, 4)]
    assert len({cell.name for cell in cells}) == 12
    assert "fraction=0.25,epochs=1,seed=3" in {cell.name for cell in cells}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("seeds: []\n", "seeds"),
        ("seeds: [0]\ngrd: {}\n", "grd"),
        ("seeds: [0, 0]\n", "comes twice: seed=0"),
        ("seeds: [0]\ngrid: {schedule.fraction: [2.0]}\n", "fraction=2.0,seed=0: "),
        ("seeds: [0]\ngrid: {schedule.fractoin: [0.5]}\n", "fractoin"),
        ("seeds: [0]\ngrid: {schedule.fraction: []}\n", "fraction"),
        ("seeds: [0.5]\n", "seeds"),
        ("grid: {}\n", "seeds"),
    ],
)
def test_wrong_specifications(tmp_path: Path, text: str, error: str) -> None:
    path = spec(tmp_path, text)
    with pytest.raises(InputError, match=error) as caught:
        sweep.read_cells(path)
    assert caught.value.file is not None


def test_too_many_runs(tmp_path: Path) -> None:
    values = list(range(1, 200))
    text = f"seeds: [0]\ngrid: {{training.epochs: {values}, training.batch_size: {values}}}\n"
    with pytest.raises(InputError, match="39,601 runs"):
        sweep.read_cells(spec(tmp_path, text))


def test_sweep_trains_resumes_and_reports(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpquant import train as loop

    path = spec(tmp_path, "seeds: [0, 1]\ngrid: {schedule.scheduler: [full, pls]}\n")
    out = tmp_path / "out"
    whole, trained = loop.train, []

    def counted(training: Any, folder: Any) -> Any:
        trained.append(folder.path.name)
        if len(trained) == 3:
            yield next(iter(whole(training, folder)))
            raise KeyboardInterrupt
        yield from whole(training, folder)

    monkeypatch.setattr(loop, "train", counted)
    assert main(["sweep", path, "--out", str(out)]) == 130
    assert "goes on" in capsys.readouterr().err
    data = answer(capsys, "sweep", path, "--out", str(out))
    third = "scheduler=pls,seed=0"
    assert trained == ["scheduler=full,seed=0", "scheduler=full,seed=1", third, third, "scheduler=pls,seed=1"]
    assert [row["runs"] for row in data["rows"]] == [2, 2]
    section = DOCUMENTED.read_text(encoding="utf-8").split("### `sweep`\n")[1].split("\n#")[0]
    assert set(data["rows"][0]) == set(re.findall(r"`(\w+)`", section.split("|---|---|")[1].split("|\n\n")[0]))
    assert data["rows"][0]["difference"] == 0
    accuracy = [load_run(out / f"scheduler=pls,seed={s}").records[-1].test_accuracy or 0 for s in (0, 1)]
    assert data["rows"][1]["accuracy"] == pytest.approx(sum(accuracy) / 2)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [cell.name for cell in sweep.read_cells(path)]
    assert all("summary" in line for line in lines)
    assert "95 %" in shown(capsys, "sweep", path, "--out", str(out))
    assert len(trained) == 5  # everything was complete


def test_a_run_that_cannot_be_trained_is_said_and_the_others_go_on(capsys: Capture, tmp_path: Path) -> None:
    text = "seeds: [0]\ngrid: {hardware.profile: [nonesuch, b200], training.epochs: [1]}\n"
    data = answer(capsys, "sweep", spec(tmp_path, text), "--out", str(tmp_path / "out"), code=1)
    assert list(data["failures"]) == ["profile=nonesuch,epochs=1,seed=0"]
    assert [row["runs"] for row in data["rows"]] == [0, 1]
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert "nonesuch" in lines[0]["error"]


def test_dry_run_and_wrong_words(capsys: Capture, tmp_path: Path) -> None:
    path = spec(tmp_path, "seeds: [0, 1]\n")
    assert [row["name"] for row in answer(capsys, "sweep", path, "--dry-run")["rows"]] == ["seed=0", "seed=1"]
    assert "2 runs" in shown(capsys, "sweep", path, "--dry-run")
    assert "--out" in refused(capsys, "sweep", path)[1]
    assert "--jobs 0" in refused(capsys, "sweep", path, "--jobs", "0")[0]
    assert "no such file" in refused(capsys, "sweep", str(tmp_path / "none.yaml"))[0]
    assert "no specification" in refused(capsys, "sweep")[0]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=31))
def test_interval_is_students(values: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = sweep.interval(values)
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    half = stats.t.ppf(0.975, len(values) - 1) * spread / len(values) ** 0.5
    assert low == pytest.approx(mean - half, abs=1e-3)
    assert high == pytest.approx(mean + half, abs=1e-3)


def test_interval_of_one_value() -> None:
    assert sweep.interval([0.5]) == (None, None)
