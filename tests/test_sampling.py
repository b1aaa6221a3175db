from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dpquant.sampling import PoissonSampler, poisson_draw, private_loader
from dpquant.streams import stream
from emulation.errors import InputError


class Items(Dataset[Any]):
    """A data set that has to be read item by item."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(index)), index % 10


def make(
    dataset: Dataset[Any], rate: float, steps: range, part: int | None = None, root: int = 0
) -> tuple[DataLoader[Any], list[Tensor], list[bool], DPOptimizer]:
    ids: list[Tensor] = []
    inside: list[bool] = []
    optimizer = DPOptimizer(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=1,
    )
    size = len(dataset)  # type: ignore[arg-type]
    sampler = PoissonSampler(
        size=size,
        sample_rate=rate,
        generator=lambda step: stream(root, "sampling", step),
        steps=lambda: steps,
        inside=inside.append,
    )
    loader = private_loader(
        DataLoader(dataset, batch_size=4),
        sampler,
        on_batch=ids.append,
        optimizer=optimizer,
        max_physical_batch_size=part,
    )
    return loader, ids, inside, optimizer


def tensors(size: int) -> TensorDataset:
    index = torch.arange(size)
    return TensorDataset(index.float()[:, None].expand(-1, 3), index % 10)


@pytest.mark.parametrize("kind", [tensors, Items])
def test_batches_are_poisson_and_say_who_is_in_them(kind: Callable[[int], Dataset[Any]]) -> None:
    loader, ids, inside, _ = make(kind(500), 0.1, range(20))
    batches = list(loader)
    assert len(batches) == len(ids) == 20
    for step, ((x, y), chosen) in enumerate(zip(batches, ids, strict=True)):
        assert torch.equal(chosen, poisson_draw(500, 0.1, stream(0, "sampling", step)))
        assert torch.equal(x, chosen.float()[:, None].expand(-1, 3))
        assert torch.equal(y, chosen % 10)
    assert inside == [True, False]


@pytest.mark.parametrize("kind", [tensors, Items])
def test_an_empty_batch_still_has_its_shape(kind: Callable[[int], Dataset[Any]]) -> None:
    loader, ids, _, _ = make(kind(5), 1e-9, range(3))
    for x, y in loader:
        assert x.shape == (0, 3)
        assert x.dtype == torch.float32
        assert y.shape == (0,)
    assert all(len(i) == 0 for i in ids)


def test_inclusion_has_the_sample_rate_for_every_example() -> None:
    size, rate, trials = 200, 0.3, 2000
    counts = torch.zeros(size)
    for step in range(trials):
        counts[poisson_draw(size, rate, stream(5, "sampling", step))] += 1
    error = (counts / trials - rate).abs() / math.sqrt(rate * (1 - rate) / trials)
    assert error.max() < 5
    assert (counts / trials - rate).mean().abs() < 5 * math.sqrt(rate * (1 - rate) / trials / size)


def test_a_later_start_draws_the_same_batches() -> None:
    all_of_them, first, _, _ = make(tensors(300), 0.1, range(10))
    list(all_of_them)
    the_rest, last, _, _ = make(tensors(300), 0.1, range(6, 10))
    list(the_rest)
    assert all(torch.equal(a, b) for a, b in zip(first[6:], last, strict=True))


def test_large_batches_come_in_parts_that_make_one_step() -> None:
    whole, ids, _, _ = make(tensors(300), 0.2, range(4))
    list(whole)
    loader, parts, _, optimizer = make(tensors(300), 0.2, range(4), part=16)
    skips = []
    for x, _ in loader:
        assert 0 < len(x) <= 16
        skips.append(optimizer._step_skip_queue[-1])
    assert torch.equal(torch.cat(ids), torch.cat(parts))
    assert skips.count(False) == 4
    assert skips[-1] is False


def test_the_end_is_told_however_it_comes() -> None:
    loader, _, inside, _ = make(tensors(50), 0.5, range(5))
    iterator = iter(loader)
    next(iterator)
    assert inside == [True]
    del iterator
    assert inside == [True, False]


def test_a_loader_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    loader, ids, _, _ = make(tensors(50), 0.5, range(3))
    assert len(list(loader)) == len(ids) == 3
    assert torch.equal(torch.get_rng_state(), before)  # other runs of this process may be drawing their weights


def test_workers_are_refused() -> None:
    loader = DataLoader(tensors(10), batch_size=2, num_workers=1)
    with pytest.raises(InputError, match="num_workers=1"):
        private_loader(loader, None, on_batch=lambda ids: None, optimizer=None)  # type: ignore[arg-type]
