"""The analysis as it was first published: what some training steps under each policy do to the loss (arXiv 2509.03472).

The steps see the whole sample and one example may change all that follows, so no example's part can be clipped: the
vector of loss differences is clipped as one. Then two neighbouring samples can be twice the norm apart, and that is the
sensitivity that the noise is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpquant import clipping
from dpquant.captures import Tape
from dpquant.sensitivity import Policy, clip_rows, undisturbed
from emulation.errors import InputError
from emulation.layers import set_plan


def training_differences(
    module: nn.Module,
    per_example_loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[], Iterable[Any]],
    policies: Sequence[Policy],
    *,
    steps: int,
    learning_rate: float,
    max_grad_norm: float,
    expected_batch_size: int,
    restore: Policy | None = None,
) -> Tensor:
    """What training under each policy adds to the mean loss: a few clipped gradient steps on the batch, then its loss.

    Every policy starts from the same weights. Parameters, their gradients, buffers, tape, flags and the global random
    state are as before when this returns or raises.

    Args:
        module: a module that ``private_module`` prepared for book-keeping.
        per_example_loss: (module, batch) to losses of shape [B].
        batches: gives the analysis sample anew, in parts that fit into memory, each made when it is handed out: random
            bits are keyed by the examples of the part that was made last.
        policies: P plans.
        steps: R, gradient steps under each policy.
        learning_rate: of those steps.
        max_grad_norm: norm that each example's gradient is clipped to.
        expected_batch_size: divisor of the clipped sum and of the summed loss.
        restore: the plan put in force at the end; default full precision.

    Returns:
        float64 [P] on the CPU: loss after training under policy p minus loss after training in full precision.
        Private data.

    Raises:
        InputError: the module has no tape, because it uses ``hooks``.
    """
    tape = getattr(module, "private_tape", None)
    if not isinstance(tape, Tape):
        raise InputError("probe='training' needs clipping='bookkeeping'", hint="or use probe='forward'")
    parameters = [p for p in module.parameters() if p.requires_grad]
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None  # layers that are not quantized add to it; what is there stays as it is

    def loss_after_training(plan: Policy) -> Tensor:
        module.load_state_dict(kept)
        set_plan(module, plan)
        module.train()
        for _ in range(steps):
            totals: dict[nn.Parameter, Tensor] = {}
            for batch in batches():
                losses = per_example_loss(module, batch)
                if not len(losses):
                    continue
                losses.sum().backward()
                factors = clipping.clip_factors(clipping.per_example_norms(tape), max_grad_norm)
                for p, part in clipping.clipped_sums(tape, factors).items():
                    totals[p] = totals[p] + part if p in totals else part
                tape.clear()
            with torch.no_grad():
                for p, total in totals.items():
                    p.sub_(total.to(p.dtype), alpha=learning_rate / expected_batch_size)
        module.eval()
        with torch.no_grad():
            losses_after = [per_example_loss(module, batch).sum().to("cpu", torch.float64) for batch in batches()]
        return torch.stack(losses_after).sum() / expected_batch_size

    with undisturbed(module):
        try:
            base = loss_after_training({})
            found = [loss_after_training(policy) - base for policy in policies]
        finally:
            module.load_state_dict(kept)
            set_plan(module, restore or {})
            tape.clear()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
    return torch.stack(found) if found else base.new_empty(0)


def release_aggregate(
    differences: Tensor, *, max_norm: float, noise_multiplier: float, generator: torch.Generator
) -> Tensor:
    """The clipped vector of loss differences with the noise that makes it public.

    Whatever the sample, the clipped vector lies in a ball of radius C_m; two such vectors are at most 2 C_m apart. With
    noise of standard deviation ``noise_multiplier * 2 * C_m`` this is one Gaussian mechanism with that noise
    multiplier; over a Poisson sample, a subsampled one.

    Args:
        differences: [P].
        max_norm: C_m.
        noise_multiplier: standard deviation of the noise over the sensitivity 2 C_m.
        generator: a CPU generator whose numbers are used for nothing else and stay secret.

    Returns:
        float64 [P] on the CPU.
    """
    vector = clip_vector(differences, max_norm)
    noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    return vector + noise_multiplier * 2 * max_norm * noise


def clip_vector(differences: Tensor, max_norm: float) -> Tensor:
    """The vector scaled to an L2 norm of at most ``max_norm``; zero if any of it is not finite."""
    return clip_rows(differences.unsqueeze(0), max_norm).squeeze(0)
