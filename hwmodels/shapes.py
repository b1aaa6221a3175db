"""Result shapes of the operators that networks are made of, without torch's own kernels for meta tensors.

Those are decompositions in Python that load sympy and the compiler at their first use, a second's work and 100 MiB, and
take a millisecond an operator. What is not plainly one of the cases here is left to torch, its error messages included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...] | None


def meta_result(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
    """An operator's result on meta tensors, or None where torch has to say.

    Args:
        name: the operator's name without its overload.
        args: its arguments.
        kwargs: its keyword arguments; with any, torch is asked.
    """
    rule = _RULES.get(name)
    told = {key: value for key, value in kwargs.items() if key not in _WHERE}
    return rule(*args) if rule is not None and not told else None


_WHERE = frozenset({"device", "pin_memory", "layout"})  # on the meta device all the same


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _alike(*tensors: Tensor | None) -> bool:
    """Floating-point tensors of one type on the meta device."""
    given = [t for t in tensors if t is not None]
    return given[0].is_floating_point() and all(t.dtype is given[0].dtype and t.is_meta for t in given)


def _plain(*tensors: Tensor | None) -> bool:
    """Alike, and contiguous: no layout has to be chosen for the result."""
    return _alike(*tensors) and all(t is None or t.is_contiguous() for t in tensors)


def _strided_like(x: Tensor, *_: Any) -> Tensor | None:
    """As ``empty_like``: dense, the dimensions in the order of the strides; None where an expanded one has none."""
    if x.is_contiguous():
        return _empty(x, *x.shape)
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return None
    dense, strides = 1, [1] * x.dim()
    for dim in sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.shape[dim], -dim)):
        strides[dim] = dense
        dense *= x.shape[dim]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


def _same(x: Tensor, *_: Any) -> Result:
    return _strided_like(x) if _alike(x) else None


def _softmax(x: Tensor, dim: int, other: Any = None) -> Result:
    return None if other or not -x.dim() <= dim < x.dim() else _same(x)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _: Sequence[int],
    groups: int,
) -> Result:
    sizes, kernel = x.shape[2:], weight.shape[2:]
    if transposed or not _plain(x, weight, bias) or x.dim() != weight.dim() or x.dim() < 3:
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if any(len(given) != len(sizes) for given in (stride, padding, dilation)):
        return None
    reach = [size + 2 * p - d * (k - 1) - 1 for size, p, d, k in zip(sizes, padding, dilation, kernel, strict=True)]
    if min(reach) < 0 or min(stride) < 1:
        return None
    return _empty(x, x.shape[0], weight.shape[0], *(r // s + 1 for r, s in zip(reach, stride, strict=True)))


def _pooled(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor | None:
    stride = stride or kernel
    if not _plain(x) or x.dim() != 4 or any(len(given) != 2 for given in (kernel, stride, padding, dilation)):
        return None
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    spans = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    sizes = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans]
    return _empty(x, *x.shape[:2], *sizes) if min(sizes) > 0 else None


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil: bool = False,
) -> Result:
    found = None if ceil else _pooled(x, kernel, stride, padding, dilation)
    return None if found is None else (found, torch.empty(found.shape, dtype=torch.int64, device="meta"))


def _average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil: bool = False,
    *_: Any,
) -> Result:
    return None if ceil else _pooled(x, kernel, stride, padding, (1, 1))


def _mean(x: Tensor, dims: Sequence[int] | None = None, keep: bool = False) -> Result:
    if not _plain(x) or not dims or not all(-x.dim() <= dim < x.dim() for dim in dims):
        return None
    gone = {dim % x.dim() for dim in dims}
    sizes = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keep or dim not in gone]
    return _empty(x, *sizes) if len(gone) == len(dims) else None


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Result:
    first = tensors[0]
    layouts = first.dim() in (4, 5)  # may be channels last
    if not _alike(*tensors) or (layouts and not _plain(*tensors)) or not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    others = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors if t.dim() == first.dim()}
    if len(others) > 1 or any(t.dim() != first.dim() for t in tensors):
        return None
    return _empty(first, *first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :])


def _pointwise(*operands: Any) -> Result:
    """Sizes by the rules of broadcasting; numbers take the tensors' type."""
    if not all(isinstance(x, (Tensor, float, int)) for x in operands):
        return None
    given = [x for x in operands if isinstance(x, Tensor)]
    tensors = [x for x in given if x.dim()]  # a tensor without dimensions is as good as a number
    if not tensors or not _alike(*tensors) or not all(t.is_floating_point() for t in given):
        return None
    first = tensors[0]
    if all(t.shape == first.shape and t.stride() == first.stride() for t in tensors):
        return _strided_like(first)
    if not _plain(*tensors):
        return None
    width = max(t.dim() for t in tensors)
    sizes = []
    for position in range(-width, 0):
        here = {t.shape[position] for t in tensors if t.dim() >= -position} - {1}
        if len(here) > 1:
            return None
        sizes.append(here.pop() if here else 1)
    return _empty(first, *sizes)


def _where(condition: Tensor, a: Any, b: Any) -> Result:
    plain = isinstance(a, Tensor) and condition.is_contiguous()
    return _pointwise(a, _empty(a, *condition.shape), b) if plain else None


def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, _: int) -> Result:
    if weight is not None or not reduction or not _plain(x) or x.dim() != 2 or target.shape != x.shape[:1]:
        return None
    return _empty(x), _empty(x)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, examples: int, _: int, __: int, groups: int, ___: float
) -> Result:
    if not _plain(x, weight, bias):
        return None
    return _empty(x, *x.shape), _empty(x, examples, groups), _empty(x, examples, groups)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float) -> Result:
    last = tuple(x.shape[x.dim() - len(shape) :])
    if not _plain(x, weight, bias) or any(
        tuple(t) != last for t in (shape, *(p.shape for p in (weight, bias) if p is not None))
    ):
        return None
    moments = [*x.shape[: x.dim() - len(shape)], *[1] * len(shape)]
    return _empty(x, *x.shape), _empty(x, *moments), _empty(x, *moments)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, variance: Any, training: bool, *_: Any
) -> Result:
    if not training or x.dim() < 2 or not _plain(x, weight, bias):
        return None
    return _empty(x, *x.shape), _empty(x, x.shape[1]), _empty(x, x.shape[1])


def _embedding(table: Tensor, indices: Tensor, *_: Any) -> Result:
    return _empty(table, *indices.shape, table.shape[1]) if table.dim() == 2 else None


def _arange(*ends: Any) -> Result:
    whole = len(ends) == 1 and isinstance(ends[0], int) and ends[0] >= 0
    return torch.empty(ends[0], dtype=torch.int64, device="meta") if whole else None


def _product(a: Tensor, b: Tensor) -> Result:
    if a.dtype is not b.dtype or a.dim() != b.dim() or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return None
    return _empty(a, *a.shape[:-1], b.shape[-1])


def _biased_product(bias: Tensor, a: Tensor, b: Tensor) -> Result:
    if bias.dtype is not a.dtype or bias.dim() != 1 or b.dim() != 2 or bias.shape[0] != b.shape[1]:
        return None
    return _product(a, b)


_RULES: Mapping[str, Callable[..., Result]] = MappingProxyType(
    {
        **dict.fromkeys(("relu", "gelu", "tanh", "silu", "sigmoid"), _same),
        **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
        "convolution": _convolution,
        "native_group_norm": _group_norm,
        "native_layer_norm": _layer_norm,
        "native_batch_norm": _batch_norm,
        **dict.fromkeys(("add", "sub", "mul", "div"), _pointwise),
        "where": _where,
        "embedding": _embedding,
        "arange": _arange,
        **dict.fromkeys(("zeros_like", "ones_like"), _strided_like),
        "tril": lambda x, *_: _strided_like(x) if x.is_contiguous() else None,
        "cat": _joined,
        "mean": _mean,
        "max_pool2d_with_indices": _max_pool,
        "avg_pool2d": _average_pool,
        "nll_loss_forward": _nll_loss,
        "mm": _product,
        "bmm": _product,
        "addmm": _biased_product,
    }
)
