"""The arithmetic of matrix units as Triton kernels: the same bits as ``emulation.matmul_torch``, on CUDA.

Each program owns one tile of one product of the batch and walks over K. A step reads its operands twice: once for the
largest exponent, once for the products, which are cut by conversion to int32. Importing this module imports Triton; a
kernel is compiled at its first use for a unit (seconds) and cached by Triton on disk.
"""

# Triton reads the annotations of kernels as code: theirs are for compile-time constants alone.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from emulation.matmul_torch import LOWEST_EXPONENT, ZERO_EXPONENT, Operand, fits_float32
from emulation.matrix_units import MatrixUnit

TILES = {"chained": (32, 64, 4), "block_scaled": (64, 64, 8)}  # rows, columns and warps of a program
_LOWEST = tl.constexpr(LOWEST_EXPONENT)
_ZERO = tl.constexpr(ZERO_EXPONENT)
_LEAST_NORMAL = tl.constexpr(2.0**-126)
_LEAST = tl.constexpr(2.0**-149)
_PER_LEAST = tl.constexpr(2.0**149)  # as digits it was one unit in the last place less, and cut exact results down


def takes(left: Operand, right: Operand, unit: MatrixUnit) -> bool:
    """Whether the kernels can do it: no infinity, no NaN, and no product that a flooring unit would call infinite."""
    if left.specials is not None or left.scale_specials is not None or right.scale_specials is not None:
        return False
    return not unit.arithmetic.startswith("floored") or fits_float32(left, right)


def chained_product(left: Operand, right: Operand, unit: MatrixUnit) -> Tensor:
    """The product [..., M, N] of two operands [K, ..., M] and [K, ..., N] of finite values on a CUDA device."""
    k, *batch, m = left.values.shape
    n = right.values.shape[-1]
    out = torch.zeros(*batch, m, n, dtype=torch.float32, device=left.values.device)
    if out.numel() == 0 or k == 0:
        return out
    padded = -(-k // unit.group) * unit.group
    sums = unit.arithmetic == "block_scaled"
    rows, columns, warps = TILES["block_scaled" if sums else "chained"]
    pairs = math.prod(batch)
    grid = (pairs * triton.cdiv(m, rows), triton.cdiv(n, columns))
    values = [_pad(x.values, padded, 0.0) for x in (left, right)]
    exponents = [_pad(x.exponents, padded, ZERO_EXPONENT) for x in (left, right)]
    scales = exponents  # not read where there are none
    if left.scale_exponents is not None and right.scale_exponents is not None:
        blocks = -(-padded // left.block)
        scales = [_pad(x, blocks, ZERO_EXPONENT) for x in (left.scale_exponents, right.scale_exponents)]
    constants = {
        "GROUP": unit.group,
        "FRACTION_BITS": unit.fraction_bits,
        "RESULT_BITS": unit.result_bits,
        "BLOCK": left.block,
        "WIDE": left.wide or right.wide,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": warps,
    }
    with torch.cuda.device_of(out):
        if sums:
            values = [x.half() for x in values]  # at most 6 significant bits between 2^-4 and 12: exact
            _block_scaled[grid](*values, *scales, out, m, n, pairs, padded, **constants)
        else:
            _chained[grid](
                *values,
                *exponents,
                *scales,
                out,
                m,
                n,
                pairs,
                padded,
                RUN=unit.run or 0,
                LANES={"truncated": 0, "floored": 1, "floored_lanes": 2}[unit.arithmetic],
                DOUBLE=not fits_float32(left, right),
                LONG=unit.group > 1 << (29 - unit.fraction_bits),
                **constants,
            )
    return out


def _pad(x: Tensor, length: int, value: float) -> Tensor:
    x = x.contiguous()
    return x if len(x) == length else F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x)), value=value)


@triton.jit
def _tile(m, n, pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which pair of the batch a program works on, its rows and columns there, and what one step along K skips."""
    tiles = tl.cdiv(m, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return pair, i, j, tl.cast(m, tl.int64) * pairs, tl.cast(n, tl.int64) * pairs


@triton.jit
def _store(out, value, pair, own_i, own_j, m, n):
    inside = (own_i < m)[:, None] & (own_j < n)[None, :]
    row = pair * m + own_i
    tl.store(out + row[:, None] * n + own_j[None, :], value, mask=inside)


@triton.jit
def _power_of_two(exponent):
    held = tl.minimum(tl.maximum(exponent, -1022), 1023)
    return ((held + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _float32_power_of_two(exponent):
    held = tl.minimum(tl.maximum(exponent, -126), 127)
    return ((held + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _accumulator_exponent(c):
    bits = c.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 255) - 127, -126)
    return tl.where((bits & 0x7FFFFFFF) == 0, _ZERO, exponent)


@triton.jit
def _cut_to_float32(total, exponent, RESULT_BITS: tl.constexpr, WIDE: tl.constexpr):
    """total (int64) * 2^exponent cut to RESULT_BITS fraction bits and to multiples of 2^-149."""
    bits = total.to(tl.float64).to(tl.int64, bitcast=True)
    kept = ((bits >> (52 - RESULT_BITS)) << (52 - RESULT_BITS)).to(tl.float64, bitcast=True)
    result = kept * _power_of_two(exponent)
    if WIDE:
        small = tl.abs(result) < _LEAST_NORMAL
        steps = tl.where(small, result * _PER_LEAST, 0.0).to(tl.int64)
        result = tl.where(small, steps.to(tl.float64) * _LEAST, result)
    return result.to(tl.float32)


@triton.jit
def _top_exponent(
    ae, be, start, m, n, i, j,
    TERMS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest exponent of TERMS products, every STRIDE-th from ``start`` on."""
    top = tl.full((ROWS, COLUMNS), 2 * _ZERO, dtype=tl.int32)
    for term in range(TERMS):
        k = start + term * STRIDE
        x = tl.load(ae + k * m + i).to(tl.int32)
        y = tl.load(be + k * n + j).to(tl.int32)
        top = tl.maximum(top, x[:, None] + y[None, :])
    return top


@triton.jit
def _cut_sum(
    a, b, start, m, n, i, j, shift,
    TERMS: tl.constexpr, STRIDE: tl.constexpr, DOUBLE: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of trunc(product * 2^shift) over the same products, int64."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.int64 if LONG else tl.int32)
    factor = _power_of_two(shift) if DOUBLE else _float32_power_of_two(shift)
    for term in range(TERMS):
        k = start + term * STRIDE
        x = tl.load(a + k * m + i)
        y = tl.load(b + k * n + j)
        if DOUBLE:
            x = x.to(tl.float64)
            y = y.to(tl.float64)
        total += ((x[:, None] * y[None, :]) * factor).to(tl.int32)
    return total.to(tl.int64)


@triton.jit(do_not_specialize=("rows", "columns", "pairs", "length"))  # one compilation for all shapes
def _chained(
    a, b, ae, be, sa, sb, out, rows, columns, pairs, length,
    GROUP: tl.constexpr, FRACTION_BITS: tl.constexpr, RESULT_BITS: tl.constexpr, RUN: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Chains of ``truncated`` steps (LANES 0) or ``floored`` ones with 1 or 2 lanes; sums of chains where RUN > 0."""
    pair, own_i, own_j, m, n = _tile(rows, columns, pairs, ROWS, COLUMNS)
    # rows beyond the end do the last one's work again: no masks in the loops
    i, j = pair * rows + tl.minimum(own_i, rows - 1), pair * columns + tl.minimum(own_j, columns - 1)
    c = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    result = c
    for start in range(0, length, GROUP):
        c_top = _accumulator_exponent(c)
        if LANES == 0:
            top = _top_exponent(ae, be, start, m, n, i, j, GROUP, 1, ROWS, COLUMNS)
            if BLOCK > 0:
                block = start // BLOCK
                scale = tl.load(sa + block * m + i)[:, None] + tl.load(sb + block * n + j)[None, :]
                top += scale
            top = tl.maximum(tl.maximum(top, c_top), _LOWEST)
            shift = FRACTION_BITS - top
            own_shift = shift
            if BLOCK > 0:
                own_shift = shift + scale
            total = _cut_sum(a, b, start, m, n, i, j, own_shift, GROUP, 1, DOUBLE, LONG, ROWS, COLUMNS)
            # an infinite accumulator is kept below: it must not be converted
            held = c
            if WIDE:
                held = tl.where(tl.abs(c) == float("inf"), 0.0, c)
            total += (held.to(tl.float64) * _power_of_two(shift)).to(tl.int64)
            new = _cut_to_float32(total, -shift, RESULT_BITS, WIDE)
        else:
            LANE: tl.constexpr = GROUP // LANES
            top = _top_exponent(ae, be, start, m, n, i, j, LANE, LANES, ROWS, COLUMNS)
            own = _cut_sum(a, b, start, m, n, i, j, FRACTION_BITS - top, LANE, LANES, DOUBLE, LONG, ROWS, COLUMNS)
            value = own.to(tl.float64)
            if LANES == 2:
                odd = _top_exponent(ae, be, start + 1, m, n, i, j, LANE, LANES, ROWS, COLUMNS)
                own = _cut_sum(
                    a, b, start + 1, m, n, i, j, FRACTION_BITS - odd, LANE, LANES, DOUBLE, LONG, ROWS, COLUMNS
                )  # fmt: skip
                larger = tl.maximum(top, odd)
                value = tl.floor(value * _power_of_two(top - larger)) + tl.floor(
                    own.to(tl.float64) * _power_of_two(odd - larger)
                )
                top = larger
            both = tl.maximum(tl.maximum(top, c_top), _LOWEST)
            value = tl.floor(value * _power_of_two(top - both + 7))  # 31 fraction bits from here on
            cut = tl.floor(c.to(tl.float64) * _power_of_two(FRACTION_BITS - both)) * 128.0
            if LANES == 2:
                cut = tl.where(c_top < both - 25, 0.0, cut)
            new = ((value + cut) * _power_of_two(both - 31)).to(tl.float32)
        if WIDE:
            new = tl.where(tl.abs(c) == float("inf"), c, new)
        c = new
        if RUN > 0:  # noqa: SIM102  (a constant condition: what depends on it must not be compiled without it)
            if ((start + GROUP) % RUN == 0) | (start + GROUP >= length):
                result += c
                c = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if RUN == 0:
        result = c
    _store(out, result, pair, own_i, own_j, rows, columns)


@triton.jit(do_not_specialize=("rows", "columns", "pairs", "length"))
def _block_scaled(
    a, b, sa, sb, out, rows, columns, pairs, length,
    GROUP: tl.constexpr, FRACTION_BITS: tl.constexpr, RESULT_BITS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Chains of ``block_scaled`` steps: sums of 16 products from the tensor cores, exact in any of their modes."""
    pair, own_i, own_j, m, n = _tile(rows, columns, pairs, ROWS, COLUMNS)
    i, j = pair * rows + tl.minimum(own_i, rows - 1), pair * columns + tl.minimum(own_j, columns - 1)
    terms = tl.arange(0, 16)
    c = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, length, GROUP):
        top = tl.maximum(_accumulator_exponent(c), _LOWEST)
        for part in tl.static_range(GROUP // 16):
            block = (start + part * 16) // BLOCK
            scale = tl.load(sa + block * m + i)[:, None] + tl.load(sb + block * n + j)[None, :]
            top = tl.maximum(top, scale)
        shift = FRACTION_BITS - top
        held = c
        if WIDE:
            held = tl.where(tl.abs(c) == float("inf"), 0.0, c)
        total = (held.to(tl.float64) * _power_of_two(shift)).to(tl.int64)
        for part in tl.static_range(GROUP // 16):
            k = start + part * 16 + terms
            x = tl.load(a + k[None, :] * m + i[:, None])
            y = tl.load(b + k[:, None] * n + j[None, :])
            exact = tl.dot(x, y)
            block = (start + part * 16) // BLOCK
            scale = tl.load(sa + block * m + i)[:, None] + tl.load(sb + block * n + j)[None, :]
            total += (exact.to(tl.float64) * _power_of_two(scale + shift)).to(tl.int64)
        new = _cut_to_float32(total, -shift, RESULT_BITS, WIDE)
        if WIDE:
            new = tl.where(tl.abs(c) == float("inf"), c, new)
        c = new
    _store(out, c, pair, own_i, own_j, rows, columns)
