"""The matrix units of accelerators as data: how each multiplies and adds operands of which formats.

A unit adds a group of products and its accumulator in one step, with fewer bits than float32 arithmetic has: addends
are cut where they stand too far below the largest one. Long sums are chains of such steps. Sources: MMA-Sim (Xie et
al., arXiv 2511.10909), Khattak & Mikaitis (arXiv 2512.07004), and products measured on an H200, which the ``hopper``
rows for FP8, FP16 and BF16 reproduce bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emulation.errors import InputError, suggestion
from emulation.formats import BlockFormat, Format, NumberFormat, get_format

Accumulation = Literal["fast", "precise"]
Arithmetic = Literal["truncated", "block_scaled", "floored", "floored_lanes", "plain"]
SCALE_BLOCKS = {"float8_e8m0fnu": 32, "float8_e4m3fn": 16}  # values along K that share a scale, by the scale's format


@dataclass(frozen=True, kw_only=True)
class MatrixUnit:
    """How one matrix unit multiplies and adds operands of some formats.

    One step adds ``group`` exact products to an accumulator c. A product's exponent is the sum of its operands'
    exponents (floor(log2|x|), not below the format's smallest normal exponent); a zero has none. With E the largest
    exponent of products and c:

    - ``truncated``: all are cut toward zero to a multiple of 2^(E - fraction_bits) and summed; the sum is cut to
      ``result_bits`` fraction bits. Block scales add their exponents to those of the products.
    - ``block_scaled``: sums of 16 products, exact, times the significands of their scales, with the scales' exponents
      alone for alignment, are cut and summed with c in the same way.
    - ``floored``: products are cut toward zero and summed; the sum (31 fraction bits) and c (24) are aligned by floor;
      their sum is rounded to the nearest float32, ties to even. A product of 2^128 or more is infinite.
    - ``floored_lanes``: even and odd products first apart, aligned by floor; c is dropped more than 25 bits below E.
    - ``plain``: no step at all: torch's own float32 product.

    NaN (0x7FFFFFFF) comes from NaN and from opposite infinities; else an infinity wins.

    Args:
        name: the unit.
        operands: names of the operand formats of this row.
        mixed: whether the two operands may have different ones of these formats.
        group: products a step.
        fraction_bits: fraction bits kept of an aligned addend.
        result_bits: fraction bits kept of a step's result.
        arithmetic: the kind of step.
        scales: names of the formats of block scales that the row takes; ``block_scaled`` needs them.
        accumulation: ``fast`` chains all of K; ``precise`` adds chains of ``run`` products in float32.
        run: products a chain, None for all of K.
    """

    name: str
    operands: tuple[str, ...]
    mixed: bool = False
    group: int
    fraction_bits: int
    result_bits: int = 23
    arithmetic: Arithmetic = "truncated"
    scales: tuple[str, ...] = ()
    accumulation: Accumulation = "fast"
    run: int | None = None

    def __post_init__(self) -> None:
        bits = {"truncated": (1, 27), "block_scaled": (1, 40), "plain": (1, 23)}.get(self.arithmetic, (24, 24))
        limits = {"group": (1, 1024), "fraction_bits": bits, "result_bits": (1, 23), "run": (self.group, 1 << 30)}
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise InputError(f"unit {self.name!r}: {field}={value!r}", hint=f"{low} to {high} is allowed")
        if self.arithmetic == "block_scaled" and self.group % 32:
            raise InputError(f"unit {self.name!r}: group={self.group!r}", hint="whole blocks of 32 make a step")
        if self.arithmetic == "truncated" and self.scales and 32 % self.group:
            raise InputError(f"unit {self.name!r}: group={self.group!r}", hint="steps must divide blocks of 32")
        if self.run is not None and self.run % self.group:
            raise InputError(f"unit {self.name!r}: run={self.run!r}", hint=f"a multiple of group={self.group}")

    def takes(self, a_format: str, b_format: str, scale_format: str | None) -> bool:
        """Whether the row is for operands of these formats, block scales of ``scale_format`` included (None: none)."""
        if scale_format is None:
            scaled = self.arithmetic != "block_scaled"
        else:
            scaled = scale_format in self.scales or self.arithmetic == "plain"
        return scaled and {a_format, b_format} <= set(self.operands) and (self.mixed or a_format == b_format)


_SIXTEEN = ("float16", "bfloat16")
_OCP8 = ("float8_e4m3fn", "float8_e5m2")
_FNUZ8 = ("float8_e4m3fnuz", "float8_e5m2fnuz")
_SMALL = (*_OCP8, "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
_ANY = (*_SIXTEEN, *_FNUZ8, *_SMALL, "float8_e4m3", "float8_e3m4", "float4_e3m0", "tfloat32", "float32", "int8", "int4")
_TF32 = ("tfloat32",)
_E8M0 = ("float8_e8m0fnu",)

MATRIX_UNITS: tuple[MatrixUnit, ...] = (
    MatrixUnit(name="volta", operands=("float16",), group=4, fraction_bits=23),
    MatrixUnit(name="turing", operands=("float16",), group=8, fraction_bits=24),
    MatrixUnit(name="ampere", operands=_SIXTEEN, group=8, fraction_bits=24),
    MatrixUnit(name="ampere", operands=_TF32, group=4, fraction_bits=24),
    MatrixUnit(name="ada", operands=_SIXTEEN, group=8, fraction_bits=24),
    MatrixUnit(name="ada", operands=_TF32, group=4, fraction_bits=24),
    MatrixUnit(name="ada", operands=_OCP8, mixed=True, group=16, fraction_bits=13, result_bits=13),
    MatrixUnit(name="hopper", operands=_SIXTEEN, group=16, fraction_bits=25),
    MatrixUnit(name="hopper", operands=_TF32, group=8, fraction_bits=25),
    MatrixUnit(name="hopper", operands=_OCP8, mixed=True, group=32, fraction_bits=13, result_bits=13),
    MatrixUnit(
        name="hopper",
        operands=_OCP8,
        mixed=True,
        group=32,
        fraction_bits=13,
        result_bits=13,
        accumulation="precise",
        run=128,
    ),
    MatrixUnit(name="blackwell", operands=_SIXTEEN, group=16, fraction_bits=25),
    MatrixUnit(name="blackwell", operands=_TF32, group=8, fraction_bits=25),
    MatrixUnit(
        name="blackwell",
        operands=("float4_e2m1fn",),
        group=64,
        fraction_bits=35,
        arithmetic="block_scaled",
        scales=("float8_e8m0fnu", "float8_e4m3fn"),
    ),
    MatrixUnit(name="blackwell", operands=_SMALL, mixed=True, group=32, fraction_bits=25, scales=_E8M0),
    MatrixUnit(name="cdna3", operands=_SIXTEEN, group=8, fraction_bits=24, arithmetic="floored"),
    MatrixUnit(name="cdna3", operands=_FNUZ8, mixed=True, group=16, fraction_bits=24, arithmetic="floored_lanes"),
    MatrixUnit(name="float32", operands=_ANY, mixed=True, group=1, fraction_bits=23, arithmetic="plain"),
)
"""Every unit: a row for each kind of operands."""


def matrix_unit(
    name: str,
    a_format: str | Format,
    b_format: str | Format | None = None,
    scale_format: str | Format | None = None,
    accumulation: Accumulation = "fast",
) -> MatrixUnit:
    """The row of ``MATRIX_UNITS`` for operands of some formats.

    Args:
        name: the unit: volta, turing, ampere, ada, hopper, blackwell, cdna3 or float32.
        a_format, b_format: the operands' formats; of a block format its elements count. ``b_format`` None: as a.
        scale_format: the format of block scales, None where there are none.
        accumulation: ``fast`` or ``precise`` (Hopper FP8).

    Raises:
        InputError: no such unit, or one that has no arithmetic for these operands.
    """
    rows = [row for row in MATRIX_UNITS if row.name == name]
    if not rows:
        raise InputError(
            f"unknown unit={name!r}", hint=suggestion(str(name), dict.fromkeys(r.name for r in MATRIX_UNITS))
        )
    a = element_format(a_format).name
    b = a if b_format is None else element_format(b_format).name
    scale = None if scale_format is None else element_format(scale_format).name
    found = [row for row in rows if row.takes(a, b, scale)]
    if not found:
        kinds = [
            " or ".join(row.operands) + (f" (scales: {' or '.join(row.scales)})" if row.scales else "") for row in rows
        ]
        raise InputError(
            f"unit={name!r} has no product of a_format={a!r} and b_format={b!r} with scale_format={scale!r}",
            hint="it multiplies " + "; ".join(dict.fromkeys(kinds)),
        )
    for row in found:
        if row.accumulation == accumulation:
            return row
    raise InputError(
        f"accumulation={accumulation!r} of unit={name!r} with a_format={a!r}",
        hint="choose from " + ", ".join(row.accumulation for row in found),
    )


def element_format(name: str | Format) -> NumberFormat:
    """The scalar format of a name: of a block format that of its elements."""
    fmt = get_format(name)
    return fmt.element if isinstance(fmt, BlockFormat) else fmt
