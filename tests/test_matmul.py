from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_unit_reference import NAN_BITS, Rules, product

import emulation
from emulation import InputError
from emulation import matmul_torch as arithmetic
from emulation.formats import FORMATS, NumberFormat
from emulation.matmul import matmul
from emulation.matrix_units import MATRIX_UNITS, MatrixUnit, matrix_unit

# (unit, a_format, b_format, scale_format, accumulation, the rules restated by hand)
TRUNCATED = [
    ("volta", "float16", "float16", Rules(4, 23, 23, "truncated")),
    ("turing", "float16", "float16", Rules(8, 24, 23, "truncated")),
    ("ampere", "float16", "float16", Rules(8, 24, 23, "truncated")),
    ("ampere", "bfloat16", "bfloat16", Rules(8, 24, 23, "truncated")),
    ("ampere", "tfloat32", "tfloat32", Rules(4, 24, 23, "truncated")),
    ("ada", "bfloat16", "bfloat16", Rules(8, 24, 23, "truncated")),
    ("ada", "float8_e4m3fn", "float8_e5m2", Rules(16, 13, 13, "truncated")),
    ("hopper", "float16", "float16", Rules(16, 25, 23, "truncated")),
    ("hopper", "bfloat16", "bfloat16", Rules(16, 25, 23, "truncated")),
    ("hopper", "float8_e4m3fn", "float8_e4m3fn", Rules(32, 13, 13, "truncated")),
    ("hopper", "float8_e5m2", "float8_e5m2", Rules(32, 13, 13, "truncated")),
    ("hopper", "float8_e4m3fn", "float8_e5m2", Rules(32, 13, 13, "truncated", 128)),
    ("blackwell", "float16", "float16", Rules(16, 25, 23, "truncated")),
    ("blackwell", "bfloat16", "bfloat16", Rules(16, 25, 23, "truncated")),
    ("blackwell", "float8_e5m2", "float8_e4m3fn", Rules(32, 25, 23, "truncated")),
    ("blackwell", "float6_e3m2fn", "float4_e2m1fn", Rules(32, 25, 23, "truncated")),
    ("blackwell", "float8_e4m3fn", "float6_e2m3fn", Rules(32, 25, 23, "truncated")),
    ("cdna3", "float16", "float16", Rules(8, 24, 23, "floored")),
    ("cdna3", "bfloat16", "bfloat16", Rules(8, 24, 23, "floored")),
    ("cdna3", "float8_e4m3fnuz", "float8_e4m3fnuz", Rules(16, 24, 23, "floored_lanes")),
    ("cdna3", "float8_e5m2fnuz", "float8_e4m3fnuz", Rules(16, 24, 23, "floored_lanes")),
]
SCALED = [
    ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", Rules(32, 25, 23, "truncated")),
    ("float6_e2m3fn", "float4_e2m1fn", "float8_e8m0fnu", Rules(32, 25, 23, "truncated")),
    ("float4_e2m1fn", "float4_e2m1fn", "float8_e8m0fnu", Rules(64, 35, 23, "block_scaled")),
    ("float4_e2m1fn", "float4_e2m1fn", "float8_e4m3fn", Rules(64, 35, 23, "block_scaled")),
]
GOLDEN = Path(__file__).parent / "golden" / "hopper_products.npz"  # benchmarks/matmul.py --golden made it, on an H200
KINDS = ("normal", "wide", "codes", "subnormal", "cancelling", "specials")


def grid(fmt: NumberFormat) -> np.ndarray:
    """Every value of a format (of TF32: of its exponents, with 4 mantissa bits), float64."""
    if fmt.bits > 16:
        return np.array(
            [s * 2.0**e * (1 + m / 16) for s in (1, -1) for e in range(-126, 128) for m in range(16)] + [0.0]
        )
    return np.array([value for _, value in fmt.values()])


GRIDS = {name: grid(fmt) for name, fmt in FORMATS.items() if isinstance(fmt, NumberFormat) and fmt.name != "float32"}


def draw(name: str, shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Values of a format: float32."""
    values = GRIDS[name]
    finite = np.unique(values[np.isfinite(values)])
    fmt = FORMATS[name]
    assert isinstance(fmt, NumberFormat)
    if kind == "codes":
        return rng.choice(values if rng.random() < 0.3 else finite, shape).astype(np.float32)
    if kind == "subnormal":
        small = finite[np.abs(finite) <= 4 * fmt.min_normal] if fmt.bits > 4 else finite
        return rng.choice(small, shape).astype(np.float32)
    x = rng.standard_normal(shape)
    if kind == "wide":
        x *= np.exp2(rng.uniform(-12, 12, shape))
    x = finite[np.clip(np.searchsorted(finite, x), 0, len(finite) - 1)]
    if kind == "cancelling":
        x[..., 1::2] = -x[..., : x.shape[-1] // 2 * 2 : 2]
        x *= rng.random(shape) < 0.9
    if kind == "specials":
        rare = values[~np.isfinite(values)]
        if len(rare):
            x = np.where(rng.random(shape) < 0.02, rng.choice(rare, shape), x)
    return x.astype(np.float32)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.numpy().view(np.uint32)


def lowest(*names: str) -> tuple[int, ...]:
    return tuple(FORMATS[name].min_exponent for name in names)


CASES = given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 3),
    n=st.integers(1, 3),
    k=st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 160, 256, 300))),
)


@pytest.mark.parametrize(("unit", "a_format", "b_format", "rules"), TRUNCATED)
@settings(max_examples=25, deadline=None)
@CASES
def test_every_unit_against_rational_arithmetic(unit, a_format, b_format, rules, seed, kind, m, n, k):
    rng = np.random.default_rng(seed)
    a = draw(a_format, (m, k), kind, rng)
    b = draw(b_format, (n, k), kind if kind != "cancelling" else "normal", rng).T.copy()
    mode = "fast" if rules.run is None else "precise"
    got = matmul(torch.from_numpy(a), torch.from_numpy(b), unit, a_format, b_format, mode)
    expected = product(a, b, rules, lowest(a_format, b_format))
    np.testing.assert_array_equal(bits(got), expected)


@pytest.mark.parametrize(("a_format", "b_format", "scale_format", "rules"), SCALED)
@settings(max_examples=40, deadline=None)
@CASES
def test_block_scales_against_rational_arithmetic(a_format, b_format, scale_format, rules, seed, kind, m, n, k):
    rng = np.random.default_rng(seed)
    a, b = draw(a_format, (m, k), kind, rng), draw(b_format, (n, k), kind, rng).T.copy()
    block = 32 if scale_format == "float8_e8m0fnu" else 16
    blocks = -(-k // block)
    scale_kind = {"normal": "normal", "cancelling": "normal", "specials": "specials"}.get(kind, "codes")
    if scale_format == "float8_e8m0fnu":
        spread = {"normal": 3, "specials": 3, "cancelling": 20, "wide": 60}.get(kind, 127)
        s, t = (
            np.exp2(rng.integers(-spread, spread + 1, shape)).astype(np.float32) for shape in ((m, blocks), (blocks, n))
        )
        if kind == "specials":
            s[rng.random(s.shape) < 0.1] = np.nan
    else:
        s, t = draw(scale_format, (m, blocks), scale_kind, rng), draw(scale_format, (blocks, n), scale_kind, rng)
    got = matmul(
        *(torch.from_numpy(x) for x in (a, b)),
        "blackwell",
        a_format,
        b_format,
        a_scale=torch.from_numpy(s),
        b_scale=torch.from_numpy(t),
        scale_format=scale_format,
    )
    expected = product(a, b, rules, lowest(a_format, b_format), (s, t, block, FORMATS[scale_format].min_exponent))
    np.testing.assert_array_equal(bits(got), expected)


@pytest.mark.parametrize("wrong", [{"fraction_bits": 12}, {"fraction_bits": 14}, {"group": 16}, {"result_bits": 14}])
def test_the_comparison_sees_a_wrong_rule(wrong):
    rng = np.random.default_rng(0)
    a, b = draw("float8_e4m3fn", (4, 256), "wide", rng), draw("float8_e4m3fn", (256, 4), "wide", rng)
    got = bits(matmul(torch.from_numpy(a), torch.from_numpy(b)))
    rules = Rules(32, 13, 13, "truncated")
    emin = lowest("float8_e4m3fn", "float8_e4m3fn")
    np.testing.assert_array_equal(got, product(a, b, rules, emin))
    assert (got != product(a, b, rules._replace(**wrong), emin)).any()


@pytest.mark.parametrize(("unit", "a_format", "b_format", "rules"), TRUNCATED)
def test_the_largest_sums_fit_the_integers_they_are_kept_in(unit, a_format, b_format, rules):
    a, b = (FORMATS[name].epsilon for name in (a_format, b_format))
    mode = "fast" if rules.run is None else "precise"
    for sign in (1, -1):
        x, y = np.full((1, 96), sign * (2 - a), dtype=np.float32), np.full((96, 1), 2 - b, dtype=np.float32)
        got = matmul(torch.from_numpy(x), torch.from_numpy(y), unit, a_format, b_format, mode)
        np.testing.assert_array_equal(bits(got), product(x, y, rules, lowest(a_format, b_format)))


def test_alignment_takes_the_exponents_of_the_operands_not_of_the_product():
    # 1.5 * 1.5 has exponent 1 but stands at 0, so that 2^-13 beside it is not cut off
    a, b = torch.tensor([[1.5, 2.0**-6, 1.5]]), torch.tensor([[1.5], [2.0**-7], [-1.5]])
    assert matmul(a, b).item() == 2.0**-13
    assert matmul(a * 2, b).item() == 2.0**-12
    assert matmul(a * torch.tensor([[2, 1, 2]]), b).item() == 0.0


def test_the_function_is_found_in_the_package_and_in_its_module():
    x = torch.eye(2)
    assert torch.equal(emulation.matmul(x, x), x)
    from emulation import matmul as again

    assert torch.equal(again(x, x, unit="ada"), x)


def test_a_zero_takes_no_part_in_the_alignment():
    a = torch.tensor([[448.0, 2.0**-6]])
    assert matmul(a, torch.tensor([[0.0], [2.0**-6]])).item() == 2.0**-12


def test_specials():
    inf, nan = math.inf, math.nan
    a = torch.tensor([[inf, 1.0], [inf, -inf], [nan, 1.0], [inf, 0.0], [1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    got = matmul(a, b, "hopper", "float8_e5m2")
    assert got[:, 0].tolist()[0] == inf
    assert got[4, 0] == 2.0
    nans = got.isnan()
    assert nans.tolist() == [[False, True], [True, True], [True, True], [False, True], [False, False]]
    assert (bits(got)[nans.numpy()] == NAN_BITS).all()


def test_an_infinite_accumulator_stays_and_meets_its_opposite():
    big = 2.0**127
    a = torch.tensor([[big, big] + [0.0] * 14 + [-big, -big] + [0.0] * 14])
    b = torch.full((32, 1), 2.0)
    assert (
        matmul(a, b, "hopper", "bfloat16").item() == math.inf
    )  # the first step overflows, later finite sums do not help
    a[0, 20] = -math.inf
    assert matmul(a, b, "hopper", "bfloat16").isnan().all()


def test_results_below_the_normal_range_of_float32():
    a = torch.tensor([[2.0**-100, -(2.0**-130)]])
    b = torch.tensor([[2.0**-40], [2.0**-30]])
    got = matmul(a[:, :1], b[:1], "blackwell", "bfloat16")
    assert got.item() == 2.0**-140
    below = matmul(a[:, 1:], b[1:], "blackwell", "bfloat16")
    assert bits(below).item() == 0  # cut to zero, which is positive


@pytest.mark.parametrize("row", MATRIX_UNITS, ids=lambda row: f"{row.name}-{row.operands[0]}-{row.accumulation}")
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_dimensions(row: MatrixUnit, shape):
    m, n, k = shape
    scales = {}
    if row.arithmetic == "block_scaled":
        blocks = -(-k // 16)
        scales = {"a_scale": torch.ones(m, blocks), "b_scale": torch.ones(blocks, n), "scale_format": "float8_e4m3fn"}
    got = matmul(torch.ones(m, k), torch.ones(k, n), row, row.operands[0], **scales)
    assert got.shape == (m, n)
    assert got.dtype == torch.float32
    assert (bits(got) == 0).all()


def test_tiles_transposition_and_working_type_do_not_show(monkeypatch):
    rng = np.random.default_rng(1)
    for unit, a_format, b_format, rules in TRUNCATED:
        mode = "fast" if rules.run is None else "precise"
        a = torch.from_numpy(draw(a_format, (6, 150), "wide", rng))
        b = torch.from_numpy(draw(b_format, (150, 520), "wide", rng))
        whole = bits(matmul(a, b, unit, a_format, b_format, mode))
        with monkeypatch.context() as patch:
            patch.setattr(arithmetic, "TILE", 16384)
            patch.setattr(arithmetic, "fits_float32", lambda left, right: False)
            np.testing.assert_array_equal(bits(matmul(a, b, unit, a_format, b_format, mode)), whole)
        flipped = matmul(b[:, :40].t(), a.t(), unit, b_format, a_format, mode)
        np.testing.assert_array_equal(bits(flipped.t().contiguous()), whole[:, :40])


def test_operands_may_be_strided_or_low_precision_and_are_not_changed():
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(draw("float8_e4m3fn", (50, 50), "normal", rng)) for _ in range(2))
    expected = bits(matmul(a, b))
    kept = a.clone()
    for x in (a.double(), a.half(), a.to(torch.float8_e4m3fn), a.t().contiguous().t(), a.clone().requires_grad_()):
        got = matmul(x, b)
        assert not got.requires_grad
        np.testing.assert_array_equal(bits(got), expected)
    assert torch.equal(a, kept)


def test_tensor_float32_operands_are_cut():
    rng = np.random.default_rng(3)
    a, b = (torch.from_numpy(rng.standard_normal((6, 6)).astype(np.float32)) for _ in range(2))
    cut = [(x.view(torch.int32) >> 13 << 13).view(torch.float32) for x in (a, b)]
    np.testing.assert_array_equal(bits(matmul(a, b, "ampere", "tf32")), bits(matmul(*cut, "ampere", "tf32")))
    expected = product(cut[0].numpy(), cut[1].numpy(), Rules(4, 24, 23, "truncated"), (-126, -126))
    np.testing.assert_array_equal(bits(matmul(a, b, "ampere", "tf32")), expected)


def test_plain_float32_is_the_plain_product():
    rng = np.random.default_rng(4)
    a, b = (torch.from_numpy(draw("float4_e2m1fn", (32, 32), "codes", rng)) for _ in range(2))
    assert torch.equal(matmul(a, b, "float32", "nvfp4"), a @ b)
    s, t = torch.rand(32, 2).to(torch.float8_e4m3fn).float(), torch.rand(2, 32).to(torch.float8_e4m3fn).float()
    scaled = matmul(a, b, "float32", "nvfp4", a_scale=s, b_scale=t)
    assert torch.equal(scaled, (a * s.repeat_interleave(16, 1)) @ (b * t.repeat_interleave(16, 0)))


def test_block_format_names_bring_their_scale_format():
    rng = np.random.default_rng(5)
    a, b = (torch.from_numpy(draw("float4_e2m1fn", (32, 32), "codes", rng)) for _ in range(2))
    s, t = torch.full((32, 2), 3.5), torch.full((2, 32), 0.25)
    long = matmul(a, b, "blackwell", "e2m1", "e2m1", a_scale=s, b_scale=t, scale_format="e4m3")
    assert torch.equal(matmul(a, b, "blackwell", "nvfp4", a_scale=s, b_scale=t), long)
    assert torch.equal(long, a @ b * 0.875)  # all exact here
    assert torch.equal(matmul(a, b, "blackwell", "nvfp4", a_scale=-s, b_scale=t), long)  # UE4M3 has no sign


@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"tfloat32"}))
def test_grid_check_takes_all_values_and_no_others(name):
    fmt = FORMATS[name]
    every = np.unique(GRIDS[name][~np.isnan(GRIDS[name])]).astype(np.float32)
    x = torch.from_numpy(every).reshape(1, -1)
    one = torch.ones(x.shape[1], 1)
    unit = MatrixUnit(name="own", operands=(name,), group=1, fraction_bits=1, arithmetic="plain")
    assert matmul(x, one, unit, fmt).numel()
    low, high = every[:-1], every[1:]
    between = np.concatenate((np.nextafter(low, high), np.nextafter(high, low)))
    for value in between[~np.isin(between, every)][:: max(1, len(between) // 50)]:
        with pytest.raises(InputError, match="not a value of"):
            matmul(torch.full((1, 1), float(value)), one[:1], unit, fmt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "hoper"}, "unknown unit='hoper'"),
        ({"a_format": "float5"}, "unknown format"),
        ({"unit": "volta"}, "unit='volta' has no product of a_format='float8_e4m3fn'"),
        ({"unit": "hopper", "a_format": "fp16", "b_format": "bf16"}, "b_format='bfloat16'"),
        ({"unit": "ada", "accumulation": "precise"}, "accumulation='precise'"),
        ({"accumulation": "exact"}, "accumulation='exact'"),
        ({"a": torch.ones(2)}, "a of shape"),
        ({"a": torch.ones(2, 3, device="meta"), "b": torch.ones(3, 2, device="meta")}, "a.device='meta'"),
        ({"a": torch.ones(2, 3, dtype=torch.int8)}, "a of shape"),
        ({"b": torch.ones(4, 2)}, r"a.shape=\(2, 3\) with b.shape=\(4, 2\)"),
        ({"a": torch.full((2, 3), 449.0)}, "a holds 449.0"),
        ({"a": torch.full((2, 3), 1 + 2.0**-40, dtype=torch.float64)}, "a holds 1.0"),
        ({"b": torch.full((3, 2), math.inf)}, "b holds inf"),
        ({"a_scale": torch.ones(2, 1)}, "b_scale=None with a_scale given"),
        ({"scale_format": "float8_e8m0fnu"}, "without scales"),
        ({"a_scale": torch.ones(2, 1), "b_scale": torch.ones(1, 2)}, "scale_format=None with scales"),
        (
            {"a_scale": torch.ones(2, 1), "b_scale": torch.ones(1, 2), "scale_format": "float32"},
            "scale_format='float32'",
        ),
        (
            {"a_scale": torch.ones(2, 1), "b_scale": torch.ones(1, 2), "scale_format": "float8_e8m0fnu"},
            "unit='hopper' has no product",
        ),
    ],
)
def test_bad_input(arguments, message):
    given = {"a": torch.ones(2, 3), "b": torch.ones(3, 2)} | arguments
    with pytest.raises(InputError, match=message) as caught:
        matmul(**given)
    assert caught.value.hint


@pytest.mark.parametrize(("name", "value"), [("a_scale", 3.0), ("b_scale", 0.0), ("a_scale", -1.0)])
def test_bad_scales(name, value):
    scales = {"a_scale": torch.ones(2, 1), "b_scale": torch.ones(1, 2)}
    scales[name] = torch.full_like(scales[name], value)
    with pytest.raises(InputError, match=f"{name} holds"):
        matmul(torch.ones(2, 3), torch.ones(3, 2), "blackwell", "mxfp8", **scales)
    scales[name] = torch.ones(3, 3)
    with pytest.raises(InputError, match=f"{name} of shape"):
        matmul(torch.ones(2, 3), torch.ones(3, 2), "blackwell", "mxfp8", **scales)


@pytest.mark.parametrize(
    "fields",
    [
        {"group": 0},
        {"fraction_bits": 28},
        {"result_bits": 24},
        {"run": 48},
        {"group": 64, "scales": ("float8_e8m0fnu",)},
    ],
)
def test_a_unit_of_ones_own_must_be_one_that_can_be_computed_exactly(fields):
    plain = {"name": "own", "operands": ("float8_e5m2",), "group": 32, "fraction_bits": 20, "result_bits": 20}
    rng = np.random.default_rng(6)
    a, b = draw("float8_e5m2", (3, 70), "wide", rng), draw("float8_e5m2", (70, 2), "wide", rng)
    got = matmul(torch.from_numpy(a), torch.from_numpy(b), MatrixUnit(**plain), "e5m2")
    np.testing.assert_array_equal(bits(got), product(a, b, Rules(32, 20, 20, "truncated"), (-14, -14)))
    with pytest.raises(InputError, match="unit 'own'"):
        MatrixUnit(**plain | fields)


def test_every_row_is_found_by_its_formats():
    for row in MATRIX_UNITS:
        for a in row.operands:
            for scale in row.scales or (None,):
                found = matrix_unit(row.name, a, None, scale, row.accumulation)
                assert found.takes(a, a, scale)
                assert found == row or found.arithmetic == "block_scaled"


def test_products_of_real_tensor_cores():
    dtypes = {name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16")}
    with np.load(GOLDEN) as data:
        entries = json.loads(str(data["about"]))["entries"]
        for i, entry in enumerate(entries):
            a, b = (torch.from_numpy(data[f"{x}{i}"]).view(dtypes[entry[x]]).float() for x in "ab")
            for mode in entry["modes"]:
                got = matmul(a, b.t(), "hopper", entry["a"], entry["b"], mode)
                np.testing.assert_array_equal(bits(got), data[f"y{i}_{mode}"].view(np.uint32), err_msg=str(entry))
    assert len(entries) >= 20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("unit", "a_format", "b_format", "scale_format", "run"),
    [(*case[:3], None, case[3].run) for case in TRUNCATED] + [("blackwell", *case[:3], None) for case in SCALED],
)
def test_cuda_gives_the_bits_of_the_cpu(unit, a_format, b_format, scale_format, run):
    for kind in KINDS:
        _compare_devices(unit, a_format, b_format, scale_format, run, kind)


def _operands(a_format, b_format, scale_format, kind, shape, pairs=()):
    """``a``, ``b`` and the scales' arguments of a product of this shape (M, N, K), or of a batch of them."""
    rng = np.random.default_rng(7)
    m, n, k = shape
    a = torch.from_numpy(draw(a_format, (*pairs, m, k), kind, rng))
    b = torch.from_numpy(draw(b_format, (*pairs, n, k), kind, rng)).mT
    if scale_format is None:
        return a, b, {}
    fmt = FORMATS[scale_format]
    blocks = -(-k // (32 if fmt.kind == "exponent" else 16))
    values = torch.from_numpy(GRIDS[scale_format]).float()
    values = values[torch.argsort((values.abs().log2() - 1).abs())[: 11 if kind == "normal" else None]]
    s, t = (
        values[torch.from_numpy(rng.integers(0, len(values) - (kind != "specials"), (*pairs, *shape)))]
        for shape in ((m, blocks), (blocks, n))
    )
    return a, b, {"a_scale": s, "b_scale": t, "scale_format": scale_format}


@pytest.mark.parametrize(
    ("unit", "a_format", "b_format", "scale_format", "run"),
    [(*case[:3], None, case[3].run) for case in TRUNCATED] + [("blackwell", *case[:3], None) for case in SCALED],
)
@pytest.mark.parametrize("shape", [(5, 3, 150), (40, 300, 70)])
def test_a_batch_is_its_products_one_by_one(monkeypatch, unit, a_format, b_format, scale_format, run, shape):
    mode = "fast" if run is None else "precise"
    monkeypatch.setattr(arithmetic, "TILE", 1 << 14)  # several pairs of the small shape a tile, parts of the large one
    for kind in ("normal", "specials"):
        a, b, scales = _operands(a_format, b_format, scale_format, kind, shape, pairs=(7,))
        together = matmul(a, b, unit, a_format, b_format, mode, **scales)
        assert together.shape == (7, *shape[:2])
        for i in range(7):
            own = {name: x[i] if isinstance(x, torch.Tensor) else x for name, x in scales.items()}
            alone = matmul(a[i], b[i], unit, a_format, b_format, mode, **own)
            np.testing.assert_array_equal(bits(together[i]), bits(alone))


def test_batches_that_do_not_fit_are_refused():
    a, b = torch.ones(2, 3, 4), torch.ones(3, 4, 5)
    with pytest.raises(InputError, match=r"a.shape=\(2, 3, 4\) with b.shape=\(3, 4, 5\)"):
        matmul(a, b)
    with pytest.raises(InputError, match=r"a.shape=\(2, 3, 4\) with b.shape=\(4, 5\)"):
        matmul(a, b[0])
    with pytest.raises(InputError, match=r"a of shape \(1, 2, 3, 4\)"):
        matmul(a[None], b[None])
    assert matmul(torch.ones(0, 3, 4), torch.ones(0, 4, 5)).shape == (0, 3, 5)


def _compare_devices(unit, a_format, b_format, scale_format, run, kind):
    for shape, pairs in (((70, 130, 330), ()), ((20, 70, 50), (5,))):
        a, b, scales = _operands(a_format, b_format, scale_format, kind, shape, pairs)
        mode = "fast" if run is None else "precise"
        expected = matmul(a, b, unit, a_format, b_format, mode, **scales)
        moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in scales.items()}
        got = matmul(a.cuda(), b.cuda(), unit, a_format, b_format, mode, **moved)
        np.testing.assert_array_equal(bits(got.cpu()), bits(expected))
