"""What a run did, for people: live lines, the schedule as a map, cost beside full precision, the privacy statement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Table, drawn, duration, joules, number, percent, seconds, speedup

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dpquant.rundir import EpochRecord, Run, RunFacts

_QUANTIZED, _FULL = "█", "·"
_SHADES = "·░▒▓█"
_BARS = "▁▂▃▄▅▆▇█"
_NAME_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in a few figures; times and energies are modelled, over all steps so far."""

    epochs_done: int
    finished: bool
    steps: int
    speedup: float | None
    """Full-precision time over this schedule's, analyses included, on the run's basis."""
    speedup_calibrated: float | None
    time_s: float
    baseline_time_s: float
    energy_joules: float | None
    baseline_energy_joules: float | None
    quantized_share: float
    """Mean share of the quantizable layers that were quantized."""
    test_accuracy: float | None
    """After the last epoch: the model that is kept."""
    test_loss: float | None
    epsilon: float
    epsilon_analysis: float
    """What the analyses would have spent alone."""
    nonfinite_examples: int
    wall_s: float
    """On the machine that trained, analyses not included."""
    analysis_wall_s: float
    analysis_share: float | None
    """Of the wall time of both together."""


def summarize(facts: RunFacts, records: Sequence[EpochRecord]) -> Summary:
    """The figures of a run from its records."""
    steps = sum(r.steps for r in records)
    baseline = sum(r.steps * r.baseline_step_s for r in records)
    time = sum(r.steps * r.baseline_step_s / r.speedup for r in records)
    calibrated = [(r.steps, r.speedup_calibrated) for r in records if r.speedup_calibrated is not None]
    inverse = sum(n / s for n, s in calibrated)
    wall, analysis_wall = sum(r.wall_s for r in records), sum(r.analysis_wall_s for r in records)
    last = records[-1] if records else None
    return Summary(
        epochs_done=len(records),
        finished=len(records) >= facts.epochs,
        steps=steps,
        speedup=baseline / time if time else None,
        speedup_calibrated=sum(n for n, _ in calibrated) / inverse if inverse else None,
        time_s=time,
        baseline_time_s=baseline,
        energy_joules=_total([(r.steps, r.energy_joules) for r in records]),
        baseline_energy_joules=_total([(r.steps, r.baseline_energy_joules) for r in records]),
        quantized_share=sum(len(r.quantized) for r in records) / max(1, len(records) * len(facts.layers)),
        test_accuracy=last.test_accuracy if last else None,
        test_loss=last.test_loss if last else None,
        epsilon=last.epsilon if last else 0.0,
        epsilon_analysis=last.epsilon_analysis if last else 0.0,
        nonfinite_examples=sum(r.nonfinite_examples for r in records),
        wall_s=wall,
        analysis_wall_s=analysis_wall,
        analysis_share=analysis_wall / (wall + analysis_wall) if wall else None,
    )


def _total(parts: Sequence[tuple[int, float | None]]) -> float | None:
    """Steps times energy, None where any energy is not known."""
    known = [steps * energy for steps, energy in parts if energy is not None]
    return sum(known) if len(known) == len(parts) else None


# --- while it runs


def opening(facts: RunFacts) -> list[str]:
    """The lines before the first epoch: what runs, on what figures, at what price."""
    goal = f"target {facts.target_speedup:g}x" if facts.target_speedup else ""
    goal = goal or (f"{percent(facts.fraction)} of the layers" if facts.fraction is not None else "no target")
    reach = f" of at most {facts.max_speedup:.2f}x" if facts.max_speedup and facts.target_speedup else ""
    lines = [
        f"{facts.name}: {facts.model} on {facts.dataset}, scheduler {facts.scheduler}, {facts.format} "
        f"on {facts.hardware} ({facts.basis} basis), {goal}{reach}",
        f"{facts.epochs} epochs, {facts.steps} steps, expected batch {facts.expected_batch_size}, "
        f"noise multiplier {facts.noise_multiplier:.4g}"
        + (f", {facts.analyses} private analyses" if facts.analyses else ""),
    ]
    return lines + [f"note: {note}" for note in facts.notes]


LIVE_HEADER = "  epoch  layers  speedup  energy    loss  accuracy  epsilon   time"


def live_line(record: EpochRecord, facts: RunFacts) -> str:
    """One epoch on one line of at most 80 characters, under `LIVE_HEADER`."""
    ratio = _ratio(record.energy_joules, record.baseline_energy_joules)
    energy = "-" if ratio is None else percent(ratio)
    loss = "-" if record.test_loss is None else f"{record.test_loss:.3f}"
    accuracy = "-" if record.test_accuracy is None else percent(record.test_accuracy)
    epoch, layers = f"{record.epoch}/{facts.epochs}", f"{len(record.quantized)}/{len(facts.layers)}"
    return (
        f"{epoch:>7}  {layers:>6}  {record.speedup:>6.2f}x  {energy:>6}  {loss:>6}  {accuracy:>8}  "
        f"{record.epsilon:>7.3f}  {duration(record.wall_s):>6}"
    )


def status(record: EpochRecord, facts: RunFacts) -> str:
    """What a progress bar says beside itself: epsilon spent and left, speedup against its target, examples a second."""
    text = f"epsilon {record.epsilon:.2f}"
    if facts.target_epsilon is not None:
        text += f", {max(0.0, facts.target_epsilon - record.epsilon):.2f} left"
    target = f" of {facts.target_speedup:g}x" if facts.target_speedup else ""
    rate = f", {record.examples / record.wall_s:.0f} examples/s" if record.wall_s > 0 and record.examples else ""
    return f"{text}; {record.speedup:.2f}x{target}{rate}"


# --- afterwards


def report(run: Run, width: int = 80) -> list[RenderableType]:
    """The full report of one run, to print one after the other."""
    facts, summary = run.facts, summarize(run.facts, run.records)
    parts: list[RenderableType] = [f"{facts.name}: {facts.model} on {facts.dataset} ({run.path})"]
    if not run.records:
        return [*parts, "No epoch is complete yet."]
    if not summary.finished:
        parts.append(f"Stopped or still running: {summary.epochs_done} of {facts.epochs} epochs are complete.")
    parts += ["", "Schedule: layers by epoch", *schedule_map(facts, run.records, width)]
    parts += ["", drawn(cost_table(facts, summary), width)]
    parts += [verdict(facts, summary), trust(facts, summary), wall_time(summary)]
    parts += ["", "Over the epochs", *curves(run.records, width)]
    parts += ["", "Privacy", privacy_statement(facts, summary)]
    if summary.nonfinite_examples:
        parts.append(f"{summary.nonfinite_examples} examples had a gradient that was not finite and contributed zero.")
    return parts


def schedule_map(facts: RunFacts, records: Sequence[EpochRecord], width: int = 80) -> list[str]:
    """A line per layer: which epochs it was quantized in, how often, and its last released sensitivity.

    With more epochs than columns several epochs share one, shaded by how many of them quantized the layer.
    """
    names = [_cut(name, _NAME_WIDTH) for name in facts.layers]
    label = max(map(len, names), default=0)
    released = next((r for r in reversed(records) if r.sensitivities), None)
    room = max(10, width - label - 2 - 7 - (14 if released else 0))
    groups = _groups(len(records), room)
    lines = []
    for name, shown in zip(facts.layers, names, strict=True):
        cells = ""
        for start, end in groups:
            share = sum(name in r.quantized for r in records[start:end]) / (end - start)
            cells += _SHADES[math.ceil(share * (len(_SHADES) - 1))] if end - start > 1 else _cell(share)
        often = sum(name in r.quantized for r in records) / len(records)
        line = f"{shown:<{label}}  {cells}  {100 * often:>4.0f}%"
        if released:
            known = released.sensitivity(name)
            line += f"  {math.nan if known is None else known:>11.3g}"
        lines.append(line)
    head = f"{'':<{label}}  {_axis(groups, records)}  often"
    key = f"{_QUANTIZED} quantized ({facts.format}), {_FULL} not"
    if groups and groups[0][1] - groups[0][0] > 1:
        key += f"; a column is {groups[0][1] - groups[0][0]} epochs"
    return [head + ("  sensitivity" if released else ""), *lines, key]


def _cell(share: float) -> str:
    return _QUANTIZED if share else _FULL


def _groups(count: int, room: int) -> list[tuple[int, int]]:
    """``count`` epochs in at most ``room`` columns of equal size (the last may be smaller)."""
    size = max(1, math.ceil(count / room))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _axis(groups: Sequence[tuple[int, int]], records: Sequence[EpochRecord]) -> str:
    """First and last epoch above the map's columns."""
    width = len(groups)
    first, last = str(records[0].epoch), str(records[-1].epoch)
    if width < len(first) + len(last) + 1:
        return f"{last:>{width}}"[:width]
    return first + " " * (width - len(first) - len(last)) + last


def cost_table(facts: RunFacts, summary: Summary) -> Table:
    """This run beside the same run in full precision: modelled time, energy, and accuracy."""
    rows = [
        _against("modelled time", summary.time_s, summary.baseline_time_s, seconds),
        _against("modelled energy", summary.energy_joules, summary.baseline_energy_joules, joules),
        {"what": "layers quantized", "run": percent(summary.quantized_share), "full": percent(0.0)},
        {
            "what": "test accuracy",
            "run": None if summary.test_accuracy is None else percent(summary.test_accuracy),
            "full": percent(summary.test_accuracy or 0) if facts.scheduler == "full" else None,
        },
    ]
    return Table(
        columns=[
            Column(key="what", title=f"{summary.steps} steps"),
            Column(key="run", title="this run", right=True),
            Column(key="full", title=f"full precision ({facts.baseline})", right=True),
            Column(key="ratio", title="saved", right=True),
        ],
        rows=rows,
    )


def _against(what: str, run: float | None, full: float | None, show: Callable[[float], str]) -> dict[str, Any]:
    if run is None or full is None:
        return {"what": what}
    return {"what": what, "run": show(run), "full": show(full), "ratio": percent(1 - run / full) if full else None}


def verdict(facts: RunFacts, summary: Summary) -> str:
    """One sentence: the speedup reached against the target."""
    if summary.speedup is None:
        return ""
    reached = f"Speedup {speedup(summary.speedup)} on {facts.hardware} ({facts.basis} basis)"
    if facts.target_speedup is None:
        return f"{reached}; no target was set."
    met = "the target of" if summary.speedup >= facts.target_speedup * (1 - 0.0005) else "below the target of"
    most = f", at most {speedup(facts.max_speedup)} is possible" if facts.max_speedup else ""
    return f"{reached}: {met} {speedup(facts.target_speedup)}{' is met' if met == 'the target of' else ''}{most}."


def trust(facts: RunFacts, summary: Summary) -> str:
    """One sentence: how far to trust the modelled figures."""
    if facts.basis != "peak":
        return "Modelled from measured kernels; the training itself was emulated, so no time above was measured."
    if summary.speedup_calibrated is None:
        return (
            f"Peak basis: published rates, which kernels do not reach; {facts.hardware} has no calibration to set "
            "beside it."
        )
    honest = speedup(summary.speedup_calibrated)
    meaning = "a slow-down: work this small does not pay" if summary.speedup_calibrated < 1 else "what to expect"
    text = "Peak basis: published rates, which kernels do not reach. "
    return text + f"Calibrated, the same schedule is {honest}, {meaning}."


def wall_time(summary: Summary) -> str:
    """One sentence: how long the emulation took on the machine that trained, and the analyses' share of it."""
    text = f"Emulated in {duration(summary.wall_s + summary.analysis_wall_s)}"
    if not summary.analysis_wall_s or summary.analysis_share is None:
        return text + "."
    return text + f", the sensitivity analyses {percent(summary.analysis_share)} of it."


def curves(records: Sequence[EpochRecord], width: int = 80) -> list[str]:
    """Epsilon, accuracy, loss and speedup over the epochs, each a line of bars between its least and most."""
    series: dict[str, list[float | None]] = {
        "epsilon": [float(r.epsilon) for r in records],
        "test accuracy": [r.test_accuracy for r in records],
        "test loss": [r.test_loss for r in records],
        "speedup": [float(r.speedup) for r in records],
    }
    lines = []
    for name, values in series.items():
        known = [v for v in values if v is not None and math.isfinite(v)]
        if known:
            lines.append(
                f"{name:<14}{number(values[0]) if values[0] is not None else '-':>8} "
                f"{bars(values, width - 34)} {number(known[-1]):<8}"
            )
    return lines


def bars(values: Sequence[float | None], room: int) -> str:
    """Values as bars of eight heights; several share a column (their mean) where there are more than ``room``."""
    columns = []
    for start, end in _groups(len(values), max(1, room)):
        known = [v for v in values[start:end] if v is not None and math.isfinite(v)]
        columns.append(sum(known) / len(known) if known else None)
    known = [c for c in columns if c is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if c is None else _BARS[round((c - low) * scale)] for c in columns)


def privacy_statement(facts: RunFacts, summary: Summary) -> str:
    """What is guaranteed, under which relation, sampling and accountant, and what the analyses took of it."""
    if facts.noise_multiplier == 0:
        return "No noise was added: this run is not differentially private (epsilon is infinite)."
    budget = f" of at most {facts.target_epsilon:g}" if facts.target_epsilon is not None else ""
    text = (
        f"(epsilon {summary.epsilon:.4g}{budget}, delta {facts.delta:g})-differentially private for neighbouring "
        f"data sets that differ by {_NEIGHBOURS.get(facts.neighbouring, facts.neighbouring)}: {summary.steps} steps "
        f"with {facts.sampling.capitalize()} sampling at rate {facts.sample_rate:.4g}, gradients clipped to "
        f"{facts.max_grad_norm:g}, noise multiplier {facts.noise_multiplier:.4g}; {facts.accountant.upper()} "
        "accountant."
    )
    if not facts.analyses:
        return text + " No sensitivity analyses."
    share = summary.epsilon_analysis / summary.epsilon if summary.epsilon else 0.0
    return text + (
        f" Included: the sensitivity analyses ({facts.analyses} planned, rate {facts.analysis_sample_rate:.4g}, noise "
        f"multiplier {facts.analysis_noise_multiplier:.4g}), which alone would spend {summary.epsilon_analysis:.4g} "
        f"({percent(share)} of the whole). Training loss and accuracy printed here are not covered."
    )


_NEIGHBOURS: Mapping[str, str] = {"add-or-remove-one": "adding or removing one example"}


# --- several runs


def comparison(runs: Sequence[Run]) -> Table:
    """Runs below one another, differences of accuracy against the first; the most accurate one is marked."""
    rows = []
    summaries = [summarize(run.facts, run.records) for run in runs]
    first = summaries[0].test_accuracy
    for run, summary in zip(runs, summaries, strict=True):
        accuracy = summary.test_accuracy
        rows.append(
            {
                "run": run.path.name,
                "scheduler": run.facts.scheduler,
                "format": run.facts.format,
                "hardware": run.facts.hardware,
                "quantized": summary.quantized_share,
                "speedup": summary.speedup,
                "energy": _ratio(summary.energy_joules, summary.baseline_energy_joules),
                "epsilon": summary.epsilon,
                "accuracy": accuracy,
                "difference": None if accuracy is None or first is None else accuracy - first,
            }
        )
    known = [(row["accuracy"], -index) for index, row in enumerate(rows) if row["accuracy"] is not None]
    columns = [
        Column(key="run", title="run", wrap=True),
        Column(key="scheduler", title="scheduler"),
        Column(key="format", title="format"),
        Column(key="quantized", title="layers", show=lambda v: f"{100 * v:.0f} %", right=True),
        Column(key="speedup", title="speedup", show=speedup, right=True),
        Column(key="energy", title="energy", show=lambda v: f"{100 * v:.0f} %", right=True),
        Column(key="epsilon", title="eps", show=lambda v: f"{v:.3g}", right=True),
        Column(key="accuracy", title="accuracy", show=percent, right=True),
        Column(key="difference", title="diff.", show=lambda v: f"{100 * v:+.1f}", right=True),
    ]
    return Table(columns=columns, rows=rows, best=-max(known)[1] if known else None)


def differing(runs: Sequence[Run]) -> Table:
    """The settings in which the runs' configurations differ: a line per key, a column per run."""
    flat = [_flattened(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "name"]
    rows = [{"key": key} | {str(i): one.get(key) for i, one in enumerate(flat)} for key in keys]
    columns = [Column(key=str(i), title=name, wrap=True) for i, name in enumerate(run_names(runs))]
    return Table(
        columns=[Column(key="key", title="setting", wrap=True), *columns],
        rows=[row for row in rows if len({repr(row[str(i)]) for i in range(len(runs))}) > 1],
    )


def _flattened(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = isinstance(value, Mapping) and value
        found |= _flattened(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return found


def run_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, told apart where two are equal."""
    names = [run.path.name for run in runs]
    return [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, start=1)]


def records_table(run: Run) -> Table:
    """A run's records as they are, an epoch a line: for CSV."""
    keys = [field.name for field in fields(run.records[0])] if run.records else ["epoch"]
    return Table(columns=[Column(key=key, title=key) for key in keys], rows=[vars(record) for record in run.records])


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def to_json(run: Run) -> dict[str, Any]:
    """A run as plain data: ``path, run_id, facts, versions, config, summary, records``."""
    return {
        "path": str(run.path),
        "run_id": run.run_id,
        "facts": vars(run.facts),
        "versions": run.versions,
        "config": run.config,
        "summary": vars(summarize(run.facts, run.records)),
        "records": [vars(record) for record in run.records],
    }


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]
