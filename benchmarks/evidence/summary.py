"""Three paragraphs for a newcomer, whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import paired, sample

from . import chips, operand_tables
from .choices import every_choice, known_choices, looked_at_once, room
from .endings import by_length
from .files import SEEDS, Evidence
from .findings import anchors
from .markdown import difference
from .told import Told, by, by_budget, firm, probed, shown, span, unprobed

FORMATS = {"luq_fp4": "LUQ-FP4", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "mxfp8": "MXFP8", "fp8": "FP8"}


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), f"**What does it buy?** {chips.sentence()}"]


def _scheduling(found: Mapping[str, Evidence]) -> str:
    told = ["**Does a changing choice of layers save accuracy?**"]
    drawn, preferred, most, ended, ended_time = (
        unprobed(found, scheduler, other, equal_time=same_time)
        for scheduler, other, same_time in (
            ("pls", "static", None),
            ("dpquant", "pls", None),
            ("greedy", "static", True),
            ("annealed", "static", False),
            ("annealed", "static", True),
        )
    )
    by_probe = probed(found, "pls")
    if not (drawn and ended):
        return " ".join([*told, "There are too few seeds yet to say anything."])
    if 2 * len(firm(ended, 1)) > len(ended) and not firm(drawn, 1):
        told.append("Drawing them anew does not, as far as is shown; ending in full precision does.")
    told.append(
        f"Layers drawn anew every epoch (`pls`) do better than one fixed random choice (`static`) in {_counted(drawn)} "
        "comparisons (in brackets: what Holm's correction for their number leaves of them)."
    )
    if preferred:
        told.append(
            "Preferring layers that were found insensitive (`dpquant`) does better than `pls` in "
            f"{_counted(preferred)} by gradients that training releases anyway"
            + (f", in {_counted(by_probe)} by the private measurement of the paper" if by_probe else "")
            + "."
        )
    if most:
        told.append(
            "Taking those that save most time (`greedy`) does better than a random choice of the same modelled time in "
            f"{_counted(most)}."
        )
    told.append(
        "Quantizing all layers in the first epochs and none in the last (`annealed`) does better than a fixed choice "
        f"with as many layers times epochs in {_counted(ended)}{_gained(ended)}"
        + (f", and than one of the same modelled time in {_counted(ended_time)}" if ended_time else "")
        + "."
    )
    if growth := _by_family(found, "annealed", "static"):
        told.append(f"At epsilon 1 it gains more than at epsilon 8 in {growth}.")
    return " ".join(told + _best(found))


def _best(found: Mapping[str, Evidence]) -> list[str]:
    """Cooldown against the fixed choices that reach the same speedup."""
    tried: Told = []
    fresh: Told = []
    left: Told = []
    for choices in known_choices(found, equal_time=True):
        for scheduled, fixed, _ in every_choice(choices, "cooldown"):
            value = looked_at_once(choices, scheduled, fixed)
            if value.n >= SEEDS:
                (fresh if choices.fresh else tried).append((choices.subject, value))
                if choices.fresh and not value.sign and (most := room(choices.fixed, fixed)).sign == 1:
                    left.append((choices.subject, most))
    if not tried:
        return []
    text = (
        "With the layers that save most time alone (`cooldown`) it does better than "
        f"{_counted(tried)} fixed choices of layers of the same modelled time, and worse than "
        f"{len(shown(tried, -1))}"
    )
    if fresh:
        undecided = len(shown(fresh, 0))
        text += f"; on seeds that nothing was chosen on, better than {_counted(fresh)}, and worse than "
        text += f"{len(shown(fresh, -1))}"
        if undecided:
            harmless = undecided - len(left)
            text += f" (for the other {undecided} no difference is shown"
            text += f"; full precision less {'these' if len(left) > 1 else 'this'} {span(left)}" if left else ""
            text += f"; in {harmless} of them quantizing costs nothing that is shown)" if harmless else ")"
    told = [f"{text}."]
    if to_the_end := unprobed(found, "cooldown", "greedy", equal_time=True):
        worse = shown(to_the_end, -1)
        told.append(f"It does better than `greedy` in {_counted(to_the_end)}, and worse in {len(worse)}{by(worse)}.")
    if lengths := list(by_length(found)):
        grown = [(subject, paired(runs[-1].gains, runs[0].gains)) for subject, runs in lengths]
        ends = ", ".join(f"{difference(runs[-1].gain)} on {subject}" for subject, runs in lengths)
        more = f"In the longest runs it gains more on `greedy` than in the shortest in {_counted(grown)}"
        told.append(f"{more}: in the longest {ends}.")
    return [*told, "Such schedules measure nothing, and so cost no privacy."]


def _counted(values: Told) -> str:
    """In how many comparisons something is better; in brackets, in spite of their number."""
    better = len(shown(values, 1))
    return f"{better} of {len(values)}" + (f" [{len(firm(values, 1))}]" if better else "")


def _gained(values: Told) -> str:
    better = shown(values, 1)
    return f", where shown by {span(better)}" if better else ""


def _by_family(found: Mapping[str, Evidence], scheduler: str, other: str) -> str:
    """In how many comparisons a difference is larger at epsilon 1 than at 8, of each kind of goal."""
    families = ((False, "by share of the layers"), (True, "at equal modelled time"))
    known = [(by_budget(found, scheduler, other, equal_time=equal_time), said) for equal_time, said in families]
    return " and ".join(f"{_counted(values)} {said}" for values, said in known if values)


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
                "Into the number format first: with all layers of CIFAR-10's CNN in it at epsilon 8, points less full "
                f"precision: {'; '.join(costs)}."
            )
    if more := _by_family(found, "full", "static"):
        told.append(f"At epsilon 1 it costs more than at epsilon 8 in {more}.")
    if harm := operand_tables.in_luq(SEEDS):
        told.append(f"In LUQ-FP4, the paper's format, {harm}.")
    if known := anchors(found):
        told.append(known)
    return " ".join(told)
