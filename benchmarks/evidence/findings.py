"""What was found, in sentences whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import Sample, sample

from . import chips, variance_tables
from .files import Evidence, average
from .markdown import difference, interval, verdict
from .sweep_tables import PUBLISHED, TITLES, probe_costs, scheduler_averages

DATA = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits"}


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Three of them: scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), _chips()]


def _scheduling(found: Mapping[str, Evidence]) -> str:
    said = [
        "**Does a changing choice of layers save accuracy?** Quantizing a layer to FP4 costs accuracy; the schedulers "
        "decide which layers it costs. `static` draws them once, `pls` anew every epoch, `dpquant` anew with a "
        "preference for layers that a private measurement found insensitive."
    ]
    if anchors := _anchors(found):
        said.append(f"Full precision first meets what was published: {anchors}.")
    for key, data in DATA.items():
        main = found.get(f"{key}_main")
        if main is None:
            continue
        values = [(text, value) for text, value in scheduler_averages(main) if value.sign is not None]
        if not values:
            said.append(f"On {data} there are too few seeds yet to say anything.")
            continue
        shown = "; ".join(f"{text}: {difference(value)}" for text, value in values)
        clear = [f"{text} is {verdict(value)}" for text, value in values if value.sign]
        said.append(
            f"On {data}, in points of test accuracy averaged over all budgets and fractions: {shown}. "
            + (f"So {'; '.join(clear)}." if clear else "None of these differences is shown to be other than zero.")
        )
    for name, epsilon, free, paid, cost in probe_costs(found):
        if cost.sign:
            said.append(
                f"The private probe has a price: on {DATA[name.split('_')[0]]} at epsilon {epsilon:g} its share of the "
                f"budget raises the noise multiplier from {free:.2f} to {paid:.2f}, and against the free estimate from "
                f"released gradients accuracy changes by {difference(cost)} points."
            )
    return " ".join(said)


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
    said = ["**Where does the accuracy go?** Each difference is against full precision, averaged over all budgets."]
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind == "main":
            for fraction in sorted({p["schedule.fraction"] for p in evidence.points(scheduler="static")}):
                lost = _against_full(evidence, scheduler="static", fraction=fraction)
                if lost.low is not None:
                    share = f"{100 * fraction:.0f} %" if fraction < 1 else "all"
                    said.append(f"On {DATA[key]}, {share} of the layers in LUQ-FP4: {difference(lost)} points.")
        elif kind == "formats":
            costs = []
            for settings in evidence.points(scheduler="static", fraction=1.0):
                lost = _against_full(evidence, scheduler="static", fraction=1.0, format=settings["format"])
                if lost.low is not None:
                    costs.append(f"{settings['format']} {difference(lost)}")
            if costs:
                said.append(f"On {DATA[key]}, all layers, by format: {'; '.join(costs)}.")
    said.append(variance_tables.sentence())
    return " ".join(part for part in said if part)


def _against_full(evidence: Evidence, **wanted: object) -> Sample:
    pairs = [(p, full) for p in evidence.points(**wanted) if (full := evidence.full_precision(p)) is not None]
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
