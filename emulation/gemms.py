"""The three GEMMs of a Linear or convolution layer, and the per-example view of the weight gradient.

For a layer y = x W^T + b the names are: ``output`` (x, W), ``grad_input`` (g, W) and ``grad_weight`` (x, g), with g the
gradient of the loss with respect to y. Convolutions are the same three products after unfolding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulation import fused, native, norms
from emulation.codec import is_concrete
from emulation.norms import at_least_float32, squared_norm_bounds

TF32 = 2**-9 * 1.001  # how far off a product of two numbers is that are cut to ten mantissa bits first, relative
_UNFOLDED = {True: 1 << 22, False: 1 << 28}  # elements of unfolded inputs held at a time: CPU (in its caches), else


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """How a convolution walks over its (already padded where asymmetric) input; one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def positions(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The output's spatial size for an input of spatial size ``size``."""
        each = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)


def geometry(layer: nn.Module) -> ConvGeometry | None:
    """The geometry of a convolution layer after :func:`pad_input`; None for a Linear layer."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    return ConvGeometry(
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=(0,) * len(layer.kernel_size) if _pads_outside(layer) else tuple(map(int, layer.padding)),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
    )


def _pads_outside(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    return isinstance(layer.padding, str) or layer.padding_mode != "zeros"


def pad_input(layer: nn.Module, x: Tensor) -> Tensor:
    """``x`` as the GEMMs of ``layer`` take it: 'same' and non-zero padding modes are applied here, outside of them."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not _pads_outside(layer):
        return x
    amounts: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):  # F.pad counts dimensions from the last
        if layer.padding == "same":
            total = layer.dilation[i] * (layer.kernel_size[i] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [0, 0] if layer.padding == "valid" else [int(layer.padding[i])] * 2
    if not any(amounts):
        return x
    return F.pad(x, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def output(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry | None) -> Tensor:
    """The ``output`` GEMM: the layer's result, bias added."""
    if conv is None:
        return F.linear(x, weight, bias)
    return torch.convolution(
        x, weight, bias, conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.kernel), conv.groups
    )


def grad_input(grad_output: Tensor, weight: Tensor, input_like: Tensor, conv: ConvGeometry | None) -> Tensor:
    """The ``grad_input`` GEMM: the loss's gradient with respect to the layer's input, shaped as ``input_like``."""
    if conv is None:
        return grad_output.matmul(weight)
    return _conv_backward(grad_output, input_like, weight, conv, (True, False, False))[0]


def grad_weight(x: Tensor, grad_output: Tensor, weight: Tensor, conv: ConvGeometry | None) -> Tensor:
    """The ``grad_weight`` GEMM summed over the whole batch; ``weight`` gives the shape alone."""
    if conv is None:
        return grad_output.reshape(-1, grad_output.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return _conv_backward(grad_output, x, weight, conv, (False, True, False))[1]


def _conv_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, conv: ConvGeometry, mask: tuple[bool, bool, bool]
) -> list[Tensor]:
    none = [0] * len(conv.kernel)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad_output, x, weight, None, conv.stride, conv.padding, conv.dilation, False, none, conv.groups, list(mask)
    )


def _windows(x: Tensor, conv: ConvGeometry, *, channels_last: bool) -> Tensor:
    """A view [B, C, *kernel, *positions] of the zero-padded input; stored with channels innermost on request.

    Strided views copy several times faster than ``F.unfold`` on a CPU, and take any number of dimensions.
    """
    size = x.shape[2:]
    padded_size = [n + 2 * p for n, p in zip(size, conv.padding, strict=True)]
    inner = [slice(p, p + n) for n, p in zip(size, conv.padding, strict=True)]
    if channels_last:
        padded = x.new_zeros(x.shape[0], *padded_size, x.shape[1]).movedim(-1, 1)
    elif any(conv.padding):
        padded = x.new_zeros(*x.shape[:2], *padded_size)
    else:
        padded = x.contiguous()
    if padded is not x:
        padded[(slice(None), slice(None), *inner)] = x
    batch, channel, *steps = padded.stride()
    return padded.as_strided(
        (*x.shape[:2], *conv.kernel, *conv.positions(tuple(size))),
        (
            batch,
            channel,
            *(s * d for s, d in zip(steps, conv.dilation, strict=True)),
            *(s * d for s, d in zip(steps, conv.stride, strict=True)),
        ),
    )


def _unfolded(x: Tensor, conv: ConvGeometry) -> Tensor | None:
    """The windows as a tensor of their own, by a kernel; None where there is none."""
    if len(conv.kernel) != 2 or not x.numel() or not is_concrete(x) or not fused.has_triton(x.device):
        return None
    from emulation import patches_triton

    shapes = (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.positions(tuple(x.shape[2:])))
    return patches_triton.unfold(x.contiguous(), *shapes)  # type: ignore[arg-type]


def patches(x: Tensor, conv: ConvGeometry) -> Tensor:
    """Input patches, [B * groups, C / groups * prod(kernel), T], in the order of the weight's elements."""
    windows = _unfolded(x, conv) if x.is_cuda else None
    if windows is None:
        windows = _windows(x, conv, channels_last=False)
    shape = windows.shape
    spatial = 2 + len(conv.kernel)
    return windows.reshape(shape[0] * conv.groups, shape[1:spatial].numel() // conv.groups, shape[spatial:].numel())


def patch_rows(x: Tensor, conv: ConvGeometry) -> Tensor:
    """The same patches as rows [B * groups, T, prod(kernel) * C / groups], channels innermost: for inner products."""
    if has_native_rows(x):
        shape = x.shape[0] * conv.groups, math.prod(conv.positions(tuple(x.shape[2:]))), math.prod(conv.kernel)
        out = x.new_empty(*shape[:2], shape[2] * x.shape[1] // conv.groups)
        native.unfold(padded_image(x, conv), out, walk(x, conv))
        return out
    windows: Tensor = _windows(x, conv, channels_last=True).unflatten(1, (conv.groups, -1))
    dims = len(conv.kernel)
    rows = windows.permute(0, 1, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims), 2)
    t = rows.shape[2 : 2 + dims].numel()
    return rows.reshape(x.shape[0] * conv.groups, t, rows.shape[2 + dims :].numel())


def has_native_rows(x: Tensor) -> bool:
    """Whether ``native.unfold`` takes an input [B, C, height, width]."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or not x.numel():
        return False
    return is_concrete(x) and native.usable()


def padded_image(x: Tensor, conv: ConvGeometry) -> Tensor:
    """``x`` [B, C, height, width] as [B, height, width, C] with the convolution's zeros around it, C-contiguous."""
    image = x.permute(0, 2, 3, 1)
    if not any(conv.padding):
        return image.contiguous()
    (n, height, width, channels), (above, beside) = image.shape, conv.padding
    padded = x.new_zeros(n, height + 2 * above, width + 2 * beside, channels)
    padded[:, above : above + height, beside : beside + width] = image
    return padded


def walk(x: Tensor, conv: ConvGeometry) -> tuple[int, ...]:
    """What ``native.unfold`` is to know of an input [B, C, height, width], in its order."""
    (height, width), (above, beside) = x.shape[2:], conv.padding
    fields = (conv.kernel, conv.stride, conv.dilation, conv.positions((height, width)))
    return (height + 2 * above, width + 2 * beside, x.shape[1], conv.groups, *(n for pair in fields for n in pair))


def position_sums(grad_output: Tensor, conv: ConvGeometry | None) -> Tensor:
    """Per-example bias gradients [B, out]: the output gradient summed over tokens or positions."""
    if conv is None:
        return grad_output.sum(dim=tuple(range(1, grad_output.dim() - 1))) if grad_output.dim() > 2 else grad_output
    return grad_output.flatten(2).sum(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightGradient:
    """The operands of one layer's ``grad_weight`` GEMM, as they were quantized, before the sum over the batch.

    Attributes:
        weight: the parameter, [out, in / groups, *kernel] or [out, in].
        x: input, [B, ..., in] or [B, in, *spatial]; with ``rows``, [B * groups, T, prod(weight.shape[1:])].
        grad_output: gradient of the output, [B, ..., out] or [B, out, *positions]; with ``rows``,
            [B * groups, T, out / groups].
        conv: the geometry of a convolution, None for Linear.
        rows: whether the operands are already unfolded into one pair of matrices per example (and group); T is the
            reduction axis inside an example (tokens, positions).
        channels_last: whether the columns of such an ``x`` lie kernel positions first and channels innermost, instead
            of in the order of the weight's elements.
    """

    weight: Tensor
    x: Tensor
    grad_output: Tensor
    conv: ConvGeometry | None
    rows: bool = False
    channels_last: bool = False

    @property
    def groups(self) -> int:
        """Groups of the convolution, 1 for Linear."""
        return 1 if self.conv is None else self.conv.groups

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.x.shape[0] // (self.groups if self.rows else 1)

    @property
    def reduction(self) -> int:
        """Length T of the sum inside one example."""
        if self.rows:
            return self.x.shape[1]
        shape = self.grad_output.shape
        return shape[1:-1].numel() if self.conv is None else shape[2:].numel()

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The operands as [B * groups, T, in-features] and [B * groups, T, out-features], possibly strided views."""
        return self._input_rows(), self._output_rows()

    def _input_rows(self) -> Tensor:
        """The input as [B * groups, T, in-features], in the order of the weight's elements unless ``rows`` says not."""
        if self.rows:
            return self.x
        if self.conv is None:
            return self.x.reshape(self.batch_size, self.reduction, self.x.shape[-1])
        return patches(self.x, self.conv).transpose(1, 2)

    def _output_rows(self) -> Tensor:
        """The gradient of the output as [B * groups, T, out-features]."""
        if self.rows:
            return self.grad_output
        if self.conv is None:
            return self.grad_output.reshape(self.batch_size, self.reduction, self.grad_output.shape[-1])
        groups, outputs = self.batch_size * self.groups, self.weight.shape[0] // self.groups
        return self.grad_output.reshape(groups, outputs, self.reduction).transpose(1, 2)

    def squared_norms(self) -> Tensor:
        """[B] in float64, without forming the gradients: |X^T G|^2 is the sum of (X X^T) * (G G^T) over all positions.

        Where an example's positions cancel, rounding could make that sum too small. The most that it can amount to, in
        any order of addition and with underflow, is added (:func:`emulation.norms.gram_bounds`): clipping by these
        norms never bounds too little. Where :meth:`weighted_sum` will cut its operands to TF32, what an example can
        gain by that is added too: at most 2^-9 of sum of |x_t| |g_t|.
        """
        error = TF32 if self._in_tf32() else 0.0
        with exact_products():
            return torch.cat([part._squared_norms(error) for part in self._parts(norms_only=True)])

    def _in_tf32(self) -> bool:
        """Whether the GEMM of :meth:`weighted_sum` cuts float32 operands to ten mantissa bits."""
        if not self.x.is_cuda or self.x.dtype == torch.float64:
            return False
        backends: Any = torch.backends
        backend = backends.cuda.matmul if self.conv is None or self.rows else backends.cudnn.conv
        return bool(backend.fp32_precision == "tf32")

    def _squared_norms(self, error: float) -> Tensor:
        """``error``: of each product of two numbers in the sum that is to be bounded, relative."""
        n, conv, image = self.batch_size, self.conv, self._image()
        if image:
            x = self.x
        elif conv is None or self.rows or self.x.is_cuda:
            x = self._input_rows()
        else:
            x = patch_rows(self.x, conv)
        g = self._output_rows()
        x, g = at_least_float32(x), at_least_float32(g)
        if self.reduction == 1:
            bounds = squared_norm_bounds(x.flatten(1)) * squared_norm_bounds(g.flatten(1))
            return bounds.reshape(n, -1).sum(1) * (1 + error) ** 2
        inputs = norms.pixel_gram(x, self.groups) if image else torch.bmm(x, x.transpose(1, 2))
        features = self.weight.shape[1:].numel() if image else x.shape[2], g.shape[2]
        bounds = norms.gram_bounds(inputs, torch.bmm(g, g.transpose(1, 2)), features, error, image)
        return bounds.reshape(n, -1).sum(1)

    def _image(self) -> tuple[tuple[int, ...], ConvGeometry] | None:
        """Spatial size of the input and geometry, where the norms are cheaper from products of pixels."""
        if self.rows or self.conv is None:
            return None
        size = tuple(self.x.shape[2:])
        return (size, self.conv) if norms.by_pixels(size, self.weight.shape[1], self.conv) else None

    def norm_cost(self) -> int:
        """Multiply-adds of :meth:`squared_norms`, of one example and group."""
        t, o, image = self.reduction, self.weight.shape[0] // self.groups, self._image()
        if image is None:
            return t * t * (self.weight.shape[1:].numel() + o)
        return math.prod(image[0]) ** 2 * self.weight.shape[1] + t * t * (math.prod(image[1].kernel) + o)

    def per_example(self) -> Tensor:
        """Every example's own gradient, [B, *weight.shape]."""
        in_rows = self.conv is not None and not self.rows and has_native_rows(self.x)
        result: Tensor | None = None
        start = 0
        for part in self._parts():
            g = part._output_rows()
            x = patch_rows(part.x, part.conv) if in_rows and part.conv else part._input_rows()
            if result is None:
                result = self.x.new_empty(self.batch_size * self.groups, g.shape[2], x.shape[2])
            torch.bmm(g.transpose(1, 2), x, out=result[start : start + len(x)])
            start += len(x)
        assert result is not None
        return self._as_weights(result, channels_last=self.channels_last or in_rows)

    def _parts(self, *, norms_only: bool = False) -> list[WeightGradient]:
        """The same example by example, so many at a time that unfolded inputs stay small; at least one part."""
        if self.conv is None or self.rows or not self.batch_size:
            return [self]
        image = self._image() if norms_only else None
        own = math.prod(image[0]) ** 2 if image else self.weight.shape[1:].numel() * self.reduction
        count = max(1, _UNFOLDED[self.x.device.type == "cpu"] // max(own * self.groups, 1))
        parts = zip(self.x.split(count), self.grad_output.split(count), strict=True)
        return [replace(self, x=x, grad_output=g) for x, g in parts]

    def total(self) -> Tensor:
        """The sum of the examples' gradients: the batch gradient of ordinary training."""
        if self.rows:
            return self.weighted_sum(self.x.new_ones(self.batch_size))
        return grad_weight(self.x, self.grad_output, self.weight, self.conv)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The sum of the examples' gradients, each times its factor, which multiplies what was quantized.

        Half-precision operands are multiplied and added as float32; float32 ones as they are, but on a GPU that was
        told to cut them to TF32.

        Args:
            factors: [B].
        """
        with nullcontext() if self._in_tf32() else exact_products():
            return self._weighted_sum(factors)

    def _weighted_sum(self, factors: Tensor) -> Tensor:
        inputs, outputs = at_least_float32(self.x), at_least_float32(self.grad_output)
        factors = factors.to(outputs.dtype)
        if self.rows:
            n, g = self.batch_size, self.groups
            x, h = (t.reshape(n, g, *t.shape[1:]) for t in (inputs, outputs))
            h = h * factors.reshape(-1, 1, 1, 1)
            # one GEMM per group over examples and positions together
            product = torch.bmm(
                h.transpose(0, 1).reshape(g, -1, h.shape[-1]).transpose(1, 2),
                x.transpose(0, 1).reshape(g, -1, x.shape[-1]),
            )
            return self._as_weights(product, channels_last=self.channels_last)[0]
        scaled = outputs * factors.reshape(-1, *[1] * (outputs.dim() - 1))
        return grad_weight(inputs, scaled, self.weight, self.conv)

    def _as_weights(self, products: Tensor, *, channels_last: bool) -> Tensor:
        """[N * groups, out / groups, columns of x] as [N, *weight.shape]."""
        shape = self.weight.shape
        if channels_last:
            products = products.unflatten(2, (*shape[2:], shape[1])).movedim(-1, 2)
        return products.reshape(-1, *shape)

    def without(self, dropped: Tensor) -> WeightGradient:
        """The same with the examples that the mask ``dropped`` [B] marks replaced by zeros."""
        if self.rows:
            dropped = dropped.repeat_interleave(self.groups)
        return replace(self, x=zero_examples(self.x, dropped), grad_output=zero_examples(self.grad_output, dropped))


@contextmanager
def exact_products() -> Iterator[None]:
    """Has products of float32 numbers be those, on any device: not of operands cut to TF32 or bfloat16 first.

    An example's norm and its part of the sum are two products of the same operands: cut apart, they would not be of the
    same gradient. Forward and backward keep whatever precision they have.
    """
    backends: Any = torch.backends
    every = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [(s, now) for s in every if (now := s.fp32_precision) in ("tf32", "bf16")]
    try:
        for setting, _ in before:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in before:
            setting.fp32_precision = value


def zero_examples(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of ``x`` with zeros where the mask over its first dimension is True, NaN and infinities included."""
    return x.masked_fill(dropped.reshape(-1, *[1] * (x.dim() - 1)), 0.0)
