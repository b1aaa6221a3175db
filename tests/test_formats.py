from __future__ import annotations

import math
import subprocess
import sys

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulation.errors import InputError
from emulation.formats import (
    ALIASES,
    FORMATS,
    BlockFormat,
    NumberFormat,
    formats_from,
    from_qtorch,
    get_format,
    scalar_format,
)

SCALARS = [f for f in FORMATS.values() if isinstance(f, NumberFormat)]
IN_ML_DTYPES = [f for f in SCALARS if hasattr(ml_dtypes, f.name) and f.kind != "int"]
GFLOAT = {
    "float4_e2m1fn": gf.format_info_ocp_e2m1,
    "float6_e2m3fn": gf.format_info_ocp_e2m3,
    "float6_e3m2fn": gf.format_info_ocp_e3m2,
    "float8_e4m3fn": gf.format_info_ocp_e4m3,
    "float8_e5m2": gf.format_info_ocp_e5m2,
    "float8_e8m0fnu": gf.format_info_ocp_e8m0,
    "bfloat16": gf.format_info_bfloat16,
    "float16": gf.format_info_binary16,
}


def test_the_table_holds_every_format() -> None:
    names = (
        "float4_e2m1fn float4_e3m0 float6_e2m3fn float6_e3m2fn float8_e4m3fn float8_e5m2 float8_e4m3fnuz "
        "float8_e5m2fnuz float8_e4m3 float8_e3m4 float8_e8m0fnu bfloat16 float16 tfloat32 float32 int8 int4 "
        "mxfp8_e4m3 mxfp8_e5m2 mxfp6_e2m3 mxfp6_e3m2 mxfp4_e2m1 nvfp4 luq_fp4"
    )
    assert " ".join(FORMATS) == names
    assert all(FORMATS[name].name == name for name in FORMATS)


@pytest.mark.parametrize("fmt", IN_ML_DTYPES, ids=lambda f: f.name)
def test_every_code_has_the_value_of_ml_dtypes(fmt: NumberFormat) -> None:
    codes = np.arange(fmt.code_count, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        theirs = codes.view(getattr(ml_dtypes, fmt.name)).astype(np.float64)
    ours = np.array([value for _, value in fmt.values()])
    assert np.array_equal(theirs, ours, equal_nan=True)
    number = ~np.isnan(theirs)
    assert np.array_equal(np.signbit(theirs)[number], np.signbit(ours)[number])
    info = ml_dtypes.finfo(getattr(ml_dtypes, fmt.name))
    assert (fmt.max_value, fmt.epsilon) == (float(info.max), float(info.eps))
    assert (fmt.min_normal, fmt.min_subnormal) == (float(info.smallest_normal), float(info.smallest_subnormal))


@pytest.mark.parametrize("name", GFLOAT)
def test_every_code_has_the_value_of_gfloat(name: str) -> None:
    fmt = scalar_format(name)
    for code, value in fmt.values():
        theirs = gfloat.decode_float(GFLOAT[name], code).fval
        assert theirs == value or (math.isnan(theirs) and math.isnan(value))
        assert math.isnan(value) or math.copysign(1, theirs) == math.copysign(1, value)


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.bits <= 16], ids=lambda f: f.name)
def test_properties_are_those_of_the_codes(fmt: NumberFormat) -> None:
    values = [value for _, value in fmt.values()]
    finite = [v for v in values if math.isfinite(v)]
    assert len(values) == fmt.code_count == 2**fmt.bits
    assert (max(finite), min(finite)) == (fmt.max_value, fmt.min_value)
    assert min(v for v in finite if v > 0) == fmt.min_subnormal
    assert any(map(math.isinf, values)) == fmt.has_inf
    assert any(map(math.isnan, values)) == fmt.has_nan
    assert (0.0 in finite) == fmt.has_zero
    assert any(v == 0 and math.copysign(1, v) < 0 for v in finite) == fmt.has_negative_zero
    assert (min(finite) < 0) == fmt.signed
    assert math.floor(math.log2(fmt.max_value)) == fmt.max_exponent
    assert fmt.min_normal == 2.0**fmt.min_exponent
    after_one = min(v for v in finite if v > 1)
    assert after_one - 1 == fmt.epsilon


def test_e3m0_is_that_of_luq() -> None:
    fmt = scalar_format("e3m0")
    assert [v for _, v in fmt.values()][:8] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert fmt.value(8) == 0.0
    assert math.copysign(1, fmt.value(8)) == -1


def test_integers_are_twos_complement() -> None:
    assert [v for _, v in scalar_format("int4").values()] == [*range(8), *range(-8, 0)]
    assert scalar_format("int8").is_integer
    assert not scalar_format("fp8").is_integer


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("nvfp4", 4.5), ("luq_fp4", 4.0), ("fp8", 8), ("bf16", 16)],
)
def test_storage_counts_the_scales(name: str, bits: float) -> None:
    assert get_format(name).bits_per_element == bits


def test_aliases_and_objects_are_formats() -> None:
    for alias, name in ALIASES.items():
        assert get_format(alias) is FORMATS[name]
    assert get_format(FORMATS["nvfp4"]) is FORMATS["nvfp4"]
    assert {FORMATS["nvfp4"]: 1}[get_format("nvfp4")] == 1


@pytest.mark.parametrize(("name", "hint"), [("float8_e4m3f", "float8_e4m3fn"), ("mxfp5", "mxfp"), (7, "choose")])
def test_an_unknown_format_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError, match="unknown format") as caught:
        get_format(name)
    assert hint in (caught.value.hint or "")


def test_a_block_format_is_no_scalar() -> None:
    with pytest.raises(InputError, match="block scales") as caught:
        scalar_format("mxfp4")
    assert "float4_e2m1fn" in (caught.value.hint or "")


QTORCH = [f for f in SCALARS if f.name not in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")]


@pytest.mark.parametrize("fmt", QTORCH, ids=lambda f: f.name)
def test_qtorch_numbers_convert_both_ways(fmt: NumberFormat) -> None:
    number = fmt.to_qtorch()
    back = from_qtorch(number)
    if fmt.kind == "int":
        assert (number.wl, number.fl) == (fmt.bits, 0)
        assert back == fmt
    else:
        assert (number.exp, number.man) == (fmt.exponent_bits, fmt.mantissa_bits)
        assert back == fmt or (fmt.name, back.name) == ("float8_e4m3", "float8_e4m3fn")


def test_qtorch_numbers_outside_the_table_use_every_code() -> None:
    from qtorch import BlockFloatingPoint, FixedPoint, FloatingPoint

    fmt = from_qtorch(FloatingPoint(exp=3, man=3))
    assert (fmt.name, fmt.max_value, fmt.specials) == ("float7_e3m3", 30.0, "none")
    assert from_qtorch(FloatingPoint(exp=8, man=3)).specials == "ieee"
    for number in (FixedPoint(8, 4), BlockFloatingPoint(8), "E4M3"):
        with pytest.raises(InputError, match="no format for the qtorch number"):
            from_qtorch(number)
    for name in ("float8_e4m3fnuz", "float8_e8m0fnu"):
        with pytest.raises(InputError, match="qtorch has no number"):
            scalar_format(name).to_qtorch()


def test_a_user_adds_formats_as_data() -> None:
    found = formats_from(
        {
            "blocks5": {"element": "float5_e3m1", "block_size": 8, "scale": "float8_e8m0fnu", "scale_rule": "floor"},
            "float5_e3m1": {"exponent_bits": 3, "mantissa_bits": 1},
        }
    )
    small, blocks = found["float5_e3m1"], found["blocks5"]
    assert isinstance(small, NumberFormat)
    assert isinstance(blocks, BlockFormat)
    assert (small.bits, small.max_value, blocks.element) == (5, 24.0, small)
    assert get_format("blocks5", {**FORMATS, **found}) is blocks


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"exponent_bits": 9, "mantissa_bits": 1}, "exponent_bits=9"),
        ({"exponent_bits": 3, "mantissa_bits": -1}, "mantissa_bits=-1"),
        ({"exponent_bits": "3", "mantissa_bits": 1}, "exponent_bits='3'"),
        ({"exponent_bits": 3, "mantissa_bits": 1, "bias": 1.5}, "bias=1.5"),
        ({"exponent_bits": 3, "mantissa_bits": 1, "specials": "inf"}, "specials='inf'"),
        ({"exponent_bits": 3, "mantissa_bits": 1, "kind": "posit"}, "kind='posit'"),
        ({"exponent_bits": 0, "mantissa_bits": 3, "kind": "int", "specials": "nan"}, "specials='nan'"),
        ({"exponent_bits": 1, "mantissa_bits": 3, "specials": "ieee"}, "no normal number"),
        ({"exponent_bits": 8, "mantissa_bits": 3}, "outside float32"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 150}, "outside float32"),
        ({"exponent_bits": 3, "mantisa_bits": 1}, "unknown key 'mantisa_bits'"),
        ({"exponent_bits": 3}, "missing"),
        ({"element": "float4_e2m1fn", "block_size": 0, "scale": "float32", "scale_rule": "max"}, "block_size=0"),
        ({"element": "float4_e2m1fn", "block_size": 8, "scale": "float32", "scale_rule": "mx"}, "scale_rule='mx'"),
        ({"element": "float8_e8m0fnu", "block_size": 8, "scale": "float32", "scale_rule": "max"}, "element="),
        ({"element": "float9", "block_size": 8, "scale": "float32", "scale_rule": "max"}, "unknown format 'float9'"),
        (3, "not a mapping"),
    ],
)
def test_bad_descriptions_are_refused_by_field(entry: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        formats_from({"mine": entry})  # type: ignore[dict-item]
    assert message in str(caught.value)


def test_a_users_format_cannot_replace_one_of_the_table() -> None:
    with pytest.raises(InputError, match="in the table already"):
        formats_from({"fp8": {"exponent_bits": 3, "mantissa_bits": 1}})


@given(
    exponent_bits=st.integers(1, 5),
    mantissa_bits=st.integers(0, 5),
    specials=st.sampled_from(["ieee", "nan", "fnuz", "none"]),
    bias=st.integers(-8, 24),
)
def test_codes_of_any_format_are_ordered(exponent_bits: int, mantissa_bits: int, specials: str, bias: int) -> None:
    try:
        fmt = NumberFormat(
            name="any", exponent_bits=exponent_bits, mantissa_bits=mantissa_bits, specials=specials, bias=bias
        )
    except InputError:
        return  # specials leave no normal number
    values = [fmt.value(code) for code in range(fmt.code_count // 2)]
    finite = [v for v in values if math.isfinite(v)]
    assert finite == sorted(set(finite))
    assert (finite[0], finite[1], finite[-1]) == (0.0, fmt.min_subnormal, fmt.max_value)
    assert math.frexp(fmt.max_value)[1] - 1 == fmt.max_exponent


def test_wide_formats_are_not_listed() -> None:
    with pytest.raises(InputError, match="too many"):
        scalar_format("float32").values()
    with pytest.raises(InputError, match="code=16"):
        scalar_format("fp4").value(16)
    assert scalar_format("float32").value(0x3F800000) == 1.0


def test_formats_do_not_load_torch() -> None:
    code = "import sys, emulation.formats; assert not {'torch', 'numpy', 'qtorch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
