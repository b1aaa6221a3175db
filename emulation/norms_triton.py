"""What clipping sums on CUDA, each in one pass: bounds from Gram matrices, squares of rows, sums over positions."""

# Triton reads the annotations of kernels as code: theirs are for compile-time constants alone.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from emulation.gemms import ConvGeometry

_ELEMENTS = 1024


@triton.jit
def _product(
    gram, s, t, inside, H: tl.constexpr, W: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """The inner products of the patches at positions ``s`` and ``t`` from those of pixels, in float64."""
    total = tl.zeros(s.shape, tl.float64)
    for tap in range(KH * KW):
        down, right = (tap // KW) * DH - PH, (tap % KW) * DW - PW
        y, x, v, u = s // OW + down, s % OW + right, t // OW + down, t % OW + right
        real = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W) & (v >= 0) & (v < H) & (u >= 0) & (u < W)
        total += tl.load(gram + (y * W + x) * (H * W) + v * W + u, mask=real, other=0.0).to(tl.float64)
    return total


@triton.jit
def _gram_bounds(
    inputs, outputs, out, terms_k, terms_o, grown_k, grown_o, rounding, error, tiny, T: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, SIZE: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One matrix pair of inputs [N, H * W, H * W] and outputs [N, T, T]."""
    n = tl.program_id(0).to(tl.int64)
    inputs += n * (H * W * H * W)
    outputs += n * (T * T)
    total = tl.zeros((SIZE,), tl.float64)
    for start in range(0, T * T, SIZE):
        at = start + tl.arange(0, SIZE)
        inside = at < T * T
        own = _product(inputs, at // T, at % T, inside, H, W, OW, KH, KW, PH, PW, DH, DW)
        total += own * tl.load(outputs + at, mask=inside, other=0.0).to(tl.float64)
    size_k = tl.zeros((LINE,), tl.float64)
    size_o = tl.zeros((LINE,), tl.float64)
    size_both = tl.zeros((LINE,), tl.float64)
    for start in range(0, T, LINE):
        at = start + tl.arange(0, LINE)
        inside = at < T
        a = _product(inputs, at, at, inside, H, W, OW, KH, KW, PH, PW, DH, DW)
        b = tl.load(outputs + at * (T + 1), mask=inside, other=0.0).to(tl.float64)
        a = tl.where(inside, tl.sqrt(tl.where(a < 0, 0.0, a) * grown_k + terms_k * tiny), 0.0)
        b = tl.where(inside, tl.sqrt(tl.where(b < 0, 0.0, b) * grown_o + terms_o * tiny), 0.0)
        size_k += a
        size_o += b
        size_both += a * b
    both, k, o = tl.sum(size_both, 0), tl.sum(size_k, 0), tl.sum(size_o, 0)
    squares = tl.sum(total, 0)
    squares = tl.where(squares < 0, 0.0, squares)
    squares += rounding * both * both + 4 * tiny * (terms_o * k * k + terms_k * o * o + 1.0 * T * T)
    bound = tl.sqrt(squares) + error * both
    tl.store(out + n, bound * bound)


def gram_bounds(
    inputs: Tensor,
    outputs: Tensor,
    features: tuple[int, int],
    gammas: tuple[float, float, float],
    error: float,
    image: tuple[tuple[int, ...], ConvGeometry] | None = None,
) -> Tensor:
    """What the squared norms of sums of T outer products do not exceed, [N] in float64.

    Args:
        inputs: float32 on a CUDA device, C-contiguous: [N, T, T], inner products of the inputs at all positions; with
            ``image`` [N, pixels, pixels], those of the pixels.
        outputs: [N, T, T], of the outputs' gradients.
        features: terms of the inner products, of inputs and of outputs.
        gammas: how far off are, relative to the sum of their magnitudes, the inner products of inputs and of outputs,
            and the sum of all products of the two.
        error: of each product of two numbers in the sum that is to be bounded, relative.
        image: spatial size of the input and geometry, of stride 1 and at most two dimensions.
    """
    t = outputs.shape[1]
    size: tuple[int, ...] = (t,)
    wide = t
    kernel: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    if image is not None:
        size, (kernel, padding, dilation) = image[0], (image[1].kernel, image[1].padding, image[1].dilation)
        wide = image[1].positions(size)[-1]
    flat = len(size) == 1  # a line is an image of one row
    form = [(start, *own) if flat else own for own, start in ((size, 1), (kernel, 1), (padding, 0), (dilation, 1))]
    out = torch.empty(len(outputs), dtype=torch.float64, device=outputs.device)
    grown = (1 / (1 - gammas[0]), 1 / (1 - gammas[1]), gammas[2], error)
    tiny = torch.finfo(torch.float32).tiny
    line = min(triton.next_power_of_2(t), _ELEMENTS)
    with torch.cuda.device_of(outputs):
        _gram_bounds[(len(outputs),)](
            inputs, outputs, out, *features, *map(_up, grown), tiny, t, *form[0], wide, *form[1], *form[2], *form[3],
            SIZE=_ELEMENTS, LINE=line,
        )  # fmt: skip
    return out


def _up(value: float) -> float:
    """The next float32 above, since Triton passes numbers on as float32: a bound must not shrink."""
    return float(np.nextafter(np.float32(value), np.float32(math.inf))) if value else 0.0


@triton.jit
def _row_squares(values, out, size, chunks, SIZE: tl.constexpr):
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(values + row * size + at, mask=at < size, other=0.0).to(tl.float64)
    tl.store(out + row * chunks + tl.program_id(1), tl.sum(value * value, 0))


def row_squares(values: Tensor) -> Tensor:
    """The rows' squared norms [N] in float64, added in float64.

    Args:
        values: [N, n] on a CUDA device, C-contiguous, float32 or narrower, not empty.
    """
    rows, size = values.shape
    step = min(triton.next_power_of_2(size), 4 * _ELEMENTS)
    chunks = triton.cdiv(size, step)
    out = torch.empty(rows, chunks, dtype=torch.float64, device=values.device)
    with torch.cuda.device_of(values):
        _row_squares[(rows, chunks)](values, out, size, chunks, SIZE=step)
    return out.sum(1) if chunks > 1 else out.squeeze(1)


@triton.jit
def _row_sums(x, grad, sums, products, rows, size: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    product = tl.zeros((ROWS, SIZE), tl.float32)
    for start in range(0, size, SIZE):
        column = start + tl.arange(0, SIZE)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0)
        total += g
        product += g * tl.load(x + at, mask=inside, other=0.0)
    tl.store(sums + row, tl.sum(total, 1), mask=row < rows)
    tl.store(products + row, tl.sum(product, 1), mask=row < rows)


def row_sums(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of ``grad`` and of ``x * grad`` over the last dimension, in one pass over both.

    Args:
        x, grad: [..., n] float32 on a CUDA device, C-contiguous, not empty.
    """
    size = grad.shape[-1]
    sums, products = grad.new_empty(grad.shape[:-1]), grad.new_empty(grad.shape[:-1])
    step = min(triton.next_power_of_2(size), _ELEMENTS)
    rows = max(1, _ELEMENTS // step)
    with torch.cuda.device_of(grad):
        _row_sums[(triton.cdiv(sums.numel(), rows),)](x, grad, sums, products, sums.numel(), size, ROWS=rows, SIZE=step)
    return sums, products
