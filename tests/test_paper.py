"""DPQuant's formula against the figures it was published with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_chip import toy_chip

from emulation.errors import InputError
from hwmodels.cost import StepModel
from hwmodels.paper import PUBLISHED, PUBLISHED_FRACTION, implied_overhead, paper_estimate, paper_step
from hwmodels.workload import trace


def test_the_published_figures() -> None:
    assert paper_estimate(0.9, 0.0).speedup == pytest.approx(3.08, abs=0.005)
    assert paper_estimate(0.9, 0.189).speedup == pytest.approx(2.21, abs=0.005)
    assert paper_estimate(0.9, 0.365).speedup == pytest.approx(1.75, abs=0.005)
    for speedup, overhead in zip(PUBLISHED, (0.189, 0.365), strict=True):
        assert implied_overhead(speedup, PUBLISHED_FRACTION) == pytest.approx(overhead, abs=0.0005)


def test_lines_derive_the_speedup() -> None:
    lines = dict(paper_estimate(0.9, 0.15, 0.05, train=2.0).lines())
    assert lines["1 - p + p / r"] == pytest.approx(0.325)
    assert lines["(1 - p + p / r) (T_train - T_overhead)"] == pytest.approx(0.325 * 1.85)
    assert lines["speedup = T_train / T"] == pytest.approx(2.0 / (0.05 + 0.325 * 1.85 + 0.15))


@given(st.floats(0.01, 1), st.floats(0, 0.99))
def test_implied_overhead_inverts_the_formula(fraction: float, overhead: float) -> None:
    speedup = paper_estimate(fraction, overhead).speedup
    assert implied_overhead(speedup, fraction) == pytest.approx(overhead, abs=1e-6)


def test_on_our_own_account_of_a_step() -> None:
    workload = trace(nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)), torch.zeros(1, 1024), 4096)
    model = StepModel(workload, toy_chip(), basis="peak")
    phases = model.estimate({}).phases
    found = paper_step(model, 0.9, analysis_s_per_step=1e-6)
    assert found.train == pytest.approx(model.step_s({}))
    products = phases["forward"] + phases["grad_input"] + phases["weight_gradient"]
    assert found.overhead == pytest.approx(found.train - products)
    assert found.total == pytest.approx(1e-6 + 0.325 * products + found.overhead)


@pytest.mark.parametrize(
    "call",
    [
        lambda: paper_estimate(1.1, 0.0),
        lambda: paper_estimate(0.5, 1.5),
        lambda: paper_estimate(0.5, 0.1, -1.0),
        lambda: paper_estimate(0.5, 0.1, train=0.0),
        lambda: implied_overhead(4.0, 0.9),
        lambda: implied_overhead(1.0, 0.0),
    ],
)
def test_bad_input(call) -> None:
    with pytest.raises(InputError):
        call()
