"""What a format does to data, and where qtorch's kernels differ from the exact codec."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emulation.codec import round_to
from emulation.errors import InputError, suggestion
from emulation.formats import FORMATS, Format, NumberFormat, scalar_format
from emulation.qtorch_backend import qtorch_round
from emulation.quantizer import Granularity, Quantizer
from emulation.rounding import Rounding

DISTRIBUTIONS = ("normal", "lognormal", "laplace")


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """What is lost when data is quantized to a format.

    Args:
        format: the format's name.
        bits_per_element: storage, shares of block scales included.
        sqnr_db: 10 log10(sum x^2 / sum (q - x)^2); inf where nothing is lost, -inf where x overflows to infinity.
        overflow_share: share of the elements beyond the largest value at their scale.
        underflow_share: share of the elements that are not zero and become zero.
    """

    format: str
    bits_per_element: float
    sqnr_db: float
    overflow_share: float
    underflow_share: float


def rank_formats(
    x: Tensor,
    formats: Iterable[str | Format] | None = None,
    *,
    granularity: Granularity = "tensor",
    rounding: Rounding = "nearest_even",
) -> list[FormatError]:
    """The formats, best signal-to-quantization-noise ratio first, ties by fewer bits.

    Args:
        x: finite data of any floating dtype; block scales run along its last axis.
        formats: names or formats; None: the whole table but scale formats.
        granularity: what shares a scale; see ``Quantizer``.
        rounding: a rounding that needs no random bits.

    Raises:
        InputError: empty data, or NaN or infinities in it.
    """
    if not x.numel():
        raise InputError("no data to rank formats on: x is empty")
    if not bool(torch.isfinite(x).all()):
        raise InputError("NaN or infinity in the data", hint="formats are ranked on finite numbers")
    x = x.detach().float().reshape(1, -1) if x.dim() < 2 else x.detach().float()
    if formats is None:
        formats = [f for f in FORMATS.values() if not (isinstance(f, NumberFormat) and f.kind == "exponent")]
    errors = [_error(x, Quantizer(f, granularity, rounding=rounding)) for f in formats]
    return sorted(errors, key=lambda e: (-e.sqnr_db, e.bits_per_element))


def _error(x: Tensor, quantizer: Quantizer) -> FormatError:
    q = quantizer.fake_quantize(x)
    top = quantizer.element_scale(x) * quantizer.element.max_value
    wide = x.double()
    signal, noise = float(wide.square().sum()), float((q.double() - wide).square_().sum())
    # a few ulps of slack: the largest magnitude over its own scale may be an ulp above the largest element
    over = x.abs() > top * (1 + 2.0**-20)
    return FormatError(
        format=quantizer.format.name,
        bits_per_element=quantizer.format.bits_per_element,
        sqnr_db=_decibels(signal, noise),
        overflow_share=int(over.sum()) / x.numel(),
        underflow_share=int(((x != 0) & (q == 0)).sum()) / x.numel(),
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def sample_data(distribution: str, count: int = 1_000_000, seed: int = 0) -> Tensor:
    """Float32 numbers to try formats on: ``normal`` (0, 1), ``lognormal`` (exp of it) or ``laplace`` (0, 1).

    Returns:
        [count / 1000, 1000], so that formats with block scales have rows to run along.

    Raises:
        InputError: another distribution, or a count that is not a positive multiple of 1000.
    """
    if distribution not in DISTRIBUTIONS:
        raise InputError(f"unknown distribution {distribution!r}", hint=suggestion(str(distribution), DISTRIBUTIONS))
    if count < 1000 or count % 1000:
        raise InputError(f"count={count}", hint="a positive multiple of 1000 is allowed")
    generator = torch.Generator().manual_seed(seed)
    shape = (count // 1000, 1000)
    if distribution == "laplace":
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float().clamp(-40, 40)
    normal = torch.randn(shape, generator=generator)
    return normal.exp() if distribution == "lognormal" else normal


@dataclass(frozen=True, kw_only=True)
class QtorchDifferences:
    """Where qtorch's kernel and the exact codec give different results.

    Args:
        format: the format's name.
        count: how many inputs were tried.
        by_cause: how many differ, by cause; an input counts once, under the first cause that applies.
        examples: by cause, up to three (input, exact result, qtorch's result).
    """

    format: str
    count: int
    by_cause: Mapping[str, int]
    examples: Mapping[str, tuple[tuple[float, float, float], ...]]

    @property
    def differing(self) -> int:
        """How many inputs have different results."""
        return sum(self.by_cause.values())


def qtorch_differences(fmt: str | Format, x: Tensor | None = None) -> QtorchDifferences:
    """Compares qtorch's nearest rounding with the exact ``nearest_even``; overflow as ml_dtypes has it.

    Args:
        fmt: a scalar format that has a qtorch number.
        x: float32 inputs; None: all 65,536 values of bfloat16.

    Raises:
        InputError: as ``qtorch_round``.
    """
    number = scalar_format(fmt)
    if x is None:
        x = (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32)
    x = x.detach().reshape(-1)
    theirs = qtorch_round(x, number, "nearest")
    nan = torch.isnan(x)
    exact = round_to(torch.where(nan, 0.0, x), number, overflow="nonfinite")
    exact = torch.where(nan, math.nan, exact)
    away = round_to(torch.where(nan, 0.0, x), number, "nearest_away", overflow="nonfinite")
    differ = (exact.view(torch.int32) != theirs.view(torch.int32)) & ~(torch.isnan(exact) & torch.isnan(theirs))
    causes = {
        "NaN": nan,
        "infinity": torch.isinf(x),
        "overflow": (exact.abs() > number.max_value) | exact.isnan() | (theirs.abs() > number.max_value),
        "sign of zero": (exact == 0) & (theirs == 0),
        "tie": away == theirs,
        "rounded twice": torch.ones_like(differ),
    }
    by_cause, examples = {}, {}
    for cause, applies in causes.items():
        found = differ & applies
        differ = differ & ~applies
        by_cause[cause] = int(found.sum())
        columns = (x[found][:3].tolist(), exact[found][:3].tolist(), theirs[found][:3].tolist())
        examples[cause] = tuple(zip(*columns, strict=True))
    return QtorchDifferences(format=number.name, count=x.numel(), by_cause=by_cause, examples=examples)
