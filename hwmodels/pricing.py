"""What counted work takes on a chip: seconds and joules per phase and layer, in the baseline and in one format.

Layers cost what they cost whatever the others do, so a plan's price is put together from columns: one price list with
every layer in the baseline, one per format with every quantizable layer in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emulation.formats import BlockFormat, get_format
from hwmodels.dpsgd import PHASE, Demand, StepOptions
from hwmodels.gemm import GemmRates, gemm_rates, kernel_of, kernel_seconds
from hwmodels.profile import Basis, FormatRate, HardwareProfile, stored_bytes
from hwmodels.workload import Gemm, Workload

Array = NDArray[np.float64]

BOUNDS = ("compute", "memory", "launch")
HOST_S = 8e-6
"""What eager PyTorch spends on the host per kernel; the device waits where it is faster than that. Assumed."""
MEMORY_SHARE_OF_POWER = 0.85
"""Dynamic power of memory at full bandwidth, as a share of limit minus idle: seen 0.81 (B200) to 0.9 (H200) on
memory-bound GEMMs; used where a profile has no fitted power."""


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """Every layer of a workload in one format (or in the baseline), priced on one chip.

    Attributes:
        seconds: [phases, layers] on the device.
        joules: [layers]; None where the chip's power is not known.
        bounds: [3, layers] the same seconds by what bounds them, in the order of ``BOUNDS``.
        kernels: [layers] launched.
    """

    seconds: Array
    joules: Array | None
    bounds: Array
    kernels: Array


def price(
    workload: Workload,
    work: Demand,
    profile: HardwareProfile,
    options: StepOptions,
    basis: Basis,
    format_name: str | None,
) -> PriceList:
    """Price the step with every quantizable layer in ``format_name`` (None: nothing quantized)."""
    layers = len(workload.layers)
    baseline = profile.rate(options.baseline)
    quantizable = np.array([layer.quantizable for layer in workload.layers], dtype=bool)
    seconds, bounds, energy = np.zeros_like(work.bytes), np.zeros((3, layers)), np.zeros(layers)
    kernels = work.kernels.sum(0)
    in_format = quantizable[work.gemm_layers] & (format_name is not None)
    for chosen, rate in ((~in_format, baseline), (in_format, profile.rate(format_name or options.baseline))):
        rows = np.flatnonzero(chosen)
        if len(rows):
            _gemms(work, rows, rate, profile, options, basis, seconds, bounds, energy)
    np.add.at(kernels, work.gemm_layers, work.gemm_repeats)
    moved, launches, vector = work.bytes.copy(), work.kernels.copy(), work.vector_flops
    if format_name is not None:
        extra, passes = quantization(workload, profile.rate(format_name), options)
        moved[PHASE["quantization"]] += extra
        launches[PHASE["quantization"]] += passes
        kernels += passes
    _passes(moved, launches, vector, profile, baseline, basis, seconds, bounds, energy)
    return PriceList(seconds=seconds, joules=energy if profile.power else None, bounds=bounds, kernels=kernels)


def _gemms(
    work: Demand,
    rows: NDArray[np.intp],
    rate: FormatRate,
    profile: HardwareProfile,
    options: StepOptions,
    basis: Basis,
    seconds: Array,
    bounds: Array,
    energy: Array,
) -> None:
    gemms = [work.gemms[row] for row in rows]
    results = work.gemm_result_bytes[rows]
    repeats = work.gemm_repeats[rows]
    width = stored_bytes(rate.falls_back_to or rate.format)
    flops = np.array([g.flops for g in gemms], dtype=np.float64)
    moved = np.array([gemm_bytes(g, width, r) for g, r in zip(gemms, results, strict=True)])
    compute_s = flops / rate.peak_flops_per_s
    memory_s = moved / profile.memory.bandwidth_bytes_per_s
    if basis == "peak":
        taken, launch = np.maximum(compute_s, memory_s), np.zeros(len(rows))
    else:
        taken, launch = _calibrated(gemms, results, rate, profile)
    layers = work.gemm_layers[rows]
    np.add.at(seconds, (work.gemm_phases[rows], layers), taken * repeats)
    np.add.at(bounds, ((compute_s < memory_s).astype(np.intp), layers), (taken - launch) * repeats)
    np.add.at(bounds[2], layers, launch * repeats)
    if profile.power:
        dynamic = _power(profile, rate)
        joules = np.minimum(
            profile.power.limit_w * taken,
            profile.power.idle_w * taken + dynamic[0] * flops + dynamic[1] * moved,
        )
        np.add.at(energy, layers, joules * repeats)


def gemm_bytes(gemm: Gemm, operand_width: float, result_width: float) -> float:
    """Bytes that a product moves at least: distinct operand elements read once, the result written once."""
    first = gemm.operand_elements if gemm.operand_elements is not None else gemm.m * gemm.k * gemm.count
    result = gemm.result_elements if gemm.result_elements is not None else gemm.m * gemm.n * gemm.count
    return (first + gemm.k * gemm.n * gemm.count) * operand_width + result * result_width


def _calibrated(gemms: list[Gemm], results: Array, rate: FormatRate, profile: HardwareProfile) -> tuple[Array, Array]:
    """Seconds of each product by the fitted model, and the fixed part of them."""
    calibration = profile.calibration
    assert calibration is not None  # estimate() has refused the basis otherwise
    kernel = calibration.kernels[kernel_of(rate, calibration)]
    rates = gemm_rates(rate, profile)
    cache: dict[tuple[int, int, int, int, float], float] = {}
    by_width: dict[float, GemmRates] = {}
    taken = np.empty(len(gemms))
    for index, (gemm, width) in enumerate(zip(gemms, results, strict=True)):
        key = (gemm.m, gemm.n, gemm.k, gemm.count, float(width))
        if key not in cache:
            if width not in by_width:
                by_width[width] = dataclasses.replace(rates, output_bytes=float(width))
            cache[key] = kernel_seconds(gemm.m, gemm.n, gemm.k, kernel, by_width[width], batch=gemm.count)
        taken[index] = cache[key]
    return taken, np.minimum(taken, kernel.fixed_s + kernel.wave_s)


def quantization(workload: Workload, rate: FormatRate, options: StepOptions) -> tuple[Array, Array]:
    """Bytes and kernels, per layer, of turning a layer's operands into the format.

    Each of activation, output gradient and weight is quantized once for every product that reads it where blocks run
    along the product's inner dimension, else once, with a transposed copy where the chip takes operands in one layout
    only. The largest value of an example is found in a pass before, except for formats whose scales are all local.
    A fused kernel reads a tensor once and writes all that is needed.
    """
    fmt = get_format(rate.format)
    block = isinstance(fmt, BlockFormat) and fmt.block_size is not None
    local = block and not getattr(fmt, "tensor_scale", False)
    emulated = rate.falls_back_to is not None
    width = stored_bytes(options.baseline)
    code = stored_bytes(rate.falls_back_to or rate.format)
    one_layout = "TN" in rate.layouts and len(rate.layouts) == 1 and not emulated
    count, examples = options.passes(workload.batch_size)
    moved, kernels = np.zeros(len(workload.layers)), np.zeros(len(workload.layers))
    for index, layer in enumerate(workload.layers):
        if not layer.quantizable:
            continue
        for product in layer.products:
            tensors = (
                (product.input_elements * examples, 1 + product.grad_weight, count),
                (product.output_elements * examples, product.grad_input + product.grad_weight, count),
                (product.weight_elements, 1 + product.grad_input, 1),
            )
            for elements, readers, repeats in tensors:
                copies = readers if block or one_layout else min(readers, 1)
                if not copies:
                    continue
                if options.eager:
                    read = width * (copies if block else 1) + (0 if local else width)
                    read += 0.0 if block else code * (copies - 1)
                    launched = copies + (0 if local else 1)
                else:
                    read, launched = width, 1
                moved[index] += repeats * elements * (read + copies * code)
                kernels[index] += repeats * launched
    return moved, kernels


def _passes(
    moved: Array,
    launches: Array,
    vector: Array,
    profile: HardwareProfile,
    baseline: FormatRate,
    basis: Basis,
    seconds: Array,
    bounds: Array,
    energy: Array,
) -> None:
    """Everything that is no product: the longer of memory traffic and float32 arithmetic, and the launches."""
    bandwidth, launch_s = profile.memory.bandwidth_bytes_per_s, 0.0
    if basis == "calibrated" and profile.calibration is not None:
        bandwidth *= profile.calibration.kernels[kernel_of(baseline, profile.calibration)].bandwidth_efficiency
        launch_s = profile.launch_s
    memory_s, compute_s = moved / bandwidth, vector / profile.vector_flops_per_s
    taken = np.maximum(memory_s, compute_s)
    seconds += taken
    bounds[0] += np.where(compute_s > memory_s, taken, 0).sum(0)
    bounds[1] += np.where(compute_s > memory_s, 0, taken).sum(0)
    fixed = launches.sum(0) * launch_s
    seconds[PHASE["launch"]] += fixed
    bounds[2] += fixed
    if profile.power:
        per_byte = _power(profile, baseline)[1]
        idle, limit = profile.power.idle_w, profile.power.limit_w
        arithmetic = (limit - idle) / profile.vector_flops_per_s
        energy += np.minimum(limit * taken, idle * taken + per_byte * moved + arithmetic * vector).sum(0) + idle * fixed


def _power(profile: HardwareProfile, rate: FormatRate) -> tuple[float, float]:
    """Dynamic joules per FLOP of a format and per byte: fitted, else such that the peak rate draws the limit."""
    assert profile.power is not None
    dynamic = profile.power.limit_w - profile.power.idle_w
    per_flop = dynamic / rate.peak_flops_per_s
    per_byte = MEMORY_SHARE_OF_POWER * dynamic / profile.memory.bandwidth_bytes_per_s
    return per_flop, per_byte
