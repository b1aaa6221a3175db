"""``--png`` of ``dpquant report`` and ``estimate --pareto``: plots as one picture for a paper, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpquant.charts import Chart, compared_charts, run_charts, sensitivity_shades
from dpquant.report import run_names
from emulation.errors import InputError, suggestion

if TYPE_CHECKING:
    from dpquant.rundir import Run

KINDS = (".png", ".pdf", ".svg")
_COLOURS = ("#0b5cad", "#b4450f", "#1a7f37", "#8250df", "#9a6700", "#cf222e")
_WIDTH_IN, _MAP_IN, _CHART_IN = 7.0, 0.14, 1.9
_STYLE: Any = {  # matplotlib's stubs name every key
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def picture(runs: Sequence[Run], kind: str = ".png") -> bytes:
    """The schedules, released sensitivities and curves of one run, or of several compared, 7 inches wide.

    Args:
        runs: at least one with an epoch.
        kind: ``.png`` (300 dpi), ``.pdf`` or ``.svg``.

    Raises:
        InputError: matplotlib is not installed, the kind is another, or there is nothing to draw.
    """
    runs = [run for run in runs if run.records]
    if not runs:
        raise InputError("no epoch is complete yet: there is nothing to draw")
    charts = compared_charts(runs) if len(runs) > 1 else run_charts(runs[0])
    maps = [one for run, name in zip(runs, run_names(runs), strict=True) for one in _maps(run, name, len(runs) > 1)]
    rows = math.ceil(len(charts) / 2)
    heights = [*(0.7 + _MAP_IN * len(run.facts.layers) for run, _, _ in maps), *[_CHART_IN] * rows]

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for index, (run, title, shade) in enumerate(maps):
            _draw_map(figure.add_subplot(grid[index, :]), run, title, shade)
        for index, chart in enumerate(charts):
            _draw_chart(figure.add_subplot(grid[len(maps) + index // 2, index % 2]), chart)

    return _drawn(draw, sum(heights), kind)


def pareto_picture(rows: Sequence[Mapping[str, Any]], kind: str = ".png") -> bytes:
    """Speedup against the share of the layers quantized, a plot per chip and format: best, drawn and static plans.

    Args:
        rows: of ``dpquant estimate --pareto --json``.
        kind: ``.png`` (300 dpi), ``.pdf`` or ``.svg``.

    Raises:
        InputError: matplotlib is not installed, or the kind is another.
    """
    plots: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        plots.setdefault(f"{row['hardware']}, {row['format']} ({row['basis']})", []).append(row)
    lines = math.ceil(len(plots) / 2)

    def draw(figure: Any) -> None:
        for index, (title, points) in enumerate(plots.items()):
            axes = figure.add_subplot(lines, min(len(plots), 2), index + 1)
            shares = [100 * point["fraction"] for point in points]
            low, high = ([point[f"static_{end}"] for point in points] for end in ("low", "high"))
            axes.fill_between(
                shares, low, high, color=_COLOURS[4], alpha=0.25, linewidth=0, label="static, 90 % of draws"
            )
            for key, colour in (("best", _COLOURS[0]), ("drawn", _COLOURS[1])):
                axes.plot(shares, [point[key] for point in points], color=colour, label=key)
            axes.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
            axes.set_xlabel("% of the layers quantized")
            axes.set_title(f"{title}: modelled speedup", fontsize=8, loc="left")
            axes.grid(axis="y", linewidth=0.3)
            axes.legend(fontsize=6)

    return _drawn(draw, 1.3 * _CHART_IN * lines, kind)


def _drawn(draw: Callable[[Any], None], height_in: float, kind: str) -> bytes:
    if kind not in KINDS:
        raise InputError(f"unknown kind of picture {kind!r}", hint=suggestion(kind, KINDS))
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a picture needs matplotlib", hint="pip install 'dpquant[plots]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind[1:], dpi=300)
    return stream.getvalue()


_Map = tuple["Run", str, Callable[[str, int], float | None]]


def _maps(run: Run, name: str, several: bool) -> list[_Map]:
    """The run's layer-by-epoch maps: title and shade of each."""
    of = f"{name}: " if several else ""
    found: list[_Map] = [
        (run, f"{of}layers in {run.facts.format}", lambda layer, epoch: float(layer in run.records[epoch].quantized))
    ]
    if not several and (shades := sensitivity_shades(run)) is not None:
        found.append((run, f"released sensitivity, {shades.low:.3g} (light) to {shades.high:.3g}", shades.shade))
    return found


def _draw_map(axes: Any, run: Run, title: str, shade: Callable[[str, int], float | None]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    layers, epochs = run.facts.layers, len(run.records)
    values = [[math.nan if (v := shade(n, e)) is None else v for e in range(epochs)] for n in layers]
    colours = LinearSegmentedColormap.from_list("page", ["#eef3f8", _COLOURS[0]])
    edges = [e + 0.5 for e in range(epochs + 1)], [i - 0.5 for i in range(len(layers) + 1)]
    axes.pcolormesh(*edges, values, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_title(title, fontsize=8, loc="left")


def _draw_chart(axes: Any, chart: Chart) -> None:
    for (name, line), colour in zip(chart.series.items(), _COLOURS * len(chart.series), strict=False):
        drawn = [math.nan if v is None or not math.isfinite(v) else v for v in line]
        axes.plot(range(1, len(drawn) + 1), drawn, color=colour, label=name, marker=".", markersize=3)
    if chart.level is not None:
        axes.axhline(chart.level[1], color="black", linestyle="--", linewidth=0.8, label=chart.level[0])
    if len(chart.series) > 1 or chart.level is not None:
        axes.legend(fontsize=6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_title(chart.unit, fontsize=8, loc="left")
    axes.grid(axis="y", linewidth=0.3)
