"""Quantized layers: the stock layers while off, the composition of quantizers and GEMMs while on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulation.errors import InputError
from emulation.layers import (
    PRESETS,
    LayerPrecision,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    quantizable_layers,
    quantize_model,
    set_plan,
    set_rounding,
)
from emulation.precision import layer_precision
from emulation.quantizer import Quantizer

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 7), (4, 20)),
    "linear on tokens": (lambda: nn.Linear(20, 7), (4, 5, 20)),
    "linear without bias": (lambda: nn.Linear(20, 7, bias=False), (4, 20)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 8, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2), (4, 4, 9, 8)),
    "conv2d same, reflect": (lambda: nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), (4, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (4, 2, 4, 5, 6)),
}
PLANS = [None, *PRESETS, "float8_e5m2", "mxfp6", "int8", "bfloat16"]


def quantized(name: str, plan: str | LayerPrecision | None, seed: int = 0) -> tuple[QuantizedLayer, Tensor]:
    # float64 around the (float32) quantizers: the order of a kernel's sums cannot flip a rounding
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer = quantize_model(make()).double()
    assert isinstance(layer, QuantizedLayer)
    set_plan(layer, {} if plan is None else {"": plan})
    return layer, torch.randn(shape, dtype=torch.float64)


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], g)


@pytest.mark.parametrize("name", LAYERS)
def test_off_is_the_stock_layer_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    stock = make()
    layer = quantize_model(copy.deepcopy(stock))
    x = torch.randn(shape)
    assert torch.equal(layer(x), stock(x))
    g = torch.randn_like(stock(x))
    for ours, theirs in zip(gradients(layer, x, g), gradients(stock, x, g), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_recording_changes_no_gradient_and_gives_every_examples_own(name: str) -> None:
    layer, x = quantized(name, None)
    g = torch.randn_like(layer(x))
    expected = gradients(layer, x, g)
    layer.tape = []
    inputs = x.clone().requires_grad_()
    layer(inputs).backward(g)
    torch.testing.assert_close(inputs.grad, expected[0])
    assert all(p.grad is None for p in layer.parameters()), "the batch gradient is never computed"
    (record,) = layer.tape
    assert record.weight is not None
    torch.testing.assert_close(record.weight.total(), expected[1])
    if layer.bias is not None:
        assert record.bias is not None
        torch.testing.assert_close(record.bias.sum(0), expected[2])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_is_its_examples_one_by_one(name: str, plan: str | None) -> None:
    layer, x = quantized(name, plan)
    ids = torch.tensor([7, 3, 1000, 4])
    set_rounding(layer, seed=5, step=2, example_ids=ids)
    g = torch.randn_like(layer(x))
    out, together = layer(x), gradients(layer, x, g)
    layer.tape = []
    layer(x).backward(g)
    (record,) = layer.tape
    assert record.weight is not None
    layer.tape = None
    for i in range(len(x)):
        set_rounding(layer, seed=5, step=2, example_ids=ids[i : i + 1])
        one = slice(i, i + 1)
        torch.testing.assert_close(layer(x[one]), out[one])
        alone = gradients(layer, x[one], g[one])
        torch.testing.assert_close(alone[0], together[0][one])
        torch.testing.assert_close(alone[1], record.weight.per_example()[i])


def test_scalar_gemms_are_the_composition_of_quantizers_and_products() -> None:
    layer, x = quantized("conv2d", "fp8")
    p = PRESETS["fp8"]
    xq, wq = p.input.fake_quantize(x), p.weight.fake_quantize(layer.weight.detach())
    g = torch.randn_like(layer(x))
    gq = p.grad_output.fake_quantize(g)
    torch.testing.assert_close(layer(x), F.conv2d(xq, wq, layer.bias, padding=1))
    grad_x, grad_w, grad_b = gradients(layer, x, g)
    torch.testing.assert_close(grad_x, torch.nn.grad.conv2d_input(x.shape, wq, gq, padding=1))
    torch.testing.assert_close(grad_w, torch.nn.grad.conv2d_weight(xq, layer.weight.shape, gq, padding=1))
    torch.testing.assert_close(grad_b, g.sum((0, 2, 3)))


def test_block_gemms_are_the_composition_of_quantizers_and_products() -> None:
    layer, x = quantized("linear on tokens", "mxfp8")
    p = PRESETS["mxfp8"]
    w = layer.weight.detach()
    g = torch.randn_like(layer(x))
    fq = p.input.fake_quantize
    expected = F.linear(fq(x, axis=-1), p.weight.fake_quantize(w, axis=1), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    grad_x, grad_w, _ = gradients(layer, x, g)
    torch.testing.assert_close(grad_x, fq(g, axis=-1) @ p.weight.fake_quantize(w, axis=0))
    torch.testing.assert_close(grad_w, torch.einsum("bto,bti->oi", fq(g, axis=1), fq(x, axis=1)))


@pytest.mark.parametrize("plan", ["luq_fp4", "mxfp4", "float4_e2m1fn"])
def test_stochastic_gradients_are_unbiased(plan: str) -> None:
    layer, x = quantized("linear", plan)
    g = torch.randn_like(layer(x))
    truth = g @ layer_precision(plan).weight.fake_quantize(layer.weight.detach(), axis=0)
    draws = torch.stack([gradients(layer, x, g)[0] for _ in range(400)])
    z = (draws.mean(0) - truth) / (draws.std(0) / 20).clamp_min(1e-9)
    assert z.abs().max() < 5.5


def test_bits_are_fresh_without_a_seed_and_fixed_with_one() -> None:
    layer, x = quantized("linear", "luq_fp4")
    g = torch.randn_like(layer(x))
    assert not torch.equal(gradients(layer, x, g)[1], gradients(layer, x, g)[1])
    found = []
    for step in (1, 1, 2):
        set_rounding(layer, seed=1, step=step, example_ids=torch.arange(4))
        found.append(gradients(layer, x, g)[1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    other = quantize_model(nn.Sequential(nn.Linear(20, 7), nn.Linear(7, 7)))
    assert [m.index for m in quantizable_layers(other).values()] == [0, 1]


def test_bits_by_batch_position_are_refused() -> None:
    layer, x = quantized("linear", "luq_fp4")
    set_rounding(layer, seed=1)
    with pytest.raises(InputError, match="seed but no example ids"):
        layer(x).sum().backward()
    set_rounding(layer, seed=1, example_ids=torch.arange(3))
    with pytest.raises(InputError, match=r"shape \(3,\) and the batch has 4"):
        layer(x).sum().backward()
    set_plan(layer, {"": "fp8"})  # nothing is random here: no ids are asked for
    set_rounding(layer, seed=1)
    layer(x).sum().backward()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))


def test_quantize_model_keeps_parameters_names_and_hooks() -> None:
    net = model()
    seen: list[nn.Module] = []
    net[0].register_forward_hook(lambda layer, *_: seen.append(layer))
    before = dict(net.named_parameters())
    assert quantize_model(net) is net
    assert {k: id(v) for k, v in net.named_parameters()} == {k: id(v) for k, v in before.items()}
    assert list(quantizable_layers(net)) == ["0", "2.1"]
    assert type(net[0]) is QuantizedConv2d
    net(torch.randn(2, 1, 8, 8))
    assert seen == [net[0]]
    layers = list(quantizable_layers(net).values())
    quantize_model(net, preset="fp8")
    assert list(quantizable_layers(net).values()) == layers, "idempotent"
    assert layers[0].rounding is layers[1].rounding


def test_quantize_model_leaves_subclasses_and_attention_alone() -> None:
    class Own(nn.Linear):
        pass

    net = nn.ModuleDict({"own": Own(2, 2), "attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(2, 2)})
    quantize_model(net)
    assert list(quantizable_layers(net)) == ["linear"]
    assert isinstance(quantize_model(nn.Linear(2, 2)), QuantizedLinear)


def test_a_layer_used_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(4, 4)
    net = quantize_model(nn.Sequential(shared, nn.ReLU(), shared))
    assert net[0] is net[2]  # type: ignore[index]


def test_plans_switch_layers_at_run_time() -> None:
    net = quantize_model(model(), preset="fp8")
    x = torch.randn(2, 1, 8, 8)
    full = net(x)
    set_plan(net, {"0": "luq_fp4"})
    first, second = quantizable_layers(net).values()
    assert first.precision is PRESETS["luq_fp4"]
    assert second.precision is None
    half = net(x)
    assert not torch.equal(half, full)
    set_plan(net, ["2.1"])
    assert first.precision is None
    assert second.precision is PRESETS["fp8"]
    set_plan(net, {})
    assert torch.equal(net(x), full)


def test_bad_plans_change_nothing() -> None:
    net = quantize_model(model())
    set_plan(net, {"0": "fp8"})
    before = [layer.precision for layer in quantizable_layers(net).values()]
    with pytest.raises(InputError, match=r"unknown layer '2\.2'") as error:
        set_plan(net, {"2.2": "fp8"})
    assert "2.1" in str(error.value.hint)
    with pytest.raises(InputError, match="unknown format or preset 'fp9'"):
        set_plan(net, {"0": "luq_fp4", "2.1": "fp9"})
    mixing = Quantizer("fp4", granularity="tensor")
    bad = LayerPrecision(name="bad", weight=mixing, input=mixing, grad_output=mixing)
    for layer in quantizable_layers(net).values():
        layer.private = True
    with pytest.raises(InputError, match="'bad' mixes examples"):
        set_plan(net, {"0": "luq_fp4", "2.1": bad})
    assert [layer.precision for layer in quantizable_layers(net).values()] == before
    with pytest.raises(InputError, match="unknown format or preset"):
        quantize_model(model(), preset="fp9")


def test_layers_of_other_types_are_refused() -> None:
    net = quantize_model(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 2, 2)))
    set_plan(net, {"0": "fp8"})
    with pytest.raises(InputError, match="layer '1' is a ConvTranspose2d, whose products are not quantized"):
        set_plan(net, {"0": "fp8", "1": "fp8"})


def test_inputs_need_a_batch_dimension() -> None:
    layer, _ = quantized("conv2d", "fp8")
    with pytest.raises(InputError, match="without a batch dimension"):
        layer(torch.zeros(3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_an_empty_batch_passes(name: str, plan: str | None) -> None:
    layer, x = quantized(name, plan)
    out = layer(x[:0].requires_grad_())
    out.sum().backward()
    assert out.shape[0] == 0
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_frozen_parameters_get_nothing() -> None:
    layer, x = quantized("conv2d", "fp8")
    layer.weight.requires_grad_(False)
    layer.tape = []
    layer(x).sum().backward()
    (record,) = layer.tape
    assert record.weight is None
    assert record.bias is not None


def test_evaluation_leaves_no_record() -> None:
    layer, x = quantized("linear", "fp8")
    layer.tape = []
    layer.eval()
    layer(x).sum().backward()
    assert layer.tape == []
    assert layer.weight.grad is not None


def test_models_can_be_copied_and_saved() -> None:
    net = quantize_model(model())
    set_plan(net, {"0": "nvfp4"})
    x = torch.randn(2, 1, 8, 8)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    a, b = quantizable_layers(twin).values()
    assert a.rounding is b.rounding
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), net(x))
    fresh = model()
    fresh.load_state_dict(net.state_dict())
    set_plan(net, {})
    assert torch.equal(fresh(x), net(x))
