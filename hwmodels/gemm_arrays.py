"""The GEMM time model of ``hwmodels.gemm`` on arrays of products at once: the same formula, a test holds them equal.

It goes one step further than single products: an implicit GEMM (a convolution) reads fewer distinct elements from
memory than its [m, k] operand has, and an attention's scores never leave the chip, so the memory traffic is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwmodels.calibration import Correction, KernelCalibration
from hwmodels.gemm import FADE_OCTAVES, LEAST_SPLIT_K, GemmRates

Array = NDArray[np.float64]
Knots = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Matrix products, one per entry of equally long arrays.

    Attributes:
        m, n, k, batch: ``batch`` products [m, k] x [k, n] in one kernel.
        operand_elements: distinct elements of both operands, over the batch.
        result_bytes: bytes of the results, over the batch.
        corners: where the products lie in the grids of corrections that were asked for, which many chips share.
    """

    m: Array
    n: Array
    k: Array
    batch: Array
    operand_elements: Array
    result_bytes: Array
    corners: dict[Knots, tuple[NDArray[np.intp], Array]] = field(default_factory=dict, init=False, repr=False)

    @property
    def flops(self) -> Array:
        """Two per multiply-accumulate."""
        return 2 * self.m * self.n * self.k * self.batch

    def moved_bytes(self, operand_bytes: float) -> Array:
        """Bytes between chip and memory: operands read once, results written once."""
        return self.operand_elements * operand_bytes + self.result_bytes


def products_seconds(products: Products, kernel: KernelCalibration, rates: GemmRates) -> Array:
    """Seconds of every product, operands in their format already."""
    seconds = _physical_seconds(products, kernel, rates)
    if kernel.correction is None:
        return seconds
    return seconds * np.exp(_correction(products, kernel.correction))


def _physical_seconds(products: Products, kernel: KernelCalibration, rates: GemmRates) -> Array:
    m, n, k, batch, operand = products.m, products.n, products.k, products.batch, rates.operand_bytes
    footprint = products.moved_bytes(operand)
    kept = kernel.resident * rates.cache_bytes
    missed = footprint * -np.expm1(-footprint / kept) if kept > 0 else footprint
    memory_s = missed / (kernel.bandwidth_efficiency * rates.bandwidth_bytes_per_s)
    cache_rate = kernel.cache_bytes_per_flop * rates.reference_flops_per_s
    unit_rate = kernel.compute_efficiency * rates.peak_flops_per_s / rates.units
    unit_cache_rate = cache_rate / rates.units
    # every tile shape and split of the inner dimension at once: [tiles, splits, products]; a tile's multiplications and
    # loads both grow with its depth, so that what joins them is one number per tile shape
    parts = np.array(kernel.splits, dtype=np.float64)[:, None]
    depth = k / parts
    rows, columns = np.array(kernel.tiles, dtype=np.float64).T[:, :, None]
    step_s = ((2 * rows * columns / unit_rate) ** 4 + ((rows + columns) * operand / unit_cache_rate) ** 4) ** 0.25
    waves = (batch * np.ceil(m / rows) * np.ceil(n / columns))[:, None, :] * parts / rates.units
    if kernel.wave_rounding:
        waves += kernel.wave_rounding * (np.ceil(waves) - waves)
    compute_s = (np.maximum(waves, 1.0) * (step_s[:, :, None] * depth + kernel.wave_s)).min(0)
    # (c^p + t^p)^(1/p), the longer taken out so that the powers cannot underflow
    longer, shorter = np.maximum(compute_s, memory_s), np.minimum(compute_s, memory_s)
    joined = longer * (1 + (shorter / longer) ** kernel.overlap) ** (1 / kernel.overlap)
    joined += np.where(parts > 1, kernel.split_s + 8.0 * parts * batch * m * n / cache_rate, 0.0)
    joined[(parts > 1) & (depth < LEAST_SPLIT_K)] = math.inf
    best: Array = joined.min(0) + kernel.fixed_s
    return best


def _correction(products: Products, grid: Correction) -> Array:
    """The grid's trilinear value, faded outside the grid."""
    knots = grid.log2_m, grid.log2_n, grid.log2_k
    if knots not in products.corners:
        products.corners[knots] = _corners(products, knots)
    cells, weights = products.corners[knots]
    found: Array = (weights * np.array(grid.values)[cells]).sum(0)
    return found


def _corners(products: Products, knots: Knots) -> tuple[NDArray[np.intp], Array]:
    """The eight corners around every product in a grid, as flat indices and weights: [8, products]."""
    sizes = products.m * products.batch, products.n, products.k
    (i, u, out_m), (j, v, out_n), (h, w, out_k) = (
        _place(np.log2(size), np.array(axis)) for size, axis in zip(sizes, knots, strict=True)
    )
    fade = np.clip(1.0 - np.maximum(np.maximum(out_m, out_n), out_k) / FADE_OCTAVES, 0.0, None)
    cells, weights = [], []
    for up_i, up_j, up_h in np.ndindex(2, 2, 2):
        cells.append(((i + up_i) * len(knots[1]) + j + up_j) * len(knots[2]) + h + up_h)
        weights.append(fade * (u if up_i else 1 - u) * (v if up_j else 1 - v) * (w if up_h else 1 - w))
    return np.stack(cells), np.stack(weights)


def _place(x: Array, knots: Array) -> tuple[NDArray[np.intp], Array, Array]:
    """The interval of ``x``, where in it (0 to 1), and how far outside all of them ``x`` lies."""
    index = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    fraction = np.clip((x - knots[index]) / (knots[index + 1] - knots[index]), 0.0, 1.0)
    return index, fraction, np.maximum(np.maximum(knots[0] - x, x - knots[-1]), 0.0)
