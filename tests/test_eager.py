"""The constants of an eager framework: hosts and devices joined, and a profile's own constants used and refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_chip import toy_chip

from hwmodels.cost import estimate
from hwmodels.eager import EAGER, EagerCosts
from hwmodels.profile import check, load_profile
from hwmodels.workload import trace

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
