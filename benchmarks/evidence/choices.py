"""Fixed choices of layers against the schedulers that quantize as many, or reach the same modelled speedup."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpquant.statistics import Sample, paired, sample

from .files import Evidence, Settings
from .glance import SCHEDULERS, SUBJECTS, at_equal_time, schedules
from .markdown import difference, mean, table, times, verdict

SUBSETS = {
    "fashion_main": ("fashion_subsets", 4),
    "cifar10_main": ("cifar10_subsets", 8),
    "fashion_time": ("fashion_time_subsets", 4),
    "cifar10_time": ("cifar10_time_subsets", 8),
    "digits_time": ("digits_time_subsets", 6),
    "cifar10_resnet18": ("cifar10_resnet18_subsets", 21),
    "fashion_time_fresh": ("fashion_time_fresh", 4),
    "fashion_epsilon1_fresh": ("fashion_epsilon1_fresh", 4),
    "cifar10_time_fresh": ("cifar10_time_fresh", 8),
    "cifar10_epsilon1_fresh": ("cifar10_epsilon1_fresh", 8),
    "cifar10_resnet18_fresh": ("cifar10_resnet18_fresh", 21),
    "cifar10_resnet18_epsilon1_fresh": ("cifar10_resnet18_epsilon1_fresh", 21),
    "digits_time_fresh": ("digits_time_fresh", 6),
    "digits_epsilon1_fresh": ("digits_epsilon1_fresh", 6),
}
"""Sweep of schedulers -> the sweep of fixed choices to hold it against, and how many layers the network has."""
LATER = {"cifar10_resnet18_fresh": 20, "digits_time_fresh": 300, "digits_epsilon1_fresh": 300}
"""Sweep of fresh seeds -> the first of those that were planned after the seeds before had been looked at."""
SAME = 0.005
"""Modelled speedups that differ by at most this share are one: an epoch quantizes a layer or does not, and so hardly a
schedule meets a choice's own speedup to the last digit."""
LONG = 60
"""Characters from which on a list of layers is folded."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Fixed choices of layers, and the schedulers that they are held against.

    Attributes:
        subject: network and data.
        main: the sweep of schedulers.
        fixed: the sweep of fixed choices.
        layers: how many the network has.
    """

    subject: str
    main: Evidence
    fixed: Evidence
    layers: int

    @property
    def equal_time(self) -> bool:
        """Whether choice and schedule share a modelled speedup, and not a number of layers."""
        return at_equal_time(self.main)

    @property
    def fresh(self) -> bool:
        """Whether one sweep has both, on seeds that nothing was chosen on."""
        return self.main is self.fixed

    @property
    def listed(self) -> list[Settings]:
        """The fixed choices."""
        return [p for p in self.fixed.sweep.points.values() if p.get("schedule.layers") is not None]

    def goal(self, settings: Settings) -> float | None:
        """What a schedule aims at, or a choice comes nearest to: layers, or a speedup that all schedules aim at."""
        chosen = settings.get("schedule.layers")
        if not self.equal_time:
            fraction = settings.get("schedule.fraction")
            return len(chosen) if chosen is not None else None if fraction is None else round(fraction * self.layers)
        if chosen is None:
            return settings.get("schedule.target_speedup")
        speedup = self.fixed.speedup(settings)
        points = [p for p in self.main.sweep.points.values() if p["schedule.scheduler"] != "cooldown"]
        targets = {p["schedule.target_speedup"] for p in points} - {None}  # `cooldown` also aims at each choice's own
        return None if speedup is None else min(targets, key=lambda target: abs(target - speedup))

    def said(self, goal: float) -> str:
        """The goal in words."""
        return f"{goal:g}x" if self.equal_time else f"{goal:g} of {self.layers} layers"

    def alike(self, fixed: Settings) -> list[Settings]:
        """The schedules with as many layers as a choice or its modelled time, and its budget and training.

        Of one scheduler that aims at several speedups so near to the choice's own it is the nearest alone: a choice is
        held against it once.
        """
        known: dict[str, tuple[float, Settings]] = {}
        for point in self.main.sweep.points.values():
            if point.get("schedule.layers") is not None:
                continue
            if any(point[k] != fixed[k] for k in point.keys() & fixed.keys() if not k.startswith("schedule.")):
                continue
            if (apart := self._apart(point, fixed)) is not None:
                name = _scheduler_name(point)
                known[name] = min(known.get(name, (apart, point)), (apart, point), key=lambda one: one[0])
        return [point for _, point in known.values()]

    def _apart(self, scheduled: Settings, fixed: Settings) -> float | None:
        """How far modelled speedups are apart, as a share, 0 for as many layers; None: too far, or not as many."""
        if not self.equal_time:
            return 0.0 if self.goal(scheduled) == self.goal(fixed) else None
        own, theirs = self.main.speedup(scheduled), self.fixed.speedup(fixed)
        apart = None if own is None or theirs is None else abs(own / theirs - 1)
        return None if apart is None or apart > SAME else apart


def known_choices(found: Mapping[str, Evidence], *, equal_time: bool) -> list[Choices]:
    """Every sweep of fixed choices that was trained, with its schedulers."""
    both = [
        Choices(subject=SUBJECTS[name], main=found[name], fixed=found[subsets], layers=layers)
        for name, (subsets, layers) in SUBSETS.items()
        if name in found and subsets in found
    ]
    return [choices for choices in both if choices.equal_time == equal_time]


# --- the best of them


@dataclass(frozen=True, kw_only=True)
class Best:
    """The fixed choice that did best on some seeds, and what a scheduler gains on it on others."""

    goal: float
    layers: list[str]
    accuracy: Sample
    settings: Settings
    difference: Sample


def best_choices(choices: Choices) -> Iterator[Best]:
    """For each goal, the best fixed choice on the first half of the seeds, against every scheduler on the second."""
    seeds = sorted({run.seed for run in choices.fixed.sweep.runs})
    choosing, judging = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]
    groups: dict[float, list[Settings]] = {}
    for point in choices.listed:
        if (goal := choices.goal(point)) is not None:
            groups.setdefault(goal, []).append(point)
    for goal, fixed in sorted(groups.items()):
        scores = {i: _over(choices.fixed.accuracies(p), choosing) for i, p in enumerate(fixed)}
        if len(fixed) < 2 or any(score is None for score in scores.values()):
            continue
        best = fixed[max(scores, key=lambda i: (scores[i] or 0.0, -i))]
        own = {s: a for s, a in choices.fixed.accuracies(best).items() if s in judging}
        for settings in choices.alike(best):
            if settings["schedule.scheduler"] == "full":
                continue
            versus = paired(choices.main.accuracies(settings), own)
            if versus.n:
                yield Best(
                    goal=goal,
                    layers=best["schedule.layers"],
                    accuracy=sample(list(own.values())),
                    settings=settings,
                    difference=versus,
                )


def best_static(known: list[Choices]) -> str:
    """The best fixed choice for each goal, chosen on the first half of the seeds and judged on the second."""
    rows = [
        [
            f"{choices.subject}, {choices.said(best.goal)}",
            folded(best.layers),
            mean(best.accuracy),
            f"`{_scheduler_name(best.settings)}`",
            difference(best.difference),
            verdict(best.difference),
        ]
        for choices in known
        for best in best_choices(choices)
    ]
    titles = ["trained", "best fixed choice", "its accuracy, %", "scheduler", "scheduler less choice, points", ""]
    return table(titles, rows, right=(2, 4)) if rows else "Not enough runs yet."


def _scheduler_name(settings: Settings) -> str:
    name, estimator = str(settings["schedule.scheduler"]), settings.get("analysis.estimator")
    return f"{name}, {estimator}" if name == "dpquant" and estimator else name


def _over(accuracies: Mapping[int, float], seeds: list[int]) -> float | None:
    values = [accuracies[s] for s in seeds if s in accuracies]
    return math.fsum(values) / len(values) if values else None


# --- every one of them


def every_choice(choices: Choices, scheduler: str) -> Iterator[tuple[Settings, Settings, Sample]]:
    """A scheduler's point, each fixed choice like it, and what it gains on that over the seeds that both have.

    Where both are the same runs nothing is compared: a schedule as fast as the fastest choice can only be that choice.
    """
    return (one for one in _beside(choices, scheduler) if not same_runs(one[2]))


def same_runs(versus: Sample) -> bool:
    """Whether a schedule was the choice itself: equal accuracy on every seed."""
    return versus.n > 1 and not versus.mean and not versus.sd


def _beside(choices: Choices, scheduler: str) -> Iterator[tuple[Settings, Settings, Sample]]:
    free = schedules(choices.main, scheduler, {})
    pairs = [(scheduled, fixed) for fixed in choices.listed for scheduled in choices.alike(fixed) if scheduled in free]
    for scheduled, fixed in sorted(pairs, key=lambda pair: free.index(pair[0])):
        versus = paired(choices.main.accuracies(scheduled), choices.fixed.accuracies(fixed))
        if versus.n:
            yield scheduled, fixed, versus


def looked_at_once(choices: Choices, scheduled: Settings, fixed: Settings) -> Sample:
    """What a schedule gains on a fixed choice, over the seeds whose number no look at the others decided."""
    first = LATER.get(choices.main.sweep.name, 0)
    own, theirs = choices.main.accuracies(scheduled), choices.fixed.accuracies(fixed)
    return paired({seed: accuracy for seed, accuracy in own.items() if seed >= first}, theirs)


def room(evidence: Evidence, fixed: Settings) -> Sample:
    """What full precision gains on a fixed choice: what there is to give back."""
    return sample([-lost for lost in evidence.lost(fixed).values()])


def every_choice_table(known: list[Choices], scheduler: str) -> str:
    """A scheduler against each fixed choice like it, with the modelled speedup of both; then the other schedulers."""
    others = [s for s in SCHEDULERS if s not in (scheduler, "static")]
    rows = []
    for choices in known:
        gains = {other: {str(fixed): versus for _, fixed, versus in every_choice(choices, other)} for other in others}
        for scheduled, fixed, versus in _beside(choices, scheduler):
            row = [
                f"{choices.subject}, {choices.said(choices.goal(scheduled) or 0)}",
                folded(fixed["schedule.layers"]),
                mean(sample(list(choices.fixed.accuracies(fixed).values()))),
                times(choices.fixed.speedup(fixed)),
                mean(sample(list(choices.main.accuracies(scheduled).values()))),
                times(choices.main.speedup(scheduled)),
                f"{versus.n}",
                difference(versus),
                "the same runs" if same_runs(versus) else verdict(versus),
            ]
            seen = (gains[other].get(str(fixed)) for other in others)
            rows.append([*row, *("" if gain is None else difference(gain) for gain in seen)])
    used = [True] * 9 + [any(row[9 + i] for row in rows) for i in range(len(others))]
    titles = ["trained", "fixed choice", "its accuracy, %", "speedup, peak", f"{scheduler}, %", "speedup, peak"]
    titles += ["seeds", f"{scheduler} less choice, points", "", *(f"{other} less choice" for other in others)]
    cut = [[cell for cell, kept in zip(row, used, strict=True) if kept] for row in (titles, *rows)]
    numbers = [i for i in range(2, len(cut[0])) if i != 8]
    return table(cut[0], cut[1:], right=numbers) if rows else "Not enough runs yet."


def folded(layers: list[str]) -> str:
    """Names of layers; of many, how many there are, and those of one stage together: ``layer2 (0.conv2, 1.conv1)``."""
    if len(", ".join(layers)) < LONG:
        return ", ".join(layers)
    stages: dict[str, list[str]] = {}
    for layer in layers:
        stage, _, rest = layer.partition(".")
        stages.setdefault(stage, []).append(rest)
    parts = [f"{stage} ({', '.join(rest)})" if rest[0] else stage for stage, rest in stages.items()]
    return f"{len(layers)}: {', '.join(parts)}"
