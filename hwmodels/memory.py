"""Peak memory of a training step: what is held at its fullest moment."""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels.dpsgd import GRADIENT_BYTES, OPTIMIZER_STATES, StepOptions, norm_is_ghost
from hwmodels.profile import stored_bytes
from hwmodels.workload import LayerWork, Workload


def peak_memory_bytes(workload: Workload, formats: Mapping[str, str], options: StepOptions) -> int:
    """Bytes held at once, allocator's fragmentation and libraries' workspaces aside.

    float32 weights, their baseline copy, the gradient's sum and the optimizer's state; what the forward pass keeps for
    the backward pass (a quantized layer keeps its input's codes instead); and what clipping adds: every per-example
    gradient (``hooks``), every layer's output gradient (``bookkeeping``), and the largest layer's norm at work.

    Args:
        workload: the step.
        formats: layer -> canonical format of the layers that are quantized.
        options: how the step is done.
    """
    width = stored_bytes(options.baseline)
    _, examples = options.passes(workload.batch_size)
    trained = workload.parameters * GRADIENT_BYTES * (2 + OPTIMIZER_STATES[options.optimizer])
    fixed: float = trained + workload.frozen_parameters * GRADIENT_BYTES
    if width < GRADIENT_BYTES:
        fixed += (workload.parameters + workload.frozen_parameters) * width
    kept = _kept(workload, formats, width, examples)
    if options.private:
        if options.eager:  # the noise of all parameters before it is added
            fixed += workload.parameters * GRADIENT_BYTES
        kept += max((_norm_workspace(layer, options, examples) for layer in workload.layers), default=0.0)
        if options.clipping == "hooks":
            kept += examples * workload.parameters * GRADIENT_BYTES
        elif options.clipping == "bookkeeping":
            kept += sum(_output_gradient(layer, formats, width) for layer in workload.layers) * examples
    return round(fixed + kept)


def _kept(workload: Workload, formats: Mapping[str, str], width: float, examples: int) -> float:
    """What the forward pass leaves for the backward pass."""
    kept = 0.0
    for saved in workload.saved:
        scale = examples if saved.batched else 1
        if not all(layer in formats for layer in saved.layers):
            kept += saved.elements * scale * width
    for name, format_name in formats.items():
        code = stored_bytes(format_name)
        kept += sum(p.input_elements for p in workload.by_name[name].products) * examples * code
    return kept


def _output_gradient(layer: LayerWork, formats: Mapping[str, str], width: float) -> float:
    """Bytes per example of the output gradients that book-keeping keeps of a layer with parameters."""
    if not layer.parameters:
        return 0.0
    code = stored_bytes(formats[layer.name]) if layer.name in formats else width
    elements = float(sum(p.output_elements for p in layer.products if p.weighted))
    if layer.kind == "norm":
        elements += sum(p.fused_forward for p in layer.passes) / 2
    return (elements + layer.looked_up) * code


def _norm_workspace(layer: LayerWork, options: StepOptions, examples: int) -> float:
    """Bytes at work while one layer's per-example norms are taken; nothing where a fused kernel adds up squares."""
    if not options.eager or options.clipping == "hooks":
        return 0.0
    largest = 0.0
    for product in (p for p in layer.products if p.weighted and p.grad_weight):
        if norm_is_ghost(product, options.clipping):
            elements = 2 * product.rows**2 * product.groups if product.rows > 1 else 0
        else:
            elements = product.weight_elements
        largest = max(largest, float(elements * examples * GRADIENT_BYTES))
    return largest
