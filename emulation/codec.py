"""Tensors onto a format's grid, into its codes and back: no scales, no hidden randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from emulation import fused
from emulation.errors import InputError, suggestion
from emulation.formats import Format, NumberFormat, scalar_format
from emulation.kernel_formats import kernel_format
from emulation.random_bits import derive_keys as derive_keys
from emulation.random_bits import hash_bits, index_products, key_from
from emulation.rounding import OVERFLOWS, ROUNDINGS, Overflow, Rounding, on_grid

CHUNK = 1 << 17
"""Elements worked on at a time on the CPU: temporaries stay in cache; fresh memory costs more than arithmetic."""

Backend = Literal["exact", "torch", "qtorch"]
BACKENDS: tuple[Backend, ...] = ("exact", "torch", "qtorch")

_FLOATS = {torch.float16: (10, -14, 15), torch.bfloat16: (7, -126, 127), torch.float32: (23, -126, 127)}


def round_to(
    x: Tensor,
    fmt: str | Format,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    *,
    random_bits: int | None = None,
    keys: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "exact",
) -> Tensor:
    """Rounds every element to a value of the format.

    Signed zero is kept where the format has it. Ties of ``nearest_even`` go to the even code (for ``float8_e8m0fnu``
    up, as in torch and ml_dtypes). Stochastic rounding is a pure function of (key, element index): the same bits on
    any device and thread count, eager or compiled.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides; never changed.
        fmt: name, alias or format of a scalar format.
        rounding: ``nearest_even``, ``nearest_away``, ``toward_zero`` or ``stochastic``.
        overflow: ``saturate`` (infinities too) to the largest value, or ``nonfinite``: infinity where the format has
            it, else NaN, else saturation, as ml_dtypes does.
        generator: one key is drawn from it for stochastic rounding; the index is that of the element in C order.
        random_bits: how many random bits a stochastic rounding uses (hardware: 8); None: as many as matter.
        keys: instead of a generator: int64 [B], one per index of dim 0, the index then counting inside it; or 0-d.
        out: receives the result; the shape, dtype and device of ``x``.
        backend: ``exact``: the fastest of those with the same bits: C on the CPU (it compiles at first use, in
            seconds), else torch's operations; ``torch``: those alone; ``qtorch``: qtorch's own kernels, which compile
            at first use and are not bit-exact: ties of nearest go away from zero, overflow saturates, random bits
            cannot be seeded.

    Returns:
        Same shape, dtype and strides as ``x``. Its gradient is passed straight through.

    Raises:
        InputError: the format's values do not fit the dtype of ``x``; NaN for a format that has none (not looked for in
            compiled code, under vmap, on meta tensors and while a CUDA graph is captured, where NaN stays NaN; on a
            GPU looking for it waits for the result); no random bits for stochastic rounding.
    """
    number = scalar_format(fmt)
    check_rounding(rounding, overflow, random_bits)
    check_input(x, number, out)
    if check_backend(backend) == "qtorch":
        rounded = by_qtorch(x, number, rounding, generator, keys)
        rounded = straight_through(x, rounded) if x.requires_grad else rounded
        return rounded if out is None else out.copy_(rounded)
    key = rounding_keys(x, rounding, generator, keys)
    if torch.is_grad_enabled() and x.requires_grad:
        if out is not None:
            raise InputError("out= with an x that requires a gradient", hint="leave out= away, or use torch.no_grad()")
        rounded = _round(x.detach(), number, rounding, overflow, key, random_bits, backend, None)
        return straight_through(x, rounded)
    if not x.numel():
        return x.clone() if out is None else out
    return _round(x, number, rounding, overflow, key, random_bits, backend, out)


def _round(
    x: Tensor,
    fmt: NumberFormat,
    rounding: Rounding,
    overflow: Overflow,
    key: Tensor | None,
    random_bits: int | None,
    backend: Backend,
    out: Tensor | None,
) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        rounded = _round(x.float(), fmt, rounding, overflow, key, random_bits, backend, None).to(x.dtype)
        return rounded if out is None else out.copy_(rounded)
    refuse_nan = not fmt.has_nan and is_concrete(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    source = x.detach().contiguous()
    target = out if out is not None and out.is_contiguous() and not (refuse_nan and out is x) else None
    done, nan_seen = False, None
    if backend == "exact" and fusable(source):
        target = fused.empty_like(source) if target is None else target
        form = kernel_format(fmt, rounding, overflow, random_bits)
        nan_seen = fused.round_flat(source, target, form, key, looks_for_nan=refuse_nan)
        done = nan_seen is not None
    if refuse_nan and not done:
        nan_seen = bool(source.amax().isnan())
    if refuse_nan and nan_seen:
        raise InputError(f"NaN in x, and format {fmt.name!r} has none", hint="remove it first, or use a Quantizer")
    if not done:
        shape = (len(x), -1) if key is not None and key.dim() else (-1,)
        flat = source.view(shape)
        for where, noise in pieces(source, tuple(flat.shape), key):
            part = on_grid(flat[where], fmt, rounding, overflow, noise, random_bits)
            if not where and target is None:  # the only piece
                target = part.view(x.shape)
                break
            target = torch.empty_like(source) if target is None else target
            target.view(shape)[where] = part
    assert target is not None
    if out is not None:
        return out if target is out else out.copy_(target)
    return target if source.stride() == x.stride() else torch.empty_like(x).copy_(target)


def encode(
    x: Tensor,
    fmt: str | Format,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    *,
    random_bits: int | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """The codes of ``round_to(x, fmt, ...)``.

    Returns:
        uint8 of the shape of ``x`` (uint16 for formats of 9 to 16 bits, uint32 above), one code an element.

    Raises:
        InputError: as ``round_to``.
    """
    number = scalar_format(fmt)
    wide = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    q = round_to(wide, number, rounding, overflow, generator, random_bits=random_bits, keys=keys)
    return codes_of(q.float(), number)


def codes_of(q: Tensor, fmt: NumberFormat) -> Tensor:
    """The codes of float32 values that are on the grid already (NaN without a code becomes zero)."""
    is_int = fmt.kind == "int"
    codes = torch.nan_to_num(q).to(torch.int32) & (fmt.code_count - 1) if is_int else _float_codes(q, fmt)
    if fmt.bits <= 8:
        return codes.to(torch.uint8)
    return codes.to(torch.int16).view(torch.uint16) if fmt.bits <= 16 else codes.view(torch.uint32)


def _float_codes(q: Tensor, fmt: NumberFormat) -> Tensor:
    bits = q.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    drop = 23 - fmt.mantissa_bits
    if fmt.kind == "exponent":
        doubled = q.double().view(torch.int64) >> 52  # 2^-127 is subnormal in float32
        codes = (doubled - (1023 + fmt.min_exponent)).to(torch.int32)
    elif fmt.min_exponent == -126:
        codes = magnitude >> drop
    else:
        normal = (magnitude >> drop) - ((126 + fmt.min_exponent) << fmt.mantissa_bits)
        small = (q.abs().double() / fmt.min_subnormal).clamp(max=2.0**24).to(torch.int32)
        codes = torch.where(q.abs() < fmt.min_normal, small, normal)
    top = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    if fmt.specials == "ieee":
        infinity = top - ((1 << fmt.mantissa_bits) - 1)
        codes = torch.where(torch.isinf(q), infinity, codes)
        nan = infinity | (1 << max(fmt.mantissa_bits - 1, 0))
    else:
        nan = {"nan": top, "fnuz": 1 << (fmt.bits - 1), "none": 0}[fmt.specials]
    codes = torch.where(torch.isnan(q), nan, codes)
    if not fmt.signed:
        return codes
    sign = -(1 << 31) if fmt.bits == 32 else 1 << (fmt.bits - 1)
    return codes | ((bits >> 31) & sign)


def decode(codes: Tensor, fmt: str | Format) -> Tensor:
    """The float32 values of codes.

    Args:
        codes: of any integer dtype that holds them.
        fmt: name, alias or format of a scalar format.

    Raises:
        InputError: codes of a floating-point dtype.
    """
    number = scalar_format(fmt)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"codes of dtype={codes.dtype}", hint="codes are integers, as encode gives them")
    if number.bits > 16 or number.name == "bfloat16":
        drop = 23 - number.mantissa_bits
        if number.min_exponent != -126 or number.specials != "ieee":
            raise InputError(f"format {number.name!r} of {number.bits} bits cannot be decoded")
        return (codes.to(torch.int64) << drop).to(torch.int32).view(torch.float32)
    return _values(number).to(codes.device)[codes.to(torch.int64)]


@lru_cache(maxsize=64)
def _values(fmt: NumberFormat) -> Tensor:
    return torch.tensor([value for _, value in fmt.values()], dtype=torch.float32)


# --- what the quantizer shares -----------------------------------------------------------------------------------


def check_backend(backend: str) -> Backend:
    """Refuses unknown backends."""
    for known in BACKENDS:
        if backend == known:
            return known
    raise InputError(f"unknown backend={backend!r}", hint=suggestion(str(backend), BACKENDS))


def by_qtorch(
    x: Tensor, fmt: NumberFormat, rounding: Rounding, generator: torch.Generator | None, keys: Tensor | None
) -> Tensor:
    """``x`` rounded by qtorch's kernels."""
    if generator is not None or keys is not None:
        raise InputError("backend='qtorch' with generator= or keys=", hint="qtorch's random bits cannot be seeded")
    from emulation.qtorch_backend import qtorch_round

    return qtorch_round(x, fmt, "nearest" if rounding in ("nearest_even", "nearest_away") else rounding)


def check_rounding(rounding: str, overflow: str, random_bits: int | None) -> None:
    """Refuses unknown modes."""
    if rounding not in ROUNDINGS:
        raise InputError(f"unknown rounding={rounding!r}", hint=suggestion(str(rounding), ROUNDINGS))
    if overflow not in OVERFLOWS:
        raise InputError(f"unknown overflow={overflow!r}", hint=suggestion(str(overflow), OVERFLOWS))
    if random_bits is not None and (type(random_bits) is not int or not 1 <= random_bits <= 32):
        raise InputError(f"random_bits={random_bits!r}", hint="a whole number from 1 to 32 is allowed")


def check_input(x: Tensor, fmt: NumberFormat, out: Tensor | None) -> None:
    """Refuses dtypes that cannot hold the format's values, sparse tensors, and an ``out`` that is not like ``x``."""
    if x.layout != torch.strided:
        raise InputError(f"x of layout={x.layout}", hint="dense tensors are allowed: x.to_dense()")
    if x.dtype != torch.float64:
        if x.dtype not in _FLOATS:
            raise InputError(f"x of dtype={x.dtype}", hint="float16, bfloat16, float32 and float64 are allowed")
        if not _fits(fmt, x.dtype):
            raise InputError(
                f"x of dtype={x.dtype} cannot hold the values of {fmt.name!r}", hint="convert it to float32 first"
            )
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise InputError(
            f"out of shape={tuple(out.shape)}, dtype={out.dtype}, device={out.device}",
            hint=f"it must be as x: {tuple(x.shape)}, {x.dtype}, {x.device}",
        )


@lru_cache(maxsize=256)
def _fits(fmt: NumberFormat, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the format's values, or the format the dtype's."""
    mantissa, low, high = _FLOATS[dtype]
    smallest = fmt.min_exponent - (0 if fmt.kind != "float" else fmt.mantissa_bits)
    holds = fmt.mantissa_bits <= mantissa and low - mantissa <= smallest and fmt.max_exponent <= high
    return holds or (fmt.mantissa_bits >= mantissa and fmt.min_exponent <= low and fmt.max_exponent >= high)


def rounding_keys(
    x: Tensor, rounding: Rounding, generator: torch.Generator | None, keys: Tensor | None
) -> Tensor | None:
    """The int64 keys of a stochastic rounding, 0-d or one per index of dim 0; None for the other roundings."""
    if rounding != "stochastic":
        return None
    if keys is None:
        if generator is None:
            raise InputError("rounding='stochastic' without random bits", hint="give generator= or keys=")
        return key_from(generator, x.device)
    if keys.dtype != torch.int64 or (keys.dim() and (not x.dim() or keys.shape != x.shape[:1])):
        raise InputError(
            f"keys of shape={tuple(keys.shape)}, dtype={keys.dtype}", hint="int64 [len(x)], or 0-d: see derive_keys"
        )
    return keys.to(x.device)


def is_concrete(x: Tensor) -> bool:
    """Whether the values can be looked at: not while compiling, not under vmap, not on meta tensors."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def fusable(x: Tensor) -> bool:
    """Whether a fused kernel can read ``x``, if it is C-contiguous."""
    return x.dtype == torch.float32 and x.numel() > 0 and x.device.type in ("cpu", "cuda") and is_concrete(x)


def pieces(x: Tensor, shape: tuple[int, ...], keys: Tensor | None) -> Iterator[tuple[tuple[slice, ...], Tensor | None]]:
    """Where to find, in ``x`` seen as ``shape``, pieces to work on one after the other, each with its random bits.

    Args:
        x: large tensors of the CPU are cut into pieces that stay in the cache; others are one piece.
        shape: a view of ``x`` in C order; with one key per example, dim 0 is the examples.
        keys: as ``rounding_keys`` gives them.
    """
    limit = CHUNK if x.device.type == "cpu" and is_concrete(x) else max(x.numel(), 1)
    if keys is None:
        for where, _ in _split(shape, limit):
            yield where, None
        return
    per_example = keys.dim() > 0
    length = x.numel() // shape[0] if per_example else x.numel()
    products = index_products(min(length, limit), x.device)
    spread = keys.view(-1, *[1] * (len(shape) - 1)) if per_example else keys
    for where, offset in _split(shape, limit):
        size = [len(range(*part.indices(n))) for part, n in zip(where, shape, strict=False)] + list(shape[len(where) :])
        if per_example:
            offset, size[0], key = offset % length, 1, spread[where[:1]]
        else:
            key = keys
        yield where, hash_bits(products[: math.prod(size)].view(size), key, offset)


def _split(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Slices of contiguous pieces of at most ``limit`` elements, each with the flat index of its first."""
    count = math.prod(shape)
    if count <= limit:
        yield (), 0
        return
    inner = count // shape[0]
    if inner <= limit:
        step = limit // inner
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),), start * inner
        return
    for start in range(shape[0]):
        for rest, offset in _split(shape[1:], limit):
            yield (slice(start, start + 1), *rest), start * inner + offset


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rounded: Tensor, mask: Tensor | None) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.mask = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.mask is None else grad * ctx.mask, None, None


def straight_through(x: Tensor, rounded: Tensor, mask: Tensor | None = None) -> Tensor:
    """``rounded`` with the gradient of ``x``, kept only where ``mask`` is true."""
    result: Tensor = _StraightThrough.apply(x, rounded, mask)
    return result
