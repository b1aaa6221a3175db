"""Curves over a model's costs: speedup against the fraction quantized, from which batch size on a format pays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulation.errors import InputError
from emulation.formats import Format
from hwmodels.cost import Estimate, StepModel
from hwmodels.planner import fastest, format_names, gains
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload

LARGEST_BATCH = 2**20


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """What quantizing so many layers gains, by how they are chosen.

    Attributes:
        quantized: layers.
        fraction: of the quantizable ones.
        best: speedup of those that gain most.
        drawn: of a run that draws anew every epoch, uniformly: the mean over draws of the time.
        static_low, static_high: of a run that draws once and keeps its layers: 5 % and 95 % of the draws.
        best_joules: energy of a step with the best; None where the chip's power is not known.
    """

    quantized: int
    fraction: float
    best: float
    drawn: float
    static_low: float
    static_high: float
    best_joules: float | None


def pareto(
    workload: Workload,
    profile: HardwareProfile,
    format: str | Format,
    *,
    draws: int = 200,
    seed: int = 0,
    **options: Any,
) -> list[ParetoPoint]:
    """Speedup against the number of quantized layers, from none to all.

    Args:
        workload: the step.
        profile: the chip.
        format: of the quantized layers.
        draws: random orders of the layers.
        seed: of those.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    model = StepModel(workload, profile, **options)
    name = format_names(profile, format)[0]
    layers = workload.quantizable
    gain = gains(model, name)
    base = model.step_s({})
    random = np.random.default_rng(seed)
    orders = [sorted(layers, key=lambda layer: -gain[layer])]
    orders += [[layers[i] for i in random.permutation(len(layers))] for _ in range(draws)]
    seconds = np.array([[_prefix_s(model, order, name, size) for size in range(len(layers) + 1)] for order in orders])
    points = []
    for size in range(len(layers) + 1):
        drawn = seconds[1:, size] if draws else seconds[:1, size]
        points.append(
            ParetoPoint(
                quantized=size,
                fraction=size / len(layers) if layers else 0.0,
                best=base / float(seconds[0, size]),
                drawn=base / float(drawn.mean()),
                static_low=base / float(np.quantile(drawn, 0.95)),
                static_high=base / float(np.quantile(drawn, 0.05)),
                best_joules=model.joules(dict.fromkeys(orders[0][:size], name)),
            )
        )
    return points


def _prefix_s(model: StepModel, order: Sequence[str], name: str, size: int) -> float:
    return model.step_s(dict.fromkeys(order[:size], name))


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """From which batch size on a format pays.

    Attributes:
        batch_size: the smallest from which on quantizing all layers is no slower, at every doubling above it too;
            None where it is slower at the largest batch that was tried.
        first_layer_batch_size: the smallest at which some layer gains; None where none ever does.
        largest_tried: the end of the search.
        speedup_at_largest: of all layers, there.
    """

    batch_size: int | None
    first_layer_batch_size: int | None
    largest_tried: int
    speedup_at_largest: float


def break_even(
    workload: Workload, profile: HardwareProfile, format: str | Format, *, largest: int = LARGEST_BATCH, **options: Any
) -> BreakEven:
    """Find from which batch size on a format pays on a chip, memory aside.

    Args:
        workload: any batch size.
        profile: the chip.
        format: of all quantizable layers.
        largest: the largest batch tried.
        options: as ``hwmodels.cost.estimate`` takes them.
    """
    if largest < 1:
        raise InputError(f"largest={largest} must be at least 1")
    name = format_names(profile, format)[0]
    sizes = [2**power for power in range(largest.bit_length()) if 2**power <= largest]

    def model(batch_size: int) -> StepModel:
        return StepModel(workload.at(batch_size), profile, **options)

    def pays(batch_size: int) -> bool:
        found = model(batch_size)
        return found.step_s(dict.fromkeys(workload.quantizable, name)) <= found.step_s({})

    def some_layer(batch_size: int) -> bool:
        return bool(fastest(model(batch_size), [name]))

    from_on = _first(sizes, [pays(size) for size in sizes], pays, lasting=True)
    first = _first(sizes, [some_layer(size) for size in sizes], some_layer, lasting=False)
    last = model(sizes[-1])
    return BreakEven(
        batch_size=from_on,
        first_layer_batch_size=first,
        largest_tried=sizes[-1],
        speedup_at_largest=last.step_s({}) / last.step_s(dict.fromkeys(workload.quantizable, name)),
    )


def _first(sizes: Sequence[int], holds: Sequence[bool], test: Any, *, lasting: bool) -> int | None:
    """The first size at which a test holds (and holds ever after), found to the unit between two doublings."""
    candidates = [i for i in range(len(sizes)) if (all(holds[i:]) if lasting else holds[i])]
    if not candidates:
        return None
    index = candidates[0]
    if index == 0:
        return sizes[0]
    low, high = sizes[index - 1], sizes[index]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle, high)
    return high


def sweep(
    workload: Workload,
    profile: HardwareProfile,
    formats: Iterable[str | Format],
    batch_sizes: Iterable[int],
    **options: Any,
) -> Iterator[tuple[str, Estimate]]:
    """Estimates with every layer in a format, for each batch size and format: (format, estimate) pairs."""
    names = format_names(profile, list(formats))
    for batch_size in batch_sizes:
        model = StepModel(workload.at(batch_size), profile, **options)
        for name in names:
            yield name, model.estimate(dict.fromkeys(workload.quantizable, name))
