"""How much the loss suffers from quantizing each layer, released with differential privacy.

``loss_differences`` measures, ``release`` adds the noise, ``smooth`` averages over releases. Only what ``release``
returns may steer anything; the differences themselves are private data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dpquant.prefix import SharedPrefix
from dpquant.privacy import PrivacyEvent
from dpquant.streams import GLOBAL_RANDOM
from emulation import layers
from emulation.errors import InputError, suggestion

Estimator = Literal["released", "probe", "both"]
Probe = Literal["forward", "training"]
Policy = Mapping[str, Any]
"""Layer name to format, as ``emulation.set_plan`` takes it; the layers not named stay in full precision."""


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """When and how the sensitivity of the layers is measured.

    Args:
        interval: epochs from one analysis to the next; the first is before epoch 1.
        noise_multiplier: standard deviation of the noise over the sensitivity of the release.
        max_norm: C_m, the L2 norm to which each example's vector of loss differences is clipped, over all policies
            jointly.
        expected_batch_size: expected size of the Poisson sample, a public number.
        decay: weight of the past in the exponential moving average of the releases, in [0, 1); 0 uses the newest alone.
        estimator: ``released``: no analysis and no budget, an estimate from the noisy gradients that training
            releases; ``probe``: these analyses, which the noise of training pays for (where data or budget are small,
            dearly); ``both``: their average.
        probe: ``forward``: loss differences without training, clipped per example (sensitivity C_m); ``training``:
            loss differences after some steps under each policy, clipped as one vector (sensitivity 2 C_m).
        probe_steps: gradient steps of ``probe: training``.
        probe_learning_rate: of those steps.

    Raises:
        InputError: a value out of range.
    """

    interval: int = 2
    noise_multiplier: float = 2.0
    max_norm: float = 0.1
    expected_batch_size: int = 256
    decay: float = 0.5
    estimator: Estimator = "released"
    probe: Probe = "forward"
    probe_steps: int = 4
    probe_learning_rate: float = 0.5

    def __post_init__(self) -> None:
        for name in ("interval", "expected_batch_size", "probe_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} is out of range", hint="a whole number, at least 1")
        if not 0 <= self.noise_multiplier < float("inf"):
            raise InputError(f"noise_multiplier={self.noise_multiplier!r} is out of range", hint="zero or more")
        if not 0 < self.max_norm < float("inf"):
            raise InputError(f"max_norm={self.max_norm!r} is out of range", hint="a finite number above 0")
        if not 0 <= self.decay < 1:
            raise InputError(f"decay={self.decay!r} is out of range", hint="at least 0 and below 1; 0 takes no average")
        if not 0 < self.probe_learning_rate < float("inf"):
            raise InputError(f"probe_learning_rate={self.probe_learning_rate!r} is out of range", hint="above 0")
        for name, allowed in (("estimator", get_args(Estimator)), ("probe", get_args(Probe))):
            if getattr(self, name) not in allowed:
                chosen = getattr(self, name)
                raise InputError(f"unknown {name}={chosen!r}", hint=suggestion(str(chosen), allowed))

    def sample_rate(self, dataset_size: int) -> float:
        """The probability with which each of ``dataset_size`` examples (a public number) takes part in an analysis.

        Raises:
            InputError: the expected batch is larger than the data.
        """
        if self.expected_batch_size > dataset_size:
            raise InputError(
                f"expected_batch_size={self.expected_batch_size} of the analysis exceeds dataset_size={dataset_size}",
                hint="the analysis draws from the training data: choose a smaller batch",
            )
        return self.expected_batch_size / dataset_size

    @property
    def sensitivity(self) -> float:
        """How far one example can move a release before its noise, in the L2 norm."""
        return 2 * self.max_norm if self.probe == "training" else self.max_norm / self.expected_batch_size

    def event(self, dataset_size: int, analyses: int = 1) -> PrivacyEvent:
        """What ``analyses`` analyses spend: one subsampled Gaussian each, however many policies are probed."""
        return PrivacyEvent(
            mechanism="analysis",
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate(dataset_size),
            steps=analyses,
        )


def layer_policies(layers: Sequence[str], formats: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Every layer alone in every format, the others in full precision, by name.

    The name is the layer's where there is one format, ``layer:format`` where there are several.
    """
    several = len(formats) > 1
    return {f"{layer}:{fmt}" if several else layer: {layer: fmt} for layer in layers for fmt in formats}


def loss_differences(
    module: nn.Module,
    per_example_loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    policies: Sequence[Policy],
    *,
    set_plan: Callable[[nn.Module, Policy], object] | None = None,
    restore: Policy | None = None,
) -> Tensor:
    """What each policy adds to the loss of each example: forward passes only, in evaluation mode.

    At most P + 1 of them: under emulation's own ``set_plan``, layers ahead of a policy's first quantized one are not
    computed again (:class:`dpquant.prefix.SharedPrefix`).

    Parameters, gradients, buffers, optimizer, train/eval flags and the global random state of CPU and CUDA are as
    before when this returns or raises; Opacus's hooks see nothing, for no graph is built.

    Args:
        module: a model whose quantized layers ``set_plan`` can switch.
        per_example_loss: (module, batch) to losses of shape [B]: unreduced, and of each example alone.
        batch: handed to ``per_example_loss``.
        policies: P plans.
        set_plan: puts a plan in force; default ``emulation.set_plan``.
        restore: the plan put in force at the end; default full precision.

    Returns:
        float64 [B, P] on the CPU: loss under policy p minus loss in full precision. Private data.

    Raises:
        InputError: ``per_example_loss`` did not return one loss per example.
    """
    switch = set_plan or layers.set_plan
    present = layers.quantizable_layers(module)

    def losses(plan: Policy) -> Tensor:
        switch(module, plan)
        found = per_example_loss(module, batch)
        if found.dim() != 1:
            raise InputError(
                f"per_example_loss returned shape={tuple(found.shape)}", hint="one loss per example: reduction='none'"
            )
        return found.detach().to("cpu", torch.float64)

    def changed(policy: Policy) -> set[nn.Module]:
        if set_plan is not None:  # who knows what it switches
            return set(module.modules())
        return {present[name] for name in policy if name in present}

    with undisturbed(module), torch.no_grad():
        module.eval()
        try:
            passes = [(partial(losses, plan), changed(plan)) for plan in (*policies, {})]
            *found, base = SharedPrefix(module).results(passes)
        finally:
            switch(module, restore or {})
    return torch.stack(found, dim=1) - base.unsqueeze(1) if found else base.new_empty((len(base), 0))


def clip_rows(differences: Tensor, max_norm: float) -> Tensor:
    """Each example's vector scaled to an L2 norm of at most ``max_norm`` over all policies jointly; [B, P], float64.

    A vector with a NaN or infinity becomes zero: it must not reach the sum, and it must not show. A billionth of the
    norm is left for rounding, of the norms and of the sum of up to 2000 vectors, in any order.
    """
    max_norm *= 1 - 2.0**-30
    rows = differences.to(torch.float64)
    finite = torch.isfinite(rows).all(dim=1, keepdim=True)
    rows = torch.where(finite, rows, torch.zeros_like(rows))
    # Largest magnitude first: the square of a huge loss difference would overflow even float64.
    peak = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros((len(rows), 1))
    unit = rows / torch.where(peak == 0, torch.ones_like(peak), peak)
    norm = peak * unit.norm(dim=1, keepdim=True)
    return torch.where(norm > max_norm, unit * (max_norm / unit.norm(dim=1, keepdim=True).clamp_min(1e-300)), rows)


def release(
    differences: Tensor,
    *,
    max_norm: float,
    noise_multiplier: float,
    expected_batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """The mean loss difference of every policy, with the noise that makes it public.

    The sum of the clipped rows moves by at most C_m when one example is added or removed, so this is one Gaussian
    mechanism with noise multiplier ``noise_multiplier``; over a Poisson sample, a subsampled one. The divisor is the
    public expected size, never the size of the sample.

    Args:
        differences: [B, P], all examples of the sample; B may be 0.
        max_norm: C_m, the joint clipping norm of an example's P differences.
        noise_multiplier: standard deviation of the noise over C_m.
        expected_batch_size: expected size of the Poisson sample.
        generator: a CPU generator whose numbers are used for nothing else and stay secret.

    Returns:
        float64 [P] on the CPU.
    """
    total = clip_rows(differences, max_norm).sum(dim=0)
    noise = torch.randn(total.shape, generator=generator, dtype=torch.float64)
    return (total + noise_multiplier * max_norm * noise) / expected_batch_size


def smooth(previous: Mapping[str, float] | None, released: Mapping[str, float], decay: float) -> dict[str, float]:
    """The exponential moving average after ``released``, by layer: post-processing. The first release starts it."""
    past = released if previous is None else previous
    return {name: decay * past[name] + (1 - decay) * value for name, value in released.items()}


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Leaves every module's train/eval flag and the global random states of CPU and CUDA as they were before."""
    modes = {m: m.training for m in module.modules()}
    cuda = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with GLOBAL_RANDOM, torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for m, mode in modes.items():
                m.training = mode
