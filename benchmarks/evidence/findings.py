"""What was found, in sentences whose numbers and verdicts come from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dpquant.statistics import Sample, sample

from . import as_trained, endings, operand_tables, variance_tables
from .files import SEEDS, Evidence, Settings
from .glance import SUBJECTS
from .markdown import difference, interval, verdict
from .sweep_tables import NEGLIGIBLE, PUBLISHED, TITLES, probe_costs
from .told import DATA, Told, by, compared, firm, probed, shown, unprobed


def details(found: Mapping[str, Evidence]) -> list[tuple[str, list[str]]]:
    """What was found of schedules and of arithmetic, a list of sentences each."""
    return [("Schedules", _scheduling(found)), ("Arithmetic", _arithmetic(found))]


def _against(values: Told, other: str) -> str:
    """In how many comparisons something is better and worse than ``other``."""
    better, worse = shown(values, 1), shown(values, -1)
    text = f"better than {other} in {len(better)} of {len(values)} comparisons{by(better)} and worse in {len(worse)}"
    return f"{text}{by(worse)}, after Holm's correction in {len(firm(values, 1))} and {len(firm(values, -1))}"


def _open(values: Told) -> str:
    """What the comparisons that show nothing leave possible."""
    undecided = [value for _, value in shown(values, 0)]
    if not undecided:
        return ""
    low, high = min(v.low or 0.0 for v in undecided), max(v.high or 0.0 for v in undecided)
    text = f"; no difference is shown in {len(undecided)}, whose intervals lie between"
    return f"{text} {100 * low:+.2f} and {100 * high:+.2f}"


def _helps(values: Told) -> str:
    """In a word; of twenty comparisons one shows something by chance alone, and hence the correction."""
    better = len(firm(values, 1))
    if not better:
        return "is not shown to help"
    return "helps in some places" if 2 * better < len(values) else "helps"


def _scheduling(found: Mapping[str, Evidence]) -> list[str]:
    said = _which(found) + _when(found)
    if not said:
        return ["There are too few seeds yet to say anything."]
    return said + endings.sentences(found) + _price(found) + [part for part in [as_trained.sentence(found)] if part]


def _price(found: Mapping[str, Evidence]) -> list[str]:
    """What the private probe costs against the free estimate: where it takes of the budget, and where it does not."""
    known = [cost for cost in probe_costs(found) if cost.less_free.n >= SEEDS]
    said = [
        f"The private probe has a price where data are few: on {SUBJECTS[cost.name]} at epsilon {cost.epsilon:g} it "
        f"raises the noise multiplier from {cost.free:.2f} to {cost.paid:.2f}, and against the free estimate accuracy "
        f"changes by {difference(cost.less_free)} points."
        for cost in known
        if cost.rise >= NEGLIGIBLE and cost.less_free.sign
    ]
    if cheap := [(f"{SUBJECTS[c.name]} at epsilon {c.epsilon:g}", c.less_free) for c in known if c.rise < NEGLIGIBLE]:
        said.append(
            f"Where its probes raise the noise by less than {100 * NEGLIGIBLE:g} %, `dpquant` with it is "
            f"{_against(cheap, 'with the free estimate')}{_open(cheap)}."
        )
    return said


def _which(found: Mapping[str, Evidence]) -> list[str]:
    """Which layers: drawn anew against one fixed choice; by sensitivity against both."""
    drawn, preferred, over_static = (
        unprobed(found, *pair) for pair in (("pls", "static"), ("dpquant", "pls"), ("dpquant", "static"))
    )
    told = []
    if drawn:
        told.append(
            f"Changing *which* layers are quantized {_helps(drawn)} by itself: drawing them anew every epoch (`pls`) "
            f"is {_against(drawn, 'one fixed random choice (`static`)')}{_open(drawn)}."
        )
    if preferred and over_static:
        told.append(
            "Preferring layers that were found insensitive in gradients that are released anyway (`dpquant`) "
            f"{_helps(preferred)}: it is {_against(preferred, '`pls`')}, and {_against(over_static, '`static`')}."
        )
    if by_probe := probed(found, "pls"):
        told.append(
            f"By the private measurement of the paper that {_helps(by_probe)}: `dpquant` with it is "
            f"{_against(by_probe, '`pls`')}{_open(by_probe)}."
        )
    told += _preference(found) + _elsewhere(found) + _by_time(found)
    if (by_probe := probed(found, "static")) and any(value.sign for _, value in by_probe):
        told.append(f"With the private probe `dpquant` is {_against(by_probe, '`static`')}{_open(by_probe)}.")
    return told


def _preference(found: Mapping[str, Evidence]) -> list[str]:
    """How strongly it prefers, against not at all."""
    if "cifar10_beta" not in found:
        return []
    evidence = found["cifar10_beta"]
    values = [(p["schedule.beta"], v) for p, v in _changes(evidence)]
    if not values:
        return []
    better, worse = (sum(v.sign == sign for _, v in values) for sign in (1, -1))
    strengths = ", ".join(f"{difference(v)} points at {beta:g}" for beta, v in values)
    return [
        "On ResNet-18 at equal modelled time that preference is shown to be better than none (`beta` 0) at "
        f"{better} of {len(values)} strengths and worse at {worse}: {strengths}."
    ]


def _elsewhere(found: Mapping[str, Evidence]) -> list[str]:
    """Whether what the draw does hangs on the learning rate or the quantizer."""
    said = []
    for key, what in (("training.learning_rate", "learning rate"), ("format", "quantizer")):
        parts = []
        for name in ("fashion_rates", "cifar10_rates", "cifar10_quantizers"):
            evidence = found.get(name)
            values = {p.get(key): None for p in evidence.sweep.points.values()} if evidence is not None else {}
            for value in values if evidence is not None and len(values) > 1 else ():
                static, pls, dpquant = (
                    next(iter(evidence.points(scheduler=s, **{key.split(".")[-1]: value})), None)
                    for s in ("static", "pls", "dpquant")
                )
                if static is None or pls is None or dpquant is None:
                    continue
                drawn, preferred = evidence.compared(pls, static), evidence.compared(dpquant, pls)
                if min(drawn.n, preferred.n) >= SEEDS:
                    place = f"{DATA[name.split('_')[0]]}, {value}"
                    parts.append(f"{place}: {difference(drawn)}, {difference(preferred)}")
        if parts:
            said.append(
                f"Whether it depends on the {what}, `pls` less `static` and `dpquant` less `pls` in points: "
                f"{'; '.join(parts)}."
            )
    return said


def _by_time(found: Mapping[str, Evidence]) -> list[str]:
    """Draws until a speedup is reached against draws of a number of layers."""
    parts = [
        f"{difference(v)} points for `{point['schedule.scheduler']}` on {DATA[name.split('_')[0]]} ({verdict(v)})"
        for name in ("digits_draw", "cifar10_draw")
        if name in found
        for point, v in _changes(found[name])
    ]
    if not parts:
        return []
    return [
        "Drawing layers until the step is as fast as asked, less drawing three quarters of them, at the same speedup "
        f"on average: {', '.join(parts)}. By time, layers that save none are left alone."
    ]


def _when(found: Mapping[str, Evidence]) -> list[str]:
    """When: everything quantized at first and nothing at the end."""
    values = [(name, v) for name, _, v in compared(found, "annealed", "static", equal_time=False)]
    if not values:
        return []
    said = [
        f"Changing *when* {_helps(values)}: with as many layers times epochs, all of them quantized at first and none "
        f"at the end (`annealed`) is {_against(values, '`static`')}{_open(values)}."
    ]
    reverse = [v for _, _, v in compared(found, "annealed", "delayed")]
    if reverse:
        worse = sum(v.sign == 1 for v in reverse)
        said.append(f"The reverse order (`delayed`) is shown to be worse than it in {worse} of {len(reverse)}.")
    return said


def anchors(found: Mapping[str, Evidence]) -> str:
    """Full precision beside what was published; empty where it was not trained."""
    parts, near = [], []
    for name, published in PUBLISHED.items():
        if name not in found:
            continue
        first = next(iter(found[name].sweep.points.values()))
        own = sample(list(found[name].accuracies(first).values()))
        if own.mean is not None and own.low is not None:
            data = DATA[name.split("_")[0]]
            parts.append(f"{data} {100 * own.mean:.1f} % (95 % {interval(own)}), published {published:.1f} %")
            near.append(abs(100 * own.mean - published) <= 1)
    told = (
        "within a point of what was published" if all(near) else "not everywhere within a point of what was published"
    )
    return f"In full precision accuracy is {told}: {'; '.join(parts)}." if parts else ""


def _arithmetic(found: Mapping[str, Evidence]) -> list[str]:
    said = []
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        if kind != "formats":
            continue
        costs = []
        for settings in evidence.points(scheduler="static", fraction=1.0):
            lost = sample([*evidence.lost(settings).values()])
            if lost.n >= SEEDS and lost.mean is not None:
                costs.append((lost.mean, f"{settings['format']} {difference(lost)}"))
        if costs:
            said.append(
                f"On {DATA[key]} each format, all layers in it, less full precision: "
                f"{', '.join(text for _, text in sorted(costs))} points."
            )
        for settings in evidence.points(scheduler="annealed"):
            lost = sample([*evidence.lost(settings).values()])
            if settings["format"] == "nvfp4" and lost.n >= SEEDS:
                fraction = settings["schedule.fraction"]
                (fixed,) = evidence.points(scheduler="static", format="nvfp4", fraction=fraction)
                said.append(
                    f"Format and schedule together, nvfp4 and annealed: {difference(lost)} points; less a fixed choice "
                    f"of as many layers in nvfp4 {difference(evidence.compared(settings, fixed))}."
                )
    said += [*_accumulation(found), *variance_tables.sentences(), operand_tables.sentence(SEEDS), *_settings(found)]
    return [part for part in [*said, anchors(found)] if part]


def _accumulation(found: Mapping[str, Evidence]) -> list[str]:
    """What the chips' own accumulation changes beside float32's."""
    if "fashion_accumulate" not in found:
        return []
    parts = [
        f"{difference(v)} points in {p['format']} on {p['hardware.profile']} ({verdict(v)})"
        for p, v in _changes(found["fashion_accumulate"])
    ]
    text = "Accumulating as the chips do, bit for bit, less doing so in float32, on Fashion-MNIST:"
    return [f"{text} {', '.join(parts)}."] if parts else []


def _changes(evidence: Evidence) -> Iterator[tuple[Settings, Sample]]:
    """Every point that is another than the one it is compared with, and what it gains on that, of enough seeds."""
    for point in evidence.sweep.points.values():
        other = evidence.sweep.compared_with(point)
        if other is not None and other != point and (value := evidence.compared(point, other)).n >= SEEDS:
            yield point, value


def _settings(found: Mapping[str, Evidence]) -> list[str]:
    """What changing one setting of a scheduler at a time does."""
    said = []
    for name, evidence in found.items():
        key, _, kind = name.partition("_")
        values = [value for _, value in _changes(evidence)] if kind == "ablation" else []
        if values:
            clear = sum(bool(value.sign) for value in values)
            low, high = min(v.low or 0.0 for v in values), max(v.high or 0.0 for v in values)
            said.append(
                f"Of dpquant's settings, changed one at a time on {DATA[key]}, {clear} of {len(values)} changes make a "
                f"difference that is shown; the intervals lie between {100 * low:+.2f} and {100 * high:+.2f} points."
            )
    return said


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
            left = f"{planned - done} of {planned} planned runs have no result yet"
            said.append(f"{title}: {left}, and so nothing but its own table has it.")
        if evidence.stale:
            said.append(f"{title}: {len(evidence.stale)} results of an earlier configuration are not used.")
    return said + _repeats(found)


def _repeats(found: Mapping[str, Evidence]) -> list[str]:
    """Runs that sweeps share, and each trained."""
    known: dict[str, list[float]] = {}
    for evidence in found.values():
        for result in evidence.results.values():
            if result.accuracy is not None:
                known.setdefault(result.digest, []).append(result.accuracy)
    spans = [max(values) - min(values) for values in known.values() if len(values) > 1]
    if not spans:
        return []
    differ = sum(map(bool, spans))
    same = len(spans) - differ
    said = f"{len(spans)} runs are of several sweeps, and each trained them: {same} are equal to every digit"
    if differ:
        said += (
            f", {differ} differ, by up to {100 * max(spans):.2f} points, one being of an early state of the "
            "code, which added in another order or drew other initial weights"
        )
    return [f"{said}."]
