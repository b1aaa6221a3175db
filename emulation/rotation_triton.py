"""Unfolded and rotated rows on CUDA in one pass: the additions of rotation.py in their order, so the same bits."""

# Triton reads the annotations of kernels as code: theirs are for compile-time constants alone.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emulation.gemms import ConvGeometry

_COLUMNS = 128


@triton.jit
def _row(
    x, position, positions, wide, height, width, down, right, by_row, by_column, inside, SH: tl.constexpr,
    SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """What a kernel at one position covers, zero outside of the image and beyond the last position."""
    row = (position // wide) * SH - PH + down
    column = (position % wide) * SW - PW + right
    real = inside & (position < positions) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + row.to(tl.int64) * by_row + column.to(tl.int64) * by_column, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _two(a, b):
    return a + b, a - b


_COUNTS = [
    "tiles", "positions", "wide", "height", "width", "own", "groups", "by_example", "by_channel", "by_row", "by_column",
]  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _unfold_and_rotate(
    x, out, tiles, positions, wide, height, width, own, groups, by_example, by_channel, by_row, by_column,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """16 rows of [examples, groups, tiles * 16, own * KH * KW] from an image of any strides."""
    item = tl.program_id(0)
    first, unit = (item % tiles) * 16, item // tiles
    features = own * KH * KW
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = feature < features
    channel = (unit % groups) * own + feature // (KH * KW)
    a, b = feature % (KH * KW) // KW * DH, feature % KW * DW
    p = x + (unit // groups).to(tl.int64) * by_example + channel.to(tl.int64) * by_channel
    n, w, h, v, i, j = positions, wide, height, width, by_row, by_column
    v0 = _row(p, first, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v1 = _row(p, first + 1, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v2 = _row(p, first + 2, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v3 = -_row(p, first + 3, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v4 = _row(p, first + 4, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v5 = -_row(p, first + 5, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v6 = -_row(p, first + 6, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v7 = -_row(p, first + 7, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v8 = -_row(p, first + 8, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v9 = -_row(p, first + 9, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v10 = -_row(p, first + 10, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v11 = _row(p, first + 11, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v12 = -_row(p, first + 12, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v13 = _row(p, first + 13, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v14 = -_row(p, first + 14, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)
    v15 = -_row(p, first + 15, n, w, h, v, a, b, i, j, inside, SH, SW, PH, PW)

    v0, v1 = _two(v0, v1)
    v2, v3 = _two(v2, v3)
    v4, v5 = _two(v4, v5)
    v6, v7 = _two(v6, v7)
    v8, v9 = _two(v8, v9)
    v10, v11 = _two(v10, v11)
    v12, v13 = _two(v12, v13)
    v14, v15 = _two(v14, v15)

    v0, v2 = _two(v0, v2)
    v1, v3 = _two(v1, v3)
    v4, v6 = _two(v4, v6)
    v5, v7 = _two(v5, v7)
    v8, v10 = _two(v8, v10)
    v9, v11 = _two(v9, v11)
    v12, v14 = _two(v12, v14)
    v13, v15 = _two(v13, v15)

    v0, v4 = _two(v0, v4)
    v1, v5 = _two(v1, v5)
    v2, v6 = _two(v2, v6)
    v3, v7 = _two(v3, v7)
    v8, v12 = _two(v8, v12)
    v9, v13 = _two(v9, v13)
    v10, v14 = _two(v10, v14)
    v11, v15 = _two(v11, v15)

    v0, v8 = _two(v0, v8)
    v1, v9 = _two(v1, v9)
    v2, v10 = _two(v2, v10)
    v3, v11 = _two(v3, v11)
    v4, v12 = _two(v4, v12)
    v5, v13 = _two(v5, v13)
    v6, v14 = _two(v6, v14)
    v7, v15 = _two(v7, v15)

    o = out + item.to(tl.int64) * 16 * features + feature
    tl.store(o, v0 * 0.25, mask=inside)
    tl.store(o + features, v1 * 0.25, mask=inside)
    tl.store(o + 2 * features, v2 * 0.25, mask=inside)
    tl.store(o + 3 * features, v3 * 0.25, mask=inside)
    tl.store(o + 4 * features, v4 * 0.25, mask=inside)
    tl.store(o + 5 * features, v5 * 0.25, mask=inside)
    tl.store(o + 6 * features, v6 * 0.25, mask=inside)
    tl.store(o + 7 * features, v7 * 0.25, mask=inside)
    tl.store(o + 8 * features, v8 * 0.25, mask=inside)
    tl.store(o + 9 * features, v9 * 0.25, mask=inside)
    tl.store(o + 10 * features, v10 * 0.25, mask=inside)
    tl.store(o + 11 * features, v11 * 0.25, mask=inside)
    tl.store(o + 12 * features, v12 * 0.25, mask=inside)
    tl.store(o + 13 * features, v13 * 0.25, mask=inside)
    tl.store(o + 14 * features, v14 * 0.25, mask=inside)
    tl.store(o + 15 * features, v15 * 0.25, mask=inside)


def unfold_and_rotate(x: Tensor, out: Tensor, conv: ConvGeometry) -> None:
    """Rows of kernel positions of ``x``, 16 at a time rotated; features in the order of the weight's elements.

    Args:
        x: [B, C, H, W] of any strides on a CUDA device, not empty, of at most float32.
        out: [B, groups, T padded to a multiple of 16, C / groups * prod(kernel)], C-contiguous.
        conv: over a plane.
    """
    examples, groups, rows, features = out.shape
    size = conv.positions(tuple(x.shape[2:]))
    grid = (examples * groups * (rows // 16), triton.cdiv(features, _COLUMNS))
    with torch.cuda.device_of(x):
        _unfold_and_rotate[grid](
            x, out, rows // 16, size[0] * size[1], size[1], *x.shape[2:], x.shape[1] // groups, groups, *x.stride(),
            *conv.kernel, *conv.stride, *conv.padding, *conv.dilation, COLUMNS=_COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
