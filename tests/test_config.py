from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpquant.config import load_config, run_schema, shipped_configs
from emulation.errors import InputError
from hwmodels.strict_yaml import InputErrors

MINIMAL = """\
model: {name: digits_cnn}
data: {name: digits}
hardware: {profile: b200}
format: luq_fp4
schedule:
  scheduler: pls
  fraction: 0.5
training:
  epochs: 2
  batch_size: 64
  learning_rate: 0.5
  max_grad_norm: 1.0
privacy:
  target_epsilon: 8.0
  target_delta: 1e-4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def refused(tmp_path: Path, text: str, overrides: dict[Any, Any] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text), overrides)
    return caught.value


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config["name"] == "run"
    assert config["privacy"] == {
        "target_epsilon": 8.0,
        "noise_multiplier": None,
        "target_delta": 1e-4,
        "accountant": "prv",
    }
    assert config["training"]["clipping"] == "bookkeeping"
    assert config["analysis"]["interval"] == 2
    assert config["seed"] is None


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_are_sound(name: str) -> None:
    config = load_config(name)
    assert config["name"] == name
    assert load_config(f"configs/runs/{name}.yaml").data == config.data


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="no such configuration") as caught:
        load_config("configs/runs/digitz.yaml")
    assert caught.value.hint == "did you mean 'digits'?"


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("epochs: 2", "epochz: 2", 9, "unknown key 'epochz'"),
        ("epochs: 2", "epochs: 0", 9, "epochs=0"),
        ("epochs: 2", "epochs: two", 9, "epochs='two'"),
        ("epochs: 2", "epochs: 2.5", 9, "epochs=2.5"),
        ("epochs: 2", "epochs: 2\n  epochs: 3", 10, "epochs"),
        ("learning_rate: 0.5", "learning_rate: -0.5", 11, "learning_rate=-0.5"),
        ("learning_rate: 0.5", "learning_rate: .nan", 11, "learning_rate"),
        ("batch_size: 64", "batch_size: 0", 10, "batch_size=0"),
        ("target_epsilon: 8.0", "target_epsilon: 0", 14, "target_epsilon=0"),
        ("target_delta: 1e-4", "target_delta: 1.0", 15, "target_delta=1.0"),
        ("target_delta: 1e-4", "target_delta: 0", 15, "target_delta=0"),
        ("scheduler: pls", "scheduler: random", 6, "scheduler='random'"),
        ("fraction: 0.5", "fraction: 1.5", 7, "fraction=1.5"),
        ("  fraction: 0.5\n", "", 5, "neither target_speedup nor fraction"),
        ("  fraction: 0.5\n", "  fraction: 0.5\n  target_speedup: 1.5\n", 5, "target_speedup and fraction"),
        ("  fraction: 0.5\n", "  layers: [fc1]\n", 7, "layers is for scheduler static"),
        ("target_epsilon: 8.0", "accountant: rdp", 13, "one of target_epsilon and noise_multiplier"),
        ("data: {name: digits}\n", "", 1, "missing key 'data'"),
    ],
)
def test_each_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in MINIMAL
    error = refused(tmp_path, MINIMAL.replace(old, new))
    errors = error.errors if isinstance(error, InputErrors) else (error,)
    assert [(e.line, str(e.file).endswith("run.yaml")) for e in errors if message in e.message] == [(line, True)]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, MINIMAL.replace("epochs: 2", "epochs: 0").replace("pls", "plz"))
    assert isinstance(error, InputErrors)
    assert [e.line for e in error.errors] == [6, 9]


def test_overrides_take_the_files_place(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(path, {("schedule", "target_speedup"): 1.5, ("schedule", "fraction"): None, ("seed",): 3})
    assert config["schedule"]["target_speedup"] == 1.5
    assert config["schedule"]["fraction"] is None
    assert config["seed"] == 3


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path, MINIMAL, {("schedule", "scheduler"): "plz"})
    assert str(error) == "schedule.scheduler='plz' is unknown"


def test_the_schema_knows_every_section() -> None:
    assert set(run_schema()["properties"]) >= {"model", "data", "training", "privacy", "schedule", "analysis"}
