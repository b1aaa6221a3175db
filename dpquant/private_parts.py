"""The four parts of a private training loop: module, optimizer, criterion and loader, and their backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpquant import clipping as clip
from dpquant.budget import Budget
from dpquant.distributed import Processes
from dpquant.graphs import GraphedBackward
from dpquant.sampling import PoissonSampler, private_loader
from dpquant.spending import AccountedOptimizer
from emulation.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateParts:
    """What a private loop runs on.

    Attributes:
        module: ready for per-example clipping.
        optimizer: clips, adds the noise, and steps.
        criterion: mean loss, with the gradient of the sum.
        loader: Poisson batches.
        graphed: the backward as CUDA graphs; None where it runs as usual.
    """

    module: nn.Module
    optimizer: AccountedOptimizer
    criterion: clip.PrivateCriterion
    loader: DataLoader[Any]
    graphed: GraphedBackward | None

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward, loss and backward of one batch: its outputs [B, ...] and mean loss, both without gradient."""
        if self.graphed is not None:
            return self.graphed(inputs, targets)
        outputs = self.module(inputs)
        loss = self.criterion(outputs, targets)
        loss.backward()
        return outputs.detach(), loss.detach()

    def losses(self, module: nn.Module, batch: Any) -> Tensor:
        """One loss per example of a batch, [B]."""
        inputs, targets = batch
        return self.criterion.per_example(module(inputs), targets)


def private_parts(
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    data_loader: DataLoader[Any],
    budget: Budget,
    sampling: Callable[[int], torch.Generator],
    steps: Callable[[], range],
    inside: Callable[[bool], None],
    max_grad_norm: float,
    clipping: str,
    max_physical_batch_size: int | None,
    cuda_graphs: bool,
    before_noise: Callable[[], torch.Generator],
    on_batch: Callable[[Tensor], None],
    processes: Processes,
) -> PrivateParts:
    """Wraps the four parts of an ordinary loop.

    Args:
        module: with quantizable layers.
        optimizer: over its parameters.
        criterion: a loss with a ``reduction``.
        data_loader: whose data set and collation are kept.
        budget: sizes of the batches, and the noise that is added.
        sampling: step -> the generator that its batch is drawn with.
        steps: of an iteration of the loader.
        inside: told when an iteration starts and ends.
        max_grad_norm: norm that each example's gradient is clipped to.
        clipping: ``bookkeeping`` or ``hooks``.
        max_physical_batch_size: larger batches come in parts.
        cuda_graphs: replay graphs, where the module is on a GPU.
        before_noise: puts a step on record and gives the generator of its noise.
        on_batch: told the examples of every batch.
        processes: those that share the run.
    """
    expected_batch_size = budget.numbers.expected_batch_size
    private = clip.private_module(module, clipping=clipping)
    private_criterion = clip.private_criterion(criterion)
    accounted = AccountedOptimizer(
        optimizer,
        noise_multiplier=budget.noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        module=private,
    )
    accounted.before_noise, accounted.processes = before_noise, processes
    sampler = PoissonSampler(
        size=len(data_loader.dataset),  # type: ignore[arg-type]
        sample_rate=budget.numbers.sample_rate,
        generator=sampling,
        steps=steps,
        inside=inside,
        processes=processes,
    )
    loader = private_loader(
        data_loader,
        sampler,
        on_batch=on_batch,
        optimizer=accounted,
        max_physical_batch_size=max_physical_batch_size,
    )
    graphed = None
    if cuda_graphs and clipping == "bookkeeping" and next(module.parameters()).is_cuda:
        expected = -(-expected_batch_size // processes.size)
        graphed = GraphedBackward(private, private_criterion, accounted, expected, max_physical_batch_size)
    return PrivateParts(
        module=private, optimizer=accounted, criterion=private_criterion, loader=loader, graphed=graphed
    )


def check_parameters(module: nn.Module) -> None:
    """Raises InputError unless everything that is trained is in float32 or float64."""
    for name, p in module.named_parameters():
        if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"parameter {name!r} is {p.dtype}: the sum of gradients and its noise need float32",
                hint="module.float(); quantization is per layer, by format",
            )
