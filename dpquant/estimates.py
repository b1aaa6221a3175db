"""The question behind ``dpquant estimate``: one step of a model on several chips in several formats, and why so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emulation.errors import InputError
from emulation.formats import get_format
from hwmodels.cost import Estimate, StepModel
from hwmodels.dpsgd import CLIPPINGS
from hwmodels.memory import footprint, memory_parts
from hwmodels.planner import PrecisionPlan, fraction, gains
from hwmodels.planner import fastest as fastest_plan
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload

_BATCH_LIMIT = 2**24


@dataclass(frozen=True, kw_only=True)
class Row:
    """One chip in one format: what a step costs with the layers that were asked for in that format."""

    hardware: str
    format: str
    estimate: Estimate
    plan: PrecisionPlan
    quantizable: int
    baseline: Estimate
    """The same step with nothing quantized."""
    memory_parts: Mapping[str, float]
    """What peak memory consists of, in bytes."""
    baseline_memory_parts: Mapping[str, float]
    """Of the same step with nothing quantized."""
    max_speedup: float
    """With only those layers quantized that gain by it."""
    reached: bool | None
    """Whether the target speedup is met; None where none was asked for."""
    slower_layers: tuple[str, ...]
    """Layers of the plan that the format slows down."""
    falls_back_to: str | None
    memory_bytes: float
    """The chip's capacity."""
    largest_batch: int | None
    """That fits into memory at once; None where memory is no limit."""
    physical_batch_size: int
    """Examples of one pass."""
    power_limit_w: float | None
    usd_per_hour: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the step's peak memory is within the chip's."""
        return self.estimate.peak_memory_bytes <= self.memory_bytes

    @property
    def usd_per_million_examples(self) -> float | None:
        """Price of a million examples at the modelled time."""
        if self.usd_per_hour is None:
            return None
        return self.usd_per_hour / 3600 * self.estimate.step_s / self.estimate.batch_size * 1e6

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        estimate = self.estimate
        return {
            "hardware": self.hardware,
            "format": self.format,
            "basis": estimate.basis,
            "batch_size": estimate.batch_size,
            "step_s": estimate.step_s,
            "step_low_s": estimate.step_band_s and estimate.step_band_s[0],
            "step_high_s": estimate.step_band_s and estimate.step_band_s[1],
            "baseline_step_s": estimate.baseline_s,
            "speedup": estimate.speedup,
            "max_speedup": self.max_speedup,
            "energy_joules": estimate.energy_joules,
            "baseline_energy_joules": estimate.baseline_energy_joules,
            "peak_memory_bytes": estimate.peak_memory_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "physical_batch_size": self.physical_batch_size,
            "bound": estimate.bound,
            "native": estimate.native,
            "falls_back_to": self.falls_back_to,
            "quantized": len(self.plan),
            "quantizable": self.quantizable,
            "slower_layers": list(self.slower_layers),
            "reached": self.reached,
            "power_limit_w": self.power_limit_w,
            "usd_per_million_examples": self.usd_per_million_examples,
            "phases": dict(estimate.phases),
            "layers": dict(estimate.layers),
            "memory_parts": dict(self.memory_parts),
            "notes": list(estimate.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, for every row alike.

    Args:
        share: quantize this share of the layers, those that gain most first; None: all of them.
        target_speedup: quantize as few layers as meet it, those that gain most first; None: as ``share`` says.
        prices: hardware name -> US dollars per hour.
        options: of the cost model: ``basis``, ``method``, ``clipping``, ``framework``, ...
    """

    share: float | None = None
    target_speedup: float | None = None
    prices: Mapping[str, float]
    options: Mapping[str, Any]


def rows(
    workload: Workload, profiles: Sequence[HardwareProfile], formats: Mapping[str, Sequence[str]], asked: Asked
) -> Iterator[Row]:
    """A row per profile and format (``formats``: profile name -> formats)."""
    for profile in profiles:
        model = fitting_model(workload, profile, asked.options, formats[profile.name])
        baseline = model.estimate({})
        for name in formats[profile.name]:
            yield _row(model, baseline, get_format(name).name, asked)


def fitting_model(
    workload: Workload, profile: HardwareProfile, options: Mapping[str, Any], formats: Sequence[str] = ()
) -> StepModel:
    """The step on a chip; a batch too large for its memory goes through it in as few passes as fit.

    They fit in full precision and with all layers in any of ``formats``. A ``physical_batch_size`` among the options
    stands as it is.
    """
    model = StepModel(workload, profile, **options)
    if options.get("physical_batch_size") is not None:
        return model
    plans = [{}, *(dict.fromkeys(workload.quantizable, name) for name in formats)]
    most = min(_BATCH_LIMIT if batch is None else batch for batch in (largest_batch(model, plan) for plan in plans))
    if not 0 < most < workload.batch_size:
        return model
    return StepModel(workload, profile, **{**options, "physical_batch_size": most})


def _row(model: StepModel, baseline: Estimate, name: str, asked: Asked) -> Row:
    workload, profile = model.workload, model.profile
    full = name == get_format(model.options.baseline).name  # nothing is quantized
    gain = {} if full else gains(model, profile.rate(name).format)
    order = sorted(gain, key=lambda layer: -gain[layer])
    best = {} if full else dict.fromkeys(fastest_plan(model, [profile.rate(name).format]), name)
    max_speedup = baseline.step_s / model.step_s(best)
    plan = _plan(model, order, gain, name, best, asked)
    estimate = model.estimate(plan)
    target = asked.target_speedup
    rate = profile.rate(name)
    return Row(
        hardware=profile.name,
        format=name,
        estimate=estimate,
        plan=plan,
        quantizable=len(workload.quantizable),
        baseline=baseline,
        memory_parts=memory_parts(workload, model.plan_formats(plan), model.options),
        baseline_memory_parts=memory_parts(workload, {}, model.options),
        max_speedup=max_speedup,
        reached=None if target is None else estimate.speedup >= target * (1 - 1e-12),
        slower_layers=tuple(layer for layer in workload.quantizable if layer in plan and gain[layer] < 0),
        falls_back_to=rate.falls_back_to,
        memory_bytes=profile.memory.capacity_bytes,
        largest_batch=largest_batch(model, plan),
        physical_batch_size=model.options.passes(workload.batch_size)[1],
        power_limit_w=profile.power.limit_w if profile.power else None,
        usd_per_hour=asked.prices.get(profile.name),
    )


def _plan(
    model: StepModel,
    order: Sequence[str],
    gain: Mapping[str, float],
    name: str,
    best: Mapping[str, str],
    asked: Asked,
) -> PrecisionPlan:
    if asked.target_speedup is not None:
        chosen: dict[str, str] = {}
        budget = model.step_s({}) / asked.target_speedup
        for layer in order:
            if model.step_s(chosen) <= budget or gain[layer] <= 0:
                break
            chosen[layer] = name
        # where launches bound the step, layers that each gain can lose together: then the fastest are taken
        return PrecisionPlan(formats=chosen if model.step_s(chosen) <= max(budget, model.step_s(best)) else best)
    return fraction(order, name, 1.0 if asked.share is None else asked.share)


def largest_batch(model: StepModel, plan: Mapping[str, str]) -> int | None:
    """The most examples of one pass that fit into the chip's memory: 0 for none, None where that is beyond 2^24."""
    needed = footprint(model.workload, model.plan_formats(plan), replace(model.options, physical_batch_size=None))
    most = needed.most_examples(model.profile.memory.capacity_bytes)
    return None if most >= _BATCH_LIMIT else most


def fastest(found: Sequence[Row]) -> int | None:
    """Index of the row with the shortest step among those that fit into memory; calibrated ones go before peak ones."""
    fitting = [(row.estimate.basis != "calibrated", row.estimate.step_s, i) for i, row in enumerate(found) if row.fits]
    return min(fitting)[2] if fitting else None


def explain(row: Row, profile: HardwareProfile, workload: Workload, asked: Asked) -> list[str]:
    """What a row's step goes to, why the format gains or loses, and which single change would help most."""
    estimate, base = row.estimate, row.baseline
    total = estimate.step_s
    top = sorted(estimate.phases.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{phase.replace('_', ' ')} {100 * s / total:.0f} %" for phase, s in top if s > 0)
    lines = [f"{row.hardware}, {row.format}: mostly bound by {estimate.bound}; {parts}."]
    if row.plan:
        lines.append(_why(row, estimate, base))
    if row.slower_layers:
        lines.append(
            f"{len(row.slower_layers)} of {len(row.plan)} layers are slower in {row.format} than in full precision "
            f"(such as {row.slower_layers[0]}); "
            + (f"without them the speedup is {row.max_speedup:.2f}x." if row.max_speedup > 1 else "none is faster.")
        )
    changes = sorted(_changes(row, profile, workload, asked), reverse=True)
    if changes and changes[0][0] > 1.01:
        lines.append(f"Most would help: {changes[0][1]}, {changes[0][0]:.2f}x faster per example.")
    else:
        lines.append("No single change of clipping, framework, batch size or choice of layers would help by over 1 %.")
    return lines


def _why(row: Row, estimate: Estimate, base: Estimate) -> str:
    """Where the format gains and where it loses, phase by phase."""
    change = {phase: base.phases[phase] - s for phase, s in estimate.phases.items()}
    saved = sum(s for s in change.values() if s > 0)
    lost = {phase.replace("_", " "): -s for phase, s in change.items() if s < 0}
    text = f"Against {1e3 * base.step_s:.3g} ms in full precision it saves {1e3 * saved:.3g} ms"
    if lost:
        worst = max(lost, key=lambda phase: lost[phase])
        text += f" and adds {1e3 * sum(lost.values()):.3g} ms, most of it in {worst}"
    verdict = f"{estimate.speedup:.2f}x"
    if row.falls_back_to:
        verdict += f" ({profile_has_no(row)})"
    return f"{text}: {verdict}."


def profile_has_no(row: Row) -> str:
    """Why a format that is computed in another one cannot gain."""
    return f"{row.hardware} computes {row.format} in {row.falls_back_to}"


def _changes(row: Row, profile: HardwareProfile, workload: Workload, asked: Asked) -> Iterator[tuple[float, str]]:
    """(how many times faster per example, what to change) for every single change that the model knows."""
    per_example = row.estimate.step_s / row.estimate.batch_size

    def gain(work: Workload, **options: Any) -> float:
        model = fitting_model(work, profile, {**asked.options, **options})
        return per_example / (model.step_s(model.plan_formats(row.plan)) / work.batch_size)

    options = StepModel(workload, profile, **asked.options).options
    if options.private:
        for clipping in CLIPPINGS:
            if clipping != options.clipping:
                yield gain(workload, clipping=clipping), f"--clipping {clipping}"
    if options.eager:
        yield gain(workload, framework="fused"), "fused kernels (--framework fused)"
    larger = 4 * workload.batch_size
    if row.largest_batch is None or larger <= row.largest_batch:  # beyond it the passes repeat and nothing is gained
        yield gain(workload.at(larger)), f"a batch of {larger}"
    if row.slower_layers:
        every = len(row.slower_layers) == len(row.plan)
        change = "full precision for all layers" if every else "quantizing only the layers that gain"
        yield row.max_speedup / row.estimate.speedup, change


def check_targets(share: float | None, target_speedup: float | None) -> None:
    """Raise InputError unless at most one of the two is given, and in range."""
    if share is not None and target_speedup is not None:
        raise InputError("give one of --fraction and --target-speedup")
    if share is not None and not 0 <= share <= 1:
        raise InputError(f"--fraction {share} must be between 0 and 1")
    if target_speedup is not None and not 0 < target_speedup < float("inf"):
        raise InputError(f"--target-speedup {target_speedup} must be a number above 0", hint="such as 1.5")
