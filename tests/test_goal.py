"""Goals of a schedule: what is refused, and which plans come of a draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chip import toy_chip

from dpquant.goal import Goal
from dpquant.modelled import ModelledRun
from dpquant.models import build_model, example_input
from dpquant.schedule import LONGEST_COOLDOWN, SHORTEST_COOLDOWN, WORTH
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
    with pytest.raises(InputError, match=r"9x is out of reach on toy with nvfp4: at most \d") as caught:
        Goal(scheduler="pls", target_speedup=9).check(RUN, reach)
    most = float(str(caught.value).split("at most ")[1].rstrip("x"))
    assert reach.max_speedup - 0.01 < most <= reach.max_speedup
    Goal(scheduler="pls", target_speedup=most).check(RUN, reach)
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


def whole_run(
    goal: Goal, epochs: int, per_epoch: int = 4, formats: tuple[str, ...] = ("nvfp4",)
) -> list[dict[str, str]]:
    """The plans of a run's epochs, as its engine asks for them."""
    run = replace(RUN, steps=epochs * per_epoch, formats=formats)
    seconds, plans = 0.0, []
    for epoch in range(epochs):
        done = epoch * per_epoch
        found = goal.plan(run, None, epoch=epoch, seed=3, steps=done + per_epoch, steps_done=done, seconds_done=seconds)
        seconds += per_epoch * run.estimate(found).step_s
        plans.append(dict(found))
    return plans


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["annealed", "cooldown", "delayed"]), st.floats(0, 1), st.integers(1, 25))
def test_choices_of_epochs_quantize_as_many_layers_as_a_fixed_choice(
    scheduler: str, fraction: float, epochs: int
) -> None:
    sizes = [len(plan) for plan in whole_run(Goal(scheduler=scheduler, fraction=fraction), epochs)]
    fixed = [len(plan) for plan in whole_run(Goal(scheduler="static", fraction=fraction), epochs)]
    assert sum(sizes) == sum(fixed)
    assert sizes == sorted(sizes, reverse=scheduler != "delayed")
    assert sum(0 < size < max(sizes) for size in sizes) <= 1
    assert scheduler == "cooldown" or max(sizes) in (0, len(LAYERS)) or sum(map(bool, sizes)) == 1


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["annealed", "cooldown", "delayed"]), st.floats(0, 1), st.integers(5, 25),
    st.sampled_from([("nvfp4",), ("fp8", "nvfp4")]),
)  # fmt: skip
def test_choices_of_epochs_meet_the_target_of_the_whole_run(
    scheduler: str, share: float, epochs: int, formats: tuple[str, ...]
) -> None:
    run = replace(RUN, formats=formats)
    most = run.reach()
    target = 1 + share * (most.max_speedup - 1)
    plans = whole_run(Goal(scheduler=scheduler, target_speedup=target), epochs, formats=formats)
    full_s, seconds = run.estimate({}).step_s, [run.estimate(plan).step_s for plan in plans]
    layer_s = max(full_s - run.estimate({name: "nvfp4"}).step_s for name in LAYERS)
    spare_s = epochs * full_s / target - sum(seconds)
    assert -1e-8 * epochs * full_s <= spare_s < layer_s  # of one layer in one epoch
    if scheduler != "cooldown" and 0.3 < share < 0.7:
        most_s, none = run.estimate(most.plan).step_s, {}
        assert plans[0 if scheduler == "delayed" else -1] == none
        assert seconds[-1 if scheduler == "delayed" else 0] < most_s + layer_s
        assert sum(most_s + layer_s < s < full_s for s in seconds) <= 1  # the epoch between


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1), st.sampled_from([("nvfp4",), ("fp8", "nvfp4")]))
def test_cooldown_takes_the_layers_that_are_worth_it_as_long_as_the_target_asks(
    share: float, formats: tuple[str, ...]
) -> None:
    epochs, run = 40, replace(RUN, formats=formats)
    most = run.reach().max_speedup
    target = 1 + share * (most - 1)
    plans = whole_run(Goal(scheduler="cooldown", target_speedup=target), epochs, formats=formats)
    saved = {name: run.estimate({}).step_s - run.estimate({name: "nvfp4"}).step_s for name in LAYERS}
    order = sorted(LAYERS, key=lambda name: -saved[name])
    worth = [name for name in LAYERS if saved[name] >= WORTH * max(saved.values())]
    taken = [plan for plan in plans if plan]
    assert plans == taken + [{}] * (epochs - len(taken))
    if len(taken) > 1:  # the last of them may need fewer
        assert all(plan == taken[0] for plan in taken[:-1])
        count = len(taken[0])
        assert set(taken[0]) == set(order[:count])

        def without(layers: list[str]) -> float:
            """The share of the run in full precision with which these layers before it meet the target."""
            alone = 1 / run.speedup(dict.fromkeys(layers, "nvfp4"))
            return (1 / target - alone) / (1 - alone)

        ending = without(order[:count])
        assert abs(ending * epochs - (epochs - len(taken))) <= 1
        if count < len(worth):
            assert ending >= LONGEST_COOLDOWN - 1e-9
        if 1 < count <= len(worth):
            assert without(order[: count - 1]) < LONGEST_COOLDOWN + 1e-9
        if count > len(worth):
            assert without(worth) < SHORTEST_COOLDOWN + 1e-9
    ends = (1 - SHORTEST_COOLDOWN) / most + SHORTEST_COOLDOWN <= 1 / target
    assert not ends or len(taken) <= round((1 - SHORTEST_COOLDOWN) * epochs) + 1


@pytest.mark.parametrize(("share", "taken"), [(1 - 1e-6, 1), (1 - 1e-12, 2), (1.0, 2), (1 + 1e-12, 2)])
def test_a_layer_that_saves_just_the_share_is_worth_it_however_sums_are_rounded(share: float, taken: int) -> None:
    run = replace(RUN)
    order = sorted(run.savings, key=lambda name: -run.savings[name])
    run.__dict__["savings"] = {name: [1.0, WORTH * share, 0.0][min(i, 2)] for i, name in enumerate(order)}
    alone = run.speedup({order[0]: "nvfp4"})
    goal = Goal(scheduler="cooldown", target_speedup=1 / (1 - 0.8 * (1 - 1 / alone)))  # by one layer in 80 % of the run
    found = goal.plan(run, None, epoch=0, seed=1, steps=1, steps_done=0, seconds_done=0.0)
    assert list(found) == order[:taken]


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.sampled_from([("nvfp4",), ("fp8", "nvfp4")]))
def test_no_draw_meets_a_target_with_fewer_layers_than_greedy(share: float, formats: tuple[str, ...]) -> None:
    run = replace(RUN, formats=formats)
    target = 1 + share * (run.reach().max_speedup - 1)
    sizes = {}
    for scheduler in ("greedy", "pls"):
        goal = Goal(scheduler=scheduler, target_speedup=target)
        found = [goal.plan(run, None, epoch=e, seed=5, steps=10, steps_done=0, seconds_done=0.0) for e in range(8)]
        assert all(run.speedup(plan) >= target * (1 - 1e-12) for plan in found)
        sizes[scheduler] = [len(plan) for plan in found]
    assert max(sizes["greedy"]) <= min(sizes["pls"])


def test_a_run_that_ends_earlier_than_planned_keeps_to_its_share() -> None:
    goal = Goal(scheduler="annealed", fraction=0.5)
    shorter = replace(RUN, steps=16)
    later = goal.plan(shorter, None, epoch=2, seed=3, steps=12, steps_done=8, seconds_done=0.0)
    assert len(later) == 0  # 8 of 16 steps were quantized before
