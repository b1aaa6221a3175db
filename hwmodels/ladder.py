"""Ladders of formats, one format a layer: in a drawn order until a target is met, or with the least harm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulation.errors import InputError
from hwmodels.cost import StepModel
from hwmodels.planner import Objective, PrecisionPlan, check_target, expense, format_names, gains
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload

BINS = 20_000  # resolution of the budget


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layer in a format: what it saves, in seconds or joules, and what harm it does."""

    format: str
    saved: float
    harm: float


def climb(
    workload: Workload,
    profile: HardwareProfile,
    order: Iterable[tuple[str, str]],
    target_speedup: float,
    *,
    analysis_s_per_step: float = 0.0,
    objective: Objective = "time",
    **options: Any,
) -> PrecisionPlan:
    """Take (layer, format) choices in the given order until the modelled step meets the target, or none is left.

    A layer that was taken before moves to a later choice where that gains more; a choice that gains nothing is passed
    over. What the target then turns out not to need is given up again, the last choice first.

    Args:
        workload: the step.
        profile: the chip.
        order: layers with formats (names, aliases or presets), first to last.
        target_speedup: over the step in full precision without analyses (of energy, where that is the objective).
        analysis_s_per_step: seconds (joules) of sensitivity analyses, spread over the steps.
        objective: ``time`` or ``energy``.
        options: as ``hwmodels.cost.estimate`` takes them.

    Returns:
        The plan, its formats named as in ``order``.
    """
    check_target(target_speedup)
    model = StepModel(workload, profile, **options)
    budget = expense(model, {}, objective) / target_speedup - analysis_s_per_step
    saved: dict[str, dict[str, float]] = {}
    taken: dict[str, str] = {}
    timed: dict[str, str] = {}
    spent = expense(model, timed, objective)
    for layer, fmt in order:
        if spent <= budget:
            break
        if fmt not in saved:
            saved[fmt] = gains(model, format_names(profile, fmt)[0], objective)
        canonical = model.plan_formats({layer: fmt})
        if saved[fmt][layer] > (saved[taken[layer]][layer] if layer in taken else 0.0):
            taken = {name: f for name, f in taken.items() if name != layer} | {layer: fmt}
            timed |= canonical
            spent = expense(model, timed, objective)
    for layer in reversed(taken):
        fewer = {name: fmt for name, fmt in timed.items() if name != layer}
        if expense(model, fewer, objective) <= budget:
            timed = fewer
    return PrecisionPlan(formats={name: fmt for name, fmt in taken.items() if name in timed})


def cheapest(
    workload: Workload,
    profile: HardwareProfile,
    sensitivities: Mapping[str, Mapping[str, float]],
    target_speedup: float,
    *,
    analysis_s_per_step: float = 0.0,
    objective: Objective = "time",
    **options: Any,
) -> PrecisionPlan:
    """The least harmful plan that meets a target: a knapsack of what layers save against what they are sensitive to.

    Each layer takes at most one format of the ladder. The sum of sensitivities is the smallest there is, up to a
    rounding of each layer's saving by 1 / ``BINS`` of what is needed. A layer of negative sensitivity (an analysis is
    noisy) is as harmless as one of none.

    Args:
        workload: the step.
        profile: the chip.
        sensitivities: format -> layer -> released sensitivity; a layer is only put into formats it is listed under.
        target_speedup: over the step in full precision without analyses.
        analysis_s_per_step: seconds (joules) of sensitivity analyses, spread over the steps.
        objective: ``time`` or ``energy``.
        options: as ``hwmodels.cost.estimate`` takes them; the eager framework's wait for its host is not foreseen.

    Raises:
        InputError: the target is out of reach with these layers and formats.
    """
    check_target(target_speedup)
    model = StepModel(workload, profile, **options)
    choices: dict[str, list[Choice]] = {}
    for fmt, layers in sensitivities.items():
        name = format_names(profile, fmt)[0]
        saved = gains(model, name, objective)
        model.plan_formats(dict.fromkeys(layers, name))
        for layer, harm in layers.items():
            if not math.isfinite(harm):
                raise InputError(f"sensitivity={harm} of layer {layer!r} in {name} is not a number")
            if saved[layer] > 0:
                choices.setdefault(layer, []).append(Choice(format=name, saved=saved[layer], harm=max(harm, 0.0)))
    total = expense(model, {}, objective)
    needed = total - (total / target_speedup - analysis_s_per_step)
    chosen = knapsack(choices, needed)
    if chosen is None:
        most = total / (total - sum(_best(found).saved for found in choices.values()) + analysis_s_per_step)
        most = math.floor(100 * most) / 100  # rounded up it could not be reached
        raise InputError(
            f"target_speedup={target_speedup} is out of reach on {profile.name}: at most {most:.2f}x",
            hint="lower the target, or allow more layers or formats",
        )
    return PrecisionPlan(formats={name: chosen[name] for name in workload.quantizable if name in chosen})


def _best(choices: Sequence[Choice]) -> Choice:
    return max(choices, key=lambda choice: choice.saved)


def knapsack(choices: Mapping[str, Sequence[Choice]], needed: float) -> dict[str, str] | None:
    """A format for some of the layers, so that savings add up to ``needed`` at the least harm; None: no choice does.

    Dynamic programming over the saving still needed, in ``BINS`` units, savings rounded down so that the sum holds.
    """
    if needed <= 0:
        return {}
    most = {layer: _best(found) for layer, found in choices.items()}
    if sum(choice.saved for choice in most.values()) < needed * (1 - 1e-12):
        return None
    units = np.arange(BINS + 1)
    least = np.where(units == 0, 0.0, np.inf)  # least[u]: least harm that saves u units more, with the layers so far
    picks: list[NDArray[np.int8]] = []
    for found in choices.values():
        options = [least] + [least[np.maximum(units - _units(c.saved, needed), 0)] + c.harm for c in found]
        picks.append(np.argmin(options, axis=0).astype(np.int8))
        least = np.min(options, axis=0)
    if not np.isfinite(least[BINS]):  # only rounding stands in the way
        return {layer: choice.format for layer, choice in most.items()}
    chosen, left = {}, BINS
    for layer, pick in zip(reversed(list(choices)), reversed(picks), strict=True):
        if pick[left]:
            choice = choices[layer][pick[left] - 1]
            chosen[layer] = choice.format
            left = max(left - _units(choice.saved, needed), 0)
    return chosen


def _units(saved: float, needed: float) -> int:
    return min(int(saved / needed * BINS * (1 + 1e-12)), BINS)
