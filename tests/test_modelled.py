"""What the hardware model says of a run: policies, analyses, plans that meet a target at every epoch's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chip import toy_chip

from dpquant.modelled import ModelledRun
from dpquant.models import build_model, example_input
from dpquant.sensitivity import AnalysisSettings
from hwmodels import planner
from hwmodels.workload import trace

with torch.device("meta"):
    WORKLOAD = trace(build_model("resnet18"), example_input("resnet18"), 256)
STEPS, PER_EPOCH = 40, 10


def modelled(**changes: Any) -> ModelledRun:
    given: dict[str, Any] = {"workload": WORKLOAD, "profile": toy_chip(), "formats": ("nvfp4",), "basis": "peak"}
    given |= {"clipping": "bookkeeping", "analysis": AnalysisSettings(), "analyses": 2}
    return ModelledRun(**(given | {"expected_batch_size": 256, "steps": STEPS} | changes))


def test_policies_are_every_layer_in_every_format_but_the_baselines() -> None:
    layers = WORKLOAD.quantizable
    assert list(modelled().policies) == list(layers)
    several = modelled(formats=("bf16", "fp8", "nvfp4")).policies
    assert list(several) == [f"{layer}:{fmt}" for layer in layers for fmt in ("fp8", "nvfp4")]
    assert several[f"{layers[0]}:fp8"] == {layers[0]: "fp8"}
    assert list(modelled(formats=("bf16",)).policies.values()) == [{layer: "bf16"} for layer in layers]


def test_analyses_cost_what_their_policies_do_and_training_probes_more() -> None:
    one, ladder = modelled(), modelled(formats=("fp8", "nvfp4"))
    forward_s = planner.analysis_seconds(WORKLOAD, toy_chip(), [], AnalysisSettings().expected_batch_size, basis="peak")
    assert forward_s < one.analysis_s() < 0.75 * (len(WORKLOAD.quantizable) + 1) * forward_s
    assert 1.5 < ladder.analysis_s() / one.analysis_s() < 2
    assert one.analysis_s_per_step() == pytest.approx(2 * one.analysis_s() / STEPS)
    assert modelled(analyses=0).analysis_s_per_step() == 0
    assert modelled(analysis=AnalysisSettings(probe="training")).analysis_s() > 2 * one.analysis_s()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([("nvfp4",), ("fp8", "nvfp4"), ("bf16", "fp8", "nvfp4")]), st.floats(0, 1), st.randoms())
def test_every_epochs_end_meets_the_target_and_the_runs_end_hardly_exceeds_it(
    formats: tuple[str, ...], share: float, random: Any
) -> None:
    run = modelled(formats=formats)
    most, full_s = run.reach().max_speedup, run.estimate({}).step_s
    least = full_s / (full_s + run.analysis_s_per_step())
    target = least + share * (most - least) * (1 - 1e-9)
    seconds = 0.0
    for done in range(0, STEPS, PER_EPOCH):
        order = random.sample(list(run.policies), len(run.policies))
        plan = run.meet(order, target, steps=done + PER_EPOCH, steps_done=done, seconds_done=seconds)
        seconds += PER_EPOCH * run.estimate(plan).step_s
        spent = seconds + (done + PER_EPOCH) * run.analysis_s_per_step()
        assert (done + PER_EPOCH) * full_s / spent >= target * (1 - 1e-9)
        assert all(fmt in formats for fmt in plan.values())
    assert STEPS * full_s / spent < 1.01 * target


def test_a_fraction_takes_each_layer_as_it_was_first_drawn() -> None:
    run = modelled(formats=("fp8", "nvfp4"))
    first, second = WORKLOAD.quantizable[:2]
    order = [f"{second}:nvfp4", f"{first}:fp8", f"{first}:nvfp4", f"{second}:fp8"]
    share = 2 / len(WORKLOAD.quantizable)
    assert dict(run.fraction(order, share)) == {second: "nvfp4", first: "fp8"}
    assert dict(run.fraction(order, 0.0)) == {}


def test_a_ladder_reaches_what_its_fastest_formats_do() -> None:
    reached = [modelled(formats=(fmt,)).reach().max_speedup for fmt in ("fp8", "nvfp4")]
    ladder = modelled(formats=("fp8", "nvfp4"), analyses=0).reach()
    assert ladder.max_speedup >= max(reached)
    assert isinstance(ladder.plan, planner.PrecisionPlan)
