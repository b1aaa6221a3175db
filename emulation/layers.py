"""Linear and convolution layers whose three GEMMs run on quantized operands, switched per layer at run time."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from emulation import gemms, unit_gemms
from emulation.codec import derive_keys
from emulation.errors import InputError, suggestion
from emulation.formats import Format
from emulation.gemms import WeightGradient
from emulation.precision import PRESETS, WEIGHT_ROLES, LayerPrecision, layer_precision
from emulation.quantizer import Quantizer
from emulation.random_bits import chained_key

__all__ = [
    "PRESETS",
    "LayerGradient",
    "LayerPrecision",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedLayer",
    "QuantizedLinear",
    "RoundingKeys",
    "quantizable_layers",
    "quantize_model",
    "set_plan",
    "set_rounding",
]


class KeyTable:
    """The rounding keys of one batch: of all layers at once, a role at a time, when a stochastic quantizer first asks.

    Args:
        origin: the key of (seed, step), as ``chained_key`` gives it; a 0-d int64 tensor for whoever will change it.
        example_ids: integers [B].
        layers: number of layers.
    """

    def __init__(self, origin: int | Tensor, example_ids: Tensor, layers: int) -> None:
        self.origin, self.example_ids, self.layers = origin, example_ids, layers
        self._rows: dict[int, Tensor] = {}

    def row(self, layer: int, role: int, device: torch.device) -> Tensor:
        """One layer's keys, [B]: ``derive_keys(seed, step, layer, role, example_ids)``."""
        if role not in self._rows:
            layers = torch.arange(self.layers, device=device).unsqueeze(1)
            self._rows[role] = derive_keys(self.origin, layers, role, self.example_ids.to(device))
        return self._rows[role][layer]


@dataclass(frozen=True)
class Draw:
    """Where the random bits of one forward and its backward come from: a seed and step, and the examples' keys.

    Without a table the bits go by position: they are secret.
    """

    seed: int
    step: int = 0
    table: KeyTable | None = None
    by_position: bool = False


class RoundingKeys:
    """Whose random bits stochastic rounding uses: shared by all layers of a model, set by :func:`set_rounding`.

    Without a seed, every forward draws a secret one from the operating system.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.step = 0
        self.table: KeyTable | None = None

    def draw(self) -> Draw:
        """The source of bits for one use of one layer."""
        if self.seed is None:
            return Draw(secrets.randbits(63), by_position=True)
        return Draw(self.seed, self.step, self.table)


def set_rounding(module: nn.Module, *, seed: int | None, step: int = 0, example_ids: Tensor | None = None) -> None:
    """Sets the random bits of stochastic rounding for the next forward and backward of a model.

    Each example's bits are a function of (seed, step, layer, role, example id) alone: the same in any batch, and
    untouched by who else is in it. Bits by batch position would not be: one example more would shift those of all
    that follow it, so a seed needs the examples' ids.

    Args:
        module: a model that :func:`quantize_model` has prepared.
        seed: root of the bits; None: fresh secret bits in every forward.
        step: of training, so that bits differ between steps.
        example_ids: integers [B], each example's identity in the data set, in the order of the batch.
    """
    present = quantizable_layers(module).values()
    table = None
    if seed is not None and example_ids is not None and present:
        table = KeyTable(chained_key(seed, step), example_ids, 1 + max(layer.index for layer in present))
    for layer in present:
        layer.rounding.seed, layer.rounding.step, layer.rounding.table = seed, step, table


class _Keys:
    """Rounding keys of one use of a layer: derived when a stochastic quantizer asks for them."""

    def __init__(self, layer: QuantizedLayer, draw: Draw) -> None:
        self.layer, self.draw = layer, draw

    def __call__(self, quantizer: Quantizer, role: int, tensor: Tensor) -> Tensor | None:
        if quantizer.rounding != "stochastic":
            return None
        draw, count = self.draw, tensor.shape[0]
        if draw.by_position or role in WEIGHT_ROLES:
            ids = torch.arange(count, device=tensor.device)
            return derive_keys(draw.seed, draw.step, self.layer.index, role, ids)
        if draw.table is None:
            raise InputError(
                "stochastic rounding has a seed but no example ids",
                hint="set_rounding(module, seed=..., example_ids=ids of the batch), or seed=None for secret bits",
            )
        if draw.table.example_ids.shape != (count,):
            raise InputError(
                f"example_ids has shape {tuple(draw.table.example_ids.shape)} and the batch has {count} examples",
                hint="call set_rounding with the ids of this very batch",
            )
        return draw.table.row(self.layer.index, role, tensor.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGradient:
    """What one backward through a layer leaves on its tape: enough for every example's gradient of its parameters.

    Attributes:
        layer: the layer.
        weight: the operands of the weight gradient, as they were quantized; every example's gradient [B, *weight.shape]
            itself where a matrix unit accumulated it; None where the weight is frozen.
        bias: every example's bias gradient [B, out], summed over positions from the output gradient before it is
            quantized (no GEMM reads it); None without a trainable bias.
    """

    layer: QuantizedLayer
    weight: WeightGradient | Tensor | None
    bias: Tensor | None


class LayerTape(Protocol):
    """Where a backward leaves its records: a list, or whatever else takes them one by one."""

    def append(self, record: LayerGradient, /) -> None:
        """Takes one record."""


class _ThreeGemms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantizedLayer, draw: Draw) -> Tensor:
        precision = layer.precision if x.shape[0] else None  # an empty batch has nothing to quantize
        conv = gemms.geometry(layer)
        ctx.layer, ctx.draw, ctx.precision, ctx.conv = layer, draw, precision, conv
        ctx.tape = layer.tape if layer.training else None
        ctx.unit = unit = layer.unit if precision is not None else "float32"
        keys = _Keys(layer, draw)
        if precision is None:
            xq, wq = x, weight
        elif unit == "float32":
            xq, wq = precision.output_operands(x, weight, conv, keys)
        # where each GEMM quantizes along its own axis the operands themselves are kept
        own_axes = precision is not None and (precision.blocks or unit != "float32")
        ctx.square = precision is not None and unit == "float32" and precision.weight.square_blocks
        ctx.save_for_backward(x if own_axes else xq, weight if own_axes and not ctx.square else wq, weight)
        if precision is not None and unit != "float32":
            return unit_gemms.output(precision, unit, x, weight, bias, conv, keys)
        return gemms.output(xq, wq, bias, conv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_output,) = grads
        x, operand, weight = (t.detach() for t in ctx.saved_tensors)
        precision, conv, keys = ctx.precision, ctx.conv, _Keys(ctx.layer, ctx.draw)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        plain = WeightGradient(weight=weight, x=x, grad_output=grad_output, conv=conv)
        grad_x: Tensor | None = None
        gradient: WeightGradient | Tensor | None = None
        if precision is not None and ctx.unit != "float32":
            if needs_input:
                grad_x = unit_gemms.grad_input(precision, ctx.unit, grad_output, weight, x, conv, keys)
            if needs_weight:
                gradient = unit_gemms.example_gradients(precision, ctx.unit, plain, keys)
        else:
            own_axes = precision is not None and precision.blocks
            gq = grad_output
            if precision is not None and (needs_input or not own_axes):
                gq = precision.gradient(grad_output, conv, keys)
                if own_axes and not ctx.square:  # square blocks serve both GEMMs
                    operand = precision.grad_input_weight(weight, conv, keys)
            if needs_weight and own_axes:
                gradient = precision.weight_gradient(x, grad_output, weight, conv, keys)
            elif needs_weight:
                gradient = replace(plain, grad_output=gq)
            if needs_input:
                grad_x = gemms.grad_input(gq, operand, x, conv)
        bias = gemms.position_sums(grad_output, conv) if needs_bias else None
        if ctx.tape is not None:
            # private training throws the batch gradient away: it is never computed
            ctx.tape.append(LayerGradient(layer=ctx.layer, weight=gradient, bias=bias))
            return grad_x, None, None, None, None
        grad_w = gradient.sum(0) if isinstance(gradient, Tensor) else None if gradient is None else gradient.total()
        return grad_x, grad_w, None if bias is None else bias.sum(0), None, None


class QuantizedLayer(nn.Module):
    """What the quantized layers have in common.

    Attributes:
        precision: the quantizers in use; None: full precision.
        tape: where backward leaves :class:`LayerGradient` records in place of batch gradients; None outside
            book-keeping private training.
        private: whether examples must stay independent: mixing quantizers are refused.
        replay: the draws of past forwards, for whoever quantizes the same tensors again; None: not kept.
        rounding: the model's rounding keys.
        index: the layer's number, part of its rounding keys.
        preset: what a plan that only names the layer quantizes it to.
        unit: the matrix unit whose accumulation its quantized GEMMs have; ``float32``: torch's own.
    """

    precision: LayerPrecision | None
    tape: LayerTape | None
    private: bool
    replay: list[Draw] | None
    rounding: RoundingKeys
    index: int
    preset: LayerPrecision
    unit: str

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; with ``precision`` None and no tape exactly the stock layer's."""
        records = self.tape is not None and self.training and torch.is_grad_enabled()
        if self.precision is None and not records:
            return super().forward(x)  # type: ignore[no-any-return]
        conv = gemms.geometry(self)
        rank = 2 if conv is None else len(conv.kernel) + 2
        if x.dim() < rank:
            raise InputError(
                f"layer {type(self).__name__} got an input of shape {tuple(x.shape)} without a batch dimension",
                hint="add one: x.unsqueeze(0)",
            )
        draw = self.rounding.draw()
        if self.replay is not None and self.training and torch.is_grad_enabled():
            self.replay.append(draw)
        return _ThreeGemms.apply(gemms.pad_input(self, x), self.weight, self.bias, self, draw)  # type: ignore[no-any-return]

    def example_gradients(self, x: Tensor, grad_output: Tensor, draw: Draw) -> Tensor:
        """Every example's weight gradient from the layer's own input and output gradient, quantized with known bits."""
        plain = WeightGradient(
            weight=self.weight.detach(),  # type: ignore[operator]
            x=gemms.pad_input(self, x),
            grad_output=grad_output,
            conv=gemms.geometry(self),
        )
        precision, keys = self.precision, _Keys(self, draw)
        if precision is None or not len(x):
            return plain.per_example()
        if self.unit != "float32":
            return unit_gemms.example_gradients(precision, self.unit, plain, keys)
        return precision.weight_gradient(plain.x, grad_output, plain.weight, plain.conv, keys).per_example()

    def set_precision(self, precision: LayerPrecision | None) -> None:
        """Switches the layer's quantizers.

        Raises:
            InputError: the layer trains privately and ``precision`` lets examples mix; or its matrix unit has no
                arithmetic for it.
        """
        if self.private and precision is not None and precision.mixes_examples:
            raise InputError(
                f"precision {precision.name!r} mixes examples: its scales are shared over the batch, so that clipping "
                "does not bound what one example changes",
                hint="use granularity 'example', or 'block' inside one example, for input and grad_output",
            )
        if precision is not None and self.unit != "float32":
            unit_gemms.check_unit(precision, self.unit)
        self.precision = precision


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` whose GEMMs can run on quantized operands."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` whose GEMMs can run on quantized operands."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` whose GEMMs can run on quantized operands."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """``nn.Conv3d`` whose GEMMs can run on quantized operands."""


_QUANTIZED: Mapping[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}
_M = TypeVar("_M", bound=nn.Module)


def quantize_model(
    module: nn.Module, preset: str | Format | LayerPrecision = "luq_fp4", *, unit: str = "float32"
) -> nn.Module:
    """Replaces every ``nn.Linear`` and ``nn.Conv1d/2d/3d`` inside ``module`` by its quantized twin, all switched off.

    In place, and idempotent: parameters, hooks and names stay the same objects, so optimizers, checkpoints and state
    dicts keep working. Subclasses of the stock layers and layers inside ``nn.MultiheadAttention`` are left alone.

    Args:
        module: any model.
        preset: what :func:`set_plan` uses for layers that a plan only names.
        unit: matrix unit (``hopper``, ``blackwell``, ...) whose accumulation all quantized GEMMs have, bit for bit and
            slowly; ``float32``: torch's own.

    Returns:
        ``module`` (its twin, where it is itself such a layer).

    Raises:
        InputError: unknown preset, format or unit, or a unit that has no arithmetic for the preset.
    """
    precision = layer_precision(preset)
    if unit != "float32":
        unit_gemms.check_unit(precision, unit)
    twins: dict[nn.Module, QuantizedLayer] = {}
    present = quantizable_layers(module)
    rounding = next(iter(present.values())).rounding if present else RoundingKeys()
    indices = iter(range(len(present), 1 << 30))

    def twin(layer: nn.Module) -> nn.Module:
        if isinstance(layer, QuantizedLayer):
            layer.preset, layer.unit = precision, unit
            return layer
        if type(layer) in _QUANTIZED:
            if layer not in twins:
                twins[layer] = _twin(layer, precision, unit, rounding, next(indices))
            return twins[layer]
        if not isinstance(layer, nn.MultiheadAttention):  # its projections are used as raw weights
            for name, child in layer._modules.items():  # named_children() gives a shared child once only
                if child is not None:
                    layer._modules[name] = twin(child)
        return layer

    return twin(module)


def _twin(layer: nn.Module, preset: LayerPrecision, unit: str, rounding: RoundingKeys, index: int) -> QuantizedLayer:
    cls = _QUANTIZED[type(layer)]
    new = cls.__new__(cls)
    new.__dict__ = layer.__dict__  # the same parameters and hooks, not copies
    new.precision = new.tape = new.replay = None
    new.private, new.rounding, new.index, new.preset, new.unit = False, rounding, index, preset, unit
    return new


def quantizable_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers that a plan can name, by their ``named_modules()`` name, in that order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def set_plan(module: nn.Module, plan: Mapping[str, str | Format | LayerPrecision] | Iterable[str]) -> None:
    """Quantizes the layers that ``plan`` names and switches all others to full precision.

    Args:
        module: a model that :func:`quantize_model` has prepared.
        plan: layer name -> format or preset; or just names, quantized to the preset of :func:`quantize_model`.

    Raises:
        InputError: unknown layer, format or preset, or one that mixes examples in private training. Nothing is changed.
    """
    present = quantizable_layers(module)
    entries = plan if isinstance(plan, Mapping) else dict.fromkeys(plan)
    for name in entries:
        other = dict(module.named_modules()).get(name) if name not in present else None
        if other is not None:
            raise InputError(
                f"layer {name!r} is a {type(other).__name__}, whose products are not quantized",
                hint="Linear and Conv1d, Conv2d, Conv3d can be, of these very types",
            )
        if name not in present:
            raise InputError(f"unknown layer {name!r}", hint=suggestion(name, present))
    chosen = {n: present[n].preset if e is None else layer_precision(e) for n, e in entries.items()}
    before = {name: layer.precision for name, layer in present.items()}
    try:
        for name, layer in present.items():
            layer.set_precision(chosen.get(name))
    except InputError:
        for name, layer in present.items():
            layer.precision = before[name]
        raise
