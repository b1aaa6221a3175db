"""What every schedule loses against full precision, a line per network, data and goal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpquant.statistics import Sample, sample

from .files import SEEDS, Evidence, Settings, average
from .markdown import difference, mean, table

SCHEDULERS = ("static", "pls", "dpquant", "greedy", "annealed", "cooldown")
SUBJECTS = {
    "fashion_main": "Fashion-MNIST's CNN",
    "cifar10_main": "CIFAR-10's CNN",
    "digits_main": "the digits' CNN",
    "cifar10_resnet18_main": "ResNet-18 on CIFAR-10",
    "fashion_resnet18": "ResNet-18 on Fashion-MNIST",
    "cifar10_vit": "a vision transformer on CIFAR-10",
    "words_main": "a transformer on text",
    "cifar10_finetune": "fine-tuning on CIFAR-10",
    "cifar10_epsilon3": "CIFAR-10's CNN as published",
    "fashion_rates": "Fashion-MNIST's CNN at other rates",
    "cifar10_rates": "CIFAR-10's CNN at other rates",
    "cifar10_quantizers": "CIFAR-10's CNN in INT4, E2M1 and MXFP4",
    "cifar10_nonprivate": "CIFAR-10's CNN without privacy",
    "fashion_time": "Fashion-MNIST's CNN",
    "cifar10_time": "CIFAR-10's CNN",
    "fashion_time_fresh": "Fashion-MNIST's CNN on fresh seeds",
    "fashion_epsilon1_fresh": "Fashion-MNIST's CNN at epsilon 1 on fresh seeds",
    "fashion_time_budgets": "Fashion-MNIST's CNN at three budgets",
    "fashion_time_shares": "Fashion-MNIST's CNN at other targets and three budgets",
    "cifar10_time_budgets": "CIFAR-10's CNN at three budgets",
    "cifar10_time_shares": "CIFAR-10's CNN at other targets and three budgets",
    "cifar10_time_fresh": "CIFAR-10's CNN on fresh seeds",
    "cifar10_epsilon1_fresh": "CIFAR-10's CNN at epsilon 1 on fresh seeds",
    "digits_time": "the digits' CNN",
    "digits_time_budgets": "the digits' CNN at three budgets",
    "digits_time_fresh": "the digits' CNN on fresh seeds",
    "digits_epsilon1_fresh": "the digits' CNN at epsilon 1 on fresh seeds",
    "cifar10_resnet18": "ResNet-18 on CIFAR-10",
    "cifar10_resnet18_budgets": "ResNet-18 on CIFAR-10 at three budgets",
    "cifar10_resnet18_shares": "ResNet-18 on CIFAR-10 at other targets and three budgets",
    "cifar10_resnet18_fresh": "ResNet-18 on CIFAR-10 on fresh seeds",
    "cifar10_resnet18_epsilon1_fresh": "ResNet-18 on CIFAR-10 at epsilon 1 on fresh seeds",
    "fashion_resnet18_time": "ResNet-18 on Fashion-MNIST",
    "fashion_resnet18_budgets": "ResNet-18 on Fashion-MNIST at three budgets",
    "fashion_resnet18_shares": "ResNet-18 on Fashion-MNIST at other targets and three budgets",
    "cifar10_deep": "ResNet-50 and DenseNet-121 on CIFAR-10",
    "cifar10_deep_fresh": "ResNet-50 and DenseNet-121 on CIFAR-10 on fresh seeds",
    "cifar10_resnet18_nvfp4": "ResNet-18 on CIFAR-10 in NVFP4",
    "cifar10_deep_nvfp4": "ResNet-50 and DenseNet-121 on CIFAR-10 in NVFP4",
}
"""In the order in which they are told; those of equal modelled time last."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One network, data set and goal.

    Attributes:
        subject: network and data.
        goal: share of the layers, or the modelled speedup.
        budgets: the epsilons that it is averaged over.
        full: accuracy in full precision, averaged likewise, over the seeds that have all of them.
        lost: scheduler -> its accuracy less full precision's, averaged over the settings that all have, likewise.
    """

    subject: str
    goal: str
    budgets: str
    full: Sample
    lost: Mapping[str, Sample]


def at_equal_time(evidence: Evidence) -> bool:
    """Whether a sweep's schedules share a modelled speedup, and not a number of layers."""
    return "schedule.target_speedup" in evidence.sweep.keys


def lines(found: Mapping[str, Evidence]) -> Iterator[Line]:
    """Every sweep of schedulers, goal by goal and model by model, averaged over its budgets."""
    for name, subject in SUBJECTS.items():
        if name not in found:
            continue
        evidence = found[name]
        goal = "target_speedup" if at_equal_time(evidence) else "fraction"
        for model in models(evidence):
            own = narrowed(subject, model)
            own_points = [p for p in evidence.sweep.points.values() if p["schedule.scheduler"] != "full"]
            for value in sorted({p[f"schedule.{goal}"] for p in own_points} - {None}):
                wanted = {goal: value} | ({"name": model} if model is not None else {})
                said = _share(value) if goal == "fraction" else f"{value:g}x"
                line = _line(evidence, own, said, wanted)
                # a speedup that one schedule alone aims at is a fixed choice's own, and told beside that
                if line is not None and (goal == "fraction" or len(line.lost) > 1):
                    yield line


def lines_by_budget(found: Mapping[str, Evidence]) -> Iterator[Line]:
    """Every sweep of schedulers at several budgets, budget by budget, averaged over its goals."""
    for name, subject in SUBJECTS.items():
        evidence = found.get(name)
        points = evidence.sweep.points.values() if evidence is not None else ()
        budgets = {p["privacy.target_epsilon"] for p in points if p.get("privacy.target_epsilon") is not None}
        if evidence is None or len(budgets) < 2:
            continue
        equal = at_equal_time(evidence)
        goals = sorted({p["schedule.target_speedup" if equal else "schedule.fraction"] for p in points} - {None, 1.0})
        said = " and ".join(f"{goal:g}x" for goal in goals) if equal else f"{100 * goals[0]:g} to {_share(goals[-1])}"
        for budget in sorted(budgets, reverse=True):
            if (line := _line(evidence, subject, said, {"target_epsilon": budget})) is not None:
                yield line


def models(evidence: Evidence) -> list[str | None]:
    """The networks of a sweep that has several; else None alone."""
    names = list(dict.fromkeys(p.get("model.name") for p in evidence.sweep.points.values()))
    return names if len(names) > 1 else [None]


def narrowed(title: str, model: str | None) -> str:
    """The title of a sweep, of one of its networks."""
    return title if model is None else title.replace(_DEEP, MODELS[model])


def _share(fraction: float) -> str:
    return f"{100 * fraction:g} % of the layers"


_DEEP = "ResNet-50 and DenseNet-121"
MODELS = {"resnet50": "ResNet-50", "densenet121": "DenseNet-121"}


def _line(evidence: Evidence, subject: str, goal: str, wanted: Mapping[str, object]) -> Line | None:
    """The points that have the settings wanted."""
    trained = {
        scheduler: {rest(p): p for p in schedules(evidence, scheduler, wanted) if len(evidence.accuracies(p)) >= SEEDS}
        for scheduler in SCHEDULERS
    }
    trained = {scheduler: points for scheduler, points in trained.items() if points}
    if not trained:
        return None
    first = next(iter(trained.values()))
    shared = [rest for rest in first if all(rest in points for points in trained.values())]
    settings = [first[rest] for rest in shared]
    fulls = [full for p in settings if (full := evidence.full_precision(p)) is not None]
    if not any(len(evidence.accuracies(full)) >= SEEDS for full in fulls):
        return None
    lost = {}
    for scheduler, points in trained.items():
        pairs = [(points[r], full) for r in shared if (full := evidence.full_precision(points[r])) is not None]
        lost[scheduler] = average(evidence, pairs)
    by_seed: dict[int, list[float]] = {}
    for full in fulls:
        for seed, accuracy in evidence.accuracies(full).items():
            by_seed.setdefault(seed, []).append(accuracy)
    budgets = sorted({p["privacy.target_epsilon"] for p in settings if p.get("privacy.target_epsilon")}, reverse=True)
    return Line(
        subject=subject,
        goal=goal,
        budgets=", ".join(f"{epsilon:g}" for epsilon in budgets) or _budget(evidence),
        full=sample([sum(own) / len(own) for own in by_seed.values() if len(own) == len(fulls)]),
        lost=lost,
    )


def _budget(evidence: Evidence) -> str:
    """Of a sweep that does not vary it."""
    epsilon = next(iter(evidence.sweep.runs)).config["privacy"]["target_epsilon"]
    return "none" if epsilon is None else f"{epsilon:g}"


def unused_estimator(evidence: Evidence) -> str | None:
    """What a sweep that varies the estimator says of schedulers that use none; None: it does not vary it."""
    said = {p.get("analysis.estimator") for p in evidence.sweep.points.values() if p["schedule.scheduler"] != "dpquant"}
    return min((estimator for estimator in said if estimator is not None), default=None)


def schedules(
    evidence: Evidence, scheduler: str, wanted: Mapping[str, object], *, estimator: str = "released"
) -> list[Settings]:
    """The points of a scheduler; where the estimator is varied, with this one if it uses any."""
    unused = unused_estimator(evidence)
    if unused is None and estimator == "probe":
        return []  # such sweeps have the free one
    varied = {} if unused is None else {"estimator": estimator if scheduler == "dpquant" else unused}
    return evidence.points(scheduler=scheduler, **wanted, **varied)


def rest(settings: Settings) -> str:
    """What of a point is neither its scheduler nor its estimator."""
    return str({k: v for k, v in settings.items() if k not in ("schedule.scheduler", "analysis.estimator")})


def glance_table(known: Sequence[Line], goal: str) -> str:
    """Points lost against full precision, by scheduler, with a title for the goals; empty where nothing was trained."""
    rows = [
        [
            line.subject,
            line.goal,
            line.budgets,
            mean(line.full),
            *(difference(line.lost[s]) if s in line.lost else "" for s in SCHEDULERS),
        ]
        for line in known
    ]
    used = [any(s in line.lost for line in known) for s in SCHEDULERS]
    titles = ["trained", goal, "epsilon", "full precision, %", *SCHEDULERS]
    keep = [True] * 4 + used
    cut = [[cell for cell, kept in zip(row, keep, strict=True) if kept] for row in [titles, *rows]]
    return table(cut[0], cut[1:], range(3, len(cut[0]))) if rows else ""
