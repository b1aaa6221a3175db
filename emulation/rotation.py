"""The Hadamard rotation ahead of a weight gradient's quantizers, and the unfolded rows that it acts on."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from emulation import fused, native
from emulation.codec import is_concrete
from emulation.gemms import ConvGeometry, has_native_rows, padded_image, patches, walk
from emulation.norms import at_least_float32

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
        if conv is None:  # tokens are positions, features channels
            x = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
            conv = positions_alone(1)
        if len(conv.kernel) == 1:
            x, conv = x.unsqueeze(2), _on_a_plane(conv)
        kernel, size = torch.Size(conv.kernel).numel(), conv.positions(tuple(x.shape[2:]))
        t = torch.Size(size).numel()
        self.shape = (x.shape[0], conv.groups, t + -t % TILE, x.shape[1] // conv.groups * kernel)
        self._x, self._conv, self._image = x, conv, False
        self.channels_last = False
        if has_native_rows(x) and not (in_weight_order and kernel > 1):
            self._x, self._image, self._walk = padded_image(x, conv), True, walk(x, conv)
            self.channels_last = kernel > 1

    def write(self, out: Tensor, part: slice) -> None:
        """Writes the rows of some examples into ``out``, C-contiguous."""
        x = self._x[part]
        if self._image:
            native.unfold(x, out, self._walk, rotated=True)
        elif x.dim() == 4 and x.dtype != torch.float64 and x.numel() and is_concrete(x) and fused.has_triton(x.device):
            from emulation import rotation_triton

            rotation_triton.unfold_and_rotate(x, out, self._conv)
        else:
            out.copy_(rotate(patches(x, self._conv).transpose(1, 2)).view(out.shape))


def positions_alone(groups: int) -> ConvGeometry:
    """Of a convolution over a line that sees every position by itself."""
    return ConvGeometry(kernel=(1,), stride=(1,), padding=(0,), dilation=(1,), groups=groups)


def _on_a_plane(line: ConvGeometry) -> ConvGeometry:
    return ConvGeometry(
        kernel=(1, *line.kernel),
        stride=(1, *line.stride),
        padding=(0, *line.padding),
        dilation=(1, *line.dilation),
        groups=line.groups,
    )
