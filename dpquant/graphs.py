"""Forward, backward and clipping of a private step as CUDA graphs: launched as one, not kernel by kernel.

A private step of small layers is a thousand launches and more, which cost the host longer than the device takes.
Poisson batches differ in size, and a graph cannot: a batch is filled up to the next of few sizes with repetitions of
its first example, whose factor is 0. They add exactly nothing to the clipped sum, and no other example reads them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from dpquant.captures import Tape
from dpquant.clipping import PrivateCriterion, PrivateOptimizer
from emulation.errors import InputError
from emulation.layers import KeyTable, quantizable_layers

_log = logging.getLogger("dpquant")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    """What a batch leaves: outputs and losses by example, the clipped sums in a row, whether a norm was not finite."""

    outputs: Tensor
    losses: Tensor
    sums: Tensor
    nonfinite: Tensor


@dataclass(kw_only=True, eq=False)
class _Batch:
    """Buffers of one size that a graph reads, and the graph once there is one."""

    inputs: Tensor
    targets: Tensor
    taken: Tensor
    key: Tensor
    example_ids: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    result: _Result | None = None


class GraphedBackward:
    """Forward, loss, backward and clipped sums of a batch, so that ``optimizer.step()`` only adds noise and updates.

    On CUDA a batch size's second use captures a graph, which later uses replay; a new plan starts anew. What cannot be
    replayed runs as usual: an empty batch, secret rounding bits by batch position, a module whose work depends on its
    data. A batch with a gradient that is not finite is done again as usual, with the same random bits, so that the
    example is dropped and counted. Without CUDA the same work runs without graphs.

    Args:
        module: on a tape, from ``private_module(module, "bookkeeping")``.
        criterion: from ``private_criterion``.
        optimizer: over the module's parameters.
        expected_batch_size: mean of a Poisson batch. Sizes lie about three deviations apart, so that most batches have
            the same and are filled up by little.
        most: of examples in a batch, where larger ones come in parts: then most parts are full.
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: PrivateCriterion,
        optimizer: PrivateOptimizer,
        expected_batch_size: int,
        most: int | None = None,
    ) -> None:
        tape = getattr(module, "private_tape", None)
        if not isinstance(tape, Tape):
            raise InputError("module has no tape", hint="prepare it with private_module(module, 'bookkeeping')")
        self._module, self._criterion, self._optimizer, self._tape = module, criterion, optimizer, tape
        self._layers = list(quantizable_layers(module).values())
        apart = 1 << max(4, int(math.log2(3 * math.sqrt(max(expected_batch_size, 1)))))
        self._apart, self._least, self._most = apart, (expected_batch_size + apart // 2) % apart, most
        self._plan: tuple[object, ...] = ()
        self._batches: dict[tuple[object, ...], _Batch] = {}
        self._refused = len({p.dtype for p in optimizer.params}) > 1
        on_cuda = optimizer.params[0].is_cuda
        self._stream = _side_stream(optimizer.params[0].device, threading.get_ident()) if on_cuda else None
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves what ``optimizer.step()`` takes.

        Args:
            inputs: [B, ...].
            targets: [B, ...].

        Returns:
            The module's outputs [B, ...] and the mean loss, both without gradient.
        """
        if self._refused or not len(inputs) or not self._replayable(len(inputs)):
            return self._as_usual(inputs, targets)
        plan = tuple(layer.precision for layer in self._layers)
        if plan != self._plan:
            self._plan, self._batches = plan, {}
        size = self._size(len(inputs))
        key = (size, inputs.shape[1:], inputs.dtype, targets.shape[1:], targets.dtype)
        first = key not in self._batches
        if first:
            self._batches[key] = self._buffers(size, inputs, targets)
        batch = self._batches[key]
        self._load(batch, inputs, targets)
        try:
            result: _Result | None = self._run(batch, first=first)
        except RuntimeError as error:
            if first or isinstance(error, torch.OutOfMemoryError):
                raise
            self._refused, result = True, None
            _log.warning("the step runs without CUDA graphs: %s", str(error).splitlines()[0])
        if result is None or bool(result.nonfinite):
            return self._as_usual(inputs, targets)
        self._tape.clipped, self._tape.batch_size = result.sums, len(inputs)
        return result.outputs[: len(inputs)].clone(), result.losses[: len(inputs)].mean()

    def _size(self, count: int) -> int:
        """What a batch of ``count`` examples is filled up to; the expected size is in the middle between two sizes."""
        size = count + (self._least - count) % self._apart
        return size if self._most is None or count > self._most else min(size, self._most)

    def _keys(self, count: int) -> KeyTable | None:
        """The keys of the batch of ``count`` examples that is next, if it has any."""
        table = self._layers[0].rounding.table if self._layers else None
        return table if table is not None and len(table.example_ids) == count else None

    def _replayable(self, count: int) -> bool:
        """Whether random bits, if any, come from keys that can be written into a buffer."""
        if not self._module.training:
            return False
        for layer in self._layers:
            precision = layer.precision
            if precision is None:
                continue
            if layer.unit != "float32" or precision.weight.rounding == "stochastic":
                return False
            if layer.rounding is not self._layers[0].rounding or self._keys(count) is None:
                return False
        return True

    def _as_usual(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self._tape.clear()
        outputs = self._module(inputs)
        loss = self._criterion(outputs, targets)
        loss.backward()
        return outputs.detach(), loss.detach()

    def _buffers(self, size: int, inputs: Tensor, targets: Tensor) -> _Batch:
        return _Batch(
            inputs=inputs.new_empty(size, *inputs.shape[1:]),
            targets=targets.new_empty(size, *targets.shape[1:]),
            taken=torch.zeros(size, device=inputs.device),
            key=torch.zeros((), dtype=torch.int64, device=inputs.device),
            example_ids=torch.zeros(size, dtype=torch.int64, device=inputs.device),
        )

    def _load(self, batch: _Batch, inputs: Tensor, targets: Tensor) -> None:
        count = len(inputs)
        for held, given in ((batch.inputs, inputs), (batch.targets, targets)):
            held[:count] = given
            held[count:] = given[:1]  # zeros in their place could overflow in normalisation layers: 0 * inf is NaN
        batch.taken[:count] = 1.0
        batch.taken[count:] = 0.0
        keys = self._keys(count)
        if keys is not None:
            batch.key.fill_(keys.origin)
            batch.example_ids[:count] = keys.example_ids

    def _run(self, batch: _Batch, *, first: bool) -> _Result:
        if self._stream is None:
            return self._work(batch)
        if first:  # kernels are compiled and chosen now: a capture does not allow it
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._work(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if batch.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads may go on meanwhile: NCCL's asks for events, a loader's pins memory
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    batch.result = self._work(batch)
            except RuntimeError:
                _free_generator(self._optimizer.params[0].device)
                raise
            batch.graph = graph
        batch.graph.replay()
        assert batch.result is not None
        return batch.result

    def _work(self, batch: _Batch) -> _Result:
        """The step itself, on the buffers of ``batch``."""
        params = self._optimizer.params
        self._tape.clear()
        _forget_gradients(params)
        with self._keyed_by(batch):
            outputs = self._module(batch.inputs)
            losses = self._criterion.per_example(outputs, batch.targets)
            losses.sum().backward()
        _forget_gradients(params)  # the batch's own gradients, which nothing clips
        sums, norms = self._optimizer.clipped(self._tape.combined(), batch.taken)
        self._tape.clear()
        flat = [sums[p].flatten() if p in sums else torch.zeros_like(p).flatten() for p in params]
        return _Result(
            outputs=outputs.detach(),
            losses=losses.detach(),
            sums=torch.cat(flat),
            nonfinite=(~torch.isfinite(norms)).any(),
        )

    @contextmanager
    def _keyed_by(self, batch: _Batch) -> Iterator[None]:
        """Has the layers derive their keys from the batch's buffers, so that a replay derives its own."""
        before = self._layers[0].rounding.table if self._layers else None
        if before is None:
            yield
            return
        rounding = self._layers[0].rounding
        rounding.table = KeyTable(batch.key, batch.example_ids, before.layers)
        try:
            yield
        finally:
            rounding.table = before


@cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """The stream that ``thread`` captures on: cuBLAS keeps workspaces for every stream until the process ends."""
    return torch.cuda.Stream(device)


def _free_generator(device: torch.device) -> None:
    """Has the default generator, dropout's, draw on after a capture that failed.

    torch 2.11 leaves its state marked as being captured, which refuses every draw; a copy of the state is not.
    """
    generator, copy = torch.cuda.default_generators[device.index], torch.Generator(device)
    copy.set_state(generator.get_state())
    generator.graphsafe_set_state(copy)


def _forget_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None
