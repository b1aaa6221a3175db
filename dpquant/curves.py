"""``dpquant estimate``'s curves: speedup by share quantized, break-even batch sizes, sweeps, the published formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpquant.estimate_tables import show_fallbacks
from dpquant.estimates import fitting_model
from dpquant.render import Column, Output, Table, joules, number, percent, seconds, speedup
from hwmodels import explore
from hwmodels.cost import checked_basis
from hwmodels.paper import PUBLISHED, PUBLISHED_FRACTION, implied_overhead, paper_step
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload

Pairs = Sequence[tuple[HardwareProfile, str]]

_CHIP = (Column(key="hardware", title="hardware"), Column(key="format", title="format"))


def _of(profile: HardwareProfile, name: str) -> dict[str, Any]:
    return {"hardware": profile.name, "format": name, "falls_back_to": profile.rate(name).falls_back_to}


def _answer(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], out: Output, best: int | None = None) -> bool:
    """Print rows as JSON, CSV or a table; whether sentences are to follow."""
    if out.form == "json":
        out.json({"rows": rows})
        return False
    if out.form == "csv":
        columns = [Column(key=key, title=key) for key in rows[0]]
    out.table(Table(columns=columns, rows=rows, best=best))
    show_fallbacks(rows, out)
    return True


def pareto(workload: Workload, pairs: Pairs, options: Mapping[str, Any], out: Output, png: str | None = None) -> int:
    """Speedup against the number of layers quantized: the best, drawn anew each epoch, drawn once; a picture too."""
    rows = [
        _of(profile, name) | {"basis": checked_basis(profile, options["basis"])} | vars(point)
        for profile, name in pairs
        for point in explore.pareto(workload, profile, name, **options)
    ]
    if png is not None:
        from dpquant.figures import pareto_picture
        from dpquant.rundir import write_atomic

        write_atomic(Path(png), pareto_picture(rows, Path(png).suffix))
        out.say(f"wrote {png}")
    columns = [
        *(_CHIP if len(pairs) > 1 else ()),
        Column(key="quantized", title="layers", right=True),
        Column(key="fraction", title="share", show=percent, right=True),
        Column(key="best", title="best", show=speedup, right=True),
        Column(key="drawn", title="drawn", show=speedup, right=True),
        Column(key="static_low", title="static 5 %", show=speedup, right=True),
        Column(key="static_high", title="95 %", show=speedup, right=True),
        Column(key="best_joules", title="energy", show=joules, right=True, spare=True),
    ]
    most = max(range(len(rows)), key=lambda i: rows[i]["best"])
    if _answer(rows, columns, out, most):
        row = rows[most]
        out.note(
            f"Most: {speedup(row['best'])} with the {row['quantized']} layers that gain most, {row['hardware']}, "
            f"{row['format']}; drawn: a new uniform draw every epoch; static: one draw kept, 5 % and 95 % of draws."
        )
        out.note(_basis(rows))
    return 0


def break_even(workload: Workload, pairs: Pairs, options: Mapping[str, Any], out: Output) -> int:
    """From which batch size on a format pays on each chip."""
    rows = [
        _of(profile, name)
        | {"basis": checked_basis(profile, options["basis"])}
        | vars(explore.break_even(workload, profile, name, **options))
        for profile, name in pairs
    ]
    columns = [
        *_CHIP,
        Column(key="batch_size", title="pays from batch", show=lambda v: f"{v:,}", right=True),
        Column(key="first_layer_batch_size", title="first layer", show=lambda v: f"{v:,}", right=True),
        Column(key="speedup_at_largest", title="at 2^20", show=speedup, right=True),
        Column(key="basis", title="basis", spare=True),
    ]
    known = [(row["batch_size"], index) for index, row in enumerate(rows) if row["batch_size"] is not None]
    if _answer(rows, columns, out, min(known)[1] if known else None):
        never = [f"{row['format']} on {row['hardware']}" for row in rows if row["batch_size"] is None]
        out.note(
            f"Never, for all layers at once: {', '.join(never)}." if never else "Every row pays at some batch size."
        )
        out.note(f"A dash is never up to {rows[0]['largest_tried']:,}; memory is left aside. {_basis(rows)}")
    return 0


def sweep(workload: Workload, pairs: Pairs, options: Mapping[str, Any], batch_sizes: Sequence[int], out: Output) -> int:
    """One line per chip, format and batch size, all layers quantized."""
    rows: list[dict[str, Any]] = []
    for profile, name in pairs:
        for size in batch_sizes:
            model = fitting_model(workload.at(size), profile, options, [name])
            estimate = model.estimate(dict.fromkeys(workload.quantizable, name))
            rows.append(
                _of(profile, name)
                | {
                    "basis": estimate.basis,
                    "batch_size": size,
                    "step_s": estimate.step_s,
                    "speedup": estimate.speedup,
                    "examples_per_s": size / estimate.step_s,
                    "energy_joules": estimate.energy_joules,
                    "peak_memory_bytes": estimate.peak_memory_bytes,
                    "bound": estimate.bound,
                }
            )
    columns = [
        *_CHIP,
        Column(key="batch_size", title="batch", show=lambda v: f"{v:,}", right=True),
        Column(key="step_s", title="step", show=seconds, right=True),
        Column(key="speedup", title="speedup", show=speedup, right=True),
        Column(key="examples_per_s", title="examples/s", show=lambda v: f"{v:,.0f}", right=True),
        Column(key="energy_joules", title="energy", show=joules, right=True),
        Column(key="bound", title="bound", spare=True),
    ]
    best = max(range(len(rows)), key=lambda i: rows[i]["examples_per_s"])
    if _answer(rows, columns, out, best):
        row = rows[best]
        out.note(
            f"Most examples per second: {row['examples_per_s']:,.0f} on {row['hardware']} with {row['format']} at "
            f"batch {row['batch_size']:,}."
        )
        out.note(_basis(rows))
    return 0


def paper(workload: Workload, pairs: Pairs, options: Mapping[str, Any], share: float, out: Output) -> int:
    """DPQuant's published formula on this workload, term by term, beside this project's own figure."""
    rows = []
    for profile, name in pairs:
        model = fitting_model(workload, profile, options, [name])
        formula = paper_step(model, share)
        count = round(share * len(workload.quantizable))
        own = model.estimate(dict.fromkeys(workload.quantizable[:count], name))
        shared = _of(profile, name)
        rows += [shared | {"term": term, "value": value} for term, value in formula.lines()]
        rows.append(shared | {"term": f"this project's own figure ({own.basis} basis)", "value": own.speedup})
    columns = [
        *(_CHIP if len(pairs) > 1 else ()),
        Column(key="term", title="term", wrap=True),
        Column(key="value", title="value", show=number, right=True),
    ]
    if _answer(rows, columns, out):
        out.note(
            "The formula takes a share of the layers for that share of the time, all products as bound by compute."
        )
        out.note(
            "Quantization is free in it, and FP4 four times as fast: an upper bound, not a forecast. Times in seconds."
        )
        shares = " and ".join(f"{implied_overhead(x, PUBLISHED_FRACTION):.1%} (for {x}x)" for x in PUBLISHED)
        out.note(
            f"The published figures follow from p = {PUBLISHED_FRACTION} where overhead and analyses take {shares} of "
            "T_train."
        )
    return 0


def _basis(rows: Sequence[Mapping[str, Any]]) -> str:
    found = {row["basis"] for row in rows}
    if found == {"calibrated"}:
        return "Calibrated basis: fitted to measured kernels."
    if found == {"peak"}:
        return "Peak basis: a roofline on published rates, an upper bound."
    return "Rows on the peak basis are upper bounds; do not rank them against calibrated ones."
