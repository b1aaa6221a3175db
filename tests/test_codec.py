from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from grid_reference import critical_points, every_bfloat16, every_float16
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulation.codec as codec
from emulation.codec import decode, derive_keys, encode, round_to
from emulation.errors import InputError
from emulation.formats import FORMATS, NumberFormat, scalar_format

SCALARS = [f for f in FORMATS.values() if isinstance(f, NumberFormat)]
NAMES = [f.name for f in SCALARS]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.bits <= 16], ids=lambda f: f.name)
def test_every_code_survives_decode_and_encode(fmt: NumberFormat) -> None:
    codes = torch.arange(fmt.code_count, dtype=torch.int32)
    codes = codes.to(torch.uint8) if fmt.bits <= 8 else codes.to(torch.int16).view(torch.uint16)
    values = decode(codes, fmt)
    expected = torch.tensor([v for _, v in fmt.values()], dtype=torch.float32)
    number = ~expected.isnan()
    assert bits_equal(values[number], expected[number])
    assert values[~number].isnan().all()
    back = encode(values, fmt, overflow="nonfinite")
    assert back.dtype == codes.dtype
    assert torch.equal(back.to(torch.int32)[number], codes.to(torch.int32)[number])
    assert decode(back, fmt)[~number].isnan().all()


@pytest.mark.parametrize("fmt", [f for f in SCALARS if hasattr(ml_dtypes, f.name) and f.kind != "int"], ids=str)
def test_codes_are_those_of_ml_dtypes(fmt: NumberFormat) -> None:
    x = np.concatenate([every_bfloat16(), every_float16(), critical_points(fmt)])
    x = x if fmt.has_nan else x[~np.isnan(x)]
    ours = encode(torch.from_numpy(x), fmt, overflow="nonfinite").numpy()
    with np.errstate(all="ignore"):
        theirs = x.astype(getattr(ml_dtypes, fmt.name))
        number = ~np.isnan(theirs.astype(np.float32))
    assert np.array_equal(ours[number], theirs.view(ours.dtype)[number])


@pytest.mark.parametrize("name", ["tfloat32", "float32"])
def test_wide_codes_are_the_bits_of_float32(name: str) -> None:
    x = torch.tensor([1.5, -2.0, 0.0, -0.0, 1e-40, torch.inf])
    codes = encode(x, name, overflow="nonfinite")
    assert codes.dtype == torch.uint32
    assert bits_equal(decode(codes, name), round_to(x, name, overflow="nonfinite"))


@settings(max_examples=60)
@given(
    fmt=st.sampled_from([f for f in SCALARS if f.kind != "exponent"]),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    rounding=st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "stochastic"]),
)
def test_rounding_is_idempotent_and_decode_of_encode(fmt: NumberFormat, values: list[float], rounding: str) -> None:
    x = torch.tensor(values)
    before = x.clone()
    once = round_to(x, fmt, rounding, generator=generator())
    assert bits_equal(x, before)
    assert bits_equal(round_to(once, fmt, rounding, generator=generator(1)), once)
    assert bits_equal(decode(encode(x, fmt, rounding, generator=generator()), fmt), once)
    if fmt.kind != "int":
        assert bits_equal(
            round_to(-x, fmt, rounding, generator=generator()), -once if fmt.has_negative_zero else -once + 0
        )


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.bits <= 16 and f.kind != "exponent"], ids=lambda f: f.name)
def test_rounding_is_monotone(fmt: NumberFormat) -> None:
    x = torch.from_numpy(np.sort(every_bfloat16()[np.isfinite(every_bfloat16())]))
    for rounding in ("nearest_even", "nearest_away", "toward_zero"):
        q = round_to(x, fmt, rounding)
        assert (q[1:] >= q[:-1]).all()


# --- dtypes, shapes, devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in SCALARS if f.bits <= 8], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_half_precision_is_rounded_as_its_float32_values(fmt: NumberFormat, rounding: str) -> None:
    for dtype, values in ((torch.bfloat16, every_bfloat16()), (torch.float16, every_float16())):
        x = torch.from_numpy(values[np.isfinite(values)]).to(dtype)
        if dtype == torch.float16 and fmt.kind == "exponent":
            with pytest.raises(InputError, match="cannot hold"):
                round_to(x, fmt)
            continue
        wide = round_to(x.float(), fmt, rounding, generator=generator())
        half = round_to(x, fmt, rounding, generator=generator())
        assert half.dtype == dtype
        assert torch.equal(half.float().nan_to_num(7), wide.nan_to_num(7))


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    for dtype, name in ((torch.bfloat16, "float16"), (torch.float16, "bfloat16")):
        with pytest.raises(InputError, match="cannot hold the values") as caught:
            round_to(torch.ones(2, dtype=dtype), name)
        assert "float32" in (caught.value.hint or "")
    assert round_to(torch.ones(2, dtype=torch.bfloat16), "tf32").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="dtype"):
        round_to(torch.ones(2, dtype=dtype), "fp8")


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(InputError, match=r"layout=torch\.sparse_coo"):
        round_to(torch.ones(2, 2).to_sparse(), "fp8")


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("name", ["fp8", "e3m0", "bf16", "int8"])
def test_strides_change_nothing(name: str, rounding: str) -> None:
    base = torch.randn(6, 8, 30, 200, generator=generator()) * 3
    expected = round_to(base, name, rounding, generator=generator())
    images = base.to(memory_format=torch.channels_last)
    result = round_to(images, name, rounding, generator=generator())
    assert bits_equal(result, expected)
    assert result.stride() == images.stride()
    turned = base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert bits_equal(round_to(turned, name, rounding, generator=generator()), expected)
    cut = torch.cat([base, base], 3)[..., :200]
    assert bits_equal(round_to(cut, name, rounding, generator=generator()), expected)
    assert bits_equal(round_to(base[:1].expand(6, -1, -1, -1), name), round_to(base[:1], name).expand(6, -1, -1, -1))


@pytest.mark.parametrize("name", NAMES)
def test_empty_scalar_and_meta_tensors(name: str) -> None:
    assert round_to(torch.empty(0, 3), name).shape == (0, 3)
    assert encode(torch.empty(0, 3), name).shape == (0, 3)
    assert round_to(torch.tensor(2.0), name).shape == ()
    meta = torch.empty(4, 5, device="meta")
    for rounding, keys in (("nearest_even", None), ("stochastic", torch.zeros(4, dtype=torch.int64, device="meta"))):
        result = round_to(meta, name, rounding, keys=keys)
        assert (result.device.type, result.shape, result.dtype) == ("meta", (4, 5), torch.float32)


def test_out_receives_the_result_and_the_input_stays() -> None:
    x = torch.randn(300, 1000, generator=generator())
    before = x.clone()
    expected = round_to(x, "fp8")
    for out in (torch.empty_like(x), torch.empty(1000, 300).t()):
        assert round_to(x, "fp8", out=out) is out
        assert bits_equal(out.contiguous(), expected)
    small = torch.empty(3)
    assert round_to(before[0, :3], "fp8", out=small) is small
    assert bits_equal(small, expected[0, :3])
    assert bits_equal(x, before)
    for bad in (torch.empty(3, 3), torch.empty(300, 1000, dtype=torch.float64)):
        with pytest.raises(InputError, match="out of shape"):
            round_to(x, "fp8", out=bad)
    assert round_to(x, "fp8", out=x) is x
    assert bits_equal(x, expected)


# --- NaN, infinity, overflow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SCALARS, ids=lambda f: f.name)
def test_nan_stays_or_is_refused(fmt: NumberFormat) -> None:
    x = torch.tensor([1.0, torch.nan])
    if fmt.has_nan:
        assert round_to(x, fmt)[1].isnan()
        assert decode(encode(x, fmt), fmt)[1].isnan()
    else:
        for function in (round_to, encode):
            with pytest.raises(InputError, match="has none"):
                function(x, fmt)


@pytest.mark.parametrize(
    ("name", "nonfinite"),
    [("fp8", "nan"), ("e5m2", "inf"), ("float8_e4m3fnuz", "nan"), ("fp4", "6"), ("int8", "127"), ("e3m0", "16")],
)
def test_overflow_saturates_or_becomes_what_the_format_has(name: str, nonfinite: str) -> None:
    fmt = scalar_format(name)
    x = torch.tensor([1e30, torch.inf, -torch.inf])
    assert round_to(x, fmt).tolist() == [fmt.max_value, fmt.max_value, fmt.min_value]
    assert str(float(nonfinite)) == str(round_to(x, fmt, overflow="nonfinite")[0].item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "nearest"}, "unknown rounding='nearest'"),
        ({"overflow": "wrap"}, "unknown overflow='wrap'"),
        ({"rounding": "stochastic"}, "without random bits"),
        ({"rounding": "stochastic", "keys": torch.zeros(3, dtype=torch.int64)}, "keys of shape"),
        ({"rounding": "stochastic", "keys": torch.zeros(2)}, "keys of shape"),
        ({"rounding": "stochastic", "generator": torch.Generator(), "random_bits": 0}, "random_bits=0"),
        ({"fmt": "fp9"}, "unknown format"),
        ({"fmt": "nvfp4"}, "block scales"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        round_to(torch.ones(2, 2), **{"fmt": "fp8", **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert caught.value.hint


def test_codes_are_integers() -> None:
    with pytest.raises(InputError, match="codes of dtype"):
        decode(torch.ones(2), "fp8")


# --- stochastic rounding: a pure function of key and index -----------------------------------------------------------


def test_one_generator_one_result() -> None:
    x = torch.randn(500, 700, generator=generator())
    first, other = (round_to(x, "fp4", "stochastic", generator=generator(s)) for s in (1, 2))
    assert bits_equal(round_to(x, "fp4", "stochastic", generator=generator(1)), first)
    assert not bits_equal(first, other)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    round_to(x, "fp4", "stochastic", generator=generator(1))
    assert torch.equal(state, torch.get_rng_state())


def test_keys_make_every_example_independent_of_the_batch() -> None:
    x = torch.randn(5, 90, 1000, generator=generator())
    keys = derive_keys(3, torch.tensor([4, 1, 7, 1, 0]))
    whole = round_to(x, "fp8", "stochastic", keys=keys)
    for i in range(5):
        assert bits_equal(round_to(x[i : i + 1], "fp8", "stochastic", keys=keys[i : i + 1])[0], whole[i])
        assert bits_equal(round_to(x[i], "fp8", "stochastic", keys=keys[i]), whole[i])
    order = torch.tensor([3, 0, 2, 4, 1])
    assert bits_equal(round_to(x[order], "fp8", "stochastic", keys=keys[order]), whole[order])


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 14])
def test_the_size_of_the_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    x = torch.randn(7, 31, 37, generator=generator())
    keys = derive_keys(3, torch.arange(7))
    cases = list(product(["fp8", "e3m0", "tf32"], [keys, keys[0]]))
    expected = [round_to(x, name, "stochastic", keys=key) for name, key in cases]
    monkeypatch.setattr(codec, "CHUNK", chunk)
    for (name, key), wanted in zip(cases, expected, strict=True):
        assert bits_equal(round_to(x, name, "stochastic", keys=key, backend="torch"), wanted)


def test_threads_change_no_bit() -> None:
    x = torch.randn(3, 200_000, generator=generator())
    cases = [("fp8", "nearest_even"), ("e3m0", "stochastic")]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([round_to(x, name, rounding, generator=generator(5)) for name, rounding in cases])
    finally:
        torch.set_num_threads(before)
    assert all(bits_equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
@pytest.mark.parametrize("name", ["fp8", "e3m0", "bf16", "int8"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_compiled_bits_are_eager_bits(name: str, rounding: str) -> None:
    x = torch.from_numpy(np.concatenate([every_bfloat16(), critical_points(scalar_format("fp8"))]))
    x = x[~x.isnan()]
    keys = derive_keys(5)

    def function(x: Tensor) -> Tensor:
        return round_to(x, name, rounding, keys=keys if rounding == "stochastic" else None)

    assert bits_equal(torch.compile(function)(x), function(x))


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in SCALARS if f.kind != "exponent"])
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "stochastic"])
def test_vmap_over_examples_is_the_batch(name: str, rounding: str) -> None:
    x = torch.randn(4, 3, 11, generator=generator())
    keys = derive_keys(2, torch.arange(4)) if rounding == "stochastic" else None
    expected = round_to(x, name, rounding, keys=keys)
    if keys is None:
        assert bits_equal(torch.func.vmap(lambda e: round_to(e, name, rounding))(x), expected)
    else:
        mapped = torch.func.vmap(lambda e, k: round_to(e, name, rounding, keys=k))(x, keys)
        assert bits_equal(mapped, expected)


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(4, 5, generator=generator(), requires_grad=True)
    weights = torch.randn(4, 5, generator=generator(1))
    q = round_to(x, "fp4")
    assert q.requires_grad
    (q * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    with torch.no_grad():
        assert not round_to(x, "fp4").requires_grad
        assert bits_equal(round_to(x, "fp4"), q.detach())
    with pytest.raises(InputError, match="requires a gradient"):
        round_to(x, "fp4", out=torch.empty(4, 5))


def test_per_example_gradients_through_functorch() -> None:
    x = torch.randn(6, 5, generator=generator())
    weight = torch.randn(5, generator=generator(1))

    def loss(weight: Tensor, example: Tensor) -> Tensor:
        return (round_to(example, "fp8") * round_to(weight, "fp4")).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    assert bits_equal(gradients, round_to(x, "fp8"))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("fmt", SCALARS, ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero", "stochastic"])
def test_a_gpu_gives_the_same_bits(fmt: NumberFormat, rounding: str) -> None:
    x = np.concatenate([every_bfloat16(), every_float16(), critical_points(scalar_format("fp8"))])
    x = torch.from_numpy(x[~np.isnan(x)])
    keys = derive_keys(1) if rounding == "stochastic" else None
    here, there = round_to(x, fmt, rounding, keys=keys), round_to(x.cuda(), fmt, rounding, keys=keys)
    assert torch.equal(here.nan_to_num(7).view(torch.int32), there.cpu().nan_to_num(7).view(torch.int32))
