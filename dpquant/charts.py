"""What is plotted of runs, and the plots as SVG text, coloured by the page's own style, no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dpquant.render import number
from dpquant.report import run_names
from dpquant.rundir import EpochRecord, Run

_WIDTH, _HEIGHT = 440, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30

Series = Mapping[str, Sequence[float | None]]
"""Name -> a value per epoch, None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over epochs 1, 2, ..."""

    series: Series
    unit: str
    level: tuple[str, float] | None = None
    """A dashed line across and its name, such as a target."""

    @property
    def values(self) -> list[float]:
        """All finite values of all lines."""
        return [v for line in self.series.values() for v in line if v is not None and math.isfinite(v)]


@dataclass(frozen=True, kw_only=True)
class Shades:
    """Released sensitivities between the least (0) and the most (1) of a run."""

    low: float
    high: float
    shade: Callable[[str, int], float | None]
    """Of a layer in an epoch (from 0); None where nothing was released."""


def run_charts(run: Run) -> list[Chart]:
    """What one run's report plots over its epochs."""
    records, facts = run.records, run.facts
    speedups: dict[str, list[float | None]] = {f"{facts.basis} basis": [r.speedup for r in records]}
    if any(r.speedup_calibrated is not None for r in records):
        speedups["calibrated"] = [r.speedup_calibrated for r in records]
    target = None if facts.target_speedup is None else (f"target {facts.target_speedup:g}x", facts.target_speedup)
    budget = None if facts.target_epsilon is None else (f"budget {facts.target_epsilon:g}", facts.target_epsilon)
    spent = {"everything": [r.epsilon for r in records], "analyses alone": [r.epsilon_analysis for r in records]}
    charts = [
        Chart(series={"test accuracy": [r.test_accuracy for r in records]}, unit="test accuracy"),
        Chart(series={"test loss": [r.test_loss for r in records]}, unit="test loss"),
        Chart(series=spent, unit="epsilon spent", level=budget),
        Chart(series=speedups, unit="modelled speedup", level=target),
        Chart(series={"energy": [_energy_share(r) for r in records]}, unit="modelled energy over full precision"),
    ]
    return [chart for chart in charts if chart.values]


def compared_charts(runs: Sequence[Run]) -> list[Chart]:
    """What is plotted of several runs, a line for each."""
    names = run_names(runs)

    def chart(unit: str, value: Callable[[EpochRecord], float | None]) -> Chart:
        return Chart(series={n: [value(r) for r in run.records] for n, run in zip(names, runs, strict=True)}, unit=unit)

    charts = [
        chart("test accuracy", lambda r: r.test_accuracy),
        chart("epsilon spent", lambda r: r.epsilon),
        chart("modelled speedup", lambda r: r.speedup),
        chart("modelled energy over full precision", _energy_share),
    ]
    return [one for one in charts if one.values]


def sensitivity_shades(run: Run) -> Shades | None:
    """The released sensitivities of a run; None where none were."""
    released = [v for r in run.records if r.sensitivities for v in r.sensitivities.values() if math.isfinite(v)]
    if not released:
        return None
    low, high = min(released), max(released)

    def shade(layer: str, epoch: int) -> float | None:
        value = run.records[epoch].sensitivity(layer)
        if value is None or not math.isfinite(value):
            return None
        return (value - low) / (high - low) if high > low else 0.5

    return Shades(low=low, high=high, shade=shade)


def _energy_share(record: EpochRecord) -> float | None:
    if record.energy_joules is None or not record.baseline_energy_joules:
        return None
    return record.energy_joules / record.baseline_energy_joules


# --- as SVG


def line_chart(chart: Chart) -> str:
    """A chart as a figure with caption and legend; "" for nothing to draw."""
    if not chart.values:
        return ""
    series, level = chart.series, chart.level
    known = chart.values + ([level[1]] if level else [])
    low, high = min(known), max(known)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    epochs = max(len(line) for line in series.values())

    def x(epoch: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    parts = [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>' for t in ticks]
    parts += [_text(_LEFT - 6, y(t) + 4, number(t), "end") for t in ticks]
    parts += [_text(x(e), _HEIGHT - 10, str(e), "middle") for e in _epoch_ticks(epochs)]
    if level is not None:
        at = y(level[1])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for index, (name, line) in enumerate(series.items()):
        points = [(x(e), y(v)) for e, v in enumerate(line, start=1) if v is not None and math.isfinite(v)]
        where = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{index % 6}" points="{where}"><title>{escape(name)}</title></polyline>')
        parts += [f'<circle class="dot s{index % 6}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points]
    legend = "" if len(series) == 1 else _legend(series)
    caption = escape(f"{chart.unit} by epoch" + (f"; dashed: {level[0]}" if level else ""))
    drawing = _svg(_WIDTH, _HEIGHT, escape(f"{', '.join(series)}: {chart.unit} by epoch"), parts)
    return f"<figure>{drawing}<figcaption>{caption}</figcaption>{legend}</figure>"


def layer_map(
    layers: Sequence[str], epochs: int, shade: Callable[[str, int], float | None], title: str, caption: str
) -> str:
    """A cell per layer and epoch (from 0), filled by ``shade`` between 0 (empty) and 1 (full); None draws none."""
    left = 12 + 7.4 * min(28, max(map(len, layers), default=0))
    cell_h = 18 if len(layers) <= 40 else 10
    cell_w = max(2.0, min(26.0, (900 - left) / max(1, epochs)))
    width, height = round(left + cell_w * epochs + 12), round(cell_h * len(layers) + 30)
    parts = []
    for row, name in enumerate(layers):
        top = row * cell_h + 4
        parts.append(_text(left - 6, top + cell_h * 0.72, name if len(name) <= 28 else "…" + name[-27:], "end"))
        for epoch in range(epochs):
            share = shade(name, epoch)
            if share is not None:
                place = f'x="{left + epoch * cell_w:.1f}" y="{top}" width="{cell_w - 1:.1f}" height="{cell_h - 1}"'
                hint = f"<title>{escape(name)}, epoch {epoch + 1}</title>"
                parts.append(f'<rect class="cell" {place} fill-opacity="{0.06 + 0.94 * share:.3f}">{hint}</rect>')
    parts += [
        _text(left + (e - 0.5) * cell_w, cell_h * len(layers) + 20, str(e), "middle") for e in _epoch_ticks(epochs)
    ]
    drawing = _svg(width, height, escape(title), parts, least=min(width, 560))  # a phone scrolls instead of shrinking
    return f'<figure><div class="wide">{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _svg(width: int, height: int, label: str, parts: Sequence[str], least: int = 0) -> str:
    box = f'viewBox="0 0 {width} {height}" style="max-width:{width}px;min-width:{least}px"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(series: Series) -> str:
    entries = [f'<li><span class="key k{i % 6}"></span>{escape(name)}</li>' for i, name in enumerate(series)]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round values around a range."""
    span = (high - low) or max(abs(high), 1e-12)
    step = 10.0 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (0.2, 0.5, 1.0, 2.0) if span / (step * factor) <= 5.5)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [i * step for i in range(first, last + 1)]


def _epoch_ticks(epochs: int) -> list[int]:
    """At most about ten epochs to write under an axis, the first among them."""
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if epochs / s <= 10), 1000)
    return sorted({1, *range(step, epochs + 1, step)} - ({step} if step == 2 else set()))
