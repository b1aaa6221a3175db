"""Plots as SVG text: values with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dpquant.statistics import Sample

COLOURS = ("#57606a", "#b4450f", "#9a6700", "#0b5cad", "#1a7f37", "#8250df", "#cf222e", "#bf3989", "#1b7c83")
_SERIES = ("full", "static", "pls", "dpquant, released", "cooldown", "annealed", "delayed", "dpquant, probe", "greedy")
"""Each has its colour, the same in all plots."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 270, 246, 44, 42, 34
_GREY, _DARK, _LIGHT = "#57606a", "#1f2328", "#d8dee4"

Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Dots of several series over named places."""

    title: str
    places: Sequence[str]
    series: Mapping[str, Mapping[str, Sample]]
    """Series -> place -> value; a place may be missing."""


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Points on two axes: the second with its interval."""

    title: str
    points: Sequence[tuple[str, float, Sample]]
    """Series, place on the horizontal axis, value."""


def dots(panels: Sequence[Panel], unit: str, *, factor: float = 100.0) -> str:
    """Panels side by side on one scale.

    Args:
        panels: what is drawn.
        unit: of the vertical axis.
        factor: what values are multiplied by.
    """
    values = [end for panel in panels for line in panel.series.values() for s in line.values() for end in _ends(s)]
    low, high = _range([factor * value for value in values])
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = max(480, _LEFT + _WIDTH * len(panels))
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(width, _HEIGHT + 18 * math.ceil(len(names) / 3), unit) + _rules(low, high, y, width)
    for index, panel in enumerate(panels):
        left = _LEFT + index * _WIDTH
        parts.append(_text(left + _WIDTH / 2, 32, panel.title, "middle", weight=600))
        place_width = (_WIDTH - 16) / max(1, len(panel.places))
        for column, place in enumerate(panel.places):
            start = left + 8 + column * place_width
            parts.append(_text(start + place_width / 2, _HEIGHT - _BOTTOM + 16, place, "middle"))
            for number, name in enumerate(names):
                found = panel.series.get(name, {}).get(place)
                if found is not None and found.mean is not None:
                    x = start + place_width * (number + 1) / (len(names) + 1)
                    parts += _upright(x, found, factor, y, _colour(names, name))
    return _drawn(parts + _legend(names, _HEIGHT + 8, width))


def scatter(clouds: Sequence[Cloud], across: str, up: str, *, factor: float = 100.0, rule: float = 1.0) -> str:
    """Clouds of points side by side on one pair of axes, with a rule at 0 up and at ``rule`` across.

    Args:
        clouds: what is drawn.
        across: unit of the horizontal axis.
        up: unit of the vertical axis.
        factor: what values are multiplied by.
        rule: where the upright rule stands.
    """
    names = list(dict.fromkeys(name for cloud in clouds for name, _, _ in cloud.points))
    low, high = _range([0.0, *(factor * end for cloud in clouds for *_, value in cloud.points for end in _ends(value))])
    first, last = _range([rule, *(place for cloud in clouds for _, place, _ in cloud.points)])
    width = max(480, _LEFT + _WIDTH * len(clouds))
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(width, _HEIGHT + 8 + 18 * math.ceil(len(names) / 3), up) + _rules(low, high, y, width)
    for index, cloud in enumerate(clouds):
        left = _LEFT + index * _WIDTH
        x = _scale(first, last, left + 8, left + _WIDTH - 8)
        parts.append(_text(left + _WIDTH / 2, 32, cloud.title, "middle", weight=600))
        parts.append(_line(x(rule), x(rule), _TOP, _HEIGHT - _BOTTOM, _DARK, 0.7))
        parts += [_line(left, left, 22, _HEIGHT - _BOTTOM + 18, _GREY, 1)] * (index > 0)
        parts += [_text(x(tick), _HEIGHT - _BOTTOM + 14, f"{tick:g}", "middle") for tick in _ticks(first, last)]
        for name, place, value in cloud.points:
            parts += _upright(x(place), value, factor, y, _colour(names, name))
    parts.append(_text(width / 2, _HEIGHT - 3, across, "middle", colour=_GREY))
    return _drawn(parts + _legend(names, _HEIGHT + 16, width))


def forest(groups: Mapping[str, Mapping[str, Sample]], unit: str, *, factor: float = 100.0) -> str:
    """Differences with their 95 % intervals, a line each, under the name of their group; a rule at 0.

    Args:
        groups: group -> series -> difference with an interval.
        unit: of the horizontal axis.
        factor: what values are multiplied by.
    """
    names = list(dict.fromkeys(name for lines in groups.values() for name in lines))
    low, high = _range([0.0, *(factor * end for lines in groups.values() for s in lines.values() for end in _ends(s))])
    left, width, step, top = 130, 620, 15, 30
    height = top + sum(step * (len(lines) + 1) + 8 for lines in groups.values()) + 26
    x = _scale(low, high, left, width - 12)
    parts = _frame(width, height, unit)
    for tick in _ticks(low, high):
        parts.append(_line(x(tick), x(tick), top - 6, height - 20, _LIGHT if tick else _DARK, 0.7))
        parts.append(_text(x(tick), height - 6, f"{tick:g}", "middle"))
    y = top
    for title, lines in groups.items():
        parts.append(_text(4, y + 8, title, weight=600))
        y += step
        for name, value in lines.items():
            colour = _colour(names, name)
            parts.append(_text(left - 8, y + 8, name, "end", colour=colour))
            if value.low is not None and value.high is not None:
                parts.append(_line(x(factor * value.low), x(factor * value.high), y + 4, y + 4, colour, 1.4))
            parts.append(_dot(x(factor * (value.mean or 0.0)), y + 4, colour))
            y += step
        y += 8
    return _drawn(parts)


# --- what they are made of


def _frame(width: float, height: float, unit: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(4, 14, unit, colour=_GREY),
    ]


def _drawn(parts: Sequence[str]) -> str:
    return "\n".join([*parts, "</svg>\n"])


def _rules(low: float, high: float, y: Scale, width: float) -> list[str]:
    """Level lines with their numbers."""
    parts = []
    for tick in _ticks(low, high):
        parts.append(_line(_LEFT, width - 6, y(tick), y(tick), _LIGHT if tick else _DARK, 0.7))
        parts.append(_text(_LEFT - 5, y(tick) + 4, f"{tick:g}", "end"))
    return parts


def _legend(names: Sequence[str], top: float, width: float) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        x, y = _LEFT + (index % 3) * (width - _LEFT) / 3, top + 18 * (index // 3)
        parts += [_dot(x + 6, y - 4, _colour(names, name)), _text(x + 14, y, name)]
    return parts


def _upright(x: float, value: Sample, factor: float, y: Scale, colour: str) -> list[str]:
    """A value with its interval."""
    parts = []
    if value.low is not None and value.high is not None:
        parts.append(_line(x, x, y(factor * value.low), y(factor * value.high), colour, 1.4))
    return [*parts, _dot(x, y(factor * (value.mean or 0.0)), colour)]


def _line(x1: float, x2: float, y1: float, y2: float, colour: str, thick: float) -> str:
    place = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{thick:g}"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'


def _text(x: float, y: float, said: str, anchor: str = "start", *, weight: int = 400, colour: str = _DARK) -> str:
    style = "".join((
        f' text-anchor="{anchor}"' if anchor != "start" else "",
        f' font-weight="{weight}"' if weight != 400 else "",
        f' fill="{colour}"' if colour != _DARK else "",
    ))  # fmt: skip
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(said)}</text>'


def _colour(names: Sequence[str], name: str) -> str:
    known = _SERIES if name in _SERIES else names
    return COLOURS[known.index(name) % len(COLOURS)]


def _ends(found: Sample) -> list[float]:
    return [v for v in (found.mean, found.low, found.high) if v is not None]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' ends, and a margin."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]
