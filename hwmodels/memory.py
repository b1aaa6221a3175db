"""Peak memory of a training step: what is held at its fullest moment, a fixed part and a part per example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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
    parts: Mapping[str, Footprint]
    inputs: Mapping[str, int]  # elements per example that the layer keeps in its format
    outputs: Mapping[str, float]  # elements per example of the output gradients that book-keeping keeps
    alone: tuple[tuple[frozenset[str], int], ...]  # saved tensors that only quantizable layers read

    @cached_property
    def whole(self) -> tuple[int, float, int]:
        """The sums of all three."""
        return sum(self.inputs.values()), sum(self.outputs.values()), sum(elements for _, elements in self.alone)


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
    plain = _plain(workload, options)
    width, codes = stored_bytes(options.baseline), {name: stored_bytes(name) for name in set(formats.values())}
    per_example = plain.footprint.example_bytes
    if len(codes) == 1 and len(formats) == len(plain.inputs):  # the plan asked for most: every layer, one format
        (code,) = codes.values()
        inputs, outputs, alone = plain.whole
        per_example += inputs * code + outputs * (code - width) - alone * width
        return Footprint(fixed_bytes=plain.footprint.fixed_bytes, example_bytes=per_example)
    for name, format_name in formats.items():
        code = codes[format_name]
        per_example += plain.inputs[name] * code + plain.outputs[name] * (code - width)
    per_example -= sum(elements for layers, elements in plain.alone if layers <= formats.keys()) * width
    return Footprint(fixed_bytes=plain.footprint.fixed_bytes, example_bytes=per_example)


def memory_parts(workload: Workload, formats: Mapping[str, str], options: StepOptions) -> dict[str, float]:
    """What the step's fullest moment consists of, in bytes; the parts add up to ``peak_memory_bytes`` (but rounding).

    ``weights`` (with their copy in the baseline format), ``gradients`` (their sum), ``optimizer``, ``noise``,
    ``activations`` (kept in the baseline format for the backward pass), ``quantized_inputs`` (kept as codes instead),
    ``output_gradients`` (kept by book-keeping), ``example_gradients`` (a weight gradient per example), ``norms`` (the
    largest layer's norms at work).
    """
    plain = _plain(workload, options)
    examples = options.passes(workload.batch_size)[1]
    width, codes = stored_bytes(options.baseline), {name: stored_bytes(name) for name in set(formats.values())}
    parts = {name: part.fixed_bytes + part.example_bytes * examples for name, part in plain.parts.items()}
    parts["quantized_inputs"] = examples * sum(plain.inputs[n] * codes[f] for n, f in formats.items())
    parts["output_gradients"] += examples * sum(plain.outputs[n] * (codes[f] - width) for n, f in formats.items())
    parts["activations"] -= examples * width * sum(n for layers, n in plain.alone if layers <= formats.keys())
    return parts


def peak_memory_bytes(workload: Workload, formats: Mapping[str, str], options: StepOptions) -> int:
    """Bytes held at the step's fullest moment; see ``footprint``."""
    return footprint(workload, formats, options).at(options.passes(workload.batch_size)[1])


def _plain(workload: Workload, options: StepOptions) -> _Unquantized:
    key = ("footprint", options)
    if key not in workload.memo:
        workload.memo[key] = _unquantized(workload, options)
    found: _Unquantized = workload.memo[key]
    return found


def _unquantized(workload: Workload, options: StepOptions) -> _Unquantized:
    width = stored_bytes(options.baseline)
    quantizable = frozenset(workload.quantizable)
    weight_bytes = GRADIENT_BYTES + (width if width < GRADIENT_BYTES else 0)
    gradient_bytes = workload.parameters * GRADIENT_BYTES
    outputs = {layer.name: _kept_outputs(layer, options) for layer in workload.layers}
    kept = norms = 0.0
    if options.private:
        kept = options.gradient_bytes * sum(_kept_gradients(layer, options) for layer in workload.layers)
        norms = max((_norm_workspace(layer, options) for layer in workload.layers), default=0.0)
    amounts = {  # fixed, per example
        "weights": ((workload.parameters + workload.frozen_parameters) * weight_bytes, 0.0),
        "gradients": (gradient_bytes, 0.0),
        "optimizer": (gradient_bytes * OPTIMIZER_STATES[options.optimizer], 0.0),
        "noise": (gradient_bytes * (options.private and options.eager), 0.0),  # of all parameters before it is added
        "activations": (
            width * sum(saved.elements for saved in workload.saved if not saved.batched),
            width * sum(saved.elements for saved in workload.saved if saved.batched),
        ),
        "output_gradients": (0.0, width * sum(outputs.values())),
        "example_gradients": (0.0, kept),
        "norms": (0.0, norms),
    }
    parts = {name: Footprint(fixed_bytes=fixed, example_bytes=each) for name, (fixed, each) in amounts.items()}
    return _Unquantized(
        footprint=Footprint(
            fixed_bytes=sum(part.fixed_bytes for part in parts.values()),
            example_bytes=sum(part.example_bytes for part in parts.values()),
        ),
        parts=parts,
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

    Unfolded patches count for Opacus only: book-keeping unfolds a few examples at a time. Nor does it count for hooks,
    whose fullest moment is the end of the backward pass: every gradient is there, and the layer at work is small.
    """
    if not options.eager or options.clipping == "hooks":
        return 0.0
    width, largest = stored_bytes(options.baseline), 0.0
    for product in (p for p in layer.products if p.weighted and p.grad_weight):
        opacus = options.clipping != "bookkeeping" and product.unfolded_elements != product.input_elements
        unfolded = product.unfolded_elements if opacus else 0
        if not forms_gradients(product, options):
            elements = 2 * product.rows**2 * product.groups if product.rows > 1 else 0
        elif keeps_gradients(product, options):
            elements = 0
        else:
            elements = 2 * product.weight_elements  # the gradients, and their copy
        largest = max(largest, elements * options.gradient_bytes + unfolded * width)
    return largest
