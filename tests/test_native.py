"""The C kernels against torch's operations, bit for bit, and what happens where they cannot be built."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from grid_reference import critical_points, every_bfloat16, every_float16, random_bit_patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulation import native
from emulation.codec import derive_keys, round_to
from emulation.errors import InputError
from emulation.formats import FORMATS, BlockFormat, NumberFormat, scalar_format
from emulation.kernel_formats import kernel_format
from emulation.quantizer import Quantizer

SCALARS = [f for f in FORMATS.values() if isinstance(f, NumberFormat) and f.kind != "exponent"]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: torch's operations are all there is"
)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@needs_compiler
def test_the_library_is_built_and_agrees() -> None:
    assert native._library() is not None


@needs_compiler
@pytest.mark.parametrize("fmt", SCALARS, ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
def test_rounding_has_torchs_bits(fmt: NumberFormat, rounding: str, overflow: str) -> None:
    points = critical_points(fmt) if fmt.bits <= 16 else critical_points(scalar_format("fp8"))
    x = np.concatenate([every_bfloat16(), every_float16(), points, random_bit_patterns(50_000, seed=6)])
    x = torch.from_numpy(x if fmt.has_nan else x[~np.isnan(x)])
    for bits in (None, 8, 1) if rounding == "stochastic" else (None,):
        keys = derive_keys(3) if rounding == "stochastic" else None
        out = torch.empty_like(x)
        assert native.round_flat(x, out, kernel_format(fmt, rounding, overflow, bits), keys) is bool(x.isnan().any())
        wanted = round_to(x, fmt, rounding, overflow, keys=keys, random_bits=bits, backend="torch")
        assert same(out, wanted)
        assert same(round_to(x, fmt, rounding, overflow, keys=keys, random_bits=bits), wanted)


ODD = NumberFormat(name="e7m5", exponent_bits=7, mantissa_bits=5)
QUANTIZED = ["fp8", "e3m0", "fp4", "int8", "bf16", "fp32", "luq_fp4", "mxfp8", "mxfp6_e3m2", "mxfp4", "nvfp4", ODD]


def wild(shape: list[int], seed: int) -> Tensor:
    """Numbers over the whole range, with zeros, powers of two, infinities and NaN here and there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    kind = seed % 5
    if kind == 1:
        x = x * torch.exp2(torch.randint(-140, 120, shape, generator=generator).float())
    if kind == 2:
        x = torch.exp2(torch.randint(-30, 30, shape, generator=generator).float()) * x.sign()
    if kind == 3:
        x = x * (torch.rand(shape, generator=generator) < 0.05)
    if kind == 4:
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        x = bits.to(torch.int32).view(torch.float32)
    return x


@needs_compiler
@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(QUANTIZED),
    granularity=st.sampled_from(["tensor", "example", "channel"]),
    rounding=st.sampled_from(["nearest_even", "stochastic"]),
    rule=st.sampled_from([None, "max", "pow2", "floor", "rceil"]),
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 16, 32, 48, 100]), min_size=1, max_size=4).filter(
        lambda s: math.prod(s) <= 50_000
    ),
    axis=st.integers(0, 3),
    block=st.sampled_from([None, 4, 16, 32]),
    random_bits=st.sampled_from([None, 8]),
    keyed=st.sampled_from(["each", "one"]),
    seed=st.integers(0, 999),
)
def test_quantizers_have_torchs_bits(
    name: str | NumberFormat,
    granularity: str,
    rounding: str,
    rule: str | None,
    shape: list[int],
    axis: int,
    block: int | None,
    random_bits: int | None,
    keyed: str,
    seed: int,
) -> None:
    axis = axis % len(shape)
    granularity = "tensor" if axis == 0 else granularity
    rule, block = (None, None) if name == "nvfp4" else (rule, block)
    parts = {"rounding": rounding, "scale_rule": rule, "block_size": block, "random_bits": random_bits}
    fast = Quantizer(name, granularity, **parts)
    slow = Quantizer(name, granularity, **parts, backend="torch")
    keys = None
    if rounding == "stochastic":
        keys = derive_keys(seed, torch.arange(shape[0]) if keyed == "each" else 0)
    x = wild(shape, seed)
    before = x.clone()
    result = fast.fake_quantize(x, keys=keys, axis=axis)
    assert same(result, slow.fake_quantize(x, keys=keys, axis=axis))
    assert same(x, before)


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["fp8", "luq_fp4", "mxfp4", "nvfp4", "int8"]),
    granularity=st.sampled_from(["tensor", "example"]),
    rounding=st.sampled_from(["nearest_even", "stochastic"]),
    rule=st.sampled_from([None, "max", "pow2", "floor", "rceil"]),
    planes=st.lists(st.integers(1, 3), max_size=1),
    plane=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    columns=st.lists(st.sampled_from([1, 3, 9, 25]), max_size=1),
    block=st.sampled_from([4, 16, 32]),
    seed=st.integers(0, 999),
)
def test_square_blocks_have_torchs_bits(
    name: str,
    granularity: str,
    rounding: str,
    rule: str | None,
    planes: list[int],
    plane: tuple[int, int],
    columns: list[int],
    block: int,
    seed: int,
) -> None:
    axis, rule = len(planes) + 1, None if name == "nvfp4" else rule
    granularity = granularity if planes else "tensor"
    parts = {"rounding": rounding, "scale_rule": rule, "block_size": block, "square_blocks": True}
    fast, slow = (Quantizer(name, granularity, **parts, backend=backend) for backend in ("exact", "torch"))
    x = wild([*planes, *plane, *columns], seed)
    keys = derive_keys(seed, torch.arange(len(x))) if rounding == "stochastic" else None
    result = fast.fake_quantize(x, keys=keys, axis=axis)
    assert same(result, slow.fake_quantize(x, keys=keys, axis=axis))


@needs_compiler
def test_square_blocks_that_are_too_large_for_the_library_go_to_torch() -> None:
    x = wild([16, 16, 200], 0)
    fast, slow = (Quantizer("nvfp4", "tensor", square_blocks=True, backend=b) for b in ("exact", "torch"))
    assert same(fast.fake_quantize(x, axis=1), slow.fake_quantize(x, axis=1))


@needs_compiler
@pytest.mark.parametrize("name", ["fp8", "luq_fp4", "mxfp4", "nvfp4", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_threads_change_no_bit(name: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = wild([6, 100, 640], 0)  # several times what a thread takes at once
    monkeypatch.setattr(native, "_PER_THREAD", 1000)
    for keys in (derive_keys(1, torch.arange(6)), derive_keys(1)) if rounding == "stochastic" else (None,):
        results: dict[int, list[Tensor]] = {}
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert native._team(x.numel()) == ((None, 1) if threads == 1 else (native._open_mp(), threads))
            results[threads] = [
                Quantizer(name, granularity, rounding=rounding).fake_quantize(x, keys=keys, axis=axis)
                for granularity, axis in (("tensor", 2), ("example", 2), ("example", 1))
            ] + [round_to(x, "int8", rounding, keys=keys)]
        for other in (2, 3, 7):
            assert all(map(same, results[other], results[1]))


FORKED = """
import os, signal, torch
from emulation.quantizer import Quantizer
torch.set_num_threads(3)
x = torch.randn(64, 128, 128)
wanted = Quantizer("fp8").fake_quantize(x)
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
for _ in range(50): assert torch.equal(Quantizer("fp8").fake_quantize(x), wanted)
assert threads() == before > 1, (threads(), before)
child = os.fork()
if not child:
    signal.alarm(30)
    result = Quantizer("fp8").fake_quantize(x).numpy()  # torch itself would wait for its threads here
    os._exit(0 if (result == wanted.numpy()).all() and threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_kept_and_a_forked_process_does_without() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)


@needs_compiler
def test_large_results_are_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    x = wild([1024, 4100], 0)
    assert native.empty_like(x).nbytes > native._LARGE
    result = Quantizer("fp8").fake_quantize(x)
    monkeypatch.setattr(native, "_LARGE", 1 << 62)
    assert same(result, Quantizer("fp8").fake_quantize(x))
    assert native.empty_like(x.t()).stride() == x.t().stride()


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused_or_stays_in_its_unit(bad: float) -> None:
    x = torch.ones(4, 64)
    x[1, 5] = bad
    if math.isnan(bad):
        with pytest.raises(InputError, match="NaN in x"):
            round_to(x, "fp4")
        kept = x.clone()
        with pytest.raises(InputError, match="NaN in x"):
            round_to(x, "fp4", out=x)
        assert same(x, kept)
    for name in ("luq_fp4", "nvfp4"):
        result = Quantizer(name).fake_quantize(x)
        assert result[1].isnan().all()
        assert (result[[0, 2, 3]] == 1).all()
    blocks = Quantizer("mxfp4").fake_quantize(x)
    assert blocks[1, :32].isnan().all()
    assert (blocks[1, 32:] == 1).all()


def test_what_c_does_not_do_is_left_to_torch() -> None:
    x = wild([4, 40], 0)
    fmt = BlockFormat("mine", element=scalar_format("int4"), block_size=8, scale=scalar_format("fp8"), scale_rule="max")
    for quantizer in (
        Quantizer("fp8", rounding="nearest_away"),
        Quantizer("nvfp4", "tensor", square_blocks=True),
        Quantizer("fp8", "channel", channel_axis=1),
        Quantizer(fmt),
    ):
        assert same(quantizer.fake_quantize(x), quantizer(x).dequantize())
    assert kernel_format(scalar_format("fp8"), "toward_zero") is None
    assert kernel_format(scalar_format("float8_e8m0fnu"), "nearest_even") is None


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder and no library in memory; the true one comes back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


def test_without_a_compiler_torch_does_it(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(unbuilt))
    x = wild([3, 64], 0)
    assert native._library() is None
    for name, rounding in product(["fp8", "mxfp4"], ["nearest_even", "stochastic"]):
        keys = derive_keys(1) if rounding == "stochastic" else None
        fast, slow = (Quantizer(name, rounding=rounding, backend=b) for b in ("exact", "torch"))
        assert same(fast.fake_quantize(x, keys=keys), slow.fake_quantize(x, keys=keys))


def test_a_compiler_that_fails_is_reported(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", fake_compiler(unbuilt / "bin", "echo no room left >&2; exit 1"))
    with caplog.at_level(logging.WARNING):
        assert native._library() is None
    assert "no room left" in caplog.text
    assert list((unbuilt / "cache" / "dpquant").iterdir()) == []


@needs_compiler
def test_the_build_is_kept_and_said(unbuilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert native._library() is not None
    (built,) = (unbuilt / "cache" / "dpquant").iterdir()
    assert "compiling quantize.c" in caplog.text
    caplog.clear()
    native._library.cache_clear()
    with caplog.at_level(logging.INFO):
        assert native._library() is not None
    assert not caplog.text
    assert built.exists()


@needs_compiler
@pytest.mark.parametrize(
    "flags", [("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"), ("-Dfloorf=ceilf",)]
)
def test_flags_that_break_exactness_are_noticed(
    flags: tuple[str, ...], unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # not -ffast-math: gcc then links code that flushes subnormals in the whole process
    monkeypatch.setattr(native, "_FLAGS", ("-O3", *flags, "-std=gnu11", "-shared", "-fPIC"))
    assert native._library() is None
    assert "differs from torch's operations" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_obstacle(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(unbuilt))
    (unbuilt / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(unbuilt / "file"))
    x = wild([3, 64], 0)
    assert same(Quantizer("fp8").fake_quantize(x), Quantizer("fp8", backend="torch").fake_quantize(x))
