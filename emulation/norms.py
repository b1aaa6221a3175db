"""Upper bounds on squared norms, from what a computer adds: no rounding and no underflow makes them too small.

A layer's weight gradient is a sum of outer products over the positions of an example. Its norm follows from two Gram
matrices, the inner products of the inputs, and of the outputs' gradients, at all pairs of positions, without the
gradient itself.

What the kernel of a convolution covers at two positions overlaps what it covers at their neighbours: with stride 1 the
products of whole patches are sums of products of single pixels, whose matrix is a ninth of the work for a 3 x 3 kernel,
and nothing is unfolded.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emulation import fused
from emulation.codec import is_concrete

if TYPE_CHECKING:
    from emulation.gemms import ConvGeometry

_CHUNK = 256  # squares added in the operands' own precision; more are added in float64


def gamma(terms: int, dtype: torch.dtype) -> float:
    """How far a computed sum of that many products can be off, relative to the sum of their magnitudes.

    Whatever the order of addition, with or without fused multiply-adds (Higham, Accuracy and Stability, section 3.1).
    """
    error = terms * torch.finfo(dtype).eps / 2
    return error / (1 - error) if error < 1 else math.inf


def squared_norm_bounds(values: Tensor) -> Tensor:
    """Upper bounds on the rows' exact squared norms, [N] in float64; relative 1.6e-5 above them in float32.

    Args:
        values: [N, n].
    """
    if _has_kernels(values) and values.numel():
        from emulation import norms_triton

        return norms_triton.row_squares(values.contiguous()) / (1 - gamma(values.shape[1] + 4, torch.float64))
    values = at_least_float32(values)
    whole = values.shape[1] // _CHUNK * _CHUNK
    parts = [torch.linalg.vector_norm(values[:, whole:], dim=1, keepdim=True)]
    if whole:
        parts.append(torch.linalg.vector_norm(values[:, :whole].unflatten(1, (-1, _CHUNK)), dim=2))
    squares = torch.cat(parts, dim=1).double().square().sum(1)
    own = _exceeds(squares, min(values.shape[1], _CHUNK) + 4, values.dtype)
    return own + values.shape[1] * torch.finfo(values.dtype).tiny


def gram_bounds(
    inputs: Tensor,
    outputs: Tensor,
    features: tuple[int, int],
    error: float,
    image: tuple[tuple[int, ...], ConvGeometry] | None = None,
) -> Tensor:
    """Upper bounds on the squared norms of sums of T outer products, [N] in float64.

    The sum of the products of two Gram matrices' elements can be too small where positions cancel. The most that
    rounding can amount to, in any order of addition and with underflow, is added. With K and O features it is at most
    (K + O + 6) u (sum of |x_t| |g_t|)^2; u is half the machine epsilon.

    Args:
        inputs: [N, T, T], inner products of the inputs at all positions; with ``image`` [N, pixels, pixels], those of
            the pixels. May be written to.
        outputs: [N, T, T], of the outputs' gradients.
        features: terms of the inner products, K of patches of the inputs and O of outputs.
        error: of each product of two numbers in the sum of outer products, relative.
        image: spatial size of the inputs, and geometry, as :func:`by_pixels` accepts.
    """
    (k, o), t, dtype = features, outputs.shape[1], outputs.dtype
    rounding = gamma(k + o + 6, dtype)
    if _has_kernels(outputs) and (image is None or len(image[0]) <= 2) and inputs.shape[1] ** 2 < 1 << 31:
        from emulation import norms_triton

        gammas = gamma(k, dtype), gamma(o, dtype), rounding
        return norms_triton.gram_bounds(inputs.contiguous(), outputs.contiguous(), features, gammas, error, image)
    if image is not None:
        inputs = patch_gram(inputs, *image)
    tiny = torch.finfo(dtype).tiny
    sizes = [_exceeds(m.diagonal(dim1=1, dim2=2), terms).sqrt() for m, terms in ((inputs, k), (outputs, o))]
    pairs = (sizes[0] * sizes[1]).sum(1).square()  # the sum of |x_s| |x_t| |g_s| |g_t| over all pairs
    underflow = 4 * tiny * (o * sizes[0].sum(1).square() + k * sizes[1].sum(1).square() + t**2)
    total = inputs.mul_(outputs).sum((1, 2), dtype=torch.float64).clamp_min_(0)
    return ((total + rounding * pairs + underflow).sqrt() + error * pairs.sqrt()).square()


def by_pixels(size: tuple[int, ...], channels: int, conv: ConvGeometry) -> bool:
    """Whether products of pixels take fewer multiply-adds than those of unfolded patches.

    Args:
        size: spatial, of the input.
        channels: of one group's input.
        conv: the convolution.
    """
    pixels, positions, taps = math.prod(size), math.prod(conv.positions(size)), math.prod(conv.kernel)
    if positions < 2 or any(step != 1 for step in conv.stride):
        return False
    if taps == 1:
        return pixels == positions
    return pixels**2 * channels + positions**2 * taps < positions**2 * taps * channels


def pixel_gram(x: Tensor, groups: int) -> Tensor:
    """Inner products over the channels of a group, [B * groups, pixels, pixels], of an input [B, C, *size]."""
    pixels = x.reshape(x.shape[0] * groups, x.shape[1] // groups, -1)
    return torch.bmm(pixels.transpose(1, 2), pixels)


def patch_gram(gram: Tensor, size: tuple[int, ...], conv: ConvGeometry) -> Tensor:
    """Inner products of the patches at all positions, [N, T, T].

    Args:
        gram: of the pixels, as :func:`pixel_gram` gives it.
        size: spatial, of the input; pixels outside of it are zero.
        conv: the convolution, of stride 1.
    """
    positions = conv.positions(size)
    if positions == size and math.prod(conv.kernel) == 1:
        return gram
    gram = gram.view(-1, *size, *size)
    total = gram.new_zeros(len(gram), *positions, *positions)
    for tap in product(*map(range, conv.kernel)):
        here, there = [], []  # the positions at which this tap lies on a pixel, and those pixels
        for i, dilation, padding, n, t in zip(tap, conv.dilation, conv.padding, size, positions, strict=True):
            shift = i * dilation - padding
            first, last = max(0, -shift), min(t, n - shift)
            here.append(slice(first, max(first, last)))
            there.append(slice(first + shift, max(first, last) + shift))
        total[(slice(None), *here, *here)] += gram[(slice(None), *there, *there)]
    t = math.prod(positions)
    return total.view(-1, t, t)


def row_sums(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of ``grad`` and of ``x * grad`` over the last dimension, both [..., n]."""
    if grad.dtype == x.dtype == torch.float32 and grad.numel() and _has_kernels(grad):
        from emulation import norms_triton

        return norms_triton.row_sums(x.contiguous(), grad.contiguous())
    return grad.sum(-1), (x * grad).sum(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; what is wider stays."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _exceeds(squares: Tensor, terms: int, dtype: torch.dtype | None = None) -> Tensor:
    """What the exact sums of ``terms`` squares cannot exceed, given the computed ones; float64."""
    dtype = dtype or squares.dtype
    return squares.double().clamp_min(0) / (1 - gamma(terms, dtype)) + terms * torch.finfo(dtype).tiny


def _has_kernels(values: Tensor) -> bool:
    return values.is_cuda and values.dtype != torch.float64 and is_concrete(values) and fused.has_triton(values.device)
