"""Goals of a schedule: what is refused, and which plans come of a draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_chip import toy_chip

from dpquant.goal import Goal
from dpquant.modelled import ModelledRun
from dpquant.models import build_model, example_input
from dpquant.sensitivity import AnalysisSettings
from emulation.errors import InputError
from hwmodels.workload import trace

with torch.device("meta"):
    WORKLOAD = trace(build_model("digits_cnn"), example_input("digits_cnn"), 256)
LAYERS = WORKLOAD.quantizable
RUN = ModelledRun(
    workload=WORKLOAD, profile=toy_chip(), formats=("nvfp4",), basis="peak", clipping="bookkeeping",
    analysis=AnalysisSettings(), analyses=0, expected_batch_size=256, steps=40,
)  # fmt: skip


def plan(goal: Goal, epoch: int = 0, sensitivities: dict[str, float] | None = None) -> dict[str, str]:
    found = goal.plan(RUN, sensitivities, epoch=epoch, seed=1, steps=10, steps_done=0, seconds_done=0.0)
    return dict(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler": "plz", "fraction": 0.5}, "unknown scheduler='plz'"),
        ({"scheduler": "pls"}, "one of target_speedup, fraction and layers"),
        ({"scheduler": "pls", "fraction": 0.5, "target_speedup": 1.1}, "one of target_speedup, fraction and layers"),
        ({"scheduler": "pls", "layers": ("fc1",)}, "layers is for scheduler='static'"),
        ({"scheduler": "pls", "target_speedup": 0.9}, "target_speedup=0.9"),
        ({"scheduler": "pls", "target_speedup": float("inf")}, "target_speedup=inf"),
        ({"scheduler": "pls", "fraction": -0.1}, "fraction=-0.1"),
    ],
)
def test_what_is_no_goal_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Goal(**given)


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    reach = RUN.reach()
    Goal(scheduler="pls", target_speedup=reach.max_speedup).check(RUN, reach)
    with pytest.raises(InputError, match=rf"9x is out of reach on toy with nvfp4: at most {reach.max_speedup:.2f}x"):
        Goal(scheduler="pls", target_speedup=9).check(RUN, reach)
    Goal(scheduler="full", target_speedup=9).check(RUN, reach)
    with pytest.raises(InputError, match="layers='fc9' is no layer") as caught:
        Goal(scheduler="static", layers=("fc9",)).check(RUN, reach)
    assert "fc" in str(caught.value.hint)


def test_plans() -> None:
    assert plan(Goal(scheduler="full")) == {}
    assert plan(Goal(scheduler="static", layers=LAYERS[:2])) == dict.fromkeys(LAYERS[:2], "nvfp4")
    assert len(plan(Goal(scheduler="pls", fraction=0.5))) == round(0.5 * len(LAYERS))
    assert plan(Goal(scheduler="static", fraction=0.5), 0) == plan(Goal(scheduler="static", fraction=0.5), 7)
    harmless = {name: float(name != LAYERS[3]) for name in LAYERS}
    assert set(plan(Goal(scheduler="dpquant", fraction=1 / len(LAYERS), beta=1e4), 0, harmless)) == {LAYERS[3]}
    target = 0.5 * (1 + RUN.reach().max_speedup)
    assert RUN.speedup(plan(Goal(scheduler="pls", target_speedup=target))) >= target
