"""``dpquant report``: one run in full, or several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpquant import report
from dpquant.render import Column, Output, Table
from dpquant.rundir import load_run, write_atomic
from emulation.errors import InputError

SUMMARY = "Show a run, or compare several."
EXAMPLES = """\
examples:
  dpquant report runs/digits
  dpquant report runs/full runs/dpquant      side by side
  dpquant report runs/digits --html report.html
  dpquant report runs/digits --json          facts, summary and every epoch's record"""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folders, as `dpquant train` wrote them")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page with plots")
    parser.add_argument("--csv", action="store_true", help="print CSV: a line per epoch, or per run where several")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    if not args.runs:
        raise InputError("no run given", hint="dpquant report RUN: a folder that `dpquant train` wrote")
    runs = [load_run(path) for path in args.runs]
    if args.html is not None:
        from dpquant.page import page

        write_atomic(Path(args.html), page(runs).encode())
        out.say(f"wrote {args.html}")
        if out.form == "text":
            return 0
    if out.form == "json":
        out.json({"runs": [report.to_json(one) for one in runs]})
    elif len(runs) > 1:
        out.table(report.comparison(runs))
        out.note(
            "Energy is modelled, in percent of full precision; diff. is accuracy against the first run, in points."
        )
        out.note("One run per setting says little: differences within about a point are usually the seed's.")
    elif out.form == "csv":
        keys = list(report.to_json(runs[0])["records"][0]) if runs[0].records else ["epoch"]
        columns = [Column(key=key, title=key) for key in keys]
        out.table(Table(columns=columns, rows=[vars(record) for record in runs[0].records]))
    else:
        out.show(*report.report(runs[0], width=out.console().width))
    return 0
