"""Fitting the GEMM model to measurements: constants by least squares, tile menu by search, correction by penalties.

The constants have physical meanings and few enough of them are free that shapes, sizes and sibling chips which were
kept from a fit are predicted about as well as those that were not (``docs/calibration.md`` has the errors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulation.errors import InputError
from hwmodels.calibration import Correction, Fitted, KernelCalibration, QuantizeCalibration
from hwmodels.gemm import GemmRates, quantize_seconds
from hwmodels.gemm_arrays import Array, Products, products_seconds

TILES = tuple((m, n) for m in (16, 32, 64, 128, 256) for n in (32, 64, 128, 256))
TILES += ((64, 16), (128, 16), (192, 128), (128, 192))
SPLITS = (1, 2, 4, 8, 16)
KNOTS_M = (1, 32, 128, 256, 512, 1024, 2048, 4096, 32768)
KNOTS_NK = (32, 256, 1024, 2048, 4096, 8192, 65536)
FEWEST_ROWS = 24  # to fit the physical constants
FEWEST_ROWS_CORRECTION = 400  # below, a correction would follow the noise

# start, lowest, highest of each constant
_START: Mapping[str, tuple[float, float, float]] = {
    "compute_efficiency": (0.9, 0.05, 1.0),
    "bandwidth_efficiency": (0.8, 0.05, 1.2),
    "cache_bytes_per_flop": (0.02, 0.001, 0.5),
    "resident": (0.1, 1e-3, 2.0),
    "fixed_s": (2e-6, 1e-7, 2e-4),
    "wave_s": (3e-7, 1e-9, 1e-4),
    "wave_rounding": (0.8, 0.02, 1.0),
    "overlap": (3.0, 1.0, 12.0),
    "split_s": (1e-6, 1e-8, 1e-4),
    "cast_s": (3e-6, 1e-8, 1e-4),
    "cast_bandwidth_efficiency": (0.5, 0.02, 4.0),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmRows:
    """Measured products of one kernel on one chip: sizes [rows] and seconds [rows]."""

    m: Array
    n: Array
    k: Array
    seconds: Array

    def __len__(self) -> int:
        return len(self.m)

    def where(self, chosen: NDArray[Any]) -> GemmRows:
        """The rows that a mask or an index array chooses."""
        return GemmRows(m=self.m[chosen], n=self.n[chosen], k=self.k[chosen], seconds=self.seconds[chosen])


def gemm_rows(shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float]) -> GemmRows:
    """Rows from plain numbers."""
    m, n, k = np.array(shapes, dtype=np.float64).reshape(-1, 3).T
    return GemmRows(m=m, n=n, k=k, seconds=np.array(seconds, dtype=np.float64))


def predict(rows: GemmRows, kernel: KernelCalibration, rates: GemmRates, *, quantize: bool = True) -> Array:
    """Seconds of every row: the GEMM, and the quantization of its activation unless that is not asked for."""
    seconds = products_seconds(_products(rows, rates), kernel, rates)
    return seconds + _quantize_s(rows, kernel, rates) if quantize else seconds


def _products(rows: GemmRows, rates: GemmRates) -> Products:
    return Products(
        m=rows.m,
        n=rows.n,
        k=rows.k,
        batch=np.ones_like(rows.m),
        operand_elements=rows.k * (rows.m + rows.n),
        result_bytes=rates.output_bytes * rows.m * rows.n,
    )


def _quantize_s(rows: GemmRows, kernel: KernelCalibration, rates: GemmRates) -> Array:
    fixed = quantize_seconds(0, kernel, rates)
    return fixed + (quantize_seconds(1, kernel, rates) - fixed) * rows.m * rows.k


def _spread(rows: GemmRows, grid: Correction) -> tuple[NDArray[np.int64], Array]:
    """For every row the eight grid points around it and their shares of its value: [rows, 8] each."""
    points, shares = np.zeros((len(rows), 8), dtype=np.int64), np.ones((len(rows), 8))
    up = np.arange(8)[:, None] >> np.array([2, 1, 0]) & 1
    for axis, (sizes, logs) in enumerate(((rows.m, grid.log2_m), (rows.n, grid.log2_n), (rows.k, grid.log2_k))):
        knots, x = np.array(logs), np.log2(sizes)
        index = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
        fraction = (x - knots[index]) / (knots[index + 1] - knots[index])
        points = points * len(knots) + index[:, None] + up[:, axis]
        shares = shares * np.where(up[:, axis] == 1, fraction[:, None], 1.0 - fraction[:, None])
    return points, shares


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far predictions are from measurements: mean and median absolute percentage error, and rank correlation."""

    mape_percent: float
    median_percent: float
    rank_correlation: float


def errors(predicted: Array, measured: Array) -> Errors:
    """Errors of predictions relative to measurements; the rank correlation is Spearman's (nan for one row)."""
    percent = np.abs(predicted / measured - 1.0) * 100.0
    ranks = [np.unique(values, return_inverse=True, return_counts=True)[1:] for values in (predicted, measured)]
    centred = [(np.cumsum(counts) - (counts + 1) / 2)[inverse] for inverse, counts in ranks]
    centred = [values - values.mean() for values in centred]
    norm = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return Errors(
        mape_percent=float(percent.mean()),
        median_percent=float(np.median(percent)),
        rank_correlation=float((centred[0] * centred[1]).sum()) / norm if norm > 0 else math.nan,
    )


def halves(rows: GemmRows, seed: int = 0) -> tuple[GemmRows, GemmRows]:
    """Two halves with no shape in common."""
    shapes, inverse = np.unique(np.stack([rows.m, rows.n, rows.k]), axis=1, return_inverse=True)
    side = np.random.default_rng(seed).permutation(shapes.shape[1]) % 2 == 0
    chosen = side[inverse.reshape(-1)]
    return rows.where(chosen), rows.where(~chosen)


def fit_kernel(
    rows: GemmRows,
    rates: GemmRates,
    *,
    source: str,
    quantize: QuantizeCalibration | None = None,
    dynamic: bool = False,
    fixed_s: float | None = None,
    correct: bool = True,
) -> KernelCalibration:
    """A calibration fitted to all rows, which carries the error that a fit to half of their shapes has on the others.

    Args:
        rows: measurements.
        rates: the chip's published numbers.
        source: where the measurements are from.
        quantize: passes over the activation, measured apart, that the rows include.
        dynamic: the rows include passes that were not measured apart: one kernel, fitted with the rest.
        fixed_s: fixed cost of one GEMM kernel where it is known (from bfloat16); fitted otherwise.
        correct: whether to fit a correction where there are rows enough.

    Raises:
        InputError: fewer than ``FEWEST_ROWS`` shapes.
    """
    if len(rows) < FEWEST_ROWS:
        raise InputError(f"{len(rows)} measurements are too few to fit", hint=f"{FEWEST_ROWS} shapes at least")
    known: dict[str, Any] = {"quantize": quantize, "dynamic": dynamic, "fixed_s": fixed_s, "correct": correct}
    predicted, measured = [], []
    parts = halves(rows)
    for trained, tested in (parts, parts[::-1]):
        predicted.append(predict(tested, fit_rows(trained, rates, **known), rates))
        measured.append(tested.seconds)
    apart, seen = np.concatenate(predicted), np.concatenate(measured)
    found = errors(apart, seen)
    low, high = np.quantile(np.log(seen / apart), (0.1, 0.9))
    fitted = Fitted(
        source=source,
        rows=len(rows),
        held_out_mape_percent=round(found.mape_percent, 2),
        held_out_median_percent=round(found.median_percent, 2),
        held_out_rank_correlation=round(found.rank_correlation, 4),
    )
    return replace(fit_rows(rows, rates, **known), fitted=fitted, band=(round(float(low), 3), round(float(high), 3)))


def fit_rows(
    rows: GemmRows,
    rates: GemmRates,
    *,
    quantize: QuantizeCalibration | None = None,
    dynamic: bool = False,
    fixed_s: float | None = None,
    correct: bool = True,
) -> KernelCalibration:
    """A calibration fitted to all rows, without a statement of its error; arguments as of ``fit_kernel``."""
    kernel = _initial(rows, quantize, dynamic, fixed_s)
    free = [name for name in _START if name not in ("cast_s", "cast_bandwidth_efficiency") or dynamic]
    free = [name for name in free if name != "fixed_s" or fixed_s is None]
    some = rows.where(np.random.default_rng(1).permutation(len(rows))[:900])
    best = math.inf
    for _ in range(min(4, len(TILES))):
        trials = []
        for tile in TILES:
            if tile not in kernel.tiles:
                tiles = (*kernel.tiles, tile) if best < math.inf else (tile,)
                trial = _least_squares(some, replace(kernel, tiles=tiles), rates, free, evaluations=10)
                trials.append((errors(predict(some, trial, rates), some.seconds).mape_percent, tile, trial))
        found, _, trial = min(trials, key=lambda trial: trial[:2])
        if found > 0.98 * best:
            break
        best, kernel = found, trial
    kernel = _rounded(_least_squares(rows, kernel, rates, free, evaluations=60))
    if correct and len(rows) >= FEWEST_ROWS_CORRECTION:
        kernel = replace(kernel, correction=_fit_correction(rows, kernel, rates))
    return kernel


def _initial(
    rows: GemmRows, quantize: QuantizeCalibration | None, dynamic: bool, fixed_s: float | None
) -> KernelCalibration:
    start = {name: limits[0] for name, limits in _START.items()}
    cast_s, cast_efficiency = start.pop("cast_s"), start.pop("cast_bandwidth_efficiency")
    if dynamic:
        quantize = QuantizeCalibration(
            amax_s=0.0, amax_bandwidth_efficiency=None, cast_s=cast_s, cast_bandwidth_efficiency=cast_efficiency
        )
    if fixed_s is not None:
        start["fixed_s"] = fixed_s
    nothing = Fitted(
        source="", rows=0, held_out_mape_percent=0.0, held_out_median_percent=0.0, held_out_rank_correlation=0.0
    )
    return KernelCalibration(
        **start,
        tiles=((128, 128),),
        splits=SPLITS,
        quantize=quantize,
        correction=None,
        band=(0.0, 0.0),
        range_m=(int(rows.m.min()), int(rows.m.max())),
        range_n=(int(rows.n.min()), int(rows.n.max())),
        range_k=(int(rows.k.min()), int(rows.k.max())),
        fitted=nothing,
    )


def _values(kernel: KernelCalibration, names: Sequence[str]) -> list[float]:
    return [float(getattr(kernel.quantize if name.startswith("cast_") else kernel, name)) for name in names]


def _with_values(kernel: KernelCalibration, values: Mapping[str, float]) -> KernelCalibration:
    cast = {name: value for name, value in values.items() if name.startswith("cast_")}
    changed: dict[str, Any] = {name: value for name, value in values.items() if name not in cast}
    if cast and kernel.quantize is not None:
        changed["quantize"] = replace(kernel.quantize, **cast)
    return replace(kernel, **changed)


def _least_squares(
    rows: GemmRows, kernel: KernelCalibration, rates: GemmRates, names: Sequence[str], *, evaluations: int
) -> KernelCalibration:
    """The constants that minimise a robust loss of ln(predicted / measured), each between its limits."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped,unused-ignore]

    low, high = (np.log([_START[name][side] for name in names]) for side in (1, 2))
    goal = np.log(rows.seconds)

    def residuals(x: Array) -> Array:
        trial = _with_values(kernel, dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.log(predict(rows, trial, rates)) - goal

    start = np.clip(np.log(_values(kernel, names)), low + 1e-6, high - 1e-6)
    found = least_squares(
        residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=evaluations, diff_step=1e-3
    )
    return _with_values(kernel, dict(zip(names, np.exp(found.x).tolist(), strict=True)))


def _rounded(kernel: KernelCalibration) -> KernelCalibration:
    """Four digits of every constant: what a profile stores, so that the correction is fitted to what is stored."""
    names = [name for name in _START if kernel.quantize is not None or not name.startswith("cast_")]
    return _with_values(
        kernel, {name: float(f"{value:.4g}") for name, value in zip(names, _values(kernel, names), strict=True)}
    )


def _fit_correction(
    rows: GemmRows, kernel: KernelCalibration, rates: GemmRates, roughness: float = 0.1, size: float = 0.02
) -> Correction:
    """The grid that removes most of the absolute logarithmic error, held smooth and small where there are few rows.

    Iteratively reweighted least squares; the correction acts on the GEMM alone, so that a row weighs what the GEMM is
    of its total.
    """
    from scipy.sparse import csr_matrix, diags, eye, kron, vstack  # type: ignore[import-untyped,unused-ignore]
    from scipy.sparse.linalg import spsolve  # type: ignore[import-untyped,unused-ignore]

    axes = [_knots(sizes, knots) for sizes, knots in ((rows.m, KNOTS_M), (rows.n, KNOTS_NK), (rows.k, KNOTS_NK))]
    lengths = [len(axis) for axis in axes]
    logs = [tuple(math.log2(knot) for knot in axis) for axis in axes]
    values = np.zeros(math.prod(lengths))
    grid = Correction(log2_m=logs[0], log2_n=logs[1], log2_k=logs[2], values=tuple(values.tolist()))
    points, shares = _spread(rows, grid)
    spread = csr_matrix((shares.ravel(), points.ravel(), np.arange(0, points.size + 1, 8)), (len(rows), len(values)))
    steps = []
    for axis, length in enumerate(lengths):
        parts = [eye(size_) for size_ in lengths]
        parts[axis] = diags([-np.ones(length - 1), np.ones(length - 1)], [0, 1], shape=(length - 1, length))
        steps.append(kron(kron(parts[0], parts[1]), parts[2]))
    difference = vstack(steps)
    penalty = roughness * (difference.T @ difference) + size * eye(len(values))
    plain, quantize_s = predict(rows, kernel, rates, quantize=False), _quantize_s(rows, kernel, rates)
    for _ in range(10):
        gemm_s = plain * np.exp(spread @ values)
        share = gemm_s / (gemm_s + quantize_s)
        residual = np.log(rows.seconds / (gemm_s + quantize_s))
        weight = 0.06 / np.maximum(np.abs(residual), 0.03)
        scaled = diags(share) @ spread
        normal = scaled.T @ diags(weight) @ scaled + penalty
        values = spsolve(normal.tocsc(), scaled.T @ (weight * (residual + share * (spread @ values))))
    return replace(grid, values=tuple((np.round(np.clip(values, -2.0, 2.0) * 100) / 100).tolist()))


def _knots(sizes: Array, knots: Sequence[int]) -> list[int]:
    """Those knots that the sizes reach, from their smallest to their largest."""
    low, high = int(sizes.min()), int(sizes.max())
    return [low, *(knot for knot in knots if low < knot < high), high]


def fit_quantize(
    elements: Sequence[float], seconds: Sequence[float], bytes_per_element: float, bandwidth_bytes_per_s: float
) -> tuple[float, float, float]:
    """Fixed seconds, bandwidth efficiency and held-out percentage error of one pass over a tensor.

    Minimises relative error of ``fixed + elements * bytes / (efficiency * bandwidth)``.
    """
    from scipy.optimize import least_squares

    count, measured = np.array(elements, dtype=np.float64), np.array(seconds, dtype=np.float64)

    def fit(chosen: NDArray[Any]) -> Array:
        def residuals(x: Array) -> Array:
            return np.asarray(np.log(_pass(count[chosen], x)) - np.log(measured[chosen]))

        start = np.log([measured.min(), 0.5])
        return np.asarray(least_squares(residuals, start, loss="soft_l1", f_scale=0.1).x)

    def _pass(elements_: Array, x: Array) -> Array:
        fixed, efficiency = np.exp(x)
        return np.asarray(fixed + elements_ * bytes_per_element / (efficiency * bandwidth_bytes_per_s))

    side = np.random.default_rng(0).permutation(len(count)) % 2 == 0
    apart = errors(_pass(count[~side], fit(side)), measured[~side])
    fixed, efficiency = np.exp(fit(np.ones(len(count), dtype=bool)))
    return float(f"{fixed:.4g}"), float(f"{efficiency:.4g}"), apart.mape_percent
