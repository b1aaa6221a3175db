"""How long a matrix product takes on a chip: tiles, waves, caches and launches, with constants fitted to measurements.

A library covers the [m, n] result with tiles, a unit computes one at a time, and the units take them in waves. A tile
takes as long as its multiplications at the achieved rate or its loads from the cache, whichever is longer; the product
as long as its waves or its memory traffic; the library picks the fastest tile shape and split of the inner dimension.
``docs/calibration.md`` has the formula and its errors.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emulation.errors import InputError
from emulation.formats import get_format
from hwmodels.calibration import Correction, GemmCalibration, KernelCalibration
from hwmodels.calibration import calibration_from as calibration_from

if TYPE_CHECKING:
    from hwmodels.profile import FormatRate, HardwareProfile

LEAST_SPLIT_K = 32  # a part of the inner dimension keeps at least this many terms
FADE_OCTAVES = 4.0  # so far outside its grid, in powers of two, a correction has faded to nothing


@dataclass(frozen=True, kw_only=True)
class GemmRates:
    """The published numbers of a chip, in one format, that a calibration scales.

    Attributes:
        peak_flops_per_s: dense rate of the format (1 MAC = 2 FLOPs).
        reference_flops_per_s: dense bfloat16 rate, which stands for units times clock: caches keep pace with that,
            not with the rate of the format.
        bandwidth_bytes_per_s: of the memory.
        cache_bytes: of the last cache before the memory.
        units: how many tiles run at once (streaming multiprocessors, compute units).
        operand_bytes: per element of both operands, scales included.
        output_bytes: per element of the result.
    """

    peak_flops_per_s: float
    reference_flops_per_s: float
    bandwidth_bytes_per_s: float
    cache_bytes: float
    units: int
    operand_bytes: float
    output_bytes: float = 2.0


def kernel_of(rate: FormatRate, calibration: GemmCalibration) -> str:
    """The measured kernel whose constants time a format: its own, else the nearest that this calibration has.

    Only the constants (efficiencies, fixed costs) are ever borrowed, as an int8 product takes those of fp8; the peak
    rate and the bytes are the format's own. ``measured_kernel`` tells whether they were borrowed.
    """
    wanted = _nearest_kernels(rate.timed_as)
    return next((kernel for kernel in wanted if kernel in calibration.kernels), next(iter(calibration.kernels)))


def measured_kernel(rate: FormatRate, calibration: GemmCalibration) -> bool:
    """Whether the very kernel that times a format was measured."""
    own = {"bfloat16": "bfloat16", "float16": "bfloat16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
    own |= {"nvfp4": "nvfp4"}
    return own.get(rate.timed_as) in calibration.kernels


def _nearest_kernels(format_name: str) -> tuple[str, ...]:
    if format_name.startswith(("mxfp8", "mxfp6")):
        return "fp8_block", "fp8", "bfloat16"
    if "fp4" in format_name or "float4" in format_name or format_name == "int4":
        return "nvfp4", "fp8", "bfloat16"
    if format_name.startswith(("float8", "float6", "int8")):
        return "fp8", "bfloat16"
    return ("bfloat16",)


def gemm_rates(rate: FormatRate, profile: HardwareProfile) -> GemmRates:
    """The numbers of a profile that the model needs to time one of its formats."""
    reference = profile.formats.get("bfloat16") or profile.formats.get("float16") or rate
    wide = rate.timed_as in ("float32", "tfloat32")
    bits = get_format(rate.falls_back_to or rate.format).bits_per_element
    return GemmRates(
        peak_flops_per_s=rate.peak_flops_per_s,
        reference_flops_per_s=reference.peak_flops_per_s,
        bandwidth_bytes_per_s=profile.memory.bandwidth_bytes_per_s,
        cache_bytes=profile.cache_bytes or 0.0,
        units=profile.units,
        operand_bytes=4.0 if wide else bits / 8,
        output_bytes=4.0 if wide else 2.0,
    )


def gemm_seconds(
    m: int,
    n: int,
    k: int,
    *,
    params: GemmCalibration,
    rate: FormatRate,
    profile: HardwareProfile,
    batch: int = 1,
    quantize: bool = True,
    kernel: str | None = None,
) -> float:
    """Seconds of ``batch`` products [m, k] x [k, n] in one kernel.

    Args:
        m: rows of the first operand, the activation.
        n: columns of the second, the weight.
        k: length of the sums.
        params: the chip's calibration.
        rate: of the operands' format.
        profile: the chip.
        batch: products of this size in one launch.
        quantize: whether the activation arrives in bfloat16 and is quantized first, as published timings of dynamic
            quantization include it; False: both operands are in their format already.
        kernel: key of ``params.kernels``; None: the one that times the format.

    Raises:
        InputError: a size is below 1.
    """
    constants = params.kernels[kernel or kernel_of(rate, params)]
    rates = gemm_rates(rate, profile)
    seconds = kernel_seconds(m, n, k, constants, rates, batch=batch)
    return seconds + quantize_seconds(batch * m * k, constants, rates) if quantize else seconds


def kernel_seconds(m: int, n: int, k: int, kernel: KernelCalibration, rates: GemmRates, *, batch: int = 1) -> float:
    """Seconds of ``batch`` products [m, k] x [k, n] in one kernel, operands in their format already."""
    if min(m, n, k, batch) < 1:
        raise InputError(f"m={m!r}, n={n!r}, k={k!r}, batch={batch!r}: a size is below 1")
    seconds = _physical_seconds(m, n, k, kernel, rates, batch)
    if kernel.correction is None:
        return seconds
    return seconds * math.exp(_correction(m * batch, n, k, kernel.correction))


def _physical_seconds(m: int, n: int, k: int, kernel: KernelCalibration, rates: GemmRates, batch: int) -> float:
    """The model without its correction: the fastest tile and split, and what no choice avoids."""
    operand = rates.operand_bytes
    footprint = batch * (operand * k * (m + n) + rates.output_bytes * m * n)
    kept = kernel.resident * rates.cache_bytes
    missed = footprint * -math.expm1(-footprint / kept) if kept > 0 else footprint
    memory_s = missed / (kernel.bandwidth_efficiency * rates.bandwidth_bytes_per_s)
    cache_rate = kernel.cache_bytes_per_flop * rates.reference_flops_per_s
    unit_rate = kernel.compute_efficiency * rates.peak_flops_per_s / rates.units
    unit_cache_rate = cache_rate / rates.units
    overlap, rounding = kernel.overlap, kernel.wave_rounding
    best = math.inf
    for rows, columns in kernel.tiles:
        tiles = batch * -(-m // rows) * -(-n // columns)
        for parts in kernel.splits:
            depth = k / parts
            if parts > 1 and depth < LEAST_SPLIT_K:
                continue
            multiply_s = 2 * rows * columns * depth / unit_rate
            load_s = (rows + columns) * depth * operand / unit_cache_rate
            tile_s = (multiply_s**4 + load_s**4) ** 0.25 + kernel.wave_s
            waves = tiles * parts / rates.units
            waves = max(waves + rounding * (math.ceil(waves) - waves), 1.0)
            compute_s = waves * tile_s
            extra_s = kernel.split_s + 8.0 * parts * batch * m * n / cache_rate if parts > 1 else 0.0
            if max(compute_s, memory_s) + extra_s < best:
                best = min(best, (compute_s**overlap + memory_s**overlap) ** (1 / overlap) + extra_s)
    return best + kernel.fixed_s


def _correction(m: int, n: int, k: int, grid: Correction) -> float:
    """The grid's trilinear value, faded outside the grid."""
    i, u, out_m = _place(math.log2(m), grid.log2_m)
    j, v, out_n = _place(math.log2(n), grid.log2_n)
    h, w, out_k = _place(math.log2(k), grid.log2_k)
    fade = 1.0 - max(out_m, out_n, out_k) / FADE_OCTAVES
    if fade <= 0.0:
        return 0.0
    values, width = grid.values, len(grid.log2_k)
    area = width * len(grid.log2_n)
    a = i * area + j * width + h
    b, c, d = a + width, a + area, a + area + width
    w0, v0 = 1.0 - w, 1.0 - v
    low = v0 * (w0 * values[a] + w * values[a + 1]) + v * (w0 * values[b] + w * values[b + 1])
    high = v0 * (w0 * values[c] + w * values[c + 1]) + v * (w0 * values[d] + w * values[d + 1])
    return fade * ((1.0 - u) * low + u * high)


def _place(x: float, knots: tuple[float, ...]) -> tuple[int, float, float]:
    """The interval of ``x``, where in it (0 to 1), and how far outside all of them ``x`` lies."""
    index = min(max(bisect_right(knots, x) - 1, 0), len(knots) - 2)
    fraction = (x - knots[index]) / (knots[index + 1] - knots[index])
    return index, min(max(fraction, 0.0), 1.0), max(knots[0] - x, x - knots[-1], 0.0)


def quantize_seconds(elements: int, kernel: KernelCalibration, rates: GemmRates) -> float:
    """Seconds to turn ``elements`` bfloat16 values into the kernel's operand and its scales; 0 where none is needed."""
    passes = kernel.quantize
    if passes is None:
        return 0.0
    bandwidth = rates.bandwidth_bytes_per_s
    seconds = passes.amax_s + passes.cast_s
    seconds += elements * (2.0 + rates.operand_bytes) / (passes.cast_bandwidth_efficiency * bandwidth)
    if passes.amax_bandwidth_efficiency is not None:
        seconds += elements * 2.0 / (passes.amax_bandwidth_efficiency * bandwidth)
    return seconds


def band(seconds: float, kernel: KernelCalibration) -> tuple[float, float]:
    """The interval that held four of five held-out measurements whose prediction was ``seconds``."""
    return seconds * math.exp(kernel.band[0]), seconds * math.exp(kernel.band[1])


def extrapolated(m: int, n: int, k: int, kernel: KernelCalibration, *, batch: int = 1) -> bool:
    """Whether a size lies outside those fitted (a batch of products counts as more rows)."""
    sizes = (m * batch, kernel.range_m), (n, kernel.range_n), (k, kernel.range_k)
    return any(not low <= size <= high for size, (low, high) in sizes)
