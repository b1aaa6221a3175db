"""Peak memory of a training step: what is held at its fullest moment, a fixed part and a part per example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hwmodels.dpsgd import forms_gradients, keeps_gradients
from hwmodels.profile import stored_bytes
from hwmodels.step import GRADIENT_BYTES, OPTIMIZER_STATES, StepOptions
from hwmodels.workload import LayerWork, Workload


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Peak memory as a line over the examples of one pass.

    Attributes:
        fixed_bytes: whatever the batch: weights, gradients, optimizer state.
        example_bytes: per example of one forward and backward pass.
    """

    fixed_bytes: float
    example_bytes: float

    def at(self, examples: int) -> int:
        """Bytes with so many examples in one pass."""
        return round(self.fixed_bytes + self.example_bytes * examples)

    def most_examples(self, capacity_bytes: float) -> int:
        """The most examples of one pass that fit into a capacity; 0 where none does."""
        return max(0, int((capacity_bytes - self.fixed_bytes) // max(self.example_bytes, 1e-9)))


@dataclass(frozen=True, kw_only=True)
class _Unquantized:
    """A step's footprint with nothing quantized, and what each quantizable layer would change about it."""

    footprint: Footprint
    inputs: Mapping[str, int]  # elements per example that the layer keeps in its format
    outputs: Mapping[str, float]  # elements per example of the output gradients that book-keeping keeps
    alone: tuple[tuple[frozenset[str], int], ...]  # saved tensors that only quantizable layers read


def footprint(workload: Workload, formats: Mapping[str, str], options: StepOptions) -> Footprint:
    """What a step holds at once, allocator's fragmentation and libraries' workspaces aside.

    float32 weights, their baseline copy, the gradient's sum and the optimizer's state; what the forward pass keeps for
    the backward pass (a quantized layer keeps its input's codes instead); and what clipping adds: every per-example
    gradient (``hooks``), every layer's output gradient (``bookkeeping``), and the largest layer's norm at work.

    Args:
        workload: the step.
        formats: layer -> canonical format of the layers that are quantized.
        options: how the step is done.
    """
    key = ("footprint", options)
    if key not in workload.memo:
        workload.memo[key] = _unquantized(workload, options)
    plain: _Unquantized = workload.memo[key]
    width, codes = stored_bytes(options.baseline), {name: stored_bytes(name) for name in set(formats.values())}
    per_example = plain.footprint.example_bytes
    for name, format_name in formats.items():
        code = codes[format_name]
        per_example += plain.inputs[name] * code + plain.outputs[name] * (code - width)
    per_example -= sum(elements for layers, elements in plain.alone if layers <= formats.keys()) * width
    return Footprint(fixed_bytes=plain.footprint.fixed_bytes, example_bytes=per_example)


def peak_memory_bytes(workload: Workload, formats: Mapping[str, str], options: StepOptions) -> int:
    """Bytes held at the step's fullest moment; see ``footprint``."""
    return footprint(workload, formats, options).at(options.passes(workload.batch_size)[1])


def _unquantized(workload: Workload, options: StepOptions) -> _Unquantized:
    width = stored_bytes(options.baseline)
    quantizable = frozenset(workload.quantizable)
    states = OPTIMIZER_STATES[options.optimizer]
    fixed: float = workload.parameters * GRADIENT_BYTES * (2 + states) + workload.frozen_parameters * GRADIENT_BYTES
    if width < GRADIENT_BYTES:
        fixed += (workload.parameters + workload.frozen_parameters) * width
    per_example = width * sum(saved.elements for saved in workload.saved if saved.batched)
    fixed += width * sum(saved.elements for saved in workload.saved if not saved.batched)
    outputs = {layer.name: _kept_outputs(layer, options) for layer in workload.layers}
    if options.private:
        if options.eager:  # the noise of all parameters before it is added
            fixed += workload.parameters * GRADIENT_BYTES
        per_example += max((_norm_workspace(layer, options) for layer in workload.layers), default=0.0)
        per_example += width * sum(outputs.values()) + GRADIENT_BYTES * sum(
            _kept_gradients(layer, options) for layer in workload.layers
        )
    return _Unquantized(
        footprint=Footprint(fixed_bytes=fixed, example_bytes=per_example),
        inputs={name: sum(p.input_elements for p in workload.by_name[name].products) for name in quantizable},
        outputs={name: outputs[name] for name in quantizable},
        alone=tuple(
            (frozenset(saved.layers), saved.elements)
            for saved in workload.saved
            if saved.batched and quantizable.issuperset(saved.layers)
        ),
    )


def _kept_gradients(layer: LayerWork, options: StepOptions) -> int:
    """Elements per example of the weight gradients that are materialised and kept."""
    if options.clipping == "hooks":
        return layer.parameters
    weighted = [p for p in layer.products if p.weighted and p.grad_weight]
    return sum(p.weight_elements for p in weighted if keeps_gradients(p, options))


def _kept_outputs(layer: LayerWork, options: StepOptions) -> float:
    """Elements per example of the output gradients that book-keeping keeps of a layer with parameters."""
    if not (options.private and options.clipping == "bookkeeping" and layer.parameters):
        return 0.0
    weighted = [p for p in layer.products if p.weighted and p.grad_weight]
    elements = float(sum(p.output_elements for p in weighted if not keeps_gradients(p, options)))
    if layer.kind == "norm":
        elements += sum(p.fused_forward for p in layer.passes) / 2
    return elements + layer.looked_up


def _norm_workspace(layer: LayerWork, options: StepOptions) -> float:
    """Bytes per example while one layer's norms are taken; none where a fused kernel adds up squares.

    Unfolded patches count for Opacus only: book-keeping unfolds a few examples at a time.
    """
    if not options.eager:
        return 0.0
    width, largest = stored_bytes(options.baseline), 0.0
    for product in (p for p in layer.products if p.weighted and p.grad_weight):
        opacus = options.clipping != "bookkeeping" and product.unfolded_elements != product.input_elements
        unfolded = product.unfolded_elements if opacus else 0
        if not forms_gradients(product, options):
            elements = 2 * product.rows**2 * product.groups if product.rows > 1 else 0
        elif keeps_gradients(product, options):
            elements = product.weight_elements if options.clipping == "hooks" else 0  # the copy into Opacus's buffer
        else:
            elements = 2 * product.weight_elements  # the gradients, and their copy
        largest = max(largest, elements * GRADIENT_BYTES + unfolded * width)
    return largest
