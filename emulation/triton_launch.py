"""Launches of Triton kernels that cost the host little.

Triton's own launch works out anew at every call what its arguments are like, which takes longer than most quantizers'
kernels run. Here the compiled kernel is looked up by what Triton's choice depends on.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any,
    programs: int,
    warps: int,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    counts: tuple[int, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
) -> None:
    """Launches a kernel with these arguments in this order, and nothing that waits for the device.

    Args:
        kernel: of ``triton.jit``, with all of ``counts`` and ``numbers`` in its ``do_not_specialize``.
        programs: how many.
        warps: of each program.
        tensors: all on one device.
        sizes: whole numbers; Triton makes another kernel where one is 1 or a multiple of 16.
        counts: whole numbers that make none.
        numbers: floats and small whole numbers.
        constants: the kernel's ``tl.constexpr``.
    """
    device = tensors[0].device
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        aligned = True
        for tensor in tensors:
            aligned = aligned and tensor.data_ptr() % 16 == 0
        arguments = (*tensors, *sizes, *counts, *numbers, *constants)
        if not aligned:
            kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)
            return
        types, kinds = tuple([tensor.dtype for tensor in tensors]), tuple([_kind(n) for n in sizes])
        large, number_types = tuple([n >= 1 << 31 for n in counts]), tuple([type(n) for n in numbers])
        compiled = _compiled(kernel, device.index, types, kinds, large, number_types, constants, warps)
        compiled[programs, 1, 1](*arguments)


def _kind(size: int) -> int:
    """A small number of the kind that Triton takes ``size`` for: of its type, 1, and whether 16 divides it."""
    small = 1 if size == 1 else 16 if size % 16 == 0 else 3
    return small if size < 1 << 31 else small + (1 << 40)


@lru_cache(maxsize=1024)
def _compiled(
    kernel: Any,
    device: int,
    types: tuple[torch.dtype, ...],
    sizes: tuple[int, ...],
    large: tuple[bool, ...],
    numbers: tuple[type[float], ...],
    constants: tuple[Any, ...],
    warps: int,
) -> Any:
    """The kernel for arguments like these: aligned tensors, and sizes that Triton takes for the same."""
    counts = [1 << 40 if n else 3 for n in large]
    like = [3.0 if number is float else 3 for number in numbers]
    return kernel.warmup(*types, *sizes, *counts, *like, *constants, num_warps=warps, enable_fp_fusion=False, grid=(1,))
