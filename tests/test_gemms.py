"""The three GEMMs and the per-example weight gradient, against torch's layers and autograd one example at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emulation import gemms
from emulation.gemms import WeightGradient


def operands(layer: nn.Module, x: Tensor) -> tuple[WeightGradient, Tensor]:
    """The weight-gradient operands of a random output gradient, and every example's gradient by autograd alone."""
    out = layer(x)
    g = torch.randn_like(out)
    alone = []
    for i in range(len(x)):
        (grad,) = torch.autograd.grad(layer(x[i : i + 1]), layer.weight, g[i : i + 1])
        alone.append(grad)
    padded = gemms.pad_input(layer, x)
    conv = gemms.geometry(layer)
    torch.testing.assert_close(gemms.output(padded, layer.weight, layer.bias, conv), out)
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(gemms.output(gemms.pad_input(layer, inputs), layer.weight, None, conv), inputs, g)
    if padded is x:
        torch.testing.assert_close(gemms.grad_input(g, layer.weight, padded, conv), expected)
    found = WeightGradient(weight=layer.weight.detach(), x=padded.detach(), grad_output=g, conv=conv)
    return found, torch.stack(alone)


def rows_of(gradient: WeightGradient) -> WeightGradient:
    x, g = gradient.matrices()
    return WeightGradient(weight=gradient.weight, x=x, grad_output=g, conv=gradient.conv, rows=True)


def check(gradient: WeightGradient, alone: Tensor) -> None:
    factors = torch.rand(len(alone), dtype=alone.dtype)
    for form in (gradient, rows_of(gradient)):
        assert form.batch_size == len(alone)
        assert form.reduction == gradient.reduction
        torch.testing.assert_close(form.per_example(), alone)
        torch.testing.assert_close(form.total(), alone.sum(0))
        torch.testing.assert_close(form.weighted_sum(factors), torch.einsum("n,n...->...", factors, alone))
        torch.testing.assert_close(form.squared_norms(), alone.flatten(1).square().sum(1))
        dropped = torch.arange(len(alone)) == 1
        kept = alone.clone()
        kept[1:2] = 0
        torch.testing.assert_close(form.without(dropped).per_example(), kept)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6), (1, 4, 6)])
def test_linear(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(*operands(nn.Linear(6, 4).double(), torch.randn(shape, dtype=torch.float64)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3))
def test_convolution_of_any_geometry(data: st.DataObject, dims: int) -> None:
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation, groups = each(1, 3), each(1, 2), data.draw(st.sampled_from([1, 2]))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        2 * groups,
        2 * groups,
        kernel,
        stride=1 if padding == "same" else each(1, 2),
        padding=each(0, 2) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    ).double()
    x = torch.randn(3, 2 * groups, *[data.draw(st.integers(5, 6)) for _ in range(dims)], dtype=torch.float64)
    check(*operands(layer, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_patches_are_those_of_torch(groups: int) -> None:
    layer = nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2, groups=groups)
    x = torch.randn(2, 4, 9, 8)
    conv = gemms.geometry(layer)
    assert conv is not None
    expected = F.unfold(x, 3, dilation=2, padding=1, stride=2)
    assert torch.equal(gemms.patches(x, conv).reshape(expected.shape), expected)
    rows = gemms.patch_rows(x, conv)
    gram = gemms.patches(x, conv).transpose(1, 2) @ gemms.patches(x, conv)
    torch.testing.assert_close(rows @ rows.transpose(1, 2), gram)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((1, 2), (2, 1), (2, 1)), (2, 1, 2)])
def test_patches_on_cuda_are_those_of_the_cpu(
    kernel: tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    dtype: torch.dtype,
) -> None:
    layer = nn.Conv2d(4, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    conv = gemms.geometry(layer)
    assert conv is not None
    for x in (torch.randn(3, 4, 9, 12), torch.randn(3, 9, 12, 4).movedim(3, 1)):
        given = x.to(dtype)
        assert torch.equal(gemms.patches(given.cuda(), conv).cpu(), gemms.patches(given, conv))


def test_bias_gradients_sum_over_positions() -> None:
    g = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(gemms.position_sums(g, gemms.geometry(nn.Conv2d(1, 4, 1))), g.sum((2, 3)))
    torch.testing.assert_close(gemms.position_sums(g, None), g.sum((1, 2)))
    assert gemms.position_sums(g[:, :, 0, 0], None) is not None


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 3)])
def test_no_examples(layer: nn.Module) -> None:
    x = torch.zeros(0, 3) if isinstance(layer, nn.Linear) else torch.zeros(0, 3, 5, 5)
    g = torch.zeros(0, 2) if isinstance(layer, nn.Linear) else torch.zeros(0, 2, 3, 3)
    gradient = WeightGradient(weight=layer.weight.detach(), x=x, grad_output=g, conv=gemms.geometry(layer))
    assert gradient.per_example().shape == (0, *layer.weight.shape)
    assert not gradient.total().any()


def test_norms_are_not_too_small_where_positions_cancel() -> None:
    """Ten thousand times as much cancels as remains: plain Gram sums in float32 lose the remainder."""
    torch.manual_seed(0)
    t, k, o = 16, 300, 300
    x, g = torch.randn(8, t, k), torch.randn(8, t, o)
    x[:, 1::2] = -x[:, ::2] * (1 + 1e-4)
    g[:, 1::2] = g[:, ::2]
    gradient = WeightGradient(weight=torch.zeros(o, k), x=x, grad_output=g, conv=None)
    true = exact_squared_norms(gradient)
    plain = ((x @ x.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2))
    assert (plain.double() < true * 0.99).any(), "the trap is there"
    assert (gradient.squared_norms() >= true).all()


def exact_squared_norms(gradient: WeightGradient) -> Tensor:
    """Of the operands as they are stored, whose products float64 adds without an error that matters here."""
    wide = dataclasses.replace(gradient, x=gradient.x.double(), grad_output=gradient.grad_output.double())
    return wide.per_example().flatten(1).square().sum(1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.sampled_from([1, 2, 7, 40]), st.sampled_from([1, 5, 300]), st.sampled_from([1, 3, 200])),
    scales=st.sampled_from([(0, 0), (9, -9), (18, -18), (18.9, -19), (-18, 18), (-30, -5), (-10, -12), (15, 0)]),
    cancelling=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_norms_are_never_below_the_exact_ones(
    sizes: tuple[int, int, int], scales: tuple[float, float], cancelling: bool, dtype: torch.dtype, seed: int
) -> None:
    """Whatever cancels, and where squares leave the range of float32: then the bound is loose, or not finite."""
    generator = torch.Generator().manual_seed(seed)
    t, k, o = sizes
    x, g = (torch.randn(4, t, n, generator=generator) * 10.0**s for n, s in zip((k, o), scales, strict=True))
    if cancelling and t > 1:
        x[:, 1::2], g[:, 1::2] = -x[:, : t - t % 2 : 2] * (1 + 1e-5), g[:, : t - t % 2 : 2]
    gradient = WeightGradient(weight=torch.zeros(o, k), x=x.to(dtype), grad_output=g.to(dtype), conv=None)
    exact, bounds = exact_squared_norms(gradient), gradient.squared_norms()
    assert bounds.dtype == torch.float64
    assert ((bounds >= exact) | ~torch.isfinite(bounds)).all()
    if max(map(abs, scales)) < 10 and not cancelling:
        assert (bounds <= exact * (1 + (1e-10 if dtype == torch.float64 else 1e-2))).all()


def cut(values: Tensor) -> Tensor:
    """To TF32's ten mantissa bits, toward zero, as a matrix unit reads float32 numbers."""
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 7, 40]), st.sampled_from([1, 5, 300]), st.booleans(), st.integers(0, 1000))
def test_norms_bound_what_tf32_makes_of_the_operands(t: int, k: int, cancelling: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(4, t, k, generator=generator), torch.randn(4, t, 3, generator=generator)
    if cancelling and t > 1:
        x[:, 1::2], g[:, 1::2] = -x[:, : t - t % 2 : 2] * (1 + 1e-5), g[:, : t - t % 2 : 2]
    gradient = WeightGradient(weight=torch.zeros(3, k), x=x, grad_output=g, conv=None)
    factor = 0.37  # clips after the norms are known, and before the operands are cut
    seen = dataclasses.replace(gradient, x=cut(x), grad_output=cut(factor * g))
    assert (factor**2 * gradient._squared_norms(gemms.TF32) >= exact_squared_norms(seen) * (1 - 1e-6)).all()


def test_tf32_is_seen_to_need_its_allowance() -> None:
    x, g = torch.ones(1, 8, 64), torch.ones(1, 8, 64)
    x[:, 1::2] = -(1 - 2.0**-12)  # nearly cancels, and cut to ten bits it cancels less
    seen = WeightGradient(weight=torch.zeros(64, 64), x=cut(x), grad_output=g, conv=None)
    given = dataclasses.replace(seen, x=x.double(), grad_output=g.double())
    assert (given._squared_norms(0.0) < exact_squared_norms(seen)).all()
    assert (given._squared_norms(gemms.TF32) >= exact_squared_norms(seen)).all()


@pytest.fixture(params=["tf32", "none"])
def precision_settings(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    """Where torch is told that products of float32 may be of less, or is not told."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = request.param
    yield settings
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 3)])
def test_products_for_clipping_are_of_whole_float32_numbers(
    layer: nn.Linear | nn.Conv2d, precision_settings: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = precision_settings
    before = [setting.fp32_precision for setting in settings]
    seen: list[list[str]] = []

    def spied(name: str, of: object) -> None:
        original = getattr(of, name)

        def spy(*args: Any, **options: Any) -> Any:
            seen.append([setting.fp32_precision for setting in settings])
            return original(*args, **options)

        monkeypatch.setattr(of, name, spy)

    gradient, _ = operands(layer, torch.randn(2, 5, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 5, 5))
    for name, of in (("bmm", torch), ("grad_weight", gemms)):
        spied(name, of)
    gradient.squared_norms()
    gradient.weighted_sum(torch.ones(2))
    assert len(seen) == 3
    assert set(map(tuple, seen)) == {("ieee" if before[0] == "tf32" else "none",) * 4}
    assert [setting.fp32_precision for setting in settings] == before


def test_dropping_an_example_drops_its_nan() -> None:
    x = torch.ones(2, 3)
    x[1] = float("nan")
    zeroed = gemms.zero_examples(x, torch.tensor([False, True]))
    assert torch.equal(zeroed, torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert x[1].isnan().all(), "the input is not changed"
