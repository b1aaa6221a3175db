"""Per-example gradients of one parameter in the form that is cheapest to keep, and what clipping needs from them.

A contribution knows its parameter and can give every example's squared gradient norm and the sum of the gradients, each
times its factor. The gradients themselves are only formed where that is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from emulation.gemms import WeightGradient, exact_products, zero_examples
from emulation.norms import at_least_float32, gamma, squared_norm_bounds

_SMALL = 1 << 12  # numbers of an example's gradient below which calls cost more than arithmetic
_PASSES = {True: 24, False: 128}  # multiply-adds in the time that one number is written and read twice: CPU, else


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseGradient:
    """Materialised per-example gradients.

    Attributes:
        parameter: whose gradients they are.
        values: [B, *parameter.shape].
    """

    parameter: nn.Parameter
    values: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.values.shape[0]

    def squared_norms(self) -> Tensor:
        """[B] in float64, not below the exact ones of ``values``."""
        return squared_norm_bounds(_in_memory_order(self.values)[0].flatten(1))

    def per_example(self) -> Tensor:
        """[B, *parameter.shape]."""
        return self.values

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The gradients summed, each times its factor [B]."""
        laid, dims = _in_memory_order(self.values)
        return _weighted(laid.flatten(1), factors).view(laid.shape[1:]).permute(dims).contiguous()

    def without(self, dropped: Tensor) -> DenseGradient:
        """The same with the marked examples' gradients zero."""
        return replace(self, values=zero_examples(self.values, dropped))


def _weighted(rows: Tensor, factors: Tensor) -> Tensor:
    """The sum of ``rows`` [B, n], each times its factor [B]."""
    rows = at_least_float32(rows)
    with exact_products():
        return factors.to(rows.dtype) @ rows


def _in_memory_order(values: Tensor) -> tuple[Tensor, list[int]]:
    """[B, ...] as a view that flattens without a copy, where there is one, and how to permute an example of it back."""
    strides = values.stride()
    order = sorted(range(1, values.dim()), key=lambda d: -strides[d])
    laid = values.permute(0, *order)
    if values.is_contiguous() or not laid.is_contiguous():
        return values, list(range(values.dim() - 1))
    return laid, [order.index(d) for d in range(1, values.dim())]


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmGradient:
    """The weight gradient of a Linear or convolution layer, kept as the operands of its GEMM."""

    parameter: nn.Parameter
    operands: WeightGradient

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.operands.batch_size

    def cheapest(self) -> GemmGradient | DenseGradient:
        """Every example's gradient formed, where that beats two Gram matrices and a second weight-gradient GEMM.

        With weights of K x O and T positions, forming costs T K O multiply-adds and some passes over K O numbers in
        memory; not forming costs T K O for the sum, and for the norms T^2 (K + O), or less where they come from pixels.
        """
        w, groups = self.operands.weight, self.operands.groups
        numbers = w.shape[1:].numel() * (w.shape[0] // groups)
        if self.operands.norm_cost() > _PASSES[w.device.type == "cpu"] * numbers:
            return DenseGradient(parameter=self.parameter, values=self.per_example())
        return self

    def squared_norms(self) -> Tensor:
        """[B] in float64, not below the exact ones of the operands."""
        return self.operands.squared_norms()

    def per_example(self) -> Tensor:
        """[B, *parameter.shape]."""
        return self.operands.per_example()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The gradients summed, each times its factor [B], which multiplies what was quantized."""
        return self.operands.weighted_sum(factors).contiguous()

    def without(self, dropped: Tensor) -> GemmGradient:
        """The same with the marked examples' operands zero."""
        return replace(self, operands=self.operands.without(dropped))


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingGradient:
    """The gradient of an embedding table, kept as (tokens, output gradient).

    Attributes:
        parameter: the table, [vocabulary, width].
        tokens: integers [B, T].
        grad_output: [B, T, width], zero where the token is the padding token.
    """

    parameter: nn.Parameter
    tokens: Tensor
    grad_output: Tensor

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        return self.tokens.shape[0]

    def squared_norms(self) -> Tensor:
        """[B] in float64, not below the exact ones: an example's rows of the same token are summed, then squared."""
        n, t = self.tokens.shape
        order = self.tokens.argsort(1)
        ordered = self.tokens.gather(1, order)
        first = torch.ones_like(ordered)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        place = torch.empty_like(order).scatter_(1, order, first.cumsum(1) - 1)  # among the example's distinct tokens
        rows = place + t * torch.arange(n, device=place.device).unsqueeze(1)
        values = at_least_float32(self.grad_output).flatten(0, 1)
        sums = torch.zeros_like(values).index_add_(0, rows.flatten(), values)
        lengths = squared_norm_bounds(values).sqrt().reshape(n, t).sum(1)
        rounding = gamma(t + 4, values.dtype) * lengths
        return (squared_norm_bounds(sums.reshape(n, -1)).sqrt() + rounding).square()

    def per_example(self) -> Tensor:
        """[B, vocabulary, width]."""
        n = self.batch_size
        out = self.grad_output.new_zeros(n, *self.parameter.shape)
        index = self.tokens.unsqueeze(-1).expand_as(self.grad_output)
        return out.scatter_add_(1, index, self.grad_output)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """The gradients summed, each times its factor [B]."""
        rows = at_least_float32(self.grad_output)
        scaled = rows * factors.to(rows.dtype).reshape(-1, 1, 1)
        out = rows.new_zeros(self.parameter.shape)
        return out.index_add_(0, self.tokens.flatten(), scaled.flatten(0, 1))

    def without(self, dropped: Tensor) -> EmbeddingGradient:
        """The same with the marked examples' gradients zero."""
        return replace(self, grad_output=zero_examples(self.grad_output, dropped))


Contribution = DenseGradient | GemmGradient | EmbeddingGradient


def combined(contributions: list[Contribution]) -> list[Contribution]:
    """One contribution per parameter.

    A parameter that was used more than once in a forward (a tied weight, a layer called twice) has its examples'
    gradients materialised and added before any norm is taken: the norm of a sum is not the sum of norms.
    """
    by_parameter: dict[nn.Parameter, list[Contribution]] = {}
    for contribution in contributions:
        by_parameter.setdefault(contribution.parameter, []).append(contribution)
    result: list[Contribution] = []
    for parameter, parts in by_parameter.items():
        if len(parts) > 1:
            total = parts[0].per_example()
            for part in parts[1:]:
                total = total + part.per_example()
            result.append(DenseGradient(parameter=parameter, values=total))
        else:
            result.append(parts[0])
    return result


def squared_norms(contributions: list[Contribution]) -> Tensor:
    """Every example's squared gradient norm over all of them, [B] in float64, never too small."""
    small, others = _small(contributions)
    parts = [c.squared_norms() for c in others]
    if small:
        parts.append(squared_norm_bounds(torch.cat([c.values.flatten(1) for c in small], 1)))
    return torch.stack(parts).sum(0)


def weighted_sums(contributions: list[Contribution], factors: Tensor) -> dict[nn.Parameter, Tensor]:
    """The sum of the examples' gradients, each times its factor [B], by parameter."""
    small, others = _small(contributions)
    found = {c.parameter: c.weighted_sum(factors) for c in others}
    if small:
        row = _weighted(torch.cat([c.values.flatten(1) for c in small], 1), factors)
        parts = row.split([c.parameter.numel() for c in small])
        found |= {c.parameter: part.view(c.parameter.shape) for c, part in zip(small, parts, strict=True)}
    return found


def _small(contributions: list[Contribution]) -> tuple[list[DenseGradient], list[Contribution]]:
    """Those that are worked on side by side in one tensor, as biases and normalisations are, and the others."""
    small = [c for c in contributions if isinstance(c, DenseGradient) and c.parameter.numel() <= _SMALL]
    if len(small) < 2:
        return [], contributions
    taken = {c.parameter for c in small}
    return small, [c for c in contributions if c.parameter not in taken]
