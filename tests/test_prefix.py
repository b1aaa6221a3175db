"""What is shared between the passes of an analysis changes no bit of it, and is given up where it might."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpquant.models import build_model
from dpquant.prefix import SharedPrefix
from dpquant.resnet import Bottleneck, DenseNet, ResNet
from dpquant.sensitivity import Policy, loss_differences
from emulation.layers import QuantizedLayer, quantizable_layers, quantize_model, set_plan
from hwmodels.planner import forward_runs
from hwmodels.workload import trace

Policies = list[Policy]


def losses(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def naively(module: nn.Module, batch: Any, policies: Policies, loss: Callable[..., Tensor] = losses) -> Tensor:
    """Every pass from its beginning: what a switch of the caller's own gets."""
    return loss_differences(module, loss, batch, policies, set_plan=lambda m, plan: set_plan(m, plan))


def single(module: nn.Module, format: str = "luq_fp4") -> Policies:
    return [{name: format} for name in quantizable_layers(module)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The quantizable layers that really computed, in order."""
    seen: list[str] = []
    forward = QuantizedLayer.forward

    def counted(layer: QuantizedLayer, x: Tensor) -> Tensor:
        seen.append(type(layer).__name__)
        return forward(layer, x)

    monkeypatch.setattr(QuantizedLayer, "forward", counted)
    return seen


NETWORKS = {
    "digits_cnn": (lambda: build_model("digits_cnn"), (1, 8, 8)),
    "resnet18": (lambda: build_model("resnet18"), (3, 16, 16)),
    "resnet": (lambda: ResNet(Bottleneck, (2, 1)), (3, 16, 16)),
    "densenet": (lambda: DenseNet((2, 3), growth=8), (3, 16, 16)),
    "vit_small": (lambda: build_model("vit_small", depth=2, image_size=8), (3, 8, 8)),
    "transformer": (lambda: build_model("transformer", depth=2, length=8), (8,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_difference_has_the_bits_of_a_pass_of_its_own(name: str, calls: list[str]) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    module = quantize_model(build())
    x = torch.randint(1000, (3, *shape)) if len(shape) == 1 else torch.randn(3, *shape)
    batch = x, torch.tensor([0, 1, 1])
    policies = [*single(module), {}, dict.fromkeys(quantizable_layers(module), "fp8")]
    policies = policies[::2] + policies[1::2]  # in no order
    found = loss_differences(module, losses, batch, policies)
    cheap = len(calls)
    calls.clear()
    assert torch.equal(found, naively(module, batch, policies))
    assert (found != 0).any(1).all()
    assert cheap < 0.75 * len(calls)


@contextmanager
def counted_forwards(module: nn.Module) -> Iterator[Counter[str]]:
    """How often every module's own forward has run; hooks would also see calls that were skipped."""
    names, seen = {m: name or "(model)" for name, m in module.named_modules()}, Counter[str]()

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen[names[m]] += 1
            return forward(m, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(m) for m in names}:
            patch.setattr(kind, "forward", counting(kind.forward))
        yield seen


@pytest.mark.parametrize("name", NETWORKS)
def test_the_planner_counts_what_runs(name: str) -> None:
    build, shape = NETWORKS[name]
    module = quantize_model(build())
    x = torch.randint(1000, (2, *shape)) if len(shape) == 1 else torch.randn(2, *shape)
    workload = trace(module, x, 2)
    found = workload.quantizable
    assert set(found) == set(quantizable_layers(module))
    ladder = [{layer: fmt} for layer in found for fmt in ("luq_fp4", "fp8")]
    several = [dict.fromkeys(found[i : i + 3], "fp8") for i in range(1, len(found), 4)]
    for policies in (single(module), ladder, several[::-1], [], [{}, *several[1:], {}]):
        with counted_forwards(module) as seen:
            loss_differences(module, losses, (x, torch.tensor([0, 1])), policies)
        runs = forward_runs(workload, policies)
        assert runs.pop("(loss)") == len(policies) + 1
        calls = {layer: workload.by_name[layer].calls for layer in runs}
        assert {layer: seen[layer] for layer in runs} == {layer: runs[layer] * calls[layer] for layer in runs}


def test_a_chain_of_layers_costs_half(calls: list[str]) -> None:
    module = quantize_model(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(10))))
    loss_differences(module, losses, (torch.randn(5, 4), torch.zeros(5, dtype=torch.long)), single(module))
    # every layer once in full precision, and once in each pass that quantizes it or one before it
    assert len(calls) == 10 + sum(range(1, 11))


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_gives_several_tensors_is_skipped_too(kind: Callable[[list[Tensor]], Any], calls: list[str]) -> None:
    blocks = [Summed(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), kind) for _ in range(3)]
    module = quantize_model(nn.Sequential(*blocks))
    loss_differences(module, losses, (torch.randn(5, 4), torch.zeros(5, dtype=torch.long)), single(module))
    assert len(calls) == 3 + 3 + 2 + 1


# --- networks drawn at random


class Residual(nn.Module):
    """What it holds, added to its input, in place or not."""

    def __init__(self, inner: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.inner, self.inplace = inner, inplace

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if self.inplace and out is not x:
            out += x
            return out
        return out + x


class Pair(nn.Module):
    """Gives a tuple, which is kept, or a list, which is not."""

    def __init__(self, inner: nn.Module, kind: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Any:
        return self.kind([self.inner(x), x])


class Summed(nn.Module):
    def __init__(self, inner: nn.Module, kind: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.pair = Pair(inner, kind)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(x)
        return a + b


class Scaled(nn.Module):
    """Changes in place what it holds gave, before another layer reads that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.after = inner, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        out *= 0.5
        result: Tensor = self.after(out)
        return result


class Doubled(nn.Module):
    """Calls the same layers twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(torch.tanh(self.inner(x)))
        return out


LEAF = st.sampled_from(["linear", "relu", "relu in place", "flatten"])
NETWORK = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(st.sampled_from(["residual", "residual in place", "tuple", "list", "scaled", "doubled"]), inner),
    ),
    max_leaves=8,
)


def network(drawn: Any) -> nn.Module:
    if isinstance(drawn, list):
        return nn.Sequential(*map(network, drawn))
    if isinstance(drawn, tuple):
        kind, inner = drawn[0], network(drawn[1])
        if kind.startswith("residual"):
            return Residual(inner, "place" in kind)
        if kind in ("tuple", "list"):
            return Summed(inner, tuple if kind == "tuple" else list)
        return {"scaled": Scaled, "doubled": Doubled}[kind](inner)
    if drawn == "linear":
        return nn.Linear(6, 6)
    return nn.Flatten() if drawn == "flatten" else nn.ReLU("place" in drawn)


@given(drawn=st.lists(NETWORK, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_networks_at_random(drawn: list[Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = quantize_model(nn.Sequential(nn.Linear(6, 6), network(drawn), nn.Linear(6, 6)))
        batch = torch.randn(3, 6), torch.tensor([0, 1, 2])
    policies = [*single(module), dict.fromkeys(list(quantizable_layers(module))[1:], "luq_fp4")]
    x = batch[0].clone()
    found = loss_differences(module, losses, batch, policies)
    assert torch.equal(found, naively(module, batch, policies))
    assert torch.equal(x, batch[0])


# --- where nothing may be shared


class Wayward(nn.Module):
    """Two layers and a way of calling them."""

    def __init__(self, way: Callable[[Wayward, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.way, self.times = way, 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return self.way(self, x)


def in_turns(net: Wayward, x: Tensor) -> Tensor:
    a, b = (net.a(x), net.b(x)) if net.times % 2 else (net.b(x), net.a(x))[::-1]
    out: Tensor = net.c(a + b)
    return out


def with_noise(net: Wayward, x: Tensor) -> Tensor:
    out: Tensor = net.c(net.b(F.dropout(net.a(x), training=True)))
    return out


def by_value(net: Wayward, x: Tensor) -> Tensor:
    """Which layers come last depends on what the first one gave."""
    a = net.a(x)
    out: Tensor = net.b(a) if a.sum() > net.times else net.c(net.b(a))
    return out


@pytest.mark.parametrize("way", [in_turns, with_noise, by_value])
def test_wayward_networks_get_what_passes_of_their_own_give(way: Callable[[Wayward, Tensor], Tensor]) -> None:
    torch.manual_seed(2)
    module = quantize_model(Wayward(way))
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    policies = single(module)
    found = loss_differences(module, losses, batch, policies)
    module.times = 0  # type: ignore[assignment]
    assert torch.equal(found, naively(module, batch, policies))


def test_a_loss_may_call_the_module_often() -> None:
    def twice(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses(module, batch) + losses(module, (batch[0].flip(0), batch[1]))

    torch.manual_seed(3)
    module = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    found = loss_differences(module, twice, batch, single(module))
    assert torch.equal(found, naively(module, batch, single(module), twice))


def test_replicas_are_left_alone() -> None:
    assert not SharedPrefix(nn.DataParallel(nn.Linear(2, 2)))._usable
    assert SharedPrefix(nn.Sequential(nn.Linear(2, 2)))._usable


@pytest.mark.long
def test_compiled_modules_are_left_alone() -> None:
    inner = nn.Linear(2, 2)
    inner.compile(backend="eager")
    assert not SharedPrefix(nn.Sequential(inner))._usable
    assert not SharedPrefix(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))._usable


def test_forwards_are_put_back_also_after_an_error() -> None:
    module = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    def own(x: Tensor) -> Tensor:
        return nn.Linear.forward(module[0], x) * 2  # type: ignore[index]

    module[0].forward = own  # type: ignore[index,operator]
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    found = loss_differences(module, losses, batch, single(module))
    assert torch.equal(found, naively(module, batch, single(module)))
    with pytest.raises(RuntimeError, match="shape"):
        loss_differences(module, losses, (torch.randn(3, 5), batch[1]), single(module))
    assert module[0].forward is own  # type: ignore[index]
    assert all("forward" not in m.__dict__ for m in (module, module[1]))  # type: ignore[index]
