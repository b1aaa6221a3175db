"""What counted work takes on a chip: seconds and joules per phase and layer, in the baseline and in one format.

Layers cost what they cost whatever the others do, so a plan's price is put together from columns: one price list with
every layer in the baseline, one per format with every quantizable layer in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emulation.formats import BlockFormat, get_format
from hwmodels.dpsgd import demand
from hwmodels.gemm import gemm_rates, kernel_of
from hwmodels.gemm_arrays import Array, products_seconds
from hwmodels.profile import Basis, FormatRate, HardwareProfile, stored_bytes
from hwmodels.step import PHASE, Demand, StepOptions
from hwmodels.workload import Workload

BOUNDS = ("compute", "memory", "launch")
LAUNCH = BOUNDS.index("launch")
MEMORY_SHARE_OF_POWER = 0.85
"""Dynamic power of memory at full bandwidth, as a share of limit minus idle: seen 0.81 (B200) to 0.9 (H200) on
memory-bound GEMMs; used where a profile has no fitted power."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PriceList:
    """Every layer of a workload in one format (or in the baseline), priced on one chip.

    Attributes:
        seconds: [phases, layers] on the device.
        joules: [layers]; None where the chip's power is not known.
        bounds: [3, layers] the same seconds by what bounds them, in the order of ``BOUNDS``.
        kernels: [layers] launched.
        spread: [2, layers] seconds to add for the lower and the upper end of the fitted model's band.
        outside: [layers] products of sizes outside those that the model was fitted on.
    """

    seconds: Array
    joules: Array | None
    bounds: Array
    kernels: Array
    spread: Array
    outside: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class _Power:
    """Board power of a kernel: idle, joules per FLOP and per byte, and the limit."""

    idle_w: float
    limit_w: float
    per_flop: float
    per_byte: float

    def joules(self, seconds: Array, dynamic: Array) -> Array:
        """Energy of work that takes ``seconds`` and asks for ``dynamic`` joules beside idle power."""
        return np.minimum(self.idle_w * seconds + dynamic, self.limit_w * seconds)


Parts = tuple[Array, ...]
"""Seconds, seconds by bound, joules; of products, spread and outside too (see ``PriceList``)."""


class Pricer:
    """Prices one step's work on one chip, a format at a time."""

    def __init__(self, workload: Workload, profile: HardwareProfile, options: StepOptions, basis: Basis) -> None:
        self.profile, self.options, self.basis = profile, options, basis
        self.work: Demand = demand(workload, options)
        self.baseline = profile.rate(options.baseline)
        self.quantizable = np.array([layer.quantizable for layer in workload.layers], dtype=bool)
        self._gemms: dict[tuple[str, float, float], Parts] = {}
        self._lists: dict[tuple[object, ...] | None, PriceList] = {}
        self._kernels = self.work.kernels.sum(0)
        np.add.at(self._kernels, self.work.rows_layer, self.work.repeats)
        plain = self._price_passes(self.work.bytes, self.work.vector_flops, self.work.kernels)
        plain[0][PHASE["launch"]] += plain[1][LAUNCH]
        self._plain = plain

    def prices(self, format_name: str | None) -> PriceList:
        """Prices with every quantizable layer in a format, the others and everything for None in the baseline."""
        rate = None if format_name is None else self.profile.rate(format_name)
        casts = None if rate is None else casting(rate, self.options)
        key = None if rate is None else (rate.timed_as, rate.peak_flops_per_s, casts)
        if key not in self._lists:  # formats that fall back to the same one cost the same
            base = self._gemm_prices(self.baseline)
            parts: Parts = tuple(plain + gemm for plain, gemm in zip(self._plain, base[:3], strict=True)) + base[3:]
            kernels = self._kernels
            if rate is not None and casts is not None:
                chosen, own = self.quantizable, self._gemm_prices(rate)
                extra, launched = self._price_casts(rate, casts)
                difference = zip(parts, own, base, strict=True)
                parts = tuple(part + np.where(chosen, mine - theirs, 0) for part, mine, theirs in difference)
                parts[0][PHASE["quantization"]] += extra[0]
                parts = parts[0], parts[1] + extra[1], parts[2] + extra[2], *parts[3:]
                kernels = kernels + launched
            self._lists[key] = PriceList(
                seconds=parts[0],
                bounds=parts[1],
                kernels=kernels,
                joules=parts[2] if self.profile.power else None,
                spread=parts[3],
                outside=parts[4],
            )
        return self._lists[key]

    def _gemm_prices(self, rate: FormatRate) -> Parts:
        """Seconds, seconds by bound, joules, spread and outside of all products at a rate."""
        width = stored_bytes(rate.falls_back_to or rate.format)
        key = (rate.timed_as, rate.peak_flops_per_s, width)
        if key not in self._gemms:
            work, products = self.work, self.work.products
            flops, moved = products.flops, products.moved_bytes(width)
            compute_s = flops / rate.peak_flops_per_s
            memory_s = moved / self.profile.memory.bandwidth_bytes_per_s
            if self.basis == "peak":
                taken, launch = np.maximum(compute_s, memory_s), np.zeros(len(flops))
                band, outside = (0.0, 0.0), np.zeros(len(flops))
            else:
                taken, launch, band, outside = self._calibrated(rate)
            power = self._power(rate)
            joules = power.joules(taken, power.per_flop * flops + power.per_byte * moved) if power else 0 * taken
            part, by_compute = taken - launch, compute_s >= memory_s
            columns = np.stack([taken, part * by_compute, part * ~by_compute, launch, joules, outside])
            rows = columns[:, work.product] * work.repeats
            seconds, *others = (work.gathered(row) for row in rows)
            bounds, joules, outside = np.stack([cell.sum(0) for cell in others[:3]]), others[3].sum(0), others[4].sum(0)
            spread = np.expm1(np.array(band))[:, None] * seconds.sum(0)
            self._gemms[key] = seconds, bounds, joules, spread, outside
        return self._gemms[key]

    def _calibrated(self, rate: FormatRate) -> tuple[Array, Array, tuple[float, float], Array]:
        """Each distinct product by the fitted model: seconds, the fixed part of them, the band, which are outside."""
        calibration, products = self.profile.calibration, self.work.products
        assert calibration is not None  # checked_basis() has refused the basis otherwise
        kernel = calibration.kernels[kernel_of(rate, calibration)]
        taken = products_seconds(products, kernel, gemm_rates(rate, self.profile))
        taken /= self.profile.eager.product_efficiency if self.options.eager else 1.0
        sizes = (
            (products.m * products.batch, kernel.range_m),
            (products.n, kernel.range_n),
            (products.k, kernel.range_k),
        )
        outside = np.any([(size < low) | (size > high) for size, (low, high) in sizes], axis=0)
        return taken, np.minimum(taken, kernel.fixed_s + kernel.wave_s), kernel.band, outside.astype(float)

    def _price_casts(self, rate: FormatRate, casts: Casts) -> tuple[Parts, Array]:
        """Price the quantization passes of every layer: seconds, bounds and joules [layers], and kernels [layers].

        On the calibrated basis with the measured fixed costs and bandwidths of such passes, where there are any.
        """
        once, each = self.work.operands.elements, self.work.operands.read_elements
        tensors, reads = self.work.operands.tensors, self.work.operands.reads
        cast_bytes = sum(share * part for share, part in zip(casts.cast_bytes, (once, each), strict=True))
        amax_bytes = casts.amax_bytes * once
        launched = reads if casts.per_reader else tensors
        amaxes = tensors * (casts.amax_bytes > 0)
        bandwidth, fixed = self.profile.memory.bandwidth_bytes_per_s, np.zeros_like(once)
        seconds = (cast_bytes + amax_bytes) / bandwidth
        calibration = self.profile.calibration
        if self.basis == "calibrated" and calibration is not None:
            kernel = calibration.kernels[kernel_of(rate, calibration)]
            passes = kernel.quantize
            launch_s = self.profile.launch_s
            cast_s, amax_s = (passes.cast_s, passes.amax_s or launch_s) if passes else (launch_s, launch_s)
            cast_rate = passes.cast_bandwidth_efficiency if passes else kernel.bandwidth_efficiency
            amax_rate = (passes.amax_bandwidth_efficiency if passes else None) or cast_rate
            fixed = launched * cast_s + amaxes * amax_s
            seconds = (cast_bytes / cast_rate + amax_bytes / amax_rate) / bandwidth
        power = self._power(self.baseline)
        joules = np.zeros_like(once)
        if power:
            joules = power.joules(seconds, power.per_byte * (cast_bytes + amax_bytes)) + power.idle_w * fixed
        bounds = np.stack([np.zeros_like(once), seconds, fixed])
        return (seconds + fixed, bounds, joules), launched + amaxes

    def _price_passes(self, moved: Array, vector: Array, launches: Array) -> Parts:
        """Everything that is no product: memory traffic or float32 arithmetic, whichever is longer, and launches.

        Returns:
            Seconds like ``moved``, launches aside; seconds by bound [3, layers]; joules [layers].
        """
        bandwidth, launch_s = self.profile.memory.bandwidth_bytes_per_s, 0.0
        if self.basis == "calibrated" and self.profile.calibration is not None:
            kernel = kernel_of(self.baseline, self.profile.calibration)
            bandwidth *= self.profile.calibration.kernels[kernel].bandwidth_efficiency
            bandwidth *= self.profile.eager.pass_efficiency if self.options.eager else 1.0
            launch_s = self.profile.launch_s
        memory_s, compute_s = moved / bandwidth, vector / self.profile.vector_flops_per_s
        taken, by_compute = np.maximum(memory_s, compute_s), compute_s > memory_s
        fixed = launches.sum(0) * launch_s
        bounds = np.stack([np.where(by_compute, taken, 0).sum(0), np.where(by_compute, 0, taken).sum(0), fixed])
        joules = np.zeros(moved.shape[1])
        power = self._power(self.baseline)
        if power:
            per_flop = (power.limit_w - power.idle_w) / self.profile.vector_flops_per_s
            dynamic = power.per_byte * moved + per_flop * vector
            joules = power.joules(taken, dynamic).sum(0) + power.idle_w * fixed
        return taken, bounds, joules

    def _power(self, rate: FormatRate) -> _Power | None:
        """Fitted power on the calibrated basis; else dynamic power such that the published peak draws the limit."""
        profile = self.profile
        if profile.power is None:
            return None
        limit, idle = profile.power.limit_w, profile.power.idle_w
        fitted = profile.calibration.power if profile.calibration is not None else None
        if self.basis == "peak" or fitted is None or profile.calibration is None:
            dynamic = limit - idle
            return _Power(
                idle_w=idle,
                limit_w=limit,
                per_flop=dynamic / rate.peak_flops_per_s,
                per_byte=MEMORY_SHARE_OF_POWER * dynamic / profile.memory.bandwidth_bytes_per_s,
            )
        kernel = kernel_of(rate, profile.calibration)
        per_flop = fitted.joules_per_flop.get(kernel)
        if per_flop is None:  # not measured: in proportion to the rates, as the measured formats roughly are
            reference = profile.rate("bfloat16").peak_flops_per_s
            per_flop = fitted.joules_per_flop["bfloat16"] * reference / rate.peak_flops_per_s
        return _Power(
            idle_w=fitted.idle_w,
            limit_w=fitted.saturation * limit,
            per_flop=per_flop,
            per_byte=fitted.joules_per_byte,
        )


@dataclass(frozen=True, kw_only=True)
class Casts:
    """How operands are turned into a format: bytes of the passes, per element.

    Attributes:
        cast_bytes: read and written by casts, per element once and per element and product that reads it.
        amax_bytes: read by a pass before, which finds the largest value of each example; 0: no such pass.
        per_reader: a kernel per product that reads the tensor; else one per tensor.
    """

    cast_bytes: tuple[float, float]
    amax_bytes: float
    per_reader: bool


def casting(rate: FormatRate, options: StepOptions) -> Casts:
    """How a chip's operands are turned into a format.

    Each of activation, output gradient and weight is quantized once for every product that reads it where blocks run
    along the product's inner dimension, else once, with a transposed copy where the chip takes operands in one layout
    only. The largest value of an example is found in a pass before, except for formats whose scales are all local.
    A fused kernel reads a tensor once and writes all that is needed.
    """
    fmt = get_format(rate.format)
    block = isinstance(fmt, BlockFormat) and fmt.block_size is not None
    local = isinstance(fmt, BlockFormat) and block and not fmt.tensor_scale
    width, code = stored_bytes(options.baseline), stored_bytes(rate.falls_back_to or rate.format)
    copies = block or (rate.layouts == ("TN",) and rate.falls_back_to is None)
    written = (0.0, code) if copies else (code, 0.0)
    if not options.eager:
        return Casts(cast_bytes=(width + written[0], written[1]), amax_bytes=0.0, per_reader=False)
    # blocks are quantized anew along each direction; other transposed copies read and write codes
    read = (0.0, width) if block else (width - code, code) if copies else (width, 0.0)
    return Casts(
        cast_bytes=(written[0] + read[0], written[1] + read[1]),
        amax_bytes=0.0 if local else width,
        per_reader=copies,
    )
