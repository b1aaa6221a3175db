"""What one backward pass leaves behind for clipping, and which modules can leave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler, register_norm_sampler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpquant.gradients import Contribution, DenseGradient, EmbeddingGradient, GemmGradient, combined
from emulation import gemms
from emulation.errors import InputError
from emulation.gemms import WeightGradient
from emulation.layers import (
    LayerGradient,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedLayer,
    QuantizedLinear,
)
from emulation.norms import row_sums

_QUANTIZED = [QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d]
_GEMM_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Tape:
    """The per-example gradients of one backward, layer by layer, until the optimizer takes them.

    Attributes:
        contributions: what the layers left.
        clipped: in their place the clipped sums of all the optimizer's parameters in a row, where a step has them
            already; read at once, for the next step writes there.
        batch_size: examples in the last forward of the whole module; None before one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.contributions: list[Contribution] = []
        self.clipped: Tensor | None = None
        self.batch_size: int | None = None
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._handles: list[RemovableHandle] = []
        self._recording: list[QuantizedLayer] = []

    def append(self, record: LayerGradient) -> None:
        """Takes what a quantized layer's backward leaves, at once in the form that it will be needed in."""
        layer = record.layer
        if isinstance(record.weight, Tensor):
            self.contributions.append(DenseGradient(parameter=layer.weight, values=record.weight))  # type: ignore[arg-type]
        elif record.weight is not None:
            gradient = GemmGradient(parameter=layer.weight, operands=record.weight)  # type: ignore[arg-type]
            self.contributions.append(gradient.cheapest())
        if record.bias is not None:
            self.contributions.append(DenseGradient(parameter=layer.bias, values=record.bias))  # type: ignore[arg-type]

    def combined(self) -> list[Contribution]:
        """One contribution per parameter.

        Raises:
            InputError: a layer saw another number of examples than the module: its first dimension is not the batch.
        """
        found = self.contributions
        if not found:
            if self.batch_size:
                raise InputError(
                    f"a forward of {self.batch_size} examples left no gradients",
                    hint="call loss.backward() before step",
                )
            return []
        size = found[0].batch_size if self.batch_size is None else self.batch_size
        for contribution in found:
            if contribution.batch_size != size:
                name = self._names.get(id(contribution.parameter), "?")
                raise InputError(
                    f"parameter {name!r} saw {contribution.batch_size} examples in a batch of {size}",
                    hint="the first dimension of every layer's input must be the batch (batch_first=True, no folding)",
                )
        self.contributions = combined(found) if size else []  # kept: norms and sums read the same gradients
        return list(self.contributions)

    def clear(self) -> None:
        """Forgets the backward."""
        self.contributions = []
        self.clipped = None
        self.batch_size = None

    def close(self) -> None:
        """Takes every layer off the tape."""
        for handle in self._handles:
            handle.remove()
        for layer in self._recording:
            layer.tape = None
        self._handles.clear()
        self._recording.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.contributions or self.clipped is not None:
            raise InputError(
                "a second forward and backward before optimizer.step()",
                hint="step (and zero_grad) after every backward; larger batches: BatchMemoryManager",
            )
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        self.batch_size = None if first is None else len(first)

    def _capture(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if layer.training and torch.is_grad_enabled() and output.requires_grad:
            inputs = [a.detach() if isinstance(a, Tensor) else a for a in args]
            moments = _moments(layer, output)
            output.register_hook(lambda grad: self.contributions.extend(_leaf_gradients(layer, inputs, grad, moments)))


def attach(module: nn.Module) -> Tape:
    """Puts every trainable layer of ``module`` on one tape, also found at ``module.private_tape``.

    Quantized layers record their operands in their own backward; other layers get a forward hook and a hook on their
    output's gradient.
    """
    earlier = getattr(module, "private_tape", None)
    if earlier is not None:
        earlier.close()
    tape = Tape(module)
    tape._handles.append(module.register_forward_pre_hook(tape._begin, with_kwargs=True))
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer):
            layer.tape = tape
            tape._recording.append(layer)
        elif _own_parameters(layer):
            tape._handles.append(layer.register_forward_hook(tape._capture))
    module.private_tape = tape  # type: ignore[assignment]
    return tape


def _own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def _moments(layer: nn.Module, output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / deviation [B, groups] that a GroupNorm's forward has left for its backward, if it can be seen."""
    if type(layer) is not nn.GroupNorm or output.dtype != torch.float32:
        return None
    mean, deviation = (getattr(output.grad_fn, name, None) for name in ("_saved_result1", "_saved_result2"))
    if mean is None or deviation is None:
        return None
    return mean.detach(), deviation.detach()  # as they come they hold the node, which holds the hook that holds them


def _group_norm_gradients(
    layer: nn.GroupNorm, x: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """As autograd has them, by example: from sums of grad and of grad * x, nothing normalised again."""
    sums, products = row_sums(x.unsqueeze(-1).flatten(2), grad.unsqueeze(-1).flatten(2))
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        mean, deviation = (m.unsqueeze(2) for m in moments)
        centred = products.unflatten(1, (layer.num_groups, -1)) - mean * sums.unflatten(1, (layer.num_groups, -1))
        found[layer.weight] = (centred * deviation).flatten(1)
    if layer.bias.requires_grad:
        found[layer.bias] = sums
    return found


def _leaf_gradients(
    layer: nn.Module, inputs: list[Any], grad: Tensor, moments: tuple[Tensor, Tensor] | None = None
) -> list[Contribution]:
    if type(layer) in _GEMM_LAYERS:
        conv = gemms.geometry(layer)
        found: list[Contribution] = []
        if layer.weight.requires_grad:
            x = gemms.pad_input(layer, inputs[0])
            operands = WeightGradient(weight=layer.weight, x=x, grad_output=grad, conv=conv)  # type: ignore[arg-type]
            found.append(GemmGradient(parameter=layer.weight, operands=operands).cheapest())  # type: ignore[arg-type]
        if layer.bias is not None and layer.bias.requires_grad:
            sums = gemms.position_sums(grad, conv)
            found.append(DenseGradient(parameter=layer.bias, values=sums))  # type: ignore[arg-type]
        return found
    if type(layer) is nn.Embedding:
        tokens = inputs[0].reshape(len(inputs[0]), -1)
        rows = grad.reshape(*tokens.shape, grad.shape[-1])
        if layer.padding_idx is not None:
            rows = rows.masked_fill((tokens == layer.padding_idx).unsqueeze(-1), 0.0)
        return [EmbeddingGradient(parameter=layer.weight, tokens=tokens, grad_output=rows)]  # type: ignore[arg-type]
    if not len(grad):
        return []
    if moments is not None and isinstance(layer, nn.GroupNorm):
        samples = _group_norm_gradients(layer, inputs[0], grad, moments)
    else:
        samples = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, inputs, grad)
    return [DenseGradient(parameter=p, values=values) for p, values in samples.items()]


# ------------------------------------------------------------------------------------------------------------- refusals


def check_private(module: nn.Module) -> None:
    """Refuses a module whose examples are not independent, or whose per-example gradients are not known.

    Raises:
        InputError: with the layer's name and the reason.
    """
    for name, layer in module.named_modules():
        reason = _refusal(layer)
        if reason is not None:
            what, hint = reason
            raise InputError(f"layer {name or type(layer).__name__!r} ({type(layer).__name__}) {what}", hint=hint)


def _refusal(layer: nn.Module) -> tuple[str, str] | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return (
            "mixes examples: it normalises over the batch",
            "use GroupNorm; opacus.validators.ModuleValidator.fix(module) replaces it",
        )
    if isinstance(layer, _NORMS) and getattr(layer, "track_running_stats", False):
        return "keeps running statistics of private batches without noise", "use track_running_stats=False"
    if isinstance(layer, QuantizedLayer):
        if layer.precision is not None and layer.precision.mixes_examples:
            return (
                f"has precision {layer.precision.name!r}, which mixes examples: its scales are shared over the batch",
                "use granularity 'example', or 'block' inside one example",
            )
        return None
    if not _own_parameters(layer):
        return None
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "computes with raw weights, without per-example gradients",
            "opacus.validators.ModuleValidator.fix(module) makes it a DPMultiheadAttention; use batch_first=True",
        )
    if isinstance(layer, nn.RNNBase):
        return "has no per-example gradients", "use DPLSTM, DPGRU or DPRNN of opacus.layers"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "has no per-example gradients", "use interpolation followed by a convolution"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        return "mixes examples through max_norm or scale_grad_by_freq, or is sparse", "use none of the three"
    if type(layer) in _GEMM_LAYERS or type(layer) is nn.Embedding:
        return None
    if type(layer) not in GradSampleModule.GRAD_SAMPLERS:
        return (
            "has trainable parameters of its own and no known per-example gradient",
            "freeze them, or register a sampler with opacus.grad_sample.register_grad_sampler",
        )
    return None


# ------------------------------------------------------------------------------------------------------- Opacus's hooks


# Opacus looks samplers up by exact type: a subclass without one would silently go to functorch, with a stale copy of
# the layer.
@register_grad_sampler(_QUANTIZED)
def _grad_samples(layer: QuantizedLayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    draw = layer.replay.pop() if layer.replay else layer.rounding.draw()
    samples: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        samples[layer.weight] = layer.example_gradients(activations[0], backprops, draw)  # type: ignore[index]
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = gemms.position_sums(backprops, gemms.geometry(layer))  # type: ignore[index]
    return samples


@register_norm_sampler(_QUANTIZED)
def _no_ghost(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    raise InputError(
        f"ghost clipping cannot be used with {type(layer).__name__}: its second backward quantizes c * g, which is not "
        "c * Q(g), and contributions exceed the clipping norm",
        hint="use clipping='bookkeeping'",
    )
