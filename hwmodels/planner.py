"""From a target speedup to the layers that are quantized: what can be reached, and how an epoch reaches it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from emulation.errors import InputError, suggestion
from emulation.formats import Format, get_format
from hwmodels.cost import StepModel
from hwmodels.gemm_arrays import Array
from hwmodels.profile import HardwareProfile
from hwmodels.step import PHASE
from hwmodels.workload import Workload, check_batch_size

Objective = Literal["time", "energy"]
OBJECTIVES: tuple[Objective, ...] = ("time", "energy")


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionPlan(Mapping[str, str]):
    """Which layers run in which format; a mapping from layer to format, in the order they were chosen."""

    formats: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", MappingProxyType(dict(self.formats)))

    def __getitem__(self, layer: str) -> str:
        return self.formats[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The most that quantizing can gain.

    Attributes:
        max_speedup: of the step, analyses included (of its energy, where that is the objective); below 1 where the
            analyses cost more than quantizing gains.
        plan: the layers that gain, in forward order.
    """

    max_speedup: float
    plan: PrecisionPlan


def gains(model: StepModel, format_name: str, objective: Objective = "time") -> dict[str, float]:
    """What each quantizable layer saves by itself in a format: device seconds, or joules; negative where it loses."""
    base, quantized = model.prices(None), model.prices(format_name)
    if objective == "time":
        saved = base.seconds.sum(0) - quantized.seconds.sum(0)
    else:
        if base.joules is None or quantized.joules is None:
            raise InputError(f"the power of {model.profile.name} is not known", hint="objective='time' needs none")
        saved = base.joules - quantized.joules
    return {name: float(saved[model.index[name]]) for name in model.workload.quantizable}


def expense(model: StepModel, plan: Mapping[str, str], objective: Objective = "time") -> float:
    """Seconds, or joules, of a step under a plan with canonical format names."""
    if objective == "time":
        return model.step_s(plan)
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective={objective!r}", hint=suggestion(str(objective), OBJECTIVES))
    joules = model.joules(plan)
    if joules is None:
        raise InputError(f"the power of {model.profile.name} is not known", hint="objective='time' needs none")
    return joules


def reach(
    workload: Workload,
    profile: HardwareProfile,
    format: str | Format | Sequence[str | Format],
    *,
    analysis_s_per_step: float = 0.0,
    objective: Objective = "time",
    **options: Any,
) -> Reach:
    """The most that a format, or a ladder of several, can reach on a chip: every layer that gains is quantized.

    Args:
        workload: the step.
        profile: the chip.
        format: of the quantized layers; of several, each layer takes the one that it gains most from.
        analysis_s_per_step: seconds (joules, where energy is the objective) of sensitivity analyses, spread over the
            steps; the baseline has none.
        objective: ``time`` or ``energy``.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    model = StepModel(workload, profile, **options)
    plan = fastest(model, format_names(profile, format), objective)
    spent = expense(model, plan, objective) + analysis_s_per_step
    return Reach(max_speedup=expense(model, {}, objective) / spent, plan=PrecisionPlan(formats=plan))


def format_names(profile: HardwareProfile, formats: str | Format | Sequence[str | Format]) -> list[str]:
    """Canonical names of one or several formats that the chip has a rate for."""
    several = [formats] if isinstance(formats, str) or not isinstance(formats, Sequence) else list(formats)
    if not several:
        raise InputError("no format is given", hint="such as 'nvfp4'")
    return [profile.rate(get_format(fmt)).format for fmt in several]


def fastest(model: StepModel, formats: Sequence[str], objective: Objective = "time") -> dict[str, str]:
    """The plan that takes the least, each layer in the format that saves it most.

    Where an eager host's launches bound the step, quantizing adds kernels that cost more than they save: layers are
    taken by what they save per kernel added while that pays.
    """
    table = {fmt: gains(model, fmt, objective) for fmt in formats}
    best = {name: max(formats, key=lambda fmt: table[fmt][name]) for name in model.workload.quantizable}
    saved = {name: table[fmt][name] for name, fmt in best.items()}
    plan = {name: fmt for name, fmt in best.items() if saved[name] > 0}
    if not model.options.eager:
        return plan
    base = model.prices(None).kernels
    added = {name: float((model.prices(fmt).kernels - base)[model.index[name]]) for name, fmt in plan.items()}
    ranked = sorted(plan, key=lambda name: saved[name] / max(added[name], 1e-9), reverse=True)
    prefixes = [{name: plan[name] for name in plan if name in set(ranked[:size])} for size in range(len(ranked) + 1)]
    return min(prefixes, key=lambda prefix: expense(model, prefix, objective))


def fraction(order: Sequence[str], format: str | Format, fraction: float) -> PrecisionPlan:
    """Quantize the first ``fraction`` of the layers by count, rounded to the nearest number of layers."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction} must be between 0 and 1")
    name = get_format(format).name
    return PrecisionPlan(formats=dict.fromkeys(order[: round(fraction * len(order))], name))


def remaining_target(
    target_speedup: float, baseline_s_per_step: float, steps: int, steps_done: int, seconds_done: float
) -> float:
    """The speedup that the steps left must reach so that the whole run meets its target.

    Layers are of finite size, so an epoch overshoots or undershoots; the epochs after it make up for that.

    Args:
        target_speedup: of the whole run.
        baseline_s_per_step: seconds of a step in full precision.
        steps: of the whole run.
        steps_done: of them.
        seconds_done: modelled seconds of those, analyses included.

    Returns:
        The target of the rest; ``math.inf`` where no time is left for it.
    """
    check_target(target_speedup)
    left = steps - steps_done
    if not 0 <= steps_done < steps:
        raise InputError(f"steps_done={steps_done} must be from 0 to {steps - 1}")
    seconds_left = steps * baseline_s_per_step / target_speedup - seconds_done
    return left * baseline_s_per_step / seconds_left if seconds_left > 0 else math.inf


def analysis_seconds(
    workload: Workload,
    profile: HardwareProfile,
    policies: Sequence[Mapping[str, str]],
    expected_batch_size: int,
    **options: Any,
) -> float:
    """Modelled seconds of one sensitivity analysis: forward passes, without what they share.

    Args:
        workload: of a training step; its batch size does not matter.
        profile: the chip.
        policies: what is quantized in each pass, layer to format; a further pass has nothing quantized.
        expected_batch_size: of the analysis.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    check_batch_size(expected_batch_size)
    model = StepModel(workload.at(expected_batch_size), profile, **options)
    plans = [model.plan_formats(policy) for policy in policies]
    runs, base = forward_runs(workload, policies), forward_seconds(model, None)
    total = sum(runs[name] * float(base[model.index[name]]) for name in model.names)
    quantized = {fmt: forward_seconds(model, fmt) - base for fmt in {fmt for plan in plans for fmt in plan.values()}}
    return total + sum(float(quantized[fmt][model.index[name]]) for plan in plans for name, fmt in plan.items())


def forward_runs(workload: Workload, policies: Sequence[Collection[str]]) -> dict[str, float]:
    """How often an analysis runs each layer's forward, the mean of its calls where it has several.

    Once, and once more in every pass that quantizes a layer ahead of the end of the call: the others take what the call
    gave from a pass before, as ``dpquant.prefix`` does.

    Args:
        workload: whose calls say what is ahead of what.
        policies: the layers that each pass quantizes; a further pass quantizes none.

    Returns:
        Layer name to number of forwards; at most ``policies`` + 1.
    """
    calls = workload.calls or [(layer.name, number) for number, layer in enumerate(workload.layers, 1)]
    begins: dict[str, int] = {}
    for number, (name, _) in enumerate(calls):
        begins.setdefault(name, number)
    firsts = sorted(min((begins[name] for name in policy if name in begins), default=len(calls)) for policy in policies)
    found: dict[str, list[int]] = {}
    for name, end in calls:
        found.setdefault(name, []).append(1 + bisect_left(firsts, end))
    outside = [1 + len(policies)]  # the loss
    runs = {layer.name: found.get(layer.name, outside) for layer in workload.layers}
    return {name: sum(counts) / len(counts) for name, counts in runs.items()}


def forward_seconds(model: StepModel, format_name: str | None) -> Array:
    """Seconds of each layer's forward pass in a format (canonical name), or in the baseline for None.

    The quantization, traffic and launches of a layer's step are taken for a third forward.
    """
    seconds = model.prices(format_name).seconds
    rest = seconds[PHASE["quantization"]] + seconds[PHASE["other"]] + seconds[PHASE["launch"]]
    forward: Array = seconds[PHASE["forward"]] + rest / 3
    return forward


def check_target(target_speedup: float) -> None:
    """Raise InputError unless the target is a finite number above zero."""
    if not (isinstance(target_speedup, (int, float)) and 0 < target_speedup < math.inf):
        raise InputError(f"target_speedup={target_speedup} must be a number above 0", hint="such as 1.5")
