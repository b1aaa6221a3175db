"""Which quantizer acts on which operand of a layer's three GEMMs, as presets or for any format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from emulation.errors import InputError, suggestion
from emulation.formats import ALIASES, FORMATS, BlockFormat, Format, get_format
from emulation.gemms import ConvGeometry, WeightGradient
from emulation.quantizer import Granularity, Quantizer
from emulation.rotation import Unfolding, positions_alone

# What is quantized, as a number that keys stochastic rounding: the same tensor may be quantized along two axes.
X_OUTPUT, W_OUTPUT, G_INPUT, W_INPUT, X_WEIGHT, G_WEIGHT = range(6)
WEIGHT_ROLES = (W_OUTPUT, W_INPUT)
Keys = Callable[[Quantizer, int, Tensor], Tensor | None]
"""quantizer, role, tensor -> a rounding key per index of the tensor's first dimension; None where none is needed."""

_CACHED = 1 << 18  # elements that a thread's cache holds


@dataclass(frozen=True, kw_only=True)
class LayerPrecision:
    """The quantizers of one layer.

    With scalar formats every tensor is quantized once and serves both GEMMs that read it. With block formats the
    blocks run along the reduction axis of the GEMM: along the input features for ``output``, along the output features
    for ``grad_input``, and along tokens or positions for ``grad_weight``, always inside one example: what is clipped is
    an example's own weight gradient, whose sum runs over that example's tokens or positions alone, so no block ever
    holds two examples. Where that sum has one term only (Linear on [B, features]) the example's gradient is an outer
    product without a reduction axis, and the tensors quantized for the other two GEMMs serve.

    Attributes:
        name: what the plan calls it.
        weight: for the weights; may share scales at will, for weights are public in private training.
        input: for the layer's input.
        grad_output: for the gradient of the layer's output.
        hadamard: rotate both operands of ``grad_weight`` by a 16-wide Hadamard matrix with fixed random signs along
            the reduction axis before they are quantized; the rotation cancels in the product.
    """

    name: str
    weight: Quantizer
    input: Quantizer
    grad_output: Quantizer
    hadamard: bool = False

    @property
    def mixes_examples(self) -> bool:
        """Whether an example's quantized values depend on the other examples of its batch."""
        return self.input.mixes_examples or self.grad_output.mixes_examples

    @property
    def blocks(self) -> bool:
        """Whether scales run along an axis, so that each GEMM has operands of its own."""
        return any(q.block_size is not None for q in (self.weight, self.input, self.grad_output))

    def output_operands(
        self, x: Tensor, weight: Tensor, conv: ConvGeometry | None, keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """(x, weight) as the ``output`` GEMM reads them."""
        xq = _along_features(self.input, X_OUTPUT, x, conv, keys)
        w = by_group(weight, conv) if self.blocks else weight
        wq = self.weight.fake_quantize(w, keys=keys(self.weight, W_OUTPUT, w), axis=2 if self.blocks else 1)
        return xq, wq.reshape(weight.shape)

    def gradient(self, grad_output: Tensor, conv: ConvGeometry | None, keys: Keys) -> Tensor:
        """The output gradient as the ``grad_input`` GEMM reads it."""
        return _along_features(self.grad_output, G_INPUT, grad_output, conv, keys)

    def grad_input_weight(self, weight: Tensor, conv: ConvGeometry | None, keys: Keys) -> Tensor:
        """The weight as the ``grad_input`` GEMM reads it; blocks that are not square run along the output features."""
        role, axis = (W_OUTPUT, 2) if self.weight.square_blocks else (W_INPUT, 1)
        w = by_group(weight, conv)
        return self.weight.fake_quantize(w, keys=keys(self.weight, role, w), axis=axis).reshape(weight.shape)

    def weight_gradient(
        self, x: Tensor, grad_output: Tensor, weight: Tensor, conv: ConvGeometry | None, keys: Keys
    ) -> WeightGradient:
        """The operands of ``grad_weight``; ``x`` and ``grad_output`` are the layer's own, not yet quantized."""
        plain = WeightGradient(weight=weight, x=x, grad_output=grad_output, conv=conv)
        if not self.blocks or plain.reduction == 1:
            xq = _along_features(self.input, X_OUTPUT, x, conv, keys)
            return replace(plain, x=xq, grad_output=self.gradient(grad_output, conv, keys))
        if not self.hadamard:
            xq = _along_tokens(self.input, X_WEIGHT, x, conv, keys)
            return replace(plain, x=xq, grad_output=_along_tokens(self.grad_output, G_WEIGHT, grad_output, conv, keys))
        # the rotation does not commute with a convolution's shifts: it acts on the unfolded operands
        in_weight_order = self.input.rounding == "stochastic"  # random bits go by position
        inputs = Unfolding(x, conv, in_weight_order=in_weight_order)
        outputs = grad_output if conv is None else grad_output.flatten(2)
        gradients = Unfolding(outputs, None if conv is None else positions_alone(conv.groups), in_weight_order=True)
        return replace(
            plain,
            x=_rotated(self.input, X_WEIGHT, inputs, plain.x, keys),
            grad_output=_rotated(self.grad_output, G_WEIGHT, gradients, grad_output, keys),
            rows=True,
            channels_last=inputs.channels_last,
        )


def by_group(weight: Tensor, conv: ConvGeometry | None) -> Tensor:
    """[groups, out / groups, in / groups, *kernel]: blocks never cross from one group to the next."""
    groups = 1 if conv is None else conv.groups
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _along_features(quantizer: Quantizer, role: int, x: Tensor, conv: ConvGeometry | None, keys: Keys) -> Tensor:
    """Quantizes with blocks along the features: the last dimension, or the channels of one group."""
    if conv is None or conv.groups == 1:
        return quantizer.fake_quantize(x, keys=keys(quantizer, role, x), axis=-1 if conv is None else 1)
    grouped = x.reshape(x.shape[0], conv.groups, x.shape[1] // conv.groups, *x.shape[2:])
    return quantizer.fake_quantize(grouped, keys=keys(quantizer, role, grouped), axis=2).reshape(x.shape)


def _along_tokens(quantizer: Quantizer, role: int, x: Tensor, conv: ConvGeometry | None, keys: Keys) -> Tensor:
    """Quantizes with blocks along one example's tokens or positions, in C order."""
    flat = x.flatten(1, -2) if conv is None else x.flatten(2)
    quantized = quantizer.fake_quantize(flat, keys=keys(quantizer, role, flat), axis=1 if conv is None else 2)
    return quantized.reshape(x.shape)


def _rotated(quantizer: Quantizer, role: int, rows: Unfolding, like: Tensor, keys: Keys) -> Tensor:
    """Rotates and quantizes along T: [examples * groups, T, features]."""
    out = like.new_empty(rows.shape)
    key = keys(quantizer, role, out)
    count = len(out)
    if out.device.type == "cpu" and not quantizer.mixes_examples:  # so many at a time as stay in the cache
        count = max(1, _CACHED * torch.get_num_threads() // max(out.shape[1:].numel(), 1))
    for first in range(0, len(out), count):
        part = slice(first, first + count)
        rows.write(out[part], part)
        own = key[part] if key is not None and key.dim() else key
        quantizer.fake_quantize(out[part], keys=own, axis=2, out=out[part])
    return out.flatten(0, 1)


def _recipe(name: str, forward: Format | str, backward: Format | str | None = None) -> LayerPrecision:
    """One format for x and W, one for the gradient.

    4-bit gradients are rounded stochastically, and MX scales are then rounded up so that nothing saturates: their
    rounding is unbiased. (NVFP4's scales are NVIDIA's, which may cut a block's largest element.)
    """
    forward = get_format(forward)
    backward = forward if backward is None else get_format(backward)
    blocked = isinstance(forward, BlockFormat) and forward.block_size is not None
    two_level = isinstance(forward, BlockFormat) and forward.tensor_scale
    unit: Granularity = "block" if blocked else "example"
    stochastic = backward.bits <= 4
    mx = isinstance(backward, BlockFormat) and backward.scale_rule == "floor"
    return LayerPrecision(
        name=name,
        weight=Quantizer(forward, granularity="tensor", square_blocks=two_level),
        input=Quantizer(forward, granularity=unit),
        grad_output=Quantizer(
            backward,
            granularity=unit,
            rounding="stochastic" if stochastic else "nearest_even",
            scale_rule="rceil" if stochastic and mx else None,
        ),
        hadamard=two_level,
    )


PRESETS: Mapping[str, LayerPrecision] = MappingProxyType(
    {
        "luq_fp4": _recipe("luq_fp4", "luq_fp4"),
        "int4_luq": _recipe("int4_luq", "int4", "luq_fp4"),
        "fp8": _recipe("fp8", "float8_e4m3fn", "float8_e5m2"),
        "mxfp8": _recipe("mxfp8", "mxfp8_e4m3"),
        "mxfp4": _recipe("mxfp4", "mxfp4_e2m1"),
        "nvfp4": _recipe("nvfp4", "nvfp4"),
    }
)
"""Recipes by name.

``luq_fp4``: the 4-bit logarithmic grid of LUQ (arXiv 2112.10769) for all three, forward to nearest, gradients
stochastic. ``int4_luq``: as that paper has it, that grid for the gradients alone and uniform int4 forward (scaled by
the largest magnitude, where the paper clips by statistics); no chip multiplies the two, so it is timed as int4.
``fp8``: E4M3 forward, E5M2 gradients (arXiv 2209.05433). ``mxfp8``: E4M3 with MX scales for all three (arXiv
2506.08027). ``mxfp4``: E2M1 with MX scales, gradients stochastic (after arXiv 2502.20586). ``nvfp4``: NVIDIA's training
recipe (arXiv 2509.25149): square weight blocks, stochastic gradients, rotated weight-gradient operands.
"""


def layer_precision(entry: str | Format | LayerPrecision) -> LayerPrecision:
    """The recipe of a plan's entry: a preset's name, or any format (that format for all three operands).

    Raises:
        InputError: no such preset or format.
    """
    if isinstance(entry, LayerPrecision):
        return entry
    if isinstance(entry, str) and entry in PRESETS:
        return PRESETS[entry]
    try:
        fmt = get_format(entry)
    except InputError:
        raise InputError(
            f"unknown format or preset {entry!r}", hint=suggestion(str(entry), [*PRESETS, *FORMATS, *ALIASES])
        ) from None
    return PRESETS[fmt.name] if fmt.name in PRESETS else _recipe(fmt.name, fmt)
