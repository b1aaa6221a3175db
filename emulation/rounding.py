"""Rounding of float32 and float64 tensors onto a format's grid: the arithmetic alone, exact in every bit.

Nearest-even is the addition of 1.5 * 2^(mantissa width of x - mantissa bits) times the power of two below |x|: the sum
has room for exactly the bits that the format keeps, so that the machine's own rounding does the work. Compiled with
flags that let additions be reordered (unsafe math) it is wrong; the result depends on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emulation.formats import NumberFormat

Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "stochastic"]
Overflow = Literal["saturate", "nonfinite"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
OVERFLOWS: tuple[Overflow, ...] = ("saturate", "nonfinite")


@dataclass(frozen=True)
class _Layout:
    """Where the bits of a torch float are."""

    integer: torch.dtype
    mantissa_bits: int
    bias: int

    @property
    def exponent_mask(self) -> int:
        return (2 * self.bias + 1) << self.mantissa_bits

    def power(self, exponent: int) -> int:
        """The bits of 2^exponent, a normal number."""
        return (exponent + self.bias) << self.mantissa_bits


_LAYOUTS = {torch.float32: _Layout(torch.int32, 23, 127), torch.float64: _Layout(torch.int64, 52, 1023)}


def on_grid(
    x: Tensor,
    fmt: NumberFormat,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    noise: Tensor | None = None,
    random_bits: int | None = None,
) -> Tensor:
    """``x`` on the grid of ``fmt``; NaN stays NaN, whether the format has one or not.

    Args:
        x: float32 or float64, any shape.
        fmt: a scalar format.
        rounding: how.
        overflow: ``saturate`` to the largest value, or ``nonfinite``: to infinity, else NaN, where the format has it.
        noise: int32 of 32 uniform random bits for each element, for stochastic rounding.
        random_bits: how many of them a rounding sees (hardware: 8); None: all that matter.

    Returns:
        A new tensor of the shape and dtype of ``x``.
    """
    if fmt.kind == "int":
        return _on_integers(x, fmt, rounding, noise, random_bits)
    if fmt.kind == "exponent":
        return _on_powers(x, fmt, rounding, overflow, noise, random_bits)
    if overflow == "nonfinite" and (fmt.has_inf or fmt.has_nan):
        special = math.inf if fmt.has_inf else math.nan
        if rounding == "toward_zero":  # a finite number never rounds beyond the largest
            q = _on_floats(x, fmt, fmt.max_value, rounding, noise, random_bits)
            over = torch.isinf(x)
        else:
            q = _on_floats(x, fmt, _beyond(fmt), rounding, noise, random_bits)
            over = q.abs() > fmt.max_value
        return torch.where(over, torch.copysign(torch.full_like(q, special), x), q)
    return _on_floats(x, fmt, fmt.max_value, rounding, noise, random_bits)


def _beyond(fmt: NumberFormat) -> float:
    """A limit that rounds to beyond the largest value, with room for the arithmetic above it."""
    return math.ldexp(1.0, fmt.max_exponent + 2) if fmt.max_exponent < 126 else math.inf


def _on_floats(
    x: Tensor, fmt: NumberFormat, limit: float, rounding: Rounding, noise: Tensor | None, random_bits: int | None
) -> Tensor:
    layout = _LAYOUTS[x.dtype]
    if fmt.mantissa_bits == layout.mantissa_bits:  # float32 in float32
        return torch.clamp(x, -limit, limit) if limit <= fmt.max_value else x.clone()
    # beside the magic number every power of two of the format must fit
    room = layout.bias - 27 if x.dtype == torch.float32 else layout.bias - 60
    magic = fmt.mantissa_bits <= layout.mantissa_bits - 2 and -room <= fmt.min_exponent and fmt.max_exponent <= room
    direct = fmt.min_exponent == 1 - layout.bias
    if not magic and not direct:
        return _on_floats(x.double(), fmt, limit, rounding, noise, random_bits).to(x.dtype)
    a = torch.clamp(x, -limit, limit)
    if rounding == "stochastic":
        assert noise is not None
        q = _stochastic(a.abs(), fmt, layout, _placed(noise, layout, fmt.mantissa_bits, random_bits), direct)
    elif direct:
        q = _nearest_by_bits(a.abs(), fmt, layout, rounding)
    else:
        q = _nearest(a, fmt, layout) if rounding == "nearest_even" else _by_halves(a.abs(), fmt, layout, rounding)
    if fmt.has_negative_zero:
        return torch.copysign(q, x)
    return q if rounding == "nearest_even" else torch.copysign(q, x) + 0.0  # -0 + 0 is 0


def _power_below(a: Tensor, fmt: NumberFormat, layout: _Layout) -> Tensor:
    """The bits of the power of two that sets the step at ``a``: that below |a|, or the smallest normal."""
    return torch.clamp(a.view(layout.integer) & layout.exponent_mask, min=layout.power(fmt.min_exponent))


def _nearest(a: Tensor, fmt: NumberFormat, layout: _Layout) -> Tensor:
    """Nearest, ties to the even code, of ``a`` within the range, in place; a zero result is +0."""
    p = _power_below(a, fmt, layout)
    shift = layout.mantissa_bits - fmt.mantissa_bits
    magic = (shift << layout.mantissa_bits) + (1 << (layout.mantissa_bits - 1))
    if fmt.mantissa_bits == 0:
        # A tie lies between two powers of two. The addition goes to the even multiple of the lower one, that is always
        # up; one more in the last place where the lower power's code is even makes it the even code.
        offset = (fmt.min_exponent + layout.bias) & 1
        p = p + (((p >> layout.mantissa_bits) + offset) & 1) + magic
    else:
        p = p + magic
    c = p.view(a.dtype)
    return a.add_(c).sub_(c)


def _by_halves(a: Tensor, fmt: NumberFormat, layout: _Layout, rounding: Rounding) -> Tensor:
    """``toward_zero`` and ``nearest_away`` of magnitudes: every difference here is exact."""
    step = _power_below(a, fmt, layout).view(a.dtype) * 2.0**-fmt.mantissa_bits
    q = _nearest(a.clone(), fmt, layout)
    below = torch.where(q > a, q - step, q)
    if rounding == "toward_zero":
        return below
    return torch.where(a - below >= step * 0.5, below + step, below)


def _nearest_by_bits(a: Tensor, fmt: NumberFormat, layout: _Layout, rounding: Rounding) -> Tensor:
    """The three deterministic roundings of magnitudes where the format's exponents are those of ``a``'s dtype."""
    shift = layout.mantissa_bits - fmt.mantissa_bits
    bits = a.view(layout.integer)
    if rounding == "nearest_even":
        rounded = bits + ((bits >> shift) & 1) + ((1 << (shift - 1)) - 1)
    else:
        rounded = bits + (1 << (shift - 1)) if rounding == "nearest_away" else bits
    q = (rounded & -(1 << shift)).view(a.dtype)
    return torch.where(torch.isnan(a), a, q)  # a carry out of NaN's bits would make it a number


def _placed(noise: Tensor, layout: _Layout, mantissa_bits: int, random_bits: int | None) -> Tensor:
    """Random bits below the last kept bit: the topmost ``random_bits`` places there, or all."""
    shift = layout.mantissa_bits - mantissa_bits
    count = min(32, shift if random_bits is None else random_bits, shift)
    noise = noise.to(layout.integer)
    return (noise & ((1 << count) - 1)) << (shift - count)


def _stochastic(a: Tensor, fmt: NumberFormat, layout: _Layout, dither: Tensor, direct: bool) -> Tensor:
    """Up with the probability of the fraction: random bits are added to the magnitude's, which are then cut off."""
    mask = -(1 << (layout.mantissa_bits - fmt.mantissa_bits))
    if direct:
        q = ((a.view(layout.integer) + dither) & mask).view(a.dtype)
        return torch.where(torch.isnan(a), a, q)
    # adding the smallest normal gives a subnormal the step of the format; its own last bits go, which moves the
    # probability by at most 2^-24 of that step's multiple
    lift = torch.where(a < fmt.min_normal, fmt.min_normal, 0.0).to(a.dtype)
    y = a + lift
    q = ((y.view(layout.integer) + dither) & mask).view(a.dtype)
    return torch.where(torch.isnan(a), a, q - lift)


def _on_integers(
    x: Tensor, fmt: NumberFormat, rounding: Rounding, noise: Tensor | None, random_bits: int | None
) -> Tensor:
    a = torch.clamp(x, fmt.min_value, fmt.max_value)
    if rounding == "nearest_even":
        q = torch.round(a)
    elif rounding == "toward_zero":
        q = torch.trunc(a)
    elif rounding == "nearest_away":
        q = torch.trunc(a)
        q = q + torch.where((a - q).abs() >= 0.5, torch.sign(a), 0.0)
    else:
        assert noise is not None
        count = min(random_bits or 24, 24)
        below = torch.floor(a)
        draw = (noise & ((1 << count) - 1)).to(a.dtype)
        q = below + (torch.floor((a - below) * 2.0**count) + draw >= 2.0**count)
    return q + 0.0  # integers have no -0


def _on_powers(
    x: Tensor,
    fmt: NumberFormat,
    rounding: Rounding,
    overflow: Overflow,
    noise: Tensor | None,
    random_bits: int | None,
) -> Tensor:
    """Powers of two; zero and negative numbers have none and become NaN.

    Nearest is what torch and ml_dtypes do: ties up, and everything above the smallest value 2^-127 of E8M0 and below
    2^-126 up as well (they round the bits of a float32, which are those of a subnormal there).
    """
    layout = _LAYOUTS[torch.float64]  # the smallest scale, 2^-127, is subnormal in float32
    a = torch.clamp(x.double(), 0.0, fmt.max_value * 4)
    bits = a.view(layout.integer)
    half = 1 << (layout.mantissa_bits - 1)
    if rounding == "stochastic":
        assert noise is not None
        bits = bits + _placed(noise, layout, 0, random_bits)
    elif rounding != "toward_zero":
        bits = bits + half
    q = torch.clamp((bits & -(2 * half)).view(torch.float64), min=fmt.min_value)
    if rounding.startswith("nearest") and fmt.min_exponent == -127:
        q = torch.where((a > fmt.min_value) & (a < 2 * fmt.min_value), 2 * fmt.min_value, q)
    over = q > fmt.max_value
    q = torch.where(over, fmt.max_value if overflow == "saturate" else math.nan, q)
    return torch.where(x > 0, q, math.nan).to(x.dtype)
