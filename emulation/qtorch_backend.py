"""qtorch's own C++ kernels, as a cross-check of the exact codec and for results made with qtorch.

They are not bit-accurate: ties go away from zero, every code is a finite value (E4M3 reaches 480), subnormals are
rounded twice, NaN becomes the maximum, -0 is lost, and stochastic rounding cannot be seeded.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulation.errors import InputError
from emulation.formats import NumberFormat

_LOG = logging.getLogger(__name__)
_STALE_S = 300.0


def qtorch_round(x: Tensor, fmt: NumberFormat, rounding: str = "nearest") -> Tensor:
    """Rounds by ``qtorch.quant.float_quantize`` (``fixed_point_quantize`` for integers).

    Args:
        x: float32, on a device that qtorch has a kernel for.
        fmt: a format that has a qtorch number: see ``NumberFormat.to_qtorch``.
        rounding: ``nearest`` (ties away from zero) or ``stochastic`` (bits of qtorch's own, which cannot be seeded).

    Returns:
        A new C-contiguous tensor without a gradient.

    Raises:
        InputError: no qtorch number, another dtype, or kernels that cannot be built: no compiler, no ninja, a lock left
            behind by a killed build.
    """
    number = fmt.to_qtorch()
    if x.dtype != torch.float32:
        raise InputError(f"backend='qtorch' with x of dtype={x.dtype}", hint="convert it to float32 first")
    if rounding not in ("nearest", "stochastic"):
        raise InputError(f"backend='qtorch' with rounding={rounding!r}", hint="it has nearest and stochastic")
    if fmt.mantissa_bits == 23:
        raise InputError("backend='qtorch' with float32", hint="qtorch negates every value at 23 mantissa bits")
    kernels = _kernels()
    if fmt.kind == "int":
        rounded: Tensor = kernels.fixed_point_quantize(x.detach(), wl=number.wl, fl=0, rounding=rounding)
    else:
        rounded = kernels.float_quantize(x.detach(), exp=number.exp, man=number.man, rounding=rounding)
    return rounded


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """qtorch.quant, whose import compiles C++ when there is no cached build."""
    folder = _build_folder()
    built = any(folder.glob("quant_cpu.*")) if folder.is_dir() else False
    _check_tools(built)
    _check_lock(folder)
    if not built:
        _LOG.warning("compiling qtorch's kernels, once (about 25 s; kept in %s)", folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch and qtorch warn about compilers and ABIs; failures raise
            import qtorch.quant
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"qtorch's kernels cannot be built: {reason}",
            hint=f"the exact backend needs no build; logs are in {folder}",
        ) from error
    return qtorch.quant


def _build_folder() -> Path:
    # where torch.utils.cpp_extension.load puts the extension that qtorch names quant_cpu
    version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    kind = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "torch_extensions" / f"{version}_{kind}"
    return base / "quant_cpu"


def _check_tools(built: bool) -> None:
    beside_python = Path(sys.executable).parent
    if shutil.which("ninja") is None:
        if not (beside_python / "ninja").exists():
            raise InputError(
                "backend='qtorch' needs ninja, and there is none on PATH", hint="pip install ninja, or apt install it"
            )
        raise InputError(
            f"backend='qtorch' needs ninja on PATH; there is one in {beside_python}",
            hint="activate the virtual environment, or add that folder to PATH",
        )
    compiler = os.environ.get("CXX", "c++")
    if not built and shutil.which(compiler) is None:
        raise InputError(
            f"backend='qtorch' needs a C++ compiler, and {compiler!r} is not on PATH", hint="install g++, or set CXX"
        )


def _check_lock(folder: Path) -> None:
    lock = folder / "lock"
    try:
        age_s = time.time() - lock.stat().st_mtime
    except OSError:
        return  # no lock: nobody is building
    if age_s > _STALE_S:
        raise InputError(
            f"a lock of a build that was killed {age_s / 60:.0f} minutes ago: {lock}",
            hint="torch would wait for it for ever: delete the file if no build is running",
        )
    _LOG.warning("waiting for another build of qtorch's kernels (%s)", lock)
