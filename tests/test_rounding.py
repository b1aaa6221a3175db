from __future__ import annotations

import math

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch
from grid_reference import (
    Floats,
    critical_points,
    every_bfloat16,
    every_float16,
    magnitudes,
    nearest_even,
    random_bit_patterns,
    round_scalar,
    same_bits,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

from emulation.errors import InputError
from emulation.formats import FORMATS, NumberFormat, from_qtorch, scalar_format
from emulation.random_bits import derive_keys, hash_bits, index_products
from emulation.rounding import ROUNDINGS, on_grid

SCALARS = [f for f in FORMATS.values() if isinstance(f, NumberFormat)]
IN_ML_DTYPES = [f for f in SCALARS if hasattr(ml_dtypes, f.name) and f.kind != "int"]
GRIDS = [f for f in SCALARS if f.kind != "exponent" and f.bits <= 16]
GFLOAT = {
    "float4_e2m1fn": gf.format_info_ocp_e2m1,
    "float6_e2m3fn": gf.format_info_ocp_e2m3,
    "float6_e3m2fn": gf.format_info_ocp_e3m2,
    "float8_e4m3fn": gf.format_info_ocp_e4m3,
    "float8_e5m2": gf.format_info_ocp_e5m2,
    "bfloat16": gf.format_info_bfloat16,
    "float16": gf.format_info_binary16,
}
GFLOAT_ROUNDINGS = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
}


def inputs(fmt: NumberFormat) -> Floats:
    return np.concatenate([every_bfloat16(), every_float16(), critical_points(fmt)])


def assert_same(ours: Floats, theirs: Floats, x: Floats) -> None:
    wrong = ~same_bits(ours, theirs)
    assert not wrong.any(), list(zip(x[wrong][:5], ours[wrong][:5], theirs[wrong][:5], strict=True))


def rounded(x: Floats, fmt: NumberFormat, rounding: str = "nearest_even", overflow: str = "saturate") -> Floats:
    return on_grid(torch.from_numpy(x.copy()), fmt, rounding, overflow).numpy()


def as_ml_dtypes(x: Floats, fmt: NumberFormat) -> Floats:
    with np.errstate(all="ignore"):
        return x.astype(getattr(ml_dtypes, fmt.name)).astype(np.float32)


@pytest.mark.parametrize("fmt", IN_ML_DTYPES, ids=lambda f: f.name)
def test_nearest_is_that_of_ml_dtypes(fmt: NumberFormat) -> None:
    x = np.concatenate([inputs(fmt), random_bit_patterns(200_000, seed=1)])
    x = x if fmt.has_nan else x[~np.isnan(x)]
    assert_same(rounded(x, fmt, overflow="nonfinite"), as_ml_dtypes(x, fmt), x)


@pytest.mark.long
@pytest.mark.parametrize("fmt", IN_ML_DTYPES, ids=lambda f: f.name)
def test_nearest_is_that_of_ml_dtypes_on_ten_million_bit_patterns(fmt: NumberFormat) -> None:
    for seed in range(10):
        x = random_bit_patterns(1_000_000, seed=seed + 10)
        x = x if fmt.has_nan else x[~np.isnan(x)]
        assert_same(rounded(x, fmt, overflow="nonfinite"), as_ml_dtypes(x, fmt), x)


@pytest.mark.parametrize("fmt", GRIDS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_is_that_of_the_grid(fmt: NumberFormat, dtype: torch.dtype) -> None:
    x = np.concatenate([inputs(fmt), random_bit_patterns(100_000, seed=2)])
    ours = on_grid(torch.from_numpy(x).to(dtype), fmt).float().numpy()
    assert_same(ours, nearest_even(x, fmt), x)


@pytest.mark.parametrize("name", GFLOAT)
@pytest.mark.parametrize("rounding", GFLOAT_ROUNDINGS)
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
def test_deterministic_roundings_are_those_of_gfloat(name: str, rounding: str, overflow: str) -> None:
    fmt = scalar_format(name)
    x = np.concatenate([every_bfloat16(), critical_points(fmt), random_bit_patterns(50_000, seed=3)])
    x = x[np.isfinite(x)]
    saturate = overflow == "saturate" or not (fmt.has_inf or fmt.has_nan)
    with np.errstate(all="ignore"):
        theirs = gfloat.round_ndarray(GFLOAT[name], x.astype(np.float64), GFLOAT_ROUNDINGS[rounding], sat=saturate)
    assert_same(rounded(x, fmt, rounding, overflow), theirs.astype(np.float32), x)


ODD_ONES = [
    NumberFormat(name="e1m2", exponent_bits=1, mantissa_bits=2),
    NumberFormat(name="e2m0", exponent_bits=2, mantissa_bits=0),
    NumberFormat(name="e3m0_fnuz", exponent_bits=3, mantissa_bits=0, specials="fnuz", bias=4),
    NumberFormat(name="e4m0_nan", exponent_bits=4, mantissa_bits=0, specials="nan"),
    NumberFormat(name="e5m0_ieee", exponent_bits=5, mantissa_bits=0, specials="ieee"),
    NumberFormat(name="e7m5", exponent_bits=7, mantissa_bits=5),
    NumberFormat(name="e8m4_high_bias", exponent_bits=8, mantissa_bits=4, specials="ieee", bias=140),
    NumberFormat(name="e8m0", exponent_bits=8, mantissa_bits=0, specials="ieee"),
    NumberFormat(name="int3", exponent_bits=0, mantissa_bits=2, kind="int"),
]


@pytest.mark.parametrize("fmt", [*(f for f in GRIDS if f.bits <= 8), *ODD_ONES], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != "stochastic"])
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
def test_every_rounding_is_that_of_the_definition(fmt: NumberFormat, rounding: str, overflow: str) -> None:
    x = np.unique(critical_points(fmt))
    x = x if len(x) < 3000 else np.random.default_rng(0).choice(x, 3000)
    x = np.concatenate([x, [np.float32(-0.0), np.float32(np.nan)], random_bit_patterns(100, seed=4)])
    theirs = np.array([round_scalar(float(v), fmt, rounding, overflow) for v in x], dtype=np.float32)
    assert_same(rounded(x, fmt, rounding, overflow), theirs, x)


def test_ties_of_e3m0_go_to_the_even_code() -> None:
    x = np.array([0.125, 0.375, 0.75, 1.5, 3, 6, 12, 0.1250001, -0.75], dtype=np.float32)
    assert rounded(x, scalar_format("e3m0")).tolist() == [0, 0.5, 0.5, 2, 2, 8, 8, 0.25, -0.5]


@given(
    fmt=st.sampled_from(GRIDS),
    x=st.floats(width=64, allow_nan=False),
    rounding=st.sampled_from([r for r in ROUNDINGS if r != "stochastic"]),
)
def test_float64_is_rounded_once(fmt: NumberFormat, x: float, rounding: str) -> None:
    ours = on_grid(torch.tensor([x], dtype=torch.float64), fmt, rounding).item()
    theirs = round_scalar(x, fmt, rounding, "saturate")
    assert (ours, math.copysign(1, ours)) == (theirs, math.copysign(1, theirs))


@pytest.mark.parametrize("name", ["float32", "tfloat32"])
def test_wide_formats_round_float64_once(name: str) -> None:
    fmt = scalar_format(name)
    x = wide(random_bit_patterns(10_000, seed=5))
    x = x[np.isfinite(x)]
    between = torch.from_numpy(x * (1 + 2.0**-30))
    result = on_grid(between, fmt)
    step = (between.float().double() - between).abs() if name == "float32" else None
    if step is not None:
        assert torch.equal(result, between.float().double().clamp(-fmt.max_value, fmt.max_value))
    assert torch.equal(on_grid(result, fmt), result)
    assert ((result - between).abs() <= between.abs() * fmt.epsilon / 2 + fmt.min_subnormal).all()


def test_float32_is_left_alone() -> None:
    x = torch.tensor([1.1, -0.0, 1e-45, math.inf, math.nan])
    kept = on_grid(x, scalar_format("float32"), overflow="nonfinite")
    assert torch.equal(kept.view(torch.int32), x.view(torch.int32))
    assert on_grid(x, scalar_format("float32"))[3] == torch.finfo(torch.float32).max


def test_exactness_survives_flushed_subnormals() -> None:
    fmt = scalar_format("fp8")
    x = torch.from_numpy(np.concatenate([every_float16(), critical_points(fmt)]))
    x = x[(x.abs() >= torch.finfo(torch.float32).tiny) | (x == 0)]
    wanted = on_grid(x, fmt)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = on_grid(x, fmt)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(wanted.view(torch.int32), got.view(torch.int32))


# --- stochastic ------------------------------------------------------------------------------------------------------

DRAWS = 200_000
NOISE = hash_bits(index_products(DRAWS, torch.device("cpu")), derive_keys(11))


def points(fmt: NumberFormat) -> list[float]:
    """One of every kind: subnormal, the last subnormal step, normal, the last step of a binade, near the maximum."""
    grid = magnitudes(fmt) if fmt.bits <= 16 else []
    low = fmt.min_subnormal
    top = [grid[-2] + 0.37 * (grid[-1] - grid[-2])] if grid and fmt.kind != "int" else [fmt.max_value * 0.993]
    kinds = [0.3 * low, low * 1.6, fmt.min_normal - 0.41 * low, 1.234567, fmt.min_normal * 1.9876, *top]
    return [k for k in kinds if k <= fmt.max_value]


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.kind != "exponent" and f.bits < 32], ids=lambda f: f.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_is_unbiased_everywhere(fmt: NumberFormat, sign: int) -> None:
    for dtype in (torch.float32, torch.float64):
        for point in points(fmt):
            x = torch.full((DRAWS,), sign * point, dtype=dtype)
            q = on_grid(x, fmt, "stochastic", noise=NOISE).double()
            low, high = q.min(), q.max()
            below = on_grid(x[:1], fmt, "toward_zero").double()
            assert below in (low, high)
            assert len(q.unique()) <= 2
            error = (q.mean() - x[0].double()) / ((high - low) / 2 / math.sqrt(DRAWS)).clamp(min=1e-300)
            assert abs(error) < 5, (point, dtype, float(error))


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.bits <= 16], ids=lambda f: f.name)
def test_stochastic_leaves_values_alone_and_saturates(fmt: NumberFormat) -> None:
    grid = torch.tensor([v for _, v in fmt.values() if math.isfinite(v)], dtype=torch.float32)
    noise = NOISE[: len(grid)]
    for ones in (noise, torch.full_like(noise, -1), torch.zeros_like(noise)):
        assert torch.equal(on_grid(grid, fmt, "stochastic", noise=ones).view(torch.int32), grid.view(torch.int32))
    if fmt.signed:
        far = torch.tensor([fmt.max_value * 0.9999, 1e38, math.inf, -math.inf, math.nan])
        q = on_grid(far, fmt, "stochastic", noise=torch.full((5,), -1, dtype=torch.int32))
        assert q[:4].tolist() == [fmt.max_value, min(fmt.max_value, q[1].item()), fmt.max_value, fmt.min_value]
        assert q[4].isnan()


def test_stochastic_of_powers_is_unbiased_inside_an_octave() -> None:
    fmt = scalar_format("float8_e8m0fnu")
    q = on_grid(torch.full((DRAWS,), 2.75), fmt, "stochastic", noise=NOISE).double()
    assert set(q.tolist()) == {2.0, 4.0}
    assert abs(q.mean() - 2.75) < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("name", ["fp4", "e3m0", "fp8", "bf16", "int8"])
def test_r_random_bits_round_up_in_so_many_of_all_cases(name: str, bits: int) -> None:
    fmt = scalar_format(name)
    every = torch.arange(2**bits, dtype=torch.int32)
    step = 1.0 if name in ("int8", "e3m0") else fmt.epsilon
    for fraction in (0.0, 0.1, 0.3, 0.5, 0.77, 0.999):
        for dtype in (torch.float32, torch.float64):
            x = torch.full((2**bits,), 1 + fraction * step, dtype=dtype)
            q = on_grid(x, fmt, "stochastic", noise=every, random_bits=bits)
            kept = (x[0].double().item() - 1) / step
            assert int((q > 1).sum()) == math.floor(kept * 2**bits), (fraction, dtype)


def test_r_random_bits_are_those_of_gfloat() -> None:
    fmt = scalar_format("fp4")
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 3
    draws = np.random.default_rng(1).integers(0, 256, x.size, dtype=np.int32)
    ours = on_grid(torch.from_numpy(x), fmt, "stochastic", noise=torch.from_numpy(draws), random_bits=8).numpy()
    theirs = gfloat.round_ndarray(
        gf.format_info_ocp_e2m1, x.astype(np.float64), gfloat.RoundMode.StochasticFastest, True, draws, 8
    )
    differ = ~same_bits(ours, theirs.astype(np.float32))
    assert differ.mean() < 1e-4, x[differ]


def test_integers_have_no_negative_zero() -> None:
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        q = on_grid(torch.tensor([-0.0, -0.3]), scalar_format("int8"), rounding)
        assert not torch.signbit(q).any()


def test_qtorchs_own_format_keeps_every_code() -> None:
    from qtorch import FloatingPoint

    fmt = from_qtorch(FloatingPoint(exp=3, man=3))
    assert on_grid(torch.tensor([1e9]), fmt).item() == 30.0


def test_a_wrong_kernel_is_seen() -> None:
    """The comparison itself is tried: qtorch's ties and a value one step off must fail it."""
    fmt = scalar_format("fp4")
    x = inputs(fmt)
    x = x[~np.isnan(x)]
    away = rounded(x, fmt, "nearest_away")
    with pytest.raises(AssertionError):
        assert_same(away, nearest_even(x, fmt), x)
    lost_sign = rounded(x, fmt) + np.float32(0.0)
    with pytest.raises(AssertionError):
        assert_same(lost_sign, nearest_even(x, fmt), x)


def test_weird_formats_are_described_or_refused() -> None:
    with pytest.raises(InputError, match="outside float32"):
        NumberFormat(name="e8m3", exponent_bits=8, mantissa_bits=3)
