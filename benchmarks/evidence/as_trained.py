"""What benchmarks/tested.py saw: fixed choices of layers tested in the arithmetic of their training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpquant.statistics import paired, sample

from .files import RESULTS, SEEDS, Accuracies, Evidence, lines
from .glance import SUBJECTS, rest, schedules
from .markdown import difference, mean, table, verdict
from .told import Told, by, shown


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One fixed choice of layers, drawn anew for every seed.

    Attributes:
        subject: network and data.
        share: of the layers that are quantized.
        epsilon: the budget.
        full: seed -> accuracy in full precision.
        own: seed -> accuracy with the layers quantized as in training.
        cooldown: seed -> accuracy of that schedule with as many layers, which ends in full precision.
    """

    subject: str
    share: float
    epsilon: float
    full: Accuracies
    own: Accuracies
    cooldown: Accuracies


def tested(found: Mapping[str, Evidence]) -> Iterator[Tested]:
    """Every sweep, budget and share of the layers that was tested so, of runs that are still the sweep's."""
    rows = {(row["sweep"], row["run"], row["digest"]): row for row in lines(RESULTS / "tested.jsonl")}
    for name in dict.fromkeys(sweep for sweep, *_ in rows):
        if (evidence := found.get(name)) is None:
            continue
        cooled = {rest(point): point for point in schedules(evidence, "cooldown", {})}
        for point in schedules(evidence, "static", {}):
            known = [rows.get((name, r.name, r.digest)) for r in evidence.finished(point)]
            own = [row for row in known if row is not None]
            if len(own) >= SEEDS:
                yield Tested(
                    subject=SUBJECTS[name],
                    share=point["schedule.fraction"],
                    epsilon=point["privacy.target_epsilon"],
                    full={row["seed"]: row["in_full_precision"] for row in own},
                    own={row["seed"]: row["as_trained"] for row in own},
                    cooldown=evidence.accuracies(cooled[rest(point)]) if rest(point) in cooled else {},
                )


def tested_table(found: Mapping[str, Evidence]) -> str:
    """Both tests of every choice, and `cooldown` less either; empty where nothing was tested."""
    rows = []
    for one in tested(found):
        own, more = paired(one.own, one.full), paired(one.cooldown, one.own)
        rows.append(
            [
                one.subject,
                f"{100 * one.share:g} % of the layers",
                f"{one.epsilon:g}",
                f"{own.n}",
                *(mean(sample([*values.values()])) for values in (one.full, one.own)),
                difference(own),
                verdict(own),
                *map(difference, (paired(one.cooldown, one.full), more)),
                verdict(more) if more.n else "",
            ]
        )
    titles = ["trained", "quantized", "epsilon", "seeds", "in full precision, %", "as trained, %"]
    titles += ["as trained less in full precision, points", "", "`cooldown` less the former", "less the latter", ""]
    return table(titles, rows, (3, 4, 5, 6, 8, 9)) if rows else ""


def sentence(found: Mapping[str, Evidence]) -> str:
    """Whether the test's arithmetic decides; empty where nothing was tested."""
    own: Told = []
    more: Told = []
    for one in tested(found):
        place = f"{one.subject} at epsilon {one.epsilon:g}"
        for values, pair in ((own, (one.own, one.full)), (more, (one.cooldown, one.own))):
            if (value := paired(*pair)).n >= SEEDS:
                values.append((place, value))
    if not own:
        return ""
    text = "Tested in the arithmetic that they were trained in, fixed choices of layers (`static`) do better than in "
    text += f"full precision in {_counts(own)}. "
    return text + f"`cooldown`, which ends in full precision, does better than these so tested in {_counts(more)}."


def _counts(values: Told) -> str:
    better, worse = shown(values, 1), shown(values, -1)
    return f"{len(better)} of {len(values)} settings{by(better)} and worse in {len(worse)}{by(worse)}"
