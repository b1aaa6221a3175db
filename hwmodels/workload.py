"""What one training step of a model computes and moves, layer by layer, independent of format and hardware.

Every quantity is per example, so that one trace serves any batch size. Products are counted as
``torch.utils.flop_counter.FlopCounterMode`` counts them (1 MAC = 2 FLOPs, biases free).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from emulation.errors import InputError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """``count`` independent matrix products [m, k] x [k, n] in one kernel.

    Attributes:
        operand_elements: elements of the first operand that are really distinct; a convolution's implicit GEMM
            reads each input pixel once, not once per tap of the kernel. None: m * k.
        result_elements: likewise of the result (the input gradient of a convolution). None: m * n.
    """

    m: int
    n: int
    k: int
    count: int = 1
    operand_elements: int | None = None
    result_elements: int | None = None

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate, over all products."""
        return 2 * self.m * self.n * self.k * self.count


_OTHER = {"operand": "result", "result": "operand", "": ""}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product of the forward pass, in the terms of per-example gradients.

    A weighted product multiplies ``rows`` activations of ``inputs`` features per example by a weight
    [inputs, outputs], ``groups`` times side by side; convolutions are implicit GEMMs (rows = output positions,
    inputs = channels per group times taps). Without a weight (attention) it multiplies two activations,
    ``groups`` times per example.

    Attributes:
        rows: output positions T of one example.
        inputs: features d summed over, per group.
        outputs: features p produced, per group.
        groups: groups of a convolution, heads of an attention.
        input_elements: distinct input elements of one example, all groups.
        weighted: one operand is a parameter.
        grad_input: the backward pass needs the gradient of the (first) activation.
        grad_weight: it needs that of the weight, or of the second activation.
        batched: runs once per example; False for a product of parameters alone.
        convolution: an implicit GEMM.
        on_chip: the ``operand`` or ``result`` that never reaches memory: an attention kernel's scores.
    """

    rows: int
    inputs: int
    outputs: int
    groups: int = 1
    input_elements: int
    weighted: bool
    grad_input: bool
    grad_weight: bool
    batched: bool = True
    convolution: bool = False
    on_chip: Literal["", "operand", "result"] = ""

    @property
    def weight_elements(self) -> int:
        """Elements of the weight operand (of one example's second operand where there is no weight)."""
        return self.inputs * self.outputs * self.groups

    @property
    def unfolded_elements(self) -> int:
        """Elements of one example's first operand as a matrix: a convolution's patches, written out."""
        return self.rows * self.inputs * self.groups

    @property
    def output_elements(self) -> int:
        """Elements of one example's output."""
        return self.rows * self.outputs * self.groups

    def forward(self, batch_size: int) -> Gemm:
        """The forward GEMM of a batch."""
        scale = batch_size if self.batched else 1
        if not self.weighted:
            return self._attention(self.rows, self.outputs, self.inputs, scale, self.on_chip)
        return Gemm(
            m=scale * self.rows,
            n=self.outputs,
            k=self.inputs,
            count=self.groups,
            operand_elements=scale * self.input_elements,
        )

    def input_gradient(self, batch_size: int) -> Gemm:
        """The GEMM of the input's gradient: the output's gradient times the weight, transposed."""
        scale = batch_size if self.batched else 1
        if not self.weighted:
            return self._attention(self.rows, self.inputs, self.outputs, scale, _OTHER[self.on_chip])
        return Gemm(
            m=scale * self.rows,
            n=self.inputs,
            k=self.outputs,
            count=self.groups,
            result_elements=scale * self.input_elements,
        )

    def weight_gradient(self, batch_size: int) -> Gemm:
        """The one GEMM of the weight's gradient over the whole batch: it sums over examples and positions."""
        scale = batch_size if self.batched else 1
        if not self.weighted:  # transposed where the scores' gradient is the second operand
            m, n = (self.outputs, self.inputs) if self.on_chip == "result" else (self.inputs, self.outputs)
            return self._attention(m, n, self.rows, scale, "operand" if self.on_chip else "")
        return Gemm(
            m=self.inputs,
            n=self.outputs,
            k=scale * self.rows,
            count=self.groups,
            operand_elements=scale * self.input_elements,
        )

    def _attention(self, m: int, n: int, k: int, scale: int, on_chip: str) -> Gemm:
        return Gemm(
            m=m,
            n=n,
            k=k,
            count=self.groups * scale,
            operand_elements=0 if on_chip == "operand" else None,
            result_elements=0 if on_chip == "result" else None,
        )

    def example_gradients(self, batch_size: int, *, unfolded: bool = False) -> Gemm:
        """The batched GEMM of one weight gradient per example, materialised, of the input or its unfolded patches."""
        return Gemm(
            m=self.inputs,
            n=self.outputs,
            k=self.rows,
            count=self.groups * batch_size,
            operand_elements=None if unfolded else batch_size * self.input_elements,
        )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """An operation that is bound by memory: elements read plus written, and the kernels it takes.

    Eager: a kernel of its own reads and writes everything. Fused: the operation rides on its neighbours' kernels
    where it can (pointwise operations on whatever produced their first operand).

    Attributes:
        operation: the operator's name.
        forward, backward: elements of one example moved by an eager framework.
        fused_forward, fused_backward: the same where kernels are fused.
        kernels_forward, kernels_backward: kernels launched by an eager framework.
        fused_kernels_forward, fused_kernels_backward: by a fused one.
        batched: the elements are per example; False: they do not grow with the batch.
    """

    operation: str
    forward: float
    backward: float = 0.0
    fused_forward: float = 0.0
    fused_backward: float = 0.0
    kernels_forward: int = 1
    kernels_backward: int = 0
    fused_kernels_forward: int = 0
    fused_kernels_backward: int = 0
    batched: bool = True


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """Everything one module computes itself, its children aside.

    Attributes:
        name: its name in ``named_modules()``; ``(model)`` for the model's own forward, ``(loss)`` for the loss.
        kind: linear, conv, attention, norm, embedding, or other.
        quantizable: a Linear or Conv whose three GEMMs can run in a low-precision format.
        products: its matrix products.
        passes: its other operations.
        parameters: trainable elements it owns.
        looked_up: elements an embedding gathers per example (0 elsewhere).
        calls: how often the forward pass runs it.
    """

    name: str
    kind: str
    quantizable: bool = False
    products: tuple[Product, ...] = ()
    passes: tuple[Pass, ...] = ()
    parameters: int = 0
    looked_up: int = 0
    calls: int = 1


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor kept from the forward pass for the backward pass.

    Attributes:
        elements: its elements, per example where ``batched``.
        layers: the layers whose backward pass reads it.
        batched: grows with the batch.
    """

    elements: int
    layers: tuple[str, ...]
    batched: bool = True


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of a model on a batch.

    Attributes:
        layers: in the order the forward pass first runs them.
        batch_size: examples of one step.
        saved: what the forward pass keeps for the backward pass.
        calls: every call of a module in the forward pass, in the order they begin: its name, and the number of the
            first call that begins after it has ended. Empty: one call of each layer, one after the other.
        parameters: trainable elements.
        frozen_parameters: elements that are not trained.
        uncounted: what the trace met and could only guess or leave out, in words.
        memo: what was counted of it before, so that chips, formats and batch sizes share the counting.
    """

    layers: tuple[LayerWork, ...]
    batch_size: int
    saved: tuple[SavedTensor, ...] = ()
    calls: tuple[tuple[str, int], ...] = ()
    parameters: int
    frozen_parameters: int = 0
    uncounted: tuple[str, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    @cached_property
    def by_name(self) -> dict[str, LayerWork]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def quantizable(self) -> tuple[str, ...]:
        """Names of the layers that a plan may name, in forward order."""
        return tuple(layer.name for layer in self.layers if layer.quantizable)

    def at(self, batch_size: int) -> Workload:
        """The same step on another number of examples; what was counted before is shared."""
        check_batch_size(batch_size)
        other = copy.copy(self)
        object.__setattr__(other, "batch_size", batch_size)
        return other

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass's matrix products."""
        return sum(p.forward(self.batch_size).flops for layer in self.layers for p in layer.products)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the plain backward pass's matrix products: input and weight gradients of the whole batch."""
        total = 0
        for product in (p for layer in self.layers for p in layer.products):
            total += product.input_gradient(self.batch_size).flops if product.grad_input else 0
            total += product.weight_gradient(self.batch_size).flops if product.grad_weight else 0
        return total


def check_batch_size(batch_size: int) -> None:
    """Raise InputError unless ``batch_size`` is a whole number from 1 to 2**31."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 2**31:
        raise InputError(f"batch_size={batch_size} must be a whole number of at least 1", hint="such as 256")


def trace(module: nn.Module, example_input: Any, batch_size: int) -> Workload:
    """Find what a training step of a model computes, from shapes alone.

    The forward pass runs on meta tensors in training mode: nothing is computed and no memory is taken, the module's
    parameters, buffers and mode are left as they are. The backward pass follows from it.

    Args:
        module: any model; quantizable are its ``nn.Linear`` and ``nn.Conv1d/2d/3d``.
        example_input: a tensor, or a tuple of tensors, batch first; only shape behind the batch and dtype matter.
        batch_size: examples of one step.

    Raises:
        InputError: the model's forward needs values, not only shapes: the message names the call that failed.
    """
    from hwmodels.tracing import trace_module  # torch loads here, not with the data types

    check_batch_size(batch_size)
    return trace_module(module, example_input, batch_size)
