"""``dpquant report --html``: one self-contained page, no network, no scripts; light and dark, phone and print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dpquant import __version__, report
from dpquant.charts import compared_charts, layer_map, line_chart, run_charts, sensitivity_shades
from dpquant.render import Table, shown
from dpquant.rundir import Run

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --rule: #d5dbe1; --cell: #0b5cad;
  --c0: #0b5cad; --c1: #b4450f; --c2: #1a7f37; --c3: #8250df; --c4: #9a6700; --c5: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --paper: #0d1117; --rule: #30363d;
  --cell: #58a6ff; --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #d29922; --c5: #ff7b72; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 960px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; border-bottom: 1px solid var(--rule); margin-top: 2rem; }
p, figcaption { max-width: 70ch; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th.right, td.right { text-align: right; } tr.best td { font-weight: 600; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 1.5rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); } .level { stroke: var(--ink); stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 2; } .cell { fill: var(--cell); }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .dot { stroke-width: 2; fill: var(--paper); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; font-size: .9rem; }
.key { display: inline-block; width: 1.2em; height: .25em; margin-right: .4em; vertical-align: middle; }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); } .k4 { background: var(--c4); } .k5 { background: var(--c5); }
@media print { body { max-width: none; padding: 0; } figure, table { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; } .charts { grid-template-columns: 1fr 1fr; } }
"""


def page(runs: Sequence[Run]) -> str:
    """The page of one run in full, or of several: compared first, then each in full."""
    several = len(runs) > 1
    title = "dpquant: " + (f"{len(runs)} runs compared" if several else runs[0].facts.name)
    body = [f"<h1>{escape(title)}</h1>"]
    if several:
        body += _compared(runs)
    for run in runs:
        body += _one(run, 2 if several else 1)
    body.append(f'<p class="soft">Made by dpquant {escape(__version__)}.</p>')
    head = (
        '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<link rel="icon" href="data:,"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{content}\n</body></html>\n'


def _compared(runs: Sequence[Run]) -> list[str]:
    return [
        "<h2>Side by side</h2>",
        _table(report.comparison(runs)),
        '<p class="soft">Energy is modelled, in percent of full precision; diff. is accuracy against the first run, in '
        "points. One run per setting says little: differences within about a point are usually the seed's.</p>",
        _table(report.differing(runs)),
        _charts([line_chart(chart) for chart in compared_charts(runs)]),
    ]


def _one(run: Run, level: int) -> list[str]:
    facts, records = run.facts, run.records
    summary = report.summarize(facts, records)
    heading = f"h{level + 1}"
    body = [f"<h2>{escape(str(run.path))}</h2>"] if level > 1 else []
    body += [f'<p class="soft">{escape(line)}</p>' for line in report.opening(facts)]
    if not records:
        return [*body, "<p>No epoch is complete yet.</p>"]
    if not summary.finished:
        body.append(f"<p>{summary.epochs_done} of {facts.epochs} epochs are complete.</p>")
    body += [
        _table(report.cost_table(facts, summary)),
        f"<p>{escape(report.verdict(facts, summary))} {escape(report.trust(facts, summary))}</p>",
        f"<{heading}>Schedule</{heading}>",
        _schedule(run),
        _sensitivities(run),
        f"<{heading}>Over the epochs</{heading}>",
        _charts([line_chart(chart) for chart in run_charts(run)]),
        f"<{heading}>Privacy</{heading}>",
        f"<p>{escape(report.privacy_statement(facts, summary))}</p>",
        f"<{heading}>Versions</{heading}>",
        f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in run.versions.items()))}</p>',
    ]
    return body


def _schedule(run: Run) -> str:
    records, layers = run.records, run.facts.layers
    return layer_map(
        layers,
        len(records),
        lambda layer, epoch: float(layer in records[epoch].quantized),
        "Schedule: which layers were quantized in which epoch",
        f"Filled: quantized to {run.facts.format} in that epoch (across), layer by layer (down).",
    )


def _sensitivities(run: Run) -> str:
    found = sensitivity_shades(run)
    if found is None:
        return ""
    unit = "" if run.facts.analyses else ", relative to the largest"  # without analyses, from released gradients
    caption = (
        f"Released sensitivity, light {found.low:.3g} to full {found.high:.3g}: the loss that quantizing the layer "
        f"alone adds{unit}."
    )
    title = "Released sensitivities by layer and epoch"
    return layer_map(run.facts.layers, len(run.records), found.shade, title, caption)


def _charts(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th class="{"right" if c.right else "left"}">{escape(c.title)}</th>' for c in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(
            f'<td class="{"right" if c.right else "left"}">{escape(shown(c, row))}</td>' for c in table.columns
        )
        rows.append(f'<tr class="{"best" if index == table.best else "other"}">{cells}</tr>')
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{body}</div>'
