"""The Hadamard rotation ahead of a weight gradient's quantizers, and the unfolded rows that it acts on."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from emulation import native
from emulation.gemms import ConvGeometry, at_least_float32, patches

TILE = 16
"""Width of the rotation."""
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Those of NVIDIA's recipe (arXiv 2509.25149)."""


def rotate(matrices: Tensor) -> Tensor:
    """[N, T, features] -> [N, T padded with zeros to a multiple of 16, features], each 16 rows rotated.

    The rotation is the orthogonal matrix diag(signs) H / 4. Its additions have one order, a butterfly's, so that they
    give the same bits on every device; half precision is added as float32.
    """
    padded = F.pad(at_least_float32(matrices), (0, 0, 0, -matrices.shape[1] % TILE))
    values = padded.unflatten(1, (-1, TILE)) * _signs(padded.dtype, padded.device)
    for apart in (1, 2, 4, 8):
        a, b = values.unflatten(2, (-1, 2, apart)).unbind(3)
        values = torch.stack((a + b, a - b), 3).flatten(2, 4)
    rotated: Tensor = (values * 0.25).flatten(1, 2)
    return rotated.to(matrices.dtype)


@lru_cache(maxsize=8)
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(SIGNS, dtype=dtype).unsqueeze(1).to(device)


class Unfolding:
    """The rotated rows of one operand of a weight gradient, some examples at a time.

    Args:
        x: [B, ..., in] or [B, in, *spatial].
        conv: the geometry of a convolution, None for Linear.
        in_weight_order: whether features must lie in the order of the weight's elements.

    Attributes:
        shape: of all rows, [B, groups, T padded, prod(kernel) * in / groups].
        channels_last: whether features lie kernel positions first and channels innermost.
    """

    def __init__(self, x: Tensor, conv: ConvGeometry | None, *, in_weight_order: bool) -> None:
        self._x, self._conv = x, conv
        kernel = torch.Size(() if conv is None else conv.kernel)
        groups, channels = (1, x.shape[-1]) if conv is None else (conv.groups, x.shape[1])
        size = x.shape[1:-1] if conv is None else torch.Size(conv.positions(tuple(x.shape[2:])))
        t = size.numel()
        self.shape = (x.shape[0], groups, t + -t % TILE, kernel.numel() * (channels // groups))
        ordered = in_weight_order and kernel.numel() > 1
        self._image: Tensor | None = None
        if x.device.type == "cpu" and x.dtype == torch.float32 and len(kernel) <= 2 and not ordered and native.usable():
            self._image = self._channels_last(x)
        self.channels_last = self._image is not None and kernel.numel() > 1

    def _channels_last(self, x: Tensor) -> Tensor:
        """[B, height, width, channels]."""
        if self._conv is None:
            return x.reshape(x.shape[0], 1, -1, x.shape[-1]).contiguous()
        return (x.unsqueeze(2) if x.dim() == 3 else x).permute(0, 2, 3, 1).contiguous()

    def write(self, out: Tensor, part: slice) -> None:
        """Writes the rows of some examples into ``out``, C-contiguous."""
        if self._image is not None:
            native.unfold_and_rotate(self._image[part], out, self._walk())
            return
        x = self._x[part]
        matrices = x.reshape(len(x), -1, x.shape[-1]) if self._conv is None else patches(x, self._conv).transpose(1, 2)
        out.copy_(rotate(matrices).view(out.shape))

    def _walk(self) -> tuple[int, ...]:
        """As quantize.c takes it, on a plane."""
        assert self._image is not None
        size = tuple(self._image.shape[1:])
        if self._conv is None:
            return (*size, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, size[1])
        conv, line = self._conv, len(self._conv.kernel) == 1
        fields = (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.positions(size[:2][line:]))
        plain = (1, 1, 0, 1, 1)
        both = [(p, *f) if line else f for p, f in zip(plain, fields, strict=True)]
        return (*size, conv.groups, *(n for pair in both for n in pair))
