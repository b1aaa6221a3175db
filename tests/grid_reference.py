"""Slow references for rounding, from the definition: a list of values, and a comparison with its two neighbours."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from emulation.formats import NumberFormat

Floats = NDArray[np.float32]


@lru_cache
def magnitudes(fmt: NumberFormat) -> list[float]:
    """The non-negative finite values in ascending order: the index is the code, as in every float format."""
    if fmt.kind == "int":
        return [float(v) for v in range(2**fmt.mantissa_bits + 1)]
    count = 2 ** (fmt.exponent_bits + fmt.mantissa_bits)
    values = [fmt.value(code) for code in range(count)]
    return [v for v in values if math.isfinite(v)]


def round_scalar(x: float, fmt: NumberFormat, rounding: str, overflow: str) -> float:
    """One number, in exact rational arithmetic; not for kind ``exponent``."""
    if math.isnan(x):
        return math.nan
    grid = magnitudes(fmt)
    top = grid[-1] if fmt.kind == "int" else fmt.max_value
    if fmt.kind == "int" and x > 0:
        top = fmt.max_value
    extended = _with_one_beyond(fmt)
    beyond = extended[-1]
    if math.isinf(x):
        result, over = math.inf, True
    else:
        a = min(Fraction(abs(x)), beyond)
        lower = bisect.bisect_right(extended, a) - 1
        upper = min(lower + 1, len(extended) - 1)
        up = _goes_up(a, extended[lower], extended[upper], lower, rounding)
        index = upper if up else lower
        over = index == len(extended) - 1 and rounding != "toward_zero"
        result = float(extended[min(index, len(grid) - 1)]) if not over else math.inf
    if over or result > top:
        if overflow == "saturate" or not (fmt.has_inf or fmt.has_nan):
            result = top
        else:
            result = math.inf if fmt.has_inf else math.nan
    signed = math.copysign(result, x)
    return signed if fmt.has_negative_zero or signed != 0 else 0.0


@lru_cache
def _with_one_beyond(fmt: NumberFormat) -> list[Fraction]:
    grid = magnitudes(fmt)
    beyond = Fraction(2 * grid[-1] - grid[-2]) if fmt.mantissa_bits else Fraction(2 * grid[-1])
    return [*(Fraction(v) for v in grid), beyond]


def _goes_up(a: Fraction, low: Fraction, high: Fraction, low_code: int, rounding: str) -> bool:
    if a == low or rounding == "toward_zero":
        return False
    twice = 2 * a - low - high
    if twice == 0:
        return rounding == "nearest_away" or low_code % 2 == 1
    return twice > 0


def nearest_even(x: Floats, fmt: NumberFormat) -> Floats:
    """Many numbers at once: saturating, NaN kept; a float64 holds every sum of two neighbours exactly."""
    grid = np.array(magnitudes(fmt), dtype=np.float64)
    if fmt.kind == "int":
        grid = grid[:-1]
    a = np.minimum(np.abs(wide(x)), grid[-1])
    low = np.minimum(np.searchsorted(grid, np.nan_to_num(a), side="right") - 1, len(grid) - 2)
    twice = 2 * a - grid[low] - grid[low + 1]
    q = np.copysign(grid[low + ((twice > 0) | ((twice == 0) & (low % 2 == 1)))], wide(x))
    q = np.where(np.isnan(x), np.nan, q)
    if fmt.kind == "int":
        q = np.where(x <= fmt.min_value + 0.5, fmt.min_value, q)  # two's complement has one more, and it is even
    return (q if fmt.has_negative_zero else q + 0.0).astype(np.float32)


def wide(x: Floats) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # signalling NaNs are among the bit patterns
        return x.astype(np.float64)


def every_bfloat16() -> Floats:
    return (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)


def every_float16() -> Floats:
    with np.errstate(invalid="ignore"):
        return np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def critical_points(fmt: NumberFormat) -> Floats:
    """Every value, midpoint and overflow threshold of a format of at most 16 bits with its float32 neighbours."""
    grid = np.array(magnitudes(fmt), dtype=np.float64)
    beyond = np.array([2 * grid[-1] - grid[-2], 1.5 * grid[-1] - 0.5 * grid[-2], 2 * grid[-1], 1.5 * grid[-1]])
    with np.errstate(over="ignore"):
        points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, beyond]).astype(np.float32)
        tiny = np.array([0.0, 1e-45, 1.1754944e-38, 3.4028235e38, np.inf, np.nan], dtype=np.float32)
        points = np.concatenate([points, tiny])
        up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    points = np.concatenate([points, up, down])
    return np.concatenate([points, -points])


def random_bit_patterns(count: int, seed: int) -> Floats:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def same_bits(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Equal, the sign of zero included; NaN payloads and signs do not count."""
    nan = np.isnan(a) & np.isnan(b)
    return nan | (a.view(np.uint32) == b.view(np.uint32))
