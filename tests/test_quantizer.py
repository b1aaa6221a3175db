from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulation.codec as codec
from emulation.codec import derive_keys, round_to
from emulation.errors import InputError
from emulation.formats import FORMATS, BlockFormat, get_format
from emulation.quantizer import QuantizedTensor, Quantizer

FORMATS_TRIED = [
    "fp8",
    "float8_e5m2",
    "fp4",
    "e3m0",
    "int8",
    "bf16",
    "luq_fp4",
    "mxfp8",
    "mxfp6_e2m3",
    "mxfp4",
    "nvfp4",
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool((nan | (a.float().view(torch.int32) == b.float().view(torch.int32))).all())


def data(*shape: int, seed: int = 0) -> Tensor:
    """Examples, rows and columns of very different sizes."""
    x = torch.randn(shape, generator=generator(seed))
    for d in range(len(shape)):
        x = x * torch.exp(
            2 * torch.randn([n if i == d else 1 for i, n in enumerate(shape)], generator=generator(d + 1))
        )
    return x


def keys_for(quantizer: Quantizer, count: int) -> Tensor | None:
    return derive_keys(1, torch.arange(count)) if quantizer.rounding == "stochastic" else None


# --- one pass and two are the same -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS_TRIED)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 96), -1), ((4, 33, 5), 1), ((2, 3, 8, 70), 1), ((2, 40, 7), -1)])
def test_fake_quantize_is_dequantize_of_codes(name: str, rounding: str, shape: tuple[int, ...], axis: int) -> None:
    for granularity in ("tensor", "example", "channel"):
        quantizer = Quantizer(name, granularity, rounding=rounding)
        x, keys = data(*shape), keys_for(quantizer, shape[0])
        before = x.clone()
        fake = quantizer.fake_quantize(x, keys=keys, axis=axis)
        stored = quantizer(x, keys=keys, axis=axis)
        assert isinstance(stored, QuantizedTensor)
        assert same(fake, stored.dequantize())
        assert same(x, before)
        assert stored.codes.shape == x.shape
        grid = stored.values()
        assert same(grid, round_to(grid, quantizer.element))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FORMATS_TRIED),
    granularity=st.sampled_from(["tensor", "example", "channel"]),
    rounding=st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "stochastic"]),
    rule=st.sampled_from([None, "max", "pow2", "floor", "rceil"]),
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    chunk=st.sampled_from([16, 100, 1 << 17]),
    seed=st.integers(0, 99),
)
def test_any_quantizer_rounds_to_its_grid(
    name: str, granularity: str, rounding: str, rule: str | None, shape: list[int], chunk: int, seed: int
) -> None:
    if name == "nvfp4":
        rule = None
    quantizer = Quantizer(name, granularity, rounding=rounding, scale_rule=rule)
    x, keys = data(*shape, seed=seed), keys_for(quantizer, shape[0])
    whole = quantizer.fake_quantize(x, keys=keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "CHUNK", chunk)
        in_pieces = dataclasses.replace(quantizer, backend="torch")
        assert same(in_pieces.fake_quantize(x, keys=keys), whole), "pieces change nothing"
        assert same(quantizer(x, keys=keys).dequantize(), whole)
    stored = quantizer(x, keys=keys)
    if quantizer.scale_rule == "none" or stored.unit_scale is not None:
        return
    scale = stored.element_scale().expand(x.shape)
    assert same(whole, round_to(x / scale, quantizer.element, rounding, keys=keys) * scale)
    if rounding != "toward_zero" and quantizer.scale_rule in ("max", "pow2", "rceil"):
        step = (x.abs() * quantizer.element.epsilon).maximum(scale * quantizer.element.min_subnormal)
        assert ((whole - x).abs() <= step * 1.001).all()


# --- granularity: what a scale is shared by --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "axis", "expected"),
    [("tensor", 0, (1, 1, 1)), ("example", 0, (4, 1, 1)), ("channel", 1, (1, 6, 1)), ("channel", 0, (4, 1, 1))],
)
def test_scales_lie_as_the_granularity_says(granularity: str, axis: int, expected: tuple[int, ...]) -> None:
    x = data(4, 6, 10)
    stored = Quantizer("fp8", granularity, channel_axis=axis)(x)
    assert stored.scale.shape == expected
    dims = [d for d in range(3) if expected[d] == 1]
    assert same(stored.scale, x.abs().amax(dims, keepdim=True) / 448)


def test_blocks_lie_along_their_axis() -> None:
    x = data(3, 50, 7)
    stored = Quantizer("mxfp4")(x, axis=1)
    assert stored.scale.shape == (3, 2, 7)
    padded = torch.cat([x, torch.zeros(3, 14, 7)], 1)
    assert same(stored.codes.float(), Quantizer("mxfp4")(padded, axis=1).codes[:, :50].float())
    turned = Quantizer("mxfp4").fake_quantize(x.transpose(1, 2).contiguous(), axis=2).transpose(1, 2)
    assert same(stored.dequantize(), turned)
    assert Quantizer("fp8", "block", block_size=5)(x, axis=1).scale.shape == (3, 10, 7)


@pytest.mark.parametrize("shape", [(32, 48), (40, 50)])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8"])
def test_square_blocks_commute_with_the_transpose(shape: tuple[int, int], name: str) -> None:
    quantizer = Quantizer(name, "tensor", square_blocks=True, block_size=16)
    weight = data(*shape)
    assert quantizer(weight).scale.shape == (math.ceil(shape[0] / 16), math.ceil(shape[1] / 16))
    assert same(quantizer.fake_quantize(weight).t(), quantizer.fake_quantize(weight.t().contiguous()))
    assert same(quantizer.fake_quantize(weight), quantizer(weight).dequantize())


# --- examples keep apart ---------------------------------------------------------------------------------------------

PRIVATE = [
    *(Quantizer(name, granularity) for name, granularity in product(FORMATS_TRIED, ["example", "channel"])),
    *(Quantizer("fp8", scale_rule=rule) for rule in ("pow2", "floor", "rceil", "none")),
    *(Quantizer(name, rounding="stochastic") for name in ("luq_fp4", "mxfp4", "nvfp4", "int8", "bf16")),
    Quantizer("fp8", "block", block_size=8),
]


@pytest.mark.parametrize("quantizer", PRIVATE, ids=lambda q: f"{q.format.name}-{q.granularity}-{q.rounding}")
def test_an_example_is_quantized_as_if_alone(quantizer: Quantizer) -> None:
    assert not quantizer.mixes_examples
    x, keys = data(5, 9, 40), keys_for(quantizer, 5)
    together = quantizer.fake_quantize(x, keys=keys)
    for i in range(5):
        key = None if keys is None else keys[i : i + 1]
        assert same(quantizer.fake_quantize(x[i : i + 1], keys=key)[0], together[i])


@pytest.mark.parametrize("quantizer", PRIVATE, ids=lambda q: f"{q.format.name}-{q.granularity}-{q.rounding}")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_no_number_stays_in_its_example(quantizer: Quantizer, bad: float) -> None:
    x, keys = data(5, 9, 40), keys_for(quantizer, 5)
    expected = quantizer.fake_quantize(x, keys=keys)
    spoiled = x.clone()
    spoiled[2, 3, 4] = bad
    result = quantizer.fake_quantize(spoiled, keys=keys)
    others = [0, 1, 3, 4]
    assert same(result[others], expected[others])
    assert same(quantizer(spoiled, keys=keys).dequantize()[others], expected[others])
    if not math.isfinite(bad) and quantizer.scale_rule != "none":
        assert result[2, 3, 4].isnan()


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer("fp8", "tensor"),
        Quantizer("nvfp4", "tensor"),
        Quantizer("fp8", "channel", channel_axis=1),
        Quantizer("mxfp4", "tensor", square_blocks=True),
    ],
    ids=lambda q: f"{q.format.name}-{q.granularity}",
)
def test_a_mixing_quantizer_is_seen_to_mix(quantizer: Quantizer) -> None:
    """The guard is tried: the quantizers that say they mix do change an example when another one changes."""
    assert quantizer.mixes_examples
    x = data(4, 48)
    changed = x.clone()
    changed[0] *= 1e4
    assert not same(quantizer.fake_quantize(x)[1:], quantizer.fake_quantize(changed)[1:])


def test_blocks_across_examples_are_refused() -> None:
    for granularity in ("example", "block"):
        quantizer = Quantizer("mxfp4", granularity)
        assert not quantizer.mixes_examples
        for call in (lambda q: q.fake_quantize(data(64, 5), axis=0), lambda q: q(data(64), axis=-1)):
            with pytest.raises(InputError, match="mix examples") as caught:
                call(quantizer)
            assert "tensor" in (caught.value.hint or "")
    assert Quantizer("mxfp4", "tensor").fake_quantize(data(64, 5), axis=0).shape == (64, 5)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "bf16"])
@pytest.mark.parametrize("granularity", ["tensor", "example"])
def test_the_scale_of_elements_is_that_of_their_codes(name: str, granularity: str) -> None:
    quantizer = Quantizer(name, granularity)
    for x, axis in ((data(4, 70), 1), (data(3, 33, 5), 1)):
        quantized = quantizer(x, axis=axis)
        scale = quantizer.element_scale(x, axis=axis)
        wanted = quantized.dequantize()
        close = torch.allclose(quantized.values() * scale, wanted, rtol=1e-6)  # NVFP4's two scales as one round anew
        assert close if name == "nvfp4" else torch.equal(quantized.values() * scale, wanted)
    assert Quantizer("fp8", granularity).element_scale(torch.tensor(448.0)) == 1


def test_zero_examples_have_scale_one() -> None:
    x = torch.zeros(3, 8)
    x[1] = -0.0
    x[2, 0] = 5.0
    for name, rule in product(["fp8", "luq_fp4", "int8"], ["max", "pow2"]):
        stored = Quantizer(name, scale_rule=rule)(x)
        assert stored.scale[:2].tolist() == [[1.0], [1.0]]
        assert (stored.dequantize()[:2] == 0).all()


def test_powers_of_two_scale_exactly() -> None:
    x = data(50, 20)
    scale = Quantizer("fp8", scale_rule="pow2")(x).scale
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert same((x / scale) * scale, x)


# --- a format of 16 bits and more is a cast --------------------------------------------------------------------------


def test_wide_formats_are_cast() -> None:
    x = torch.tensor([[1e5, 1.0001, -1e-9, math.inf, math.nan]])
    assert same(Quantizer("fp16").fake_quantize(x), x.half().float())
    assert same(Quantizer("bf16").fake_quantize(x), x.bfloat16().float())
    assert same(Quantizer("fp32").fake_quantize(x), x)
    assert Quantizer("fp16").scale_rule == "none"
    assert Quantizer("fp16", scale_rule="max").fake_quantize(x[:, :3])[0, 0] == 1e5
    assert not Quantizer("fp16", "tensor").mixes_examples


# --- gradients and transforms ----------------------------------------------------------------------------------------


def test_gradients_pass_straight_through_or_stop_at_saturation() -> None:
    x = torch.tensor([[480.0, 1.0, -500.0, 3.0]], requires_grad=True)
    for masked, expected in ((False, [1.0, 1, 1, 1]), (True, [0.0, 1, 0, 1])):
        quantizer = Quantizer("fp8", scale_rule="floor", saturation_mask=masked)
        x.grad = None
        quantizer.fake_quantize(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [expected]
    with pytest.raises(InputError, match="requires a gradient"):
        Quantizer("fp8").fake_quantize(x, out=torch.empty(1, 4))


@pytest.mark.parametrize("name", FORMATS_TRIED)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_vmap_over_examples_is_the_batch(name: str, rounding: str) -> None:
    quantizer = Quantizer(name, rounding=rounding)
    x, keys = data(4, 6, 33), derive_keys(3, torch.arange(4))
    mapped = torch.func.vmap(lambda e, k: quantizer.fake_quantize(e[None], keys=k[None])[0])(x, keys)
    assert same(mapped, quantizer.fake_quantize(x, keys=keys))


def test_gradients_through_vmap() -> None:
    quantizer = Quantizer("mxfp8", "tensor", saturation_mask=True)
    weight, x = data(8, 32), data(5, 32)

    def loss(weight: Tensor, example: Tensor) -> Tensor:
        return (quantizer.fake_quantize(weight) @ example).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    assert gradients.shape == (5, 8, 32)
    assert gradients.abs().sum() > 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
@pytest.mark.parametrize("name", ["fp8", "luq_fp4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_compiled_bits_are_eager_bits(name: str, rounding: str) -> None:
    quantizer = Quantizer(name, rounding=rounding)
    x, keys = data(40, 320), derive_keys(1, torch.arange(40))
    assert same(
        torch.compile(lambda x: quantizer.fake_quantize(x, keys=keys))(x), quantizer.fake_quantize(x, keys=keys)
    )


# --- dtypes, shapes, buffers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS_TRIED)
def test_other_dtypes_are_those_of_their_float32_values(name: str) -> None:
    quantizer = Quantizer(name)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        if (name, dtype) == ("bf16", torch.float16):
            continue
        x = torch.randn(4, 70, generator=generator()).to(dtype)
        assert same(quantizer.fake_quantize(x), quantizer.fake_quantize(x.float()).to(dtype))
        assert quantizer(x).dequantize().dtype == dtype


@pytest.mark.parametrize("name", FORMATS_TRIED)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_shapes_and_strides(name: str, rounding: str) -> None:
    quantizer = Quantizer(name, rounding=rounding)
    images = data(3, 40, 6, 6)
    keys = keys_for(quantizer, 3)
    expected = quantizer.fake_quantize(images, keys=keys, axis=1)
    last = images.to(memory_format=torch.channels_last)
    result = quantizer.fake_quantize(last, keys=keys, axis=1)
    assert same(result, expected)
    assert result.stride() == last.stride()
    for out in (torch.empty_like(images), torch.empty_like(last)):
        assert quantizer.fake_quantize(images, keys=keys, axis=1, out=out) is out
        assert same(out, expected)
    empty = torch.empty(0, 5)
    zero_keys = keys if keys is None else keys[:0]
    assert quantizer.fake_quantize(empty, keys=zero_keys).shape == (0, 5)
    assert quantizer(empty, keys=zero_keys).dequantize().shape == (0, 5)
    meta = torch.empty(3, 40, device="meta")
    assert quantizer.fake_quantize(meta, keys=None if keys is None else keys.to("meta")).device.type == "meta"


def test_a_scalar_tensor_is_one_example() -> None:
    x = torch.tensor(-3.3)
    for quantizer in (Quantizer("fp8"), Quantizer("mxfp8", "tensor"), Quantizer("nvfp4", "tensor")):
        assert quantizer.fake_quantize(x).shape == ()
        assert same(quantizer.fake_quantize(x), quantizer(x).dequantize())
        assert abs(quantizer.fake_quantize(x) + 3.3) < 0.7


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp9"}, "unknown format 'fp9'"),
        ({"format": "fp8", "granularity": "row"}, "granularity='row'"),
        ({"format": "fp8", "rounding": "up"}, "rounding='up'"),
        ({"format": "fp8", "scale_rule": "amax"}, "scale_rule='amax'"),
        ({"format": "fp8", "scale_rule": "nvfp4"}, "scale_rule='nvfp4'"),
        ({"format": "nvfp4", "scale_rule": "max"}, "scale_rule='max'"),
        ({"format": "fp8", "granularity": "block"}, "without block_size"),
        ({"format": "fp8", "block_size": 0}, "block_size=0"),
        ({"format": "float8_e8m0fnu"}, "is for scales"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Quantizer(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert caught.value.hint


def test_calls_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="without random bits"):
        Quantizer("fp8", rounding="stochastic").fake_quantize(torch.ones(2, 2))
    with pytest.raises(InputError, match="axis=5"):
        Quantizer("mxfp4").fake_quantize(torch.ones(2, 2), axis=5)
    with pytest.raises(InputError, match="square blocks"):
        Quantizer("nvfp4", "tensor", square_blocks=True).fake_quantize(torch.ones(4))
    with pytest.raises(InputError, match="channel_axis=1"):
        Quantizer("mxfp4", "channel", channel_axis=1).fake_quantize(torch.ones(2, 32))
    with pytest.raises(InputError, match="dtype"):
        Quantizer("fp8").fake_quantize(torch.ones(2, dtype=torch.int32))


def test_quantizers_are_values() -> None:
    a, b = Quantizer("mxfp4"), Quantizer(get_format("mxfp4_e2m1"))
    assert a == b
    assert hash(a) == hash(b)
    other = dataclasses.replace(a, rounding="stochastic")
    assert (other.format, other.block_size, other.rounding) == (a.format, 32, "stochastic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.rounding = "stochastic"  # type: ignore[misc]
    blocks = FORMATS["mxfp4_e2m1"]
    assert isinstance(blocks, BlockFormat)
    assert (a.element, a.scale_format) == (blocks.element, blocks.scale)
