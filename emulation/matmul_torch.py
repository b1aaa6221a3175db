"""The arithmetic of matrix units in torch operations: exact, tiled, the same bits on every device.

Nothing here rounds but where the unit does. Products of operands are exact in the working type (float32 where the
operands' exponents allow it, else float64); what a unit cuts off is cut by converting to int32; sums of cut addends are
int32 and float64 integers below 2^53; powers of two are built from bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emulation.formats import NumberFormat
from emulation.matrix_units import MatrixUnit

ZERO_EXPONENT = -2000  # of an addend that is zero: below every other, even of a sum of two
LOWEST_EXPONENT = -600  # every real exponent of a sum is above; keeps powers of two inside float64 where all is zero
TILE = 1 << 18  # products held at a time per thread: 1 MiB of float32, what the caches like best


@dataclass(frozen=True, kw_only=True, eq=False)
class Operand:
    """One operand of a product, or of a batch of them, K first, taken apart for alignment.

    Attributes:
        values: [K, rows] or [K, B, rows] float32, infinities and NaNs replaced by zeros; in a unit that scales sums,
            times the significands of the scales.
        exponents: int16, of the values; ZERO_EXPONENT where the value is zero.
        specials: float32, the infinities and NaNs, and the signs (0, 1, -1) of all other values; None where
            neither operand has infinities or NaNs.
        scale_exponents: [blocks, ..., rows] int32; None without scales.
        scale_specials: [blocks, ..., rows] float32, NaN where the scale is, else 0; None where no scale is NaN.
        block: consecutive values that share one scale; 0 without scales.
        lowest, highest: the range of the exponents of the values that are not zero.
        wide: whether values or scales have 8-bit exponents, so that results can leave float32's normal range.
    """

    values: Tensor
    exponents: Tensor
    specials: Tensor | None
    scale_exponents: Tensor | None
    scale_specials: Tensor | None
    block: int
    lowest: int
    highest: int
    wide: bool

    def part(self, *where: slice) -> Operand:
        """The operand with some of its batch and of its rows."""
        at = (slice(None), *where)
        return replace(
            self,
            values=self.values[at],
            exponents=self.exponents[at],
            specials=None if self.specials is None else self.specials[at],
            scale_exponents=None if self.scale_exponents is None else self.scale_exponents[at],
            scale_specials=None if self.scale_specials is None else self.scale_specials[at],
        )


def operand(values: Tensor, fmt: NumberFormat, *, keep_specials: bool) -> Operand:
    """Take [K, ..., rows] float32 values of ``fmt`` apart; ``keep_specials`` where either has infinities or NaNs."""
    specials = None
    if keep_specials:
        finite = values.isfinite()
        specials = torch.where(finite, values.sign(), values)
        values = torch.where(finite, values, 0.0)
    values = values.contiguous()
    zero = values == 0
    exponents = float_exponent(values, fmt.min_exponent).to(torch.int16)
    nonzero_range = exponents.masked_fill(zero, fmt.max_exponent), exponents.masked_fill(zero, fmt.min_exponent)
    some = values.numel() > 0
    return Operand(
        values=values,
        exponents=exponents.masked_fill_(zero, ZERO_EXPONENT),
        specials=specials,
        scale_exponents=None,
        scale_specials=None,
        lowest=int(nonzero_range[0].min()) if some else 0,
        highest=int(nonzero_range[1].max()) if some else 0,
        block=0,
        wide=fmt.exponent_bits == 8,
    )


def with_scales(element: Operand, scale: Tensor, fmt: NumberFormat, *, block: int, fold: bool) -> Operand:
    """Give an operand its block scales.

    Args:
        element: the operand.
        scale: [blocks, ..., rows] float32 values of ``fmt``; signs are ignored.
        fmt: their format.
        block: consecutive values that share one scale.
        fold: multiply the values by the scales' significands (exact for values of 2 and scales of 4 bits).
    """
    nan = scale.isnan()
    magnitude = torch.where(nan, 1.0, scale.abs())
    fraction, exponents = torch.frexp(magnitude)  # not from the bits: 2^-127 is a subnormal of float32
    exponents = (exponents.to(torch.int32) - 1).clamp_(min=fmt.min_exponent)
    values = element.values
    if fold:
        significand = torch.ldexp(magnitude.double(), -exponents).float()
        values = values * significand.repeat_interleave(block, 0)[: values.shape[0]]
    return replace(
        element,
        values=values,
        scale_exponents=exponents.masked_fill_(fraction == 0, ZERO_EXPONENT),
        scale_specials=torch.where(nan, torch.nan, 0.0) if bool(nan.any()) else None,
        block=block,
        wide=element.wide or fmt.exponent_bits == 8,
    )


def float_exponent(x: Tensor, lowest: int) -> Tensor:
    """floor(log2|x|) of finite float32 values as int32, not below ``lowest``."""
    return x.view(torch.int32).bitwise_right_shift(23).bitwise_and_(255).sub_(127).clamp_(min=lowest)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """2^exponent, the exponent (int32) held inside the normal range of ``dtype``."""
    if dtype == torch.float32:
        return exponent.clamp(-126, 127).add_(127).bitwise_left_shift_(23).view(dtype)
    return exponent.clamp(-1022, 1023).to(torch.int64).add_(1023).bitwise_left_shift_(52).view(dtype)


def _cut_to_float32(total: Tensor, exponent: Tensor, result_bits: int, *, wide: bool) -> Tensor:
    """total * 2^exponent cut to ``result_bits`` fraction bits and to multiples of 2^-149; inf beyond float32."""
    kept = total.view(torch.int64).bitwise_and_(-1 << (52 - result_bits)).view(torch.float64)
    result = kept.mul_(power_of_two(exponent))
    if wide:
        tiny = (result * 2.0**149).trunc_().mul_(2.0**-149)
        result = torch.where(result.abs() < 2.0**-126, tiny, result).add_(0.0)  # a negative cut to zero is +0
    return result.float()


class _Tile:
    """One tile of the result, [..., m, n], and the buffers that its steps share."""

    def __init__(self, left: Operand, right: Operand, unit: MatrixUnit, buffers: tuple[Tensor, Tensor, Tensor]) -> None:
        self.left, self.right, self.unit = left, right, unit
        self.shape = (*left.values.shape[1:], right.values.shape[-1])
        self.wide = left.wide or right.wide
        self._products, self._integers, self._exponents = buffers

    def _view(self, buffer: Tensor, terms: int) -> Tensor:
        return buffer[: terms * math.prod(self.shape)].view(terms, *self.shape)

    def top_exponent(self, part: slice) -> Tensor:
        """The largest exponent of the products of ``part`` of K, int32 [..., m, n]."""
        a, b = self.left.exponents[part].unsqueeze(-1), self.right.exponents[part].unsqueeze(-2)
        sums = torch.add(a, b, out=self._view(self._exponents, len(a)))
        return sums.amax(0).to(torch.int32)

    def products(self, part: slice) -> Tensor:
        """The exact products of ``part`` of K in the working type, [terms, ..., m, n]."""
        dtype = self._products.dtype
        a, b = self.left.values[part].unsqueeze(-1), self.right.values[part].unsqueeze(-2)
        return torch.mul(a.to(dtype), b.to(dtype), out=self._view(self._products, len(a)))

    def cut_sum(self, part: slice, shift: Tensor) -> Tensor:
        """The sum of trunc(product * 2^shift) over ``part`` of K, as float64 integers [..., m, n]."""
        products = self.products(part)
        integers = self._view(self._integers, len(products))
        integers.copy_(products.mul_(power_of_two(shift, products.dtype)))
        # an addend is below 2^(fraction_bits + 2): so many of them fit int32
        terms = 1 << (29 - self.unit.fraction_bits)
        total = integers[:terms].sum(0, dtype=torch.int32).double()
        for start in range(terms, len(integers), terms):
            total += integers[start : start + terms].sum(0, dtype=torch.int32)
        return total

    def scale_exponent(self, k: int) -> Tensor:
        """The exponents of the scales of the block that holds ``k``, int32 [..., m, n]."""
        assert self.left.scale_exponents is not None
        assert self.right.scale_exponents is not None
        block = k // self.left.block
        return self.left.scale_exponents[block].unsqueeze(-1) + self.right.scale_exponents[block].unsqueeze(-2)

    def step(self, c: Tensor, part: slice) -> Tensor:
        """The accumulator after the products of ``part`` of K, infinities and NaNs included."""
        result = STEPS[self.unit.arithmetic](self, c, part)
        special = self._special_sum(part)
        if special is None and not self.wide:
            return result
        kept = c if special is None else c + special
        return torch.where(kept.isfinite(), result, kept)

    def _special_sum(self, part: slice) -> Tensor | None:
        """Something whose infinities and NaNs are those of the exact sum over ``part`` of K; None where it has none."""
        total = None
        a, b = self.left.specials, self.right.specials
        if a is not None and b is not None:
            total = _plain(a[part], b[part])
        for nan, axis in ((self.left.scale_specials, -1), (self.right.scale_specials, -2)):
            if nan is not None:
                blocks = slice(part.start // self.left.block, -(-part.stop // self.left.block))
                row = nan[blocks].sum(0).unsqueeze(axis).expand(self.shape)
                total = row if total is None else total + row
        if self.unit.arithmetic.startswith("floored") and self._products.dtype == torch.float64:
            products = self.products(part)
            infinite = torch.where(products.abs() >= 2.0**128, products.sign() * torch.inf, 0.0).sum(0).float()
            total = infinite if total is None else total + infinite
        return total


def _plain(a: Tensor, b: Tensor) -> Tensor:
    """torch's own product of [K, ..., m] and [K, ..., n]."""
    return a.movedim(0, -1) @ b.movedim(0, -2)


def _accumulator_exponent(c: Tensor) -> Tensor:
    return float_exponent(c, -126).masked_fill_(c == 0, ZERO_EXPONENT)


def _truncated(tile: _Tile, c: Tensor, part: slice) -> Tensor:
    """Products and accumulator cut to a multiple of 2^(E - fraction_bits), summed, the sum cut."""
    unit, top = tile.unit, tile.top_exponent(part)
    scale = tile.scale_exponent(part.start) if tile.left.scale_exponents is not None else None
    if scale is not None:
        top += scale
    top = torch.maximum(top, _accumulator_exponent(c)).clamp_(min=LOWEST_EXPONENT)
    shift = unit.fraction_bits - top
    total = tile.cut_sum(part, shift if scale is None else shift + scale)
    total += (c * power_of_two(shift)).to(torch.int32)
    return _cut_to_float32(total, shift.neg_(), unit.result_bits, wide=tile.wide)


def _block_scaled(tile: _Tile, c: Tensor, part: slice) -> Tensor:
    """Exact sums of 16 products, aligned by their scales' exponents alone, and the accumulator: cut, summed, cut."""
    unit = tile.unit
    starts = range(part.start, part.stop, 16)
    exponents = [tile.scale_exponent(k) for k in starts]
    top = _accumulator_exponent(c)
    for exponent in exponents:
        top = torch.maximum(top, exponent)
    shift = unit.fraction_bits - top.clamp_(min=LOWEST_EXPONENT)
    total = (c * power_of_two(shift)).trunc_()
    for k, exponent in zip(starts, exponents, strict=True):
        ks = slice(k, min(k + 16, part.stop))
        # at most 19 bits from end to end, so that no order of adding and no tensor-core mode can round
        exact = _plain(tile.left.values[ks], tile.right.values[ks])
        total += (exact * power_of_two(exponent.add_(shift))).to(torch.int64)
    return _cut_to_float32(total, shift.neg_(), unit.result_bits, wide=tile.wide)


def _floored(tile: _Tile, c: Tensor, part: slice, lanes: int = 1) -> Tensor:
    """Lanes of products cut toward zero; lanes, their sum and the accumulator aligned by floor; nearest even."""
    bits = tile.unit.fraction_bits
    parts = [slice(part.start + lane, part.stop, lanes) for lane in range(min(lanes, part.stop - part.start))]
    tops = [tile.top_exponent(p) for p in parts]
    top = tops[0] if len(tops) == 1 else torch.maximum(*tops)
    total = torch.zeros(tile.shape, dtype=torch.float64, device=c.device)
    for p, own in zip(parts, tops, strict=True):
        total += tile.cut_sum(p, bits - own).mul_(power_of_two(own - top)).floor_()
    c_exponent = _accumulator_exponent(c)
    both = torch.maximum(top, c_exponent).clamp_(min=LOWEST_EXPONENT)
    total = total.mul_(power_of_two(top - both + 7)).floor_()  # 31 fraction bits from here on
    cut = (c * power_of_two(bits - both)).floor_().mul_(2.0**7)
    if lanes == 2:
        cut.masked_fill_(c_exponent < both - 25, 0.0)
    return total.add_(cut).mul_(power_of_two(both - 31)).float()


def _floored_lanes(tile: _Tile, c: Tensor, part: slice) -> Tensor:
    return _floored(tile, c, part, lanes=2)


STEPS = {
    "truncated": _truncated,
    "block_scaled": _block_scaled,
    "floored": _floored,
    "floored_lanes": _floored_lanes,
}


def _chain(tile: _Tile, start: int, stop: int) -> Tensor:
    c = torch.zeros(tile.shape, dtype=torch.float32, device=tile.left.values.device)
    for k in range(start, stop, tile.unit.group):
        c = tile.step(c, slice(k, min(k + tile.unit.group, stop)))
    return c


def _runs(tile: _Tile) -> Tensor:
    """The whole of K: one chain, or chains of ``run`` added one after another in float32."""
    length = tile.left.values.shape[0]
    if tile.unit.run is None:
        return _chain(tile, 0, length)
    total = torch.zeros(tile.shape, dtype=torch.float32, device=tile.left.values.device)
    for k in range(0, length, tile.unit.run):
        total += _chain(tile, k, min(k + tile.unit.run, length))
    return total


def fits_float32(left: Operand, right: Operand) -> bool:
    """Whether products and their alignment are exact in float32: no product leaves its normal range, all bits kept."""
    return left.lowest + right.lowest >= -100 and left.highest + right.highest <= 120


def chained_product(left: Operand, right: Operand, unit: MatrixUnit) -> Tensor:
    """The product [..., M, N] of two operands [K, ..., M] and [K, ..., N], tile by tile; NaN as 0x7FFFFFFF."""
    *batch, m = left.values.shape[1:]
    n = right.values.shape[-1]
    if n < m and n < 256:  # long rows are fast; all that is done is symmetric in the operands
        return chained_product(right, left, unit).mT.contiguous()
    device = left.values.device
    out = torch.zeros(*batch, m, n, dtype=torch.float32, device=device)
    terms = 1 if unit.arithmetic == "block_scaled" else min(unit.group, left.values.shape[0])
    if out.numel() == 0 or terms == 0:
        return out
    tile = TILE * (torch.get_num_threads() if device.type == "cpu" else 64) // (8 if terms == 1 else terms)
    columns = min(n, 512)
    rows = min(m, max(1, tile // columns))
    pairs = min(math.prod(batch), max(1, tile // (rows * columns)))  # of a batch, at a time
    size = 0 if unit.arithmetic == "block_scaled" else terms * pairs * rows * columns
    dtype = torch.float32 if fits_float32(left, right) else torch.float64
    buffers = (
        torch.empty(size, dtype=dtype, device=device),
        torch.empty(size, dtype=torch.int32, device=device),
        torch.empty(size, dtype=torch.int16, device=device),
    )
    batches = [(slice(b, b + pairs),) for b in range(0, batch[0], pairs)] if batch else [()]
    for own in batches:
        for i in range(0, m, rows):
            upper = left.part(*own, slice(i, i + rows))
            for j in range(0, n, columns):
                right_part = right.part(*own, slice(j, j + columns))
                out[(*own, slice(i, i + rows), slice(j, j + columns))] = _runs(_Tile(upper, right_part, unit, buffers))
    return canonical_nan(out)


def canonical_nan(x: Tensor) -> Tensor:
    """NaNs of a float32 tensor as the bits 0x7FFFFFFF, in place."""
    x.view(torch.int32).masked_fill_(x.isnan(), 0x7FFFFFFF)
    return x
