"""One pass on the CPU or a GPU has the bits of torch's operations on the CPU; test_native has what is the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from grid_reference import critical_points, every_bfloat16, every_float16, random_bit_patterns
from torch import Tensor

from emulation import fused
from emulation.codec import derive_keys, round_to
from emulation.errors import InputError
from emulation.formats import FORMATS, NumberFormat, scalar_format
from emulation.kernel_formats import BITS, IDENTITY, INTEGER, MAGIC, kernel_format, kernel_kind
from emulation.quantizer import Quantizer

SCALARS = [f for f in FORMATS.values() if isinstance(f, NumberFormat)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def test_formats_are_rounded_as_their_exponents_ask() -> None:
    kinds = {f.name: kernel_kind(f) for f in SCALARS}
    assert kinds["float8_e8m0fnu"] is None
    assert {n for n, k in kinds.items() if k == BITS} == {"bfloat16", "tfloat32"}
    assert {n for n, k in kinds.items() if k == INTEGER} == {"int8", "int4"}
    assert {n for n, k in kinds.items() if k == IDENTITY} == {"float32"}
    assert len([k for k in kinds.values() if k == MAGIC]) == 11


def test_what_no_kernel_does_is_said() -> None:
    fp8, e8m0 = scalar_format("fp8"), scalar_format("float8_e8m0fnu")
    assert kernel_format(fp8, "toward_zero") is None
    assert kernel_format(e8m0, "nearest_even") is None
    assert kernel_format(fp8, "nearest_even", rule="max", scale=fp8) is None
    x = torch.ones(2, 32)
    assert fused.round_flat(x, x, None, None) is None
    assert not fused.quantize_blocks(x, x, None, e8m0, None, (2, 32, 1), 32, 1)
    meta = torch.ones(2, 32, device="meta")
    assert fused.round_flat(meta, meta, kernel_format(fp8, "nearest_even"), None) is None
    assert not fused.quantize_blocks(meta, meta, kernel_format(fp8, "nearest_even"), e8m0, None, (2, 32, 1), 32, 1)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("fmt", SCALARS, ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
def test_a_gpu_rounds_to_the_same_bits(fmt: NumberFormat, rounding: str, overflow: str) -> None:
    points = critical_points(fmt) if fmt.bits <= 16 else critical_points(scalar_format("fp8"))
    x = np.concatenate([every_bfloat16(), every_float16(), points, random_bit_patterns(1_000_000, seed=8)])
    x = torch.from_numpy(x if fmt.has_nan else x[~np.isnan(x)])
    x = x[: len(x) // 4 * 4].view(4, -1).contiguous()
    all_keys: list[Tensor | None] = [None]
    if rounding == "stochastic":
        all_keys = [derive_keys(1), derive_keys(1, torch.arange(4))]
    for keys in all_keys:
        for bits in (None, 1, 8) if rounding == "stochastic" else (None,):
            here = round_to(x, fmt, rounding, overflow, keys=keys, random_bits=bits, backend="torch")
            there = round_to(x.cuda(), fmt, rounding, overflow, keys=keys, random_bits=bits)
            slow = round_to(x.cuda(), fmt, rounding, overflow, keys=keys, random_bits=bits, backend="torch")
            assert same(there.cpu(), here)
            assert same(slow.cpu(), here)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["fp8", "float8_e5m2", "int8", "bf16", "luq_fp4", "mxfp8", "mxfp6", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("granularity", ["tensor", "example", "channel"])
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "stochastic"])
@pytest.mark.parametrize("rule", [None, "max", "pow2", "floor", "rceil"])
def test_a_gpu_quantizes_to_the_same_bits(name: str, granularity: str, rounding: str, rule: str | None) -> None:
    if name == "nvfp4" and rule is not None:
        return
    quantizer = Quantizer(name, granularity, rounding=rounding, scale_rule=rule)
    slow = Quantizer(name, granularity, rounding=rounding, scale_rule=rule, backend="torch")
    generator = torch.Generator().manual_seed(0)
    for shape, axis in (
        ((4, 640), 1),
        ((3, 50), 1),
        ((2, 33, 5), 1),
        ((2, 1, 1), 1),
        ((2, 64, 14, 14), 1),
        ((7, 1), 1),
        ((3, 20_000), 1),
        ((2, 33, 49), 1),
        ((6, 48), 0),
    ):
        if axis == 0 and granularity != "tensor":
            continue
        x = torch.randn(shape, generator=generator)
        wild = x * torch.exp2(torch.randint(-140, 120, shape, generator=generator).float())
        spoiled = x.clone()
        spoiled[0].view(-1)[0] = torch.nan
        spoiled[1] = 0
        keys = derive_keys(2, torch.arange(shape[0])) if rounding == "stochastic" else None
        for data in (x, wild, spoiled):
            expected = slow.fake_quantize(data, keys=keys, axis=axis)
            assert same(quantizer.fake_quantize(data.cuda(), keys=keys, axis=axis).cpu(), expected)
            assert same(quantizer(data.cuda(), keys=keys, axis=axis).dequantize().cpu(), expected)


@needs_cuda
@pytest.mark.cuda
def test_a_gpu_takes_any_memory() -> None:
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[1:].view(5, 640),  # in the middle of 16 bytes
        lambda x: x[:-1].view(640, 5).t(),
        lambda x: x[:-1].view(5, 64, 10).transpose(1, 2),
    ]
    host = torch.randn(5 * 640 + 1)
    device = host.cuda()
    for name, view in product(["fp8", "luq_fp4", "mxfp4", "nvfp4"], views):
        rounding = "stochastic" if name in ("luq_fp4", "mxfp4") else "nearest_even"
        fast, slow = (Quantizer(name, rounding=rounding, backend=b) for b in ("exact", "torch"))
        keys = derive_keys(2, torch.arange(5)) if rounding == "stochastic" else None
        result = fast.fake_quantize(view(device), keys=keys)
        assert result.stride() == torch.empty_like(view(device)).stride()
        assert same(result.cpu(), slow.fake_quantize(view(host), keys=keys))
    big = torch.randn(4, 300_000)
    for name in ("fp8", "nvfp4"):
        for granularity in ("tensor", "example"):
            fast, slow = (Quantizer(name, granularity, backend=b) for b in ("exact", "torch"))
            assert same(fast.fake_quantize(big.cuda()).cpu(), slow.fake_quantize(big))


@needs_cuda
@pytest.mark.cuda
def test_a_gpu_finds_nan_where_the_format_has_none() -> None:
    x = torch.randn(3, 5000).cuda()
    round_to(x, "fp4")
    x[2, 4321] = torch.nan
    with pytest.raises(InputError, match="NaN in x"):
        round_to(x, "fp4")
    with pytest.raises(InputError, match="NaN in x"):
        round_to(x, "int8", "stochastic", keys=derive_keys(1))
    assert round_to(x, "fp8").isnan().sum() == 1


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["fp8", "luq_fp4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("granularity", ["tensor", "example"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_calls_are_captured_in_graphs(name: str, granularity: str, rounding: str) -> None:
    quantizer = Quantizer(name, granularity, rounding=rounding)
    x, element = torch.randn(4, 20_000, device="cuda"), quantizer.element
    keys = derive_keys(1, torch.arange(4)).cuda() if rounding == "stochastic" else None

    def calls() -> tuple[Tensor, Tensor]:
        return quantizer.fake_quantize(x, keys=keys), round_to(x, element, rounding, keys=keys)

    calls()  # what is not compiled yet compiles now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls()
    for seed in (1, 2):
        x.copy_(torch.randn(4, 20_000, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(map(same, results, calls()))
