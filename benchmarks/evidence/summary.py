"""Three paragraphs for a newcomer, whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import sample

from . import chips, variance_tables
from .choices import every_choice, known_choices, room
from .files import Evidence
from .findings import anchors
from .markdown import difference
from .told import SEEDS, Told, by_budget, shown, span, unprobed

FORMATS = {"luq_fp4": "LUQ-FP4", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "fp8": "FP8"}


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), f"**What does it buy?** {chips.sentence()}"]


def _scheduling(found: Mapping[str, Evidence]) -> str:
    told = ["**Does a changing choice of layers save accuracy?**"]
    drawn, preferred, ended = (
        unprobed(found, scheduler, other, equal_time=same_time)
        for scheduler, other, same_time in (
            ("pls", "static", None),
            ("dpquant", "pls", None),
            ("annealed", "static", False),
        )
    )
    if not (drawn and ended):
        return " ".join([*told, "There are too few seeds yet to say anything."])
    if _better_share(ended) > 0.5 > _better_share(drawn):
        told.append("*When* layers are quantized matters more than *which*.")
    told.append(
        f"Layers drawn anew every epoch (`pls`) do better than one fixed random choice (`static`) in {_counted(drawn)}."
    )
    if preferred:
        told.append(
            "The paper's scheduler, which prefers layers that were found insensitive (`dpquant`), does better than "
            f"`pls` in {_counted(preferred)}."
        )
    gains = shown(ended, 1)
    told.append(
        "Quantizing all layers in the first epochs and none in the last (`annealed`) does better than `static`, of as "
        f"many layers in all, in {_counted(ended)}{f', by {span(gains)}' if gains else ''}."
    )
    if budgets := by_budget(found, "annealed", "static"):
        more = shown(budgets, 1)
        told.append(
            f"At epsilon 1 it gains more than at epsilon 8 in {_counted(budgets)}"
            f"{f', by {span(more)}' if more else ''}."
        )
    return " ".join(told + _best(found))


def _best(found: Mapping[str, Evidence]) -> list[str]:
    """Cooldown against the fixed choices that reach the same speedup."""
    tried: Told = []
    fresh: Told = []
    open_with_room = 0
    for choices in known_choices(found, equal_time=True):
        for _, fixed, value in every_choice(choices, "cooldown"):
            if value.n >= SEEDS:
                (fresh if choices.fresh else tried).append((choices.subject, value))
                open_with_room += choices.fresh and not value.sign and room(choices.fixed, fixed).sign == 1
    if not tried:
        return []
    text = (
        "With the layers that save most time alone, and none at the end (`cooldown`), it does better than "
        f"{len(shown(tried, 1))} of the {len(tried)} fixed choices of layers that reach the same modelled speedup, and "
        f"worse than {len(shown(tried, -1))}"
    )
    if fresh:
        better, worse, undecided = (len(shown(fresh, sign)) for sign in (1, -1, 0))
        text += f"; on seeds that nothing was chosen on, better than {better} of {len(fresh)}, and worse than {worse}"
        if undecided:
            text += f" (of the other {undecided} full precision itself is shown to be better than {open_with_room})"
    return [f"{text}. Such schedules measure nothing, and so cost no privacy."]


def _better_share(values: Told) -> float:
    return len(shown(values, 1)) / len(values)


def _counted(values: Told) -> str:
    return f"{len(shown(values, 1))} of {len(values)} comparisons"


def _arithmetic(found: Mapping[str, Evidence]) -> str:
    told = ["**Where does the accuracy go?**"]
    if (formats := found.get("cifar10_formats")) is not None:
        costs = []
        for name, said in FORMATS.items():
            here = formats.points(scheduler="static", fraction=1.0, format=name)
            lost = sample([*formats.lost(here[0]).values()] if here else [])
            if lost.n >= SEEDS:
                costs.append(f"{said} {difference(lost)}" + ("" if lost.sign else ", which shows no loss"))
        if costs:
            told.append(
                "Into the number format before the schedule: with all layers of CIFAR-10's CNN in it, points less full "
                f"precision: {'; '.join(costs)}."
            )
    if costs := by_budget(found, "full", "static"):
        more = shown(costs, 1)
        told.append(
            "The smaller the privacy budget, the more quantization costs: at epsilon 1 more than at epsilon 8 in "
            f"{_counted(costs)}{f', by {span(more)}' if more else ''}."
            if len(more) * 2 > len(costs)
            else f"That a smaller privacy budget makes it cost more is shown in {_counted(costs)}."
        )
    if harm := variance_tables.forward_harm():
        told.append(
            "What costs LUQ-FP4, the paper's format, is that weights and activations are rounded to the nearest of few "
            f"values on the way forward: {harm}."
        )
    if known := anchors(found):
        told.append(f"In full precision accuracy is as published: {known}.")
    return " ".join(told)
