"""Residual and dense convolutional networks for private training: GroupNorm, out-of-place, names as in torchvision.

Batch normalisation mixes examples, so no per-example gradient exists through it; and Opacus's backward hooks refuse
in-place operations on a hooked layer's output. Shapes and names are those of torchvision's ``resnet18``, ``resnet50``
and ``densenet121``, so that a state dict moves between the two, BatchNorm's running statistics aside.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulation.errors import InputError, suggestion

STEMS = ("imagenet", "cifar")


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with gcd(32, channels) groups, as Opacus's ``ModuleValidator.fix`` puts for a BatchNorm."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = group_norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` [B, C, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride is in the 3x3 (ResNet-50 v1.5)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = group_norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = group_norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` [B, C, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), group_norm(out_channels))


def _check_stem(stem: str) -> None:
    if stem not in STEMS:
        raise InputError(f"unknown stem={stem!r}", hint=suggestion(stem, STEMS))


class ResNet(nn.Module):
    """A residual network over images [B, in_channels, H, W].

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks per stage.
        num_classes: width of the output.
        in_channels: channels of the image.
        stem: ``imagenet`` (7x7 stride 2 and a max-pool, as torchvision) or ``cifar`` (3x3 stride 1, no pool).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        _check_stem(stem)
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, 64, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False)
        self.bn1 = group_norm(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        width = 64
        for stage, depth in enumerate(depths):
            channels = 64 * 2**stage
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(block(width, channels, stride=2 if stage and not index else 1))
                width = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for ``x`` [B, in_channels, H, W]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


class DenseLayer(nn.Module):
    """Norm, 1x1 convolution, norm, 3x3 convolution; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int, width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = group_norm(width)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, C, H, W] with ``growth`` channels more."""
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class DenseNet(nn.Module):
    """A densely connected network over images [B, in_channels, H, W].

    Args:
        depths: dense layers per block.
        growth: channels each layer adds.
        num_classes: width of the output.
        in_channels: channels of the image.
        stem: as in ``ResNet``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        growth: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        _check_stem(stem)
        imagenet = stem == "imagenet"
        channels = 2 * growth
        features: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_channels, channels, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False),
            norm0=group_norm(channels),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity(),
        )
        for index, depth in enumerate(depths, start=1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for layer in range(depth):
                layers[f"denselayer{layer + 1}"] = DenseLayer(channels, growth, 4 * growth)
                channels += growth
            features[f"denseblock{index}"] = nn.Sequential(layers)
            if index < len(depths):
                features[f"transition{index}"] = nn.Sequential(
                    OrderedDict(
                        norm=group_norm(channels),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2, 2),
                    )
                )
                channels //= 2
        features["norm5"] = group_norm(channels)
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for ``x`` [B, in_channels, H, W]."""
        x = F.relu(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
