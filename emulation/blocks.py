"""Which elements of a tensor share a scale, and the views in which scales broadcast against them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScaleLayout:
    """How the scales of one tensor lie.

    Args:
        shape: the tensor's shape, of at least one dimension.
        kept: dimensions along which units (examples, channels) differ; all others share a scale.
        block_axes: axes along which blocks run, ascending; without any, a unit has one scale.
        block_size: elements of a block along each of these axes.
        whole_rows: whether dim 0 must stay a dimension of the working view.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    block_axes: tuple[int, ...] = ()
    block_size: int = 1
    whole_rows: bool = False

    @property
    def expands(self) -> bool:
        """Whether block scales are repeated for every element, for want of a view of whole blocks."""
        uneven = any(self.shape[axis] % self.block_size for axis in self.block_axes)
        return uneven or (self.whole_rows and 0 in self.block_axes)

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which to work on the tensor: blocks in dimensions of their own, or the tensor's."""
        return self.shape if self.expands else self._split(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales, one per block or unit; with the dimensions of the tensor."""
        return tuple(
            math.ceil(n / self.block_size) if d in self.block_axes else n if self.block_axes or d in self.kept else 1
            for d, n in enumerate(self.shape)
        )

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of one scale per unit, with the dimensions of the tensor."""
        return tuple(n if d in self.kept else 1 for d, n in enumerate(self.shape))

    def _split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        parts: list[int] = []
        for d, n in enumerate(shape):
            parts += [n // self.block_size, self.block_size] if d in self.block_axes else [n]
        return tuple(parts)

    def amax(self, x: Tensor) -> Tensor:
        """The largest magnitude of what shares a scale, of shape ``scale_shape``; NaN where there is one."""
        if not self.block_axes:
            return _largest(x, tuple(d for d in range(x.dim()) if d not in self.kept))
        if any(self.shape[axis] % self.block_size for axis in self.block_axes):
            padding = [0, 0] * x.dim()
            for axis in self.block_axes:
                padding[2 * (x.dim() - axis) - 1] = -self.shape[axis] % self.block_size
            x = functional.pad(x, padding)
        within = tuple(axis + 1 + i for i, axis in enumerate(self.block_axes))
        return _largest(x.reshape(self._split(tuple(x.shape))), within).reshape(self.scale_shape)

    def unit_amax(self, amax: Tensor) -> Tensor:
        """The largest of the units' ``amax``, of shape ``unit_shape``."""
        dims = tuple(d for d in range(amax.dim()) if d not in self.kept)
        return amax.amax(dims, keepdim=True) if dims else amax

    def fit(self, scale: Tensor) -> Tensor:
        """Scales (one per block, or per unit) in a shape that broadcasts against ``view``."""
        if self.expands:
            return expanded(scale, self.shape, self.block_axes, self.block_size)
        for axis in reversed(self.block_axes):
            scale = scale.unsqueeze(axis + 1)
        return scale


def expanded(scale: Tensor, shape: tuple[int, ...], block_axes: tuple[int, ...], block_size: int) -> Tensor:
    """Block scales repeated for the elements of their blocks; dimensions of size 1 stay."""
    for axis in block_axes:
        if scale.shape[axis] > 1:
            scale = scale.repeat_interleave(block_size, axis).narrow(axis, 0, shape[axis])
    return scale


def piece(scale: Tensor, where: tuple[slice, ...]) -> Tensor:
    """The part of fitted scales that belongs to a piece of the view."""
    return scale[tuple(part if scale.shape[d] > 1 else slice(None) for d, part in enumerate(where))]


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    # two reductions cost less than the copy that abs makes; of zeros alone they may give -0, whose reciprocal is -inf
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)).abs_() if dims else x.abs()
