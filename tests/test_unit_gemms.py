"""GEMMs through matrix units: with the plain unit they are the float32 GEMMs, with a chip's unit its own products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emulation import gemms, unit_gemms
from emulation.errors import InputError
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding
from emulation.matmul import matmul
from emulation.precision import PRESETS, layer_precision
from emulation.quantizer import Quantizer

LAYERS = {
    "linear": (lambda: nn.Linear(40, 6), (3, 40)),
    "tokens": (lambda: nn.Linear(40, 6), (3, 2, 5, 40)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2), (3, 3, 9, 8)),
    "conv2d padded beyond its kernel": (lambda: nn.Conv2d(3, 4, 1, stride=2, padding=3), (3, 3, 5, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(40, 36, 3, stride=(1, 2), groups=2), (3, 40, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (3, 2, 3, 4, 4)),
}


def keys(quantizer: Quantizer, role: int, tensor: Tensor) -> Tensor | None:
    return torch.arange(len(tensor)) + 1000 * role if quantizer.rounding == "stochastic" else None


def operands(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    return layer, x, torch.randn_like(layer(x))


@pytest.mark.parametrize("plan", [*PRESETS, "float8_e5m2", "bfloat16", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_plain_unit_gives_the_float32_gemms(name: str, plan: str) -> None:
    layer, x, g = operands(name)
    precision, conv, weight = layer_precision(plan), gemms.geometry(layer), layer.weight.detach()
    xq, wq = precision.output_operands(x, weight, conv, keys)
    found = unit_gemms.output(precision, "float32", x, weight, layer.bias.detach(), conv, keys)
    torch.testing.assert_close(found, gemms.output(xq, wq, layer.bias.detach(), conv))
    gq = precision.gradient(g, conv, keys)
    back = precision.grad_input_weight(weight, conv, keys) if precision.blocks else wq
    found = unit_gemms.grad_input(precision, "float32", g, weight, x, conv, keys)
    torch.testing.assert_close(found, gemms.grad_input(gq, back, x, conv))


@pytest.mark.parametrize("plan", [*PRESETS, "float8_e5m2", "bfloat16", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_plain_unit_gives_every_examples_weight_gradient(name: str, plan: str) -> None:
    layer, x, g = operands(name)
    precision, conv = layer_precision(plan), gemms.geometry(layer)
    plain = gemms.WeightGradient(weight=layer.weight.detach(), x=x, grad_output=g, conv=conv)
    found = unit_gemms.example_gradients(precision, "float32", plain, keys)
    if precision.blocks and conv is not None and not precision.hadamard:
        # MX along unfolded positions here, along the input's own positions there: close, not equal
        error = (found - plain.per_example()).norm() / plain.per_example().norm()
        assert error < (0.3 if plan == "mxfp4" else 0.08)
        return
    expected = precision.weight_gradient(x, g, layer.weight.detach(), conv, keys).per_example()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("unit", "plan"), [("hopper", "fp8"), ("ada", "float8_e5m2"), ("cdna3", "bfloat16")])
def test_linear_products_are_those_of_the_unit(unit: str, plan: str) -> None:
    layer, x, g = operands("linear")
    p, weight = layer_precision(plan), layer.weight.detach()
    x, g = x * 100, g * 100
    xq, wq, gq = p.input(x), p.weight(weight), p.grad_output(g)
    sx, sw, sg = (torch.broadcast_to(q.scale.flatten(), (n,)) for q, n in ((xq, 3), (wq, 1), (gq, 3)))
    product = matmul(xq.values(), wq.values().t(), unit, p.input.element, p.weight.element)
    found = unit_gemms.output(p, unit, x, weight, None, None, keys)
    torch.testing.assert_close(found, product * sx[:, None] * sw, rtol=1e-6, atol=0)
    product = matmul(gq.values(), wq.values(), unit, p.grad_output.element, p.weight.element)
    found = unit_gemms.grad_input(p, unit, g, weight, x, None, keys)
    torch.testing.assert_close(found, product * sg[:, None] * sw, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("unit", "plan"), [("hopper", "fp8"), ("blackwell", "mxfp8"), ("blackwell", "nvfp4")])
@pytest.mark.parametrize("name", ["tokens", "conv2d grouped"])
def test_a_units_accumulation_shows_and_stays_small(name: str, unit: str, plan: str) -> None:
    layer, x, _ = operands(name)
    p, conv, weight = PRESETS[plan], gemms.geometry(layer), layer.weight.detach()
    plain = unit_gemms.output(p, "float32", x, weight, None, conv, keys)
    found = unit_gemms.output(p, unit, x, weight, None, conv, keys)
    assert not torch.equal(found, plain) or unit == "blackwell"
    assert (found - plain).norm() / plain.norm() < 2e-3


@pytest.mark.parametrize("plan", ["fp8", "nvfp4"])
def test_layers_run_on_a_unit_and_examples_stay_apart(plan: str) -> None:
    torch.manual_seed(0)
    net = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), plan, unit="blackwell")
    set_plan(net, ["0", "2"])
    x = torch.randn(3, 3, 6, 6)
    ids = torch.tensor([4, 9, 2])

    def example(i: slice) -> list[Tensor]:
        set_rounding(net, seed=1, example_ids=ids[i])
        net.zero_grad()
        net(x[i]).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]

    alone = [example(slice(i, i + 1)) for i in range(3)]
    for together, parts in zip(example(slice(0, 3)), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, sum(parts), rtol=1e-4, atol=1e-5)
    for layer in quantizable_layers(net).values():
        layer.tape = []
    set_rounding(net, seed=1, example_ids=ids)
    net(x).square().sum().backward()
    (record,) = quantizable_layers(net)["2"].tape or []
    assert isinstance(record.weight, Tensor)
    for i in range(3):
        torch.testing.assert_close(record.weight[i], alone[i][2], rtol=1e-4, atol=1e-5)


def test_units_without_arithmetic_for_a_recipe_are_refused() -> None:
    with pytest.raises(InputError, match="unit='hopper' has no product"):
        quantize_model(nn.Linear(2, 2), "luq_fp4", unit="hopper")
    net = quantize_model(nn.Linear(2, 2), "fp8", unit="hopper")
    set_plan(net, [""])
    with pytest.raises(InputError, match="unit='hopper' has no product"):
        set_plan(net, {"": "nvfp4"})
    assert quantizable_layers(net)[""].precision is PRESETS["fp8"]
    with pytest.raises(InputError, match="unknown unit='happer'"):
        quantize_model(nn.Linear(2, 2), "fp8", unit="happer")
