"""Result shapes without torch's meta kernels, against torch's meta kernels."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpquant.models import MODELS, build_model, example_input
from emulation.errors import InputError
from hwmodels import shapes, trace, tracing
from hwmodels.shapes import meta_result

aten = torch.ops.aten


def facts(result: Any) -> list[Any]:
    """Shape, type and the strides that matter: those of dimensions longer than one."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [
        (t.dtype, tuple(t.shape), [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1])
        for t in tensors
    ]


def check(operator: Any, *args: Any, known: bool = True) -> None:
    found = meta_result(operator.__name__, args, {})
    assert found is not None or not known
    if found is not None:
        assert facts(found) == facts(operator(*args))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


size = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), groups=st.integers(1, 2))
def test_convolutions(data: st.DataObject, dims: int, groups: int) -> None:
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(dims)]  # noqa: E731
    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    x = empty(data.draw(size), 2 * groups, *each(5, 9))
    weight = empty(3 * groups, 2, *kernel)
    bias = data.draw(st.sampled_from([None, empty(3 * groups)]))
    check(aten.convolution, x, weight, bias, stride, padding, dilation, False, [0] * dims, groups)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pools(data: st.DataObject) -> None:
    pair = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(2)]  # noqa: E731
    kernel, x = pair(2, 3), empty(data.draw(size), data.draw(size), *pair(7, 12))
    stride, padding, ceil = data.draw(st.sampled_from([[], pair(1, 3)])), pair(0, 1), data.draw(st.booleans())
    check(aten.max_pool2d_with_indices, x, kernel, stride, padding, pair(1, 2), ceil, known=not ceil)
    check(aten.avg_pool2d, x, kernel, stride, padding, ceil, known=not ceil)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pointwise_operators(data: st.DataObject) -> None:
    shape = data.draw(st.lists(size, min_size=1, max_size=4))
    other = [data.draw(st.sampled_from([n, 1])) for n in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    dims = data.draw(st.permutations(range(len(shape))))
    x, y = empty(*shape), empty(*other)
    turned = x.permute(dims)
    second = data.draw(st.sampled_from([x, y, 2.0, 3, empty()]))
    for operator in (aten.add, aten.mul, aten.sub, aten.div):
        check(operator, x, second)
    check(aten.where, empty(*shape, dtype=torch.bool), x, empty())
    check(aten.mul, turned, 0.5)
    for operator in (aten.relu, aten.gelu, aten.tanh, aten.silu, aten.sigmoid):
        check(operator, turned)
    if len(shape) > 1:
        check(aten.tril, turned, known=turned.is_contiguous())
    check(aten.zeros_like, turned)
    gap = empty(*shape, 6)[..., 2:4].permute(*reversed(range(len(shape) + 1)))
    check(aten.mul, gap, 0.5)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    check(aten._softmax, x, dim, False)
    check(aten._log_softmax, x, dim, False)
    check(aten.cat, [x, x.clone()], dim)
    check(aten.mean, x, [dim], data.draw(st.booleans()))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 7), c=size, h=size, w=size)
def test_norms_products_and_lookups(n: int, c: int, h: int, w: int) -> None:
    x, weight = empty(n, 2 * c, h, w), empty(2 * c)
    check(aten.native_group_norm, x, weight, weight, n, 2 * c, h * w, 2, 1e-5)
    check(aten.native_batch_norm, x, weight, weight, empty(2 * c), empty(2 * c), True, 0.1, 1e-5)
    check(aten.native_layer_norm, x, [h, w], empty(h, w), None, 1e-5)
    check(aten.mm, empty(n, c), empty(c, h))
    check(aten.bmm, empty(w, n, c), empty(w, c, h))
    check(aten.addmm, empty(h), empty(n, c), empty(c, h))
    check(aten.embedding, empty(n, c), empty(h, w, dtype=torch.long))
    check(aten.nll_loss_forward, empty(n, c), empty(n, dtype=torch.long), None, 1, -100)


def test_arange_of_one_whole_number() -> None:
    found = meta_result("arange", (5,), {"device": torch.device("meta"), "pin_memory": False})
    assert isinstance(found, Tensor)
    assert facts(found) == facts(torch.arange(5, device="meta"))
    assert meta_result("arange", (5,), {"dtype": torch.float32}) is None
    assert meta_result("arange", (0, 5), {}) is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mm", (empty(2, 3), empty(4, 5))),
        ("bmm", (empty(2, 3, 4), empty(1, 4, 5))),
        ("addmm", (empty(3), empty(2, 3), empty(3, 5))),
        ("mm", (empty(2, 3), empty(3, 5, dtype=torch.float64))),
        ("relu", (empty(2, dtype=torch.long),)),
        ("relu", (empty(1, 3).expand(2, 3),)),
        ("relu", (torch.zeros(2),)),
        ("add", (empty(2, 3), empty(4, 3))),
        ("add", (empty(2, 3), empty(3, 2).t())),
        ("mul", (empty(2), 1j)),
        ("cat", ([empty(2, 3), empty(0)], 0)),
        ("cat", ([empty(2, 3), empty(3, 3)], 1)),
        ("_softmax", (empty(2, 3), 2, False)),
        ("_softmax", (empty(2, 3, dtype=torch.bfloat16), 1, True)),
        ("mean", (empty(2, 3), [0, 0], False)),
        ("mean", (empty(2, 3), [2], False)),
        ("native_layer_norm", (empty(2, 3), [4], None, None, 1e-5)),
        ("native_batch_norm", (empty(2, 3), None, None, empty(3), empty(3), False, 0.1, 1e-5)),
        ("nll_loss_forward", (empty(2, 3), empty(4, dtype=torch.long), None, 1, -100)),
        ("convolution", (empty(1, 3, 8, 8), empty(4, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        ("convolution", (empty(1, 3, 2, 2), empty(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        ("convolution", (empty(1, 3, 8, 8), empty(3, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)),
        ("max_pool2d_with_indices", (empty(1, 1, 2, 2), [3, 3])),
        ("max_pool2d_with_indices", (empty(1, 1, 8, 8), [2, 2], [2, 2], [2, 2])),
        ("sort", (empty(2, 3),)),
    ],
)
def test_what_is_not_plain_is_left_to_torch(name: str, args: tuple[Any, ...]) -> None:
    assert meta_result(name, args, {}) is None
    assert meta_result(name, args, {"alpha": 2}) is None


@pytest.mark.parametrize("name", sorted(MODELS))
def test_traces_are_those_by_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        module = build_model(name)
    found = trace(module, example_input(name), 8)
    monkeypatch.setattr(tracing, "meta_result", lambda *_: None)
    assert trace(module, example_input(name), 8) == found


def test_a_trace_loads_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from dpquant.models import MODELS, build_model, example_input\n"
        "from hwmodels import trace\n"
        "with torch.device('meta'):\n"
        "    modules = {name: build_model(name) for name in MODELS}\n"
        "for name, module in modules.items():\n"
        "    trace(module, example_input(name), 8)\n"
        "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_messages_about_a_wrong_input_are_torchs() -> None:
    with pytest.raises(InputError, match="channel"):
        trace(nn.Conv2d(3, 4, 3, device="meta"), empty(1, 2, 8, 8), 8)
    with pytest.raises(InputError, match=r"reduction dim|shapes cannot be multiplied"):
        trace(nn.Linear(3, 4, device="meta"), empty(1, 2), 8)


def test_every_rule_is_of_an_operator_of_torch() -> None:
    assert all(hasattr(aten, name) for name in shapes._RULES)
