"""qtorch's kernels: what can be checked without building them, and (long) with them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import emulation.qtorch_backend as backend
from emulation.codec import round_to
from emulation.compare import qtorch_differences
from emulation.errors import InputError
from emulation.formats import scalar_format
from emulation.qtorch_backend import qtorch_round
from emulation.quantizer import Quantizer


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty build folder, and no kernels in memory."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    backend._kernels.cache_clear()
    monkeypatch.setattr(backend, "_kernels", backend._kernels.__wrapped__)
    return tmp_path / "quant_cpu"


def tools(folder: Path, *names: str) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_no_ninja(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "c++"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(InputError, match="needs ninja, and there is none") as caught:
        qtorch_round(torch.ones(2), scalar_format("fp8"))
    assert "pip install ninja" in (caught.value.hint or "")


def test_ninja_beside_python_but_not_on_the_path(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "c++"))
    monkeypatch.setattr("sys.executable", tools(tmp_path / "venv", "ninja") + "/python")
    with pytest.raises(InputError, match="ninja on PATH") as caught:
        qtorch_round(torch.ones(2), scalar_format("fp8"))
    assert "activate" in (caught.value.hint or "")


def test_no_compiler(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "ninja"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"C\+\+ compiler, and 'c\+\+' is not on PATH"):
        qtorch_round(torch.ones(2), scalar_format("fp8"))


def test_a_stale_lock(unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "ninja", "c++"))
    unbuilt.mkdir()
    lock = unbuilt / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(InputError, match="killed 60 minutes ago") as caught:
        qtorch_round(torch.ones(2), scalar_format("fp8"))
    assert str(lock) in str(caught.value)
    assert "delete" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "dtype", "rounding", "message"),
    [
        ("float8_e4m3fnuz", torch.float32, "nearest", "qtorch has no number"),
        ("fp8", torch.float64, "nearest", "dtype"),
        ("fp8", torch.float32, "toward_zero", "rounding='toward_zero'"),
        ("fp32", torch.float32, "nearest", "float32"),
    ],
)
def test_what_qtorch_cannot_do_is_refused(name: str, dtype: torch.dtype, rounding: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        qtorch_round(torch.ones(2, dtype=dtype), scalar_format(name), rounding)


def test_the_backend_is_named() -> None:
    with pytest.raises(InputError, match="unknown backend='qtroch'") as caught:
        round_to(torch.ones(2), "fp8", backend="qtroch")  # type: ignore[arg-type]
    assert "qtorch" in (caught.value.hint or "")
    for call in (
        lambda g: round_to(torch.ones(2), "fp8", "stochastic", generator=g, backend="qtorch"),
        lambda g: Quantizer("fp8", rounding="stochastic", backend="qtorch").fake_quantize(
            torch.ones(2, 2), generator=g
        ),
    ):
        with pytest.raises(InputError, match="backend='qtorch' with generator="):
            call(torch.Generator())


needs_build = pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("c++") is None, reason="no ninja or no C++ compiler"
)


@pytest.mark.long
@needs_build
def test_the_kernel_differs_where_it_is_known_to() -> None:
    counts = {
        "float8_e4m3fn": (45870, {"NaN": 254, "infinity": 2, "overflow": 30512, "sign of zero": 14976, "tie": 126}),
        "float8_e5m2": (43164, {"NaN": 254, "infinity": 2, "overflow": 28704, "sign of zero": 14080, "tie": 124}),
        "float4_e3m0": (16134, {"NaN": 254, "sign of zero": 15872, "tie": 8}),
    }
    for name, (differing, causes) in counts.items():
        found = qtorch_differences(name)
        assert (found.count, found.differing) == (65536, differing)
        assert {cause: count for cause, count in found.by_cause.items() if count} == causes
        assert all(len(found.examples[cause]) in (2, 3) for cause in causes)
    x, exact, theirs = qtorch_differences("fp8").examples["tie"][0]
    assert round_to(torch.tensor(x), "fp8").item() == exact != theirs
    ties = torch.nextafter(torch.tensor([2.0**-10 * 3]), torch.tensor(0.0))
    assert qtorch_differences("fp8", ties).by_cause["rounded twice"] == 1


@pytest.mark.long
@needs_build
def test_the_kernel_agrees_everywhere_else() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs()
    for name in ("fp8", "e5m2", "fp4", "int8"):
        assert torch.equal(round_to(x, name, backend="qtorch"), round_to(x, name))
    rows = x.view(20, 1000).requires_grad_()
    q = Quantizer("fp8", backend="qtorch")
    values = q.fake_quantize(rows)
    assert torch.equal(values.detach(), Quantizer("fp8").fake_quantize(rows).detach())
    values.sum().backward()
    assert rows.grad is not None
    assert (rows.grad == 1).all()
    drawn = round_to(x, "fp4", "stochastic", backend="qtorch")
    assert set(drawn.unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
