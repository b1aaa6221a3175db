"""What the fused kernels (quantize.c, quantize_triton.py) are told about a format, a rounding and a scale rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from emulation.formats import SCALE_RULES, NumberFormat, ScaleRule
from emulation.rounding import Overflow, Rounding

MAGIC, BITS, INTEGER, IDENTITY = range(4)
"""How a kernel rounds: by adding a magic number, on the bits, as an integer, or not at all: see rounding.py."""

RULES: tuple[ScaleRule, ...] = SCALE_RULES
"""The kernels number the scale rules in this order."""


@dataclass(frozen=True, kw_only=True)
class KernelFormat:
    """Numbers that a kernel reads; float fields hold float32 values.

    Args:
        low, high: what is clamped to before rounding.
        max_value: the largest element; what rounds beyond it becomes ``special``.
        special: an infinity, or NaN.
        min_normal: the smallest normal number.
        inverse_max: 1 / max_value, rounded to float32.
        full: max_value times the largest block scale, for NVFP4.
        kind: MAGIC, BITS, INTEGER or IDENTITY.
        stochastic: whether rounding is stochastic.
        rule: the scale rule's place in RULES.
        mantissa_bits, min_exponent, max_exponent: as of the format.
        draw_bits: random bits that a rounding sees.
        keeps_sign: whether -0 is a value.
    """

    low: float
    high: float
    max_value: float
    special: float
    min_normal: float
    inverse_max: float
    full: float
    kind: int
    stochastic: bool
    rule: int
    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    draw_bits: int
    keeps_sign: bool


def kernel_kind(fmt: NumberFormat) -> int | None:
    """How the kernels round float32 to a format; None: they do not."""
    if fmt.kind == "exponent":
        return None
    if fmt.kind == "int":
        return INTEGER
    if fmt.mantissa_bits == 23:
        return IDENTITY
    if fmt.mantissa_bits <= 21 and fmt.min_exponent >= -100 and fmt.max_exponent <= 100:
        return MAGIC
    return BITS if fmt.min_exponent == -126 else None


@lru_cache(maxsize=256)
def kernel_format(
    fmt: NumberFormat,
    rounding: Rounding,
    overflow: Overflow = "saturate",
    random_bits: int | None = None,
    rule: ScaleRule = "none",
    scale: NumberFormat | None = None,
) -> KernelFormat | None:
    """The numbers of ``fmt``; None where the kernels cannot do it. ``scale`` is that of the block scales, for NVFP4."""
    kind = kernel_kind(fmt)
    if kind is None or rounding not in ("nearest_even", "stochastic"):
        return None
    if rule == "max" and scale is not None and scale.name != "float32":
        return None
    high = fmt.max_value
    if overflow == "nonfinite" and (fmt.has_inf or fmt.has_nan):
        high = math.ldexp(1.0, fmt.max_exponent + 2) if kind == MAGIC else math.inf
    places = 24 if kind == INTEGER else 23 - fmt.mantissa_bits
    return KernelFormat(
        low=fmt.min_value if kind == INTEGER else -high,
        high=high,
        max_value=fmt.max_value,
        special=math.inf if fmt.has_inf else math.nan,
        min_normal=fmt.min_normal,
        inverse_max=1.0 / fmt.max_value,
        full=fmt.max_value * scale.max_value if rule == "nvfp4" and scale is not None else 0.0,
        kind=kind,
        stochastic=rounding == "stochastic",
        rule=RULES.index(rule),
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent,
        max_exponent=fmt.max_exponent,
        draw_bits=places if random_bits is None else min(random_bits, places),
        keeps_sign=fmt.has_negative_zero,
    )
