"""Workloads against FlopCounterMode, against hand counts, and against what autograd really keeps."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpquant.models import MODELS, build_model, example_input
from emulation.errors import InputError
from hwmodels.workload import Workload, trace


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Forward and backward FLOPs as torch counts them."""
    with FlopCounterMode(display=False) as forward:
        out = model(x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@functools.cache
def on_meta(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model = build_model(name)
    example = example_input(name)
    return model, torch.empty(batch, *example.shape[1:], dtype=example.dtype, device="meta")


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_flop_counter_mode(name: str) -> None:
    model, x = on_meta(name, 3)
    workload = trace(model, x, 3)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, x)
    assert workload.uncounted == ()
    assert workload.parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.parameters for layer in workload.layers) == workload.parameters


@pytest.mark.parametrize("name", ["resnet18", "vit_small", "bert_base"])
def test_quantizable_layers_are_the_linear_and_convolution_modules_in_forward_order(name: str) -> None:
    model, x = on_meta(name, 2)
    workload = trace(model, x, 2)
    modules = dict(model.named_modules())
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, key=key: order.append(key))
        for key, module in modules.items()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    model(x)
    for handle in handles:
        handle.remove()
    assert list(workload.quantizable) == order
    assert all(layer.name in modules or layer.name in ("(model)", "(loss)") for layer in workload.layers)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 6),
    out=st.integers(1, 7),
    size=st.integers(3, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_any_convolution(
    batch: int, channels: int, out: int, size: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, channels, 1),
            nn.Conv2d(channels, out, kernel, stride, padding, dilation),
            nn.Flatten(),
            nn.LazyLinear(2),
        )
        x = torch.empty(batch, 3, size, size)
        model(x)
    workload = trace(model, x, batch)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, x)
    assert not workload.by_name["0"].products[0].grad_input
    assert workload.by_name["1"].products[0].grad_input


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 9), tokens=st.integers(1, 9), features=st.integers(1, 17), out=st.integers(1, 17))
def test_any_linear_and_any_batch_size_from_one_trace(batch: int, tokens: int, features: int, out: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(features, out), nn.ReLU(), nn.Linear(out, 3, bias=False))
        x = torch.empty(batch, tokens, features)
    workload = trace(model, torch.empty(7, tokens, features), 4).at(batch)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, x)
    first = workload.by_name["0"].products[0]
    assert (first.rows, first.inputs, first.outputs) == (tokens, features, out)


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "vit_small"])
def test_one_trace_serves_every_batch_size(name: str) -> None:
    model, x = on_meta(name, 2)
    assert trace(model, x, 64).at(5) == trace(model, x, 5)
    assert trace(model, x, 1).at(5) == trace(model, x, 5)


def test_convolution_by_hand() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2))
    workload = trace(model, torch.empty(1, 6, 10, 12), 4)
    product = workload.by_name["0"].products[0]
    assert (product.rows, product.inputs, product.outputs, product.groups) == (5 * 6, 3 * 9, 4, 2)
    assert product.input_elements == 6 * 10 * 12
    assert product.weight_elements == 8 * 3 * 9
    assert workload.forward_flops == 2 * 4 * (8 * 5 * 6) * (3 * 3 * 3)
    assert workload.backward_flops == workload.forward_flops  # no input gradient; FlopCounterMode forgets the groups
    gradients = product.example_gradients(4)
    assert (gradients.m, gradients.n, gradients.k, gradients.count) == (27, 4, 30, 8)


def test_transposed_convolution_is_counted_and_not_quantizable() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ConvTranspose2d(5, 7, 3, stride=2))
        x = torch.empty(3, 2, 4, 6)
    workload = trace(model, x, 3)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, x)
    assert workload.quantizable == ("0",)


def test_attention_products_are_per_head_and_example() -> None:
    model, x = on_meta("vit_small", 2)
    layer = trace(model, x, 2).by_name["layers.0.attention"]
    scores, values = layer.products
    assert (scores.rows, scores.inputs, scores.outputs, scores.groups) == (65, 64, 65, 3)
    assert (values.rows, values.inputs, values.outputs, values.groups) == (65, 65, 64, 3)
    assert scores.forward(5).count == 15
    assert not scores.weighted
    assert layer.kind == "attention"


def test_modules_of_torch_that_hold_products_themselves() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 3))
        x = torch.empty(2, 8, 64)
    workload = trace(model, x, 2)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, x)
    assert workload.quantizable == ("0.linear1", "0.linear2", "1")  # in_proj and out_proj are not called as modules


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 4))
        self.used = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.used(self.used(x @ self.scale))) + 1


def test_raw_parameters_and_modules_called_twice() -> None:
    model = Custom()
    workload = trace(model, torch.zeros(1, 8), 6)
    assert workload.quantizable == ("used",)
    assert workload.by_name["used"].calls == 2
    assert len(workload.by_name["used"].products) == 2
    own = workload.by_name["(model)"]
    assert own.products[0].weighted
    assert own.parameters == 32
    assert (workload.forward_flops, workload.backward_flops) == counted(model, torch.zeros(6, 8))


def test_frozen_layers_have_no_weight_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    model[1].requires_grad_(False)
    workload = trace(model, torch.zeros(1, 4), 3)
    assert (workload.forward_flops, workload.backward_flops) == counted(model, torch.zeros(3, 4))
    assert workload.frozen_parameters == 36
    assert workload.parameters == 25 + 14


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = build_model("digits_cnn").eval()
    model.convs[0].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, torch.zeros(1, 1, 8, 8), 256)
    assert [m.training for m in model.modules()] == [m is model.convs[0] for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", ["digits_cnn", "fashion_cnn", "cifar_cnn", "transformer"])
def test_saved_tensors_are_what_autograd_keeps(name: str) -> None:
    model = build_model(name)
    example = example_input(name)
    x = torch.zeros(4, *example.shape[1:], dtype=example.dtype)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.numel() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
        F.cross_entropy(out, torch.zeros(4, dtype=torch.long))
    really = sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())
    workload = trace(model, example, 4)
    traced = sum(s.elements * (4 if s.batched else 1) for s in workload.saved)
    # an attention kernel keeps log-sum-exps besides; elsewhere the counts agree to the last element
    assert traced == pytest.approx(really, rel=0.0 if name != "transformer" else 0.02)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Decides()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x)


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() > 0:
            return x
        return -x


@pytest.mark.parametrize(
    ("model", "example", "message", "hint"),
    [
        (Branches(), torch.zeros(1, 3), "cannot trace Branches.inner.0", ".item()"),
        (Branches(), torch.zeros(1, 3), "test_workload.py", ".item()"),
        (nn.Linear(3, 2), torch.zeros(1, 4), "cannot trace Linear", "shape"),
        (nn.Linear(3, 2), torch.tensor(1.0), "no batch dimension", "batch"),
        (nn.Linear(3, 2), "x", "type str", "tensor"),
    ],
)
def test_what_cannot_be_traced_says_why(model: nn.Module, example: object, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        trace(model, example, 4)
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, True, 2**40])
def test_batch_size_is_checked(batch_size: object) -> None:
    with pytest.raises(InputError, match="batch_size="):
        trace(nn.Linear(3, 2), torch.zeros(1, 3), batch_size)  # type: ignore[arg-type]


def test_unknown_operators_are_listed() -> None:
    class Sorts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values

    workload = trace(nn.Sequential(nn.Linear(3, 3), Sorts()), torch.zeros(1, 3), 4)
    assert any("aten.sort" in what for what in workload.uncounted)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(3, 4, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.layer(a, b)))

    workload = trace(Two(), (torch.zeros(1, 3), torch.zeros(1, 4)), 2)
    assert isinstance(workload, Workload)
