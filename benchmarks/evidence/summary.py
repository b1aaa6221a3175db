"""Three paragraphs for a newcomer, whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import sample

from . import as_trained, chips, operand_tables
from .choices import every_choice, known_choices, looked_at_once, room
from .files import SEEDS, Evidence
from .findings import anchors
from .markdown import difference
from .told import Told, by, by_budget, firm, probed, shown, span, unprobed

FORMATS = {
    "luq_fp4": "LUQ-FP4",
    "mxfp4": "MXFP4",
    "fp4": "E2M1",
    "int4_luq": "INT4 with LUQ's gradients",
    "int4": "INT4",
    "nvfp4": "NVFP4",
    "fp6": "FP6",
    "mxfp8": "MXFP8",
    "fp8": "FP8",
}


def paragraphs(found: Mapping[str, Evidence]) -> list[str]:
    """Scheduling, arithmetic, chips."""
    return [_scheduling(found), _arithmetic(found), f"**What does it buy?** {chips.sentence()}"]


def _scheduling(found: Mapping[str, Evidence]) -> str:
    told = ["**Does a changing choice of layers save accuracy?**"]
    drawn, preferred = (unprobed(found, *pair) for pair in (("pls", "static"), ("dpquant", "pls")))
    by_probe, to_the_end = probed(found, "pls"), unprobed(found, "cooldown", "greedy", equal_time=True)
    if not (drawn and to_the_end):
        return " ".join([*told, "There are too few seeds yet to say anything."])
    if firm(to_the_end, 1) and not firm(drawn, 1):
        told.append("Drawing layers anew is not shown to; ending in full precision does in places.")
    told.append(
        "A new random choice every epoch (`pls`) does better than one for the whole run (`static`) in "
        f"{_counted(drawn)} comparisons (in brackets: in how many Holm's correction for their number leaves it so)."
    )
    if by_probe:
        told.append(
            "Preferring layers that were found insensitive (`dpquant`) does better than `pls` by the private "
            f"measurement of the paper in {_counted(by_probe)} and worse in {_counted(by_probe, -1)}, by gradients "
            f"that training releases anyway better in {_counted(preferred)}."
        )
    return " ".join(told + _best(found, to_the_end))


def _best(found: Mapping[str, Evidence], to_the_end: Told) -> list[str]:
    """Cooldown against the fixed choices that reach the same speedup, and against the same to the end."""
    fresh: Told = []
    left: Told = []
    bounds = []
    for choices in known_choices(found, equal_time=True):
        for scheduled, fixed, over_all in every_choice(choices, "cooldown") if choices.fresh else ():
            if (value := looked_at_once(choices, scheduled, fixed)).n >= SEEDS:
                fresh.append((choices.subject, value))
                if not value.sign and (most := room(choices.fixed, fixed)).sign == 1:
                    left.append((choices.subject, most))
                    bounds.append(over_all.high or 0.0)
    text = "`cooldown` quantizes the layers that save most time in the first epochs and none in the last."
    if fresh:
        undecided = len(shown(fresh, 0))
        text += " On seeds that nothing was chosen on it does better than "
        text += f"{_counted(fresh)} fixed choices of the same modelled time, and worse than {len(shown(fresh, -1))}"
        if undecided:
            harmless = undecided - len(left)
            text += f" (for the other {undecided} no difference is shown"
            if left:
                text += f"; full precision less {'these' if len(left) > 1 else 'this'} {span(left)}, and `cooldown` at "
                text += f"most {100 * max(bounds):+.2f}, on all seeds there are"
            text += f"; in {harmless} of them quantizing costs nothing that is shown)" if harmless else ")"
        text += "."
    if own := as_trained.beside_fresh(found):
        text += " With these choices tested in the arithmetic of their training, and `cooldown` in full precision, in "
        text += f"which it ends, it does better than {_counted(own)} and worse than {len(shown(own, -1))}."
    kept = firm(to_the_end, 1)
    parts = []
    for kind in dict.fromkeys(map(_kind, (name for name, _ in to_the_end))):
        own = [one for one in to_the_end if _kind(one[0]) == kind]
        better = shown(own, 1)
        count = f"{len(better)} of {len(own)}" + (f" [{sum(one in kept for one in own)}]" if better else "")
        parts.append(f"{count} {kind}" + (f" (by {span(better)})" if better else ""))
    worse = shown(to_the_end, -1)
    told = [text, f"Against what saves most time kept to the end (`greedy`) it does better in {'; '.join(parts)};"]
    told.append(f"and worse in {len(worse)}{by(worse)}.")
    return [*told, "It measures nothing, and so costs no privacy."]


def _kind(subject: str) -> str:
    """Of a comparison, what its outcome hangs on."""
    if "NVFP4" in subject:
        return "in NVFP4"
    deep = any(name in subject for name in ("ResNet-50", "DenseNet-121"))
    return "in LUQ-FP4 on " + ("ResNet-50 and DenseNet-121" if deep else "smaller networks")


def _counted(values: Told, sign: int = 1) -> str:
    """In how many comparisons something is better, or worse; in brackets, in spite of their number."""
    those = len(shown(values, sign))
    return f"{those} of {len(values)}" + (f" [{len(firm(values, sign))}]" if those else "")


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
                costs.append((lost.mean, f"{said} {difference(lost)}" + ("" if lost.sign else ", which shows no loss")))
        if costs:
            told.append(
                "Into the number format: with all layers of CIFAR-10's CNN in it at epsilon 8, points less full "
                f"precision: {'; '.join(text for _, text in sorted(costs))}."
            )
        if (own := as_trained.cost_of_all(found, "CIFAR-10's CNN", 8.0)).n >= SEEDS:
            told.append(f"(Tested in full precision; LUQ-FP4 tested in its own arithmetic {difference(own)}.)")
    if more := _by_family(found, "full", "static"):
        told.append(f"At epsilon 1 quantization costs more than at epsilon 8 in {more}.")
    if harm := operand_tables.in_luq(SEEDS):
        told.append(f"In LUQ-FP4, the paper's format, {harm}.")
    if known := anchors(found):
        told.append(known)
    return " ".join(told)
