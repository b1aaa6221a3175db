"""What was found, in sentences whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpquant.statistics import Sample, sample

from . import chips, variance_tables
from .files import Evidence, average
from .glance import SUBJECTS, at_equal_time
from .markdown import difference, interval, verdict
from .sweep_tables import PUBLISHED, TITLES, every_choice, probe_costs, scheduler_averages

DATA = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits", "words": "text"}
LAYERS = {"fashion": 4, "cifar10": 8}
SEEDS = 3
"""Fewer say nothing here: of two, a narrow interval is chance."""


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Three of them: scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), _chips()]


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


def _span(values: list[tuple[str, Sample]]) -> str:
    """The least and the most of several differences, each with its interval and its place."""
    ordered = sorted(values, key=lambda one: one[1].mean or 0.0)
    ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    return " to ".join(f"{difference(value)} points on {name}" for name, value in ends)


def _scheduling(found: Mapping[str, Evidence]) -> str:
    said = ["**Does a changing choice of layers save accuracy?**"]
    which, when = _which(found), _when(found)
    if not which and not when:
        return " ".join([*said, "There are too few seeds yet to say anything."])
    said += which + when + _cooldown(found) + _every_choice(found)
    for name, epsilon, free, paid, cost in probe_costs(found):
        if cost.sign and cost.n >= SEEDS:
            said.append(
                f"The private probe has a price where data are few: on {DATA[name.split('_')[0]]} at epsilon "
                f"{epsilon:g} it raises the noise multiplier from {free:.2f} to {paid:.2f}, and against the free "
                f"estimate accuracy changes by {difference(cost)} points."
            )
    return " ".join(said)


def _which(found: Mapping[str, Evidence]) -> list[str]:
    """Which layers: drawn anew, or by sensitivity, against one fixed choice."""
    values = [(f"{s} ({name})", v) for s in ("pls", "dpquant") for name, _, v in _free(found, s)]
    if not values:
        return []
    better = [one for one in values if one[1].sign == 1]
    worse = [one for one in values if one[1].sign == -1]
    text = (
        f"Changing *which* layers are quantized {_helps(better, values)}: drawn anew every epoch (`pls`), or "
        "preferring those that gradients released anyway found insensitive (`dpquant`), they are shown to be better "
        f"than one fixed random choice (`static`) in {len(better)} of {len(values)} comparisons"
    )
    text += "".join(f", by {difference(v)} points for {name}" for name, v in better)
    text += f", and worse in {len(worse)}." if worse else ", and worse in none."
    told = [text]
    told += [
        f"dpquant with the private probe less static is {verdict(v)}: {difference(v)} on {name}."
        for name, v in (
            (n, v) for n, estimator, v in compared(found, "dpquant", "static") if estimator == "probe" and v.sign
        )
    ]
    return told


def _helps(better: list[tuple[str, Sample]], values: list[tuple[str, Sample]]) -> str:
    """In a word; of twenty comparisons one is better by chance alone."""
    if not better:
        return "is not shown to help"
    return "hardly helps" if 10 * len(better) < len(values) else "helps"


def _free(found: Mapping[str, Evidence], scheduler: str) -> Iterator[tuple[str, str | None, Sample]]:
    return (one for one in compared(found, scheduler, "static") if one[1] != "probe")


def _when(found: Mapping[str, Evidence]) -> list[str]:
    """When: everything quantized at first and nothing at the end."""
    values = [(name, v) for name, _, v in compared(found, "annealed", "static", equal_time=False)]
    if not values:
        return []
    better = [one for one in values if one[1].sign == 1]
    open_ = [v for _, v in values if v.sign == 0]
    text = (
        f"Changing *when* {_helps(better, values)}: with as many layers times epochs, all of them quantized at first "
        f"and none at the end (`annealed`) is better than `static` in {len(better)} of {len(values)} comparisons"
    )
    text += f", by {_span(better)}" if better else ""
    if open_:
        low, high = min(v.low or 0.0 for v in open_), max(v.high or 0.0 for v in open_)
        text += f"; no difference is shown in {len(open_)}, whose intervals lie between {100 * low:+.2f} and "
        text += f"{100 * high:+.2f}"
    reverse = [v for _, _, v in compared(found, "annealed", "delayed")]
    said = [text + "."]
    if reverse:
        worse = sum(v.sign == 1 for v in reverse)
        said.append(f"The reverse order (`delayed`) is shown to be worse than it in {worse} of {len(reverse)}.")
    return said


def _cooldown(found: Mapping[str, Evidence]) -> list[str]:
    """At equal modelled time: the layers that save most, and none of them in the last fifth."""
    greedy = {name: v for name, _, v in compared(found, "cooldown", "greedy", equal_time=True)}
    parts = [
        f"{difference(v)} on {name}" + (f" (less `greedy` {difference(greedy[name])})" if name in greedy else "")
        for name, _, v in compared(found, "cooldown", "static", equal_time=True)
    ]
    if not parts:
        return []
    return [
        "At equal modelled time, the layers that save most time and none in the last fifth of the run (`cooldown`) "
        f"gain on `static`: {'; '.join(parts)}. Such schedules need no measurement, and so cost no privacy."
    ]


def _every_choice(found: Mapping[str, Evidence]) -> list[str]:
    """Annealed against each fixed choice of as many layers."""
    said = []
    for key, layers in LAYERS.items():
        if f"{key}_main" not in found or f"{key}_subsets" not in found:
            continue
        against = [value for *_, value in every_choice(found[f"{key}_main"], found[f"{key}_subsets"], layers)]
        against = [value for value in against if value.n >= SEEDS and value.mean is not None]
        if not against:
            continue
        better, worse = (sum(value.sign == sign for value in against) for sign in (1, -1))
        least = min(against, key=lambda value: value.mean or 0.0)
        said.append(
            f"On {DATA[key]}, of the {len(against)} fixed choices of as many layers that were trained `annealed` is "
            f"shown to be better than {better} and worse than {worse}; the least that it gains on one is "
            f"{difference(least)} points."
        )
    return said


def _anchors(found: Mapping[str, Evidence]) -> str:
    parts = []
    for name, published in PUBLISHED.items():
        if name not in found:
            continue
        first = next(iter(found[name].sweep.points.values()))
        own = sample(list(found[name].accuracies(first).values()))
        if own.mean is not None and own.low is not None:
            data = DATA[name.split("_")[0]]
            parts.append(f"{data} {100 * own.mean:.1f} % (95 % {interval(own)}), published {published:.1f} %")
    return "; ".join(parts)


def _arithmetic(found: Mapping[str, Evidence]) -> str:
    said = ["**Where does the accuracy go?**"]
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind != "formats":
            continue
        costs = []
        for settings in evidence.points(scheduler="static", fraction=1.0):
            full = evidence.full_precision(settings)
            lost = average(evidence, [(settings, full)]) if full is not None else sample([])
            if lost.n >= SEEDS and lost.mean is not None:
                costs.append((lost.mean, f"{settings['format']} {difference(lost)}"))
        if costs:
            said.append(
                f"On {DATA[key]} each format, all layers in it, loses against full precision: "
                f"{', '.join(text for _, text in sorted(costs))} points."
            )
        for settings in evidence.points(scheduler="annealed"):
            full = evidence.full_precision(settings)
            lost = average(evidence, [(settings, full)]) if full is not None else sample([])
            if settings["format"] == "nvfp4" and lost.n >= SEEDS:
                said.append(f"Format and schedule add up: nvfp4, annealed: {difference(lost)} points.")
    said += [variance_tables.sentence(), *_settings(found)]
    if anchors := _anchors(found):
        said.append(f"Full precision itself is as published: {anchors}.")
    return " ".join(part for part in said if part)


def _settings(found: Mapping[str, Evidence]) -> list[str]:
    """What changing one setting of a scheduler at a time does."""
    said = []
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind not in ("ablation", "beta"):
            continue
        known = list(evidence.sweep.points.values())
        pairs = [(p, other) for p in known if (other := evidence.sweep.compared_with(p)) is not None and other != p]
        values = [v for p, other in pairs if (v := average(evidence, [(p, dict(other))])).n >= SEEDS]
        if values:
            clear = sum(bool(value.sign) for value in values)
            low, high = min(v.low or 0.0 for v in values), max(v.high or 0.0 for v in values)
            said.append(
                f"Of dpquant's settings, changed one at a time on {DATA[key]}, {clear} of {len(values)} changes make a "
                f"difference that is shown; the intervals lie between {100 * low:+.2f} and {100 * high:+.2f} points."
            )
    return said


def _chips() -> str:
    return f"**What does it buy?** {chips.sentence()}"


def unfinished(found: Mapping[str, Evidence]) -> list[str]:
    """What failed, is missing, or was set aside."""
    said = []
    for name, evidence in found.items():
        title = TITLES.get(name, name)
        failed = [r for r in evidence.results.values() if not r.done]
        done, planned = len(evidence.results) - len(failed), len(evidence.sweep.runs)
        for reason in sorted({str(r.error) for r in failed}):
            said.append(f"{title}: {sum(str(r.error) == reason for r in failed)} runs failed: {reason}")
        for run, reason in evidence.sweep.refused.items():
            said.append(f"{title}: {run} was refused: {reason}")
        if done < planned:
            said.append(f"{title}: {planned - done} of {planned} planned runs have no result yet.")
        if evidence.stale:
            said.append(f"{title}: {len(evidence.stale)} results of an earlier configuration are not used.")
    return said
