"""What a private step does beside the model's own forward pass: every product and every byte, phase by phase.

Counting only: nothing here knows a chip or a low-precision format. The four ways of per-example clipping:

- ``hooks``: every per-example weight gradient is materialised and kept, normed, and summed with its clip factor.
- ``ghost``: norms from Gram matrices [T, T] of activations and output gradients (Goodfellow; Li et al. 2021), then a
  second backward pass of the reweighted loss.
- ``mixed``: as ghost, but a layer's gradients are formed for the norm and dropped unless 2 T^2 < p d (Bu et al. 2022).
- ``bookkeeping``: one backward pass (after Bu et al. 2023): norms the cheaper way, and the clipped sum as one
  batch-reduced product of what the backward pass left behind, or from gradients that were formed and kept where that is
  cheaper: eager, as this project does it, where T^2 (p + d) > 128 p d; fused, where T > 1024.

``framework="eager"`` counts what PyTorch and Opacus really do: a kernel per operation, tensor-core convolutions that
turn channels-first tensors around and back, kernels that index element by element and so take as long for two bytes as
for four, the batch gradient that autograd computes and Opacus throws away, unfolded patches, a fill and a copy of the
per-example gradients, and for ``ghost`` the materialised gradients that Opacus falls back to for convolutions.
``"graphs"`` counts the same; ``"fused"`` what fused kernels need.
"""

from __future__ import annotations

from emulation.formats import get_format
from hwmodels.profile import stored_bytes
from hwmodels.step import CLIPPINGS as CLIPPINGS
from hwmodels.step import GRADIENT_BYTES, OPTIMIZER_STATES, Demand, StepOptions, Tally, operands
from hwmodels.workload import Gemm, LayerWork, Product, Workload

NOISE_FLOPS = 50  # float32 operations of one Gaussian draw: Philox 4x32-10, logarithm, root, sine
# Kernels that compute each element's address take as long as so many float32 operations, whatever its width. Seen on an
# H200 with PyTorch 2.11 (benchmarks/step.py --kernels, ResNet-18, batch 1024), picoseconds per element in tf32, bf16:
# group norm 8.9, 8.3 forward (two passes), 12.6, 12.3 backward (three, and a block per example and channel: 0.37 ns, as
# ResNet-50's many small images show); a padded, strided copy of patches 3.7, 3.3; cuDNN between channels first and
# last 2.2, 1.9; this project's unfolding 2.0.
INDEXED_FLOPS = 250
CHANNEL_FLOPS = 25_000
TURNED_FLOPS = 140
# Kernels beside those that are counted one by one, seen ditto: of a convolution's product (workspaces, split sums), and
# per layer with parameters what Opacus's hooks and this project's bounds on norms launch of small ones.
CONVOLUTION_KERNELS = 1
HOOK_KERNELS = {"hooks": 12, "ghost": 16, "mixed": 16, "bookkeeping": 24}


def demand(workload: Workload, options: StepOptions) -> Demand:
    """Count one step's products, bytes and kernels; quantization passes aside, which depend on format and chip."""
    key = (options, workload.batch_size)
    if key not in workload.memo:
        workload.memo[key] = _counted(workload, options)
    found: Demand = workload.memo[key]
    return found


def _counted(workload: Workload, options: StepOptions) -> Demand:
    tally = Tally(len(workload.layers))
    count, examples = options.passes(workload.batch_size)
    for index, layer in enumerate(workload.layers):
        _model_passes(tally, index, layer, options, examples, count)
        for product in layer.products:
            _product(tally, index, product, options, examples, count)
        if layer.parameters:
            _small_gradients(tally, index, layer, options, examples, count)
            if options.private:
                _clip(tally, index, layer, options, examples, count)
                _noise(tally, index, layer, options)
            _optimizer(tally, index, layer, options)
            if count > 1:
                tally.move(
                    index,
                    "norm_and_clip" if options.private else "weight_gradient",
                    3.0 * GRADIENT_BYTES * layer.parameters * (count - 1),
                    count - 1,
                )
    return tally.finished(operands(workload, options))


def _model_passes(tally: Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int) -> None:
    """The model's own norms, activations, copies and pools, forward and backward."""
    width = stored_bytes(options.baseline)
    second = options.private and options.clipping in ("ghost", "mixed")
    for found in layer.passes:
        scale = width * (examples if found.batched else 1) * count
        forward = found.forward if options.eager else found.fused_forward
        backward = found.backward if options.eager else found.fused_backward
        kernels = found.kernels_forward if options.eager else found.fused_kernels_forward
        back_kernels = found.kernels_backward if options.eager else found.fused_kernels_backward
        flops = back_flops = 0.0
        if options.eager and found.operation == "native_group_norm":
            forward = backward = 0.0
            flops = 2 * INDEXED_FLOPS * examples * count * found.fused_forward / 2
            back_flops = 1.5 * flops + CHANNEL_FLOPS * examples * count * layer.parameters / 2
        tally.move(index, "other", scale * (forward + backward), count * (kernels + back_kernels), flops + back_flops)
        if second:
            tally.move(index, "second_backward", scale * backward, count * back_kernels, back_flops)


def _product(tally: Tally, index: int, product: Product, options: StepOptions, examples: int, count: int) -> None:
    """The model's products, forward and backward, and what private training makes of the weight's gradient."""
    width = stored_bytes(options.baseline)
    activation = 4.0 if width == 4 else 2.0
    second = options.private and options.clipping in ("ghost", "mixed")
    _turn(tally, index, "forward", product, options, examples, count)
    tally.gemm(index, "forward", product.forward(examples), activation, count)
    if product.grad_input:
        for phase in ("grad_input", "second_backward")[: 1 + second]:
            _turn(tally, index, phase, product, options, examples, count)
            tally.gemm(index, phase, product.input_gradient(examples), activation, count)
    if not product.grad_weight:
        return
    whole = product.weight_gradient(examples)
    if not product.weighted:  # the other activation of an attention: its gradient is an input gradient too
        for phase in ("grad_input", "second_backward")[: 1 + second]:
            tally.gemm(index, phase, whole, activation, count)
        return
    if not options.private or options.opacus:  # autograd's own batch gradient, which Opacus throws away
        _turn(tally, index, "weight_gradient", product, options, examples, count)
        tally.gemm(index, "weight_gradient", whole, GRADIENT_BYTES, count)
    if second:
        _turn(tally, index, "second_backward", product, options, examples, count)
        tally.gemm(index, "second_backward", whole, GRADIENT_BYTES, count)
    if options.private:
        _clipped_product(tally, index, product, options, examples, count)


def _turn(
    tally: Tally, index: int, phase: str, product: Product, options: StepOptions, examples: int, count: int
) -> None:
    """What a convolution's product brings: copies of two activations into the tensor cores' layout, or out of it."""
    if not (options.eager and product.convolution):
        return
    tally.move(index, phase, 0.0, CONVOLUTION_KERNELS * count)
    if get_format(options.baseline).name != "float32":
        elements = examples * (product.input_elements + product.output_elements) * count
        tally.move(index, phase, 0.0, 2 * count, TURNED_FLOPS * elements)


def forms_gradients(product: Product, options: StepOptions) -> bool:
    """Whether a layer's per-example weight gradients are materialised, to keep them or for their norms alone."""
    rows, inputs, outputs = product.rows, product.inputs, product.outputs
    if options.clipping == "hooks":
        return True
    if options.clipping == "ghost":
        return options.eager and product.convolution
    if options.clipping == "mixed":
        return 2 * rows**2 >= inputs * outputs
    if options.eager:
        return rows**2 * (inputs + outputs) > 128 * inputs * outputs
    return rows * (inputs + outputs) >= inputs * outputs


def keeps_gradients(product: Product, options: StepOptions) -> bool:
    """Whether materialised per-example gradients are kept until the clip factors are known, and summed with them.

    A fused kernel can square them without writing them; to make them twice, 2 T p d operations, then costs less than to
    write and read 8 p d bytes unless T is above four times a chip's operations per byte, some 250.
    """
    if options.clipping == "bookkeeping" and not options.eager:
        return product.rows > 1024 and forms_gradients(product, options)
    return options.clipping in ("hooks", "bookkeeping") and forms_gradients(product, options)


def _clipped_product(
    tally: Tally, index: int, product: Product, options: StepOptions, examples: int, count: int
) -> None:
    """From one weighted product to norms and, for hooks and book-keeping, to the clipped sum."""
    width = stored_bytes(options.baseline)
    kept = keeps_gradients(product, options)
    if forms_gradients(product, options):
        phase = "weight_gradient" if kept else "norm_and_clip"
        gradients = float(examples * product.weight_elements * options.gradient_bytes) * count
        unfolded = _unfold(tally, index, phase, product, options, examples, count)
        written = kept or options.eager  # else a fused kernel squares and adds in its epilogue
        each = product.example_gradients(examples, unfolded=unfolded)
        tally.gemm(index, phase, each, options.gradient_bytes if written else 0.0, count)
        if options.opacus:  # scales the output's gradient by the batch size, fills a buffer with zeros, copies into it
            scaled = 2 * width * examples * product.output_elements * count
            tally.move(index, phase, 3 * gradients + scaled, 3 * count)
        if written:
            tally.move(index, "norm_and_clip", gradients * (1 + kept), count * (1 + kept))  # read: norms, weighted sum
    else:
        _gram_norms(tally, index, product, options, examples, count)
    if options.clipping == "bookkeeping" and not kept:
        tally.gemm(index, "weight_gradient", product.weight_gradient(examples), GRADIENT_BYTES, count)
        if options.eager:  # the output gradients times their clip factors, written out
            tally.move(index, "norm_and_clip", 2.0 * width * examples * product.output_elements * count, count)


def _unfold(
    tally: Tally, index: int, phase: str, product: Product, options: StepOptions, examples: int, count: int
) -> bool:
    """A convolution's patches written out by an eager framework: by Opacus padded (filled, copied), then gathered."""
    if not options.eager or product.unfolded_elements == product.input_elements:
        return False
    patches = float(examples * product.unfolded_elements * count)
    if options.opacus:
        padded = 4 * stored_bytes(options.baseline) * examples * product.input_elements * count
        tally.move(index, phase, padded, 3 * count, INDEXED_FLOPS * patches)
    else:
        tally.move(index, phase, 0.0, count, TURNED_FLOPS * patches)
    return True


def _gram_norms(tally: Tally, index: int, product: Product, options: StepOptions, examples: int, count: int) -> None:
    """|X^T G|^2 as the sum of (X X^T) * (G G^T) over pairs of positions."""
    width = stored_bytes(options.baseline)
    rows, groups = product.rows, product.groups
    if rows == 1:  # |x|^2 |g|^2, no Gram matrix
        features = product.inputs + product.outputs
        tally.move(index, "norm_and_clip", width * examples * groups * features * count, 2 * count)
        return
    gram_bytes = GRADIENT_BYTES if options.eager else 0.0
    for side in (product.inputs, product.outputs):
        gram = Gemm(m=rows, n=rows, k=side, count=groups * examples)
        tally.gemm(index, "norm_and_clip", gram, gram_bytes, count)
    if options.eager:
        _unfold(tally, index, "norm_and_clip", product, options, examples, count)
        tally.move(index, "norm_and_clip", 4.0 * gram_bytes * examples * groups * rows**2 * count, 2 * count)


def _small_gradients(
    tally: Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int
) -> None:
    """Gradients of biases, norm scales and embedding tables: no products, only traffic."""
    width = stored_bytes(options.baseline)
    small = layer.parameters - sum(p.weight_elements for p in layer.products if p.weighted)
    if small <= 0:
        return
    if layer.kind == "embedding":
        looked_up = float(examples * layer.looked_up)
        table = float(layer.parameters * GRADIENT_BYTES)
        if not options.private:
            tally.move(index, "weight_gradient", (table + width * looked_up) * count, 2 * count)
        elif options.clipping == "hooks":
            tally.move(index, "weight_gradient", (examples * table + 2 * width * looked_up) * count, 2 * count)
            tally.move(index, "norm_and_clip", 2 * examples * table * count, 2 * count)
        else:
            tally.move(index, "norm_and_clip", width * looked_up * count, 2 * count)
            tally.move(index, "weight_gradient", (table + width * looked_up) * count, 2 * count)
        return
    if options.eager and layer.kind == "norm":
        if options.private:  # what was normalised times the output's gradient, and the sums of that and the gradient
            normed = examples * count * sum(p.fused_forward for p in layer.passes) / 2
            tally.move(index, "weight_gradient", 5 * width * normed, 4 * count)
            if options.opacus:  # which scales the output's gradient, and normalises again
                tally.move(index, "weight_gradient", 2 * width * normed, count)
                indexed = any(p.operation == "native_group_norm" for p in layer.passes)
                moved, flops = (0.0, 2 * INDEXED_FLOPS * normed) if indexed else (3 * width * normed, 0.0)
                tally.move(index, "weight_gradient", moved, 2 * count, flops)
    elif options.eager:  # a bias: a pass over the output gradient of its own; a fused backward pass has it at hand
        outputs = sum(p.output_elements for p in layer.products)
        tally.move(index, "weight_gradient", width * examples * outputs * count, count)
    if options.private:
        tally.move(index, "norm_and_clip", 2.0 * options.gradient_bytes * examples * small * count, 2 * count)


def _clip(tally: Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int) -> None:
    """Norms of a layer's parameters brought together and turned into clip factors: small, but kernels."""
    if options.eager:
        kernels = 2 + HOOK_KERNELS[options.clipping]
        tally.move(index, "norm_and_clip", 4.0 * GRADIENT_BYTES * examples * count, kernels * count)


def _noise(tally: Tally, index: int, layer: LayerWork, options: StepOptions) -> None:
    moved = 4.0 * GRADIENT_BYTES * layer.parameters if options.eager else 0.0  # written; read, added, written back
    tally.move(index, "noise", moved, 2 if options.eager else 1, NOISE_FLOPS * layer.parameters)


def _optimizer(tally: Tally, index: int, layer: LayerWork, options: StepOptions) -> None:
    """Gradient, weight and optimizer state read, weight and state written, and the baseline's copy of the weight."""
    width = stored_bytes(options.baseline)
    states = OPTIMIZER_STATES[options.optimizer]
    moved = GRADIENT_BYTES * (3 + 2 * states) + (width if width < GRADIENT_BYTES else 0.0)
    if options.eager and options.private:  # the sum is divided by the expected batch size
        moved += 2 * GRADIENT_BYTES
    tally.move(index, "optimizer_step", moved * layer.parameters, 1 + states if options.eager else 0)
