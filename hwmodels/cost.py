"""Time, energy and peak memory of one training step under a precision plan, before any device is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from emulation.errors import InputError, suggestion
from emulation.formats import get_format
from hwmodels.gemm import kernel_of, measured_kernel
from hwmodels.gemm_arrays import Array
from hwmodels.memory import peak_memory_bytes
from hwmodels.pricing import BOUNDS, LAUNCH, PriceList, Pricer
from hwmodels.profile import BASES, Basis, HardwareProfile
from hwmodels.step import PHASE, PHASES, StepOptions
from hwmodels.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One training step on one chip under one plan.

    Attributes:
        hardware: name of the profile.
        basis: ``peak`` or ``calibrated``: which figures all the times rest on.
        batch_size: examples of the step.
        step_s: seconds of the step; the sum of ``phases`` and of ``layers``.
        baseline_s: seconds of the same step (method, clipping, framework) with every layer in the baseline format.
        speedup: ``baseline_s / step_s``.
        step_band_s: the step's seconds at the lower and the upper end of the calibration's error band, all products off
            the same way; None on the peak basis, which has no error to speak of and no claim to be reached.
        energy_joules, baseline_energy_joules: of the board, idle power included; None where its power is not known.
        peak_memory_bytes: parameters, gradients, optimizer state, what is kept for the backward pass and for clipping.
        bound: what most of the time goes to: ``compute``, ``memory`` or ``launch``.
        native: every format of the plan is one the chip's matrix unit takes.
        phases: seconds per phase (``hwmodels.step.PHASES``).
        layers: seconds per layer.
        notes: formats timed as another or fallen back from, memory exceeded, and what the trace could not count.
    """

    hardware: str
    basis: Basis
    batch_size: int
    step_s: float
    baseline_s: float
    speedup: float
    step_band_s: tuple[float, float] | None
    energy_joules: float | None
    baseline_energy_joules: float | None
    peak_memory_bytes: int
    bound: str
    native: bool
    phases: Mapping[str, float]
    layers: Mapping[str, float]
    notes: tuple[str, ...] = ()


class StepModel:
    """The price of one step on one chip for every plan over the same formats.

    Args:
        workload: the step.
        profile: the chip.
        basis: ``calibrated`` or ``peak``; None takes ``calibrated`` where the profile has a calibration.
        options: fields of ``StepOptions``.

    Raises:
        InputError: an unknown option, or ``calibrated`` on a chip without a calibration.
    """

    def __init__(
        self, workload: Workload, profile: HardwareProfile, *, basis: Basis | None = None, **options: Any
    ) -> None:
        self.workload, self.profile = workload, profile
        self.basis: Basis = checked_basis(profile, basis)
        self.options = step_options(options)
        self.names = tuple(layer.name for layer in workload.layers)
        self.index = {name: index for index, name in enumerate(self.names)}
        self._quantizable = frozenset(workload.quantizable)
        self._baseline_name = get_format(self.options.baseline).name
        self._pricer = Pricer(workload, profile, self.options, self.basis)
        self._lists: dict[str | None, PriceList] = {}
        hooked = sum(layer.parameters > 0 for layer in workload.layers) if self.options.private else 0
        self._hooks_s = (
            hooked * profile.eager.layer_s(self.options.clipping) * self.options.passes(workload.batch_size)[0]
        )

    def prices(self, format_name: str | None) -> PriceList:
        """Prices with every quantizable layer in a format (canonical name), or in the baseline for None."""
        if format_name not in self._lists:
            self._lists[format_name] = self._pricer.prices(format_name)
        return self._lists[format_name]

    def plan_formats(self, plan: Mapping[str, str]) -> dict[str, str]:
        """The plan with canonical format names, without layers in the baseline's own: those are not quantized.

        Raises:
            InputError: a layer that cannot be quantized, or a format that the chip has no rate for.
        """
        canonical = {fmt: self.profile.rate(fmt).format for fmt in set(plan.values())}
        if not plan.keys() <= self._quantizable:
            name = next(name for name in plan if name not in self._quantizable)
            raise InputError(
                f"layer {name!r} of the plan is not quantizable",
                hint=suggestion(name, self.workload.quantizable) if self.workload.quantizable else None,
            )
        baseline = self.profile.rate(self.options.baseline).format
        if canonical.keys() == set(canonical.values()) and baseline not in canonical:
            return dict(plan)
        return {name: canonical[fmt] for name, fmt in plan.items() if canonical[fmt] != baseline}

    def mixed(self, plan: Mapping[str, str]) -> PriceList:
        """The columns of a plan with canonical names, put together from the price lists."""
        base = self.prices(None)
        formats = set(plan.values())
        if len(formats) == 1 and len(plan) == len(self._quantizable):
            return self.prices(formats.pop())
        columns = {fmt: [self.index[name] for name, chosen in plan.items() if chosen == fmt] for fmt in formats}
        return base.with_columns({fmt: self.prices(fmt) for fmt in formats}, columns)

    def waits(self, device_s: Array, kernels: Array) -> Array:
        """Seconds that the device waits for an eager host, spread over the layers by their kernels."""
        if not self.options.eager or not kernels.sum():
            return np.zeros_like(kernels)
        eager, device = self.profile.eager, float(device_s.sum())
        if self.options.framework == "graphs":
            waits_s = eager.replay_s
        else:
            host_s = eager.step_s + eager.kernel_s * float(kernels.sum()) + self._hooks_s
            waits_s = eager.step_seconds(host_s, device) - device
        shared: Array = waits_s * kernels / kernels.sum()
        return shared

    def step_s(self, plan: Mapping[str, str]) -> float:
        """Seconds of the step under a plan with canonical format names."""
        return self._spent(self.mixed(plan))[0]

    def joules(self, plan: Mapping[str, str]) -> float | None:
        """Joules of the step under a plan with canonical format names; None where the chip's power is not known."""
        return self._spent(self.mixed(plan))[1]

    def _spent(self, found: PriceList) -> tuple[float, float | None]:
        """Seconds and joules, those included that the device waits for its host."""
        device = found.seconds.sum(0)
        waits_s = float(self.waits(device, found.kernels).sum()) if self.options.eager else 0.0
        power = self.profile.power
        joules = None if found.joules is None or power is None else float(found.joules.sum()) + power.idle_w * waits_s
        return float(device.sum()) + waits_s, joules

    @cached_property
    def _baseline(self) -> tuple[float, float | None]:
        """Seconds and joules with nothing quantized."""
        return self._spent(self.prices(None))

    def estimate(self, plan: Mapping[str, str]) -> Estimate:
        """The whole account of a plan."""
        formats = self.plan_formats(plan)
        found, (baseline_s, baseline_joules) = self.mixed(formats), self._baseline
        layers, totals = found.seconds.sum(0), found.totals()
        step_s, joules = self._spent(found)
        if self.options.eager:
            waits = self.waits(layers, found.kernels)
            layers, waits_s = layers + waits, float(waits.sum())
            totals.seconds[PHASE["launch"]] += waits_s
            totals.bounds[LAUNCH] += waits_s
        memory = peak_memory_bytes(self.workload, formats, self.options)
        low, high = totals.spread.tolist()
        return Estimate(
            hardware=self.profile.name,
            basis=self.basis,
            batch_size=self.workload.batch_size,
            step_s=step_s,
            baseline_s=baseline_s,
            speedup=baseline_s / step_s,
            step_band_s=None if self.basis == "peak" else (step_s + low, step_s + high),
            energy_joules=joules,
            baseline_energy_joules=baseline_joules,
            peak_memory_bytes=memory,
            bound=BOUNDS[int(totals.bounds.argmax())],
            native=all(self.profile.rate(fmt).native for fmt in set(formats.values())),
            phases=dict(zip(PHASES, totals.seconds.tolist(), strict=True)),
            layers=dict(zip(self.names, layers.tolist(), strict=True)),
            notes=self._notes(formats, memory, int(totals.outside)),
        )

    def _notes(self, formats: Mapping[str, str], memory: int, outside: int) -> tuple[str, ...]:
        notes, profile = [], self.profile
        used = [profile.rate(name) for name in dict.fromkeys((*dict.fromkeys(formats.values()), self._baseline_name))]
        for rate in used:
            if rate.falls_back_to:
                notes.append(
                    f"{rate.format} falls back to {rate.falls_back_to} on {profile.name}: emulated at its rate"
                )
            elif rate.timed_as != rate.format:
                notes.append(f"{rate.format} is timed as {rate.timed_as} on {profile.name}")
        if memory > profile.memory.capacity_bytes:
            capacity = profile.memory.capacity_bytes
            notes.append(f"needs {memory / 1e9:.1f} GB of memory, {profile.name} has {capacity / 1e9:.1f} GB")
        if self.basis == "calibrated" and profile.calibration is not None:
            if profile.calibrated_on != profile.name:
                notes.append(f"{profile.name} has no measurements of its own: calibrated on {profile.calibrated_on}")
            for rate in used:
                if not measured_kernel(rate, profile.calibration):
                    kernel = kernel_of(rate, profile.calibration)
                    notes.append(f"{rate.timed_as} was not measured: its own peak, efficiencies of {kernel} kernels")
            if outside:
                notes.append(f"{outside} products of the step have sizes outside those that the model was fitted on")
        return (*notes, *(f"not counted: {what}" for what in self.workload.uncounted))


def step_options(options: Mapping[str, Any]) -> StepOptions:
    """``StepOptions`` from keywords, unknown ones refused with a hint."""
    allowed = tuple(StepOptions.__dataclass_fields__)
    for name in options:
        if name not in allowed:
            raise InputError(f"unknown option {name}={options[name]!r}", hint=suggestion(name, allowed))
    return StepOptions(**options)


def checked_basis(profile: HardwareProfile, basis: str | None) -> Basis:
    """The basis to use: the one asked for, or the calibrated one where the profile has a calibration."""
    if basis is None:
        return "calibrated" if profile.calibration is not None else "peak"
    if basis not in BASES:
        raise InputError(f"unknown basis={basis!r}", hint=suggestion(basis, BASES))
    if basis == "calibrated" and profile.calibration is None:
        raise InputError(
            f"{profile.name} has no calibration", hint="basis='peak' gives the roofline on published peaks"
        )
    return "calibrated" if basis == "calibrated" else "peak"


def estimate(
    workload: Workload,
    plan: Mapping[str, str],
    profile: HardwareProfile,
    *,
    method: str = "dp-sgd",
    clipping: str = "bookkeeping",
    baseline: str = "bfloat16",
    basis: Basis | None = None,
    framework: str = "fused",
    optimizer: str = "sgd",
    physical_batch_size: int | None = None,
) -> Estimate:
    """Model one training step.

    A quantized layer's three products, and the products of its per-example norms, run at its format's rate; its
    operands are quantized first. Everything else runs in the baseline format, clipping and noise in float32.

    Args:
        workload: from ``trace``.
        plan: layer name -> format; the layers that are not in it run in the baseline format.
        profile: the chip.
        method: ``dp-sgd`` or ``sgd``.
        clipping: ``bookkeeping``, ``hooks``, ``ghost`` or ``mixed``.
        baseline: format of what is not quantized.
        basis: ``peak``: roofline on published peaks, no fixed costs; ``calibrated``: fitted to measurements. None:
            calibrated where the profile has a calibration.
        framework: ``fused``: fused kernels; ``eager``: a kernel per operation, launched by a Python host; ``graphs``:
            the same kernels, recorded once and replayed.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        physical_batch_size: most examples of one pass; None: the whole batch at once.

    Raises:
        InputError: an unknown layer, format, option or basis, or a format that the chip has no rate for.
    """
    model = StepModel(
        workload,
        profile,
        basis=basis,
        method=method,
        clipping=clipping,
        baseline=baseline,
        framework=framework,
        optimizer=optimizer,
        physical_batch_size=physical_batch_size,
    )
    return model.estimate(plan)
