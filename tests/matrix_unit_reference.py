"""Matrix units one output element at a time, in exact rational arithmetic, written from the definition of the steps.

An oracle for ``emulation.matmul``: it shares no code with it, and is some 10^4 times slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

NAN_BITS = 0x7FFFFFFF


class Rules(NamedTuple):
    """One row: products a step, fraction bits of addends and of results, and how it adds."""

    group: int
    fraction_bits: int
    result_bits: int
    kind: str
    run: int | None = None


def exponent(x: Fraction, lowest: int) -> int:
    """floor(log2|x|), not below ``lowest``."""
    size = abs(x)
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** guess:
        guess -= 1
    return max(guess, lowest)


def toward_zero(x: Fraction, power: int) -> Fraction:
    """x cut to a multiple of 2^power."""
    return math.trunc(x / Fraction(2) ** power) * Fraction(2) ** power


def toward_minus_infinity(x: Fraction, power: int) -> Fraction:
    return math.floor(x / Fraction(2) ** power) * Fraction(2) ** power


def cut_to_float(x: Fraction, bits: int) -> float:
    """x cut to ``bits`` fraction bits at an exponent of -126 or more; 2^128 and above is infinite."""
    if x == 0:
        return 0.0
    x = toward_zero(x, exponent(x, -126) - bits)
    if abs(x) >= 2**128:
        return math.copysign(math.inf, x)
    return float(x)


def nearest_even_float32(x: Fraction) -> float:
    if x == 0:
        return 0.0
    power = exponent(x, -126) - 23
    rounded = round(x / Fraction(2) ** power) * Fraction(2) ** power  # Fraction rounds ties to even
    if abs(rounded) >= 2**128:
        return math.copysign(math.inf, x)
    return math.copysign(float(rounded), x)


def special_sum(values: Sequence[float]) -> float | None:
    """The infinity or NaN that these values add up to, None where all are finite."""
    if any(math.isnan(v) for v in values) or {math.inf, -math.inf} <= set(values):
        return math.nan
    return next((v for v in values if math.isinf(v)), None)


def aligned_sum(addends: Sequence[tuple[Fraction, int]], bits: int) -> tuple[Fraction, int | None]:
    """(value, exponent) pairs cut at the largest exponent of those that are not zero, and summed; and that exponent."""
    top = max((e for value, e in addends if value != 0), default=None)
    if top is None:
        return Fraction(0), None
    return sum((toward_zero(value, top - bits) for value, _ in addends), Fraction(0)), top


def step(
    a: Sequence[float],
    b: Sequence[float],
    c: float,
    rules: Rules,
    lowest: tuple[int, int],
    scales: tuple[Sequence[float], Sequence[float], int, int] | None,
) -> float:
    """One step; ``scales``: those of the two operands, values a scale, the smallest normal exponent of a scale."""
    flat = [s for part in scales[:2] for s in part] if scales else []
    terms = [x * y for x, y in zip(a, b, strict=True)]
    if rules.kind.startswith("floored"):
        terms = [math.copysign(math.inf, x) if abs(x) >= 2.0**128 else x for x in terms]
    special = special_sum([*terms, c, *flat])
    if special is not None:
        return special
    if rules.kind == "block_scaled":
        return _block_scaled(a, b, c, rules, scales)
    shift = 0
    if scales:
        shift = exponent(Fraction(scales[0][0]), -127) + exponent(Fraction(scales[1][0]), -127)
    products = []
    for x, y in zip(a, b, strict=True):
        value = Fraction(x) * Fraction(y)
        own = exponent(Fraction(x), lowest[0]) + exponent(Fraction(y), lowest[1]) if value else 0
        products.append((value * Fraction(2) ** shift, own + shift))
    accumulator = (Fraction(c), exponent(Fraction(c), -126) if c else 0)
    if rules.kind == "truncated":
        total, _ = aligned_sum([*products, accumulator], rules.fraction_bits)
        return cut_to_float(total, rules.result_bits)
    return _floored(products, accumulator, rules)


def _block_scaled(a, b, c, rules, scales) -> float:
    addends = [(Fraction(c), exponent(Fraction(c), -126))] if c else []
    a_scales, b_scales, block, lowest = scales
    for k in range(0, len(a), 16):
        s, t = abs(Fraction(a_scales[k // block])), abs(Fraction(b_scales[k // block]))
        if s * t:
            dot = sum(Fraction(x) * Fraction(y) for x, y in zip(a[k : k + 16], b[k : k + 16], strict=True))
            addends.append((dot * s * t, exponent(s, lowest) + exponent(t, lowest)))
    top = max((e for _, e in addends), default=0)
    total = sum((toward_zero(value, top - rules.fraction_bits) for value, _ in addends), Fraction(0))
    return cut_to_float(total, rules.result_bits)


def _floored(products, accumulator, rules) -> float:
    lanes = [products[0::2], products[1::2]] if rules.kind == "floored_lanes" else [products]
    sums = [aligned_sum(lane, rules.fraction_bits) for lane in lanes]
    c, c_top = accumulator
    top = max((e for _, e in sums if e is not None), default=None)
    if top is None:
        return nearest_even_float32(c)
    total = sum((toward_minus_infinity(value, top - rules.fraction_bits) for value, _ in sums), Fraction(0))
    both = max(top, c_top) if c else top
    total = toward_minus_infinity(total, both - 31)
    if c and not (rules.kind == "floored_lanes" and c_top < both - 25):
        total += toward_minus_infinity(c, both - 24)
    return nearest_even_float32(total)


def dot(a, b, rules: Rules, lowest: tuple[int, int], scales=None) -> float:
    """The chain of steps over two vectors; ``scales`` as in :func:`step`, over all of K."""

    def chain(start: int, stop: int) -> float:
        c = 0.0
        for k in range(start, stop, rules.group):
            end = min(k + rules.group, stop)
            part = None
            if scales:
                block = scales[2]
                own = slice(k // block, -(-end // block))
                part = (scales[0][own], scales[1][own], block, scales[3])
            c = step(a[k:end], b[k:end], c, rules, lowest, part)
        return c

    if rules.run is None:
        return chain(0, len(a))
    total = np.float32(0)
    with np.errstate(all="ignore"):
        for k in range(0, len(a), rules.run):
            total = total + np.float32(chain(k, min(k + rules.run, len(a))))
    return float(total)


def product(a, b, rules: Rules, lowest: tuple[int, int], scales=None) -> np.ndarray:
    """The bits (uint32) of the product of [M, K] and [K, N]; scales ([M, blocks], [blocks, N], block, lowest)."""
    m, n = len(a), b.shape[1]
    out = np.zeros((m, n), dtype=np.float32)
    for i in range(m):
        for j in range(n):
            own = None
            if scales:
                own = (scales[0][i].tolist(), scales[1][:, j].tolist(), scales[2], scales[3])
            out[i, j] = dot(a[i].tolist(), b[:, j].tolist(), rules, lowest, own)
    bits = out.view(np.uint32).copy()
    bits[np.isnan(out)] = NAN_BITS
    return bits
