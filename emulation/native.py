"""The codec's arithmetic as one pass of C, for the CPU: the same bits as with torch's operations, near memory speed.

Never needed to be right: without a C compiler, or where the self-test finds a difference, torch's operations are used.
The source (quantize.c) compiles at first use, in about two seconds, and the result is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from emulation.kernel_formats import RULES, KernelFormat, kernel_format
from emulation.random_bits import hash_bits, index_products
from emulation.rounding import ROUNDINGS, on_grid

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("quantize.c")
# no contraction, no reordering: the two -fno flags change neither values nor signs
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_FLAGS = ("-O3", "-march=native", *_EXACT, "-std=c11", "-shared", "-fPIC")
_PER_THREAD = 1 << 18


class _Format(ctypes.Structure):
    _fields_ = [  # as KernelFormat, and in the order of the struct in quantize.c
        *(
            (name, ctypes.c_float)
            for name in ("low", "high", "max_value", "special", "min_normal", "inverse_max", "full")
        ),
        *((name, ctypes.c_int32) for name in ("kind", "stochastic", "rule", "mantissa_bits", "min_exponent")),
        *((name, ctypes.c_int32) for name in ("max_exponent", "draw_bits", "keeps_sign")),
    ]


def round_flat(x: Tensor, out: Tensor, form: KernelFormat, key: Tensor | None) -> bool | None:
    """``x`` on the grid in ``out``, one scale for all of it.

    Args:
        x: float32 of the CPU, C-contiguous; ``out`` the same, it may be ``x`` itself.
        form: the format, rounding and scale rule.
        key: as ``rounding_keys`` gives it.

    Returns:
        Whether there was a NaN; None where there is no library, and nothing was done.
    """
    library = _library()
    if library is None:
        return None
    format = ctypes.byref(_format(form))
    key, per_key = _keys(key, x)
    source, target, keys = x.data_ptr(), out.data_ptr(), key.data_ptr()
    top = 0 if RULES[form.rule] == "none" else int(_largest(library, x, 1))
    nan = [0]

    def work(first: int, last: int) -> None:
        nan.append(library.flat(source, target, format, first, last, top, keys, per_key))

    _in_threads(work, x.numel(), 1)
    return any(nan)


def quantize_blocks(
    x: Tensor,
    out: Tensor,
    form: KernelFormat,
    block_form: KernelFormat,
    key: Tensor | None,
    shape: tuple[int, int, int],
    size: int,
    units: int,
) -> bool:
    """Fake-quantizes ``x``, one scale per block and column; False where there is no library.

    Args:
        x: float32 of the CPU, C-contiguous; ``out`` the same.
        form: the elements' format, rounding and scale rule; ``nvfp4`` takes every unit's largest magnitude as well.
        block_form: of the block scales.
        key: as ``rounding_keys`` gives it.
        shape: that ``x`` is seen as: lines, elements along a line, columns.
        size: elements of a block along a line; a line's last block may be shorter.
        units: equal parts of ``x`` that have a scale of their own above the blocks'.
    """
    library = _library()
    if library is None:
        return False
    lines, length, inner = shape
    count = lines * -(-length // size)
    format, scale_format = ctypes.byref(_format(form)), ctypes.byref(_format(block_form))
    tops = _largest(library, x, units) if RULES[form.rule] == "nvfp4" else _no_tops()
    key, per_key = _keys(key, x)
    source, target, top, keys = x.data_ptr(), out.data_ptr(), tops.data_ptr(), key.data_ptr()

    def work(first: int, last: int) -> None:
        library.blocks(
            source, target, format, scale_format, first, last, length, size, inner, top, count // units, keys, per_key
        )

    _in_threads(work, count, max(x.numel() // count, 1))
    return True


def _largest(library: ctypes.CDLL, x: Tensor, units: int) -> Tensor:
    """The bits of max |x| (of a NaN where there is one) of equal parts of ``x``, int32."""
    whole, per_unit = x.numel(), x.numel() // units
    parts = min(torch.get_num_threads(), whole // _PER_THREAD) if units == 1 else 1
    if parts > 1 and whole % parts == 0:  # one unit, several threads
        return _largest(library, x, parts).amax(0, keepdim=True)
    tops = torch.empty(units, dtype=torch.int32)
    source, target = x.data_ptr(), tops.data_ptr()

    def work(first: int, last: int) -> None:
        library.largest(source, first, last, per_unit, target)

    _in_threads(work, units, per_unit)
    return tops


@lru_cache(maxsize=256)
def _format(form: KernelFormat) -> _Format:
    return _Format(**dataclasses.asdict(form))


def _keys(key: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """The keys in memory, and how many elements share one."""
    if key is None:
        return _no_keys(), max(x.numel(), 1)
    return key.contiguous(), x.numel() // (len(key) if key.dim() else 1)


@lru_cache(maxsize=1)
def _no_keys() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


@lru_cache(maxsize=1)
def _no_tops() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def _in_threads(work: Callable[[int, int], None], count: int, size: int) -> None:
    """Runs ``work`` over 0..count (items of ``size`` elements), in as many threads as torch would use."""
    threads = min(torch.get_num_threads(), count * size // _PER_THREAD, count)
    if threads <= 1:
        work(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:  # ctypes gives up the interpreter's lock
        others = [pool.submit(work, first, last) for first, last in pairwise(bounds[1:])]
        work(bounds[0], bounds[1])
        for other in others:
            other.result()


# --- building --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        _LOG.warning("quantize.c did not compile; torch's operations are used, which are slower: %s", detail.strip())
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    form = ctypes.POINTER(_Format)
    library.largest.argtypes, library.largest.restype = [pointer, integer, integer, integer, pointer], None
    library.flat.argtypes = [pointer, pointer, form, integer, integer, ctypes.c_int32, pointer, integer]
    library.flat.restype = ctypes.c_int32
    library.blocks.argtypes = [pointer, pointer, form, form, *[integer] * 5, pointer, integer, pointer, integer]
    library.blocks.restype = None
    if not _agrees(library):
        _LOG.warning("quantize.c, as %s compiled it, differs from torch's operations, which are used instead", compiler)
        return None
    return library


def _built(compiler: str) -> Path:
    """The compiled library, from the cache if it is there."""
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + " ".join([compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    name = f"quantize-{digest}.so"
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpquant"
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except (OSError, RuntimeError):  # no such place, or no home
        root, writable = Path(), False
    if root.is_absolute() and (root / name).exists():
        return root / name
    if not writable:
        root = Path(tempfile.mkdtemp(prefix="dpquant-"))
    built = root / name
    _LOG.info("compiling %s with %s, once (about 2 s; kept in %s)", _SOURCE.name, compiler, root)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        fresh = Path(folder) / built.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(fresh), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(fresh, built)  # another process may have built it meanwhile: the same file
    return built


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library has the bits of ``on_grid`` on numbers that wrong compiler flags spoil."""
    from emulation.formats import scalar_format

    high = torch.arange(65536, dtype=torch.int32) << 16
    x = torch.cat([high, high | 0x8000, high - 1]).view(torch.float32)  # all of bfloat16, midpoints, just below
    key = torch.tensor(7)
    noise = hash_bits(index_products(len(x), x.device), key)
    out = torch.empty_like(x)
    for name in ("float8_e4m3fn", "float4_e3m0", "bfloat16", "int8"):
        fmt = scalar_format(name)
        for rounding in ROUNDINGS:
            form = kernel_format(fmt, rounding)
            if form is None:
                continue
            wanted = on_grid(x, fmt, rounding, "saturate", noise)
            library.flat(
                x.data_ptr(), out.data_ptr(), ctypes.byref(_format(form)), 0, len(x), 0, key.data_ptr(), len(x)
            )
            same = (wanted.view(torch.int32) == out.view(torch.int32)) | (wanted.isnan() & out.isnan())
            if not bool(same.all()):
                return False
    return True
