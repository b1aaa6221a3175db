"""Bounds on norms, against float64 and against unfolded patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulation import gemms, norms
from emulation.gemms import ConvGeometry, WeightGradient

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 255, 256, 257, 5000]), st.sampled_from([-25, -20, 0, 15, 25]), st.integers(0, 1000))
def test_row_norms_are_never_below_the_exact_ones(size: int, scale: int, seed: int) -> None:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * 10.0**scale
    exact, bounds = values.double().square().sum(1), norms.squared_norm_bounds(values)
    assert ((bounds >= exact) | ~torch.isfinite(bounds)).all()
    if abs(scale) < 18:
        assert (bounds <= exact * (1 + 2e-5) + 1e-30).all()


def test_a_million_equal_squares_are_not_lost() -> None:
    values = torch.ones(1).expand(1, 1 << 25)
    one_by_one = torch.zeros(())
    one_by_one += 2.0**24
    assert one_by_one + 1 == one_by_one, "where a plain float32 sum would stop"
    assert norms.squared_norm_bounds(values)[0] >= 1 << 25


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, ConvGeometry]:
    """An input and a convolution of stride 1 over it."""
    dims = draw(st.integers(1, 3))
    small = st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple)
    kernel, dilation = draw(small), draw(small)
    padding = draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims).map(tuple))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(n + draw(st.integers(0, 2)) for n in least)
    groups, own = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(2, groups * own, *size, generator=generator)
    return x, ConvGeometry(kernel=kernel, stride=(1,) * dims, padding=padding, dilation=dilation, groups=groups)


@settings(max_examples=80, deadline=None)
@given(images())
def test_products_of_patches_are_sums_of_products_of_pixels(given: tuple[Tensor, ConvGeometry]) -> None:
    x, conv = given
    patches = gemms.patches(x.double(), conv)
    gram = norms.patch_gram(norms.pixel_gram(x.double(), conv.groups), tuple(x.shape[2:]), conv)
    torch.testing.assert_close(gram, patches.transpose(1, 2) @ patches)


def convolution(kernel: int, padding: int, dims: int, groups: int = 1, cancel: bool = False) -> WeightGradient:
    """A layer whose norms are cheaper from pixels; with ``cancel`` all of an example's positions cancel but for one."""
    conv = ConvGeometry(
        kernel=(kernel,) * dims, stride=(1,) * dims, padding=(padding,) * dims, dilation=(1,) * dims, groups=groups
    )
    generator = torch.Generator().manual_seed(kernel + padding + dims)
    x = torch.randn(3, 8 * groups, *(5,) * dims, generator=generator)
    positions = conv.positions(tuple(x.shape[2:]))
    grad = torch.randn(3, 6 * groups, *positions, generator=generator)
    if cancel:
        x[:] = x[:, :, :1, :1].clone() if dims == 2 else x[:, :, :1].clone()
        grad = torch.ones_like(grad) * torch.tensor([1.0, -1.0]).repeat(math.prod(positions))[
            : math.prod(positions)
        ].view(positions)
    weight = torch.empty(6 * groups, 8, *conv.kernel)
    return WeightGradient(weight=weight, x=x, grad_output=grad, conv=conv)


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kernel", "padding", "dims"), [(3, 1, 2), (1, 0, 2), (3, 1, 1), (2, 1, 2)])
def test_norms_from_pixels_are_never_below_the_exact_ones(
    kernel: int, padding: int, dims: int, groups: int, cancel: bool
) -> None:
    gradient = convolution(kernel, padding, dims, groups, cancel)
    assert norms.by_pixels(tuple(gradient.x.shape[2:]), 8, gradient.conv)  # type: ignore[arg-type]
    exact = WeightGradient(
        weight=gradient.weight.double(), x=gradient.x.double(), grad_output=gradient.grad_output.double(),
        conv=gradient.conv,
    ).per_example().flatten(1).square().sum(1)  # fmt: skip
    found = gradient.squared_norms()
    assert (found >= exact).all()
    if not cancel:
        assert (found <= exact * 1.001).all()


def test_pixels_are_left_alone_where_patches_are_cheaper() -> None:
    strided = ConvGeometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1)
    assert not norms.by_pixels((8, 8), 64, strided)
    padded = ConvGeometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    assert norms.by_pixels((8, 8), 64, padded)
    assert not norms.by_pixels((8, 8), 1, padded)  # one channel: as many products, and their sums besides
    large = ConvGeometry(kernel=(7, 7), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    assert not norms.by_pixels((9, 9), 4, large)  # few positions on many pixels
    assert not norms.by_pixels((7, 7), 64, large)  # one position


class TestCuda:
    pytestmark = cuda

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("kernel", "padding", "dims"), [(3, 1, 2), (1, 0, 2), (3, 1, 1), (2, 1, 2), (3, 1, 3)])
    @pytest.mark.parametrize("cancel", [False, True])
    def test_bounds_are_those_of_the_cpu(self, kernel: int, padding: int, dims: int, groups: int, cancel: bool) -> None:
        own = convolution(kernel, padding, dims, groups, cancel and dims < 3)
        there = WeightGradient(
            weight=own.weight.cuda(), x=own.x.cuda(), grad_output=own.grad_output.cuda(), conv=own.conv
        )
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            torch.testing.assert_close(there.squared_norms().cpu(), own.squared_norms(), rtol=2e-4, atol=1e-6)
        finally:
            torch.backends.cudnn.conv.fp32_precision = before

    @pytest.mark.parametrize("t", [2, 65, 257])
    def test_bounds_of_linear_layers_are_those_of_the_cpu(self, t: int) -> None:
        x, grad = torch.randn(3, t, 12), torch.randn(3, t, 9)
        own = WeightGradient(weight=torch.empty(9, 12), x=x, grad_output=grad, conv=None)
        there = WeightGradient(weight=own.weight.cuda(), x=x.cuda(), grad_output=grad.cuda(), conv=None)
        torch.testing.assert_close(there.squared_norms().cpu(), own.squared_norms(), rtol=2e-4, atol=1e-6)

    def test_a_nan_stays_one(self) -> None:
        own = convolution(3, 1, 2)
        x = own.x.clone()
        x[1, 0, 0, 0] = math.nan
        x[2, 0, 0, 0] = math.inf
        there = WeightGradient(weight=own.weight.cuda(), x=x.cuda(), grad_output=own.grad_output.cuda(), conv=own.conv)
        assert torch.isfinite(there.squared_norms()).tolist() == [True, False, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1, 7, 4096, 5000, 100_000])
    def test_row_norms_are_tight_and_never_below_the_exact_ones(self, size: int, dtype: torch.dtype) -> None:
        values = torch.randn(5, size).to(dtype)
        exact, bounds = values.double().square().sum(1), norms.squared_norm_bounds(values.cuda()).cpu()
        assert (bounds >= exact * (1 - 1e-15)).all()
        assert (bounds <= exact * (1 + 1e-9)).all()

    @pytest.mark.parametrize("shape", [(3, 5, 1), (3, 5, 16), (2, 3, 1000), (2, 2, 2048), (1, 3, 3000)])
    def test_sums_over_positions(self, shape: tuple[int, int, int]) -> None:
        x, grad = torch.randn(shape), torch.randn(shape)
        sums, products = norms.row_sums(x.cuda(), grad.cuda())
        torch.testing.assert_close(sums.cpu(), grad.sum(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(products.cpu(), (x * grad).sum(2), rtol=1e-4, atol=1e-4)
