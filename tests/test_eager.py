"""The constants of an eager framework: hosts and devices joined, and a profile's own constants used and refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_chip import toy_chip

from hwmodels.cost import estimate
from hwmodels.eager import EAGER, EagerCosts
from hwmodels.profile import check, load_profile
from hwmodels.workload import trace

ROOT = Path(__file__).parent.parent
SECONDS = st.floats(0, 10)


@given(SECONDS, SECONDS, st.floats(1, 32))
def test_a_step_takes_at_least_the_longer_and_at_most_both(host: float, device: float, overlap: float) -> None:
    found = replace(EAGER, overlap=overlap).step_seconds(host, device)
    assert max(host, device) <= found * (1 + 1e-12)
    assert found <= (host + device) * (1 + 1e-12)


def test_by_hand() -> None:
    assert replace(EAGER, overlap=1.0).step_seconds(3.0, 4.0) == pytest.approx(7.0)
    assert replace(EAGER, overlap=2.0).step_seconds(3.0, 4.0) == pytest.approx(5.0)
    assert EAGER.step_seconds(0.0, 0.0) == 0.0
    assert EAGER.layer_s("mixed") == EAGER.layer_s("ghost") == EAGER.ghost_layer_s
    assert EAGER.layer_s("hooks") == EAGER.hooks_layer_s
    assert EAGER.product_efficiency("float32") == EAGER.float32_efficiency
    assert EAGER.product_efficiency("float8_e4m3fn") == EAGER.product_efficiency("float16") == EAGER.bfloat16_efficiency


def test_a_profiles_own_constants_are_used_by_eager_estimates_alone() -> None:
    workload = trace(torch.nn.Linear(64, 64), torch.empty(1, 64), 16)
    slow = toy_chip(eager=EagerCosts(step_s=5.0))
    assert estimate(workload, {}, slow, framework="eager").step_s > 5.0
    assert estimate(workload, {}, slow).step_s == estimate(workload, {}, toy_chip()).step_s


def test_a_profile_gives_them_with_their_source(tmp_path: Path) -> None:
    profile = load_profile("h200_measured")
    assert profile.eager != EAGER
    for key in asdict(profile.eager):
        assert profile.provenance[f"eager.{key}"].status == "fitted"
    assert load_profile("h200").eager == EAGER
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: h200\neager:\n  kernel_s: {value: 20, status: fitted, source: LTN}\n  layer_s: 1\n")
    assert len(check(bad)) == 2


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


PREDICTIONS = benchmark("predicted")
STEPS = PREDICTIONS.measured(sorted(PREDICTIONS.RESULTS.glob("step_h200_*.json")))
PAGE = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("quantity", PREDICTIONS.QUANTITIES)
def test_the_page_has_every_measured_step_and_how_far_off_its_prediction_is(quantity: Any) -> None:
    table = PREDICTIONS.table(STEPS, load_profile("h200"), quantity)
    assert table in PAGE, "run `python benchmarks/predicted.py --markdown`"


def test_the_page_has_every_convolution() -> None:
    module = benchmark("convolutions")
    found = json.loads((PREDICTIONS.RESULTS / "convolutions_h200.json").read_text())
    table = module.table(found, load_profile("h200"))
    assert table in PAGE, "run `python benchmarks/convolutions.py --read ... --hardware h200 --markdown`"
    for row in (line.split(" | ") for line in table.splitlines()[2:]):
        if row[1] == "first" and row[0] != "| float32":  # as networks train
            assert 0.75 < float(row[4]) < 1.25, row


@pytest.mark.parametrize("hardware", ["h200", "h200_measured"])
def test_measured_steps_are_predicted(hardware: str) -> None:
    profile = load_profile(hardware)
    held_out = [step for step in STEPS if step.held_out]
    assert len(held_out) >= 40
    assert len({(step.precision, step.batch_size) for step in STEPS if step.model == "resnet18-cifar"}) == 12
    off = []
    for step in STEPS:
        found = step.predicted(profile)
        error = abs(found.step_s / step.seconds - 1)
        bound_by_device = step.device_s > 0.7 * step.seconds
        # the other networks ran on a busier host
        assert error < (0.2 if bound_by_device else 0.3 if step.model == "resnet18-cifar" else 0.4), step
        off += [error] * step.held_out
        if step.peak_bytes and step.batch_size >= 256 and PREDICTIONS.CASES[step.case]["framework"] == "eager":
            assert found.peak_memory_bytes == pytest.approx(step.peak_bytes, rel=0.13), step
        if step.joules and step.batch_size >= 256:
            assert found.energy_joules == pytest.approx(step.joules, rel=0.3), step
    assert sum(off) / len(off) < 0.1
