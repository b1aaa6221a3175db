"""What counted work takes on a chip: seconds and joules per phase and layer, in the baseline and in one format.

Layers cost what they cost whatever the others do, so a plan's price is put together from columns: one price list with
every layer in the baseline, one per format with every quantizable layer in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emulation.formats import BlockFormat, get_format
from hwmodels.calibration import KERNELS
from hwmodels.dpsgd import demand
from hwmodels.gemm import gemm_rates, kernel_of
from hwmodels.gemm_arrays import Array, products_seconds
from hwmodels.power import kernel_power
from hwmodels.profile import Basis, FormatRate, HardwareProfile, stored_bytes
from hwmodels.step import PHASE, PHASES, Demand, StepOptions
from hwmodels.workload import Workload

BOUNDS = ("compute", "memory", "launch")
MEMORY, LAUNCH = BOUNDS.index("memory"), BOUNDS.index("launch")
MEMORY_SHARE_OF_POWER = 0.85
"""Dynamic power of memory at full bandwidth, as a share of limit minus idle: seen 0.81 (B200) to 0.9 (H200) on
memory-bound GEMMs; used where a profile has no fitted power."""
VECTOR_SHARE_OF_POWER = 0.7
"""The same of kernels bound by arithmetic or addresses outside the matrix unit: seen 0.65 (bfloat16) to 0.75 (tfloat32)
in steps of ResNet-18 on an H200, which norms and changes of layout take two thirds of."""

_PHASES = slice(0, len(PHASES))
_BOUNDS = slice(_PHASES.stop, _PHASES.stop + len(BOUNDS))
_SPREAD = slice(_BOUNDS.stop, _BOUNDS.stop + 2)
_JOULES, _KERNELS, _OUTSIDE = range(_SPREAD.stop, _SPREAD.stop + 3)
_ROWS = _OUTSIDE + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PriceList:
    """Every layer of a workload in one format (or in the baseline), priced on one chip.

    Attributes:
        table: [rows, layers] (or [rows], summed): what the properties below are rows of.
        powered: whether the chip's power is known.
    """

    table: Array
    powered: bool

    @property
    def seconds(self) -> Array:
        """[phases, layers] on the device."""
        return self.table[_PHASES]

    @property
    def bounds(self) -> Array:
        """[3, layers] the same seconds by what bounds them, in the order of ``BOUNDS``."""
        return self.table[_BOUNDS]

    @property
    def spread(self) -> Array:
        """[2, layers] seconds to add for the lower and the upper end of the fitted model's band."""
        return self.table[_SPREAD]

    @property
    def joules(self) -> Array | None:
        """[layers]; None where the chip's power is not known."""
        return self.table[_JOULES] if self.powered else None

    @property
    def kernels(self) -> Array:
        """[layers] launched."""
        found: Array = self.table[_KERNELS]
        return found

    @property
    def outside(self) -> Array:
        """[layers] products of sizes outside those that the model was fitted on."""
        found: Array = self.table[_OUTSIDE]
        return found

    def totals(self) -> PriceList:
        """The sums over all layers: the same rows without the dimension of layers."""
        return PriceList(table=self.table.sum(1), powered=self.powered)

    def with_columns(self, others: Mapping[str, PriceList], columns: Mapping[str, Sequence[int]]) -> PriceList:
        """This list with some layers' columns from other lists, both by name."""
        table = self.table.copy()
        for name, chosen in columns.items():
            table[:, chosen] = others[name].table[:, chosen]
        return PriceList(table=table, powered=self.powered)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Power:
    """Board power of a kernel: idle, beside that while it runs, joules per FLOP and per byte, and the limit."""

    idle_w: float
    active_w: float
    limit_w: float
    per_flop: float
    per_byte: float

    def joules(self, seconds: Array, dynamic: Array) -> Array:
        """Energy of work that takes ``seconds`` and asks for ``dynamic`` joules beside idle power."""
        return np.minimum(self.idle_w * seconds + dynamic, self.limit_w * seconds)


class Pricer:
    """Prices one step's work on one chip, a format at a time."""

    def __init__(self, workload: Workload, profile: HardwareProfile, options: StepOptions, basis: Basis) -> None:
        self.profile, self.options, self.basis = profile, options, basis
        self.work: Demand = demand(workload, options)
        self.baseline = profile.rate(options.baseline)
        self.quantizable = np.array([layer.quantizable for layer in workload.layers], dtype=bool)
        self._gemms: dict[tuple[object, ...], Array] = {}
        self._lists: dict[tuple[object, ...] | None, PriceList] = {}
        self._plain = self._price_passes(self.work.bytes, self.work.vector_flops, self.work.kernels)
        np.add.at(self._plain[_KERNELS], self.work.rows_layer, self.work.repeats)
        self._baseline = self._gemm_prices(self.baseline)

    def prices(self, format_name: str | None) -> PriceList:
        """Prices with every quantizable layer in a format, the others and everything for None in the baseline."""
        rate = None if format_name is None else self.profile.rate(format_name)
        casts = None if rate is None else casting(rate, self.options)
        key = None if rate is None else (*self._alike(rate), casts)
        if key not in self._lists:
            products = self._baseline
            if rate is not None and casts is not None:
                products = np.where(
                    self.quantizable, self._gemm_prices(rate) + self._price_casts(rate, casts), products
                )
            self._lists[key] = PriceList(table=self._plain + products, powered=self.profile.power is not None)
        return self._lists[key]

    def _alike(self, rate: FormatRate) -> tuple[object, ...]:
        """What the price of products depends on: formats of one width on one unit cost the same."""
        width = stored_bytes(rate.falls_back_to or rate.format)
        if self.basis == "peak" or self.profile.calibration is None:
            return rate.peak_flops_per_s, width
        return kernel_of(rate, self.profile.calibration), gemm_rates(rate, self.profile), width

    def _gemm_prices(self, rate: FormatRate) -> Array:
        """All products at a rate, as rows of a price list."""
        width = stored_bytes(rate.falls_back_to or rate.format)
        key = self._alike(rate)
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
                if self.options.eager:
                    bound = compute_s >= memory_s
                    taken[bound] /= self.profile.eager.product_efficiency(rate.timed_as)
            power = self._power(rate)
            part, by_compute = taken - launch, compute_s >= memory_s
            joules = np.zeros_like(taken)
            if power:
                dynamic = power.per_flop * flops + power.per_byte * moved + power.active_w * part
                joules = power.joules(taken, dynamic)
            columns = np.stack([taken, part * by_compute, part * ~by_compute, launch, joules, outside])
            seconds, *cells = work.gathered(columns[:, work.product] * work.repeats)
            table = np.zeros((_ROWS, work.bytes.shape[1]))
            table[_PHASES] = seconds
            *table[_BOUNDS], table[_JOULES], table[_OUTSIDE] = np.stack(cells).sum(1)
            table[_SPREAD] = np.expm1(np.array(band))[:, None] * seconds.sum(0)
            self._gemms[key] = table
        return self._gemms[key]

    def _calibrated(self, rate: FormatRate) -> tuple[Array, Array, tuple[float, float], Array]:
        """Each distinct product by the fitted model: seconds, the fixed part of them, the band, which are outside."""
        calibration, products = self.profile.calibration, self.work.products
        assert calibration is not None  # checked_basis() has refused the basis otherwise
        kernel = calibration.kernels[kernel_of(rate, calibration)]
        taken = products_seconds(products, kernel, gemm_rates(rate, self.profile))
        sizes = (
            (products.m * products.batch, kernel.range_m),
            (products.n, kernel.range_n),
            (products.k, kernel.range_k),
        )
        outside = np.any([(size < low) | (size > high) for size, (low, high) in sizes], axis=0)
        return taken, np.minimum(taken, kernel.fixed_s + kernel.wave_s), kernel.band, outside.astype(float)

    def _price_casts(self, rate: FormatRate, casts: Casts) -> Array:
        """Price the quantization passes of every layer, as rows of a price list.

        On the calibrated basis with the measured fixed costs and bandwidths of such passes, where there are any.
        """
        once, each = self.work.operands.elements, self.work.operands.read_elements
        tensors, reads = self.work.operands.tensors, self.work.operands.reads
        cast_bytes = casts.cast_bytes[0] * once + casts.cast_bytes[1] * each
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
        table = np.zeros((_ROWS, len(once)))
        if power:
            dynamic = power.per_byte * (cast_bytes + amax_bytes) + power.active_w * seconds
            table[_JOULES] = power.joules(seconds, dynamic) + power.idle_w * fixed
        table[PHASE["quantization"]] = seconds + fixed
        table[_BOUNDS.start + MEMORY], table[_BOUNDS.start + LAUNCH] = seconds, fixed
        table[_KERNELS] = launched + amaxes
        return table

    def _price_passes(self, moved: Array, vector: Array, launches: Array) -> Array:
        """Everything that is no product: memory traffic or float32 arithmetic, whichever is longer, and launches.

        Kernels of an eager framework do one or the other, one after another, and last a launch at least: so small ones
        take that, and large ones what they move.

        Returns:
            Rows of a price list.
        """
        bandwidth, launch_s = self.profile.memory.bandwidth_bytes_per_s, 0.0
        if self.basis == "calibrated" and self.profile.calibration is not None:
            kernel = kernel_of(self.baseline, self.profile.calibration)
            bandwidth *= self.profile.calibration.kernels[kernel].bandwidth_efficiency
            bandwidth *= self.profile.eager.pass_efficiency if self.options.eager else 1.0
            launch_s = self.profile.launch_s
        memory_s, compute_s = moved / bandwidth, vector / self.profile.vector_flops_per_s
        taken = memory_s + compute_s if self.options.eager else np.maximum(memory_s, compute_s)
        by_compute = compute_s > memory_s
        kernels, fixed = launches.sum(0), launches * launch_s
        fixed = (np.hypot(taken, fixed) - taken if self.options.eager else fixed).sum(0)
        table = np.zeros((_ROWS, moved.shape[1]))
        table[_PHASES] = taken
        table[PHASE["launch"]] += fixed
        table[_BOUNDS] = (taken * by_compute).sum(0), (taken * ~by_compute).sum(0), fixed
        table[_KERNELS] = kernels
        power = self._power(self.baseline)
        if power:
            per_flop = VECTOR_SHARE_OF_POWER * (power.limit_w - power.idle_w) / self.profile.vector_flops_per_s
            dynamic = power.per_byte * moved + per_flop * vector + power.active_w * taken
            table[_JOULES] = power.joules(taken, dynamic).sum(0) + power.idle_w * fixed
        return table

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
                active_w=0.0,
                limit_w=limit,
                per_flop=dynamic / rate.peak_flops_per_s,
                per_byte=MEMORY_SHARE_OF_POWER * dynamic / profile.memory.bandwidth_bytes_per_s,
            )
        kernel = kernel_of(rate, profile.calibration)
        asked = kernel_power(kernel, fitted, profile)
        # a format that borrows a kernel's constants costs as much more per operation as it is slower
        per_flop = asked.joules_per_flop * profile.rate(KERNELS[kernel]).peak_flops_per_s / rate.peak_flops_per_s
        if rate.peak_flops_per_s <= profile.vector_flops_per_s:  # outside the matrix unit: the peak draws the limit
            per_flop = (limit - idle) / rate.peak_flops_per_s
        return _Power(
            idle_w=fitted.idle_w,
            active_w=asked.active_w,
            limit_w=fitted.saturation * limit,
            per_flop=per_flop,
            per_byte=asked.joules_per_byte,
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
