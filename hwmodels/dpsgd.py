"""What a private step does beside the model's own forward pass: every product and every byte, phase by phase.

Counting only: nothing here knows a chip or a low-precision format. The four ways of per-example clipping:

- ``hooks``: every per-example weight gradient is materialised and kept, normed, and summed with its clip factor.
- ``ghost``: norms from Gram matrices [T, T] of activations and output gradients (Goodfellow; Li et al. 2021), then a
  second backward pass of the reweighted loss.
- ``mixed``: as ghost, but a layer's norm is taken the cheaper way, 2 T^2 against p d (Bu et al. 2022).
- ``bookkeeping``: norms as in mixed; the clipped sum is one batch-reduced product of what the one backward pass left
  behind (Bu et al. 2023).

``framework="eager"`` counts what Opacus on eager PyTorch really does (a kernel per operation, the batch gradient that
autograd computes and Opacus throws away, a fill and a copy of the per-example gradients); ``"fused"`` counts what fused
kernels need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emulation.errors import InputError, suggestion
from hwmodels.gemm_arrays import Array, Products
from hwmodels.profile import stored_bytes
from hwmodels.workload import Gemm, LayerWork, Product, Workload

PHASES = (
    "forward",
    "grad_input",
    "weight_gradient",
    "norm_and_clip",
    "second_backward",
    "noise",
    "optimizer_step",
    "quantization",
    "other",
    "launch",
)
PHASE = {name: index for index, name in enumerate(PHASES)}
METHODS = ("dp-sgd", "sgd")
CLIPPINGS = ("bookkeeping", "hooks", "ghost", "mixed")
FRAMEWORKS = ("fused", "eager")
OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adam": 2}

NOISE_FLOPS = 50  # float32 operations of one Gaussian draw: Philox 4x32-10, logarithm, root, sine
GRADIENT_BYTES = 4  # per-example gradients, their sum and the noise are float32


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is done.

    Args:
        method: ``dp-sgd`` or plain ``sgd``.
        clipping: ``bookkeeping``, ``hooks``, ``ghost`` or ``mixed``; of no effect for ``sgd``.
        baseline: the format of everything that is not quantized.
        framework: ``fused`` or ``eager``.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        physical_batch_size: most examples of one pass; a larger batch is accumulated. None: all in one.

    Raises:
        InputError: an unknown name or a size below 1.
    """

    method: Literal["dp-sgd", "sgd"] = "dp-sgd"
    clipping: Literal["bookkeeping", "hooks", "ghost", "mixed"] = "bookkeeping"
    baseline: str = "bfloat16"
    framework: Literal["fused", "eager"] = "fused"
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    physical_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("clipping", CLIPPINGS),
            ("framework", FRAMEWORKS),
            ("optimizer", tuple(OPTIMIZER_STATES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"unknown {name}={value!r}", hint=suggestion(str(value), allowed))
        if self.physical_batch_size is not None and self.physical_batch_size < 1:
            raise InputError(f"physical_batch_size={self.physical_batch_size} must be at least 1")
        stored_bytes(self.baseline)

    @property
    def private(self) -> bool:
        """Whether gradients are clipped per example."""
        return self.method == "dp-sgd"

    @property
    def eager(self) -> bool:
        """Whether every operation is a kernel of its own."""
        return self.framework == "eager"

    def passes(self, batch_size: int) -> tuple[int, int]:
        """How many forward and backward passes a batch takes, and the examples of each."""
        count = 1 if self.physical_batch_size is None else -(-batch_size // self.physical_batch_size)
        return count, -(-batch_size // count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Demand:
    """All the work of one step.

    The products are sorted by ``cell`` = phase * layers + layer; a cell holds those of one layer in one phase.

    Attributes:
        products: the distinct matrix products.
        product: [rows] which of them each row runs.
        repeats: [rows] how often the step runs it.
        cells: [cells] the cells that hold products, rising.
        starts: [cells] the first row of each.
        rows_layer: [rows] index of the layer.
        bytes: [phases, layers] moved by everything else.
        vector_flops: [phases, layers] float32 operations outside the matrix unit, where they may matter.
        kernels: [phases, layers] launched by everything else.
        operands: what quantizing a layer has to turn into a format.
    """

    products: Products
    product: NDArray[np.intp]
    repeats: Array
    cells: NDArray[np.intp]
    starts: NDArray[np.intp]
    rows_layer: NDArray[np.intp]
    bytes: Array
    vector_flops: Array
    kernels: Array
    operands: Operands

    def gathered(self, values: Array) -> Array:
        """Values per row, summed per phase and layer: [phases, layers]."""
        total = np.zeros(self.bytes.size)
        if len(self.starts):
            total[self.cells] = np.add.reduceat(values, self.starts)
        return total.reshape(self.bytes.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """The operands of each quantizable layer's three products; a tensor may be read by two of them.

    Attributes:
        elements: [layers] of activation, output gradient and weight.
        read_elements: [layers] the same, each counted once per product that reads it.
        tensors: [layers] how many tensors those are.
        reads: [layers] how many products read them.
    """

    elements: Array
    read_elements: Array
    tensors: Array
    reads: Array


class _Tally:
    """Collects the work of a step while it is counted."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.rows: list[tuple[int, Gemm, float, float]] = []
        self.bytes, self.vector_flops, self.kernels = (np.zeros((len(PHASES), layers)) for _ in range(3))

    def gemm(self, layer: int, phase: str, gemm: Gemm, result_width: float, repeats: float) -> None:
        self.rows.append((PHASE[phase] * self.layers + layer, gemm, result_width, repeats))

    def move(self, layer: int, phase: str, moved: float, kernels: float, vector_flops: float = 0.0) -> None:
        self.bytes[PHASE[phase], layer] += moved
        self.kernels[PHASE[phase], layer] += kernels
        self.vector_flops[PHASE[phase], layer] += vector_flops

    def finished(self, operands: Operands) -> Demand:
        self.rows.sort(key=lambda row: row[0])
        distinct: dict[tuple[float, ...], int] = {}
        product = [distinct.setdefault(_columns(gemm, width), len(distinct)) for _, gemm, width, _ in self.rows]
        columns = np.array(list(distinct) or np.empty((0, 6)), dtype=np.float64).reshape(-1, 6).T
        cell = np.array([row[0] for row in self.rows], dtype=np.intp)
        cells, starts = np.unique(cell, return_index=True)
        return Demand(
            products=Products(**dict(zip(_COLUMNS, columns, strict=True))),
            product=np.array(product, dtype=np.intp),
            repeats=np.array([row[3] for row in self.rows], dtype=np.float64),
            cells=cells,
            starts=starts,
            rows_layer=cell % max(self.layers, 1),
            bytes=self.bytes,
            vector_flops=self.vector_flops,
            kernels=self.kernels,
            operands=operands,
        )


_COLUMNS = ("m", "n", "k", "batch", "operand_elements", "result_bytes")


def _columns(gemm: Gemm, result_width: float) -> tuple[float, ...]:
    first = gemm.operand_elements if gemm.operand_elements is not None else gemm.m * gemm.k * gemm.count
    result = gemm.result_elements if gemm.result_elements is not None else gemm.m * gemm.n * gemm.count
    return gemm.m, gemm.n, gemm.k, gemm.count, first + gemm.k * gemm.n * gemm.count, result * result_width


def _operands(workload: Workload, options: StepOptions) -> Operands:
    count, examples = options.passes(workload.batch_size)
    table = np.zeros((4, len(workload.layers)))
    for index, layer in enumerate(workload.layers):
        for product in layer.products if layer.quantizable else ():
            for elements, readers, repeats in (
                (product.input_elements * examples, 1 + product.grad_weight, count),
                (product.output_elements * examples, product.grad_input + product.grad_weight, count),
                (product.weight_elements, 1 + product.grad_input, 1),
            ):
                once = min(readers, 1)
                table[:, index] += np.array([elements * once, elements * readers, once, readers]) * repeats
    return Operands(elements=table[0], read_elements=table[1], tensors=table[2], reads=table[3])


def demand(workload: Workload, options: StepOptions) -> Demand:
    """Count one step's products, bytes and kernels; quantization passes aside, which depend on format and chip."""
    if options not in workload.memo:
        workload.memo[options] = _counted(workload, options)
    found: Demand = workload.memo[options]
    return found


def _counted(workload: Workload, options: StepOptions) -> Demand:
    tally = _Tally(len(workload.layers))
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
    return tally.finished(_operands(workload, options))


def _model_passes(tally: _Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int) -> None:
    """The model's own norms, activations, copies and pools, forward and backward."""
    width = stored_bytes(options.baseline)
    second = options.private and options.clipping in ("ghost", "mixed")
    for found in layer.passes:
        scale = width * (examples if found.batched else 1) * count
        forward = found.forward if options.eager else found.fused_forward
        backward = found.backward if options.eager else found.fused_backward
        kernels = found.kernels_forward if options.eager else found.fused_kernels_forward
        back_kernels = found.kernels_backward if options.eager else found.fused_kernels_backward
        tally.move(index, "other", scale * (forward + backward), count * (kernels + back_kernels))
        if second:
            tally.move(index, "second_backward", scale * backward, count * back_kernels)


def _product(tally: _Tally, index: int, product: Product, options: StepOptions, examples: int, count: int) -> None:
    """The model's products, forward and backward, and what private training makes of the weight's gradient."""
    width = stored_bytes(options.baseline)
    activation = 4.0 if width == 4 else 2.0
    tally.gemm(index, "forward", product.forward(examples), activation, count)
    if product.grad_input:
        tally.gemm(index, "grad_input", product.input_gradient(examples), activation, count)
    if not product.grad_weight:
        return
    whole = product.weight_gradient(examples)
    if not product.weighted:  # the other activation of an attention: its gradient is an input gradient too
        tally.gemm(index, "grad_input", whole, activation, count)
    elif not options.private:
        tally.gemm(index, "weight_gradient", whole, GRADIENT_BYTES, count)
    else:
        _private_product(tally, index, product, options, examples, count)
    second = options.private and options.clipping in ("ghost", "mixed")
    if second:
        if product.grad_input:
            tally.gemm(index, "second_backward", product.input_gradient(examples), activation, count)
        result = GRADIENT_BYTES if product.weighted else activation
        tally.gemm(index, "second_backward", whole, result, count)


def _private_product(
    tally: _Tally, index: int, product: Product, options: StepOptions, examples: int, count: int
) -> None:
    width = stored_bytes(options.baseline)
    whole = product.weight_gradient(examples)
    each = product.example_gradients(examples)
    gradients = float(examples * product.weight_elements * GRADIENT_BYTES)
    if options.eager and options.clipping != "bookkeeping":  # autograd's own batch gradient, thrown away
        tally.gemm(index, "weight_gradient", whole, GRADIENT_BYTES, count)
    if options.clipping == "hooks":
        tally.gemm(index, "weight_gradient", each, GRADIENT_BYTES, count)
        if options.eager:  # Opacus fills a buffer with zeros and copies the gradients into it
            tally.move(index, "weight_gradient", 3 * gradients * count, 2 * count)
        tally.move(index, "norm_and_clip", gradients * count, count)  # the norms read it all
        tally.move(index, "norm_and_clip", gradients * count, count)  # and so does the weighted sum
        return
    _norms(tally, index, product, options, examples, count)
    if options.clipping == "bookkeeping":
        tally.gemm(index, "weight_gradient", whole, GRADIENT_BYTES, count)
        if options.eager:  # the output gradients times their clip factors, written out
            tally.move(index, "norm_and_clip", 2.0 * width * examples * product.output_elements * count, count)


def norm_is_ghost(product: Product, clipping: str) -> bool:
    """Whether a layer's per-example norms come from Gram matrices and not from materialised gradients."""
    return clipping == "ghost" or 2 * product.rows**2 < product.inputs * product.outputs


def _norms(tally: _Tally, index: int, product: Product, options: StepOptions, examples: int, count: int) -> None:
    width = stored_bytes(options.baseline)
    rows, groups = product.rows, product.groups
    if not norm_is_ghost(product, options.clipping):
        each = product.example_gradients(examples)
        kept = options.eager  # a fused kernel squares and adds in its epilogue
        tally.gemm(index, "norm_and_clip", each, GRADIENT_BYTES if kept else 0.0, count)
        if kept:
            tally.move(index, "norm_and_clip", examples * product.weight_elements * GRADIENT_BYTES * count, count)
        return
    features = product.inputs + product.outputs
    if rows == 1:  # |x|^2 |g|^2, no Gram matrix
        tally.move(index, "norm_and_clip", width * examples * groups * features * count, 2 * count)
        return
    gram_bytes = GRADIENT_BYTES if options.eager else 0.0
    for side in (product.inputs, product.outputs):
        gram = Gemm(m=rows, n=rows, k=side, count=groups * examples)
        tally.gemm(index, "norm_and_clip", gram, gram_bytes, count)
    if options.eager:
        unfolded = rows * product.inputs * groups
        if unfolded != product.input_elements:  # im2col, written and read back
            tally.move(index, "norm_and_clip", 2.0 * width * examples * unfolded * count, count)
        tally.move(index, "norm_and_clip", 2.0 * gram_bytes * examples * groups * rows**2 * count, 2 * count)


def _small_gradients(
    tally: _Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int
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
    if options.eager:  # a pass over the output gradient of its own; a fused backward pass has it at hand
        seen = sum(p.output_elements for p in layer.products) + sum(
            p.fused_forward for p in layer.passes if layer.kind == "norm"
        )
        tally.move(index, "weight_gradient", width * examples * seen * count, count)
    if options.private:
        tally.move(index, "norm_and_clip", 2.0 * GRADIENT_BYTES * examples * small * count, 2 * count)


def _clip(tally: _Tally, index: int, layer: LayerWork, options: StepOptions, examples: int, count: int) -> None:
    """Norms of a layer's parameters brought together and turned into clip factors: small, but kernels."""
    if options.eager:
        tally.move(index, "norm_and_clip", 4.0 * GRADIENT_BYTES * examples * count, 2 * count)


def _noise(tally: _Tally, index: int, layer: LayerWork, options: StepOptions) -> None:
    moved = 4.0 * GRADIENT_BYTES * layer.parameters if options.eager else 0.0  # written; read, added, written back
    tally.move(index, "noise", moved, 2 if options.eager else 1, NOISE_FLOPS * layer.parameters)


def _optimizer(tally: _Tally, index: int, layer: LayerWork, options: StepOptions) -> None:
    """Gradient, weight and optimizer state read, weight and state written, and the baseline's copy of the weight."""
    width = stored_bytes(options.baseline)
    states = OPTIMIZER_STATES[options.optimizer]
    moved = GRADIENT_BYTES * (3 + 2 * states) + (width if width < GRADIENT_BYTES else 0.0)
    if options.eager and options.private:  # the sum is divided by the expected batch size
        moved += 2 * GRADIENT_BYTES
    tally.move(index, "optimizer_step", moved * layer.parameters, 1 + states if options.eager else 0)


def poisson_tail(expected_batch_size: int, tail_probability: float = 1e-6) -> int:
    """A batch size that a Poisson-sampled batch exceeds with at most ``tail_probability``.

    Chernoff's bound for a sum of independent Bernoulli draws: exp(-B ((1 + d) ln(1 + d) - d)) at B (1 + d).
    """
    if not 0 < tail_probability < 1:
        raise InputError(f"tail_probability={tail_probability} must be between 0 and 1")
    low, high = 0.0, 1.0
    needed = -np.log(tail_probability) / expected_batch_size

    def exponent(excess: float) -> float:
        return float((1 + excess) * np.log1p(excess) - excess)

    while exponent(high) < needed:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) < needed else (low, middle)
    return int(np.ceil(expected_batch_size * (1 + high)))
