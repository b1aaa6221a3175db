"""What ``dpquant estimate`` shows of its rows: the table, where time and memory go, and what the figures mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpquant.estimates import Row, fastest
from dpquant.render import Column, Output, Table, gibibytes, joules, number, percent, seconds, speedup
from hwmodels.workload import Workload


def show_rows(found: Sequence[Row], workload: Workload, out: Output) -> None:
    """A line per chip and format, the fastest marked; what it means, and how far to trust it."""
    best = fastest(found)
    rows = [row.to_json() for row in found]
    columns = [
        Column(key="hardware", title="hardware"),
        Column(key="format", title="format", wrap=True),
        Column(key="step_s", title="step", show=seconds, right=True),
        Column(key="speedup", title="speedup", show=speedup, right=True),
        Column(key="energy_joules", title="energy", show=joules, right=True),
        Column(key="peak_memory_bytes", title="memory", show=gibibytes, right=True),
        Column(key="bound", title="bound", spare=True),
        Column(key="native", title="native", show=lambda v: "yes" if v else "no", spare=True),
        Column(key="basis", title="basis", spare=True),
        Column(key="step_low_s", title="from", show=seconds, right=True, spare=True),
        Column(key="step_high_s", title="to", show=seconds, right=True, spare=True),
        Column(key="max_speedup", title="at most", show=speedup, right=True, spare=True),
        Column(key="largest_batch", title="max batch", show=number, right=True, spare=True),
        Column(key="quantized", title="layers", right=True, spare=True),
    ]
    if any(row.usd_per_hour is not None for row in found):
        price = Column(key="usd_per_million_examples", title="$/1M", show=lambda v: f"{v:.3g}", right=True)
        columns.insert(5, price)
    if out.form == "csv":
        nested = ("phases", "layers", "memory_parts", "notes")
        columns = [Column(key=key, title=key) for key in rows[0] if key not in nested]
    elif out.form == "text":  # the column `native` goes where there is little room
        for row in rows:
            row["format"] += f", falls back to {row['falls_back_to']}" if row["falls_back_to"] else ""
    out.table(Table(columns=columns, rows=rows, best=best))
    out.note(_interpretation(found, best, workload))
    out.note(_trust(found, None if best is None else found[best]))
    for note in dict.fromkeys(note for row in found for note in row.estimate.notes):
        out.say(f"note: {note}")


def _interpretation(found: Sequence[Row], best: int | None, workload: Workload) -> str:
    if best is None:
        return f"In passes of {found[0].physical_batch_size} examples this fits into the memory of none of these chips."
    row = found[best]
    first = "Fastest" if len({r.estimate.basis for r in found}) == 1 else "Fastest of the calibrated ones"
    slower = sum(r.estimate.speedup < 1 for r in found)
    text = (
        f"{first}: {row.hardware} with {row.format}, {seconds(row.estimate.step_s)} a step, "
        f"{row.estimate.speedup:.2f}x over {seconds(row.estimate.baseline_s)} in full precision there"
    )
    if row.estimate.speedup < 1:
        text += ", which is faster"
    text += f"; {_most(row)} examples fit into its {gibibytes(row.memory_bytes)} at once"
    if slower:
        text += f"; {slower} of {len(found)} rows are slower than full precision (--explain says why)"
    if unmet := sum(r.reached is False for r in found):
        text += f"; {unmet} of {len(found)} miss the target speedup"
    priced = [(usd, r) for r in found if r.fits and (usd := r.usd_per_million_examples) is not None]
    if priced:
        usd, cheapest = min(priced, key=lambda pair: pair[0])
        text += f"; cheapest: {cheapest.hardware} with {cheapest.format}, ${usd:.3g} per million examples"
    if row.physical_batch_size < workload.batch_size:
        text += f"; the batch goes through memory {row.physical_batch_size} examples at a time"
    if not all(r.fits for r in found):
        text += f"; {sum(not r.fits for r in found)} do not fit into memory"
    return text + "."


def _most(row: Row) -> str:
    """How many examples of one pass fit into the chip's memory, in words."""
    return "2^24 or more" if row.largest_batch is None else f"at most {row.largest_batch:,}"


def _trust(found: Sequence[Row], best: Row | None = None) -> str:
    """How far to trust the times: what they rest on and, for the best row, how far off they may be."""
    bases = {row.estimate.basis for row in found}
    if bases == {"peak"}:
        return "Peak basis: a roofline on published rates, which kernels do not reach; an upper bound, not a forecast."
    band = best.estimate.step_band_s if best is not None else None
    range_ = f"; their error band puts that step between {seconds(band[0])} and {seconds(band[1])}" if band else ""
    if bases == {"calibrated"}:
        return f"Calibrated basis: fitted to measured kernels{range_} (`dpquant hardware show NAME`: errors in full)."
    return (
        f"Calibrated rows are fitted to measured kernels{range_}; rows on the peak basis are upper bounds from "
        "published rates: do not rank them against the others."
    )


# --- where it goes


def show_times(by: str, found: Sequence[Row], out: Output) -> None:
    """Seconds per ``phase`` or ``layer`` beside full precision; the last line of a chip and format is the sum."""
    parts = [
        (row.estimate.phases, row.baseline.phases) if by == "phase" else (row.estimate.layers, row.baseline.layers)
        for row in found
    ]
    plans = [row.plan for row in found] if by == "layer" else None
    rows = _show_parts(by, "step_s", ("seconds", "speedup"), seconds, found, parts, plans, out)
    slow = list(
        dict.fromkeys(r[by] for r in rows if r["speedup"] is not None and r["speedup"] < 1 and r[by] != "total")
    )
    if not slow:
        out.note("Nothing here is slower than in full precision.")
    elif len(", ".join(slow)) < 400:
        out.note(f"Slower than in full precision: {', '.join(slow)}.")
    else:
        out.note(f"{len(slow)} entries are slower than in full precision.")
    out.note(_trust(found))


def show_memory(found: Sequence[Row], out: Output) -> None:
    """Bytes per part of a pass's fullest moment, beside full precision."""
    parts = [(row.memory_parts, row.baseline_memory_parts) for row in found]
    _show_parts("part", "bytes", ("memory", "smaller"), gibibytes, found, parts, None, out)
    for row in found:
        fits = "fits into" if row.fits else "does not fit into"
        out.note(
            f"{row.hardware}, {row.format}: a pass of {row.physical_batch_size:,} examples {fits} "
            f"{gibibytes(row.memory_bytes)}; {_most(row)} do."
        )
    out.note("Counted from shapes: what the allocator wastes and libraries' workspaces come on top.")


def _show_parts(
    by: str,
    key: str,
    titles: tuple[str, str],
    show: Callable[[float], str],
    found: Sequence[Row],
    parts: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    plans: Sequence[Mapping[str, str]] | None,
    out: Output,
) -> list[dict[str, Any]]:
    """A table of parts that add up, with and without quantization, for every row of the estimate."""
    rows: list[dict[str, Any]] = []
    baseline = f"baseline_{key.removeprefix('step_')}"
    breaks = set()
    for index, (row, (now, before)) in enumerate(zip(found, parts, strict=True)):
        total, total_before = sum(now.values()), sum(before.values())
        entries = [(name, value, before[name]) for name, value in now.items() if value or before[name]]
        for name, value, was in (*entries, ("total", total, total_before)):
            one: dict[str, Any] = {"hardware": row.hardware, "format": row.format, by: name, key: value}
            one |= {"share": value / total, baseline: was, titles[1]: was / value if value and was else None}
            rows.append(one | ({"in_format": plans[index].get(name)} if plans is not None else {}))
        breaks |= {len(rows) - 2, len(rows) - 1}
    chip = (Column(key="hardware", title="hardware"), Column(key="format", title="format"))
    columns = [
        *(chip if len(found) > 1 or out.form == "csv" else ()),
        Column(key=by, title=by, show=lambda name: name.replace("_", " ") if by != "layer" else name, wrap=True),
        Column(key=key, title=titles[0], show=show, right=True),
        Column(key="share", title="share", show=percent, right=True),
        Column(key=baseline, title="full precision", show=show, right=True),
        Column(key=titles[1], title=titles[1], show=speedup, right=True, spare=by == "part"),
        *([Column(key="in_format", title="runs in")] if plans is not None else []),
    ]
    out.table(Table(columns=columns, rows=rows, breaks=frozenset(breaks)))
    show_fallbacks([row.to_json() for row in found], out)
    return rows


def show_fallbacks(rows: Sequence[Mapping[str, Any]], out: Output) -> None:
    """A sentence for every chip and format of the rows that is another format's figure."""
    fallen = (
        f"{r['format']} falls back to {r['falls_back_to']} on {r['hardware']}" for r in rows if r["falls_back_to"]
    )
    for sentence in dict.fromkeys(fallen):
        out.note(f"{sentence}: these are figures of emulation at its rate.")
