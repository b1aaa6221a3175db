"""Ending in full precision, at equal modelled time: against fixed choices, on fresh seeds, in short and long runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpquant.statistics import Sample, paired, sample

from .choices import LATER, every_choice, folded, known_choices, looked_at_once, room
from .files import SEEDS, Accuracies, Evidence, Settings, differences
from .glance import MODELS, SUBJECTS, narrowed, rest
from .markdown import difference, verdict
from .told import Told, by, by_budget, compared, shown, span


def sentences(found: Mapping[str, Evidence]) -> list[str]:
    """All that is said of it."""
    return _cooldown(found) + _budgets(found) + _every_choice(found) + _fresh(found) + _by_length(found)


def _cooldown(found: Mapping[str, Evidence]) -> list[str]:
    """At equal modelled time: the layers that save most, and none of them at the end."""
    values = [(name, v) for name, _, v in compared(found, "cooldown", "static", equal_time=True)]
    if not values:
        return []
    greedy = {name: v for name, _, v in compared(found, "cooldown", "greedy", equal_time=True)}
    better, worse = (len(shown(values, sign)) for sign in (1, -1))
    parts = [
        f"{difference(v)} on {name}" + (f" (less `greedy` {difference(greedy[name])})" if name in greedy else "")
        for name, v in values
    ]
    return [
        "At equal modelled time, the layers that save most time at first, and none at the end "
        "(`cooldown`), are shown to be "
        f"better than `static` in {better} of {len(values)} and worse in {worse}: {'; '.join(parts)}. Such "
        "schedules need no measurement, and so cost no privacy."
    ]


def _budgets(found: Mapping[str, Evidence]) -> list[str]:
    """Whether its gain hangs on the budget."""
    said = []
    for scheduler in ("annealed", "cooldown"):
        if values := by_budget(found, scheduler, "static"):
            told = ", ".join(f"{difference(value)} on {name}" for name, value in values)
            said.append(
                f"`{scheduler}` less `static` at epsilon 1, less the same at epsilon 8, is above 0 in "
                f"{len(shown(values, 1))} of {len(values)} and below in {len(shown(values, -1))}: {told}."
            )
    return said


def _every_choice(found: Mapping[str, Evidence]) -> list[str]:
    """A schedule against each fixed choice of as many layers, and another against each that reaches its speedup."""
    said = []
    for equal_time, scheduler, like in (
        (False, "annealed", "of as many layers that were trained"),
        (True, "cooldown", "that were trained and reach the same modelled speedup"),
    ):
        values = [
            (choices.subject, value)
            for choices in known_choices(found, equal_time=equal_time)
            for *_, value in every_choice(choices, scheduler)
            if value.n >= SEEDS and not choices.fresh
        ]
        if not values:
            continue
        better, worse, undecided = (shown(values, sign) for sign in (1, -1, 0))
        parts = ", ".join(
            f"{sum(name == place for name, _ in better)} of {sum(name == place for name, _ in values)} on {place}"
            for place in dict.fromkeys(name for name, _ in values)
        )
        text = f"Of the {len(values)} fixed choices {like}, `{scheduler}` is shown to be better than "
        text += f"{len(better)} ({parts}){f', by {span(better)},' if better else ''} and worse than "
        text += f"{len(worse)}{by(worse)}"
        text += ", on seeds that its rule was chosen on" if scheduler == "cooldown" else ""
        if undecided:
            text += f"; for {len(undecided)} no difference is shown ({span(undecided)})"
        said.append(text + ".")
    return said


def _fresh(found: Mapping[str, Evidence]) -> list[str]:
    """On seeds that nothing was chosen on."""
    said = []
    beside_full: Told = []
    known = {choices.subject: choices for choices in known_choices(found, equal_time=True) if choices.fresh}
    for name, subject in SUBJECTS.items():
        if name not in found or not name.endswith("_fresh"):
            continue
        evidence, parts, later = found[name], [], []
        for scheduled, fixed, value in every_choice(known[subject], "cooldown") if subject in known else ():
            choice = f"[{folded(fixed['schedule.layers'])}]"
            if value.n >= SEEDS:
                parts.append(f"less {choice} {difference(value)} points, {verdict(value)}{_room(evidence, fixed)}")
            if name in LATER and (own := looked_at_once(known[subject], scheduled, fixed)).n >= SEEDS:
                later.append(f"less {choice} {difference(own)} points, {verdict(own)}")
        greedy = {rest(p): p for p in evidence.points(scheduler="greedy")}
        for point in evidence.points(scheduler="cooldown"):
            model = MODELS.get(str(point.get("model.name")))
            place = f"at {point['schedule.target_speedup']:g}x" if model is None else f"on {model}"
            if (lost := sample([*evidence.lost(point).values()])).n >= SEEDS:
                own = f"{subject} {place}" if model is None else narrowed(subject, point["model.name"])
                beside_full.append((own, lost))
            if (other := greedy.get(rest(point))) is None or (value := evidence.compared(point, other)).n < SEEDS:
                continue
            parts.append(f"less `greedy` {place} {difference(value)} points, {verdict(value)}")
        if parts:
            which = "all of them" if name in LATER else "which nothing was chosen on"
            said.append(f"On {subject}, {which}, `cooldown` {'; '.join(parts)}.")
        if later:
            said.append(
                f"On its seeds from {LATER[name]} on alone, which were planned after those before had been looked at "
                "(a second look misleads more often than once in twenty times; these had but one), "
                f"`cooldown` {'; '.join(later)}."
            )
    if beside_full:
        better, worse = (shown(beside_full, sign) for sign in (1, -1))
        said.append(
            f"Less full precision itself, on fresh seeds, `cooldown` is better in {len(better)} of {len(beside_full)}"
            f"{by(better)} and worse in {len(worse)}{by(worse)}."
        )
    return said


def _room(evidence: Evidence, fixed: Settings) -> str:
    """What there is to gain on a fixed choice."""
    most = room(evidence, fixed)
    if most.n < SEEDS:
        return ""
    if most.sign == 1:
        return f" (full precision less it: {difference(most)})"
    return f" (nor is full precision shown to be better than it: {difference(most)})"


LENGTHS: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "ResNet-18 on CIFAR-10": (("cifar10_resnet18", "cifar10_resnet18_epochs"), {}),
    "DenseNet-121 on CIFAR-10": (("cifar10_deep_fresh", "cifar10_deep_epochs"), {"model.name": "densenet121"}),
    "the digits at epsilon 1": (("digits_epochs",), {}),
}
"""Network and data -> sweeps of one goal and several numbers of epochs, and the settings that name it in them."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """What `cooldown` gains on `greedy` in runs of one length.

    Attributes:
        epochs: the length.
        gains: of each seed.
        lost: by `greedy`, against full precision.
    """

    epochs: int
    gains: Accuracies
    lost: Sample

    @property
    def gain(self) -> Sample:
        """Over the seeds."""
        return sample([*self.gains.values()])


def by_length(found: Mapping[str, Evidence]) -> Iterator[tuple[str, list[Length]]]:
    """Subjects that were trained for several numbers of epochs, the least first."""
    for subject, (names, wanted) in LENGTHS.items():
        known = []
        for evidence in (found[name] for name in names if name in found):
            for point in evidence.points(scheduler="cooldown", **wanted):
                other = next(p for p in evidence.points(scheduler="greedy") if rest(p) == rest(point))
                gains, lost = differences(evidence, [(point, other)]), sample([*evidence.lost(other).values()])
                if min(len(gains), lost.n) >= SEEDS:
                    known.append(Length(epochs=point["training.epochs"], gains=gains, lost=lost))
        if len(known) > 1:
            yield subject, sorted(known, key=lambda length: length.epochs)


def _by_length(found: Mapping[str, Evidence]) -> list[str]:
    """What it gains on the same layers to the end, by the number of epochs."""
    said = []
    for subject, lengths in by_length(found):
        parts = [
            f"{difference(one.gain)} points after {one.epochs} epochs, where that loses {difference(one.lost)}"
            for one in lengths
        ]
        said.append(
            f"Whether its gain depends on the length of the run, `cooldown` less `greedy` on {subject}: "
            f"{'; '.join(parts)} against full precision. The longest less the "
            f"shortest: {difference(paired(lengths[-1].gains, lengths[0].gains))}."
        )
    return said
