"""From a target speedup to the layers that are quantized: what can be reached, and how an epoch reaches it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from emulation.errors import InputError
from emulation.formats import Format, get_format
from hwmodels.cost import StepModel
from hwmodels.dpsgd import PHASE
from hwmodels.gemm_arrays import Array
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload, check_batch_size


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
        max_speedup: of the step, analyses included; below 1 where the analyses cost more than quantizing gains.
        plan: the layers that gain time, in forward order.
    """

    max_speedup: float
    plan: PrecisionPlan


def _format_name(profile: HardwareProfile, fmt: str | Format) -> str:
    return profile.rate(get_format(fmt)).format


def gains(model: StepModel, format_name: str) -> dict[str, float]:
    """Device seconds that each quantizable layer saves by itself in a format; negative where it is slower."""
    base, quantized = model.prices(None).seconds.sum(0), model.prices(format_name).seconds.sum(0)
    return {name: float(base[model.index[name]] - quantized[model.index[name]]) for name in model.workload.quantizable}


def reach(
    workload: Workload,
    profile: HardwareProfile,
    format: str | Format,
    *,
    analysis_s_per_step: float = 0.0,
    **options: Any,
) -> Reach:
    """The most speedup that a format can reach on a chip: every layer that gains from it is quantized.

    Args:
        workload: the step.
        profile: the chip.
        format: of the quantized layers.
        analysis_s_per_step: seconds of sensitivity analyses, spread over the steps; the baseline has none.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    model = StepModel(workload, profile, **options)
    plan = fastest(model, [_format_name(profile, format)])
    seconds = model.step_s(plan) + analysis_s_per_step
    return Reach(max_speedup=model.step_s({}) / seconds, plan=PrecisionPlan(formats=plan))


def fastest(model: StepModel, formats: Sequence[str]) -> dict[str, str]:
    """The plan that takes the least time, each layer in the format that saves it most.

    Where an eager host's launches bound the step, quantizing adds kernels that cost more than they save: layers are
    taken by seconds saved per kernel added while that pays.
    """
    best = {name: max(formats, key=lambda fmt: gains(model, fmt)[name]) for name in model.workload.quantizable}
    saved = {name: gains(model, fmt)[name] for name, fmt in best.items()}
    plan = {name: fmt for name, fmt in best.items() if saved[name] > 0}
    if not model.options.eager:
        return plan
    base = model.prices(None).kernels
    added = {name: float((model.prices(fmt).kernels - base)[model.index[name]]) for name, fmt in plan.items()}
    ranked = sorted(plan, key=lambda name: saved[name] / max(added[name], 1e-9), reverse=True)
    prefixes = [{name: plan[name] for name in plan if name in set(ranked[:size])} for size in range(len(ranked) + 1)]
    return min(prefixes, key=model.step_s)


def fill(
    workload: Workload,
    profile: HardwareProfile,
    order: Iterable[str],
    format: str | Format,
    target_speedup: float,
    *,
    analysis_s_per_step: float = 0.0,
    **options: Any,
) -> PrecisionPlan:
    """Quantize layers in the given order until the modelled step meets the target speedup, or none is left.

    Layers that the format slows down are passed over.

    Args:
        workload: the step.
        profile: the chip.
        order: layer names, first to last.
        format: of the quantized layers.
        target_speedup: over the step in full precision without analyses.
        analysis_s_per_step: seconds of sensitivity analyses, spread over the steps.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    check_target(target_speedup)
    model = StepModel(workload, profile, **options)
    name = _format_name(profile, format)
    gain = gains(model, name)
    budget = model.step_s({}) / target_speedup - analysis_s_per_step
    plan: dict[str, str] = {}
    for layer in order:
        if model.step_s(plan) <= budget:
            break
        model.plan_formats({layer: name})
        if gain[layer] > 0:
            plan[layer] = name
    return PrecisionPlan(formats=plan)


def fraction(order: Sequence[str], format: str | Format, fraction: float) -> PrecisionPlan:
    """Quantize the first ``fraction`` of the layers by count, rounded to the nearest number of layers."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction} must be between 0 and 1")
    name = get_format(format).name
    return PrecisionPlan(formats=dict.fromkeys(order[: round(fraction * len(order))], name))


def analysis_seconds(
    workload: Workload,
    profile: HardwareProfile,
    policies: int,
    expected_batch_size: int,
    **options: Any,
) -> float:
    """Modelled seconds of one sensitivity analysis: ``policies`` + 1 forward passes, nothing else.

    Emulated policies take no longer than the baseline on the hardware that has the format, so each pass is priced in
    the baseline.
    """
    check_batch_size(expected_batch_size)
    if policies < 0:
        raise InputError(f"policies={policies} must not be negative")
    model = StepModel(workload.at(expected_batch_size), profile, **options)
    return float(forward_seconds(model).sum()) * (policies + 1)


def forward_seconds(model: StepModel) -> Array:
    """Seconds of each layer's forward pass in the baseline; its traffic and launches are taken for a third of all."""
    seconds = model.prices(None).seconds
    rest = seconds[PHASE["other"]] + seconds[PHASE["launch"]]
    forward: Array = np.asarray(seconds[PHASE["forward"]] + rest / 3)
    return forward


def check_target(target_speedup: float) -> None:
    """Raise InputError unless the target is a finite number above zero."""
    if not (isinstance(target_speedup, (int, float)) and 0 < target_speedup < float("inf")):
        raise InputError(f"target_speedup={target_speedup} must be a number above 0", hint="such as 1.5")
