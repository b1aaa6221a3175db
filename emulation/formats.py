"""Number formats as data: every format is a few integers, and everything else about it is derived from them.

Sources: OCP 8-bit Floating Point (OFP8) and Microscaling (MX) specifications v1.0; the FNUZ formats of
arXiv 2206.02915; E3M0 of LUQ (arXiv 2112.10769); NVFP4 of arXiv 2509.25149. Names are those of torch and ml_dtypes.
This module imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from emulation.errors import InputError, suggestion

Kind = Literal["float", "int", "exponent"]
Specials = Literal["ieee", "nan", "fnuz", "none"]
ScaleRule = Literal["none", "max", "pow2", "floor", "rceil", "nvfp4"]

KINDS: tuple[Kind, ...] = ("float", "int", "exponent")
SPECIALS: tuple[Specials, ...] = ("ieee", "nan", "fnuz", "none")
SCALE_RULES: tuple[ScaleRule, ...] = ("none", "max", "pow2", "floor", "rceil", "nvfp4")


def _check_choice(field: str, value: object, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise InputError(f"format {name!r}: {field}={value!r}", hint=suggestion(str(value), allowed))


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A scalar number format: sign, exponent and mantissa bits, and which codes are not numbers.

    A code of kind ``float`` with sign s, exponent field E and mantissa field M is (-1)^s 2^(E - bias) (1 + M / 2^m), or
    (-1)^s 2^(1 - bias) M / 2^m where E is 0. Kind ``int`` is two's complement with ``mantissa_bits`` bits beside the
    sign. Kind ``exponent`` is an unsigned power of two 2^(E - bias) with no zero, its last code NaN (the MX scale).

    Args:
        name: what the format is called.
        exponent_bits: 1 to 8; 0 for kind ``int``.
        mantissa_bits: 0 to 23, the implicit bit not counted; 0 for kind ``exponent``.
        bias: the exponent's bias; None is 2^(exponent_bits - 1) - 1.
        kind: ``float``, ``int`` or ``exponent``.
        specials: ``ieee``: the top exponent holds infinities and NaNs; ``nan``: only the all-ones code is NaN, no
            infinity; ``fnuz``: the code of negative zero is the one NaN; ``none``: every code is a number.

    Raises:
        InputError: the integers describe no format, or one with values outside float32.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    kind: Kind = "float"
    specials: Specials = "none"

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, KINDS, self.name)
        _check_choice("specials", self.specials, SPECIALS, self.name)
        for field, low, high in self._ranges():
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                raise InputError(
                    f"format {self.name!r}: {field}={value!r}", hint=f"a whole number from {low} to {high} is allowed"
                )
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0)
        elif type(self.bias) is not int:
            raise InputError(f"format {self.name!r}: bias={self.bias!r}", hint="a whole number is allowed")
        if self.kind != "float" and self.specials != {"int": "none", "exponent": "nan"}[self.kind]:
            raise InputError(
                f"format {self.name!r}: specials={self.specials!r} with kind={self.kind!r}",
                hint="kind 'int' has specials 'none', kind 'exponent' has specials 'nan'",
            )
        if self.max_exponent < self.min_exponent:
            raise InputError(
                f"format {self.name!r}: specials={self.specials!r} leaves no normal number", hint="add an exponent bit"
            )
        if self.max_exponent > 127 or math.frexp(self.min_subnormal)[1] < -148:
            raise InputError(f"format {self.name!r}: values outside float32", hint="move the bias towards the middle")

    def _ranges(self) -> tuple[tuple[str, int, int], ...]:
        if self.kind == "int":
            return ("exponent_bits", 0, 0), ("mantissa_bits", 1, 15)
        return ("exponent_bits", 1, 8), ("mantissa_bits", 0, 0 if self.kind == "exponent" else 23)

    @property
    def _bias(self) -> int:
        assert self.bias is not None  # filled in by __post_init__
        return self.bias

    @property
    def signed(self) -> bool:
        """Whether there are negative values."""
        return self.kind != "exponent"

    @property
    def is_integer(self) -> bool:
        """Whether the values are the integers of a range."""
        return self.kind == "int"

    @property
    def has_inf(self) -> bool:
        """Whether there are codes for infinities."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether there is a code for NaN."""
        return self.specials == "nan" or self.specials == "fnuz" or (self.specials == "ieee" and self.mantissa_bits > 0)

    @property
    def has_zero(self) -> bool:
        """Whether zero has a code."""
        return self.kind != "exponent"

    @property
    def has_negative_zero(self) -> bool:
        """Whether the sign of a zero is kept."""
        return self.kind == "float" and self.specials != "fnuz"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def bits_per_element(self) -> float:
        """Bits of storage for one number, as a BlockFormat has it."""
        return float(self.bits)

    @property
    def code_count(self) -> int:
        """Number of codes, specials included."""
        return 1 << self.bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (of 1 for integers)."""
        return {"float": 1 - self._bias, "int": 0, "exponent": -self._bias}[self.kind]

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number: floor(log2(max_value))."""
        if self.kind == "int":
            return self.mantissa_bits - 1
        reserved = self.specials == "ieee" or (self.specials == "nan" and self.mantissa_bits == 0)
        return (1 << self.exponent_bits) - 1 - reserved - self._bias

    @property
    def max_value(self) -> float:
        """The largest finite value."""
        if self.kind == "int":
            return 2.0**self.mantissa_bits - 1
        missing = 1 + (self.specials == "nan" and self.mantissa_bits > 0)
        return math.ldexp(2.0 - missing * 2.0**-self.mantissa_bits, self.max_exponent)

    @property
    def min_value(self) -> float:
        """The lowest finite value."""
        if self.kind == "int":
            return -(2.0**self.mantissa_bits)
        return -self.max_value if self.signed else self.min_subnormal

    @property
    def min_normal(self) -> float:
        """The smallest positive number with full precision (1 for integers)."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number."""
        return self.min_normal if self.kind == "int" else math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """The step from 1 to the next number (as torch.finfo.eps)."""
        return 1.0 if self.kind == "int" else 2.0**-self.mantissa_bits

    def value(self, code: int) -> float:
        """The number that a code stands for, from the definition: infinities and NaN included."""
        if not 0 <= code < self.code_count:
            raise InputError(f"format {self.name!r}: code={code!r}", hint=f"codes are 0 to {self.code_count - 1}")
        if self.kind == "int":
            return float(code - self.code_count if code >> self.mantissa_bits else code)
        negative = self.signed and bool(code >> (self.bits - 1))
        magnitude = code & ((1 << (self.exponent_bits + self.mantissa_bits)) - 1)
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        top = exponent == 2**self.exponent_bits - 1
        if self.specials == "ieee" and top:
            return math.nan if mantissa else (-math.inf if negative else math.inf)
        if self.specials == "nan" and top and mantissa == 2**self.mantissa_bits - 1:
            return math.nan
        if self.specials == "fnuz" and negative and magnitude == 0:
            return math.nan
        if self.kind == "exponent":
            return math.ldexp(1.0, exponent - self._bias)
        significand = mantissa + (2**self.mantissa_bits if exponent else 0)
        result = math.ldexp(float(significand), max(exponent, 1) - self._bias - self.mantissa_bits)
        return -result if negative else result

    def values(self) -> list[tuple[int, float]]:
        """Every code with its value, in order of codes; formats of at most 16 bits."""
        if self.bits > 16:
            raise InputError(f"format {self.name!r}: {self.code_count} codes are too many to list")
        return [(code, self.value(code)) for code in range(self.code_count)]

    def to_qtorch(self) -> Any:
        """The qtorch number of this format: ``FloatingPoint(exp, man)``, or ``FixedPoint(wl, 0)`` for integers.

        qtorch's numbers have no specials: its FloatingPoint uses every code for a finite value, so a round trip gives
        back the table's format of these bits (``float8_e4m3fn`` for exp=4, man=3), not always the same one.

        Raises:
            InputError: qtorch has no such number (unsigned, or a bias of its own).
        """
        from qtorch import FixedPoint, FloatingPoint

        if self.kind == "int":
            integer = FixedPoint(wl=self.bits, fl=1)  # the constructor refuses fl=0, which the kernels handle well
            integer.fl = 0
            return integer
        if self.kind != "float" or self._bias != 2 ** (self.exponent_bits - 1) - 1:
            raise InputError(
                f"format {self.name!r}: qtorch has no number with bias={self.bias} of kind={self.kind!r}",
                hint="a qtorch FloatingPoint is signed and has bias 2^(exp - 1) - 1",
            )
        # the constructor refuses man=0, which qtorch's kernels handle well
        number = FloatingPoint(exp=self.exponent_bits, man=max(self.mantissa_bits, 1))
        number.man = self.mantissa_bits
        return number


@dataclass(frozen=True)
class BlockFormat:
    """Elements of one format that share scales of another: value = element * scale.

    Args:
        name: what the format is called.
        element: the format of the elements.
        block_size: consecutive elements that share one scale; None: no blocks, one scale per granularity unit.
        scale: the format of the scales.
        scale_rule: how a scale comes from the largest magnitude: ``max``: it over the largest element; ``pow2``: that,
            rounded up to a power of two; ``floor``: OCP MX; ``rceil``: NVIDIA's MX; ``nvfp4``: NVIDIA's two levels.
        tensor_scale: whether a float32 scale stands above the block scales.
    """

    name: str
    _: KW_ONLY
    element: NumberFormat
    block_size: int | None
    scale: NumberFormat
    scale_rule: ScaleRule
    tensor_scale: bool = False

    def __post_init__(self) -> None:
        _check_choice("scale_rule", self.scale_rule, SCALE_RULES, self.name)
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size < 1):
            raise InputError(f"format {self.name!r}: block_size={self.block_size!r}", hint="a positive whole number")
        if not isinstance(self.element, NumberFormat) or self.element.kind == "exponent":
            raise InputError(f"format {self.name!r}: element={self.element!r}", hint="a float or int format is allowed")

    @property
    def bits(self) -> int:
        """Bits of one element's code, scales not counted."""
        return self.element.bits

    @property
    def bits_per_element(self) -> float:
        """Bits of storage for one element, its share of the block's scale included."""
        return self.element.bits + (self.scale.bits / self.block_size if self.block_size else 0.0)


Format = NumberFormat | BlockFormat


def _float(
    name: str, exponent_bits: int, mantissa_bits: int, specials: Specials, bias: int | None = None
) -> NumberFormat:
    return NumberFormat(
        name=name, exponent_bits=exponent_bits, mantissa_bits=mantissa_bits, specials=specials, bias=bias
    )


_SCALARS = (
    _float("float4_e2m1fn", 2, 1, "none"),
    _float("float4_e3m0", 3, 0, "none"),
    _float("float6_e2m3fn", 2, 3, "none"),
    _float("float6_e3m2fn", 3, 2, "none"),
    _float("float8_e4m3fn", 4, 3, "nan"),
    _float("float8_e5m2", 5, 2, "ieee"),
    _float("float8_e4m3fnuz", 4, 3, "fnuz", 8),
    _float("float8_e5m2fnuz", 5, 2, "fnuz", 16),
    _float("float8_e4m3", 4, 3, "ieee"),
    _float("float8_e3m4", 3, 4, "ieee"),
    NumberFormat(name="float8_e8m0fnu", exponent_bits=8, mantissa_bits=0, kind="exponent", specials="nan"),
    _float("bfloat16", 8, 7, "ieee"),
    _float("float16", 5, 10, "ieee"),
    _float("tfloat32", 8, 10, "ieee"),
    _float("float32", 8, 23, "ieee"),
    NumberFormat(name="int8", exponent_bits=0, mantissa_bits=7, kind="int"),
    NumberFormat(name="int4", exponent_bits=0, mantissa_bits=3, kind="int"),
)
_BY_NAME = {fmt.name: fmt for fmt in _SCALARS}


def _mx(name: str, element: str) -> BlockFormat:
    e8m0 = _BY_NAME["float8_e8m0fnu"]
    return BlockFormat(name, element=_BY_NAME[element], block_size=32, scale=e8m0, scale_rule="floor")


_BLOCKS = (
    _mx("mxfp8_e4m3", "float8_e4m3fn"),
    _mx("mxfp8_e5m2", "float8_e5m2"),
    _mx("mxfp6_e2m3", "float6_e2m3fn"),
    _mx("mxfp6_e3m2", "float6_e3m2fn"),
    _mx("mxfp4_e2m1", "float4_e2m1fn"),
    BlockFormat(
        "nvfp4",
        element=_BY_NAME["float4_e2m1fn"],
        block_size=16,
        scale=_BY_NAME["float8_e4m3fn"],
        scale_rule="nvfp4",
        tensor_scale=True,
    ),
    BlockFormat(
        "luq_fp4",
        element=_BY_NAME["float4_e3m0"],
        block_size=None,
        scale=_BY_NAME["float32"],
        scale_rule="max",
    ),
)

FORMATS: Mapping[str, Format] = MappingProxyType({fmt.name: fmt for fmt in (*_SCALARS, *_BLOCKS)})
"""Every format by its canonical name."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "fp32": "float32",
        "tf32": "tfloat32",
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp8": "float8_e4m3fn",
        "e4m3": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
        "fp6": "float6_e3m2fn",
        "fp4": "float4_e2m1fn",
        "e2m1": "float4_e2m1fn",
        "e3m0": "float4_e3m0",
        "mxfp8": "mxfp8_e4m3",
        "mxfp6": "mxfp6_e3m2",
        "mxfp4": "mxfp4_e2m1",
        "int4_luq": "int4",
    }
)
"""Short names for people."""


def get_format(name: str | Format, formats: Mapping[str, Format] = FORMATS) -> Format:
    """The format of a name or an alias; a format object is given back as it is.

    Args:
        name: a key of ``formats`` or of ``ALIASES``, or a format.
        formats: the table; ``FORMATS | formats_from(...)`` where a user adds some.

    Raises:
        InputError: no such format; the hint holds the nearest names.
    """
    if isinstance(name, (NumberFormat, BlockFormat)):
        return name
    if isinstance(name, str):
        found = formats.get(name) or formats.get(ALIASES.get(name, ""))
        if found is not None:
            return found
    raise InputError(f"unknown format {name!r}", hint=suggestion(str(name), [*formats, *ALIASES]))


def scalar_format(name: str | Format) -> NumberFormat:
    """The scalar format of a name; a block format is refused, for it has scales that a scalar operation cannot hold."""
    fmt = get_format(name)
    if isinstance(fmt, BlockFormat):
        raise InputError(
            f"format {fmt.name!r} has block scales", hint=f"use a Quantizer, or its elements: {fmt.element.name!r}"
        )
    return fmt


def from_qtorch(number: Any) -> NumberFormat:
    """The format of a qtorch number: the table's where it has one of these bits, else one with all codes finite.

    Args:
        number: ``FloatingPoint`` (exp, man), or ``FixedPoint`` with no fractional bits, clamped, not symmetric.

    Raises:
        InputError: another kind of number.
    """
    from qtorch import FixedPoint, FloatingPoint

    if isinstance(number, FloatingPoint):
        exponent_bits, mantissa_bits = number.exp, number.man
        for fmt in _SCALARS:
            if fmt.kind == "float" and (fmt.exponent_bits, fmt.mantissa_bits) == (exponent_bits, mantissa_bits):
                return fmt
        name = f"float{1 + exponent_bits + mantissa_bits}_e{exponent_bits}m{mantissa_bits}"
        return _float(name, exponent_bits, mantissa_bits, "ieee" if exponent_bits == 8 else "none")
    if isinstance(number, FixedPoint) and number.fl == 0 and number.clamp and not number.symmetric:
        return NumberFormat(name=f"int{number.wl}", exponent_bits=0, mantissa_bits=number.wl - 1, kind="int")
    raise InputError(
        f"no format for the qtorch number {number!r}", hint="FloatingPoint(exp, man) and FixedPoint(wl, fl=0) have one"
    )


def formats_from(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Format]:
    """Formats that a user describes in YAML: a mapping of names to the fields of NumberFormat or BlockFormat.

    ``{"float5_e3m1": {"exponent_bits": 3, "mantissa_bits": 1}}``; an entry with ``element`` is a block format, whose
    ``element`` and ``scale`` are names (of the table, or described in the same data).

    Raises:
        InputError: an unknown field, a missing or a wrong value.
    """
    found: dict[str, Format] = {}
    blocks = [name for name, entry in data.items() if isinstance(entry, Mapping) and "element" in entry]
    for name in [*(n for n in data if n not in blocks), *blocks]:
        entry = data[name]
        if not isinstance(entry, Mapping):
            raise InputError(f"format {name!r}: {entry!r} is not a mapping of fields")
        if name in FORMATS or name in ALIASES:
            raise InputError(f"format {name!r} is in the table already", hint="choose another name")
        kind = BlockFormat if name in blocks else NumberFormat
        allowed = [field.name for field in fields(kind) if field.name != "name"]
        for key in entry:
            if key not in allowed:
                raise InputError(f"format {name!r}: unknown key {key!r}", hint=suggestion(str(key), allowed))
        arguments = dict(entry)
        if kind is BlockFormat:
            table: dict[str, Format] = {**FORMATS, **found}
            for key in ("element", "scale"):
                if key in arguments:
                    arguments[key] = get_format(arguments[key], table)
        try:
            found[name] = kind(name=name, **arguments)
        except TypeError as error:  # a field without a default is missing
            raise InputError(f"format {name!r}: {str(error).split('() ')[-1]}") from None
    return found
