"""Charts as SVG text: lines over epochs and layer-by-epoch maps, coloured by the page's own style, no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from dpquant.render import number

_WIDTH, _HEIGHT = 440, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30

Series = Mapping[str, Sequence[float | None]]
"""Name -> a value per epoch, None where there is none."""


def line_chart(series: Series, unit: str, level: tuple[str, float] | None = None) -> str:
    """Lines over epochs 1, 2, ..., with a dashed level, such as a target, if given; "" for nothing to draw."""
    values = [v for line in series.values() for v in line if _known(v)] + ([level[1]] if level else [])
    known = [v for v in values if v is not None]
    if not any(_known(v) for line in series.values() for v in line):
        return ""
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
    caption = escape(f"{unit} by epoch" + (f"; dashed: {level[0]}" if level else ""))
    drawing = _svg(_WIDTH, _HEIGHT, escape(f"{', '.join(series)}: {unit} by epoch"), parts)
    return f"<figure>{drawing}<figcaption>{caption}</figcaption>{legend}</figure>"


def layer_map(
    layers: Sequence[str], epochs: int, shade: Callable[[str, int], float | None], title: str, caption: str
) -> str:
    """A cell per layer and epoch (from 0), filled by ``shade`` between 0 (empty) and 1 (full); None draws none."""
    left = 12 + 6.6 * min(28, max(map(len, layers), default=0))
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


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
