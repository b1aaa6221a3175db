"""``dpquant audit``: an empirical lower bound on epsilon, beside the claim."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, number
from emulation.errors import InputError

if TYPE_CHECKING:
    from dpquant.audit import AuditResult
    from dpquant.config import RunConfig

SUMMARY = "Attack a run's own steps, and compare with what they claim to spend."
EXAMPLES = """\
examples:
  dpquant audit digits                  the training step and the analysis
  dpquant audit digits --mechanism run  one whole short run, with 1000 canaries
  dpquant audit digits --trials 10000   a sharper bound

exit code 1: more was spent than claimed"""

_LEAST_TRIALS, _LEAST_CANARIES = 100, 50


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="a configuration, or the name of one that ships")
    parser.add_argument(
        "--mechanism", choices=("training", "analysis", "run"), help="what to attack; default: training and analysis"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", default=2000, help="runs of a mechanism, half of them with the canary"
    )
    parser.add_argument("--examples", type=int, metavar="N", default=32, help="examples beside the canary")
    parser.add_argument("--canaries", type=int, metavar="N", default=1000, help="of a whole run")
    parser.add_argument("--epochs", type=int, metavar="N", default=3, help="of a whole run")
    parser.add_argument("--confidence", type=float, metavar="SHARE", default=0.95, help="that the lower bound holds")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat an audit; default: fresh randomness")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns 1 where a claim is refuted."""
    for name, least in (("trials", _LEAST_TRIALS), ("canaries", _LEAST_CANARIES), ("examples", 1), ("epochs", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} is too few", hint=f"at least {least}")
    if not 0.5 <= args.confidence < 1:
        raise InputError(f"--confidence {args.confidence} is out of range", hint="at least 0.5 and below 1")
    from dpquant.config import load_config

    config = load_config(args.config)
    mechanisms = [args.mechanism] if args.mechanism else ["training", "analysis"]
    analysed = config["schedule"]["scheduler"] == "dpquant" and config["analysis"]["estimator"] != "released"
    if args.mechanism is None and not analysed:
        mechanisms.remove("analysis")
    results = [_audit(config, mechanism, args, out) for mechanism in mechanisms]
    violated = any(r.violated for r in results)
    if out.form == "json":
        out.json({"rows": [vars(r) | {"violated": r.violated} for r in results], "violated": violated})
        return int(violated)
    out.table(_table(results, out.form))
    out.note(
        f"With {args.confidence:.0%} confidence at least the lower bound is spent; the claim is the ledger's, at "
        f"delta {results[0].delta:g}" + ("." if args.mechanism == "run" else ", for an example that takes part.")
    )
    if args.mechanism != "run":
        out.note("Movement: how far the canary moves the release before noise, over the sensitivity noise is made for.")
    out.note("A bound below the claim proves nothing but that this attack found no more.")
    if violated:
        out.show("VIOLATED: more was spent than was claimed.")
    return int(violated)


def _audit(config: RunConfig, mechanism: str, args: argparse.Namespace, out: Output) -> AuditResult:
    from dpquant import audit
    from dpquant.progress import Progress

    size = f"{args.canaries} canaries" if mechanism == "run" else f"{args.trials} trials"
    out.say(f"attacking the {mechanism}: {size}")
    if mechanism == "run":
        with Progress(out, "run", args.epochs, "epochs") as progress:
            return audit.audit_run(
                config,
                count=args.canaries,
                epochs=args.epochs,
                confidence=args.confidence,
                seed=args.seed,
                progress=progress.update,
            )
    subject: Any = audit.worst_canary(config, mechanism, examples=args.examples, seed=args.seed)  # type: ignore[arg-type]
    with Progress(out, mechanism, args.trials, "trials") as progress:
        return audit.audit_mechanism(subject, trials=args.trials, confidence=args.confidence, progress=progress.update)


def _table(results: list[AuditResult], form: str) -> Table:
    columns = [
        Column(key="mechanism", title="mechanism"),
        Column(key="canary", title="canary"),
        Column(key="trials", title="trials", right=True),
        Column(key="movement", title="movement", show=number, right=True),
        Column(key="epsilon_lower_bound", title="epsilon at least", show=number, right=True),
        Column(key="epsilon_claimed", title="claimed", show=number, right=True),
        Column(key="verdict", title="verdict"),
    ]
    rows = [vars(r) | {"verdict": "VIOLATED" if r.violated else "holds"} for r in results]
    if form == "csv":
        columns = [Column(key=key, title=key) for key in rows[0]]
    return Table(columns=columns, rows=rows)
