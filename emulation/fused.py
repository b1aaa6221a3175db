"""Quantizers in one pass over memory where there is a kernel for it: C on the CPU, Triton on CUDA; the same bits."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from emulation import native
from emulation.formats import NumberFormat
from emulation.kernel_formats import MAGIC, RULES, KernelFormat, kernel_format

_WIDEST_BLOCK = 1024  # what one Triton program keeps in registers


def round_flat(
    x: Tensor,
    out: Tensor,
    form: KernelFormat | None,
    key: Tensor | None,
    units: int = 1,
    *,
    looks_for_nan: bool = False,
) -> bool | None:
    """``x`` on the grid in ``out``; equal parts of it, the units, have a scale each by the rule of ``form``.

    Args:
        x: float32, C-contiguous, not empty, on any device; ``out`` the same.
        form: the format, rounding and scale rule; None: not one of the kernels'.
        key: as ``rounding_keys`` gives it.
        units: how many; 1 is all of ``x``.
        looks_for_nan: whether the caller must know; on a GPU that is a wait for it.

    Returns:
        Whether there was a NaN (False also where it is not looked for); None where there is no kernel, and nothing was
        done.
    """
    if form is None:
        return None
    if x.device.type == "cpu":
        if units == 1:
            return native.round_flat(x, out, form, key)
        size = x.numel() // units
        return False if native.quantize_blocks(x, out, form, form, key, (units, size, 1), size, units) else None
    if not has_triton(x.device):
        return None
    from emulation import quantize_triton

    nan = torch.zeros((), dtype=torch.int64, device=x.device) if looks_for_nan else None
    quantize_triton.round_flat(x, out, form, key, units, nan)
    return nan is not None and bool(nan)


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, for results of the kernels: see native.py."""
    return native.empty_like(x) if x.device.type == "cpu" else torch.empty_like(x)


def quantize_blocks(
    x: Tensor,
    out: Tensor,
    form: KernelFormat | None,
    scale: NumberFormat,
    key: Tensor | None,
    shape: tuple[int, int, int],
    size: int,
    units: int,
) -> bool:
    """Fake-quantizes ``x`` seen as ``shape`` in blocks; False where there is no kernel, and nothing was done.

    Args:
        x: float32, C-contiguous, not empty, on any device; ``out`` the same.
        form: the elements' format, rounding and scale rule; None: not one of the kernels'.
        scale: the format of the block scales.
        key: as ``rounding_keys`` gives it.
        shape: lines, elements along a line, columns.
        size: elements of a block along a line; a line's last block may be shorter.
        units: equal parts of ``x`` that have a scale of their own above the blocks', by rule ``nvfp4``.
    """
    block_form = _block_form(form, scale)
    if form is None or block_form is None:
        return False
    if x.device.type == "cpu":
        return native.quantize_blocks(x, out, form, block_form, key, shape, size, units)
    keys_within_lines = key is not None and key.dim() > 0 and shape[0] % len(key) != 0
    if size > _WIDEST_BLOCK or keys_within_lines or not has_triton(x.device):
        return False
    from emulation import quantize_triton

    quantize_triton.quantize_blocks(x, out, form, block_form, key, shape, size, units)
    return True


def quantize_squares(
    x: Tensor,
    out: Tensor,
    form: KernelFormat | None,
    scale: NumberFormat,
    key: Tensor | None,
    shape: tuple[int, int, int, int],
    size: int,
) -> bool:
    """Fake-quantizes ``x`` in square blocks; False where there is no kernel, and nothing was done.

    Args:
        x, out, form, scale, key: as for :func:`quantize_blocks`; rule ``nvfp4`` has one scale above all blocks.
        shape: planes, height, width, columns.
        size: elements of a block along height and width; those at the end may be smaller.
    """
    block_form = _block_form(form, scale)
    if form is None or block_form is None:
        return False
    if x.device.type == "cpu":
        return native.quantize_squares(x, out, form, block_form, key, shape, size)
    if form.stochastic or size * size > _WIDEST_BLOCK or not has_triton(x.device):
        return False
    from emulation import quantize_triton

    # a row for each block: three more passes over what are weights, and few
    planes, height, width, inner = shape
    whole = x.view(shape)
    if width % size or height % size:
        whole = F.pad(whole, (0, 0, 0, -width % size, 0, -height % size))
    rows = whole.view(planes, -(-height // size), size, -(-width // size), size, inner).permute(0, 1, 3, 5, 2, 4)
    blocks = rows.contiguous()
    lines = blocks.numel() // size**2
    quantize_triton.quantize_blocks(blocks, blocks, form, block_form, None, (lines, size**2, 1), size**2, 1)
    back = blocks.permute(0, 1, 4, 2, 5, 3).reshape(whole.shape)[:, :height, :width]
    out.view(shape).copy_(back)
    return True


def _block_form(form: KernelFormat | None, scale: NumberFormat) -> KernelFormat | None:
    """The form of the block scales; None where they are not one of the kernels'."""
    if form is None or RULES[form.rule] != "nvfp4":
        return form
    block_form = kernel_format(scale, "nearest_even")
    return block_form if block_form is not None and block_form.kind == MAGIC else None


@lru_cache(maxsize=8)
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can run on ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
