"""What was said of the method before, beside what was found here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpquant.statistics import paired, sample

from . import variance_tables
from .files import SEEDS, Accuracies, Evidence, differences
from .glance import SUBJECTS, rest, schedules
from .markdown import difference, table, times
from .sweep_tables import NEGLIGIBLE, ProbeCost, probe_costs
from .told import Told, by_budget, firm, probed, shown, unprobed

Row = tuple[str, str, str]
"""What was said, what was found, and in a word."""
LOSS = 0.02  # points of accuracy, as a share
ESTIMATORS = {
    "probe": "by the private measurement",
    "released": "by gradients that are released anyway, which is not of the paper,",
}


def claims_table(found: Mapping[str, Evidence]) -> str:
    """A row for each claim that there are enough runs to speak of; empty for none."""
    rows = [row for part in (_drawn, _preferred, _growth, _private, _gradients, _budget, _loss) for row in part(found)]
    return table(["said of it", "found here", ""], rows) if rows else ""


def _drawn(found: Mapping[str, Evidence]) -> Iterator[Row]:
    values = unprobed(found, "pls", "static")
    if values:
        said = "Drawing the layers anew every epoch (`pls`) is better than one fixed random choice (`static`)."
        yield said, f"{_counted(values)}.", _verdict(values)


def _preferred(found: Mapping[str, Evidence]) -> Iterator[Row]:
    for estimator, said in ESTIMATORS.items():
        values = probed(found, "pls") if estimator == "probe" else unprobed(found, "dpquant", "pls")
        if values:
            yield (
                f"Preferring layers that are insensitive {said} (`dpquant`) is better than `pls`.",
                f"{_counted(values)}.",
                _verdict(values),
            )


def _counted(values: Told) -> str:
    gains = shown(values, 1)
    places = f" ({', '.join(f'{name} {difference(value)}' for name, value in gains)})" if gains else ""
    text = f"Better in {len(gains)} of {len(values)} comparisons{places}, worse in {len(shown(values, -1))}"
    return f"{text}; after Holm's correction in {len(firm(values, 1))} and {len(firm(values, -1))}"


def _verdict(values: Told) -> str:
    better, worse = len(firm(values, 1)), len(firm(values, -1))
    if better == len(values):
        return "yes"
    if better:
        return "in places"
    return "no" if worse else "not shown"


def _growth(found: Mapping[str, Evidence]) -> Iterator[Row]:
    """The gain of dpquant on pls by share of the layers."""
    for estimator, by in ESTIMATORS.items():
        grown: Told = []
        parts = []
        for subject, gains in _gains_by_share(found, estimator):
            least, *_, most = gains.values()
            grown.append((subject, paired(most, least)))
            told = ", ".join(f"{difference(sample([*own.values()]))} at {100 * s:.0f} %" for s, own in gains.items())
            parts.append(f"{subject}: {told}; the last less the first {difference(grown[-1][1])}.")
        if parts:
            said = f"Its gain on `pls`, {by.rstrip(',')}, grows with the share of the layers that is quantized."
            yield said, " ".join(parts), _verdict(grown)


def _gains_by_share(found: Mapping[str, Evidence], estimator: str) -> Iterator[tuple[str, dict[float, Accuracies]]]:
    """Every network that was trained with several shares of its layers, and what dpquant gains at each."""
    for name, subject in SUBJECTS.items():
        evidence = found.get(name)
        if evidence is None or "schedule.fraction" not in evidence.sweep.keys:
            continue
        gains = {}
        for share in sorted({p["schedule.fraction"] for p in evidence.points(scheduler="dpquant")}):
            there = {rest(p): p for p in schedules(evidence, "pls", {"fraction": share})}
            here = {rest(p): p for p in schedules(evidence, "dpquant", {"fraction": share}, estimator=estimator)}
            pairs = [(here[key], there[key]) for key in here.keys() & there.keys()]
            own = differences(evidence, pairs) if pairs else {}
            if len(own) >= SEEDS:
                gains[share] = own
        if len(gains) > 1:
            yield subject, gains


def _private(found: Mapping[str, Evidence]) -> Iterator[Row]:
    """What quantization costs with privacy and without, as many layers of one network; and at two budgets."""
    private, other = found.get("cifar10_main"), found.get("cifar10_nonprivate")
    parts, costs = [], []
    if private is not None and other is not None:
        for there in other.points(scheduler="static"):
            share = there["schedule.fraction"]
            here = private.points(scheduler="static", fraction=share, target_epsilon=8.0)
            with_it, without = private.lost(here[0]) if here else {}, other.lost(there)
            if min(len(with_it), len(without)) < SEEDS:
                continue
            costs.append(("CIFAR-10's CNN", paired(without, with_it)))
            lost = [difference(sample([*own.values()])) for own in (with_it, without)]
            parts.append(
                f"{100 * share:.0f} % of the layers of CIFAR-10's CNN in LUQ-FP4, points less full precision: "
                f"{lost[0]} at epsilon 8, {lost[1]} without privacy; the one less the other "
                f"{difference(paired(with_it, without))}."
            )
    if parts:
        yield "Quantization costs private training more than other training.", " ".join(parts), _verdict(costs)
    if budgets := by_budget(found, "full", "static"):
        told = ", ".join(f"{difference(value)} on {name}" for name, value in budgets)
        yield (
            "It costs more the stricter the privacy.",
            "Points that `static` loses more at epsilon 1 than at epsilon 8, averaged over the shares of the layers or "
            f"the speedups: {told}.",
            _verdict(budgets),
        )


def _gradients(found: Mapping[str, Evidence]) -> Iterator[Row]:
    """Sizes of gradients, and what rounding's variance grows with."""
    del found
    measured = variance_tables.measured()
    if measured is None:
        return
    norm, uniform, luq = (variance_tables.said(one) for one in (measured.norm, measured.uniform, measured.luq))
    yield (
        "An example's gradient is about twice as long in private training.",
        f"On Fashion-MNIST's CNN it is {norm} times as long after {variance_tables.last_step()} steps; with the same "
        f"noise and no clipping {variance_tables.said(measured.noise)} times.",
        "not so here" if variance_tables.excludes(measured.norm, 2.0) else "yes",
    )
    square = measured.uniform.low is not None and measured.uniform.low > 1.5
    yield (
        "Rounding's variance grows with the square of the largest magnitude.",
        f"On the uniform grid with its power {uniform}, on LUQ's logarithmic grid with its power {luq}.",
        "nearly, on the uniform grid" if square and variance_tables.excludes(measured.luq, 2.0) else "see the tables",
    )


def _budget(found: Mapping[str, Evidence]) -> Iterator[Row]:
    known: dict[float, list[ProbeCost]] = {}
    for cost in sorted(probe_costs(found), key=lambda cost: cost.rise):
        known.setdefault(cost.epsilon, []).append(cost)
    if known:
        parts = [
            f"{100 * own[0].rise:.1f} % (on {SUBJECTS[own[0].name]}) to {100 * own[-1].rise:.1f} % (on "
            f"{SUBJECTS[own[-1].name]}) at epsilon {epsilon:g}"
            for epsilon, own in sorted(known.items(), reverse=True)
        ]
        small = [cost.rise < NEGLIGIBLE for own in known.values() for cost in own]
        verdict = "yes" if all(small) else "where data are many" if any(small) else "no"
        text = f"What the probes of a run add to the noise of its steps: {'; '.join(parts)}."
        yield "The private measurement of sensitivities takes a negligible part of the budget.", text, verdict


def _loss(found: Mapping[str, Evidence]) -> Iterator[Row]:
    for estimator, by in ESTIMATORS.items():
        parts, values = [], []
        for name, subject in SUBJECTS.items():
            evidence = found.get(name)
            if evidence is None or "schedule.fraction" not in evidence.sweep.keys:
                continue
            for here in schedules(evidence, "dpquant", {"fraction": 0.9}, estimator=estimator):
                lost = sample([*evidence.lost(here).values()])
                if here.get("privacy.target_epsilon", 8.0) == 8.0 and lost.n >= SEEDS:
                    values.append(lost)
                    parts.append(f"{subject} {difference(lost)} at {times(evidence.speedup(here))}")
        if parts:
            less = sum(v.low is not None and v.low > -LOSS for v in values)
            more = sum(v.high is not None and v.high < -LOSS for v in values)
            said = "At up to 2.21 times the throughput less than 2 points of accuracy are lost, layers preferred "
            text = "`dpquant`, 90 % of the layers in LUQ-FP4 at epsilon 8, points less full precision, and the speedup "
            text += f"by a B200's peak rates: {'; '.join(parts)}."
            yield f"{said}{by.rstrip(',')}.", text, f"less in {less}, more in {more} of {len(values)}"
