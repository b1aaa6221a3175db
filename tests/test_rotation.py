"""The rotation itself, and its kernels against torch's operations, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor, nn

from emulation import gemms, native
from emulation.gemms import ConvGeometry
from emulation.precision import PRESETS
from emulation.rotation import SIGNS, TILE, Unfolding, rotate

needs_library = pytest.mark.skipif(not native.usable(), reason="no C compiler: torch's operations are all there is")


def test_the_rotation_is_hadamards_with_signs_and_cancels() -> None:
    h = rotate(torch.eye(TILE, dtype=torch.float64).unsqueeze(0))[0]
    assert np.array_equal(h.numpy(), (np.diag(SIGNS) @ hadamard(TILE)).T / 4)
    torch.testing.assert_close(h @ h.t(), torch.eye(TILE, dtype=torch.float64))
    x, g = torch.randn(2, 21, 5, dtype=torch.float64), torch.randn(2, 21, 3, dtype=torch.float64)
    assert rotate(x).shape == (2, 32, 5)
    torch.testing.assert_close(rotate(g).transpose(1, 2) @ rotate(x), g.transpose(1, 2) @ x)


def test_half_precision_is_added_as_float32() -> None:
    x = torch.randn(2, 32, 7).bfloat16()
    assert torch.equal(rotate(x), rotate(x.float()).bfloat16())


def by_torch(x: Tensor, conv: ConvGeometry | None, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    if conv is None:
        return rotate(x.reshape(len(x), -1, x.shape[-1])).reshape(shape)
    rows = rotate(gemms.patches(x, conv).transpose(1, 2)).reshape(shape)
    if channels_last:
        rows = rows.unflatten(3, (x.shape[1] // conv.groups, -1)).transpose(3, 4).flatten(3)
    return rows


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN for NaN."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@needs_library
@settings(max_examples=150, deadline=None)
@given(data=st.data(), dims=st.integers(1, 2), groups=st.integers(1, 3), channels=st.sampled_from([1, 2, 5, 16, 90]))
def test_rows_of_any_convolution_have_torchs_bits(data: st.DataObject, dims: int, groups: int, channels: int) -> None:
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    conv = ConvGeometry(kernel=each(1, 4), stride=each(1, 3), padding=each(0, 3), dilation=each(1, 2), groups=groups)
    size = tuple(d * (k - 1) + data.draw(st.integers(1, 7)) for k, d in zip(conv.kernel, conv.dilation, strict=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(3, channels * groups, *size, generator=generator)
    x *= torch.exp2(torch.randint(-140, 120, x.shape, generator=generator))  # subnormals and overflows too
    if data.draw(st.booleans()):
        x[1].view(-1)[0] = data.draw(st.sampled_from([float("nan"), float("inf"), -0.0]))
    rows = Unfolding(x, conv, in_weight_order=False)
    assert rows.channels_last == (max(conv.kernel) > 1)
    out = torch.full(rows.shape, 7.0)
    rows.write(out[:2], slice(0, 2))
    rows.write(out[2:], slice(2, 3))
    assert same(out, by_torch(x, conv, rows.shape, rows.channels_last))


@needs_library
@pytest.mark.parametrize("shape", [(2, 5, 3), (3, 16, 64), (2, 3, 7, 300), (1, 33, 257)])
def test_rows_of_tokens_have_torchs_bits(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for given_x in (x, torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]):
        rows = Unfolding(given_x, None, in_weight_order=True)
        out = torch.empty(rows.shape)
        rows.write(out, slice(None))
        assert same(out, by_torch(given_x, None, rows.shape, False))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    x = torch.randn(6, 24, 20, 20)
    conv = gemms.geometry(nn.Conv2d(24, 8, 3, padding=1))
    rows = Unfolding(x, conv, in_weight_order=False)
    out = torch.empty(rows.shape)
    torch.set_num_threads(threads)
    try:
        rows.write(out, slice(None))
    finally:
        torch.set_num_threads(before)
    assert same(out, by_torch(x, conv, rows.shape, rows.channels_last))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(24, 20),
        nn.Conv1d(6, 8, 5, padding=2, groups=2),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.Conv2d(6, 8, (2, 3), dilation=2, groups=2),
        nn.Conv3d(2, 4, 2),
    ],
    ids=str,
)
def test_weight_gradients_are_those_of_torchs_operations(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way: quantized, per example and summed with factors."""
    torch.manual_seed(0)
    conv = gemms.geometry(layer)
    x = torch.randn(3, 7, 24) if conv is None else torch.randn(3, layer.in_channels, *[9] * len(conv.kernel))
    g = torch.randn_like(layer(x)).detach()
    found = []
    for usable in (native.usable(), False):
        monkeypatch.setattr(native, "usable", lambda usable=usable: usable)
        keys = lambda quantizer, role, t: torch.arange(len(t)) if quantizer.rounding == "stochastic" else None  # noqa: E731
        gradient = PRESETS["nvfp4"].weight_gradient(x, g, layer.weight.detach(), conv, keys)
        found.append((gradient.per_example(), gradient.weighted_sum(torch.tensor([0.5, 1.0, 2.0]))))
        assert bool((gradient.squared_norms() >= found[-1][0].flatten(1).double().square().sum(1) * (1 - 1e-6)).all())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 24, 200])
@pytest.mark.parametrize(
    "conv",
    [
        None,
        ConvGeometry(kernel=(3,), stride=(2,), padding=(1,), dilation=(1,), groups=1),
        ConvGeometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
        ConvGeometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2),
        ConvGeometry(kernel=(2, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=3),
    ],
    ids=str,
)
def test_rows_on_cuda_have_torchs_bits(conv: ConvGeometry | None, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spatial = (13, 11)[: 1 if conv is None else len(conv.kernel)]
    shape = (3, *spatial, channels) if conv is None else (3, channels * conv.groups, *spatial)
    x = torch.randn(shape, generator=generator)
    x = (x * torch.exp2(torch.randint(-140, 120, shape, generator=generator))).to(dtype)
    for given_x in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        rows = Unfolding(given_x.cuda(), conv, in_weight_order=True)
        out = torch.empty(rows.shape, dtype=dtype, device="cuda")
        rows.write(out, slice(None))
        wanted = by_torch(x, conv, rows.shape, False)
        assert same(out.cpu().float(), wanted.float())
