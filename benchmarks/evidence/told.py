"""Differences between schedulers, and how a sentence names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpquant.statistics import Sample, paired

from .files import Evidence
from .glance import SUBJECTS, at_equal_time, schedules
from .markdown import difference
from .sweep_tables import scheduler_averages

DATA = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits", "words": "text"}
SEEDS = 3
"""Fewer say nothing here: of two, a narrow interval is chance."""


def compared(
    found: Mapping[str, Evidence], scheduler: str, other: str, *, equal_time: bool | None = None
) -> Iterator[tuple[str, str | None, Sample]]:
    """Subject, estimator and difference of two schedulers in every sweep that has both and enough seeds."""
    for name, subject in SUBJECTS.items():
        if name not in found or equal_time not in (None, at_equal_time(found[name])):
            continue
        for comparison, value in scheduler_averages(found[name]):
            if (comparison.scheduler, comparison.other) == (scheduler, other) and value.n >= SEEDS:
                yield subject, comparison.estimator, value


Told = list[tuple[str, Sample]]
"""Differences, each with its place."""


def unprobed(found: Mapping[str, Evidence], scheduler: str, other: str, *, equal_time: bool | None = None) -> Told:
    """What `compared` has, without the private probe."""
    values = compared(found, scheduler, other, equal_time=equal_time)
    return [(name, value) for name, estimator, value in values if estimator != "probe"]


def by_budget(found: Mapping[str, Evidence]) -> Told:
    """How much more `static` loses at epsilon 1 than at epsilon 8, of a seed the mean over the shares of the layers."""
    told = []
    for name, subject in SUBJECTS.items():
        evidence = found.get(name)
        if evidence is None or "schedule.fraction" not in evidence.sweep.keys:
            continue
        losses = [
            {
                p["schedule.fraction"]: evidence.lost(p)
                for p in schedules(evidence, "static", {"target_epsilon": epsilon})
            }
            for epsilon in (1.0, 8.0)
        ]
        shares = losses[0].keys() & losses[1].keys()
        seeds = set.intersection(*(set(lost[share]) for lost in losses for share in shares)) if shares else set()
        small, large = ({s: sum(lost[share][s] for share in shares) / len(shares) for s in seeds} for lost in losses)
        if len(seeds) >= SEEDS:
            told.append((subject, paired(large, small)))
    return told


def span(values: Told) -> str:
    """The least and the most of several differences, each with its interval and its place."""
    ordered = sorted(values, key=lambda one: one[1].mean or 0.0)
    (here, least), (there, most) = ordered[0], ordered[-1]
    if len(ordered) == 1:
        return f"{difference(least)} points on {here}"
    place = "" if here == there else f" points on {here}"
    return f"{difference(least)}{place} to {difference(most)} points on {there}"


def shown(values: Told, sign: int) -> Told:
    """Those whose interval lies above 0 (1), below it (-1), or holds it (0)."""
    return [one for one in values if one[1].sign == sign]


def by(values: Told) -> str:
    return f" (by {span(values)})" if values else ""
