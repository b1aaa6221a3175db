"""``dpquant report``: one run in full, or several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpquant.render import Output
from emulation.errors import InputError

SUMMARY = "Show a run, or compare several."
EXAMPLES = """\
examples:
  dpquant report runs/digits
  dpquant report runs/full runs/dpquant          side by side
  dpquant report runs/digits --html report.html
  dpquant report runs/digits --png report.png    its figures, for a paper
  dpquant report runs/digits --json              facts, summary, every epoch
  dpquant report runs/digits --csv               a line per epoch"""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folders, as `dpquant train` wrote them")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page with plots")
    parser.add_argument(
        "--png", metavar="FILE", help="write the plots as one picture (.png, .pdf or .svg); needs matplotlib"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    from dpquant import report
    from dpquant.rundir import check_replaceable, load_run, write_atomic

    if not args.runs:
        raise InputError("no run given", hint="dpquant report RUN: a folder that `dpquant train` wrote")
    for file in filter(None, (args.png, args.html)):
        check_replaceable(Path(file))
    runs = [load_run(path) for path in args.runs]
    files: dict[str, bytes] = {}
    if args.png is not None:
        from dpquant.figures import picture

        files[args.png] = picture(runs, Path(args.png).suffix)
    if args.html is not None:
        from dpquant.page import page

        files[args.html] = page(runs).encode()
    for file, content in files.items():
        write_atomic(Path(file), content)
        out.say(f"wrote {file}")
    if out.form == "json":
        out.json({"runs": [report.to_json(one) for one in runs]})
    elif files and out.form == "text":
        pass
    elif len(runs) > 1:
        out.table(report.comparison(runs))
        if out.form == "text" and (different := report.differing(runs)).rows:
            out.show("", "What was asked for differently")
            out.table(different)
        out.note(
            "Energy is modelled, in percent of full precision; diff. is accuracy against the first run, in points."
        )
        out.note("One run per setting says little: differences within about a point are usually the seed's.")
    elif out.form == "csv":
        out.table(report.records_table(runs[0]))
    else:
        out.show(*report.report(runs[0], width=out.console().width))
    return 0
