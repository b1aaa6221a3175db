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
from functools import lru_cache
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
_FLAGS = ("-O2", "-ftree-vectorize", "-march=native", *_EXACT, "-std=gnu11", "-shared", "-fPIC")
_PER_THREAD = 1 << 17
_LARGE = 1 << 23
_PROCESS = os.getpid()


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
    key, per_key = _keys(key, x)
    keys, format = key.data_ptr(), ctypes.byref(_format(form))
    return bool(library.flat(x.data_ptr(), out.data_ptr(), format, x.numel(), keys, per_key, *_team(x.numel())))


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
    format, scale_format = ctypes.byref(_format(form)), ctypes.byref(_format(block_form))
    tops = torch.empty(units, dtype=torch.int32) if RULES[form.rule] == "nvfp4" else _no_tops()
    key, per_key = _keys(key, x)
    library.blocks(
        x.data_ptr(), out.data_ptr(), format, scale_format, lines, length, inner, size, units, tops.data_ptr(),
        key.data_ptr(), per_key, *_team(x.numel()),
    )  # fmt: skip
    return True


def quantize_squares(
    x: Tensor,
    out: Tensor,
    form: KernelFormat,
    block_form: KernelFormat,
    key: Tensor | None,
    shape: tuple[int, int, int, int],
    size: int,
) -> bool:
    """Fake-quantizes ``x``, one scale per square block and column; False where the library is not there, or cannot.

    Args:
        x, out, form, block_form, key: as for :func:`quantize_blocks`; rule ``nvfp4`` takes the largest magnitude of all
            of ``x`` as well.
        shape: that ``x`` is seen as: planes, height and width of each, columns.
        size: elements of a block along height and width; those at the end may be smaller.
    """
    library = _library()
    if library is None:
        return False
    key, per_key = _keys(key, x)
    did = library.squares(
        x.data_ptr(), out.data_ptr(), ctypes.byref(_format(form)), ctypes.byref(_format(block_form)), *shape, size,
        key.data_ptr(), per_key, *_team(x.numel()),
    )  # fmt: skip
    return bool(did)


def usable() -> bool:
    """Whether there is a library."""
    return _library() is not None


def unfold(image: Tensor, out: Tensor, walk: tuple[int, ...], *, rotated: bool = False) -> None:
    """Rows of kernel positions of ``image``, channels innermost; on request 16 at a time rotated, as rotation.py says.

    Args:
        image: float32 of the CPU, [B, height, width, channels], C-contiguous, with the padding around it.
        out: [B, groups, T, kernel * channels / groups], the same; rotated, T is padded to a multiple of 16.
        walk: height, width, channels, groups; then two each of kernel, stride, dilation and positions.
        rotated: whether to rotate.
    """
    library = _library()
    assert library is not None
    numbers = (ctypes.c_int64 * len(walk))(*walk)
    function = library.unfold_and_rotate if rotated else library.unfold
    function(image.data_ptr(), out.data_ptr(), len(image), numbers, *_team(out.numel()))


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, for results: large ones in large pages, which cost a fraction of the usual page faults."""
    result = torch.empty_like(x)
    if x.device.type == "cpu" and result.nbytes >= _LARGE and (library := _library()) is not None:
        library.large_pages(result.data_ptr(), result.nbytes)
    return result


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


def _team(elements: int) -> tuple[int | None, int]:
    """What starts threads, and how many: as many as torch would use."""
    threads = min(torch.get_num_threads(), elements // _PER_THREAD)
    # a forked process has none of OpenMP's threads, and would wait for them for ever
    return (_open_mp(), threads) if threads > 1 and os.getpid() == _PROCESS else (None, 1)


@lru_cache(maxsize=1)
def _open_mp() -> int | None:
    """GOMP_parallel of the OpenMP library that torch has loaded; None where it is another one (macOS)."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


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
    library.flat.argtypes = [pointer, pointer, form, integer, pointer, integer, pointer, ctypes.c_int32]
    library.flat.restype = ctypes.c_int32
    library.blocks.argtypes = [
        pointer, pointer, form, form, *[integer] * 5, pointer, pointer, integer, pointer, ctypes.c_int32,
    ]  # fmt: skip
    library.blocks.restype = None
    library.squares.argtypes = [
        pointer, pointer, form, form, *[integer] * 5, pointer, integer, pointer, ctypes.c_int32,
    ]  # fmt: skip
    library.squares.restype = ctypes.c_int32
    for function in (library.unfold, library.unfold_and_rotate):
        function.argtypes = [pointer, pointer, integer, ctypes.POINTER(integer), pointer, ctypes.c_int32]
        function.restype = None
    library.large_pages.argtypes, library.large_pages.restype = [pointer, integer], None
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
            format = ctypes.byref(_format(form))
            library.flat(x.data_ptr(), out.data_ptr(), format, len(x), key.data_ptr(), len(x), None, 1)
            same = (wanted.view(torch.int32) == out.view(torch.int32)) | (wanted.isnan() & out.isnan())
            if not bool(same.all()):
                return False
    return True
