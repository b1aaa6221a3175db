"""Plots as SVG text: dots with their 95 % intervals, one panel beside the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dpquant.statistics import Sample

COLOURS = ("#57606a", "#b4450f", "#9a6700", "#0b5cad", "#1a7f37", "#8250df", "#cf222e", "#bf3989", "#1b7c83")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 270, 246, 44, 42, 34


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Dots of several series over named places."""

    title: str
    places: Sequence[str]
    series: Mapping[str, Mapping[str, Sample]]
    """Series -> place -> value; a place may be missing."""


def dots(panels: Sequence[Panel], unit: str, *, factor: float = 100.0) -> str:
    """Panels side by side on one scale.

    Args:
        panels: what is drawn.
        unit: of the vertical axis.
        factor: what values are multiplied by.
    """
    values = [
        factor * end for panel in panels for line in panel.series.values() for s in line.values() for end in _ends(s)
    ]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = max(480, _LEFT + _WIDTH * len(panels))
    height = _HEIGHT + 18 * math.ceil(len(names) / 3)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="14" fill="#57606a">{escape(unit)}</text>',
    ]
    for tick in _ticks(low, high):
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - 6}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="#d8dee4" stroke-width="0.7"/>'
            f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for index, panel in enumerate(panels):
        parts += _panel(panel, names, _LEFT + index * _WIDTH, y, factor)
    for index, name in enumerate(names):
        x, row = _LEFT + (index % 3) * (width - _LEFT) / 3, _HEIGHT + 8 + 18 * (index // 3)
        parts.append(
            f'<circle cx="{x + 6:.1f}" cy="{row - 4}" r="3.5" fill="{COLOURS[index % len(COLOURS)]}"/>'
            f'<text x="{x + 14:.1f}" y="{row}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def forest(groups: Mapping[str, Mapping[str, Sample]], unit: str, *, factor: float = 100.0) -> str:
    """Differences with their 95 % intervals, a line each, under the name of their group; a rule at 0.

    Args:
        groups: group -> series -> difference with an interval.
        unit: of the horizontal axis.
        factor: what values are multiplied by.
    """
    names = list(dict.fromkeys(name for lines in groups.values() for name in lines))
    ends = [factor * end for lines in groups.values() for value in lines.values() for end in _ends(value)]
    low, high = min(ends, default=-1.0), max(ends, default=1.0)
    low, high = min(low, 0.0) - 0.04 * (high - low), max(high, 0.0) + 0.04 * (high - low)
    left, width, step, top = 330, 780, 15, 30
    height = top + sum(step * len(lines) + 10 for lines in groups.values()) + 26

    def x(value: float) -> float:
        return left + (width - left - 12) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="14" fill="#57606a">{escape(unit)}</text>',
    ]
    for tick in _ticks(low, high):
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 6}" y2="{height - 20}" '
            f'stroke="{"#1f2328" if tick == 0 else "#d8dee4"}" stroke-width="0.7"/>'
            f'<text x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        )
    y = top
    for title, lines in groups.items():
        parts.append(f'<text x="4" y="{y + 8}" font-weight="600">{escape(title)}</text>')
        for name, value in lines.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(f'<text x="{left - 8}" y="{y + 8}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
            start, middle, end = (x(factor * (v or 0.0)) for v in (value.low, value.mean, value.high))
            place = f'x1="{start:.1f}" x2="{end:.1f}" y1="{y + 4}" y2="{y + 4}"'
            parts.append(f'<line {place} stroke="{colour}" stroke-width="1.4"/>')
            parts.append(f'<circle cx="{middle:.1f}" cy="{y + 4}" r="3.2" fill="{colour}"/>')
            y += step
        y += 10
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, names: Sequence[str], left: float, y: Callable[[float], float], factor: float) -> list[str]:
    place_width = (_WIDTH - 16) / max(1, len(panel.places))
    parts = [
        f'<text x="{left + _WIDTH / 2:.1f}" y="32" text-anchor="middle" font-weight="600">{escape(panel.title)}</text>'
    ]
    for column, place in enumerate(panel.places):
        start = left + 8 + column * place_width
        middle, below = start + place_width / 2, _HEIGHT - _BOTTOM + 16
        parts.append(f'<text x="{middle:.1f}" y="{below}" text-anchor="middle">{escape(place)}</text>')
        for index, name in enumerate(names):
            found = panel.series.get(name, {}).get(place)
            if found is None or found.mean is None:
                continue
            x = start + place_width * (index + 1) / (len(names) + 1)
            colour = COLOURS[index % len(COLOURS)]
            if found.low is not None and found.high is not None:
                low, high = y(factor * found.low), y(factor * found.high)
                place_of = f'x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
                parts.append(f'<line {place_of} stroke="{colour}" stroke-width="1.4"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y(factor * found.mean):.1f}" r="3.2" fill="{colour}"/>')
    return parts


def _ends(found: Sample) -> list[float]:
    return [v for v in (found.mean, found.low, found.high) if v is not None]


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]
