"""Matrix products exactly as the matrix units of accelerators compute them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from emulation import matmul_torch
from emulation.errors import InputError
from emulation.formats import BlockFormat, Format, NumberFormat, get_format
from emulation.matrix_units import SCALE_BLOCKS, Accumulation, MatrixUnit, element_format, matrix_unit

__all__ = ["MatrixUnit", "matmul"]

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # values looked at a time: what the caches hold; few waits for the device


@torch.no_grad()
def matmul(
    a: Tensor,
    b: Tensor,
    unit: str | MatrixUnit = "hopper",
    a_format: str | Format = "float8_e4m3fn",
    b_format: str | Format | None = None,
    accumulation: Accumulation = "fast",
    *,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    scale_format: str | Format | None = None,
) -> Tensor:
    """The product of two matrices, or of B pairs of them, as a matrix unit computes it, bit for bit; no gradient flows.

    Long K is one chain of steps from its first product to its last; the last group may be short. On CUDA a Triton
    kernel does it where Triton is installed and neither operand has infinities or NaNs; all other cases run as torch
    operations, with the same bits. Memory beyond the operands: about four times their float32 size, and some MiB.

    Args:
        a: [M, K] or [B, M, K], values of ``a_format``.
        b: [K, N] or [B, K, N], values of ``b_format``.
        unit: the unit's name, or a row of one's own.
        a_format: format of ``a``; of a block format its elements. ``tfloat32`` takes any float32 and cuts it to
            10 mantissa bits, as the units do.
        b_format: format of ``b``; None: that of ``a``.
        accumulation: ``fast``, or ``precise`` (Hopper FP8: chains of 128 added in float32, as cuBLAS does unless asked
            for fast accumulation).
        a_scale: [..., M, ceil(K / block)] values of ``scale_format``: block scales; block is 32 for ``float8_e8m0fnu``
            and 16 for ``float8_e4m3fn``, whose signs are ignored, as the units do.
        b_scale: [..., ceil(K / block), N], likewise.
        scale_format: format of both; None: that of ``a_format`` if it is a block format with blocks.

    Returns:
        [M, N] or [B, M, N] float32; NaN is 0x7FFFFFFF.

    Raises:
        InputError: unknown names, shapes that do not fit, values that are not on their format's grid.
    """
    element_a, element_b = element_format(a_format), element_format(a_format if b_format is None else b_format)
    scale = _scale_format(a_format, a_scale, b_scale, scale_format)
    row = unit
    if not isinstance(row, MatrixUnit):
        row = matrix_unit(row, element_a, element_b, scale, accumulation)
    elif not row.takes(element_a.name, element_b.name, None if scale is None else scale.name):
        raise InputError(f"unit={row.name!r} takes no a_format={element_a.name!r} and b_format={element_b.name!r}")
    _check_shapes(a, b)
    a, b = _on_grid("a", a, element_a), _on_grid("b", b, element_b)
    block = SCALE_BLOCKS[scale.name] if scale is not None else row.group
    if scale is not None:
        assert a_scale is not None
        assert b_scale is not None
        blocks = -(-a.shape[-1] // block)
        a_scale = _scales("a_scale", a_scale, (*a.shape[:-1], blocks), scale, a.device)
        b_scale = _scales("b_scale", b_scale, (*b.shape[:-2], blocks, b.shape[-1]), scale, a.device)
    if row.arithmetic == "plain":
        if a_scale is not None and b_scale is not None:
            a = a * a_scale.repeat_interleave(block, -1)[..., : a.shape[-1]]
            b = b * b_scale.repeat_interleave(block, -2)[..., : b.shape[-2], :]
        return a @ b
    specials = not (bool(a.isfinite().all()) and bool(b.isfinite().all()))
    left = matmul_torch.operand(a.movedim(-1, 0), element_a, keep_specials=specials)
    right = matmul_torch.operand(b.movedim(-2, 0), element_b, keep_specials=specials)
    if scale is not None and a_scale is not None and b_scale is not None:
        fold = row.arithmetic == "block_scaled"
        left = matmul_torch.with_scales(left, a_scale.movedim(-1, 0), scale, block=block, fold=fold)
        right = matmul_torch.with_scales(right, b_scale.movedim(-2, 0), scale, block=block, fold=fold)
    if left.values.is_cuda and find_spec("triton") is not None:
        from emulation import matmul_triton  # imports Triton, which a machine without CUDA may not have

        if matmul_triton.takes(left, right, row):
            return matmul_triton.chained_product(left, right, row)
    return matmul_torch.chained_product(left, right, row)


def _scale_format(
    a_format: str | Format, a_scale: Tensor | None, b_scale: Tensor | None, scale_format: str | Format | None
) -> NumberFormat | None:
    if (a_scale is None) != (b_scale is None):
        given, missing = ("b_scale", "a_scale") if a_scale is None else ("a_scale", "b_scale")
        raise InputError(f"{missing}=None with {given} given", hint="give both operands block scales, or neither")
    if scale_format is None:
        fmt = get_format(a_format)
        own = fmt.scale if isinstance(fmt, BlockFormat) and fmt.block_size is not None else None
    else:
        own = element_format(scale_format)
    if a_scale is None:
        if scale_format is not None:
            raise InputError(
                f"scale_format={own.name if own else None!r} without scales", hint="give a_scale and b_scale"
            )
        return None
    if own is None:
        raise InputError("scale_format=None with scales given", hint="choose from " + ", ".join(SCALE_BLOCKS))
    if own.name not in SCALE_BLOCKS:
        raise InputError(f"scale_format={own.name!r}", hint="choose from " + ", ".join(SCALE_BLOCKS))
    return own


def _check_shapes(a: Tensor, b: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dim() not in (2, 3) or not x.dtype.is_floating_point:
            raise InputError(
                f"{name} of shape {tuple(x.shape)} and dtype {x.dtype}", hint="a matrix of floats, or a batch of them"
            )
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        hint = "[M, K] and [K, N] are needed, or [B, M, K] and [B, K, N]"
        raise InputError(f"a.shape={tuple(a.shape)} with b.shape={tuple(b.shape)}", hint=hint)
    if a.is_meta:
        raise InputError("a.device='meta'", hint="a product needs values")
    if a.device != b.device:
        raise InputError(f"a.device={str(a.device)!r} with b.device={str(b.device)!r}", hint="move one of them")


def _scales(name: str, scale: Tensor, shape: tuple[int, ...], fmt: NumberFormat, device: torch.device) -> Tensor:
    if tuple(scale.shape) != shape or not scale.dtype.is_floating_point or scale.device != device:
        raise InputError(
            f"{name} of shape {tuple(scale.shape)}, dtype {scale.dtype} on {str(scale.device)!r}",
            hint=f"floats of shape {shape} on {str(device)!r}: one for each {SCALE_BLOCKS[fmt.name]} values along K",
        )
    return _on_grid(name, scale, fmt)


def _on_grid(name: str, x: Tensor, fmt: NumberFormat) -> Tensor:
    """``x`` as float32, if every value is one of ``fmt``."""
    values = x.detach().float()
    if fmt.name == "tfloat32":  # the units cut what they are given
        cut = values.contiguous().view(torch.int32).bitwise_and(-1 << 13).view(torch.float32)
        return torch.where(values.isnan(), values, cut)
    exact = x.detach().reshape(-1) if x.dtype == torch.float64 else None
    chunk = _CHUNK.get(x.device.type, 1 << 20)
    for start in range(0, values.numel(), chunk):
        piece = values.reshape(-1)[start : start + chunk]
        fits = _fits(piece, fmt)
        if exact is not None:
            fits &= (exact[start : start + chunk] == piece) | piece.isnan()
        if not bool(fits.all()):
            raise InputError(
                f"{name} holds {float(piece[~fits][0])!r}, which is not a value of {fmt.name!r}",
                hint=f"quantize first: round_to({name}, {fmt.name!r})",
            )
    return values


def _fits(values: Tensor, fmt: NumberFormat) -> Tensor:
    """Which float32 values are values of ``fmt``: by the low bits that the format has no place for."""
    magnitude = values.abs()
    if fmt.is_integer:
        return (values == values.round()) & (values >= fmt.min_value) & (values <= fmt.max_value)
    bits = magnitude.view(torch.int32)
    exponent = (bits >> 23) - 127
    last_kept = exponent.clamp(min=fmt.min_exponent) - fmt.mantissa_bits
    missing = last_kept.sub_(exponent.clamp(min=-126) - 23)
    # with more bits missing than there are, the leading one is lost too: a zero alone fits
    lost = bits & ((1 << missing.clamp(max=23)) - 1)
    fits = (lost == 0) & (missing <= 23) & (magnitude <= fmt.max_value)
    fits |= magnitude == 0
    if fmt.has_inf:
        fits |= magnitude == torch.inf
    if not fmt.signed:
        fits &= values > 0
    return fits | values.isnan() if fmt.has_nan else fits


class _CallableModule(ModuleType):
    """``emulation.matmul`` names a function and this module, which hides it once imported: both can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return matmul(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
