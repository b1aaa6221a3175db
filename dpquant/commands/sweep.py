"""``dpquant sweep``: a grid of settings times seeds, and what came of it with intervals."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, number, percent, speedup
from emulation.errors import InputError

if TYPE_CHECKING:
    from dpquant.sweep import Cell, Outcome

SUMMARY = "Train a grid of configurations over several seeds; resumable."
EXAMPLES = """\
examples:
  dpquant sweep schedulers.yaml --out sweeps/schedulers
  dpquant sweep schedulers.yaml --out sweeps/schedulers --jobs 4     the same, or what is left of it

schedulers.yaml:
  base: digits
  seeds: [0, 1, 2, 3, 4]
  grid:
    schedule.scheduler: [full, static, pls, dpquant]"""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="a YAML file: base, seeds, grid")
    parser.add_argument("--out", metavar="DIR", help="folder of the run folders and of results.jsonl")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (joblib above 1)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, train none")
    parser.add_argument("--csv", action="store_true", help="print CSV")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns 1 where a run could not be trained."""
    if args.spec is None:
        raise InputError("no specification given", hint="dpquant sweep SPEC.yaml --out DIR")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs} must be at least 1")
    from dpquant import sweep

    cells = sweep.read_cells(args.spec)
    if args.dry_run:
        return _list(cells, out)
    if args.out is None:
        raise InputError("no folder given", hint="--out DIR")
    root = Path(args.out)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out!r} cannot be made: {error.strerror}") from error
    failures = _train(cells, root, args.jobs, out)
    found = sweep.outcomes(cells, root)
    if out.form == "json":
        out.json({"rows": [vars(outcome) for outcome in found], "failures": failures})
    else:
        _show(found, out)
        for name, failure in failures.items():
            out.say(f"failed: {name}: {failure}")
    out.say(f"every run: {root / 'results.jsonl'}; one in full: dpquant report {root / cells[0].name}")
    return 1 if failures else 0


def _list(cells: Sequence[Cell], out: Output) -> int:
    rows = [{"name": cell.name, "settings": cell.settings, "seed": cell.seed} for cell in cells]
    if out.form == "json":
        out.json({"rows": rows})
    else:
        out.table(Table(columns=[Column(key="name", title="run", wrap=True)], rows=rows))
        out.note(f"{len(rows)} runs; every configuration is sound.")
    return 0


def _train(cells: Sequence[Cell], root: Path, jobs: int, out: Output) -> dict[str, str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dpquant.sweep import run_all

    console = out.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    plain = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=out.quiet or plain) as progress:
        task = progress.add_task("runs", total=len(cells))

        def done(count: int) -> None:
            progress.update(task, completed=count)
            if plain:
                out.say(f"{count} of {len(cells)} runs")

        try:
            return run_all(cells, root, jobs, done)
        except KeyboardInterrupt:
            out.say("stopped; the same command goes on with what is left")
            raise


def _show(found: Sequence[Outcome], out: Output) -> None:
    varied = [key for key in found[0].settings if len({str(o.settings[key]) for o in found}) > 1]
    rows: list[dict[str, Any]] = [vars(outcome) | {"text": _setting(outcome.settings, varied)} for outcome in found]
    for row in rows[1:]:  # the first is what the others are held against
        row["shown_difference"] = row["difference"]
        row["range"] = (row["difference_low"], row["difference_high"]) if row["difference_low"] is not None else None
    columns = [
        Column(key="text", title="setting", wrap=True),
        Column(key="runs", title="runs", right=True),
        Column(key="accuracy", title="accuracy", show=percent, right=True),
        Column(key="accuracy_sd", title="sd", show=lambda v: f"{100 * v:.1f}", right=True),
        Column(key="shown_difference", title="diff.", show=lambda v: f"{100 * v:+.1f}", right=True),
        Column(key="range", title="95 %", show=lambda v: f"{100 * v[0]:+.1f} to {100 * v[1]:+.1f}", right=True),
        Column(key="speedup", title="speedup", show=speedup, right=True),
        Column(key="epsilon", title="eps", show=number, right=True, spare=True),
    ]
    if out.form == "csv":
        columns = [Column(key=key, title=key) for key in vars(found[0])]
    known = [(row["accuracy"], -index) for index, row in enumerate(rows) if row["accuracy"] is not None]
    out.table(Table(columns=columns, rows=rows, best=-max(known)[1] if known else None))
    out.note("Accuracy in percent; diff.: against the first setting, seed by seed, in points, with its 95 % interval.")
    least = min((outcome.runs for outcome in found), default=0)
    out.note(
        "An interval that holds 0 shows no difference."
        if least > 1
        else "With one seed nothing can be said about differences: give several seeds."
    )


def _setting(settings: Mapping[str, Any], varied: Sequence[str]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {settings[key]}" for key in varied) or "all"
