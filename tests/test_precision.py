"""Which operand is quantized how: presets, blocks along each GEMM's own axis, and the rotation that cancels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emulation import gemms
from emulation.errors import InputError
from emulation.formats import FORMATS
from emulation.precision import PRESETS, LayerPrecision, layer_precision
from emulation.quantizer import Quantizer
from emulation.rotation import TILE


def keys(quantizer: Quantizer, role: int, tensor: Tensor) -> Tensor | None:
    return torch.arange(len(tensor)) + 1000 * role if quantizer.rounding == "stochastic" else None


def test_presets_say_what_their_recipes_say() -> None:
    assert set(PRESETS) == {"luq_fp4", "int4_luq", "fp8", "mxfp8", "mxfp4", "nvfp4"}
    for name, precision in PRESETS.items():
        assert precision.name == name
        assert not precision.mixes_examples
        assert precision.weight.rounding == precision.input.rounding == "nearest_even"
    stochastic = {n for n, p in PRESETS.items() if p.grad_output.rounding == "stochastic"}
    assert stochastic == {"luq_fp4", "int4_luq", "mxfp4", "nvfp4"}
    assert {n for n, p in PRESETS.items() if p.blocks} == {"mxfp8", "mxfp4", "nvfp4"}
    assert PRESETS["fp8"].grad_output.element.name == "float8_e5m2"
    assert PRESETS["int4_luq"].grad_output == PRESETS["luq_fp4"].grad_output
    assert (PRESETS["int4_luq"].weight, PRESETS["int4_luq"].input) == (
        layer_precision("int4").weight,
        Quantizer("int4"),
    )
    assert PRESETS["nvfp4"].hadamard
    assert PRESETS["nvfp4"].weight.square_blocks


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "float8_e8m0fnu"])
def test_any_format_is_a_recipe_that_keeps_examples_apart(name: str) -> None:
    precision = layer_precision(name)
    assert precision == layer_precision(FORMATS[name])
    assert not precision.mixes_examples
    x = torch.randn(3, 40)
    xq, wq = precision.output_operands(x, torch.randn(8, 40), None, keys)
    assert torch.equal(xq[:1], precision.output_operands(x[:1], torch.randn(8, 40), None, keys)[0])
    assert wq.shape == (8, 40)


def test_names_are_presets_first_then_aliases() -> None:
    assert layer_precision("fp8") is PRESETS["fp8"]
    assert layer_precision("e4m3").grad_output.element.name == "float8_e4m3fn"
    assert layer_precision("nvfp4") is PRESETS["nvfp4"]
    own = LayerPrecision(name="own", weight=Quantizer("int8"), input=Quantizer("int8"), grad_output=Quantizer("int8"))
    assert layer_precision(own) is own
    with pytest.raises(InputError, match="unknown format or preset 'nvfp5'") as error:
        layer_precision("nvfp5")
    assert "nvfp4" in str(error.value.hint)


def test_a_scale_over_the_batch_is_known_to_mix() -> None:
    mixing, apart = Quantizer("fp4", granularity="tensor"), Quantizer("fp4")
    assert LayerPrecision(name="x", weight=apart, input=mixing, grad_output=apart).mixes_examples
    assert LayerPrecision(name="g", weight=apart, input=apart, grad_output=mixing).mixes_examples
    assert not LayerPrecision(name="w", weight=mixing, input=apart, grad_output=apart).mixes_examples


@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(64, 48, 3), nn.Conv1d(64, 48, 2, groups=2)])
def test_blocks_run_along_the_reduction_axis_of_each_gemm(layer: nn.Module) -> None:
    """Scaling one slice along a GEMM's reduction axis must change only the blocks of that slice."""
    torch.manual_seed(0)
    precision, conv = PRESETS["mxfp8"], gemms.geometry(layer)
    groups = 1 if conv is None else conv.groups
    spatial = {None: (), 2: (6, 6), 1: (40,)}[None if conv is None else len(conv.kernel)]
    x = torch.randn(2, 64, *spatial)
    weight = layer.weight.detach()
    xq, wq = precision.output_operands(x, weight, conv, keys)
    one = x.clone()
    one[:, :32] *= 1024.0  # one block of each group's first 32 input features
    changed = precision.output_operands(one, weight, conv, keys)[0]
    assert torch.equal(changed[:, 32:], xq[:, 32:])
    assert torch.equal(changed[:, :32], xq[:, :32] * 1024)
    torch.testing.assert_close(wq, _mx_rows(weight, 1), rtol=0, atol=0)
    back = precision.grad_input_weight(weight, conv, keys)
    per_group = [_mx_rows(part, 0) for part in weight.flatten(1).chunk(groups)]
    torch.testing.assert_close(back, torch.cat(per_group).reshape(weight.shape), rtol=0, atol=0)


def _mx_rows(matrix: Tensor, axis: int) -> Tensor:
    """MXFP8 by the definition: blocks of 32 along ``axis``, scale 2^(floor(log2 max) - 8)."""
    rows = matrix.movedim(axis, -1)
    parts = []
    for block in rows.split(32, -1):
        amax = block.abs().amax(-1, keepdim=True)
        scale = torch.exp2(torch.floor(torch.log2(amax)) - 8)
        parts.append((block / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, -1).movedim(-1, axis)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(4, 6, 3, padding=1, groups=2)])
def test_weight_gradient_blocks_stay_inside_one_example(name: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    precision, conv = PRESETS[name], gemms.geometry(layer)
    x = torch.randn(3, 5, 8) if conv is None else torch.randn(3, 4, 5, 5)
    g = torch.randn(3, 5, 6) if conv is None else torch.randn(3, 6, 5, 5)
    before = precision.weight_gradient(x, g, layer.weight.detach(), conv, keys).per_example()
    x[1], g[1] = x[1] * 1e4, float("nan")
    after = precision.weight_gradient(x, g, layer.weight.detach(), conv, keys).per_example()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.isfinite(after[1]).all()


def test_one_term_needs_no_reduction_axis() -> None:
    precision = PRESETS["mxfp8"]
    x, g = torch.randn(3, 64), torch.randn(3, 32)
    found = precision.weight_gradient(x, g, torch.zeros(32, 64), None, keys)
    assert torch.equal(found.x, precision.output_operands(x, torch.zeros(32, 64), None, keys)[0])
    assert torch.equal(found.grad_output, precision.gradient(g, None, keys))


@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Conv2d(40, 24, 3, groups=2)])
def test_square_weight_blocks_serve_both_gemms(layer: nn.Module) -> None:
    precision, conv = PRESETS["nvfp4"], gemms.geometry(layer)
    weight = layer.weight.detach()
    x = torch.zeros(1, 40, *weight.shape[2:])
    assert torch.equal(
        precision.output_operands(x, weight, conv, keys)[1], precision.grad_input_weight(weight, conv, keys)
    )
    if conv is None:  # 16 x 16: an outlier reaches the rows of its tile and no others
        weight = weight.clone()
        weight[:TILE, :TILE] *= 0.1
        before = precision.grad_input_weight(weight, conv, keys)
        weight[0, 0] = weight.abs().max()  # the scale above the blocks stays
        changed = (precision.grad_input_weight(weight, conv, keys) != before).nonzero()
        assert changed[:, 0].max() > 0
        assert changed.max() < TILE


def test_rotated_weight_gradient_is_near_the_true_one() -> None:
    torch.manual_seed(0)
    layer, precision = nn.Conv2d(16, 16, 3, padding=1), PRESETS["nvfp4"]
    x, g = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    conv = gemms.geometry(layer)
    weight = layer.weight.detach()
    true = gemms.WeightGradient(weight=weight, x=x, grad_output=g, conv=conv).per_example()
    found = precision.weight_gradient(x, g, weight, conv, keys).per_example()
    error = (found - true).norm() / true.norm()
    assert 0.02 < error < 0.3
