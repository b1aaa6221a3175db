"""What a backward leaves on the tape, layer type by layer type, and which modules are refused."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from dpquant.captures import attach, check_private
from emulation.errors import InputError
from emulation.layers import LayerPrecision, quantizable_layers, quantize_model
from emulation.quantizer import Quantizer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = DPMultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]  # type: ignore[no-any-return]


STOCK: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 5, 3)),
    "layer norm": (lambda: nn.LayerNorm((5, 8)), (4, 3, 5, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), (4, 3, 8)),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 5, 3)),
    "linear": (lambda: nn.Linear(8, 3), (4, 5, 8)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"), (4, 6, 5, 5)),
    "attention": (Attention, (4, 5, 8)),
}


def alone(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(module(x[i : i + 1])), list(module.parameters()))
        for (name, _), grad in zip(module.named_parameters(), grads, strict=True):
            found.setdefault(name, []).append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def together(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tape = attach(module)
    loss(module(x)).backward()
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(c.parameter)]: c.per_example() for c in tape.combined()}


def check(module: nn.Module, x: Tensor) -> None:
    module.double()
    expected = alone(module, x, lambda out: out.square().sum())
    found = together(module, x, lambda out: out.square().sum())
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("name", STOCK)
def test_every_examples_gradient_is_that_of_the_example_alone(name: str) -> None:
    torch.manual_seed(0)
    make, shape = STOCK[name]
    check(make(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings(padding: int | None) -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 1, 2, 2], [3, 3, 3, 3], [2, 0, 4, 1]])
    check(nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.LayerNorm(3)), tokens)


@pytest.mark.parametrize("prepare", [lambda m: m, quantize_model])
def test_a_tied_layer_and_a_tied_weight_are_summed(prepare: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 6))
    net[4].weight = shared.weight
    check(prepare(net), torch.randn(3, 6, dtype=torch.float64))


def test_frozen_and_unused_layers_are_left_out() -> None:
    net = quantize_model(
        nn.ModuleDict({"used": nn.Linear(3, 2), "frozen": nn.GroupNorm(1, 2), "unused": nn.Linear(2, 2)})
    )
    net["frozen"].requires_grad_(False)  # type: ignore[index]
    tape = attach(net)
    net["frozen"](net["used"](torch.randn(4, 3))).square().sum().backward()  # type: ignore[index]
    assert {id(c.parameter) for c in tape.combined()} == {id(p) for p in net["used"].parameters()}  # type: ignore[index]


def test_norms_are_not_taken_twice() -> None:
    net = quantize_model(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))
    tape = attach(net)
    net(torch.randn(3, 1, 9, 9)).square().sum().backward()
    first = tape.combined()
    assert [id(c) for c in tape.combined()] == [id(c) for c in first]


def test_closing_removes_the_hooks() -> None:
    net = nn.Sequential(quantize_model(nn.Linear(3, 3)), nn.LayerNorm(3))
    tape = attach(net)
    tape.close()
    net(torch.randn(4, 3)).sum().backward()
    assert tape.combined() == []
    assert all(p.grad is not None for p in net.parameters())


def test_attaching_again_replaces_the_tape() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    first, second = attach(net), attach(net)
    net(torch.randn(4, 3)).sum().backward()
    assert first.combined() == []
    assert len(second.combined()) == 2


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("prepare", [lambda m: m, quantize_model])
def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused(prepare: Callable[[nn.Module], nn.Module]) -> None:
    net = prepare(Folded())
    tape = attach(net)
    net(torch.randn(4, 5, 3)).sum().backward()
    with pytest.raises(InputError, match=r"'inner\.\w+' saw 20 examples in a batch of 4"):
        tape.combined()


def test_two_backwards_and_none_are_refused() -> None:
    net = quantize_model(nn.Sequential(nn.Linear(3, 2)))
    tape = attach(net)
    x = torch.randn(4, 3)
    net(x)
    with pytest.raises(InputError, match="4 examples left no gradients"):
        tape.combined()
    net(x).sum().backward()
    with pytest.raises(InputError, match="second forward and backward"):
        net(x)
    with torch.no_grad():
        net(x)  # probes may run at any time
    net.eval()
    net(x)
    tape.clear()
    net.train()
    net(x).sum().backward()
    assert len(tape.combined()) == 2


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(3), "mixes examples: it normalises over the batch"),
    "batch norm without parameters": (lambda: nn.BatchNorm1d(3, affine=False), "mixes examples"),
    "running statistics": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "running statistics"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "raw weights"),
    "recurrent": (lambda: nn.LSTM(3, 3), "no per-example gradients"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 2), "no per-example gradients"),
    "own parameters": (Own, "no known per-example gradient"),
    "embedding": (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer_and_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(InputError, match=f"layer 'body.1' .*{reason}") as error:
        check_private(nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 3), make())}))
    assert error.value.hint


def test_a_mixing_quantizer_is_refused() -> None:
    net = quantize_model(nn.Sequential(nn.Linear(3, 3)))
    mixing = Quantizer("fp4", granularity="tensor")
    quantizable_layers(net)["0"].precision = LayerPrecision(name="t", weight=mixing, input=mixing, grad_output=mixing)
    with pytest.raises(InputError, match=r"layer '0' .*precision 't', which mixes examples"):
        check_private(net)


def test_frozen_layers_may_be_anything_that_keeps_examples_apart() -> None:
    frozen = nn.ConvTranspose2d(3, 3, 2).requires_grad_(False)
    check_private(nn.Sequential(frozen, nn.Dropout(), nn.Linear(3, 3)))


def test_a_backward_leaves_nothing_behind() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2))
    tape = attach(quantize_model(net).train())

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def step() -> None:
        net(torch.randn(3, 1, 4, 4)).sum().backward()
        tape.clear()
        net.zero_grad()

    step()
    gc.collect()
    gc.disable()  # what only the collector finds would pile up between its runs
    try:
        before = tensors()
        for _ in range(3):
            step()
        assert tensors() == before
    finally:
        gc.enable()
