"""The project's own models, by name: small convolutional networks, residual and dense ones, transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpquant.resnet import BasicBlock, Bottleneck, DenseNet, ResNet, group_norm
from dpquant.transformers import Bert, Gpt2, SequenceClassifier, VisionTransformer
from emulation.errors import InputError, suggestion

NORMS: Mapping[str, bool] = MappingProxyType({"group": True, "none": False})


def _chosen(option: str, value: str, allowed: Mapping[str, Any]) -> Any:
    if value not in allowed:
        raise InputError(f"unknown {option}={value!r}", hint=suggestion(value, allowed))
    return allowed[value]


class MaxPool(nn.MaxPool2d):
    """``nn.MaxPool2d`` without padding or dilation: the same values, sooner on a CPU where no gradient is asked for.

    There torch's own looks at one number at a time, and took a quarter of an analysis of the digits; maxima of whole
    slices take a tenth of that.

    Args:
        size: of the square window.
        stride: from one window to the next; default: the size.
    """

    def __init__(self, size: int, stride: int | None = None) -> None:
        super().__init__(size, stride)
        self.size, self.step = size, stride or size

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, (H - size) // stride + 1, (W - size) // stride + 1] for ``x`` [B, C, H, W]."""
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            pooled: Tensor = super().forward(x)
            return pooled
        for axis in (-2, -1):
            last = x.shape[axis] - self.size
            shifted = (x.narrow(axis, i, last + 1) for i in range(self.size))
            x = reduce(torch.maximum, (part.unfold(axis, 1, self.step).squeeze(-1) for part in shifted))
        return x


class SmallCNN(nn.Module):
    """Stages of 3x3 convolutions with GroupNorm, each stage closed by 2x2 pooling, then two linear layers.

    Args:
        stages: output channels of every convolution, stage by stage.
        hidden: width of the linear layer before the last.
        image_size: height and width of the image; halved by every stage.
        num_classes: width of the output.
        in_channels: channels of the image.
        activation: ``relu`` or ``tanh``.
        norm: ``group`` (after every convolution) or ``none``.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        hidden: int,
        *,
        image_size: int,
        num_classes: int = 10,
        in_channels: int = 1,
        activation: str = "relu",
        norm: str = "group",
    ) -> None:
        super().__init__()
        self.activation = _chosen("activation", activation, {"relu": nn.ReLU, "tanh": nn.Tanh})()
        normed = _chosen("norm", norm, NORMS)
        self.stages = tuple(len(stage) for stage in stages)
        side, channels = image_size, in_channels
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for stage in stages:
            for width in stage:
                self.convs.append(nn.Conv2d(channels, width, 3, padding=1))
                self.norms.append(group_norm(width) if normed else nn.Identity())
                channels = width
            side //= 2
        if side < 1:
            raise InputError(f"image_size={image_size} is too small for {len(stages)} stages of pooling")
        self.pool = MaxPool(2)
        self.fc1 = nn.Linear(channels * side * side, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for ``x`` [B, in_channels, image_size, image_size]."""
        layer = 0
        for depth in self.stages:
            for _ in range(depth):
                x = self.activation(self.norms[layer](self.convs[layer](x)))
                layer += 1
            x = self.pool(x)
        logits: Tensor = self.fc2(self.activation(self.fc1(torch.flatten(x, 1))))
        return logits


class TanhCNN(nn.Module):
    """Tramer and Boneh's end-to-end CNN for 28x28 images (arXiv 2011.11660, table 6), with tanh.

    Args:
        num_classes: width of the output.
        in_channels: channels of the image.
        norm: ``group`` (GroupNorm after the convolutions) or ``none``, as they have it.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1, norm: str = "group") -> None:
        super().__init__()
        normed = _chosen("norm", norm, NORMS)
        self.conv1 = nn.Conv2d(in_channels, 16, 8, 2, padding=2)
        self.norm1 = nn.GroupNorm(4, 16) if normed else nn.Identity()
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.norm2 = nn.GroupNorm(4, 32) if normed else nn.Identity()
        self.pool = MaxPool(2, 1)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for ``x`` [B, in_channels, 28, 28]."""
        x = self.pool(torch.tanh(self.norm1(self.conv1(x))))
        x = self.pool(torch.tanh(self.norm2(self.conv2(x))))
        logits: Tensor = self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))
        return logits


MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "digits_cnn": partial(SmallCNN, ((32, 32), (64, 64)), 64, image_size=8),
        "fashion_cnn": TanhCNN,
        "cifar_cnn": partial(SmallCNN, ((32, 32), (64, 64), (128, 128)), 128, image_size=32, in_channels=3),
        "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
        "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
        "densenet121": partial(DenseNet, (6, 12, 24, 16)),
        "vit_b_16": VisionTransformer,
        "vit_small": partial(VisionTransformer, image_size=32, patch=4, width=192, depth=6, heads=3, hidden=768),
        "transformer": SequenceClassifier,
        "bert_base": Bert,
        "gpt2": Gpt2,
    }
)

INPUT_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "digits_cnn": (1, 8, 8),
        "fashion_cnn": (1, 28, 28),
        "cifar_cnn": (3, 32, 32),
        "resnet18": (3, 224, 224),
        "resnet50": (3, 224, 224),
        "densenet121": (3, 224, 224),
        "vit_b_16": (3, 224, 224),
        "vit_small": (3, 32, 32),
        "transformer": (128,),
        "bert_base": (128,),
        "gpt2": (1024,),
    }
)
"""The shape of one example per model, without the batch; one number is a length in tokens."""


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What a model's class takes, by the option's name.

    Raises:
        InputError: a name that is none of ``MODELS``.
    """
    if name not in MODELS:
        raise InputError(f"unknown model name={name!r}", hint=suggestion(name, MODELS))
    return inspect.signature(MODELS[name]).parameters


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a model by name, freshly initialised on the default device.

    Args:
        name: a key of ``MODELS``.
        options: what the model's class takes: ``num_classes``, ``in_channels``, ``stem``, ``image_size``, ...

    Raises:
        InputError: unknown name, an option the model does not take, or an option out of range.
    """
    takes = options_of(name)
    allowed = tuple(p for p in takes if p not in ("block", "depths", "stages"))
    for option, value in options.items():
        if option not in allowed:
            raise InputError(f"model {name} takes no {option}={value!r}", hint=suggestion(option, allowed))
        if takes[option].annotation == "int" and (type(value) is not int or value < 1):
            raise InputError(f"{option}={value!r} of model {name} must be a whole number and at least 1")
    with _Shapes():
        return MODELS[name](**options)


class _Shapes(TorchFunctionMode):
    """Leaves tensors on the meta device unfilled: there torch's ``normal_`` first imports a compiler, for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if func in (Tensor.normal_, nn.init.normal_) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def example_input(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A batch of one empty example on the meta device, for tracing.

    Args:
        name: a key of ``MODELS``.
        shape: the example's shape without the batch; None takes ``INPUT_SHAPES[name]``. One number means tokens.

    Raises:
        InputError: unknown name, or a shape with as many dimensions as the model does not take.
    """
    options_of(name)  # refuses what is no name
    usual = INPUT_SHAPES[name]
    shape = usual if shape is None else shape
    if len(shape) != len(usual) or any(size < 1 for size in shape):
        raise InputError(
            f"input={'x'.join(map(str, shape))} does not fit model {name}",
            hint=f"give {len(usual)} positive sizes, such as {'x'.join(map(str, usual))}",
        )
    dtype = torch.long if len(usual) == 1 else torch.float32
    return torch.empty(1, *shape, dtype=dtype, device="meta")
