"""Quantizers in one pass over memory where there is a kernel for it: C on the CPU, Triton on CUDA; the same bits."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
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
    if form is None:
        return False
    two_levels = RULES[form.rule] == "nvfp4"
    block_form = kernel_format(scale, "nearest_even") if two_levels else form
    if block_form is None or (two_levels and block_form.kind != MAGIC):
        return False
    if x.device.type == "cpu":
        return native.quantize_blocks(x, out, form, block_form, key, shape, size, units)
    keys_within_lines = key is not None and key.dim() > 0 and shape[0] % len(key) != 0
    if size > _WIDEST_BLOCK or keys_within_lines or not has_triton(x.device):
        return False
    from emulation import quantize_triton

    quantize_triton.quantize_blocks(x, out, form, block_form, key, shape, size, units)
    return True


@lru_cache(maxsize=8)
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can run on ``device``."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
