"""MX and NVFP4 against the arithmetic of the libraries that define them in practice, restated here in numpy."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emulation.codec import encode
from emulation.formats import BlockFormat, NumberFormat, get_format, scalar_format
from emulation.quantizer import Quantizer
from emulation.scales import scale_from, two_level_scales

E8M0 = scalar_format("float8_e8m0fnu")
FLOAT32 = scalar_format("float32")
MX = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4_e2m1"]


def from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def scale_byte(amax: float, rule: str, element: str = "float8_e4m3fn") -> int:
    scale = scale_from(torch.tensor([amax]), scalar_format(element), E8M0, rule)
    return int(encode(scale, E8M0)[0])


# --- MX: the cases of torchao's contract for MXFP8 (E4M3), with the bytes of scale and data ---------------------------

MAX32, MAX16 = float(np.finfo(np.float32).max), float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
TINY32, TINY16 = 2.0**-149, 2.0**-133
JUST_ABOVE = from_bits(0x40600001)  # 3.5 and one ulp: 3.5 where bfloat16 comes in too early
JUST_BELOW = from_bits(0x43FFFFFF)  # below 512: 512 where bfloat16 comes in too early

# the block's first and other values, then (scale, first, other) bytes by rule
CONTRACT = {
    "zero": (0.0, 0.0, (0, 0x00, 0x00), (0, 0x00, 0x00)),
    "smallest_normal": (2.0**-126, 2.0**-126, (0, 0x40, 0x40), (0, 0x40, 0x40)),
    "infinity_voids_the_block": (math.inf, 1.0, (255, 0x7F, 0x7F), (255, 0x7F, 0x7F)),
    "nan_voids_the_block": (math.nan, 1.0, (255, 0x7F, 0x7F), (255, 0x7F, 0x7F)),
    "all_nan": (math.nan, math.nan, (255, 0x7F, 0x7F), (255, 0x7F, 0x7F)),
    "largest_element": (448.0, 448.0, (127, 0x7E, 0x7E), (127, 0x7E, 0x7E)),
    "lowest_element": (-448.0, -448.0, (127, 0xFE, 0xFE), (127, 0xFE, 0xFE)),
    "largest_float32": (MAX32, MAX32, (246, 0x7E, 0x7E), (247, 0x78, 0x78)),
    "lowest_float32": (-MAX32, -MAX32, (246, 0xFE, 0xFE), (247, 0xF8, 0xF8)),
    "largest_bfloat16": (MAX16, MAX16, (246, 0x7E, 0x7E), (247, 0x78, 0x78)),
    "smallest_float32": (TINY32, TINY32, (0, 0x00, 0x00), (0, 0x00, 0x00)),
    "minus_smallest_float32": (-TINY32, -TINY32, (0, 0x80, 0x80), (0, 0x80, 0x80)),
    "smallest_bfloat16": (TINY16, TINY16, (0, 0x08, 0x08), (0, 0x08, 0x08)),
    "underflow": (TINY32, 1.0, (119, 0x00, 0x78), (119, 0x00, 0x78)),
    "underflow_keeps_its_sign": (-TINY32, 1.0, (119, 0x80, 0x78), (119, 0x80, 0x78)),
    "one_saturates_the_others_underflow": (MAX32, 1.0, (246, 0x7E, 0x00), (247, 0x78, 0x00)),
    "just_above_a_boundary_of_rceil": (JUST_ABOVE, JUST_ABOVE, (120, 0x7E, 0x7E), (121, 0x76, 0x76)),
    "just_below_a_boundary_of_floor": (JUST_BELOW, JUST_BELOW, (127, 0x7E, 0x7E), (128, 0x78, 0x78)),
    "between_the_maximum_and_the_next_power": (480.0, 480.0, (127, 0x7E, 0x7E), (128, 0x77, 0x77)),
    "the_same_negative": (-480.0, -480.0, (127, 0xFE, 0xFE), (128, 0xF7, 0xF7)),
}


@pytest.mark.parametrize("case", CONTRACT)
@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_mxfp8_has_torchaos_bytes(case: str, rule: str) -> None:
    first, others, floor, rceil = CONTRACT[case]
    block = torch.full((1, 32), others)
    block[0, 0] = first
    for dtype in (torch.float32, torch.bfloat16):
        if not ((block.to(dtype).float() == block) | block.isnan()).all():
            continue  # not a case of bfloat16
        q = Quantizer("mxfp8_e4m3", scale_rule=rule)(block.to(dtype))
        codes = torch.where(q.values().isnan(), q.codes & 0x7F, q.codes)  # the sign of a NaN means nothing
        found = (int(encode(q.scale, E8M0)[0, 0]), int(codes[0, 0]), int(codes[0, -1]))
        assert found == (floor if rule == "floor" else rceil)


RCEIL_BYTES = {
    0x00000000: 0, 0x00000001: 0, 0x00400000: 0, 0x00400001: 1, 0x007FFFFF: 1, 0x00800000: 1, 0x1F800000: 63,
    0x1F800001: 64, 0x3F7FFFFF: 127, 0x3F800000: 127, 0x3F800001: 128, 0x5F800000: 191, 0x5F800001: 192,
    0x7F000000: 254, 0x7F800000: 255, 0x7FC00000: 255,
}  # fmt: skip


def test_rceil_rounds_bit_patterns_up() -> None:
    # an element with maximum 1 leaves the magnitude as it is
    one = NumberFormat(name="one", exponent_bits=1, mantissa_bits=0, bias=1)
    assert one.max_value == 1.0
    for bits, byte in RCEIL_BYTES.items():
        scale = scale_from(torch.tensor([from_bits(bits)]), one, E8M0, "rceil")
        assert int(encode(scale, E8M0)[0]) == byte, hex(bits)


def exact_floor(amax: float, top: int) -> int:
    """The E8M0 byte of OCP's rule in exact arithmetic."""
    if amax == 0:
        return 0
    exponent = math.frexp(amax)[1] - 1
    return min(max(exponent - top, -127), 127) + 127


amaxes = st.one_of(
    st.floats(min_value=0, width=32, allow_infinity=False, allow_nan=False),
    st.integers(-126, 127).flatmap(lambda e: st.sampled_from([2.0**e, float(np.nextafter(np.float32(2.0**e), 0))])),
)


@settings(max_examples=200)
@given(amax=amaxes, name=st.sampled_from(MX))
def test_floor_is_exact(amax: float, name: str) -> None:
    element = get_format(name).element  # type: ignore[union-attr]
    assert scale_byte(amax, "floor", element.name) == exact_floor(amax, element.max_exponent)


@settings(max_examples=200)
@given(amax=amaxes, name=st.sampled_from([*MX, "luq_fp4"]))
def test_pow2_is_the_smallest_power_that_does_not_saturate(amax: float, name: str) -> None:
    element = get_format(name).element  # type: ignore[union-attr]
    scale = scale_from(torch.tensor([amax]), element, FLOAT32, "pow2").item()
    if amax == 0:
        assert scale == 1
        return
    assert math.frexp(scale)[0] == 0.5
    exact = Fraction(amax) / Fraction(element.max_value)
    assert exact <= Fraction(scale)
    assert scale == 2.0**-126 or exact > Fraction(scale) / 2


@settings(max_examples=200)
@given(amax=amaxes, name=st.sampled_from(MX))
def test_rceil_never_saturates(amax: float, name: str) -> None:
    element = get_format(name).element  # type: ignore[union-attr]
    scale = 2.0 ** (scale_byte(amax, "rceil", element.name) - 127)
    assert amax / scale <= element.max_value * (1 + 2.0**-22)


@settings(max_examples=200)
@given(amax=amaxes, name=st.sampled_from(["fp8", "fp4", "e3m0", "int8"]))
def test_max_maps_the_largest_onto_the_largest(amax: float, name: str) -> None:
    element = scalar_format(name)
    scale = scale_from(torch.tensor([amax]), element, FLOAT32, "max")
    if amax == 0:
        assert scale == 1
    elif amax >= element.max_value * 2.0**-126:
        assert scale.item() == float(np.float32(amax) / np.float32(element.max_value))
    assert math.isfinite(scale.item())
    assert scale.item() > 0


@pytest.mark.parametrize("rule", ["max", "pow2", "floor", "rceil"])
def test_a_scale_of_no_number_is_nan(rule: str) -> None:
    for bad in (math.inf, math.nan):
        scale = scale_from(torch.tensor([1.0, bad, 2.0]), scalar_format("fp4"), E8M0, rule)
        assert scale[1].isnan()
        assert scale[[0, 2]].isfinite().all()


MX_IN_GFLOAT = {
    "mxfp8_e4m3": gf.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gf.format_info_mxfp8_e5m2,
    "mxfp6_e2m3": gf.format_info_mxfp6_e2m3,
    "mxfp6_e3m2": gf.format_info_mxfp6_e3m2,
    "mxfp4_e2m1": gf.format_info_mxfp4_e2m1,
}


@pytest.mark.parametrize("name", MX)
def test_mx_is_that_of_gfloat(name: str) -> None:
    rng = np.random.default_rng(3)
    blocks = rng.normal(size=(40, 32)) * np.exp(rng.normal(size=(40, 1)) * 6)
    blocks[:8] = np.exp2(rng.integers(-3, 4, (8, 32)))  # ties and powers of two
    blocks = blocks.astype(np.float32).astype(np.float64)
    ours = Quantizer(name).fake_quantize(torch.from_numpy(blocks).float()).double().numpy()
    info = MX_IN_GFLOAT[name]
    for block, mine in zip(blocks, ours, strict=True):
        theirs = gfloat.quantize_block(info, block, gfloat.compute_scale_amax)
        assert np.array_equal(mine, theirs)


# --- NVFP4: TransformerEngine's float32 operations in their order ---------------------------------------------------


def e2m1(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(x, np.float32(-6), np.float32(6)).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def nvfp4(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], np.float32]:
    """Elements, block scales and tensor scale of [rows, columns]."""
    one, largest = np.float32(1), np.finfo(np.float32).max
    with np.errstate(all="ignore"):
        amax = np.abs(x).max()
        s_enc = np.minimum(np.float32(448 * 6) / amax, largest) if amax else one
        s_dec = one / s_enc
        blocks = x.reshape(x.shape[0], -1, 16)
        wanted = np.abs(blocks).max(-1) * (s_enc * (one / np.float32(6)))
        scales = np.clip(wanted, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        encode_scale = np.minimum(one / (scales * s_dec), largest)
        elements = e2m1(blocks * encode_scale[..., None])
    return elements.reshape(x.shape), scales, (amax / np.float32(2688) if amax else one)


def nvfp4_inputs() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    normal = rng.normal(size=(64, 64)).astype(np.float32)
    rows = normal * np.exp(rng.normal(size=(64, 1)) * 3).astype(np.float32)  # block scales become subnormal and zero
    columns = normal * np.exp(rng.normal(size=(1, 64)) * 3).astype(np.float32)
    sparse = normal * (rng.random((64, 64)) < 0.05)
    powers = np.exp2(rng.integers(-20, 20, (64, 64))).astype(np.float32)
    return {
        "normal": normal, "rows": rows, "columns": columns, "sparse": sparse.astype(np.float32), "powers": powers,
        "zero": np.zeros((4, 32), np.float32), "tiny": normal * np.float32(1e-38), "huge": normal * np.float32(5e37),
    }  # fmt: skip


@pytest.mark.parametrize("case", nvfp4_inputs())
def test_nvfp4_is_that_of_transformer_engine(case: str) -> None:
    x = nvfp4_inputs()[case]
    elements, scales, tensor_scale = nvfp4(x)
    q = Quantizer("nvfp4", "tensor")(torch.from_numpy(x))
    assert q.unit_scale is not None
    assert np.array_equal(q.values().numpy().view(np.uint32), elements.view(np.uint32))
    assert np.array_equal(q.scale.numpy(), scales)
    assert q.unit_scale.item() == tensor_scale
    values = elements * np.repeat(scales, 16, axis=1) * tensor_scale
    assert np.array_equal(q.dequantize().numpy().view(np.uint32), values.view(np.uint32))
    for i, example in enumerate(x[:4]):
        alone = nvfp4(example[None])[0]
        together = Quantizer("nvfp4")(torch.from_numpy(x[:4])).values()[i : i + 1]
        assert np.array_equal(together.numpy(), alone), "an example's scales are those of the example alone"


def test_nvfp4_has_subnormal_and_zero_block_scales() -> None:
    x = torch.ones(1, 48)
    x[0, :16] = 1000.0
    x[0, 32:] = 1e-6
    q = Quantizer("nvfp4")(x)
    assert 0 < q.scale[0, 1] < scalar_format("float8_e4m3fn").max_value / 256
    assert q.scale[0, 2] == 0
    assert (q.dequantize()[0, 32:] == 0).all()
    x[0, 16:32] = 0.02
    assert 0 < Quantizer("nvfp4")(x).scale[0, 1] < 2.0**-6


# --- LUQ ------------------------------------------------------------------------------------------------------------


def test_luq_has_levels_of_its_alpha() -> None:
    """The paper's gradient quantizer: levels alpha * {0, 1, 2, ..., 64}, alpha = max|g| / 64, unbiased between them."""
    g = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer("luq_fp4", rounding="stochastic")
    draws = torch.stack([quantizer.fake_quantize(g, generator=torch.Generator().manual_seed(s)) for s in range(8)])
    alpha = g.abs().amax(1, keepdim=True) / 64
    levels = (draws / alpha).abs().unique()
    expected = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    assert (levels.unsqueeze(1) - expected).abs().amin(1).max() < 1e-4
    error = (draws.mean(0) - g).mean() / (draws.std(0).mean() / math.sqrt(draws.numel()))
    assert abs(error) < 5
    small = g.abs() < alpha
    up = (draws[:, small] != 0).float().mean()
    wanted = (g.abs() / alpha)[small].mean()
    assert abs(up - wanted) < 5 * 0.5 / math.sqrt(8 * int(small.sum()))


def test_a_users_block_format_rounds_its_scales() -> None:
    fmt = BlockFormat(
        "mine",
        element=scalar_format("int4"),
        block_size=8,
        scale=scalar_format("float8_e4m3fn"),
        scale_rule="max",
    )
    q = Quantizer(fmt)(torch.randn(3, 20, generator=torch.Generator().manual_seed(0)))
    assert q.scale.shape == (3, 3)
    assert torch.equal(q.scale, q.scale.to(torch.float8_e4m3fn).float())


def test_scales_are_quotients_rounded_once() -> None:
    """A Python number on either side of ``/`` would be turned into a product with a reciprocal, rounded twice."""
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10 + 0.01
    e4m3, e2m1 = scalar_format("float8_e4m3fn"), scalar_format("float4_e2m1fn")
    found = scale_from(amax, e4m3, FLOAT32, "max")
    np.testing.assert_array_equal(found.numpy(), amax.numpy() / np.float32(448))
    block, unit, factor = two_level_scales(amax, amax, e2m1, e4m3)
    np.testing.assert_array_equal(unit.numpy(), amax.numpy() / np.float32(2688))
    encode = np.float32(2688) / amax.numpy()
    decode = np.float32(1) / encode
    np.testing.assert_array_equal(factor.numpy(), np.float32(1) / (block.numpy() * decode))
