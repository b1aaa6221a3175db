"""Scales from the largest magnitude, in the arithmetic of the library or the standard that a rule is named for.

``floor`` is section 6.3 of OCP MX v1.0; ``rceil`` is NVIDIA's for MX (torchao's RCEIL, TransformerEngine's MXFP8);
``nvfp4`` restates TransformerEngine's float32 operations in their order. A scale of infinities or NaN is NaN, so that
nothing of its unit passes for a number, and no other unit is touched.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from emulation.formats import NumberFormat, ScaleRule
from emulation.rounding import on_grid

_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_MIN = torch.finfo(torch.float32).tiny


def scale_from(amax: Tensor, element: NumberFormat, scale: NumberFormat, rule: ScaleRule) -> Tensor:
    """The scale of every unit by the one-level rules.

    Args:
        amax: float32 largest magnitudes, any shape.
        element: the format of the elements.
        scale: the format that the scale is stored in; its grid applies to rule ``max``.
        rule: ``none``, ``max``, ``pow2``, ``floor`` or ``rceil``.

    Returns:
        float32 of the same shape. All-zero units have scale 1 (``max``, ``pow2``) or the smallest, as the MX libraries.
    """
    if rule == "none":
        return torch.ones_like(amax)
    if rule == "max" and scale.kind == "exponent":
        rule = "pow2"  # a nearest power of two could be too small by half
    if rule == "max":
        s = torch.clamp(amax / _like(amax, element.max_value), min=_FLOAT32_MIN)
        if scale.name != "float32":
            s = torch.clamp(on_grid(s, scale), min=scale.min_subnormal)
        s = torch.where(amax == 0, 1.0, s)
    else:
        s = _power_of_two(amax, element, rule)
    return torch.where(amax < math.inf, s, math.nan)


def _like(x: Tensor, value: float) -> Tensor:
    """``value`` as a tensor beside ``x``: divided by a Python number, CUDA multiplies by its reciprocal instead, and a
    Python number divided by a tensor is a product with the reciprocal everywhere: both round twice."""
    return torch.full((), value, dtype=x.dtype, device=x.device)


def _power_of_two(amax: Tensor, element: NumberFormat, rule: ScaleRule) -> Tensor:
    top = struct.unpack("<i", struct.pack("<f", element.max_value))[0]
    if rule == "rceil":
        amax = amax * (1.0 / torch.tensor(element.max_value)).item()  # the reciprocal rounded to float32
    bits = amax.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if rule == "floor":
        field = exponent - element.max_exponent
    elif rule == "rceil":
        # a subnormal is at most 2^-127 (field 0), or rounds up to 2^-126 (field 1)
        field = exponent + (mantissa > torch.where(exponent == 0, 0x400000, 0))
    else:
        subnormal = exponent == 0
        exponent = torch.clamp(exponent, min=1)
        field = exponent - ((top >> 23) - 127) + (~subnormal & (mantissa > (top & 0x7FFFFF)))
        field = torch.where(amax == 0, 127, torch.clamp(field, min=1))
    field = torch.clamp(field, 0, 254).to(torch.int32)
    return torch.where(field == 0, 0x400000, field << 23).to(torch.int32).view(torch.float32)


def two_level_scales(
    amax_block: Tensor, amax_unit: Tensor, element: NumberFormat, scale: NumberFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4's scales: of every block, of every unit, and the factor that encodes a block's elements.

    Args:
        amax_block: float32 largest magnitude of every block.
        amax_unit: that of the unit (tensor, example) that the block is in; broadcastable to ``amax_block``.
        element: the format of the elements.
        scale: the format of the block scales.

    Returns:
        (block scales, unit scales, factors): x is encoded as element(x * factor), and decoded as
        element * block scale * unit scale.
    """
    full = element.max_value * scale.max_value
    finite = amax_unit < math.inf
    encode = torch.clamp(_like(amax_unit, full) / amax_unit, max=_FLOAT32_MAX)
    encode = torch.where(finite, torch.where(amax_unit == 0, 1.0, encode), math.nan)
    inverse = (1.0 / torch.tensor(element.max_value)).item()
    block = on_grid(amax_block * (encode * inverse), scale)
    factor = torch.clamp(1.0 / (block * (1.0 / encode)), max=_FLOAT32_MAX)
    unit = torch.where(finite, torch.where(amax_unit == 0, 1.0, amax_unit / _like(amax_unit, full)), math.nan)
    return block, unit, factor
