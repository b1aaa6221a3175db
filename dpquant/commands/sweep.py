"""``dpquant sweep``: a grid of settings times seeds, and what came of it with intervals."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, duration, number, percent, speedup
from emulation.errors import InputError, suggestion

if TYPE_CHECKING:
    from dpquant.sweep import Outcome, Sweep
    from dpquant.sweep_results import SweepResult

SUMMARY = "Train a grid of configurations over several seeds; resumable."
EXAMPLES = """\
examples:
  dpquant sweep digits_schedulers                   a sweep that ships
  dpquant sweep my.yaml --out sweeps/mine --jobs 4  or what is left of it
  dpquant sweep my.yaml --out sweeps/mine --report  the table so far
  dpquant sweep my.yaml --only scheduler=static     a part of it
  dpquant sweep my.yaml --jobs 64 --backend dask    on the cluster that
                                                    DASK_SCHEDULER_ADDRESS names

my.yaml:
  base: digits                 # a configuration: a file, or a shipped one
  grid:                        # every combination
    schedule.scheduler: [full, static, dpquant]
    format: [luq_fp4, mxfp8]
  seeds: [0, 1, 2, 3, 4]       # or how many: 5
  exclude: [{schedule.scheduler: full, format: mxfp8}]
  include: [{schedule.scheduler: dpquant, schedule.beta: 50}]
  compare: {to: {schedule.scheduler: static}}"""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="a YAML file, or a shipped one: digits_schedulers")
    parser.add_argument("--out", metavar="DIR", help="folder of runs and of results.jsonl; default: runs/SPEC")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time; -1: one per core")
    parser.add_argument("--backend", default="loky", metavar="NAME", help="of joblib: loky, threading, dask or ray")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda, for all runs, spread over all GPUs")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data set's files, for all runs")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="then stop after the epochs under way; goes on next time"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="KEY=VALUE", help="the runs with these settings alone")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, train none")
    parser.add_argument("--report", action="store_true", help="show the results there are, train none")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns 1 where a run could not be trained."""
    if args.spec is None:
        raise InputError("no specification given", hint="dpquant sweep digits_schedulers is the demonstration")
    if args.jobs < 1 and args.jobs != -1:
        raise InputError(f"--jobs {args.jobs} must be at least 1, or -1 for one per core")
    if args.time_limit is not None and not args.time_limit > 0:
        raise InputError(f"--time-limit {args.time_limit:g} must be above 0 seconds")
    from dpquant import sweep_runs
    from dpquant.sweep import load_sweep, only, outcomes
    from dpquant.sweep_results import RESULTS, read_results

    if args.backend not in sweep_runs.BACKENDS:
        raise InputError(f"unknown --backend {args.backend!r}", hint=suggestion(args.backend, sweep_runs.BACKENDS))
    here = {("training", "device"): args.device, ("data", "root"): args.data_root}
    sweep = load_sweep(args.spec, {key: value for key, value in here.items() if value is not None})
    if args.only:
        sweep = only(sweep, args.only)
    for name, reason in sweep.refused.items():
        out.say(f"left out: {name}: {reason}")
    if args.dry_run:
        sweep_runs.check_names(sweep)
        return _list(sweep, out)
    root = Path(args.out) if args.out else Path("runs") / sweep.name
    if args.report:
        results = read_results(root / RESULTS)
        if not results:
            raise InputError(f"no results in '{root}'", hint=f"dpquant sweep {args.spec} --out {root}")
    else:
        results = _train(sweep, root, args, out)
        if left := len(sweep.runs) - len(results.keys() & {run.name for run in sweep.runs}):
            out.say(f"time is up: {left} of {len(sweep.runs)} runs are left; the same command goes on with them")
    failures = {run.name: str(results[run.name].error) for run in sweep.runs if _failed(results.get(run.name))}
    _answer(sweep, outcomes(sweep, results), failures, out)
    out.say(f"every run: {root / RESULTS}; one in full: dpquant report {root / sweep.runs[0].name}")
    return 1 if failures else 0


def _failed(result: SweepResult | None) -> bool:
    return result is not None and not result.done


def _list(sweep: Sweep, out: Output) -> int:
    rows = [{"name": run.name, "settings": run.settings, "seed": run.seed} for run in sweep.runs]
    if out.form == "json":
        out.json({"rows": rows, "refused": sweep.refused})
    else:
        out.table(Table(columns=[Column(key="name", title="run", wrap=True)], rows=rows))
        out.note(f"{len(rows)} runs. Their names and values are known; data and targets are checked when a run begins.")
    return 0


def _train(sweep: Sweep, root: Path, args: argparse.Namespace, out: Output) -> dict[str, SweepResult]:
    from dpquant.progress import Progress
    from dpquant.sweep_runs import train_sweep

    total, done = len(sweep.runs), 0
    with Progress(out, "sweep", total, "runs", plain_every_s=math.inf) as progress:  # every run has its line

        def started(before: int) -> None:
            nonlocal done
            done = before
            progress.start(before)
            if before:
                progress.line(f"{before} of {total} runs were done before")

        def ended(result: SweepResult) -> None:
            nonlocal done
            done += 1
            progress.update(done)
            progress.line(f"{result.name}: {_in_short(result)}; {progress.text()}")

        try:
            return train_sweep(
                sweep,
                root,
                jobs=args.jobs,
                backend=args.backend,
                time_limit=args.time_limit,
                started=started,
                ended=ended,
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on with what is left", file=sys.stderr)
            raise


def _in_short(result: SweepResult) -> str:
    if not result.done:
        return f"failed: {result.error}"
    accuracy = "-" if result.accuracy is None else percent(result.accuracy)
    return f"{accuracy}, epsilon {result.epsilon or 0:.3g}, {duration(result.wall_s or 0)}"


# --- what came of it


def _answer(sweep: Sweep, found: Sequence[Outcome], failures: Mapping[str, str], out: Output) -> None:
    rows = [row(outcome) for outcome in found]
    if out.form == "json":
        out.json({"rows": rows, "failures": failures, "refused": sweep.refused})
        return
    if out.form == "csv":
        out.table(Table(columns=[Column(key=key, title=key) for key in rows[0]], rows=rows))
    else:
        labels = _labels(sweep)
        out.table(Table(columns=_COLUMNS, rows=[_shown(one, labels(one["settings"])) for one in rows]))
        for sentence in _sentences(rows, labels):
            out.note(sentence)
    for name, failure in failures.items():
        out.say(f"failed: {name}: {failure}")


def row(outcome: Outcome) -> dict[str, Any]:
    """One point as flat keys, as JSON and CSV have them."""
    accuracy, difference = outcome.accuracy, outcome.difference
    flat = {
        "settings": outcome.settings,
        "runs": outcome.runs,
        "failed": outcome.failed,
        "accuracy": accuracy.mean,
        "accuracy_sd": accuracy.sd,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "compared_with": outcome.compared_with,
        "pairs": difference.n,
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "sign": difference.sign,
    }
    return flat | {key: value for key, value in vars(outcome).items() if key not in ("accuracy", "difference", *flat)}


_COLUMNS = (
    Column(key="text", title="setting", wrap=True),
    Column(key="count", title="runs", right=True),
    Column(key="spread", title="accuracy", right=True),
    Column(key="difference", title="diff.", show=lambda v: f"{100 * v:+.1f}", right=True),
    Column(key="range", title="95 %", right=True),
    Column(key="worst", title="worst", right=True),
    Column(key="speedup_peak", title="peak", show=speedup, right=True),
    Column(key="speedup_calibrated", title="calib.", show=speedup, right=True),
    Column(key="energy_share_peak", title="energy", show=lambda v: f"{100 * v:.0f} %", right=True, spare=True),
    Column(key="epsilon", title="eps", show=number, right=True, spare=True),
)


def _shown(one: Mapping[str, Any], text: str) -> dict[str, Any]:
    cells = {
        **one,
        "text": text,
        "count": f"{one['runs']}/{one['runs'] + one['failed']}" if one["failed"] else one["runs"],
    }
    if one["accuracy"] is not None:
        sd = "" if one["accuracy_sd"] is None else f" ±{100 * one['accuracy_sd']:.1f}"
        cells["spread"] = f"{100 * one['accuracy']:.1f}{sd}"
        cells["worst"] = f"{100 * one['worst_accuracy']:.1f} ({one['worst_seed']})"
    if one["difference_low"] is not None:
        cells["range"] = f"{100 * one['difference_low']:+.1f} to {100 * one['difference_high']:+.1f}"
    return cells


def _labels(sweep: Sweep) -> Callable[[Mapping[str, Any]], str]:
    """How a point is called: the values that not all points share, with their keys where there are several."""
    from dpquant.sweep import short_names

    short = short_names(sweep.keys)
    varied = [key for key in sweep.keys if len({str(point[key]) for point in sweep.points.values()}) > 1]

    def label(settings: Mapping[str, Any]) -> str:
        if len(varied) == 1:
            return str(settings[varied[0]])
        return ", ".join(f"{short[key]} {settings[key]}" for key in varied) or "all"

    return label


def _sentences(rows: Sequence[Mapping[str, Any]], label: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """What the table shows and what it does not: no claim without its interval."""
    baselines = list(dict.fromkeys(label(one["compared_with"]) for one in rows if one["compared_with"] is not None))
    against = baselines[0] if len(baselines) == 1 else "its baseline"
    said = [
        f"Accuracy after the last epoch, in percent, ± sd; diff.: paired, against {against}; worst: the worst seed."
    ]
    for sign, word in ((1, "Better"), (-1, "Worse")):
        if found := [label(one["settings"]) for one in rows if one["sign"] == sign]:
            said.append(f"{word} than {against} (the 95 % interval leaves 0 out): {'; '.join(found)}.")
    if unclear := [label(one["settings"]) for one in rows if one["sign"] == 0]:
        said.append(f"No difference shown: {'; '.join(unclear)}.")
    compared = [one for one in rows if one["compared_with"] is not None]
    if any(one["sign"] is None for one in compared):
        said.append("Fewer than two pairs of seeds allow no interval, and without one nothing is claimed.")
    elif len(compared) > 1:
        said.append("Each interval stands alone: of twenty such, one misses the truth by chance.")
    return said
