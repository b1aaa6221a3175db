"""The GEMM time model of ``hwmodels.gemm`` on arrays of products at once: the same formula, a test holds them equal.

It goes one step further than single products: an implicit GEMM (a convolution) reads fewer distinct elements from
memory than its [m, k] operand has, and an attention's scores never leave the chip, so the memory traffic is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.calibration import Correction, KernelCalibration
from hwmodels.gemm import FADE_OCTAVES, LEAST_SPLIT_K, GemmRates

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Matrix products, one per entry of equally long arrays.

    Attributes:
        m, n, k, batch: ``batch`` products [m, k] x [k, n] in one kernel.
        operand_elements: distinct elements of both operands, over the batch.
        result_bytes: bytes of the results, over the batch.
    """

    m: Array
    n: Array
    k: Array
    batch: Array
    operand_elements: Array
    result_bytes: Array

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
    # every tile shape and split of the inner dimension at once: [choices, products]
    shapes = np.array([(rows, columns, parts) for rows, columns in kernel.tiles for parts in kernel.splits], float)
    rows, columns, parts = shapes.T[:, :, None]
    depth = k / parts
    multiply_s = 2 * rows * columns * depth / unit_rate
    load_s = (rows + columns) * depth * operand / unit_cache_rate
    tile_s = np.sqrt(np.sqrt(np.square(np.square(multiply_s)) + np.square(np.square(load_s)))) + kernel.wave_s
    waves = batch * np.ceil(m / rows) * np.ceil(n / columns) * parts / rates.units
    waves = np.maximum(waves + kernel.wave_rounding * (np.ceil(waves) - waves), 1.0)
    compute_s = waves * tile_s
    extra_s = np.where(parts > 1, kernel.split_s + 8.0 * parts * batch * m * n / cache_rate, 0.0)
    # (c^p + t^p)^(1/p), the longer taken out so that the powers cannot underflow
    longer, shorter = np.maximum(compute_s, memory_s), np.minimum(compute_s, memory_s)
    joined = longer * (1 + (shorter / longer) ** kernel.overlap) ** (1 / kernel.overlap) + extra_s
    joined[(parts > 1) & (depth < LEAST_SPLIT_K)] = math.inf
    best: Array = joined.min(0) + kernel.fixed_s
    return best


def _correction(products: Products, grid: Correction) -> Array:
    """The grid's trilinear value, faded outside the grid."""
    axes = (products.m * products.batch, grid.log2_m), (products.n, grid.log2_n), (products.k, grid.log2_k)
    places = [_place(np.log2(sizes), np.array(knots)) for sizes, knots in axes]
    fade = np.clip(1.0 - np.max([outside for _, _, outside in places], axis=0) / FADE_OCTAVES, 0.0, None)
    values = np.array(grid.values).reshape([len(knots) for _, knots in axes])
    (i, u, _), (j, v, _), (h, w, _) = places
    total = np.zeros(len(u))
    for up_i, up_j, up_h in np.ndindex(2, 2, 2):
        weight = (u if up_i else 1 - u) * (v if up_j else 1 - v) * (w if up_h else 1 - w)
        total += weight * values[i + up_i, j + up_j, h + up_h]
    faded: Array = fade * total
    return faded


def _place(x: Array, knots: Array) -> tuple[NDArray[np.intp], Array, Array]:
    index = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    fraction = np.clip((x - knots[index]) / (knots[index + 1] - knots[index]), 0.0, 1.0)
    return index, fraction, np.maximum(np.maximum(knots[0] - x, x - knots[-1]), 0.0)
