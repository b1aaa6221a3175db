"""The codec's arithmetic as Triton kernels, for CUDA: quantize.c again, one pass over memory, the same bits.

Importing this module imports Triton; a kernel compiles at its first use for a kind of format (about a second), and
Triton caches it on disk. A call launches one kernel, or two where the numbers that share a scale are too many for one
program to hold; nothing waits for the device and nothing is copied to it, so calls can be captured in CUDA graphs.
"""

# Triton reads the annotations of kernels as code: theirs are for compile-time constants alone.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emulation.kernel_formats import BITS, IDENTITY, INTEGER, MAGIC, RULES, KernelFormat
from emulation.triton_launch import launch

# MAGIC where the format has -0, what is beyond its largest number is cut off before it is rounded, and no tie lies
# between two powers of two
_PLAIN_KIND = 1 + max(MAGIC, BITS, INTEGER, IDENTITY)
_MAGIC, _BITS, _INTEGER, _IDENTITY = (tl.constexpr(i) for i in (MAGIC, BITS, INTEGER, IDENTITY))
_PLAIN = tl.constexpr(_PLAIN_KIND)
_NONE, _MAX, _POW2, _FLOOR, _RCEIL, _NVFP4 = (tl.constexpr(i) for i in range(len(RULES)))
_LARGEST = tl.constexpr(3.4028234663852886e38)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
_NAN_TOO = tl.constexpr(tl.PropagateNan.ALL)
_ALONE, _WITHIN, _BEFORE = (tl.constexpr(i) for i in range(3))  # no scale; from the program's own rows; from _largest
_TILE = 2048  # elements of a program
_WIDEST = 16384  # of a row that one program holds
_PARTS = 256  # at most so many programs look for the largest magnitude of one unit


@triton.jit
def _xor_shift(h, SHIFT: tl.constexpr):
    return h ^ (h >> SHIFT)


@triton.jit
def _mixed(key):
    """SplitMix64 of a key, as its two halves."""
    z = key.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = _xor_shift(z, 30) * 0xBF58476D1CE4E5B9
    z = _xor_shift(z, 27) * 0x94D049BB133111EB
    z = _xor_shift(z, 31)
    return (z & 0xFFFFFFFF).to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def _hash(index, low, high):
    h = index * 0x9E3779B9 + low
    h = _xor_shift(h, 16) * 0x7FEB352D
    h = _xor_shift(h ^ high, 15) * 0x846CA68B
    return _xor_shift(h, 16)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, _NAN_TOO), high, _NAN_TOO)


@triton.jit
def _rounded(
    s, noise, low, high, top, special, tiny, man, emin, draw, KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    KEEPS_SIGN: tl.constexpr,
):  # fmt: skip
    """One element, already scaled, on the grid: see rounding.py for why."""
    a = _clamp(s, low, high)
    if KIND == _IDENTITY:
        q = a
    elif KIND == _INTEGER:
        below = tl.floor(a)
        if STOCHASTIC:
            steps = ((draw + 127) << 23).to(tl.float32, bitcast=True)
            drawn = (noise & ((1 << draw) - 1).to(tl.uint32)).to(tl.float32)
            q = below + tl.where(tl.floor((a - below) * steps) + drawn >= steps, 1.0, 0.0)
        else:
            rest = a - below  # exact below 2^23, where the format's numbers are
            odd = (below.to(tl.int32) & 1) == 1
            q = below + tl.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)
        q = tl.where(s != s, s, q + 0.0)
    else:
        shift = 23 - man
        sign = s.to(tl.int32, bitcast=True) & -2147483648
        if KIND != _BITS and not STOCHASTIC:
            p = a.to(tl.int32, bitcast=True) & 0x7F800000
            p = tl.maximum(p, (emin + 127) << 23)
            magic = p + ((shift << 23) + (1 << 22))
            if KIND == _MAGIC:
                magic += tl.where(man == 0, ((p >> 23) + emin + 127) & 1, 0)
            c = magic.to(tl.float32, bitcast=True)
            q = (a + c) - c
            if KIND == _MAGIC:
                q = tl.where(tl.abs(q) > top, special, q)
            if KEEPS_SIGN:
                q = (q.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        else:
            m = tl.abs(a)
            if STOCHASTIC:
                dither = ((noise & ((1 << draw) - 1).to(tl.uint32)) << (shift - draw).to(tl.uint32)).to(tl.int32)
            else:
                dither = ((m.to(tl.int32, bitcast=True) >> shift) & 1) + ((1 << (shift - 1)) - 1)
            lift = tl.zeros_like(m)
            if KIND != _BITS:
                lift = tl.where(m < tiny, tiny, 0.0)
            bits = ((m + lift).to(tl.int32, bitcast=True) + dither) & -(1 << shift)
            q = bits.to(tl.float32, bitcast=True) - lift
            if KIND != _PLAIN:
                q = tl.where(q > top, special, q)
            q = (q.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            if not KEEPS_SIGN:
                q = q + 0.0
        q = tl.where(s != s, s, q)
    return q


@triton.jit
def _scales(amax, above, top, inverse, full, emax, b_high, b_tiny, b_man, b_emin, RULE: tl.constexpr):
    """Scale, factor and the scale above it, from the largest magnitudes: see scales.py."""
    unit = tl.full(amax.shape, 1.0, tl.float32)
    if RULE == _NVFP4:
        encode = tl.div_rn(full + tl.zeros_like(above), above)
        encode = tl.where(encode > _LARGEST, _LARGEST, encode)
        encode = tl.where(above == 0, 1.0, encode)
        encode = tl.where(above < float("inf"), encode, float("nan"))
        unit = tl.where(above == 0, 1.0, tl.div_rn(above, full + tl.zeros_like(above)))
        unit = tl.where(above < float("inf"), unit, float("nan"))
        wanted = amax * (encode * inverse)
        scale = _rounded(wanted, 0, -b_high, b_high, b_high, b_high, b_tiny, b_man, b_emin, 0, _MAGIC, False, True)
        product = scale * tl.div_rn(tl.full(encode.shape, 1.0, tl.float32), encode)
        factor = tl.div_rn(tl.full(product.shape, 1.0, tl.float32), product)
        factor = tl.where(factor > _LARGEST, _LARGEST, factor)
    else:
        if RULE == _MAX:
            scale = tl.div_rn(amax, top + tl.zeros_like(amax))
            scale = tl.where(scale < _SMALLEST, _SMALLEST, scale)
            scale = tl.where(amax == 0, 1.0, scale)
        else:
            a = amax
            if RULE == _RCEIL:
                a = amax * inverse
            bits = a.to(tl.int32, bitcast=True)
            exponent = bits >> 23
            mantissa = bits & 0x7FFFFF
            if RULE == _FLOOR:
                field = exponent - emax
            elif RULE == _RCEIL:
                field = exponent + (mantissa > tl.where(exponent == 0, 0x400000, 0)).to(tl.int32)
            else:
                top_bits = (top + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
                more = (exponent != 0) & (mantissa > (top_bits & 0x7FFFFF))
                field = tl.maximum(exponent, 1) - ((top_bits >> 23) - 127) + more.to(tl.int32)
                field = tl.where(a == 0, 127, tl.maximum(field, 1))
            field = tl.minimum(tl.maximum(field, 0), 254)
            scale = tl.where(field == 0, 0x400000, field << 23).to(tl.float32, bitcast=True)
        scale = tl.where(amax < float("inf"), scale, float("nan"))
        factor = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return scale, factor, unit


# numbers of which Triton would otherwise make other kernels where they are 1 or multiples of 16
_NUMBERS = ["man", "emin", "emax", "draw", "b_man", "b_emin"]
_COUNTS = ["rows", "tiles", "per_line", "rows_per_unit", "parts", "rows_per_key", "per_key"]


@triton.jit(do_not_specialize=["parts"])
def _largest(x, tops, width, parts, SPAN: tl.constexpr, COLS: tl.constexpr):
    """The bits of the largest magnitude of each of the parts, SPAN elements long, of rows of x [rows, width]."""
    row, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    top = tl.zeros([COLS], tl.int32)
    for first in range(0, SPAN, COLS):
        column = part.to(tl.int64) * SPAN + first + tl.arange(0, COLS)
        value = tl.load(x + row * width + column, mask=column < width, other=0.0)
        top = tl.maximum(top, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(tops + tl.program_id(0), tl.max(top, axis=0))


@triton.jit(do_not_specialize=[*_COUNTS, *_NUMBERS])
def _rows(
    x, out, tops, keys, nan, width, length, rows, tiles, per_line, rows_per_unit, parts, rows_per_key, per_key,
    low, high, top, special, tiny, inverse, full, man, emin, emax, draw, b_high, b_tiny, b_man, b_emin,
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, KEEPS_SIGN: tl.constexpr, RULE: tl.constexpr, AMAX: tl.constexpr,
    LINES: tl.constexpr, LOOKS: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rows of elements that share a scale and a key; with LINES, the rows are pieces of lines, the last one short."""
    row = tl.program_id(0) // tiles
    if MANY:
        row = row.to(tl.int64)
    top_row = row * ROWS
    row = top_row + tl.arange(0, ROWS)
    first = (tl.program_id(0) % tiles).to(tl.int64) * COLS
    start = row.to(tl.int64) * width
    left = tl.full([ROWS], width, tl.int64) - first
    if LINES:
        start = (row // per_line).to(tl.int64) * length + (row % per_line) * width
        left = tl.minimum(length - (row % per_line) * width, width) - first
    left = tl.where(row < rows, tl.minimum(left, COLS), 0).to(tl.int32)
    start += first
    column = tl.arange(0, COLS)[None, :]
    at = start[:, None] + column
    inside = column < left[:, None]
    value = tl.load(x + at, mask=inside, other=0.0)
    noise = tl.zeros([ROWS, COLS], tl.uint32)
    if STOCHASTIC:
        of = row // rows_per_key
        low_bits, high_bits = _mixed(tl.load(keys + of, mask=row < rows, other=0))
        index = (start - of.to(tl.int64) * per_key).to(tl.uint32)[:, None] + column.to(tl.uint32)
        noise = _hash(index, low_bits[:, None], high_bits[:, None])
    if LOOKS:
        tl.store(nan + at * 0, at * 0 + 1, mask=inside & (value != value))
    if AMAX == _ALONE:
        q = _rounded(value, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN)
    else:
        amax = tl.zeros([ROWS], tl.float32)
        above = amax
        if AMAX == _BEFORE:
            unit_of = row // rows_per_unit
            if PARTS == 1:
                bits = tl.load(tops + unit_of, mask=row < rows, other=0)
            else:  # units larger than a program's rows, which are in two at most
                low_unit = top_row // rows_per_unit
                high_unit = tl.minimum(top_row + ROWS - 1, rows - 1) // rows_per_unit
                part = tl.arange(0, PARTS)
                low_top = tl.max(tl.load(tops + low_unit * parts + part, mask=part < parts, other=0), axis=0)
                high_top = tl.max(tl.load(tops + high_unit * parts + part, mask=part < parts, other=0), axis=0)
                bits = tl.where(unit_of == low_unit, low_top, high_top)
            above = bits.to(tl.float32, bitcast=True)
            amax = above
        if AMAX == _WITHIN or RULE == _NVFP4:
            # the bits of magnitudes order as they do, NaN above all
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        scale, factor, unit = _scales(amax, above, top, inverse, full, emax, b_high, b_tiny, b_man, b_emin, RULE)
        s = tl.div_rn(value, scale[:, None] + tl.zeros_like(value)) if RULE == _MAX else value * factor[:, None]
        q = _rounded(s, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN)
        q = q * scale[:, None]
        if RULE == _NVFP4:
            q = q * unit[:, None]
    tl.store(out + at, q, mask=inside)


@triton.jit(do_not_specialize=["length", "size", *_COUNTS, *_NUMBERS])
def _columns(
    x, out, tops, keys, inner, length, size, tiles, per_line, rows_per_unit, parts, rows_per_key, per_key,
    low, high, top, special, tiny, inverse, full, man, emin, emax, draw, b_high, b_tiny, b_man, b_emin,
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, KEEPS_SIGN: tl.constexpr, RULE: tl.constexpr,
    SIZE: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Blocks across the columns of x [lines, length, inner]: one of a line, with its tile of columns, a program."""
    block = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    first = (block % per_line) * size
    start = ((block // per_line) * length + first) * inner
    j = tl.arange(0, SIZE)
    inside = ((j < size) & (first + j < length))[:, None] & (column < inner)[None, :]
    at = j.to(tl.int64)[:, None] * inner + column[None, :]
    value = tl.load(x + start + at, mask=inside, other=0.0)
    noise = tl.zeros([SIZE, COLS], tl.uint32)
    if STOCHASTIC:
        of = block // rows_per_key
        low_bits, high_bits = _mixed(tl.load(keys + of))
        noise = _hash((start - of * per_key).to(tl.uint32) + at.to(tl.uint32), low_bits, high_bits)
    amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    above = amax
    if RULE == _NVFP4:
        part = tl.arange(0, PARTS)
        bits = tl.load(tops + (block // rows_per_unit) * parts + part, mask=part < parts, other=0)
        above = tl.max(bits, axis=0).to(tl.float32, bitcast=True) + tl.zeros_like(amax)
    scale, factor, unit = _scales(amax, above, top, inverse, full, emax, b_high, b_tiny, b_man, b_emin, RULE)
    s = tl.div_rn(value, scale[None, :] + tl.zeros_like(value)) if RULE == _MAX else value * factor[None, :]
    q = _rounded(s, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN)
    q = q * scale[None, :]
    if RULE == _NVFP4:
        q = q * unit[None, :]
    tl.store(out + start + at, q, mask=inside)


def round_flat(
    x: Tensor, out: Tensor, form: KernelFormat, key: Tensor | None, units: int = 1, nan: Tensor | None = None
) -> None:
    """``x`` on the grid in ``out``, scaled by the rule of ``form``.

    Args:
        x: float32 on a CUDA device, C-contiguous, not empty; ``out`` the same.
        form: the format, rounding and scale rule.
        key: as ``rounding_keys`` gives it.
        units: equal parts of ``x`` that have a scale each.
        nan: int64, 0-d: becomes 1 where there is a NaN in ``x``; None: not looked for.
    """
    keys, count, examples = _keys(key, x), x.numel(), len(key) if key is not None and key.dim() else 1
    rows = max(units, examples)
    width = count // rows
    tops, parts, amax = x, 1, _ALONE
    if RULES[form.rule] != "none":
        amax = _WITHIN if rows == units and width <= _WIDEST else _BEFORE
        if amax is _BEFORE:
            tops, parts = _tops(x, units)
    counts = (rows // units, parts, rows // examples, count // examples)
    _launch_rows(x, out, tops, keys, nan, (rows, width, 1, width), counts, form, form, amax)


def quantize_blocks(
    x: Tensor,
    out: Tensor,
    form: KernelFormat,
    block_form: KernelFormat,
    key: Tensor | None,
    shape: tuple[int, int, int],
    size: int,
    units: int,
) -> None:
    """Fake-quantizes ``x`` seen as ``shape`` (lines, length, columns) in blocks of ``size`` along each line.

    Args:
        x: float32 on a CUDA device, C-contiguous, not empty; ``out`` the same.
        form: the elements' format, rounding and scale rule.
        block_form: of the block scales.
        key: as ``rounding_keys`` gives it.
        shape, size: as above; a line's last block may be shorter.
        units: for NVFP4: equal parts of ``x`` that have a scale above the blocks'.
    """
    lines, length, inner = shape
    per_line = -(-length // size)
    blocks = lines * per_line
    keys, examples = _keys(key, x), len(key) if key is not None and key.dim() else 1
    two_levels = RULES[form.rule] == "nvfp4"
    tops, parts = _tops(x, units) if two_levels else (x, 1)
    counts = (blocks // units, parts, blocks // examples, x.numel() // examples)
    if inner == 1:
        amax = _BEFORE if two_levels else _WITHIN
        _launch_rows(x, out, tops, keys, None, (blocks, size, per_line, length), counts, form, block_form, amax)
        return
    padded = _power_above(size)
    columns = max(min(_power_above(inner), _TILE // padded), 16)
    tiles = -(-inner // columns)
    launch(
        _columns, blocks * tiles, _warps(padded * columns), (x, out, tops, keys), (inner,),
        (length, size, tiles, per_line, *counts), _numbers(form, block_form),
        (*_constants(form), padded, columns, 1 if parts == 1 else _PARTS),
    )  # fmt: skip


def _launch_rows(
    x: Tensor,
    out: Tensor,
    tops: Tensor,
    keys: Tensor,
    nan: Tensor | None,
    rows_of_lines: tuple[int, int, int, int],
    counts: tuple[int, int, int, int],
    form: KernelFormat,
    block_form: KernelFormat,
    amax: Any,
) -> None:
    rows, width, per_line, length = rows_of_lines
    whole = amax is _WITHIN or RULES[form.rule] == "nvfp4"  # a row is seen by one program
    columns = max(_power_above(width), _TILE if rows == 1 else 1)
    columns = columns if whole else min(columns, _TILE)
    at_once, tiles = max(_TILE // columns, 1), -(-width // columns)
    launch(
        _rows, -(-rows // at_once) * tiles, _warps(at_once * columns),
        (x, out, tops, keys, x if nan is None else nan), (width, length), (rows, tiles, per_line, *counts),
        _numbers(form, block_form),
        (
            *_constants(form), amax.value, per_line * width != length, nan is not None, rows >= 1 << 31, at_once,
            columns, 1 if counts[1] == 1 else _PARTS,
        ),
    )  # fmt: skip


def _tops(x: Tensor, units: int) -> tuple[Tensor, int]:
    """The bits of the largest magnitudes in parts of equal units of ``x``, int32 [units * parts]; how many parts."""
    width = x.numel() // units
    span = max(4 * _TILE, _power_above(-(-width // _PARTS)))
    parts = -(-width // span)
    tops = torch.empty(units * parts, dtype=torch.int32, device=x.device)
    columns = min(_TILE, _power_above(width))
    launch(_largest, units * parts, _warps(columns), (x, tops), (width,), (parts,), (), (span, columns))
    return tops, parts


def _keys(key: Tensor | None, x: Tensor) -> Tensor:
    return x if key is None else key.contiguous()  # x is not read


def _power_above(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def _warps(elements: int) -> int:
    return min(max(elements // 512, 1), 16)


@lru_cache(maxsize=256)
def _numbers(form: KernelFormat, block_form: KernelFormat) -> tuple[float, ...]:
    return (
        form.low, form.high, form.max_value, form.special, form.min_normal, form.inverse_max, form.full,
        form.mantissa_bits, form.min_exponent, form.max_exponent, form.draw_bits,
        block_form.high, block_form.min_normal, block_form.mantissa_bits, block_form.min_exponent,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _constants(form: KernelFormat) -> tuple[int, bool, bool, int]:
    plain = form.keeps_sign and form.high <= form.max_value and (form.mantissa_bits > 0 or form.stochastic)
    kind = _PLAIN_KIND if form.kind == MAGIC and plain else form.kind
    return kind, form.stochastic, form.keeps_sign, form.rule
