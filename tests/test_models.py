"""The models against torchvision's facts, and against what private training needs of them."""

import functools
import hashlib

import pytest
import torch
from torch import nn

from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.models import INPUT_SHAPES, MODELS, MaxPool, build_model, example_input
from dpquant.resnet import group_norm
from emulation.errors import InputError
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding

# Of torchvision 0.28.0's own models with 10 classes: parameters, GroupNorms in place of BatchNorms, Conv and Linear
# layers, and the hash of their sorted parameter names and shapes.
TORCHVISION = {
    "resnet18": (11_181_642, 20, 21, "abfab4170d6b0441"),
    "resnet50": (23_528_522, 53, 54, "6bf3488180d32c51"),
    "densenet121": (6_964_106, 121, 121, "0cf81eb1e0937070"),
}
SMALL = ("digits_cnn", "fashion_cnn", "cifar_cnn", "vit_small", "transformer")


@functools.cache
def meta_model(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


def real_input(name: str, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *INPUT_SHAPES[name])
    if len(shape) == 2:
        return torch.randint(0, 1000, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(("size", "stride"), [(2, None), (2, 1), (3, 2), (3, None)])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 6), (0, 3, 4, 4), (1, 2, 3, 3)])
def test_pooling_has_the_bits_of_torchs(size: int, stride: int | None, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[::11] = torch.tensor(float("nan"))
    x.view(-1)[::5] = -0.0
    mine, torchs = MaxPool(size, stride), nn.MaxPool2d(size, stride)
    assert torch.equal(mine(x).view(torch.int32), torchs(x).view(torch.int32))
    with_gradient = x.clone().requires_grad_()
    assert mine(with_gradient).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(mine(with_gradient).view(torch.int32), torchs(x).view(torch.int32))
    assert mine(x.to("meta")).shape == torchs(x).shape


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_are_those_of_torchvision(name: str) -> None:
    parameters, norms, layers, digest = TORCHVISION[name]
    model = meta_model(name)
    modules = list(model.modules())
    shapes = sorted((key, tuple(p.shape)) for key, p in model.named_parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.GroupNorm) for m in modules) == norms
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in modules) == layers
    assert hashlib.sha256(repr(shapes).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("vit_b_16", {"num_classes": 1000}, 86_567_656),  # torchvision's vit_b_16
        ("bert_base", {"num_classes": 2}, 109_482_240 + 2 * 769),  # the encoder with its pooler, and a classifier
        ("gpt2", {}, 124_439_808 + 50257 * 768),  # the 124M model, its output layer untied
        ("fashion_cnn", {"norm": "none"}, 26_010),  # Tramer and Boneh's (arXiv 2011.11660), both of them
        ("cifar_cnn", {"norm": "none", "activation": "tanh"}, 550_570),
        ("fashion_cnn", {}, 26_010 + 96),  # and GroupNorm
    ],
)
def test_parameter_counts_of_the_others(name: str, options: dict[str, int], parameters: int) -> None:
    assert sum(p.numel() for p in meta_model(name, **options).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_example_and_has_buffers_nowhere(name: str) -> None:
    model = meta_model(name)
    out = model(example_input(name))
    assert out.shape[0] == 1
    assert not list(model.buffers())
    owners = {type(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners <= {nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding}


@pytest.mark.parametrize("name", SMALL)
def test_examples_do_not_see_each_other(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name).eval()
    x = real_input(name, 3)
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["resnet18", "digits_cnn", "fashion_cnn", "vit_small", "transformer"])
def test_opacus_hooks_find_every_example_gradient(name: str) -> None:
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(0)
    options = {"stem": "imagenet"} if name in TORCHVISION else {}
    model = build_model(name, **options)
    x = torch.randn(2, 3, 32, 32) if name in TORCHVISION else real_input(name, 2)
    hooked = GradSampleModule(model, loss_reduction="sum", strict=True)
    hooked(x).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad_sample.shape == (2, *parameter.shape)
        assert torch.isfinite(parameter.grad_sample).all()
    hooked.remove_hooks()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("format", [None, "luq_fp4", "nvfp4"])
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_small", {"depth": 2, "image_size": 8}, (3, 8, 8)),
        ("transformer", {"depth": 2, "length": 8, "vocabulary": 20}, (8,)),
        pytest.param("resnet50", {}, (3, 32, 32), marks=pytest.mark.long),
        pytest.param("densenet121", {}, (3, 32, 32), marks=pytest.mark.long),
    ],
)
def test_a_private_step_clips_the_gradients_that_hooks_materialise(name, options, shape, format) -> None:
    moved = []
    for clipping in ("bookkeeping", "hooks"):
        torch.manual_seed(0)
        model = quantize_model(build_model(name, **options))
        x = torch.randint(20, (3, *shape)) if len(shape) == 1 else torch.randn(3, *shape)
        set_plan(model, dict.fromkeys(quantizable_layers(model), format) if format else {})
        set_rounding(model, seed=1, example_ids=torch.arange(3))
        before = [p.detach().clone() for p in model.parameters()]
        private = private_module(model, clipping=clipping)
        optimizer = PrivateOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            module=private,
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            expected_batch_size=1,
        )
        private_criterion(nn.CrossEntropyLoss())(private(x), torch.tensor([0, 1, 1])).backward()
        optimizer.step()
        moved.append(torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]))
    assert 0.1 < moved[0].norm() <= 1.5
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)


def test_digits_cnn_has_layers_to_choose_from() -> None:
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in meta_model("digits_cnn").modules()) >= 5


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (3, 1), (1024, 32)])
def test_group_norm_divides_the_channels(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_stems() -> None:
    assert meta_model("resnet18", stem="cifar").conv1.weight.shape == (64, 3, 3, 3)
    assert meta_model("densenet121", in_channels=1).features.conv0.weight.shape == (64, 1, 7, 7)
    cifar = meta_model("resnet50", stem="cifar", num_classes=43)
    assert cifar(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 43)


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda: build_model("resnet81"), "unknown model name='resnet81'", "resnet18"),
        (lambda: build_model("resnet18", stem="cifer"), "unknown stem='cifer'", "cifar"),
        (lambda: build_model("resnet18", num_clases=3), "takes no num_clases=3", "num_classes"),
        (lambda: build_model("resnet18", depths=(1,)), "takes no depths", "num_classes"),
        (lambda: build_model("cifar_cnn", activation="tan"), "unknown activation='tan'", "tanh"),
        (lambda: build_model("fashion_cnn", norm="grop"), "unknown norm='grop'", "group"),
        (lambda: build_model("digits_cnn", num_classes=0), "num_classes=0", None),
        (lambda: build_model("digits_cnn", image_size=2), "image_size=2 is too small", None),
        (lambda: build_model("vit_b_16", image_size=30), "image_size=30", None),
        (lambda: example_input("resnet18", (32, 32)), "input=32x32 does not fit", "3x224x224"),
        (lambda: example_input("gpt2", (0,)), "input=0", "1024"),
        (lambda: example_input("nonet"), "unknown model name='nonet'", None),
    ],
)
def test_bad_input(call, message: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")
