"""``dpquant report --png``: the plots of the report as one picture for a paper, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
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
    if kind not in KINDS:
        raise InputError(f"unknown kind of picture {kind!r}", hint=suggestion(kind, KINDS))
    runs = [run for run in runs if run.records]
    if not runs:
        raise InputError("no epoch is complete yet: there is nothing to draw")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a picture needs matplotlib", hint="pip install 'dpquant[plots]'") from error
    charts = compared_charts(runs) if len(runs) > 1 else run_charts(runs[0])
    maps = [one for run, name in zip(runs, run_names(runs), strict=True) for one in _maps(run, name, len(runs) > 1)]
    rows = math.ceil(len(charts) / 2)
    heights = [*(0.7 + _MAP_IN * len(run.facts.layers) for run, _, _ in maps), *[_CHART_IN] * rows]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for index, (run, title, shade) in enumerate(maps):
            _draw_map(figure.add_subplot(grid[index, :]), run, title, shade)
        for index, chart in enumerate(charts):
            _draw_chart(figure.add_subplot(grid[len(maps) + index // 2, index % 2]), chart)
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
