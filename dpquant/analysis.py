"""The analysis that a schedule asks for: which estimator, on which sample, and what it may know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.distributed import ALONE, Processes
from dpquant.released import ReleasedMoments, combine, loss_impacts, relative, squared_errors
from dpquant.sensitivity import AnalysisSettings, Policy, loss_differences, release
from dpquant.training_probe import release_aggregate, training_differences

Losses = Callable[[nn.Module, Any], Tensor]
"""(module, batch) to one loss per example."""


def probe(
    module: nn.Module,
    per_example_loss: Losses,
    sample: Tensor,
    collate: Callable[[Tensor], Any],
    policies: Sequence[Policy],
    settings: AnalysisSettings,
    generator: torch.Generator,
    *,
    max_grad_norm: float,
    max_physical_batch_size: int | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """One private analysis: every policy probed on a Poisson sample, and the noisy result, [P].

    What it spends is ``settings.event``, to be on record before this is called. Several processes share the sample
    (``probe: training``, whose steps see all of it, shares the policies), and the first one adds the noise.

    Args:
        module: the private module.
        per_example_loss: losses of a batch.
        sample: indices of the examples drawn.
        collate: makes a batch of indices.
        policies: P plans.
        settings: of the analysis.
        generator: of the noise alone.
        max_grad_norm: of the steps of ``probe: training``.
        max_physical_batch_size: the most examples in one forward; default: twice the expected size of the sample.
        processes: those that take part, all with the same arguments.
    """
    noise_multiplier = settings.noise_multiplier if processes.first else 0.0
    size = max_physical_batch_size or 2 * settings.expected_batch_size  # in one, but for a freak sample
    if settings.probe == "training":
        own = processes.share(torch.arange(len(policies)))
        differences = training_differences(
            module,
            per_example_loss,
            lambda: map(collate, sample.split(size)),
            [policies[i] for i in own],
            steps=settings.probe_steps,
            learning_rate=settings.probe_learning_rate,
            max_grad_norm=max_grad_norm,
            expected_batch_size=settings.expected_batch_size,
        )
        (gathered,) = processes.sum([differences.new_zeros(len(policies)).index_copy(0, own, differences)])
        released = release_aggregate(
            gathered, max_norm=settings.max_norm, noise_multiplier=noise_multiplier, generator=generator
        )
        return processes.broadcast(released)
    rows = [torch.zeros(0, len(policies), dtype=torch.float64)]
    for part in processes.share(sample).split(size):
        if len(part):
            rows.append(loss_differences(module, per_example_loss, collate(part), policies))
    released = release(
        torch.cat(rows),
        max_norm=settings.max_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=settings.expected_batch_size,
        generator=generator,
    )
    return processes.sum([released])[0]


def estimate(
    settings: AnalysisSettings,
    probed: Mapping[str, float] | None,
    moments: ReleasedMoments | None,
    module: nn.Module,
    policies: Mapping[str, Mapping[str, str]],
    *,
    noise_std: float,
    expected_batch_size: int,
) -> dict[str, float] | None:
    """The sensitivities that the schedule uses, by policy: post-processing of what was released.

    Args:
        settings: whose ``estimator`` says what is used: probes, released gradients, or both.
        probed: smoothed results of the probes; None where there was none.
        moments: of the released gradients; None where none are kept.
        module: the private module, for its weights.
        policies: name to one layer and its format.
        noise_std: of each element of the released mean gradients.
        expected_batch_size: of the training steps.

    Returns:
        Sensitivities by policy name, in units of the loss; of released gradients alone, of the largest. None while
        nothing is known yet.
    """
    seen = None if probed is None else dict(probed)
    if settings.estimator == "probe" or moments is None or moments.steps < 2:
        return seen
    formats = {fmt for policy in policies.values() for fmt in policy.values()}
    impacts = {
        fmt: loss_impacts(
            moments, squared_errors(module, fmt), noise_std=noise_std, expected_batch_size=expected_batch_size
        )
        for fmt in formats
    }
    free = {name: impacts[fmt][layer] for name, policy in policies.items() for layer, fmt in policy.items()}
    return relative(free) if seen is None else combine(seen, free)
