"""The constants of an eager framework: hosts and devices joined, and a profile's own constants used and refused."""

from __future__ import annotations

import importlib.util
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


def predictions() -> Any:
    spec = importlib.util.spec_from_file_location("predicted", ROOT / "benchmarks" / "predicted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predicted"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_every_measured_step_and_how_far_off_its_prediction_is() -> None:
    module, profile = predictions(), load_profile("h200")
    steps = module.measured(sorted(module.RESULTS.glob("step_h200_*.json")))
    page = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert module.table(steps, profile) in page, "run `python benchmarks/predicted.py --markdown`"
    held_out = [step for step in steps if step.held_out]
    seen = [step for step in steps if not step.held_out]
    assert min(len(held_out), len(seen)) >= 12
    for step in steps:
        off = abs(step.predicted(profile).step_s / step.seconds - 1)
        assert off < (0.2 if step.batch_size == 1024 else 0.3), step
