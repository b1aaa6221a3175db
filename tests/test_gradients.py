"""Per-example gradient forms against materialised gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.gradients import (
    Contribution,
    DenseGradient,
    EmbeddingGradient,
    GemmGradient,
    combined,
    squared_norms,
    weighted_sums,
)
from emulation.gemms import WeightGradient


def dense() -> Contribution:
    return DenseGradient(parameter=nn.Parameter(torch.zeros(4, 3)), values=torch.randn(5, 4, 3))


def gemm() -> Contribution:
    weight = nn.Parameter(torch.zeros(4, 3))
    operands = WeightGradient(weight=weight.data, x=torch.randn(5, 3), grad_output=torch.randn(5, 4), conv=None)
    return GemmGradient(parameter=weight, operands=operands)


def embedding() -> Contribution:
    tokens = torch.tensor([[0, 1, 1], [2, 2, 2], [5, 0, 3], [4, 1, 4], [0, 0, 5]])
    return EmbeddingGradient(parameter=nn.Parameter(torch.zeros(6, 3)), tokens=tokens, grad_output=torch.randn(5, 3, 3))


@pytest.mark.parametrize("make", [dense, gemm, embedding])
def test_forms_agree_with_the_materialised_gradients(make: type[Contribution]) -> None:
    torch.manual_seed(0)
    contribution = make()
    values = contribution.per_example()
    factors = torch.rand(5)
    assert contribution.batch_size == 5
    assert values.shape == (5, *contribution.parameter.shape)
    exact = values.double().flatten(1).square().sum(1)
    assert (contribution.squared_norms() >= exact).all()
    torch.testing.assert_close(contribution.squared_norms(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(contribution.weighted_sum(factors), torch.einsum("n,n...->...", factors, values))
    kept = values.clone()
    kept[2] = 0
    torch.testing.assert_close(contribution.without(torch.arange(5) == 2).per_example(), kept)


def test_gradients_in_any_memory_order_are_the_same() -> None:
    torch.manual_seed(0)
    stored = torch.randn(5, 3, 4, 2, 6)
    for dims in ((0, 1, 2, 3, 4), (0, 4, 1, 2, 3), (0, 2, 4, 1, 3), (4, 0, 1, 2, 3)):
        values = stored.permute(dims)
        gradient = DenseGradient(parameter=nn.Parameter(torch.zeros(values.shape[1:])), values=values)
        factors = torch.rand(len(values))
        found = gradient.weighted_sum(factors)
        assert found.is_contiguous()
        torch.testing.assert_close(found, torch.einsum("n,n...->...", factors, values))
        exact = values.double().flatten(1).square().sum(1)
        torch.testing.assert_close(gradient.squared_norms(), exact, rtol=2e-5, atol=0)


def test_small_ones_side_by_side_are_as_each_by_itself() -> None:
    torch.manual_seed(0)
    large = DenseGradient(parameter=nn.Parameter(torch.zeros(100, 50)), values=torch.randn(5, 100, 50))
    vector = DenseGradient(parameter=nn.Parameter(torch.zeros(7)), values=torch.randn(5, 7).bfloat16())
    every = [dense(), gemm(), vector, large, embedding(), dense()]
    factors = torch.rand(5)
    exact = torch.stack([c.per_example().double().flatten(1).square().sum(1) for c in every]).sum(0)
    for some in (every, every[:2], every[1:2]):
        sums = weighted_sums(some, factors)
        assert set(sums) == {c.parameter for c in some}
        for c in some:
            wanted = torch.einsum("n,n...->...", factors, c.per_example().float())
            torch.testing.assert_close(sums[c.parameter], wanted)
    assert (squared_norms(every) >= exact).all()
    torch.testing.assert_close(squared_norms(every), exact, rtol=2e-5, atol=0)


def test_embedding_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    found = embedding()
    assert isinstance(found, EmbeddingGradient)
    for i in range(5):
        (alone,) = torch.autograd.grad(
            F.embedding(found.tokens[i], found.parameter), found.parameter, found.grad_output[i]
        )
        torch.testing.assert_close(found.per_example()[i], alone)


def convolution(channels: int, side: int) -> GemmGradient:
    weight = nn.Parameter(torch.zeros(channels, channels, 3, 3))
    x, g = torch.randn(2, channels, side, side), torch.randn(2, channels, side, side)
    from emulation import gemms

    conv = gemms.geometry(nn.Conv2d(channels, channels, 3, padding=1))
    return GemmGradient(parameter=weight, operands=WeightGradient(weight=weight.data, x=x, grad_output=g, conv=conv))


def test_the_form_follows_the_cost() -> None:
    many = convolution(128, 4)
    assert many.cheapest() is many
    few = convolution(4, 16)
    formed = few.cheapest()
    assert isinstance(formed, DenseGradient)
    torch.testing.assert_close(formed.squared_norms(), few.squared_norms(), rtol=1e-3, atol=0)
    (kept,) = combined([many])
    assert kept is many


def test_tied_parameters_are_added_before_the_norm() -> None:
    torch.manual_seed(0)
    table = embedding()
    head = GemmGradient(
        parameter=table.parameter,
        operands=WeightGradient(
            weight=table.parameter.data, x=torch.randn(5, 3), grad_output=torch.randn(5, 6), conv=None
        ),
    )
    (both,) = combined([table, head])
    expected: Tensor = table.per_example() + head.per_example()
    torch.testing.assert_close(both.per_example(), expected)
    assert not torch.allclose(both.squared_norms(), table.squared_norms() + head.squared_norms())
