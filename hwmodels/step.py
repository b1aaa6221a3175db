"""A training step as counted work: how it is done, its phases, and the tables that the counting fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emulation.errors import InputError, suggestion
from hwmodels.gemm_arrays import Array, Products
from hwmodels.profile import stored_bytes
from hwmodels.workload import Gemm, Workload

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
FRAMEWORKS = ("fused", "eager", "graphs")
OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adam": 2}

GRADIENT_BYTES = 4  # the sum of the gradients and the noise are float32


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is done.

    Args:
        method: ``dp-sgd`` or plain ``sgd``.
        clipping: ``bookkeeping``, ``hooks``, ``ghost`` or ``mixed``; of no effect for ``sgd``.
        baseline: the format of everything that is not quantized.
        framework: ``fused``, ``eager``, or ``graphs``: eager kernels, recorded once and replayed.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        physical_batch_size: most examples of one pass; a larger batch is accumulated. None: all in one.

    Raises:
        InputError: an unknown name or a size below 1.
    """

    method: Literal["dp-sgd", "sgd"] = "dp-sgd"
    clipping: Literal["bookkeeping", "hooks", "ghost", "mixed"] = "bookkeeping"
    baseline: str = "bfloat16"
    framework: Literal["fused", "eager", "graphs"] = "fused"
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
        return self.framework != "fused"

    @property
    def opacus(self) -> bool:
        """Whether clipping is done as Opacus does it: by hooks or ghost norms in an eager framework."""
        return self.eager and self.private and self.clipping != "bookkeeping"

    @property
    def gradient_bytes(self) -> float:
        """Per element of per-example gradients: float32, but Opacus keeps the network's own type."""
        return min(float(GRADIENT_BYTES), stored_bytes(self.baseline)) if self.opacus else float(GRADIENT_BYTES)

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
        """Values [..., rows], summed per phase and layer: [..., phases, layers]."""
        leading = values.shape[:-1]
        total = np.zeros((*leading, self.bytes.size))
        if len(self.starts):
            total[..., self.cells] = np.add.reduceat(values, self.starts, axis=-1)
        return total.reshape(*leading, *self.bytes.shape)


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


class Tally:
    """Collects the work of a step while it is counted."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.rows: list[tuple[int, Gemm, float, float]] = []
        self.bytes, self.vector_flops, self.kernels = (np.zeros((len(PHASES), layers)) for _ in range(3))

    def gemm(self, layer: int, phase: str, gemm: Gemm, result_width: float, repeats: float) -> None:
        """Book a product; ``result_width`` is in bytes per element, 0 where the result stays on the chip."""
        self.rows.append((PHASE[phase] * self.layers + layer, gemm, result_width, repeats))

    def move(self, layer: int, phase: str, moved: float, kernels: float, vector_flops: float = 0.0) -> None:
        """Book bytes, kernels and float32 operations."""
        self.bytes[PHASE[phase], layer] += moved
        self.kernels[PHASE[phase], layer] += kernels
        self.vector_flops[PHASE[phase], layer] += vector_flops

    def finished(self, quantized: Operands) -> Demand:
        """The tables."""
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
            operands=quantized,
        )


_COLUMNS = ("m", "n", "k", "batch", "operand_elements", "result_bytes")


def _columns(gemm: Gemm, result_width: float) -> tuple[float, ...]:
    first = gemm.operand_elements if gemm.operand_elements is not None else gemm.m * gemm.k * gemm.count
    result = gemm.result_elements if gemm.result_elements is not None else gemm.m * gemm.n * gemm.count
    return gemm.m, gemm.n, gemm.k, gemm.count, first + gemm.k * gemm.n * gemm.count, result * result_width


def operands(workload: Workload, options: StepOptions) -> Operands:
    """The tensors that quantization would touch."""
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
