"""Tables of the sweeps: every point with its interval, its paired differences, and the command that trains it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpquant.statistics import Sample, sample
from dpquant.sweep import Outcome, outcomes, short_names

from .files import Evidence, Settings, average
from .glance import SUBJECTS, models, narrowed, unused_estimator
from .markdown import NONE, difference, interval, mean, table, times, verdict

PUBLISHED = {"fashion_anchor": 86.0, "cifar10_anchor": 59.2}
TITLES = {
    "fashion_anchor": "Fashion-MNIST in full precision, epsilon 3",
    "cifar10_anchor": "CIFAR-10 in full precision, epsilon 3",
    "fashion_main": "Schedulers on Fashion-MNIST",
    "cifar10_main": "Schedulers on CIFAR-10",
    "digits_main": "Schedulers on the digits",
    "digits_schedulers": "Schedulers on the digits, the demonstration",
    "fashion_subsets": "Every fixed choice of three of Fashion-MNIST's four layers",
    "cifar10_subsets": "Every fixed choice of seven of CIFAR-10's eight layers",
    "fashion_time_subsets": "Every fixed choice of Fashion-MNIST's four layers that reaches the same speedups",
    "cifar10_time_subsets": "Every fixed choice of CIFAR-10's eight layers that reaches the same speedups",
    "digits_time_subsets": "Every fixed choice of the digits' six layers that reaches the same speedups",
    "cifar10_resnet18_subsets": "Fixed choices of ResNet-18's 21 layers that reach the same speedup",
    "fashion_time": "Schedulers on Fashion-MNIST at equal modelled time",
    "cifar10_time": "Schedulers on CIFAR-10 at equal modelled time",
    "digits_time": "Schedulers on the digits at equal modelled time",
    "fashion_time_fresh": "Fashion-MNIST at equal modelled time on fresh seeds",
    "fashion_epsilon1_fresh": "Fashion-MNIST at epsilon 1 at equal modelled time on fresh seeds",
    "fashion_time_budgets": "Schedulers on Fashion-MNIST at equal modelled time at three budgets",
    "fashion_time_shares": "Schedulers on Fashion-MNIST at equal modelled time at other targets",
    "cifar10_time_budgets": "Schedulers on CIFAR-10 at equal modelled time at three budgets",
    "cifar10_time_shares": "Schedulers on CIFAR-10 at equal modelled time at other targets",
    "cifar10_time_fresh": "CIFAR-10 at equal modelled time on fresh seeds",
    "cifar10_epsilon1_fresh": "CIFAR-10 at epsilon 1 at equal modelled time on fresh seeds",
    "digits_time_budgets": "Schedulers on the digits at equal modelled time at three budgets",
    "digits_time_fresh": "The digits at equal modelled time on fresh seeds",
    "digits_epsilon1_fresh": "The digits at epsilon 1 at equal modelled time on fresh seeds",
    "fashion_rates": "Other learning rates on Fashion-MNIST",
    "cifar10_rates": "Other learning rates on CIFAR-10",
    "cifar10_quantizers": "Other quantizers on CIFAR-10",
    "cifar10_epsilon3": "Schedulers on CIFAR-10 in the published setting",
    "digits_draw": "Layers drawn by count or by time, the digits",
    "cifar10_draw": "Layers drawn by count or by time, CIFAR-10",
    "digits_ablation": "Settings of the dpquant scheduler on the digits",
    "fashion_formats": "Formats on Fashion-MNIST",
    "cifar10_formats": "Formats on CIFAR-10",
    "fashion_accumulate": "The chips' own accumulation",
    "cifar10_nonprivate": "Without privacy: CIFAR-10",
    "cifar10_vit": "A vision transformer on CIFAR-10, DP-Adam",
    "words_main": "A transformer on text, DP-Adam",
    "cifar10_finetune": "Fine-tuning on CIFAR-10",
    "cifar10_resnet18": "ResNet-18 with GroupNorm on CIFAR-10 at equal modelled time",
    "cifar10_resnet18_budgets": "ResNet-18 with GroupNorm on CIFAR-10 at equal modelled time at three budgets",
    "cifar10_resnet18_shares": "ResNet-18 with GroupNorm on CIFAR-10 at equal modelled time at other targets",
    "cifar10_resnet18_fresh": "ResNet-18 with GroupNorm on CIFAR-10 at equal modelled time on fresh seeds",
    "cifar10_resnet18_epsilon1_fresh": "ResNet-18 on CIFAR-10 at epsilon 1 at equal modelled time on fresh seeds",
    "fashion_resnet18_time": "ResNet-18 with GroupNorm on Fashion-MNIST at equal modelled time",
    "fashion_resnet18_budgets": "ResNet-18 with GroupNorm on Fashion-MNIST at equal modelled time at three budgets",
    "fashion_resnet18_shares": "ResNet-18 with GroupNorm on Fashion-MNIST at equal modelled time at other targets",
    "cifar10_resnet18_main": "ResNet-18 with GroupNorm on CIFAR-10",
    "fashion_resnet18": "ResNet-18 with GroupNorm on Fashion-MNIST",
    "cifar10_beta": "How strongly dpquant prefers, ResNet-18 on CIFAR-10",
    "cifar10_deep": "ResNet-50 and DenseNet-121 with GroupNorm on CIFAR-10",
    "cifar10_deep_fresh": "ResNet-50 and DenseNet-121 with GroupNorm on CIFAR-10 on fresh seeds",
    "digits_epochs": "Shorter and longer runs on the digits at epsilon 1 at equal modelled time",
    "cifar10_resnet18_epochs": "Shorter and longer runs of ResNet-18 on CIFAR-10 at equal modelled time",
    "cifar10_deep_epochs": "Longer runs of DenseNet-121 on CIFAR-10 at equal modelled time",
    "cifar10_resnet18_nvfp4": "ResNet-18 with GroupNorm on CIFAR-10 at equal modelled time in NVFP4",
    "cifar10_deep_nvfp4": "ResNet-50 and DenseNet-121 with GroupNorm on CIFAR-10 in NVFP4",
}
ROOTS = {"fashion": "", "digits": "", "cifar10": " --data-root cifar10", "words": " --data-root words.npz"}
MADE = {
    "cifar10_finetune": (" --data-root pretrained/private.npz", "python benchmarks/pretrain.py cifar10 pretrained"),
    "words_main": (" --data-root words.npz", "python benchmarks/words.py words.npz"),
}
"""Sweep -> where its data are, and what makes them and its weights."""


def label(evidence: Evidence, settings: Settings) -> str:
    """What of a point is not the same for all points, as arguments of ``--only``."""
    short = short_names(evidence.sweep.keys)
    values = {k: {json.dumps(p[k]) for p in evidence.sweep.points.values()} for k in evidence.sweep.keys}
    parts = [f"{short[k]}={_yaml(settings[k])}" for k in evidence.sweep.keys if len(values[k]) > 1]
    return " ".join(f"'{part}'" if " " in part else part for part in parts) or "all"


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return "null" if value is None else str(value)


def only(evidence: Evidence, settings: Settings) -> str:
    """The option that chooses a point, where there are several."""
    return f" --only {label(evidence, settings)}" if len(evidence.sweep.points) > 1 else ""


def command(name: str, evidence: Evidence) -> str:
    """The command that trains a sweep, where it was trained."""
    devices = {r.device for r in evidence.results.values() if r.device}
    device = "" if devices <= {"cpu"} else " --device cuda"
    root = MADE[name][0] if name in MADE else ROOTS[name.split("_")[0]]
    return f"dpquant sweep {name}{device}{root}"


def section(name: str, evidence: Evidence, plot: str | None) -> str:
    """One sweep: what it is, its plot, its table."""
    found = [o for o in outcomes(evidence.sweep, evidence.results) if o.runs or o.failed]
    seeds = len({run.seed for run in evidence.sweep.runs})
    done, planned = sum(o.runs for o in found), len(evidence.sweep.runs)
    shared = [f"`{k}` {_yaml(v)}" for k, v in _constant(evidence).items()]
    baseline = evidence.sweep.baseline or {}
    parts = [f"### {TITLES.get(name, name)}", ""]
    parts.append(
        f"{done} of {planned} runs ({seeds} seeds)"
        + (f"; all with {', '.join(shared)}" if shared else "")
        + "."
        + (f" `{MADE[name][1]}` first makes what they read." if name in MADE else "")
        + f" `{command(name, evidence)}` trains them; a row alone: `--only` and its first column."
        + (f" The baseline is the row with {_setting(baseline)}, else alike." if baseline else "")
    )
    if plot:
        parts += ["", f"![{TITLES.get(name, name)}]({plot})"]
    parts += ["", _table(evidence, found)]
    return "\n".join(parts)


def _setting(settings: Settings) -> str:
    return ", ".join(f"`{key.split('.')[-1]}={_yaml(value)}`" for key, value in settings.items())


def _constant(evidence: Evidence) -> dict[str, Any]:
    points = list(evidence.sweep.points.values())
    keys = [k for k in evidence.sweep.keys if all(p[k] == points[0][k] for p in points)]
    return {short_names(evidence.sweep.keys)[k]: points[0][k] for k in keys}


def _table(evidence: Evidence, found: list[Outcome]) -> str:
    with_baseline = any(o.compared_with is not None for o in found)
    with_full = any(evidence.full_precision(o.settings) is not None for o in found)
    titles = ["`--only`", "runs", "accuracy, %", "95 % of the mean", "worst seed"]
    titles += ["against its baseline, points"] * with_baseline + ["against full precision"] * with_full
    titles += ["speedup, peak", "calibrated", "energy"]
    rows = []
    for o in found:
        full = evidence.full_precision(o.settings)
        row = [f"`{label(evidence, o.settings)}`", f"{o.runs}", mean(o.accuracy), interval(o.accuracy)]
        row.append(NONE if o.worst_accuracy is None else f"{100 * o.worst_accuracy:.1f}")
        row += [difference(o.difference)] * with_baseline
        row += [NONE if full is None else difference(evidence.compared(o.settings, full))] * with_full
        energy = NONE if o.energy_share_peak is None else f"{100 * o.energy_share_peak:.0f} %"
        rows.append([*row, times(o.speedup_peak), times(o.speedup_calibrated), energy])
    return table(titles, rows, right=range(1, len(titles)))


# --- anchors


def anchors_table(found: Mapping[str, Evidence]) -> str:
    """Full precision beside what was published."""
    rows = []
    for name, published in PUBLISHED.items():
        if name not in found:
            continue
        evidence = found[name]
        for settings in evidence.sweep.points.values():
            own = sample(list(evidence.accuracies(settings).values()))
            near = own.mean is not None and abs(100 * own.mean - published) <= 1
            rows.append(
                [
                    f"`{command(name, evidence)}{only(evidence, settings)}`",
                    f"{own.n}",
                    mean(own),
                    interval(own),
                    f"{published:.1f}",
                    "yes" if near else "no",
                ]
            )
    if not rows:
        return "No anchor has been trained yet."
    return table(
        ["run", "runs", "accuracy, %", "95 % of the mean", "published, %", "within a point"], rows, range(1, 6)
    )


# --- what the schedulers come to, over all settings of a sweep


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One scheduler less another.

    Attributes:
        scheduler: what is compared.
        estimator: of its sensitivities, for dpquant.
        other: what it is compared with.
        short: its name in a plot.
        said: its name in a sentence.
    """

    scheduler: str
    estimator: str | None = None
    other: str = "static"
    short: str
    said: str


COMPARISONS = (
    Comparison(scheduler="pls", short="pls", said="redrawn uniformly (pls) less fixed at random (static)"),
    Comparison(
        scheduler="dpquant", estimator="probe", short="dpquant, probe",
        said="dpquant with the private probe less static",
    ),
    Comparison(
        scheduler="dpquant", estimator="released", short="dpquant, released",
        said="dpquant from released gradients less static",
    ),
    Comparison(scheduler="greedy", short="greedy", said="what saves most time (greedy) less static"),
    Comparison(scheduler="annealed", short="annealed", said="all at first, none at the end (annealed) less static"),
    Comparison(
        scheduler="cooldown", short="cooldown",
        said="what saves most time at first, none at the end (cooldown) less static",
    ),
    Comparison(scheduler="delayed", short="delayed", said="none at first, all at the end (delayed) less static"),
    Comparison(
        scheduler="dpquant", estimator="probe", other="pls", short="", said="dpquant with the private probe less pls"
    ),
    Comparison(
        scheduler="dpquant", estimator="released", other="pls", short="",
        said="dpquant from released gradients less pls",
    ),
    Comparison(scheduler="annealed", other="pls", short="", said="annealed less pls"),
    Comparison(scheduler="greedy", other="annealed", short="", said="greedy less annealed"),
    Comparison(scheduler="cooldown", other="greedy", short="", said="cooldown less greedy"),
    Comparison(scheduler="cooldown", other="annealed", short="", said="cooldown less annealed"),
    Comparison(scheduler="annealed", other="delayed", short="", said="annealed less delayed"),
)  # fmt: skip


def scheduler_averages(evidence: Evidence) -> Iterator[tuple[Comparison, str | None, Sample]]:
    """Each comparison of schedulers, averaged over a sweep's settings; network by network where it has several.

    Sweeps that do not vary the estimator have the free one; those that do say one of every other scheduler.
    """
    unused = unused_estimator(evidence)
    for comparison in COMPARISONS:
        if unused is None and comparison.estimator == "probe":
            continue
        wanted = {} if unused is None else {"estimator": comparison.estimator or unused}
        changed = {"schedule.scheduler": comparison.other} | ({} if unused is None else {"analysis.estimator": unused})
        known = list(evidence.sweep.points.values())
        here = evidence.points(scheduler=comparison.scheduler, **wanted)
        for model in models(evidence):
            own = here if model is None else [point for point in here if point["model.name"] == model]
            pairs = [(point, there) for point in own if (there := {**point, **changed}) in known]
            if pairs:
                yield comparison, model, average(evidence, pairs)


NEGLIGIBLE = 0.02
"""Of the noise, as a share: what an analysis may add to it and still count as free."""


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """What the private probe takes of one sweep's budget.

    Attributes:
        name: of the sweep.
        epsilon: the budget.
        free: noise multiplier of training without its analyses.
        paid: and with them.
        less_free: accuracy with the probe less that with the free estimate, averaged over the sweep's settings.
    """

    name: str
    epsilon: float
    free: float
    paid: float
    less_free: Sample

    @property
    def rise(self) -> float:
        """Of the noise, as a share."""
        return self.paid / self.free - 1


def probe_costs(found: Mapping[str, Evidence]) -> Iterator[ProbeCost]:
    """Sweep by sweep and budget by budget, the largest budget first."""
    for name, evidence in found.items():
        if not {"schedule.scheduler", "analysis.estimator", "privacy.target_epsilon"} <= set(evidence.sweep.keys):
            continue
        for epsilon in sorted({p["privacy.target_epsilon"] for p in evidence.sweep.points.values()}, reverse=True):
            probed = evidence.points(scheduler="dpquant", estimator="probe", target_epsilon=epsilon)
            pairs = [(p, {**p, "analysis.estimator": "released"}) for p in probed]
            noise = [
                {r.noise_multiplier for p in part for r in evidence.finished(p) if r.noise_multiplier is not None}
                for part in ([there for _, there in pairs], probed)
            ]
            if all(noise) and pairs:
                yield ProbeCost(
                    name=name,
                    epsilon=epsilon,
                    free=max(noise[0]),
                    paid=max(noise[1]),
                    less_free=average(evidence, pairs),
                )


def probe_table(found: Mapping[str, Evidence]) -> str:
    """What the private probe takes of the budget, and what that costs; empty where nothing was trained."""
    rows = [
        [
            TITLES.get(cost.name, cost.name),
            f"{cost.epsilon:g}",
            f"{cost.free:.3f}",
            f"{cost.paid:.3f}",
            difference(cost.less_free),
            verdict(cost.less_free),
        ]
        for cost in probe_costs(found)
    ]
    titles = ["sweep", "epsilon", "noise multiplier, no probe", "with probes", "probe less released, points", ""]
    return table(titles, rows, right=range(1, 5)) if rows else ""


def averages_table(found: Mapping[str, Evidence]) -> str:
    """Every comparison of schedulers over every sweep that varies them."""
    rows = [
        [narrowed(TITLES.get(name, name), model), comparison.said, f"{value.n}", difference(value), verdict(value)]
        for name in SUBJECTS
        if (evidence := found.get(name)) is not None
        for comparison, model, value in scheduler_averages(evidence)
        if value.n
    ]
    titles = ["sweep", "comparison", "seeds", "difference, points", ""]
    return table(titles, rows, right=(2, 3)) if rows else "No scheduler has been compared yet."
