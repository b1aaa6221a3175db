"""The three GEMMs of a layer as a matrix unit computes them: its own accumulation, its own places for scales.

Block scales go into the unit; scales of an example or a tensor, and NVFP4's second level, multiply its float32 result.
Convolutions are implicit GEMMs: one chain over kernel positions and channels, channels innermost. The weight gradient
is one product per example, and the sum over examples is float32. It emulates what the silicon returns, not its speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from emulation.blocks import expanded
from emulation.errors import InputError
from emulation.formats import NumberFormat
from emulation.gemms import ConvGeometry, WeightGradient, patch_rows, patches
from emulation.matmul import matmul
from emulation.matrix_units import SCALE_BLOCKS, matrix_unit
from emulation.precision import (
    G_INPUT,
    G_WEIGHT,
    W_INPUT,
    W_OUTPUT,
    X_OUTPUT,
    X_WEIGHT,
    Keys,
    LayerPrecision,
    by_group,
)
from emulation.quantizer import Quantizer
from emulation.rotation import rotate

_POINT = ConvGeometry(kernel=(1,), stride=(1,), padding=(0,), dilation=(1,), groups=1)
"""Linear on [B, features, tokens] is a convolution with a kernel of one."""


def check_unit(precision: LayerPrecision, unit: str) -> None:
    """Refuses a recipe whose products the unit cannot compute.

    Raises:
        InputError: no such unit; it has no arithmetic for two operands that meet; or scales it cannot apply.
    """
    x, w, g = precision.input, precision.weight, precision.grad_output
    for a, b in ((x, w), (g, w), (g, x)):
        scale = _block_scale(a)
        if scale != _block_scale(b):
            raise InputError(
                f"precision {precision.name!r} on unit={unit!r}: one operand has blocks, the other has not"
            )
        matrix_unit(unit, a.element, b.element, scale)
        if scale is not None and {a.block_size, b.block_size} != {SCALE_BLOCKS.get(scale.name)}:
            raise InputError(
                f"precision {precision.name!r} on unit={unit!r}: blocks of {a.block_size} with {scale.name!r} scales",
                hint=f"the unit takes blocks of {SCALE_BLOCKS.get(scale.name)}",
            )
    if w.granularity == "channel":
        raise InputError(
            f"precision {precision.name!r} on unit={unit!r}: weights with a scale per channel",
            hint="use granularity='tensor': grad_input sums over output channels",
        )


def _padding_scale(quantizer: Quantizer) -> float:
    """The scale of blocks of zeros: the smallest, for a unit may align its addends by their scales alone."""
    fmt = quantizer.scale_format
    return 0.0 if fmt.has_zero else fmt.min_subnormal


def _block_scale(quantizer: Quantizer) -> NumberFormat | None:
    return quantizer.scale_format if quantizer.block_size is not None else None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Operand:
    """One side of a GEMM: N units (example and group, or group and output), each [features, *spatial].

    Attributes:
        elements: [N, features, *spatial], values of the element format.
        scale: [N, blocks of features, *spatial]; None without blocks.
        factor: [N], multiplies the unit's result.
        quantizer: where they come from.
    """

    elements: Tensor
    scale: Tensor | None
    factor: Tensor
    quantizer: Quantizer

    def rows(self, conv: ConvGeometry) -> tuple[Tensor, Tensor | None]:
        """Unfolded: elements [N, T, kernel * features] and scales [N, T, kernel * blocks], in whole blocks."""
        conv = replace(conv, groups=1)
        if self.scale is None:
            return patch_rows(self.elements, conv), None
        missing = -self.elements.shape[1] % self.quantizer.block_size if self.quantizer.block_size else 0
        around = [p for p in reversed(conv.padding) for _ in range(2)]
        scale = F.pad(self.scale, around, value=_padding_scale(self.quantizer))
        whole = F.pad(self.elements, [0, 0] * len(conv.kernel) + [0, missing])
        return patch_rows(whole, conv), patch_rows(scale, replace(conv, padding=(0,) * len(conv.kernel)))


def _operand(
    quantizer: Quantizer, x: Tensor, keys: Tensor | None, axis: int, features: int, units: Callable[[Tensor], Tensor]
) -> _Operand:
    """Quantizes ``x`` with blocks along ``axis``; ``units`` brings it into the form of an operand.

    ``features`` is the dimension of ``x`` that the chain runs along; a square block's scale is repeated along
    the other.
    """
    quantized = quantizer(x, keys=keys, axis=axis)
    elements = units(quantized.values())
    scale: Tensor | None = None
    outer: Tensor | None = quantized.scale
    if _block_scale(quantizer) is not None:
        scale, outer = quantized.scale, quantized.unit_scale
        for other in set(quantized.block_axes) - {features}:
            scale = expanded(scale, tuple(x.shape), (other,), quantized.block_size)
        shape = list(x.shape)
        shape[features] = scale.shape[features]
        scale = units(scale.expand(shape))
    factor = elements.new_ones(len(elements))
    if outer is not None and outer.numel():
        factor = outer.reshape(-1).repeat_interleave(len(elements) // outer.numel())
    return _Operand(elements=elements, scale=scale, factor=factor, quantizer=quantizer)


def _data(quantizer: Quantizer, role: int, x: Tensor, conv: ConvGeometry | None, keys: Keys) -> _Operand:
    """Input or output gradient: units of (example, group)."""
    if conv is None:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return _operand(quantizer, tokens, keys(quantizer, role, tokens), 2, 2, lambda t: t.transpose(1, 2))
    grouped = x.reshape(x.shape[0], conv.groups, x.shape[1] // conv.groups, *x.shape[2:])
    return _operand(quantizer, grouped, keys(quantizer, role, grouped), 2, 2, lambda t: t.flatten(0, 1))


def _weights(precision: LayerPrecision, weight: Tensor, conv: ConvGeometry | None, keys: Keys, back: bool) -> _Operand:
    """Units of (group, output) along input features; ``back``: of (group, input) along output features, flipped."""
    quantizer = precision.weight
    w = by_group(weight if conv is not None else weight.unsqueeze(-1), conv)
    role, axis = (W_INPUT, 1) if back and not quantizer.square_blocks else (W_OUTPUT, 2)
    own = keys(quantizer, role, w)
    if not back:
        return _operand(quantizer, w, own, axis, 2, lambda t: t.flatten(0, 1))
    kernel = list(range(2, w.dim() - 1))
    return _operand(quantizer, w, own, axis, 1, lambda t: t.transpose(1, 2).flatten(0, 1).flip(kernel))


def _multiply(data: _Operand, weights: _Operand, conv: ConvGeometry, unit: str) -> Tensor:
    """Patches of the data times the weights of their group: [B, groups, T, weights' units / groups]."""
    flat = replace(
        conv, stride=(1,) * len(conv.kernel), padding=(0,) * len(conv.kernel), dilation=(1,) * len(conv.kernel)
    )
    (x, x_scale), (w, w_scale) = data.rows(conv), weights.rows(flat)
    groups, t, each = conv.groups, x.shape[1], len(w) // conv.groups
    result = x.new_empty(len(x) // groups, groups, t, each)
    for g in range(groups):
        own = slice(g * each, (g + 1) * each)
        product = matmul(
            x[g::groups].flatten(0, 1),
            w[own, 0].t(),
            unit,
            data.quantizer.element,
            weights.quantizer.element,
            a_scale=None if x_scale is None else x_scale[g::groups].flatten(0, 1),
            b_scale=None if w_scale is None else w_scale[own, 0].t(),
            scale_format=_block_scale(data.quantizer),
        )
        result[:, g] = product.reshape(-1, t, each) * data.factor[g::groups, None, None] * weights.factor[own]
    return result


def output(
    precision: LayerPrecision,
    unit: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: ConvGeometry | None,
    keys: Keys,
) -> Tensor:
    """The layer's result; the bias is added in float32."""
    data = _data(precision.input, X_OUTPUT, x, conv, keys)
    result = _multiply(data, _weights(precision, weight, conv, keys, back=False), conv or _POINT, unit)
    if conv is None:
        result = result.reshape(*x.shape[:-1], weight.shape[0])
        added = bias
    else:
        size = conv.positions(tuple(x.shape[2:]))
        result = result.transpose(2, 3).reshape(x.shape[0], weight.shape[0], *size)
        added = None if bias is None else bias.reshape(-1, *[1] * len(size))
    return (result if added is None else result + added).to(x.dtype)


def grad_input(
    precision: LayerPrecision,
    unit: str,
    grad_output: Tensor,
    weight: Tensor,
    like: Tensor,
    conv: ConvGeometry | None,
    keys: Keys,
) -> Tensor:
    """The input's gradient, shaped as ``like``: every element one chain over kernel positions and output features."""
    data = _data(precision.grad_output, G_INPUT, grad_output, conv, keys)
    weights = _weights(precision, weight, conv, keys, back=True)
    if conv is None:
        return _multiply(data, weights, _POINT, unit).reshape(like.shape).to(like.dtype)
    spread, walk = _spread(data, conv, tuple(like.shape[2:]))
    return _multiply(spread, weights, walk, unit).transpose(2, 3).reshape(like.shape).to(like.dtype)


def _spread(data: _Operand, conv: ConvGeometry, size: tuple[int, ...]) -> tuple[_Operand, ConvGeometry]:
    """The output gradient with zeros in between and around, over which a stride-1 walk gives the input's gradient."""
    out = conv.positions(size)
    wide = [n + d * (k - 1) for n, k, d in zip(size, conv.kernel, conv.dilation, strict=True)]
    starts = [d * (k - 1) - p for k, d, p in zip(conv.kernel, conv.dilation, conv.padding, strict=True)]

    def placed(t: Tensor, fill: float) -> Tensor:
        result = t.new_full((*t.shape[:2], *wide), fill)
        target, source = [slice(None)] * 2, [slice(None)] * 2
        for start, step, count, room in zip(starts, conv.stride, out, wide, strict=True):
            first = (
                max(0, -(start // step)) if start < 0 else 0
            )  # positions that fall before the input, under its padding
            last = min(count, (room - 1 - start) // step + 1)
            source.append(slice(first, last))
            target.append(slice(start + first * step, start + (last - 1) * step + 1, step))
        result[tuple(target)] = t[tuple(source)]
        return result

    scale = None if data.scale is None else placed(data.scale, _padding_scale(data.quantizer))
    ones = (1,) * len(out)
    walk = replace(conv, stride=ones, padding=(0,) * len(out))
    return replace(data, elements=placed(data.elements, 0.0), scale=scale), walk


def example_gradients(precision: LayerPrecision, unit: str, plain: WeightGradient, keys: Keys) -> Tensor:
    """Every example's weight gradient, [B, *weight.shape].

    Block formats are quantized along the unfolded positions here: the axis that the unit's chain and its scales run on.

    Args:
        plain: the layer's own operands, not quantized.
    """
    if precision.blocks and plain.reduction == 1:  # a product of two numbers is no sum: nothing is accumulated
        return precision.weight_gradient(plain.x, plain.grad_output, plain.weight, plain.conv, keys).per_example()
    g, x = (_columns(precision, role, plain, keys) for role in (G_WEIGHT, X_WEIGHT))
    result = matmul(
        g.elements.mT,
        x.elements,
        unit,
        g.quantizer.element,
        x.quantizer.element,
        a_scale=None if g.scale is None else g.scale.mT,
        b_scale=x.scale,
        scale_format=_block_scale(g.quantizer),
    )
    result *= (g.factor * x.factor)[:, None, None]
    return result.reshape(plain.batch_size, *plain.weight.shape).to(plain.grad_output.dtype)


def _columns(precision: LayerPrecision, role: int, plain: WeightGradient, keys: Keys) -> _Operand:
    """Units of (example, group), [N, T, features], the chain along T."""
    quantizer = precision.grad_output if role == G_WEIGHT else precision.input
    if precision.blocks:
        rows = plain.matrices()[role == G_WEIGHT]
        rows = (rotate(rows) if precision.hadamard else rows).unflatten(0, (plain.batch_size, plain.groups))
        return _operand(quantizer, rows, keys(quantizer, role, rows), 2, 2, lambda t: t.flatten(0, 1))
    if role == G_WEIGHT:
        data = _data(quantizer, G_INPUT, plain.grad_output, plain.conv, keys)
        return replace(data, elements=data.elements.flatten(2).transpose(1, 2))
    data = _data(quantizer, X_OUTPUT, plain.x, plain.conv, keys)
    columns = data.elements if plain.conv is None else patches(data.elements, replace(plain.conv, groups=1))
    return replace(data, elements=columns.transpose(1, 2))
