"""The codec's arithmetic as Triton kernels, for CUDA: quantize.c again, one pass over memory, the same bits.

Importing this module imports Triton; a kernel compiles at its first use for a kind of format (about a second), and
Triton caches it on disk.
"""

# Triton reads the annotations of kernels as code: theirs are for compile-time constants alone.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emulation.kernel_formats import IDENTITY, INTEGER, MAGIC, RULES, KernelFormat

_MAGIC, _INTEGER, _IDENTITY = tl.constexpr(MAGIC), tl.constexpr(INTEGER), tl.constexpr(IDENTITY)
_NONE, _MAX, _POW2, _FLOOR, _RCEIL, _NVFP4 = (tl.constexpr(i) for i in range(len(RULES)))
_LARGEST = tl.constexpr(3.4028234663852886e38)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
_FLAT = 1024
_NUMBERS = ["man", "emin", "emax", "draw"]  # a 1 among them would become a constant of another type
_TILE = 2048


@triton.jit
def _xor_shift(h, SHIFT: tl.constexpr):
    return h ^ (h >> SHIFT)


@triton.jit
def _hash(index, key):
    z = key.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = _xor_shift(z, 30) * 0xBF58476D1CE4E5B9
    z = _xor_shift(z, 27) * 0x94D049BB133111EB
    z = _xor_shift(z, 31)
    h = index.to(tl.uint32) * 0x9E3779B9 + (z & 0xFFFFFFFF).to(tl.uint32)
    h = _xor_shift(h, 16) * 0x7FEB352D
    h = _xor_shift(h ^ (z >> 32).to(tl.uint32), 15) * 0x846CA68B
    return _xor_shift(h, 16)


@triton.jit
def _clamp(x, low, high):
    a = tl.where(x > high, high, x)  # NaN passes
    return tl.where(a < low, low, a)


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
        if KIND == _MAGIC and not STOCHASTIC:
            p = a.to(tl.int32, bitcast=True) & 0x7F800000
            p = tl.maximum(p, (emin + 127) << 23)
            even = tl.where(man == 0, ((p >> 23) + emin + 127) & 1, 0)
            c = (p + (shift << 23) + (1 << 22) + even).to(tl.float32, bitcast=True)
            q = (a + c) - c
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
            if KIND == _MAGIC:
                lift = tl.where(m < tiny, tiny, 0.0)
            bits = ((m + lift).to(tl.int32, bitcast=True) + dither) & -(1 << shift)
            q = bits.to(tl.float32, bitcast=True) - lift
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


@triton.jit(do_not_specialize=_NUMBERS)
def _flat(
    x, out, amaxes, keys, count, per_unit, per_key, low, high, top, special, tiny, inverse, man, emin, emax, draw,
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, KEEPS_SIGN: tl.constexpr, RULE: tl.constexpr,
    ONE_UNIT: tl.constexpr, ONE_KEY: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Elements in a row; each per_unit share the scale of their largest magnitude."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0)
    noise = tl.zeros([SIZE], tl.uint32)
    if STOCHASTIC:
        if ONE_KEY:
            noise = _hash(at, tl.load(keys + at * 0))
        else:
            noise = _hash(at % per_key, tl.load(keys + at // per_key, mask=inside, other=0))
    if RULE == _NONE:
        q = _rounded(value, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN)
    else:
        unit_at = at * 0 if ONE_UNIT else at // per_unit
        amax = tl.load(amaxes + unit_at, mask=inside, other=0.0)
        scale, factor, _ = _scales(amax, amax, top, inverse, top, emax, top, tiny, man, emin, RULE)
        s = tl.div_rn(value, scale) if RULE == _MAX else value * factor
        q = _rounded(s, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN) * scale
    tl.store(out + at, q, mask=inside)


@triton.jit(do_not_specialize=[*_NUMBERS, "b_man", "b_emin"])
def _blocks(
    x, out, amaxes, keys, blocks, length, size, inner, per_unit, per_key, low, high, top, special, tiny, inverse,
    full, man, emin, emax, draw, b_high, b_tiny, b_man, b_emin, KIND: tl.constexpr, STOCHASTIC: tl.constexpr,
    KEEPS_SIGN: tl.constexpr, RULE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Blocks of a tensor [lines, length, inner]: ROWS of them (columns counted apart), SIZE elements of each."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block, column = t // inner, t % inner
    per_line = (length + size - 1) // size
    first = (block % per_line) * size
    start = ((block // per_line) * length + first) * inner + column
    j = tl.arange(0, SIZE)
    inside = (t < blocks * inner)[:, None] & (j < size)[None, :] & (first[:, None] + j[None, :] < length)
    at = start[:, None] + j[None, :].to(tl.int64) * inner
    value = tl.load(x + at, mask=inside, other=0.0)
    # the bits of magnitudes order as they do, NaN above all
    amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    above = amax
    if RULE == _NVFP4:
        above = tl.load(amaxes + block // per_unit, mask=t < blocks * inner, other=0.0)
    scale, factor, unit = _scales(amax, above, top, inverse, full, emax, b_high, b_tiny, b_man, b_emin, RULE)
    s = tl.div_rn(value, scale[:, None] + tl.zeros_like(value)) if RULE == _MAX else value * factor[:, None]
    noise = tl.zeros([ROWS, SIZE], tl.uint32)
    if STOCHASTIC:
        noise = _hash(at % per_key, tl.load(keys + at // per_key, mask=inside, other=0))
    q = _rounded(s, noise, low, high, top, special, tiny, man, emin, draw, KIND, STOCHASTIC, KEEPS_SIGN)
    tl.store(out + at, q * scale[:, None] * unit[:, None], mask=inside)


def round_flat(x: Tensor, out: Tensor, form: KernelFormat, key: Tensor | None, amaxes: Tensor | None) -> None:
    """``x`` on the grid in ``out``; with ``amaxes``, equal parts of ``x`` are scaled by theirs.

    Args:
        x: float32 on a CUDA device, C-contiguous, not empty; ``out`` the same.
        form: the format, rounding and scale rule.
        key: as ``rounding_keys`` gives it.
        amaxes: float32 [parts]: the largest magnitudes.
    """
    count = x.numel()
    keys, per_key = _keys(key, x)
    units = 1 if amaxes is None else amaxes.numel()
    programs = (triton.cdiv(count, _FLAT),)
    read = x if amaxes is None else amaxes
    with torch.cuda.device_of(x):
        _flat[programs](
            x, out, read, keys, count, count // units, per_key, *_limits(form), *_integers(form), KIND=form.kind,
            STOCHASTIC=form.stochastic, KEEPS_SIGN=form.keeps_sign, RULE=form.rule, ONE_UNIT=units == 1,
            ONE_KEY=per_key >= count, SIZE=_FLAT, enable_fp_fusion=False,
        )  # fmt: skip


def quantize_blocks(
    x: Tensor,
    out: Tensor,
    form: KernelFormat,
    block_form: KernelFormat,
    key: Tensor | None,
    unit_amaxes: Tensor | None,
    shape: tuple[int, int, int],
    size: int,
) -> None:
    """Fake-quantizes ``x`` seen as ``shape`` (lines, length, columns) in blocks of ``size`` along each line.

    Args:
        x: float32 on a CUDA device, C-contiguous, not empty; ``out`` the same.
        form: the elements' format, rounding and scale rule.
        block_form: of the block scales.
        key: as ``rounding_keys`` gives it.
        unit_amaxes: float32 [units] for NVFP4: the largest magnitudes of equal parts of ``x``.
        shape, size: as above; a line's last block may be shorter.
    """
    lines, length, inner = shape
    blocks = lines * triton.cdiv(length, size)
    keys, per_key = _keys(key, x)
    units = 1 if unit_amaxes is None else unit_amaxes.numel()
    padded = triton.next_power_of_2(size)
    rows = max(_TILE // padded, 1)
    programs = (triton.cdiv(blocks * inner, rows),)
    read = x if unit_amaxes is None else unit_amaxes
    of_scales = (block_form.high, block_form.min_normal, block_form.mantissa_bits, block_form.min_exponent)
    with torch.cuda.device_of(x):
        _blocks[programs](
            x, out, read, keys, blocks, length, size, inner, blocks // units, per_key, *_limits(form), form.full,
            *_integers(form), *of_scales, KIND=form.kind, STOCHASTIC=form.stochastic, KEEPS_SIGN=form.keeps_sign,
            RULE=form.rule, ROWS=rows, SIZE=padded, enable_fp_fusion=False,
        )  # fmt: skip


def _keys(key: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    if key is None:
        return x, x.numel()  # not read
    return key.contiguous(), x.numel() // (len(key) if key.dim() else 1)


def _limits(form: KernelFormat) -> tuple[float, ...]:
    return form.low, form.high, form.max_value, form.special, form.min_normal, form.inverse_max


def _integers(form: KernelFormat) -> tuple[int, ...]:
    return form.mantissa_bits, form.min_exponent, form.max_exponent, form.draw_bits
