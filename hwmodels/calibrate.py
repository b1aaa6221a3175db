"""Measuring the machine at hand into a hardware profile: times, a fit, its held-out error, and the YAML."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emulation.errors import InputError
from hwmodels import measure
from hwmodels.calibration import (
    KERNELS,
    GemmCalibration,
    KernelCalibration,
    PowerCalibration,
    QuantizeCalibration,
    calibration_yaml,
)
from hwmodels.fit import FEWEST_ROWS, fit_kernel, fit_quantize, gemm_rows
from hwmodels.fit_power import PowerRows, fit_power
from hwmodels.gemm import GemmRates, kernel_seconds
from hwmodels.nvml import PowerMeter, power_meter
from hwmodels.power import moved_bytes
from hwmodels.profile import HardwareProfile, check, list_profiles, load_profile, stored_bytes
from hwmodels.validate import Measurement

Progress = Callable[[str, float], None]
"""Called with what is being measured and the fraction of the budget that is spent."""

SHAPES_LIMIT = 2000  # per kernel: on an H200 more would lower the held-out error by a few hundredths of itself
ENERGY_SIZES = (4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system and torch say of the device, and what was measured before any product was.

    ``base`` is the shipped profile of this chip, whose published numbers stand; None for a chip that has none.
    """

    device: torch.device
    title: str
    units: int
    capacity_bytes: float
    cache_bytes: float
    bandwidth_bytes_per_s: float
    launch_s: float
    peaks: Mapping[str, float]
    base: HardwareProfile | None
    limit_w: float | None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A measured machine.

    Attributes:
        profile_yaml: the profile, ready to be written; ``check`` accepts it.
        rows: per kernel ``format``, ``n`` (shapes), and held-out ``mape_percent``, ``median_percent``,
            ``rank_correlation``.
        measurements: what was timed: ``hardware validate`` reads the like.
        notes: what was not measured, and why.
    """

    profile_yaml: str
    rows: tuple[dict[str, Any], ...]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]


def calibrate(
    device: str | None = None,
    *,
    base: str | None = None,
    budget_s: float = 200.0,
    progress: Progress = lambda label, fraction: None,
) -> Calibrated:
    """Measure a device and fit its calibration; the profile extends the shipped one of the chip, if there is one.

    Args:
        device: ``cuda``, ``cuda:1`` or ``cpu``; default: CUDA where there is any.
        base: name of the profile to extend; default: the shipped one whose name is in the device's.
        budget_s: of measuring; fitting takes some seconds more.
        progress: called as it goes.

    Raises:
        InputError: no such device, or nothing could be measured in the budget.
    """
    chosen = _device(device)
    begin, before = time.perf_counter(), measure.waiting()
    machine = _machine(chosen, base, progress)
    available = measure.kernels_of(chosen)
    notes = [f"{kernel}: not measured ({why})" for kernel, why in available.items() if why is not None]
    kernels = [kernel for kernel, why in available.items() if why is None and _has_rate(machine, kernel)]
    meter, why = _meter(chosen)
    if meter is None:
        notes.append(f"energy: not measured ({why})")
    measurements: list[Measurement] = []
    for index, kernel in enumerate(kernels):
        until = begin + budget_s * (0.15 + 0.75 * (index + 1) / len(kernels))
        measurements += _timed(kernel, machine, begin, until, budget_s, progress)
    notes += _busy(*(now - then for now, then in zip(measure.waiting(), before, strict=True)))
    machine = replace(machine, peaks=_highest(machine.peaks, measurements))
    found, rows = _fitted(machine, kernels, measurements, progress)
    power = None
    if meter is not None and machine.limit_w is not None:
        powered, power = _energy(machine, found, meter, progress)
        measurements += powered
    calibration = GemmCalibration(kernels=found, power=power)
    progress("done", 1.0)
    return Calibrated(
        profile_yaml=_profile_yaml(machine, calibration),
        rows=tuple(rows),
        measurements=tuple(measurements),
        notes=tuple(notes),
    )


def measurements_csv(measurements: Sequence[Measurement]) -> str:
    """Measurements as the table that ``validate`` reads."""
    lines = ["gemm_dtype,m,n,k,latency_us,power,quantization"]
    for row in measurements:
        watts = "" if row.power_w is None else f"{row.power_w:.1f}"
        passes = "included" if row.quantized else "excluded"
        lines.append(f"{row.gemm_dtype},{row.m},{row.n},{row.k},{row.seconds * 1e6:.4f},{watts},{passes}")
    return "\n".join(lines) + "\n"


def _busy(ran_s: float, waited_s: float) -> list[str]:
    """What to say where other work took the processor while times were measured."""
    share = waited_s / max(ran_s + waited_s, 1e-9)
    if share < 0.1:
        return []
    return [
        f"the machine was busy: {share:.0%} of the time went by waiting for a processor; measure again when it is "
        "idle, or with fewer threads (OMP_NUM_THREADS=1)"
    ]


def _device(name: str | None) -> torch.device:
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"device={wanted!r} is not a device", hint="cuda, cuda:1, cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"device={wanted!r} cannot be measured", hint="cuda or cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device={wanted!r} is not there", hint=f"{count} CUDA devices are visible")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device wants the index said
        torch.cuda.set_device(device)
    return device


def _machine(device: torch.device, base: str | None, progress: Progress) -> Machine:
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    title = properties.name if properties else _cpu_name()
    profile = load_profile(base) if base else _shipped(title) if cuda else None
    progress("copies and launches", 0.0)
    bandwidth = measure.copy_bytes_per_s(device, measure.ONE_GIB if cuda else measure.ONE_GIB // 8)
    launch_s = measure.launch_seconds(device)
    progress("peak rates", 0.05)
    sizes = (4096, 8192) if cuda else (512, 1024)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peaks = {name: measure.best_flops_per_s(dtype, device, sizes) for name, dtype in dtypes.items()}
    if properties is not None and profile is None:
        for kernel, why in measure.kernels_of(device).items():
            if why is None and kernel in ("fp8", "nvfp4"):
                seconds = measure.seconds_per_call(
                    measure.gemm_calls(kernel, 8192, 8192, 8192, device, 0.0), device, 0.3
                )
                peaks[KERNELS[kernel]] = 2.0 * 8192**3 / seconds
    return Machine(
        device=device,
        title=title,
        units=properties.multi_processor_count if properties else torch.get_num_threads(),
        capacity_bytes=properties.total_memory if properties else _memory_bytes(),
        cache_bytes=properties.L2_cache_size if properties else _cpu_cache_bytes(),
        bandwidth_bytes_per_s=bandwidth,
        launch_s=launch_s,
        peaks=peaks,
        base=profile,
        limit_w=profile.power.limit_w if profile is not None and profile.power is not None else None,
    )


def _shipped(title: str) -> HardwareProfile | None:
    """The profile whose name is in a device's name, the longest of them: ``gb200`` before ``b200``."""
    plain = re.sub(r"[^a-z0-9]", "", title.lower())
    names = [name for name in list_profiles() if re.search(name.replace("_", "") + r"(?!\d)", plain)]
    return load_profile(max(names, key=len)) if names else None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else "CPU"


def _memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _cpu_cache_bytes() -> float:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    factor = {"K": 1 << 10, "M": 1 << 20}
    return max(
        (float(size[:-1]) * factor.get(size[-1], 1) for size in sizes if size[:-1].isdigit()), default=32.0 * (1 << 20)
    )


def _has_rate(machine: Machine, kernel: str) -> bool:
    if machine.base is None:
        return KERNELS[kernel] in machine.peaks
    rate = machine.base.formats.get(KERNELS[kernel])
    return rate is not None and rate.falls_back_to is None


def _rates(machine: Machine, kernel: str) -> GemmRates:
    base, name = machine.base, KERNELS[kernel]
    return GemmRates(
        peak_flops_per_s=base.rate(name).peak_flops_per_s if base else machine.peaks[name],
        reference_flops_per_s=base.rate("bfloat16").peak_flops_per_s if base else machine.peaks["bfloat16"],
        bandwidth_bytes_per_s=base.memory.bandwidth_bytes_per_s if base else machine.bandwidth_bytes_per_s,
        cache_bytes=(base.cache_bytes or 0.0) if base else machine.cache_bytes,
        units=base.units if base else machine.units,
        operand_bytes=stored_bytes(name),
    )


def _timed(
    kernel: str, machine: Machine, begin: float, until: float, budget_s: float, progress: Progress
) -> list[Measurement]:
    cuda = machine.device.type == "cuda"
    largest = (16384, 16384, 16384) if cuda else (2048, 2048, 2048)
    heaviest = _rates(machine, kernel).peak_flops_per_s * (0.01 if cuda else 0.1)
    rows: list[Measurement] = []
    for m, n, k in measure.shapes(largest, heaviest, measure.MULTIPLES[kernel]):
        calls = measure.gemm_calls(kernel, m, n, k, machine.device, machine.cache_bytes)
        seconds = measure.seconds_per_call(calls, machine.device, 0.05)
        rows.append(_product(kernel, m, n, k, seconds))
        now = time.perf_counter()
        progress(f"{kernel} products", min(0.95, (now - begin) / budget_s))
        if len(rows) >= SHAPES_LIMIT or (now > until and len(rows) >= FEWEST_ROWS):
            break
    return rows


def _product(kernel: str, m: int, n: int, k: int, seconds: float, power_w: float | None = None) -> Measurement:
    """A product as it is timed here: of operands that are in their format already."""
    return Measurement(device=None, gemm_dtype=kernel, m=m, n=n, k=k, seconds=seconds, power_w=power_w, quantized=False)


def _highest(peaks: Mapping[str, float], measurements: Sequence[Measurement]) -> dict[str, float]:
    """Peaks, raised to the rates of products that were faster."""
    found = dict(peaks)
    for row in measurements:
        name = KERNELS[row.gemm_dtype]
        if name in found:
            found[name] = max(found[name], 2.0 * row.m * row.n * row.k / row.seconds)
    return found


def _fitted(
    machine: Machine, kernels: Sequence[str], measurements: Sequence[Measurement], progress: Progress
) -> tuple[dict[str, KernelCalibration], list[dict[str, Any]]]:
    found: dict[str, KernelCalibration] = {}
    rows = []
    passes = _passes(machine) if "fp8" in kernels else None
    for kernel in kernels:
        progress(f"fitting {kernel}", 0.95)
        chosen = [row for row in measurements if row.gemm_dtype == kernel]
        table = gemm_rows([(row.m, row.n, row.k) for row in chosen], [row.seconds for row in chosen])
        fitted = fit_kernel(table, _rates(machine, kernel), source=_source(machine))
        if kernel != "bfloat16":
            fitted = replace(fitted, quantize=passes if kernel == "fp8" else _one_pass(machine))
        found[kernel] = fitted
        held = fitted.fitted
        rows.append(
            {
                "format": kernel,
                "n": held.rows,
                "mape_percent": held.held_out_mape_percent,
                "median_percent": held.held_out_median_percent,
                "rank_correlation": held.held_out_rank_correlation,
            }
        )
    return found, rows


def _passes(machine: Machine) -> QuantizeCalibration:
    """The two passes of dynamic fp8 quantization: the largest value, then the cast."""
    bandwidth = _rates(machine, "fp8").bandwidth_bytes_per_s
    sizes = [1 << power for power in range(10, 29)]
    amax, cast = measure.passes(machine.device, sizes, 0.05)
    amax_s, amax_efficiency, _ = fit_quantize(sizes, amax, 2.0, bandwidth)
    cast_s, cast_efficiency, _ = fit_quantize(sizes, cast, 3.0, bandwidth)
    return QuantizeCalibration(
        amax_s=amax_s,
        amax_bandwidth_efficiency=amax_efficiency,
        cast_s=cast_s,
        cast_bandwidth_efficiency=cast_efficiency,
    )


def _one_pass(machine: Machine) -> QuantizeCalibration:
    """Block formats, for which torch has no cast of one kernel: a fused one, at the speed of a copy."""
    efficiency = machine.bandwidth_bytes_per_s / _rates(machine, "bfloat16").bandwidth_bytes_per_s
    return QuantizeCalibration(
        amax_s=0.0,
        amax_bandwidth_efficiency=None,
        cast_s=float(f"{machine.launch_s:.4g}"),
        cast_bandwidth_efficiency=float(f"{efficiency:.4g}"),
    )


def _meter(device: torch.device) -> tuple[PowerMeter | None, str | None]:
    if device.type != "cuda":
        return None, "no energy counter"
    try:
        return power_meter(str(torch.cuda.get_device_properties(device).uuid)), None
    except InputError as error:
        return None, error.message


def _energy(
    machine: Machine, kernels: Mapping[str, KernelCalibration], meter: PowerMeter, progress: Progress
) -> tuple[list[Measurement], PowerCalibration]:
    """Watts of large, of thin and of small products of every kernel, and the fit."""
    parts, rows, least = [], [], float("inf")
    limit_w = meter.limit_w()
    for kernel in kernels:
        if kernel == "fp8_block" and "fp8" in kernels:
            continue
        rates = _rates(machine, kernel)
        found = []
        for n in ENERGY_SIZES:
            for m in (16, 256, 2048, 8192):
                progress(f"{kernel} energy", 0.96)
                calls = measure.gemm_calls(kernel, m, n, n, machine.device, machine.cache_bytes)
                drawn, seconds = measure.watts(calls, machine.device, meter)
                found.append((m, n, n, seconds, drawn))
                rows.append(_product(kernel, m, n, n, seconds, drawn))
        m_, n_, k_, seconds_, watts_ = np.array(found, dtype=float).T
        moved = [moved_bytes(int(m), int(n), int(k), kernels[kernel], rates, quantize=False) for m, n, k, _, _ in found]
        least = min(least, float(watts_.min()))
        predicted = [kernel_seconds(m, n, k, kernels[kernel], rates) for m, n, k, _, _ in found]
        parts.append(
            PowerRows(
                kernel=kernel,
                flops=2 * m_ * n_ * k_,
                moved=np.array(moved),
                seconds=seconds_,
                predicted_s=np.array(predicted),
                watts=watts_,
                fixed_s=kernels[kernel].fixed_s,
            )
        )
    # the thinnest product's watts bound idle power from above
    power = fit_power(parts, limit_w=limit_w, floor_w=least / 1.6, source=_source(machine))
    return rows, power


def _source(machine: Machine) -> str:
    cuda = f", CUDA {torch.version.cuda}" if machine.device.type == "cuda" else ""
    when = time.strftime("%Y-%m-%d")
    return f"dpquant hardware calibrate, {machine.title}, torch {torch.__version__}{cuda}, {when}"


def _profile_yaml(machine: Machine, calibration: GemmCalibration) -> str:
    """The profile as text; what the lints find in measured numbers is accepted by name, as nobody mistyped them."""
    title = machine.title.replace("\\", "").replace('"', "")
    source = _source(machine).replace("\\", "").replace('"', "")
    head = [f'title: "{title}, as measured"', "sources:", f'  MEASURED: {{title: "{source}"}}']
    base = [f"extends: {machine.base.name}"] if machine.base is not None else _own_numbers(machine)
    text = "\n".join([*head, *base]) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.yaml"
        file.write_text(text + calibration_yaml(calibration))
        found = {match[1] for error in check(file) if (match := re.search(r"\[(\w+)\]$", error.message))}
    accepted = [f'  {name}: "measured, or accepted in the profile that this one extends"' for name in sorted(found)]
    return text + "\n".join(["accepted:", *accepted, ""] if accepted else []) + calibration_yaml(calibration)


def _own_numbers(machine: Machine) -> list[str]:
    """A profile's lines for a chip that has no shipped profile: every number as it was measured."""
    cuda = machine.device.type == "cuda"
    capability = torch.cuda.get_device_capability(machine.device) if cuda else (0, 0)

    def entry(value: float, note: str | None = None) -> str:
        shown = str(value) if isinstance(value, int) else f"{value:.4g}"
        remark = "" if note is None else f', note: "{note}"'
        return f"{{value: {shown}, status: measured, source: MEASURED{remark}}}"

    fallbacks = {"float8_e4m3fn": "falls_back_to: bfloat16", "nvfp4": "falls_back_to: bfloat16"}
    fallbacks["luq_fp4"] = "timed_as: nvfp4" if "nvfp4" in machine.peaks else "falls_back_to: bfloat16"
    return [
        "vendor: NVIDIA" if cuda else "vendor: as in the title",
        f"family: sm{capability[0]}{capability[1]}" if cuda else "family: cpu",
        f"year: {time.strftime('%Y')}",
        "note: peaks are the highest rates measured; the year is that of the measurement",
        f"units: {entry(machine.units)}",
        "memory:",
        f"  capacity_bytes: {entry(machine.capacity_bytes)}",
        f"  bandwidth_bytes_per_s: {entry(machine.bandwidth_bytes_per_s, 'of a copy, bytes read and written')}",
        f"cache_bytes: {entry(machine.cache_bytes)}",
        f"launch_s: {entry(machine.launch_s)}",
        f"vector_flops_per_s: {entry(machine.peaks['float32'])}",
        "formats:",
        *(f"  {name}: {{native: true, peak_flops_per_s: {entry(rate)}}}" for name, rate in machine.peaks.items()),
        *(f"  {name}: {{{rule}}}" for name, rule in fallbacks.items() if name not in machine.peaks),
    ]
