"""Measuring a machine: the profile is one that check accepts and load reads; what is absent is said."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emulation.errors import InputError
from hwmodels import calibrate as calibrating
from hwmodels import measure
from hwmodels.calibrate import calibrate, measurements_csv
from hwmodels.nvml import power_meter
from hwmodels.profile import check, load_profile
from hwmodels.validate import read_measurements, validate

CPU = torch.device("cpu")


def test_this_machines_cpu_becomes_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwmodels.fit.TILES", ((64, 64),))
    seen: list[tuple[str, float]] = []
    found = calibrate("cpu", budget_s=2.0, progress=lambda label, fraction: seen.append((label, fraction)))
    path = tmp_path / "mine.yaml"
    path.write_text(found.profile_yaml)
    assert [str(error) for error in check(path)] == []
    profile = load_profile(path)
    assert profile.family == "cpu"
    assert profile.calibrated_on == "mine"
    assert profile.gemm_seconds(128, 128, 128, "bfloat16") > 0
    assert profile.rate("nvfp4").falls_back_to == "bfloat16"
    assert [row["format"] for row in found.rows] == ["bfloat16"]
    assert found.rows[0]["n"] == len(found.measurements) >= 24
    assert validate(profile, found.measurements)[0]["n"] == len(found.measurements)
    table = tmp_path / "timed.csv"
    table.write_text(measurements_csv(found.measurements))
    assert [row.m for row in read_measurements(table)] == [row.m for row in found.measurements]
    assert not any(row.quantized for row in read_measurements(table))  # products of operands in their format already
    assert any(note.startswith("fp8: not measured") for note in found.notes)
    assert any(note.startswith("energy: not measured") for note in found.notes)
    assert seen[-1] == ("done", 1.0)
    assert all(0.0 <= fraction <= 1.0 for _, fraction in seen)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpquant.cli import main

    monkeypatch.setattr("hwmodels.fit.TILES", ((64, 64),))
    path, table = tmp_path / "mine.yaml", tmp_path / "timed.csv"
    words = ["hardware", "calibrate", "--device", "cpu", "--seconds", "1", "--out", str(path)]
    assert main([*words, "--data", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["format"] == "bfloat16"
    assert check(path) == []
    assert len(read_measurements(table)) >= 24
    assert main(words) == 2
    assert "already there" in capsys.readouterr().err
    assert main(words[:-2]) == 2
    assert main([*words[:-1], str(tmp_path / "no" / "mine.yaml")]) == 2


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "not a device"), ("meta", "cannot be measured"), ("cuda:99", "not there")]
)
def test_devices_that_are_not_there(device: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(device)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000"),
        ("NVIDIA RTX A1000", None),
        ("Some other chip", None),
    ],
)
def test_a_chip_is_known_by_its_name(title: str, name: str | None) -> None:
    found = calibrating._shipped(title)
    assert (found.name if found else None) == name


def test_shapes_are_spread_and_light() -> None:
    found = list(itertools.islice(measure.shapes((16384, 8192, 8192), 1e12), 300))
    assert len(set(found)) > 290
    for m, n, k in found:
        assert 1 <= m <= 16384
        assert n % 16 == k % 16 == 0
        assert 32 <= min(n, k) <= max(n, k) <= 8192
        assert 2 * m * n * k <= 1e12
    assert all(n % 128 == k % 128 == 0 for _, n, k in itertools.islice(measure.shapes((64, 999, 999), 1e12, 128), 99))
    assert min(m for m, _, _ in found) < 4
    assert max(m for m, _, _ in found) > 4096


def test_products_are_what_they_are_said_to_be() -> None:
    calls = measure.gemm_calls("bfloat16", 3, 32, 48, CPU, cache_bytes=1e5)
    assert len(calls) == 8
    out = calls[0]()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (3, 32)
    assert measure.kernels_of(CPU) == {
        "bfloat16": None,
        "fp8": "no such unit in a CPU",
        "fp8_block": "no such unit in a CPU",
        "nvfp4": "no such unit in a CPU",
    }
    assert measure.seconds_per_call([lambda: None], CPU, 0.0) < 1.0


def test_block_scales_are_laid_out_as_hoppers_library_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import functional

    seen: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(functional, "scaled_mm", lambda a, b, sa, ra, sb, rb: seen.append((a, b, sa, sb)))
    activation, weight = torch.randn(5, 640), torch.randn(256, 640)
    (call,) = measure._hopper_block_calls(activation, [weight])
    call()
    a, b, scale_a, scale_b = seen[0]
    assert a.shape == (8, 640)  # rows by fours
    assert b.shape == (640, 256)
    assert torch.equal(a[:5].float(), activation.to(torch.float8_e4m3fn).float())
    assert (tuple(scale_a.shape), scale_a.stride()) == ((8, 5), (1, 8))  # the rows' scales side by side
    assert (tuple(scale_b.shape), scale_b.stride()) == ((8, 2), (1, 8))  # blocks along k side by side, by fours


class Library:
    """Stands for the driver's library: a board that draws 500 W, one tick a call."""

    def __init__(self, *, counter: bool = True) -> None:
        self.millijoules, self.counter = 1000, counter

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-1234" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        self.millijoules += 500
        ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return 0 if self.counter else 3

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, value: Any) -> int:
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))[0] = 700_000
        return 0


def test_the_power_meter_reads_joules_and_watts() -> None:
    meter = power_meter("1234", Library())
    first = meter.joules()
    assert meter.joules() - first == pytest.approx(0.5)
    assert meter.limit_w() == 700.0
    with pytest.raises(InputError, match="nvmlDeviceGetHandleByUUID failed with code 6"):
        power_meter("GPU-5678", Library())
    with pytest.raises(InputError, match="TotalEnergyConsumption failed"):
        power_meter("GPU-1234", Library(counter=False))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machines_gpu_becomes_a_profile(tmp_path: Path) -> None:
    found = calibrate("cuda", budget_s=30.0)
    path = tmp_path / "mine.yaml"
    path.write_text(found.profile_yaml)
    assert [str(error) for error in check(path)] == []
    profile = load_profile(path)
    assert profile.calibration is not None
    assert "bfloat16" in profile.calibration.kernels
    for row in found.rows:
        assert row["rank_correlation"] > 0.9


def test_a_busy_machine_is_said() -> None:
    assert calibrating._busy(1.0, 0.05) == []
    assert calibrating._busy(0.0, 0.0) == []
    assert "50%" in calibrating._busy(1.0, 1.0)[0]
    ran, waited = measure.waiting()
    assert min(ran, waited) >= 0.0
    assert measure.waiting()[0] >= ran
