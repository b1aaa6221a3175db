"""``dpquant privacy``: what a planned run would spend, the noise it needs, and what a run has spent."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, number, percent
from emulation.errors import InputError

if TYPE_CHECKING:
    from dpquant.config import RunConfig
    from dpquant.privacy import Accountant, PrivacyEvent

SUMMARY = "What a planned run would spend, and the noise it needs."
EXAMPLES = """\
examples:
  what does a configuration spend, and which noise does it need?
      dpquant privacy digits
  what epsilon would 60 epochs cost?
      dpquant privacy digits --epochs 60 --noise-multiplier 1
      dpquant privacy --dataset-size 50000 --batch-size 1024 --epochs 60 \\
          --delta 1e-5 --noise-multiplier 1
  which noise do 60 epochs need for epsilon 3?
      dpquant privacy digits --epochs 60 --target-epsilon 3
  what has a run spent so far?
      dpquant privacy runs/mine"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is released: training steps and analyses, as events; None: no analysis is planned."""

    training: PrivacyEvent
    analysis: PrivacyEvent | None
    delta: float
    accountant: Accountant
    target_epsilon: float | None


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a configuration, or a run folder")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs")
    parser.add_argument("--batch-size", type=int, metavar="N", help="expected size of a Poisson batch")
    parser.add_argument("--dataset-size", type=int, metavar="N", help="declared number of examples")
    parser.add_argument("--delta", type=float, metavar="X", help="delta, below 1 / dataset size")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--target-epsilon", type=float, metavar="X", help="solve for the noise that meets this epsilon")
    group.add_argument("--noise-multiplier", type=float, metavar="X", help="the noise; epsilon follows")
    parser.add_argument("--accountant", choices=("prv", "rdp"), help="default: prv")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    if args.config is not None and _means_a_run(Path(args.config)):
        for name in ("epochs", "batch_size", "dataset_size", "target_epsilon", "noise_multiplier"):
            if getattr(args, name) is not None:
                message = f"--{name.replace('_', '-')} cannot change what a run has spent"
                raise InputError(message, hint=f"of another plan: dpquant privacy {args.config}/config.yaml")
        return _spent(args, out)
    plan = _from_config(args) if args.config is not None else _from_options(args)
    answer = evaluate(plan)
    if out.form == "json":
        out.json(answer)
        return 0
    out.table(_table(answer))
    if plan.analysis is not None:
        out.note(_added(answer))
    target = "" if plan.target_epsilon is None else f", within the target of {plan.target_epsilon:g}"
    out.note(
        f"The run is ({answer['epsilon']:.4g}, {plan.delta:g})-differentially private{target}, for neighbouring data "
        "sets that differ by adding or removing one example."
    )
    out.note(
        f"An upper bound by the {plan.accountant.upper()} accountant for Poisson sampling at exactly these rates; "
        "choosing hyper-parameters on the same data is not covered."
    )
    return 0


def evaluate(plan: Plan) -> dict[str, Any]:
    """Epsilon of the plan, whole and in parts, as the JSON that is printed."""
    from dpquant.privacy import PrivacyLedger, epsilon

    analysis = PrivacyLedger(events=() if plan.analysis is None else (plan.analysis,))
    training = PrivacyLedger(events=(plan.training,))
    whole = PrivacyLedger(events=training.events + analysis.events)

    def spent(ledger: PrivacyLedger) -> float:
        return epsilon(ledger, plan.delta, plan.accountant)

    together, alone = spent(whole), spent(training)
    return {
        "epsilon": together,
        "delta": plan.delta,
        "accountant": plan.accountant,
        "noise_multiplier": plan.training.noise_multiplier,
        "sample_rate": plan.training.sample_rate,
        "steps": plan.training.steps,
        "analysis": {"noise_multiplier": None, "sample_rate": None, "steps": 0}
        if plan.analysis is None
        else {key: getattr(plan.analysis, key) for key in ("noise_multiplier", "sample_rate", "steps")},
        "neighbouring": plan.training.neighbouring,
        "sampling": "poisson",
        "target_epsilon": plan.target_epsilon,
        "epsilon_training_alone": alone,
        "epsilon_analysis_alone": spent(analysis),
        "epsilon_analysis_added": _difference(together, alone),
    }


def _difference(together: float, alone: float) -> float:
    """What the analyses add; zero where they come free, and also where nothing is private anyway."""
    return max(0.0, together - alone) if together < math.inf else 0.0


def _added(answer: dict[str, Any]) -> str:
    share = answer["epsilon_analysis_added"] / answer["epsilon"] if answer["epsilon"] else 0.0
    return f"The analyses add {answer['epsilon_analysis_added']:.3g} to epsilon, {percent(share)} of it."


def _table(answer: dict[str, Any]) -> Table:
    analysis = answer["analysis"]
    rows = [
        {"what": "training", "epsilon": answer["epsilon_training_alone"]}
        | {key: answer[key] for key in ("steps", "sample_rate", "noise_multiplier")},
        {"what": "sensitivity analyses", "epsilon": answer["epsilon_analysis_alone"], **analysis},
        {"what": "together", "epsilon": answer["epsilon"], "steps": answer["steps"] + analysis["steps"]},
    ]
    columns = [
        Column(key="what", title="released"),
        Column(key="steps", title="times", right=True),
        Column(key="sample_rate", title="sample rate", show=number, right=True),
        Column(key="noise_multiplier", title="noise multiplier", show=number, right=True),
        Column(key="epsilon", title="epsilon alone", show=number, right=True),
    ]
    return Table(columns=columns, rows=rows, breaks=frozenset({1}))


def _from_config(args: argparse.Namespace) -> Plan:
    from dpquant.config import load_config

    overrides: dict[tuple[str | int, ...], Any] = {
        ("training", "epochs"): args.epochs,
        ("training", "batch_size"): args.batch_size,
        ("training", "dataset_size"): args.dataset_size,
        ("privacy", "target_delta"): args.delta,
        ("privacy", "target_epsilon"): args.target_epsilon,
        ("privacy", "noise_multiplier"): args.noise_multiplier,
        ("privacy", "accountant"): args.accountant,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    if args.target_epsilon is not None:
        given[("privacy", "noise_multiplier")] = None
    if args.noise_multiplier is not None:
        given[("privacy", "target_epsilon")] = None
    config = load_config(args.config, given)
    training, budget = config["training"], config["privacy"]
    from dpquant.sensitivity import AnalysisSettings

    size = training["dataset_size"] or _count(config)
    analysis = AnalysisSettings(**config["analysis"])
    analyses = 0
    if config["schedule"]["scheduler"] == "dpquant" and analysis.estimator != "released":
        analyses = len(range(0, training["epochs"], analysis.interval))
    return _plan(
        size=size,
        batch_size=training["batch_size"],
        epochs=training["epochs"],
        delta=budget["target_delta"],
        target_epsilon=budget["target_epsilon"],
        noise_multiplier=budget["noise_multiplier"],
        accountant=budget["accountant"],
        analysis=analysis.event(size, analyses) if analyses else None,
    )


def _count(config: RunConfig) -> int:
    """The number of training examples, where the configuration does not declare it."""
    from dpquant.data import DataSettings, load_data

    return len(load_data(DataSettings(**config["data"])).train)


def _from_options(args: argparse.Namespace) -> Plan:
    needed = ("dataset_size", "batch_size", "epochs", "delta")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if missing:
        hint = "dpquant privacy CONFIG, or give " + ", ".join(missing)
        raise InputError("no configuration given, and without one more is needed", hint=hint)
    if (args.target_epsilon is None) == (args.noise_multiplier is None):
        raise InputError("give one of --target-epsilon and --noise-multiplier")
    for name in needed[:3]:
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.batch_size > args.dataset_size:
        raise InputError(f"--batch-size {args.batch_size} is larger than --dataset-size {args.dataset_size}")
    return _plan(
        size=args.dataset_size,
        batch_size=args.batch_size,
        epochs=args.epochs,
        delta=args.delta,
        target_epsilon=args.target_epsilon,
        noise_multiplier=args.noise_multiplier,
        accountant=args.accountant or "prv",
        analysis=None,
    )


def _plan(
    *,
    size: int,
    batch_size: int,
    epochs: int,
    delta: float,
    target_epsilon: float | None,
    noise_multiplier: float | None,
    accountant: Accountant,
    analysis: PrivacyEvent | None,
) -> Plan:
    from dpquant.privacy import PrivacyEvent, calibrate_noise, check_delta

    check_delta("delta", delta, examples=size)
    rate = min(1.0, batch_size / size)
    steps = epochs * max(1, round(1 / rate))
    if noise_multiplier is None:
        assert target_epsilon is not None
        noise_multiplier = calibrate_noise(
            target_epsilon=target_epsilon,
            target_delta=delta,
            sample_rate=rate,
            steps=steps,
            analyses=[] if analysis is None else [analysis],
            accountant=accountant,
        )
    training = PrivacyEvent(mechanism="training", noise_multiplier=noise_multiplier, sample_rate=rate, steps=steps)
    return Plan(
        training=training,
        analysis=analysis,
        delta=delta,
        accountant=accountant,
        target_epsilon=target_epsilon,
    )


def _means_a_run(path: Path) -> bool:
    """A folder, or what names nothing, has a folder before it, and stands beside runs."""
    misspelt = not path.exists() and not path.suffix and path.parent != Path()
    return path.is_dir() or (misspelt and any(path.parent.glob("*/run.json")))


def _spent(args: argparse.Namespace, out: Output) -> int:
    """What a run folder's ledger says."""
    from dpquant.ledger_file import read_ledger
    from dpquant.privacy import PrivacyLedger, epsilon
    from dpquant.rundir import load_run

    run = load_run(args.config)
    facts = run.facts
    ledger = read_ledger(run.path / "ledger.jsonl", run.run_id)
    delta = facts.delta if args.delta is None else args.delta
    accountant: Any = args.accountant or facts.accountant
    rows: list[dict[str, Any]] = []
    for mechanism in ("training", "analysis"):
        part = PrivacyLedger(events=tuple(e for e in ledger.events if e.mechanism == mechanism))
        rows.append({"what": mechanism, "steps": ledger.steps(mechanism), "epsilon": epsilon(part, delta, accountant)})
    whole = epsilon(ledger, delta, accountant)
    added = _difference(whole, rows[0]["epsilon"])
    rows.append({"what": "together", "steps": sum(e.steps for e in ledger.events), "epsilon": whole})
    if out.form == "json":
        answer = {"epsilon": whole, "delta": delta, "accountant": accountant, "target_epsilon": facts.target_epsilon}
        planned = {"steps": facts.steps, "analyses": facts.analyses}
        answer |= {"epsilon_analysis_added": added, "planned": planned}
        out.json(answer | {"events": [vars(event) for event in ledger.events]})
        return 0
    columns = [
        Column(key="what", title="released"),
        Column(key="steps", title="times", right=True),
        Column(key="epsilon", title="epsilon alone", show=number, right=True),
    ]
    out.table(Table(columns=columns, rows=rows, breaks=frozenset({1})))
    left = f", {percent(whole / facts.target_epsilon)} of its target" if facts.target_epsilon else ""
    done = f"{ledger.steps('training')} of {facts.steps} planned steps"
    if facts.analyses:
        done += f" and {ledger.steps('analysis')} of {facts.analyses} analyses"
    out.note(f"{run.path} has spent epsilon {whole:.4g} at delta {delta:g}{left}, on {done}.")
    if facts.analyses:
        out.note(_added({"epsilon": whole, "epsilon_analysis_added": added}))
    out.note("The ledger is written before noise is drawn: it never says less than was spent.")
    return 0
