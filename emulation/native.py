"""The codec's arithmetic as one pass of C, for the CPU: the same bits as with torch's operations, near memory speed.

Never needed to be right: without a C compiler, or where the self-test finds a difference, torch's operations are used.
The source (quantize.c) compiles at first use, in about two seconds, and the result is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
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

from emulation.formats import NumberFormat, ScaleRule
from emulation.random_bits import hash_bits, index_products
from emulation.rounding import Overflow, Rounding, on_grid

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("quantize.c")
# no contraction, no reordering: the two -fno flags change neither values nor signs
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_FLAGS = ("-O3", "-march=native", *_EXACT, "-std=c11", "-shared", "-fPIC")
_PER_THREAD = 1 << 18
_RULES: tuple[ScaleRule, ...] = ("none", "max", "pow2", "floor", "rceil", "nvfp4")
_ROUNDINGS: tuple[Rounding, ...] = ("nearest_even", "stochastic")
_MAGIC, _BITS, _INTEGER, _IDENTITY = range(4)


class _Format(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_float)
            for name in ("low", "high", "max_value", "special", "min_normal", "inverse_max", "full")
        ),
        *((name, ctypes.c_int32) for name in ("kind", "stochastic", "rule", "mantissa_bits", "min_exponent")),
        *((name, ctypes.c_int32) for name in ("max_exponent", "draw_bits", "keeps_sign")),
    ]


def round_flat(
    x: Tensor,
    out: Tensor,
    fmt: NumberFormat,
    rounding: Rounding,
    overflow: Overflow,
    key: Tensor | None,
    random_bits: int | None,
    rule: ScaleRule = "none",
) -> bool | None:
    """``x`` onto the grid of ``fmt`` in ``out``, one scale for all of it by ``rule``.

    Args:
        x: float32 of the CPU, C-contiguous; ``out`` the same, it may be ``x`` itself.
        fmt, rounding, overflow, random_bits: as for ``on_grid``.
        key: None, or int64: 0-d, or one for each index of dim 0.
        rule: of the scale, found from the largest magnitude of all of ``x``.

    Returns:
        Whether there was a NaN; None where C cannot do it, and nothing was done.
    """
    library = _usable(fmt, rounding)
    if library is None:
        return None
    arguments = _format(fmt, rounding, overflow, random_bits, rule, 0.0)
    key, per_key = _keys(key, x)
    source, target, keys = x.data_ptr(), out.data_ptr(), key.data_ptr()
    top = 0 if rule == "none" else int(_largest(library, x, 1))
    nan = [0]

    def work(first: int, last: int) -> None:
        form = ctypes.byref(arguments)
        nan.append(library.flat(source, target, form, first, last, top, keys, per_key))

    _in_threads(work, x.numel(), 1)
    return any(nan)


def quantize_blocks(
    x: Tensor,
    out: Tensor,
    fmt: NumberFormat,
    scale: NumberFormat,
    rule: ScaleRule,
    rounding: Rounding,
    key: Tensor | None,
    random_bits: int | None,
    *,
    shape: tuple[int, int, int],
    size: int,
    units: int = 1,
) -> bool:
    """Fake-quantizes ``x``, one scale per block and column; False where C cannot do it.

    Args:
        x: float32 of the CPU, C-contiguous; ``out`` the same.
        fmt: of the elements.
        scale: of the scales.
        rule: of the scales; ``nvfp4`` takes the largest magnitude of every unit as well.
        rounding, key, random_bits: as for ``round_flat``.
        shape: that ``x`` is seen as: lines, elements along a line, columns.
        size: elements of a block along a line; a line's last block may be shorter.
        units: equal parts of ``x`` that have a scale of their own above the blocks'.
    """
    library = _usable(fmt, rounding)
    if library is None or (rule == "max" and scale.name != "float32"):
        return False
    lines, length, inner = shape
    count = lines * -(-length // size)
    full = fmt.max_value * scale.max_value if rule == "nvfp4" else 0.0
    form = ctypes.byref(_format(fmt, rounding, "saturate", random_bits, rule, full))
    of_scales = scale if rule == "nvfp4" else fmt
    scale_form = ctypes.byref(_format(of_scales, "nearest_even", "saturate", None, "none", 0.0))
    tops = _largest(library, x, units) if rule == "nvfp4" else _no_tops()
    key, per_key = _keys(key, x)
    source, target, top, keys = x.data_ptr(), out.data_ptr(), tops.data_ptr(), key.data_ptr()

    def work(first: int, last: int) -> None:
        library.blocks(
            source, target, form, scale_form, first, last, length, size, inner, top, count // units, keys, per_key
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


def _usable(fmt: NumberFormat, rounding: Rounding) -> ctypes.CDLL | None:
    if rounding not in _ROUNDINGS or _kind(fmt) is None:
        return None
    return _library()


def _kind(fmt: NumberFormat) -> int | None:
    """How quantize.c rounds to a format; None: it does not."""
    if fmt.kind == "exponent":
        return None
    if fmt.kind == "int":
        return _INTEGER
    if fmt.mantissa_bits == 23:
        return _IDENTITY
    if fmt.mantissa_bits <= 21 and fmt.min_exponent >= -100 and fmt.max_exponent <= 100:
        return _MAGIC
    return _BITS if fmt.min_exponent == -126 else None


@lru_cache(maxsize=256)
def _format(
    fmt: NumberFormat, rounding: Rounding, overflow: Overflow, random_bits: int | None, rule: ScaleRule, full: float
) -> _Format:
    beyond = overflow == "nonfinite" and (fmt.has_inf or fmt.has_nan)
    kind = _kind(fmt)
    high = fmt.max_value
    if beyond:
        high = math.ldexp(1.0, fmt.max_exponent + 2) if kind == _MAGIC else math.inf
    places = 24 if kind == _INTEGER else 23 - fmt.mantissa_bits
    return _Format(
        low=fmt.min_value if kind == _INTEGER else -high,
        high=high,
        max_value=fmt.max_value,
        special=math.inf if fmt.has_inf else math.nan,
        min_normal=fmt.min_normal,
        inverse_max=1.0 / fmt.max_value,
        full=full,
        kind=kind,
        stochastic=rounding == "stochastic",
        rule=_RULES.index(rule),
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=fmt.min_exponent,
        max_exponent=fmt.max_exponent,
        draw_bits=places if random_bits is None else min(random_bits, places),
        keeps_sign=fmt.has_negative_zero,
    )


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
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpquant"
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:
        writable = False
    built = root / f"quantize-{digest}.so"
    if built.exists():
        return built
    if not writable:
        root = Path(tempfile.mkdtemp(prefix="dpquant-"))
        built = root / built.name
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
        for rounding in _ROUNDINGS:
            wanted = on_grid(x, fmt, rounding, "saturate", noise)
            arguments = _format(fmt, rounding, "saturate", None, "none", 0.0)
            library.flat(x.data_ptr(), out.data_ptr(), ctypes.byref(arguments), 0, len(x), 0, key.data_ptr(), len(x))
            same = (wanted.view(torch.int32) == out.view(torch.int32)) | (wanted.isnan() & out.isnan())
            if not bool(same.all()):
                return False
    return True
