"""Plans: what can be reached, how an order is filled up to a target, and what a run has left to reach."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chip import toy_chip

from dpquant.models import build_model, example_input
from emulation.errors import InputError
from hwmodels import planner
from hwmodels.cost import StepModel, estimate
from hwmodels.profile import load_profile
from hwmodels.workload import LayerWork, Workload, trace

TOY = toy_chip()
OPTIONS = {"basis": "peak"}


@functools.cache
def traced(name: str, batch: int = 256) -> Workload:
    with torch.device("meta"):
        model = build_model(name)
    return trace(model, example_input(name), batch)


def test_plan_is_a_frozen_mapping_in_its_order() -> None:
    source = {"b": "nvfp4", "a": "nvfp4"}
    plan = planner.PrecisionPlan(formats=source)
    source["c"] = "nvfp4"
    assert dict(plan) == {"b": "nvfp4", "a": "nvfp4"}
    assert list(plan) == ["b", "a"]
    assert plan["a"] == "nvfp4"
    with pytest.raises(TypeError):
        plan.formats["c"] = "nvfp4"  # type: ignore[index]


@pytest.mark.parametrize("hardware", ["h100", "b200", "mi300x", "a100"])
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "luq_fp4"])
def test_reach_is_a_real_plan_and_no_layer_more_or_less_does_better(hardware: str, fmt: str) -> None:
    workload, profile = traced("resnet18"), load_profile(hardware)
    found = planner.reach(workload, profile, fmt, **OPTIONS)
    assert estimate(workload, found.plan, profile, **OPTIONS).speedup == pytest.approx(found.max_speedup)
    assert found.max_speedup >= 1
    model = StepModel(workload, profile, **OPTIONS)
    name = profile.rate(fmt).format
    best = model.step_s(dict(found.plan))
    for layer in workload.quantizable:
        other = dict(found.plan)
        if other.pop(layer, None) is None:
            other[layer] = name
        assert model.step_s(other) >= best * (1 - 1e-12)


@pytest.mark.parametrize("name", ["digits_cnn", "gpt2"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_where_the_host_is_slow_the_reach_is_never_below_one(name: str, batch: int) -> None:
    found = planner.reach(traced(name).at(batch), TOY, "nvfp4", framework="eager", clipping="hooks", **OPTIONS)
    assert found.max_speedup >= 1


def test_a_ladder_reaches_at_least_what_each_of_its_formats_does() -> None:
    workload = traced("resnet18")
    both = planner.reach(workload, TOY, ["fp8", "nvfp4"], **OPTIONS)
    alone = [planner.reach(workload, TOY, fmt, **OPTIONS).max_speedup for fmt in ("fp8", "nvfp4")]
    assert both.max_speedup >= max(alone)
    assert set(both.plan.values()) <= {"float8_e4m3fn", "nvfp4"}


def test_analyses_lower_the_reach() -> None:
    workload = traced("resnet18")
    model = StepModel(workload, TOY, **OPTIONS)
    base, free = model.step_s({}), planner.reach(workload, TOY, "nvfp4", **OPTIONS).max_speedup
    paid = planner.reach(workload, TOY, "nvfp4", analysis_s_per_step=0.1 * base, **OPTIONS).max_speedup
    assert 1 / paid == pytest.approx(1 / free + 0.1)
    hopeless = planner.reach(workload, TOY, "mxfp8", analysis_s_per_step=base, **OPTIONS)
    assert hopeless.max_speedup == pytest.approx(0.5)
    assert len(hopeless.plan) == 0


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 2), (0.9, 4), (1.0, 4), (0.13, 1)])
def test_fraction_counts_layers(share: float, count: int) -> None:
    plan = planner.fraction(("a", "b", "c", "d"), "fp4", share)
    assert dict(plan) == dict.fromkeys("abcd"[:count], "float4_e2m1fn")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.05, 0.4), min_size=8, max_size=40), st.floats(1.05, 1.5))
def test_what_is_left_makes_up_for_what_was_missed(saved: list[float], target: float) -> None:
    """Epochs that hit their own target only roughly still meet the run's, if the last ones can."""
    epochs, steps = len(saved), 10
    done_s = 0.0
    for epoch, over in enumerate(saved):
        rest = planner.remaining_target(target, 2.0, epochs * steps, epoch * steps, done_s)
        assert rest > 0
        exact = epoch == epochs - 1 or epoch % 2
        done_s += steps * 2.0 / (rest if exact else rest * (1 + over))  # overshoots where layers are coarse
    assert epochs * steps * 2.0 / done_s == pytest.approx(target, rel=1e-9)


def test_a_target_that_the_rest_cannot_meet_is_infinite() -> None:
    assert planner.remaining_target(2.0, 1.0, 10, 5, 6.0) == math.inf
    assert planner.remaining_target(2.0, 1.0, 10, 0, 0.0) == 2.0
    with pytest.raises(InputError, match="steps_done=10"):
        planner.remaining_target(2.0, 1.0, 10, 10, 0.0)


def test_an_analysis_is_the_forward_passes_that_are_left_of_its_policies() -> None:
    workload = traced("resnet18")
    first, last = workload.quantizable[0], workload.quantizable[-1]
    one = planner.analysis_seconds(workload, TOY, [], 64, **OPTIONS)
    assert planner.analysis_seconds(workload, TOY, [], 256, **OPTIONS) > one
    step = StepModel(workload.at(64), TOY, method="sgd", **OPTIONS)
    assert step.estimate({}).phases["forward"] < one < step.step_s({}) / 2

    def passes(policies: list[dict[str, str]]) -> float:
        return planner.analysis_seconds(workload, TOY, policies, 64, **OPTIONS) / one

    assert passes([{}] * 20) == pytest.approx(1, rel=0.02)  # but for the loss
    assert passes([{first: "bf16"}] * 20) == pytest.approx(21)
    assert 1 < passes([{last: "bf16"}] * 20) < 1.5  # the pooling ahead of it too, no module of its own
    half = passes([{name: "bf16"} for name in workload.quantizable])
    assert 0.35 < half / (len(workload.quantizable) + 1) < 0.65
    assert passes([{name: "bf16"} for name in reversed(workload.quantizable)]) == half


def test_a_pass_is_priced_in_the_format_that_it_quantizes_to() -> None:
    workload = traced("resnet18")
    model, layer = StepModel(workload.at(64), TOY, **OPTIONS), workload.quantizable[3]
    index = model.index[layer]
    base, fp8 = (planner.forward_seconds(model, fmt) for fmt in (None, "float8_e4m3fn"))
    found = [planner.analysis_seconds(workload, TOY, [{layer: fmt}], 64, **OPTIONS) for fmt in ("bf16", "fp8")]
    assert found[1] - found[0] == pytest.approx(float(fp8[index] - base[index]))
    assert model.prices("float8_e4m3fn").seconds[planner.PHASE["quantization"], index] > 0


def test_forwards_of_layers_that_run_twice_and_of_the_loss() -> None:
    """Calls: a, b, and a again; nothing calls c."""
    layers = tuple(LayerWork(name=name, kind="linear", quantizable=True) for name in ("a", "b", "(loss)"))
    calls = (("(model)", 4), ("a", 2), ("b", 3), ("a", 4))
    workload = Workload(layers=layers, batch_size=1, calls=calls, parameters=0)
    assert planner.forward_runs(workload, [{"b": "fp8"}]) == {"a": 1.5, "b": 2, "(loss)": 2}
    assert planner.forward_runs(workload, [{"a": "fp8"}, {"c": "fp8"}]) == {"a": 2, "b": 2, "(loss)": 3}
    chain = Workload(layers=layers, batch_size=1, parameters=0)
    assert planner.forward_runs(chain, ["a", "b"]) == {"a": 2, "b": 3, "(loss)": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: planner.fraction((), "nvfp4", 1.5), "fraction=1.5"),
        (lambda w: planner.reach(w, TOY, "int8", **OPTIONS), "format='int8' has no rate on toy"),
        (lambda w: planner.reach(w, TOY, [], **OPTIONS), "no format"),
        (lambda w: planner.reach(w, TOY, "nvfp4", objective="money", **OPTIONS), "unknown objective='money'"),
        (lambda w: planner.reach(w, toy_chip(power=None), "nvfp4", objective="energy", **OPTIONS), "power of toy"),
        (lambda w: planner.reach(w, TOY, "nvfp4", clip="hooks", **OPTIONS), "unknown option clip='hooks'"),
        (lambda w: planner.analysis_seconds(w, TOY, [{"conv7": "fp8"}], 4, **OPTIONS), "layer 'conv7'"),
        (lambda w: planner.analysis_seconds(w, TOY, [{}], 0, **OPTIONS), "batch_size=0"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(traced("resnet18"))
