"""Every sweep that ships trains: one run of each kind for an epoch of a few steps, on small random data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from dpquant.data import Splits
from dpquant.models import build_model
from dpquant.sweep import load_sweep, shipped_sweeps
from dpquant.train import prepare, train

SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "npz": (3, 32, 32)}
SMALL = {
    ("training", "batch_size"): 16,
    ("training", "dataset_size"): 40,
    ("training", "device"): "cpu",
    ("privacy", "target_delta"): 1e-6,
    ("analysis", "expected_batch_size"): 8,
}
SAME_KIND = ("training.epochs", "training.learning_rate", "privacy.target_epsilon", "schedule.fraction")
SAME_KIND += ("schedule.target_speedup", "schedule.layers", "schedule.beta")


def part(name: str, size: int, generator: torch.Generator) -> TensorDataset:
    """Random examples of a data set's shape."""
    labels = torch.randint(0, 5, (size,), generator=generator)
    if name == "tokens":
        return TensorDataset(torch.randint(0, 27, (size, 20), generator=generator), labels)
    return TensorDataset(torch.randn(size, *SHAPES[name], generator=generator), labels)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", sorted(shipped_sweeps()))
def test_each_kind_of_run_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpquant.privacy.calibrate_noise", lambda **given: 1.0)  # so few examples cannot be private
    (tmp_path / "pretrained").mkdir()
    pretrained = build_model("cifar_cnn", activation="tanh", norm="none").state_dict()
    started = {key: tensor for key, tensor in pretrained.items() if not key.startswith("fc2")}
    torch.save(started, tmp_path / "pretrained" / "pretrained.pt")
    kinds: dict[str, Any] = {}
    for run in load_sweep(name, SMALL).runs:
        kinds.setdefault(str({k: v for k, v in run.settings.items() if k not in SAME_KIND}), run)
    generator = torch.Generator().manual_seed(0)
    for run in kinds.values():
        run.config["training"]["batch_size"] = SMALL["training", "batch_size"]  # a sweep may set its own
        data, schedule = run.config["data"]["name"], run.config["schedule"]
        if schedule["target_speedup"] is not None:
            schedule["target_speedup"] = 1.01  # so small a batch reaches little more
            run.config["training"]["epochs"] = run.config["analysis"]["interval"] = 200  # and analyses take time of it
        splits = Splits(train=part(data, 40, generator), test=part(data, 20, generator), classes=5)
        record = next(train(prepare(run.config, splits=splits), None))
        assert record.steps >= 2
        assert record.test_loss is not None
        assert torch.isfinite(torch.tensor(record.test_loss)), run.name
