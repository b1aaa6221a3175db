"""What was found, in sentences whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import Sample, sample

from . import chips, variance_tables
from .files import Evidence, Settings, average
from .markdown import difference, interval, verdict
from .sweep_tables import PUBLISHED, TITLES, every_choice, probe_costs, scheduler_averages

DATA = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits", "words": "text, with DP-Adam"}
LAYERS = {"fashion": 4, "cifar10": 8}


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Three of them: scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), _chips()]


def _scheduling(found: Mapping[str, Evidence]) -> str:
    said = [
        "**Does a changing choice of layers save accuracy?** Quantizing a layer to FP4 costs accuracy; the schedulers "
        "decide which layers it costs, or when. `static` draws them once, `pls` anew every epoch, `dpquant` anew with "
        "a preference for layers that were found insensitive, by a private probe or from gradients that training "
        "releases anyway; `greedy` takes those that save most time; `annealed` quantizes all of them in the first "
        "epochs and none in the last, `delayed` the reverse."
    ]
    said += _answer(found)
    if anchors := _anchors(found):
        said.append(f"Full precision first meets what was published: {anchors}.")
    for key, data in DATA.items():
        if f"{key}_main" in found:
            said.append(_compared(data, found[f"{key}_main"]))
        if f"{key}_time" in found:
            said.append(_compared(f"{data} at equal modelled time", found[f"{key}_time"]))
    elsewhere = _elsewhere(found)
    if elsewhere:
        said.append(f"Annealed less static elsewhere: {elsewhere}.")
    said += _every_choice(found)
    said += _settings(found)
    for name, epsilon, free, paid, cost in probe_costs(found):
        if cost.sign:
            said.append(
                f"The private probe has a price: on {DATA[name.split('_')[0]]} at epsilon {epsilon:g} its share of the "
                f"budget raises the noise multiplier from {free:.2f} to {paid:.2f}, and against the free estimate from "
                f"released gradients accuracy changes by {difference(cost)} points."
            )
    return " ".join(said)


def _answer(found: Mapping[str, Evidence]) -> list[str]:
    """The comparisons with a fixed choice in short: which layers, and when."""
    named = [(d, f"{key}_main") for key, d in DATA.items()]
    named += [(f"{d} at equal modelled time", f"{key}_time") for key, d in DATA.items()]
    which: list[tuple[str, Sample]] = []
    when: list[tuple[str, Sample]] = []
    for data, name in named:
        for comparison, value in scheduler_averages(found[name]) if name in found else ():
            if comparison.other == "static" and value.sign is not None:
                if comparison.scheduler in ("pls", "dpquant"):
                    which.append((data, value))
                elif comparison.scheduler == "annealed":
                    when.append((data, value))
    said = []
    if which:
        gains = list(dict.fromkeys(data for data, value in which if value.sign == 1))
        where = f"is shown to be better on {' and '.join(gains)}" if gains else "is nowhere shown to be better"
        said.append(f"In short: drawing *which* layers anew, at random or by sensitivity, {where} than a fixed choice.")
    gains = [f"{difference(value)} points on {data}" for data, value in when if value.sign == 1]
    others = [f"{data} ({verdict(value)}, {difference(value)})" for data, value in when if value.sign != 1]
    if gains:
        said.append(
            f"Choosing *when* is: quantizing everything at first and nothing at the end gains {', '.join(gains)}"
            + (f"; not on {', '.join(others)}." if others else ".")
        )
    return said


def _settings(found: Mapping[str, Evidence]) -> list[str]:
    """What changing one setting of a scheduler at a time does."""
    said = []
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind != "ablation":
            continue
        known = list(evidence.sweep.points.values())
        pairs = [(p, other) for p in known if (other := evidence.sweep.compared_with(p)) is not None and other != p]
        values = [value for pair in pairs if (value := average(evidence, [(pair[0], dict(pair[1]))])).sign is not None]
        if values:
            clear = sum(bool(value.sign) for value in values)
            low, high = min(v.low or 0.0 for v in values), max(v.high or 0.0 for v in values)
            said.append(
                f"Of dpquant's settings, changed one at a time on {DATA[key]}, {clear} of {len(values)} changes make a "
                f"difference that is shown; the intervals lie between {100 * low:+.2f} and {100 * high:+.2f} points."
            )
    return said


def _compared(data: str, evidence: Evidence) -> str:
    """What one sweep shows of the schedulers: each clear difference, and how large the others may be at most."""
    values = [(c.said, value) for c, value in scheduler_averages(evidence) if value.sign is not None]
    if not values:
        return f"On {data} there are too few seeds yet to say anything."
    text = f"On {data}, in points of test accuracy averaged over all settings, "
    clear = [f"{said} is {verdict(value)}: {difference(value)}" for said, value in values if value.sign]
    open_ = [value for _, value in values if not value.sign]
    if clear:
        text += "; ".join(clear) + "."
    if open_:
        least, most = min(v.low or 0.0 for v in open_), max(v.high or 0.0 for v in open_)
        among = f"the other {len(open_)} comparisons" if clear else f"{len(open_)} comparisons"
        span = f"their intervals lie between {100 * least:+.2f} and {100 * most:+.2f}"
        text += f"{' Of' if clear else 'of'} {among} none shows a difference; {span}."
    return text


def _elsewhere(found: Mapping[str, Evidence]) -> str:
    parts = []
    for name, evidence in found.items():
        if name.endswith(("_main", "_time")) or "schedule.scheduler" not in evidence.sweep.keys:
            continue
        for comparison, value in scheduler_averages(evidence):
            if (comparison.scheduler, comparison.other) == ("annealed", "static") and value.sign is not None:
                parts.append(f"{TITLES[name]} {difference(value)}, {verdict(value)}")
    return "; ".join(parts)


def _every_choice(found: Mapping[str, Evidence]) -> list[str]:
    """Annealed against each fixed choice of as many layers."""
    said = []
    for key, layers in LAYERS.items():
        if f"{key}_main" not in found or f"{key}_subsets" not in found:
            continue
        against = [value for *_, value in every_choice(found[f"{key}_main"], found[f"{key}_subsets"], layers)]
        against = [value for value in against if value.sign is not None and value.mean is not None]
        if not against:
            continue
        better, worse = (sum(value.sign == sign for value in against) for sign in (1, -1))
        least = min(against, key=lambda value: value.mean or 0.0)
        said.append(
            f"On {DATA[key]}, of the {len(against)} fixed choices of as many layers that were trained annealed is "
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
    said = [
        "**Where does the accuracy go?** Each difference is against full precision, averaged over the budgets that all "
        "of the schedules have."
    ]
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind in ("main", "time"):
            said += _lost(DATA[key], evidence)
        elif kind == "formats":
            costs = []
            for settings in evidence.points(scheduler="static", fraction=1.0):
                lost = _against_full(evidence, [settings])
                if lost.low is not None:
                    costs.append(f"{settings['format']} {difference(lost)}")
            if costs:
                said.append(f"On {DATA[key]}, all layers, by format: {'; '.join(costs)}.")
    said.append(variance_tables.sentence())
    return " ".join(part for part in said if part)


def _lost(data: str, evidence: Evidence) -> list[str]:
    """What schedules cost against full precision, over the settings that all have, for every share or target."""
    said = []
    known = evidence.sweep.points.values()
    goals = ("fraction", "{:.0%} of the layers in LUQ-FP4"), ("target_speedup", "LUQ-FP4 to a modelled {:g}x")
    for goal, text in goals:
        for value in sorted({p.get(f"schedule.{goal}") or 0.0 for p in evidence.points(scheduler="static")} - {0.0}):
            names = [s for s in ("static", "greedy", "annealed") if evidence.points(scheduler=s, **{goal: value})]
            of_static = evidence.points(scheduler="static", **{goal: value})
            groups = [[{**p, "schedule.scheduler": name} for name in names] for p in of_static]
            shared = [group for group in groups if all(point in known for point in group)]
            lost = [_against_full(evidence, list(points)) for points in zip(*shared, strict=True)]
            parts = [f"{name} {difference(v)}" for name, v in zip(names, lost, strict=True) if v.low is not None]
            if parts:
                said.append(f"On {data}, {text.format(value).replace('%', ' %')}: {', '.join(parts)} points.")
    return said


def _against_full(evidence: Evidence, points: list[Settings]) -> Sample:
    pairs = [(p, full) for p in points if (full := evidence.full_precision(p)) is not None]
    return average(evidence, pairs)


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
