"""What benchmarks/tested.py saw: fixed choices of layers tested in the arithmetic of their training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpquant.statistics import Sample, paired, sample

from .choices import LATER, every_choice, folded, known_choices
from .files import RESULTS, SEEDS, Accuracies, Evidence, Settings, lines
from .glance import SUBJECTS, rest, schedules
from .markdown import difference, mean, table, verdict
from .told import Told, by, firm, shown


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One fixed choice of layers: a random one, drawn anew for every seed, or layers by name.

    Attributes:
        subject: network and data.
        choice: which layers are quantized.
        fresh: whether it is one of a sweep of fresh seeds, held against a schedule of its modelled time.
        epsilon: the budget.
        full: seed -> accuracy in full precision.
        own: seed -> accuracy with the layers quantized as in training.
        unquantized: seed -> accuracy of the same trained in full precision.
        cooldown: seed -> accuracy of that schedule with as many layers, or of the same modelled time.
    """

    subject: str
    choice: str
    fresh: bool
    epsilon: float
    full: Accuracies
    own: Accuracies
    unquantized: Accuracies
    cooldown: Accuracies


def tested(found: Mapping[str, Evidence]) -> Iterator[Tested]:
    """Every fixed choice that was tested so, on seeds that no look at the others decided and runs that are current."""
    rows = {(row["sweep"], row["run"], row["digest"]): row for row in lines(RESULTS / "tested.jsonl")}
    for name in dict.fromkeys(sweep for sweep, *_ in rows):
        if (evidence := found.get(name)) is None:
            continue
        partners = _partners(found, name)
        unvaried = evidence.sweep.runs[0].config["privacy"]["target_epsilon"]
        for point in schedules(evidence, "static", {}):
            known = [rows.get((name, r.name, r.digest)) for r in evidence.finished(point)]
            own = [row for row in known if row is not None and row["seed"] >= LATER.get(name, 0)]
            partner, layers = partners.get(rest(point)), point.get("schedule.layers")
            plain = evidence.full_precision(point)
            if len(own) >= SEEDS:
                yield Tested(
                    subject=SUBJECTS[name],
                    choice=folded(layers) if layers else f"{100 * point['schedule.fraction']:g} % of the layers",
                    fresh=layers is not None,
                    epsilon=point.get("privacy.target_epsilon", unvaried),
                    full={row["seed"]: row["in_full_precision"] for row in own},
                    own={row["seed"]: row["as_trained"] for row in own},
                    unquantized={} if plain is None else evidence.accuracies(plain),
                    cooldown={} if partner is None else evidence.accuracies(partner),
                )


def _partners(found: Mapping[str, Evidence], name: str) -> dict[str, Settings]:
    """What a choice is, but for its scheduler -> the point of `cooldown` that it is held against."""
    for choices in known_choices(found, equal_time=True):
        if choices.main.sweep.name == name and choices.fresh:
            return {rest(fixed): scheduled for scheduled, fixed, _ in every_choice(choices, "cooldown")}
    return {rest(point): point for point in schedules(found[name], "cooldown", {})}


def beside_fresh(found: Mapping[str, Evidence]) -> Told:
    """`cooldown` less fixed choices of its modelled time tested as they were trained, on fresh seeds."""
    told = [(one.subject, paired(one.cooldown, one.own)) for one in tested(found) if one.fresh]
    return [(subject, value) for subject, value in told if value.n >= SEEDS]


def cost_of_all(found: Mapping[str, Evidence], subject: str, epsilon: float) -> Sample:
    """What a network with all its layers quantized loses, tested as it was trained, against full precision."""
    for one in tested(found):
        if (one.subject, one.choice, one.epsilon) == (subject, "100 % of the layers", epsilon):
            return paired(one.own, one.unquantized)
    return sample([])


def tested_table(found: Mapping[str, Evidence]) -> str:
    """Both tests of every choice, and `cooldown` less either; empty where nothing was tested."""
    rows = []
    for one in tested(found):
        own, more = paired(one.own, one.full), paired(one.cooldown, one.own)
        rows.append(
            [
                one.subject,
                one.choice,
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
    text = f"{len(better)} of {len(values)} settings{by(better)} and worse in {len(worse)}{by(worse)}"
    return f"{text}, after Holm's correction in {len(firm(values, 1))} and {len(firm(values, -1))}"
