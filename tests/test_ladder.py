"""The knapsack against every choice there is."""

import functools
import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chip import toy_chip

from dpquant.models import build_model, example_input
from emulation.errors import InputError
from hwmodels import ladder, planner
from hwmodels.cost import StepModel, estimate
from hwmodels.workload import Workload, trace

TOY = toy_chip()


@functools.cache
def traced(name: str, batch: int = 256) -> Workload:
    with torch.device("meta"):
        model = build_model(name)
    return trace(model, example_input(name), batch)


def harm_of(choices: dict[str, list[ladder.Choice]], chosen: dict[str, str]) -> tuple[float, float]:
    found = [next(c for c in choices[layer] if c.format == fmt) for layer, fmt in chosen.items()]
    return sum(c.saved for c in found), sum(c.harm for c in found)


CHOICE = st.builds(
    lambda fmt, saved, harm: ladder.Choice(format=fmt, saved=saved, harm=harm),
    st.sampled_from(["fp8", "nvfp4"]),
    st.integers(1, 100).map(float),
    st.floats(0, 10),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(CHOICE, min_size=1, max_size=2, unique_by=lambda c: c.format), min_size=1, max_size=7),
    st.floats(0.01, 1.2),
)
def test_no_choice_does_less_harm(options: list[list[ladder.Choice]], share: float) -> None:
    choices = {f"layer{i}": found for i, found in enumerate(options)}
    needed = share * sum(max(c.saved for c in found) for found in options)
    everything = itertools.product(*([None, *found] for found in options))
    sums = [(sum(c.saved for c in some if c), sum(c.harm for c in some if c)) for some in everything]
    enough = [harm for saved, harm in sums if saved >= needed * (1 - 1e-12)]
    chosen = ladder.knapsack(choices, needed)
    if not enough:
        assert chosen is None
        return
    assert chosen is not None
    saved, harm = harm_of(choices, chosen)
    assert saved >= needed * (1 - 1e-9)
    # rounding: as good as the best that saves a thousandth more, if there is one
    close = [harm for saved, harm in sums if saved >= needed * (1 + len(options) / ladder.BINS)]
    assert harm <= min(close, default=math.inf) + 1e-9
    assert harm >= min(enough) - 1e-9


def filled(workload: Workload, order: Iterable[str], target: float) -> dict[str, str]:
    """Layers that gain in NVFP4, taken in order until the target is met."""
    gain = planner.gains(StepModel(workload, TOY, basis="peak"), "nvfp4")
    plan: dict[str, str] = {}
    for layer in order:
        if estimate(workload, plan, TOY, basis="peak").speedup >= target:
            break
        if gain[layer] > 0:
            plan[layer] = "nvfp4"
    return plan


def test_the_plan_meets_its_target_with_the_least_sensitive_layers() -> None:
    workload = traced("resnet18")
    sensitivities = {
        "fp8": {name: 1.0 + i for i, name in enumerate(workload.quantizable)},
        "nvfp4": {name: 1.5 * (1.0 + i) for i, name in enumerate(workload.quantizable)},
    }
    most = planner.reach(workload, TOY, ["fp8", "nvfp4"], basis="peak").max_speedup
    target = 1 + 0.6 * (most - 1)
    plan = ladder.cheapest(workload, TOY, sensitivities, target, basis="peak")
    assert estimate(workload, plan, TOY, basis="peak").speedup >= target * (1 - 1e-9)
    gain = planner.gains(StepModel(workload, TOY, basis="peak"), "nvfp4")
    in_order = filled(workload, sorted(gain, key=lambda n: -gain[n]), target)

    def harm(formats: dict[str, str]) -> float:
        return sum(sensitivities["fp8" if f == "float8_e4m3fn" else f][name] for name, f in formats.items())

    assert harm(dict(plan)) <= harm(dict(in_order))
    everything = ladder.cheapest(workload, TOY, sensitivities, most * (1 - 1e-9), basis="peak")
    assert estimate(workload, everything, TOY, basis="peak").speedup == pytest.approx(most, rel=1e-6)


def test_layers_outside_the_sensitivities_stay_out() -> None:
    workload = traced("resnet18")
    allowed = workload.quantizable[5:12]
    plan = ladder.cheapest(workload, TOY, {"nvfp4": dict.fromkeys(allowed, 1.0)}, 1.02, basis="peak")
    assert set(plan) <= set(allowed)
    assert len(ladder.cheapest(workload, TOY, {"nvfp4": dict.fromkeys(allowed, 1.0)}, 1.0, basis="peak")) == 0


def test_energy_can_be_the_target() -> None:
    workload = traced("resnet18")
    harm = {"nvfp4": dict.fromkeys(workload.quantizable, 1.0)}
    plan = ladder.cheapest(workload, TOY, harm, 1.1, objective="energy", basis="peak")
    found = estimate(workload, plan, TOY, basis="peak")
    assert found.baseline_energy_joules / found.energy_joules >= 1.1 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("harm", "target", "message"),
    [
        ({"nvfp4": {"conv1": 1.0}}, 3.0, r"target_speedup=3.0 is out of reach on toy: at most 1\.\d\dx"),
        ({"nvfp4": {"conv1": math.nan}}, 1.1, "sensitivity=nan of layer 'conv1'"),
        ({"nvfp4": {"conv0": 1.0}}, 1.1, "layer 'conv0'"),
        ({"int8": {"conv1": 1.0}}, 1.1, "format='int8'"),
        ({}, -1.0, "target_speedup=-1.0"),
    ],
)
def test_bad_input(harm: dict[str, dict[str, float]], target: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ladder.cheapest(traced("resnet18"), TOY, harm, target, basis="peak")


# --- choices in a drawn order


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["resnet18", "digits_cnn", "transformer"]),
    share=st.floats(0, 1),
    analysis=st.floats(0, 0.05),
    objective=st.sampled_from(["time", "energy"]),
    data=st.data(),
)
def test_a_climb_meets_its_target_with_nothing_to_spare(
    name: str, share: float, analysis: float, objective: planner.Objective, data: st.DataObject
) -> None:
    workload = traced(name)
    choices = [(layer, fmt) for layer in workload.quantizable for fmt in ("fp8", "nvfp4")]
    order = data.draw(st.permutations(choices))
    model = StepModel(workload, TOY, basis="peak")
    base = planner.expense(model, {}, objective)
    extra = {"analysis_s_per_step": analysis * base, "objective": objective, "basis": "peak"}
    most = planner.reach(workload, TOY, ["fp8", "nvfp4"], **extra).max_speedup
    target = 1 / (1 + analysis) + share * (most - 1 / (1 + analysis)) * (1 - 1e-9)
    plan = ladder.climb(workload, TOY, order, target, **extra)

    def speedup(formats: dict[str, str]) -> float:
        return base / (planner.expense(model, model.plan_formats(formats), objective) + analysis * base)

    assert speedup(dict(plan)) >= target * (1 - 1e-12)
    assert set(plan.values()) <= {"fp8", "nvfp4"}
    for layer in plan:
        assert speedup({name: fmt for name, fmt in plan.items() if name != layer}) < target
        first = min(choices, key=lambda c: (c[0] != layer, order.index(c)))
        assert order.index((layer, plan[layer])) >= order.index(first)


def test_a_layer_climbs_to_the_format_that_gains_more_and_never_back() -> None:
    workload = traced("resnet18")
    names = workload.quantizable
    up = [(name, fmt) for fmt in ("fp8", "nvfp4") for name in names]
    best = planner.reach(workload, TOY, ["fp8", "nvfp4"], basis="peak")
    for order in (up, up[::-1]):
        assert set(ladder.climb(workload, TOY, order, 100.0, basis="peak")) == set(best.plan)
        reached = estimate(workload, ladder.climb(workload, TOY, order, 100.0, basis="peak"), TOY, basis="peak").speedup
        assert reached == pytest.approx(best.max_speedup)


def test_one_format_in_order_is_a_fill_less_what_it_turned_out_not_to_need() -> None:
    workload = traced("resnet18")
    target = 1 + 0.5 * (planner.reach(workload, TOY, "nvfp4", basis="peak").max_speedup - 1)
    taken = filled(workload, workload.quantizable, target)
    climbed = ladder.climb(workload, TOY, [(n, "nvfp4") for n in workload.quantizable], target, basis="peak")
    assert set(climbed) <= set(taken)
    assert list(taken)[-1] in climbed


def test_a_climb_names_formats_as_they_were_given_and_refuses_what_it_does_not_know() -> None:
    workload = traced("digits_cnn")
    plan = ladder.climb(workload, TOY, [(n, "e4m3") for n in workload.quantizable], 100.0, basis="peak")
    assert set(plan.values()) <= {"e4m3"}
    with pytest.raises(InputError, match="layer 'conv9'"):
        ladder.climb(workload, TOY, [("conv9", "fp8")], 1.1, basis="peak")
    with pytest.raises(InputError, match="target_speedup=0"):
        ladder.climb(workload, TOY, [], 0, basis="peak")
