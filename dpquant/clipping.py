"""Per-example clipping from one backward pass, exact under quantization (book-keeping), on Opacus's optimizer.

The guarantee: with example gradients g_i that depend on example i alone, a step releases
sum_i min(1, C / |g_i|) g_i + N(0, (noise_multiplier C)^2), and adding or removing one example moves the sum by at most
C. The factor multiplies what the GEMM's operand was quantized to, after quantization: Q(c g) is not c Q(g), so the
second backward of ghost clipping would bound the wrong vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise, _mark_as_processed
from torch import Tensor, nn

from dpquant.captures import Tape, attach, check_private
from dpquant.gradients import Contribution, DenseGradient, squared_norms, weighted_sums
from emulation.errors import InputError, suggestion
from emulation.layers import quantizable_layers

__all__ = [
    "CLIPPINGS",
    "PrivateCriterion",
    "PrivateOptimizer",
    "Tape",
    "attach",
    "clip_factors",
    "clipped_sums",
    "per_example_norms",
    "private_criterion",
    "private_module",
]

CLIPPINGS = ("bookkeeping", "hooks")
_ROUNDINGS = 4  # of each example's part in the clipped sum, that C leaves room for: about 1 is seen


def private_module(module: nn.Module, clipping: str = "bookkeeping") -> nn.Module:
    """Prepares a module so that a backward of the summed loss leaves what per-example clipping needs.

    Args:
        module: any model of layers whose examples are independent; best after ``quantize_model``, which spares the
            batch gradients that private training throws away.
        clipping: ``bookkeeping``: the same module, its layers on a tape (``module.private_tape``); ``hooks``: Opacus's
            ``GradSampleModule``, every per-example gradient materialised: slow, the cross-check.

    Returns:
        The module to train with :class:`PrivateOptimizer`.

    Raises:
        InputError: a layer mixes examples or has no per-example gradients, with its name and the reason.
    """
    if clipping not in CLIPPINGS:
        hint = suggestion(clipping, CLIPPINGS)
        if clipping == "ghost":
            hint = "the second backward of ghost clipping quantizes c * g, which is not c * Q(g); use 'bookkeeping'"
        raise InputError(f"unknown clipping={clipping!r}", hint=hint)
    check_private(module)
    for layer in quantizable_layers(module).values():
        layer.private = True
    if clipping == "hooks":
        for layer in quantizable_layers(module).values():
            layer.replay = []
        wrapped: nn.Module = GradSampleModule(module, batch_first=True, loss_reduction="sum")
        return wrapped
    attach(module)
    return module


@torch.no_grad()
def per_example_norms(tape: Tape) -> Tensor:
    """The L2 norm of every example's gradient over all parameters on the tape, [B] in float64, never too small.

    Args:
        tape: after one backward of the summed loss.
    """
    return _norms(tape.combined())


def _norms(contributions: list[Contribution]) -> Tensor:
    return squared_norms(contributions).sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """The factor of every example, [B] in float64: min(1, C / (norm + 1e-6)), as Opacus has it, rounded down.

    It is 0 where the norm is not finite. Also as float32, no factor times its norm exceeds C.
    """
    factors = (max_grad_norm * (1 - torch.finfo(torch.float32).eps) / (norms.double() + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


@torch.no_grad()
def clipped_sums(tape: Tape, factors: Tensor) -> dict[nn.Parameter, Tensor]:
    """The sum of the examples' gradients, each times its factor, for every parameter on the tape.

    Args:
        tape: after one backward of the summed loss.
        factors: [B]; an example whose factor is 0 contributes zero even where its gradient is not finite.
    """
    return _weighted_sums(tape.combined(), factors, dropped=int((factors == 0).sum()))


def _weighted_sums(contributions: list[Contribution], factors: Tensor, dropped: int) -> dict[nn.Parameter, Tensor]:
    if dropped:  # 0 * NaN is NaN: the examples themselves must go
        contributions = [c.without(factors == 0) for c in contributions]
    return weighted_sums(contributions, factors)


class PrivateOptimizer(DPOptimizer):
    """Opacus's DPOptimizer that clips from the tape of a book-keeping module, or from per-example gradients.

    A step moves the parameters by the wrapped optimizer's rule on
    (clipped sum + N(0, (noise_multiplier * max_grad_norm)^2)) / expected_batch_size. Noise, virtual batches
    (``BatchMemoryManager``) and hooks are Opacus's. An example whose gradient norm is not finite contributes zero; an
    empty batch is a step of noise alone.

    Args:
        optimizer: any torch optimizer over the module's parameters.
        module: what :func:`private_module` returned.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``.
        max_grad_norm: norm C that each example's gradient is clipped to.
        expected_batch_size: public divisor of the noisy sum.
        generator: source of the noise.
        secure_mode: Opacus's noise that resists floating-point attacks.

    Attributes:
        nonfinite_examples: how many examples were dropped so far for a gradient that was not finite. A function of
            the private data without noise: a diagnostic, not to be released.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        module: nn.Module,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        # the backward is of the summed loss; "mean" is what divides the noisy sum by the expected batch size
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
            generator=generator,
            secure_mode=secure_mode,
        )
        self.tape: Tape | None = getattr(module, "private_tape", None)
        if self.tape is None and not isinstance(module, GradSampleModule):
            raise InputError("module is not prepared for private training", hint="wrap it with private_module first")
        self.nonfinite_examples = 0
        # adding an example may also change how the sum of all others is rounded
        eps = torch.finfo(torch.promote_types(self.params[0].dtype, torch.float32)).eps
        rounding = _ROUNDINGS * eps / 2 * expected_batch_size
        self._bound = max_grad_norm / (1 + 2 * rounding)
        self._row: Tensor | None = None

    @property
    def accumulated_iterations(self) -> int:
        """One: several backwards before a step are refused."""
        return 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, and a backward that no step has used."""
        if self.tape is not None:
            self.tape.clear()
        if not self._is_last_step_skipped:
            self._row = None
        super().zero_grad(set_to_none)

    def forget(self) -> None:
        """Forgets a logical batch that was not finished: its parts come again, and must not count twice."""
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.zero_grad()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clips and adds what the last backward left; noise too, unless the logical batch goes on."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Adds the clipped sum of the examples of the last backward to ``p.summed_grad``, in the parameters' dtype."""
        if any(hasattr(p.summed_grad, "_processed") for p in self.params):
            raise InputError("optimizer.step() twice on the same noisy gradient", hint="call optimizer.zero_grad()")
        row = None if self.tape is None else self.tape.clipped
        if row is not None and all(p.summed_grad is None for p in self.params):
            self._row = row.clone()
            for p, part in zip(self.params, self.in_parts(self._row), strict=True):
                p.summed_grad = part
        elif row is not None and self._row is not None:
            self._row += row  # the sums of the parameters are views of it
        else:
            self._row = None
            if row is not None:
                sums = dict(zip(self.params, self.in_parts(row), strict=True))
            else:
                sums, _ = self.clipped(self._from_grad_samples() if self.tape is None else self.tape.combined())
            for p in self.params:
                addend = sums[p].to(p.dtype) if p in sums else torch.zeros_like(p)
                p.summed_grad = addend if p.summed_grad is None else p.summed_grad + addend
        if self.tape is not None:
            self.tape.clear()

    def in_parts(self, row: Tensor) -> list[Tensor]:
        """Views of ``row``, all parameters' numbers one after the other, in the parameters' shapes."""
        parts = row.split([p.numel() for p in self.params])
        return [part.view(p.shape) for p, part in zip(self.params, parts, strict=True)]

    def add_noise(self) -> None:
        """Opacus's noise; for sums that lie in a row in one draw."""
        if self._row is None:
            super().add_noise()
            return
        std = self.noise_multiplier * self.max_grad_norm
        noise = _generate_noise(std=std, reference=self._row, generator=self.generator, secure_mode=self.secure_mode)
        for p, part in zip(self.params, self.in_parts(self._row + noise), strict=True):
            p.grad = part
            _mark_as_processed(p.summed_grad)

    def scale_grad(self) -> None:
        """Divides the noisy sums by the expected batch size."""
        torch._foreach_div_([p.grad for p in self.params], self.expected_batch_size)

    @torch.no_grad()
    def clipped(
        self, contributions: list[Contribution], taken: Tensor | None = None
    ) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """The clipped sum of each of the optimizer's parameters, and the examples' norms [B].

        Args:
            contributions: one per parameter.
            taken: [B], 1 for the examples that count and 0 for repetitions of the first one. With it nothing is looked
                at on the host, and where a norm is not finite the sums are not to be used; without it such an
                example is dropped and counted.
        """
        own = set(self.params)
        contributions = [c for c in contributions if c.parameter in own]
        if not contributions or not contributions[0].batch_size:
            return {}, torch.zeros(0)
        norms = _norms(contributions)
        factors = clip_factors(norms, self._bound)
        if taken is not None:
            return _weighted_sums(contributions, factors * taken, dropped=0), norms
        dropped = int((~torch.isfinite(norms)).sum())
        self.nonfinite_examples += dropped
        return _weighted_sums(contributions, factors, dropped), norms

    def _from_grad_samples(self) -> list[Contribution]:
        found: list[Contribution] = []
        for p in self.params:
            values = p.grad_sample
            if isinstance(values, list):
                raise InputError(
                    "two backward passes before optimizer.step()",
                    hint="step after every backward; larger batches: BatchMemoryManager",
                )
            if hasattr(values, "_processed"):
                raise InputError("optimizer.step() twice on the same gradients", hint="call optimizer.zero_grad()")
            if values is not None:
                values._processed = True
                found.append(DenseGradient(parameter=p, values=values))
        return found


class _MeanOfExamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        ctx.shape = losses.shape
        return losses.mean() if len(losses) else losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].expand(ctx.shape)


class PrivateCriterion:
    """A loss whose value is the mean over the batch and whose gradient is that of the SUM of the examples' losses.

    With the gradient of a mean every example's gradient would carry 1 / (number of examples) into the quantizers, and
    the private batch size would leak through any quantizer that is not homogeneous.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self._reduction = getattr(criterion, "reduction", "none")
        if isinstance(criterion, nn.Module) and self._reduction != "none":
            criterion = copy.copy(criterion)
            criterion.reduction = "none"  # type: ignore[assignment]
        self._criterion = criterion

    def per_example(self, *args: Any, **kwargs: Any) -> Tensor:
        """Every example's own loss, [B].

        Raises:
            InputError: the criterion gives something else than one loss (or one row of losses) per example.
        """
        losses = self._criterion(*args, **kwargs)
        batch = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        if losses.dim() == 0 or (batch is not None and len(losses) != len(batch)):
            raise InputError(
                f"the criterion gave losses of shape {tuple(losses.shape)}, not one per example",
                hint="use a torch loss with a `reduction`, or return a tensor [batch]",
            )
        if losses.dim() == 1:
            return losses
        rows = losses.flatten(1)
        return rows.sum(1) if self._reduction == "sum" else rows.mean(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss to call ``backward`` on; its arguments are the criterion's."""
        return _MeanOfExamples.apply(self.per_example(*args, **kwargs))  # type: ignore[no-any-return]


def private_criterion(criterion: Callable[..., Tensor]) -> PrivateCriterion:
    """Makes a loss fit for per-example clipping: its value stays the mean, its gradient becomes that of the sum.

    Args:
        criterion: a torch loss with a ``reduction`` (losses per token are averaged over an example's own tokens for
            ``mean`` and summed for ``sum``); or any callable that returns one loss per example, [B].
    """
    return PrivateCriterion(criterion)
