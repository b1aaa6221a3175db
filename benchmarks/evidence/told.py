"""Differences between schedulers, and how a sentence names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpquant.statistics import Sample, holm, paired

from .files import SEEDS, Evidence, Pair, differences
from .glance import SUBJECTS, at_equal_time, narrowed, rest, schedules
from .markdown import difference
from .sweep_tables import scheduler_averages

DATA = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits", "words": "text"}


def compared(
    found: Mapping[str, Evidence], scheduler: str, other: str, *, equal_time: bool | None = None
) -> Iterator[tuple[str, str | None, Sample]]:
    """Subject, estimator and difference of two schedulers in every sweep that has both and enough seeds, by network."""
    for name, subject in SUBJECTS.items():
        if name not in found or equal_time not in (None, at_equal_time(found[name])):
            continue
        for comparison, model, value in scheduler_averages(found[name]):
            if (comparison.scheduler, comparison.other) == (scheduler, other) and value.n >= SEEDS:
                yield narrowed(subject, model), comparison.estimator, value


Told = list[tuple[str, Sample]]
"""Differences, each with its place."""


def unprobed(found: Mapping[str, Evidence], scheduler: str, other: str, *, equal_time: bool | None = None) -> Told:
    """What `compared` has, without the private probe."""
    values = compared(found, scheduler, other, equal_time=equal_time)
    return [(name, value) for name, estimator, value in values if estimator != "probe"]


def probed(found: Mapping[str, Evidence], other: str) -> Told:
    """`dpquant` with the private probe less another."""
    return [(name, value) for name, estimator, value in compared(found, "dpquant", other) if estimator == "probe"]


def by_budget(found: Mapping[str, Evidence], scheduler: str, other: str, *, equal_time: bool | None = None) -> Told:
    """One scheduler less another at epsilon 1, less the same at epsilon 8; of a seed the mean over its goals."""
    told = []
    for name, subject in SUBJECTS.items():
        if (evidence := found.get(name)) is None or equal_time not in (None, at_equal_time(evidence)):
            continue
        goal = "schedule.target_speedup" if at_equal_time(evidence) else "schedule.fraction"
        small, large = (_by_goal(evidence, scheduler, other, epsilon, goal) for epsilon in (1.0, 8.0))
        shared = small.keys() & large.keys()
        gains = [differences(evidence, [known[value] for value in shared]) for known in (small, large)]
        if shared and (value := paired(*gains)).n >= SEEDS:
            told.append((subject, value))
    return told


def _by_goal(evidence: Evidence, scheduler: str, other: str, epsilon: float, goal: str) -> dict[float, Pair]:
    """At one budget, goal -> a point of a scheduler and the like of another; of full precision, what goes with it."""
    wanted = {"target_epsilon": epsilon}
    own = {rest(p): p for p in schedules(evidence, scheduler, wanted)}
    pairs = {}
    for there in schedules(evidence, other, wanted):
        here = evidence.full_precision(there) if scheduler == "full" else own.get(rest(there))
        if here is not None:
            pairs[there[goal]] = (here, there)
    return pairs


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


def firm(values: Told, sign: int) -> Told:
    """Those of `shown` that are, in spite of how many were looked at (Holm's correction)."""
    refused = holm([1.0 if value.p_value is None else value.p_value for _, value in values])
    return shown([one for one, kept in zip(values, refused, strict=True) if kept], sign)


def by(values: Told) -> str:
    return f" (by {span(values)})" if values else ""
