"""Poisson batches whose examples carry their identity, so that every example owns its rounding bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from opacus.data_loader import wrap_collate_with_empty
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, get_worker_info

from dpquant.distributed import ALONE, Processes
from emulation.errors import InputError


def poisson_draw(size: int, sample_rate: float, generator: torch.Generator) -> Tensor:
    """Indices of one Poisson sample: each of ``size`` examples independently with probability ``sample_rate``."""
    return (torch.rand(size, generator=generator, dtype=torch.float64) < sample_rate).nonzero(as_tuple=True)[0]


class PoissonSampler(Sampler[list[int]]):
    """Index lists of the Poisson batches of one epoch, as Opacus's ``UniformWithReplacementSampler`` draws them.

    Each batch has a generator of its own: a run that stops between two steps draws the same batches when it goes on,
    without saving one.

    Args:
        size: number of examples.
        sample_rate: probability of each example in each batch.
        generator: step -> the generator that its batch is drawn with.
        steps: called at the start of an iteration; the steps whose batches it yields.
        inside: called with True when an iteration starts and with False when it ends, however it ends.
        processes: all draw the same batch, and each yields its own part of it.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_rate: float,
        generator: Callable[[int], torch.Generator],
        steps: Callable[[], range],
        inside: Callable[[bool], None],
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._size, self._sample_rate, self._generator = size, sample_rate, generator
        self._steps, self._inside = steps, inside

    def __len__(self) -> int:
        return len(self._steps())

    def __iter__(self) -> Iterator[list[int]]:
        self._inside(True)
        try:
            for step in self._steps():
                drawn = poisson_draw(self._size, self._sample_rate, self._generator(step))
                yield self._processes.share(drawn).tolist()
        finally:
            self._inside(False)


class IndexedDataset(Dataset[Any]):
    """A data set whose batches say which examples they hold.

    Tensors held in memory are gathered for a whole batch at once; other data sets are read item by item.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[list[int], Any]:
        return [index], self.dataset[index]

    def __getitems__(self, indices: list[int]) -> tuple[list[int], Any]:
        """The examples at ``indices``: (indices, one tuple of stacked tensors, or the list of items)."""
        if isinstance(self.dataset, TensorDataset):
            index = torch.as_tensor(indices, dtype=torch.long)
            return indices, tuple(t[index] for t in self.dataset.tensors)
        return indices, [self.dataset[i] for i in indices]


class _Collate:
    """Turns what :class:`IndexedDataset` gives into a batch, and tells ``on_batch`` whose examples are in it."""

    def __init__(self, collate: Callable[[list[Any]], Any], on_batch: Callable[[Tensor], None]) -> None:
        self._collate, self._on_batch = collate, on_batch

    def __call__(self, fetched: tuple[list[int], Any]) -> Any:
        if get_worker_info() is not None:  # a worker process cannot tell the layers of this one
            raise InputError("num_workers > 0 is not supported", hint="use num_workers=0, best with tensors in memory")
        indices, batch = fetched
        self._on_batch(torch.as_tensor(indices, dtype=torch.long))
        return list(batch) if isinstance(batch, tuple) else self._collate(batch)


def private_loader(
    loader: DataLoader[Any],
    sampler: PoissonSampler,
    *,
    on_batch: Callable[[Tensor], None],
    optimizer: DPOptimizer,
    max_physical_batch_size: int | None = None,
) -> DataLoader[Any]:
    """A loader over the same data whose batches are Poisson samples.

    Args:
        loader: the user's loader: its data set and collation are kept, its batches are not.
        sampler: which examples each batch holds.
        on_batch: told the example indices of every batch before it is handed out.
        optimizer: told which physical batches end a logical one.
        max_physical_batch_size: split larger batches into parts of at most this many examples; the optimizer steps
            after the last part (Opacus's virtual batches).

    Raises:
        InputError: the loader uses worker processes.
    """
    if loader.num_workers:
        raise InputError(
            f"num_workers={loader.num_workers} is not supported: example identities stay in this process",
            hint="use num_workers=0, best with tensors in memory",
        )
    dataset = IndexedDataset(loader.dataset)
    collate: Callable[[Any], Any] = loader.collate_fn
    if not isinstance(loader.dataset, TensorDataset):  # an empty sample must still look like a batch
        collate = wrap_collate_with_empty(
            collate_fn=collate, sample_empty_shapes=_shapes(loader.dataset[0]), dtypes=_dtypes(loader.dataset[0])
        )
    batches: Sampler[list[int]] = sampler
    if max_physical_batch_size is not None:
        batches = BatchSplittingSampler(sampler=sampler, max_batch_size=max_physical_batch_size, optimizer=optimizer)
    keyed: Callable[[Any], Any] = _Collate(collate, on_batch)
    # a loader draws a seed for workers that this one has not, by default from the global generator
    return DataLoader(dataset, batch_sampler=batches, collate_fn=keyed, generator=torch.Generator())


def _shapes(item: Sequence[Any]) -> list[tuple[int, ...]]:
    return [(0, *getattr(x, "shape", ())) for x in item]


def _dtypes(item: Sequence[Any]) -> list[Any]:
    return [getattr(x, "dtype", type(x)) for x in item]
