"""The clipping engine: exact sums, independent examples, and the ways of losing them seen to fail."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.per_sample_gradients_utils import check_per_sample_gradients_are_correct
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpquant.clipping import (
    PrivateOptimizer,
    clip_factors,
    clipped_sums,
    per_example_norms,
    private_criterion,
    private_module,
)
from emulation.errors import InputError
from emulation.layers import PRESETS, LayerPrecision, quantizable_layers, quantize_model, set_plan, set_rounding
from emulation.quantizer import Quantizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

C = 0.1  # small enough that every example is clipped


def recipe(x: str, g: str, rule: str = "pow2", rounding: str = "nearest_even") -> LayerPrecision:
    """FP4 with scales over the given extent; powers of two make the GEMMs of FP4 operands exact in float32."""
    quantizer = lambda granularity, rounding: Quantizer(  # noqa: E731
        "float4_e2m1fn", granularity=granularity, scale_rule=rule, rounding=rounding
    )
    return LayerPrecision(
        name=f"{x}-{g}-{rule}",
        weight=quantizer("tensor", "nearest_even"),
        input=quantizer(x, "nearest_even"),
        grad_output=quantizer(g, rounding),
    )


POW2 = recipe("example", "example")
POW2_STOCHASTIC = recipe("example", "example", rounding="stochastic")
PLANS = [None, "luq_fp4", "fp8", "mxfp8", "mxfp4", "nvfp4", "float8_e5m2", POW2, POW2_STOCHASTIC]


def name_of(plan: object) -> str:
    return getattr(plan, "name", str(plan))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )
    return quantize_model(net)


def data(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 5, (n,), generator=generator)


def switch(net: nn.Module, plan: object, only: slice = slice(None)) -> None:
    set_plan(net, {} if plan is None else dict.fromkeys(list(quantizable_layers(net))[only], plan))  # type: ignore[arg-type]


def key(net: nn.Module, ids: Tensor, step: int = 0) -> None:
    set_rounding(net, seed=11, step=step, example_ids=ids)


def alone(
    net: nn.Module, x: Tensor, y: Tensor, ids: Tensor | None = None, weight: Tensor | None = None
) -> list[Tensor]:
    """Every example's gradient by plain autograd, one example at a time: per parameter [B, ...]."""
    net = copy.deepcopy(net)
    ids = torch.arange(len(x)) if ids is None else ids
    rows = []
    for i in range(len(x)):
        key(net, ids[i : i + 1])
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1], reduction="sum")
        rows.append(torch.autograd.grad(loss if weight is None else weight[i] * loss, list(net.parameters())))
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


def norms_of(gradients: list[Tensor]) -> Tensor:
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)


def clipped(gradients: list[Tensor], c: float = C) -> list[Tensor]:
    factors = (c / (norms_of(gradients) + 1e-6)).clamp(max=1)
    return [torch.einsum("n,n...->...", factors, g) for g in gradients]


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)  # type: ignore[arg-type]


def prepare(
    net: nn.Module, clipping: str = "bookkeeping", noise: float = 0.0, make: Callable[..., torch.optim.Optimizer] = sgd
) -> tuple[nn.Module, PrivateOptimizer]:
    private = private_module(net, clipping)
    optimizer = PrivateOptimizer(
        make(net.parameters()),
        module=private,
        noise_multiplier=noise,
        max_grad_norm=C,
        expected_batch_size=4,
        generator=torch.Generator().manual_seed(0),
    )
    return private, optimizer


CRITERION = private_criterion(nn.CrossEntropyLoss())


def step(net: nn.Module, private: nn.Module, optimizer: PrivateOptimizer, x: Tensor, y: Tensor) -> list[Tensor]:
    """How far one step moves every parameter."""
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    CRITERION(private(x), y).backward()
    optimizer.step()
    return [b - p.detach() for p, b in zip(net.parameters(), before, strict=True)]


# ----------------------------------------------------------------------------------------------------------- exact sums


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_a_step_is_the_clipped_sum_of_every_example_alone(plan: object, clipping: str) -> None:
    net = network().double()
    x, y = data(6)
    switch(net, plan)
    expected = clipped(alone(net, x, y))
    private, optimizer = prepare(net, clipping)
    key(net, torch.arange(6))
    for moved, total in zip(step(net, private, optimizer, x, y), expected, strict=True):
        torch.testing.assert_close(moved * 4, total, rtol=1e-5, atol=1e-7)


def test_norms_and_sums_can_be_asked_for() -> None:
    net = network().double()
    x, y = data(5)
    switch(net, "fp8")
    gradients = alone(net, x, y)
    private_module(net)
    key(net, torch.arange(5))
    CRITERION(net(x), y).backward()
    tape = net.private_tape
    norms = per_example_norms(tape)  # type: ignore[arg-type]
    torch.testing.assert_close(norms, norms_of(gradients))
    factors = clip_factors(norms, C)
    assert (factors * norms <= C).all()
    for p, total in zip(net.parameters(), clipped(gradients), strict=True):
        torch.testing.assert_close(clipped_sums(tape, factors)[p], total, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [None, "fp8", POW2], ids=name_of)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv1d(4, 6, 3), lambda: nn.Conv3d(2, 4, 2)])
def test_opacus_own_check(make: Callable[[], nn.Module], plan: object) -> None:
    torch.manual_seed(0)
    layer = quantize_model(make())
    switch(layer, plan)
    shape = {nn.Linear: (5, 6), nn.Conv1d: (5, 4, 9), nn.Conv3d: (5, 2, 4, 4, 4)}
    x = torch.randn(next(s for kind, s in shape.items() if isinstance(layer, kind)))
    assert check_per_sample_gradients_are_correct(x, layer, batch_first=True)


def test_layers_are_switched_between_steps() -> None:
    net = network().double()
    x, y = data(6)
    private, optimizer = prepare(net)
    for plan, only in [(POW2, slice(0, 2)), (None, slice(None)), ("fp8", slice(1, 4)), ("luq_fp4", slice(None))]:
        switch(net, plan, only)
        plain = copy.deepcopy(net)
        plain.private_tape.close()  # type: ignore[union-attr, operator]
        expected = clipped(alone(plain, x, y))
        key(net, torch.arange(6))
        for moved, total in zip(step(net, private, optimizer, x, y), expected, strict=True):
            torch.testing.assert_close(moved * 4, total, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- independence


class Tokens(nn.Module):
    """An embedding that is also the output's weight, layers over tokens, and normalisation by the root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.RMSNorm(16), nn.LayerNorm(16))
        self.out = nn.Linear(16, 5)
        self.out.weight = self.embed.weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x)).mean(1))  # type: ignore[no-any-return]


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.InstanceNorm1d(8, affine=True), nn.ReLU(), nn.Conv1d(8, 4, 3, stride=2),
        nn.Flatten(), nn.Linear(124, 5),
    )  # fmt: skip


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


OTHER_NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "signals": (signals, lambda x: x.flatten(2)),
    "volumes": (volumes, lambda x: x.reshape(-1, 3, 4, 4, 4)),
    "tokens": (Tokens, lambda x: (x[:, 0, :, 0] * 10).long() % 5),
}


def others(
    plan: object, outlier: float, clipping: str, guard: bool = True, name: str | None = None
) -> tuple[float, float, bool]:
    """By one more example: (shift of 12 others' clipped sum, of the whole sum, both over C; any bit of the others)."""
    make, shaped = OTHER_NETWORKS[name] if name else (network, lambda x: x)
    torch.manual_seed(0)
    net = quantize_model(make()).float()
    x, y = data(13, seed=7, dtype=torch.float32)
    x[12] *= outlier
    x = shaped(x)
    switch(net, plan)
    found = []
    for n in (13, 12):
        twin = copy.deepcopy(net)
        if guard:
            private = private_module(twin, clipping)
        else:  # what the guard prevents
            switch(twin, None)
            private = private_module(twin, clipping)
            for ours, theirs in zip(quantizable_layers(twin).values(), quantizable_layers(net).values(), strict=True):
                ours.precision = theirs.precision
        key(twin, torch.arange(n))
        CRITERION(private(x[:n]), y[:n]).backward()
        if clipping == "hooks":
            gradients = [p.grad_sample for p in twin.parameters()]
        else:
            by_parameter = {c.parameter: c.per_example() for c in twin.private_tape.combined()}  # type: ignore[union-attr]
            gradients = [by_parameter[p] for p in twin.parameters()]
        factors = clip_factors(norms_of(gradients), C)
        found.append([torch.einsum("n,n...->n...", factors, g) for g in gradients])
    with_it, without = found
    common = [a[:12] - b for a, b in zip(with_it, without, strict=True)]
    whole = [a.sum(0) - b.sum(0) for a, b in zip(with_it, without, strict=True)]
    size = lambda parts: math.sqrt(sum(float(p.double().square().sum()) for p in parts)) / C  # noqa: E731
    return size([d.sum(0) for d in common]), size(whole), any(bool(d.any()) for d in common)


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize("plan", [None, "luq_fp4", "fp8", "mxfp8", "mxfp4", "nvfp4", POW2], ids=name_of)
def test_one_example_more_moves_the_sum_by_at_most_c(plan: object, outlier: float, clipping: str) -> None:
    common, whole, _ = others(plan, outlier, clipping)
    assert common < 1e-3, "no other example's contribution moves beyond float32 kernel noise"
    assert whole < 1.001


def moved_in_float32(device: str, bound: float | None = None) -> list[float]:
    """By each of some examples, how far it moves the clipped sum of a large batch over C, all bits as they come."""
    count = 256
    net = network().float().to(device)
    private = private_module(net)
    optimizer = PrivateOptimizer(
        sgd(net.parameters()), module=private, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=count
    )
    optimizer._bound = optimizer._bound if bound is None else bound
    x, y = (t.to(device) for t in data(count, dtype=torch.float32))
    CRITERION(private(30 * x), y).backward()
    contributions = private.private_tape.combined()  # type: ignore[union-attr, operator]
    moves = []
    whole, _ = optimizer.clipped(contributions, torch.ones(count, device=device))
    for out in range(0, count, 16):
        taken = torch.ones(count, device=device)
        taken[out] = 0
        rest, norms = optimizer.clipped(contributions, taken)
        assert norms[out] > C
        moves.append(math.sqrt(sum(float((whole[p] - rest[p]).double().square().sum()) for p in whole)) / C)
    return moves


def test_one_example_moves_the_float32_sum_by_at_most_c_rounding_included() -> None:
    moves = moved_in_float32("cpu")
    assert 0.998 < min(moves) <= max(moves) <= 1
    assert max(moved_in_float32("cpu", bound=C * (1 + 3e-4))) > 1, "room for it is seen to be needed"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_tf32_does_not_loosen_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = torch.backends
    monkeypatch.setattr(backends.cudnn.conv, "fp32_precision", "tf32")
    monkeypatch.setattr(backends.cuda.matmul, "fp32_precision", "tf32")
    moves = moved_in_float32("cuda")
    assert 0.95 < min(moves) <= max(moves) <= 1
    assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "tf32", "and is left as it was"


@pytest.mark.parametrize("name", OTHER_NETWORKS)
@pytest.mark.parametrize("outlier", [1.0, 30.0])
@pytest.mark.parametrize("plan", [None, *PRESETS, POW2], ids=name_of)
def test_one_example_more_moves_the_sum_of_any_layers_by_at_most_c(plan: object, outlier: float, name: str) -> None:
    for clipping in ("bookkeeping", "hooks") if name != "tokens" else ("bookkeeping",):  # Opacus has no tied weights
        common, whole, _ = others(plan, outlier, clipping, name=name)
        assert common < 1e-3
        assert whole < 1.001


@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_with_power_of_two_scales_no_other_example_changes_by_a_bit(outlier: float) -> None:
    assert others(POW2, outlier, "bookkeeping")[2] is False


def test_scales_over_the_batch_are_seen_to_break_the_bound() -> None:
    mixing = recipe("tensor", "tensor", "max")
    common, whole, _ = others(mixing, 30.0, "bookkeeping", guard=False)
    assert common > 1.5
    assert whole > 1.5
    net = network()
    with pytest.raises(InputError, match="mixes examples"):
        switch(private_module(net), mixing)
    net = network()
    switch(net, mixing)
    with pytest.raises(InputError, match="mixes examples"):
        private_module(net)


def fixed_grid(step_size: float) -> LayerPrecision:
    """Gradients on a fixed grid, as without any scale: keeps examples apart, and is not homogeneous."""

    class Scaled(Quantizer):
        def fake_quantize(self, x: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
            return Quantizer("int8", scale_rule="none").fake_quantize(x / step_size) * step_size

    apart = Quantizer("float4_e2m1fn", scale_rule="pow2")
    weight = Quantizer("float4_e2m1fn", granularity="tensor", scale_rule="pow2")
    return LayerPrecision(name="grid", weight=weight, input=apart, grad_output=Scaled("int8", scale_rule="none"))


def test_the_gradient_of_a_mean_loss_is_seen_to_leak_the_batch_size() -> None:
    x, y = data(13, seed=7)
    net = network().double()
    switch(net, fixed_grid(0.01))

    def common(reduction: str) -> float:
        sums = []
        for n in (13, 12):
            twin = copy.deepcopy(net)
            private_module(twin)
            out = twin(x[:n])
            loss = CRITERION(out, y[:n]) if reduction == "sum" else F.cross_entropy(out, y[:n])
            loss.backward()
            by_parameter = {c.parameter: c.per_example()[:12] for c in twin.private_tape.combined()}  # type: ignore[union-attr]
            gradients = [g * (n if reduction == "mean" else 1) for g in by_parameter.values()]
            sums.append(clipped(gradients))
        return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*sums, strict=True))) / C

    assert common("mean") > 0.5
    assert common("sum") < 1e-6


def test_a_second_backward_of_scaled_losses_is_seen_to_exceed_c() -> None:
    net = network().double()
    x, y = data(8)
    switch(net, fixed_grid(0.02))
    norms = norms_of(alone(net, x, y))
    worst = 0.0
    for c in (0.05, 0.2, 0.5, 1.0, 2.0, 4.0):
        factors = (c / (norms + 1e-6)).clamp(max=1)
        worst = max(worst, float(norms_of(alone(net, x, y, weight=factors)).max() / c))
    assert worst > 1.2
    private, optimizer = prepare(net)
    CRITERION(private(x), y).backward()
    contributions = [c.per_example() for c in optimizer.tape.combined()]  # type: ignore[union-attr]
    kept = torch.einsum("n,n->n", norms_of(contributions), clip_factors(norms_of(contributions), C))
    assert kept.max() <= C * (1 + 1e-9)


def test_ghost_clipping_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="clipping='ghost'") as error:
        private_module(network(), "ghost")
    assert "c * Q(g)" in str(error.value.hint)
    net = network()
    ghost = GradSampleModuleFastGradientClipping(net, loss_reduction="sum", max_grad_norm=C)
    x, y = data(3, dtype=torch.float32)
    with pytest.raises(InputError, match="ghost clipping cannot be used"):
        F.cross_entropy(ghost(x), y, reduction="sum").backward()


# --------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("plan", [None, "luq_fp4", "mxfp4", "nvfp4"])
def test_an_example_without_finite_gradient_contributes_zero(plan: str | None, bad: float, clipping: str) -> None:
    net = network().double()
    x, y = data(6)
    switch(net, plan)
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected = clipped(alone(net, x[kept], y[kept], ids=kept))
    private, optimizer = prepare(net, clipping)
    x[2, 1, 4, 4] = bad
    key(net, torch.arange(6))
    moves = step(net, private, optimizer, x, y)
    if bad == 1e30:  # huge but finite where nothing overflows: then it is clipped like any other
        assert all(m.isfinite().all() for m in moves)
        return
    assert optimizer.nonfinite_examples == 1
    for moved, total in zip(moves, expected, strict=True):
        torch.testing.assert_close(moved * 4, total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("plan", [None, "luq_fp4", "nvfp4"])
def test_an_empty_batch_is_a_step_of_pure_noise(plan: str | None, clipping: str) -> None:
    net = network()
    switch(net, plan)
    private, optimizer = prepare(net, clipping, noise=1.0)
    x, y = data(0, dtype=torch.float32)
    moved = torch.cat([m.flatten() for m in step(net, private, optimizer, x, y)])
    assert abs(float(moved.std()) / (C / 4) - 1) < 0.05
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    optimizer.step()  # a loop that skips empty batches altogether
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_noise_has_the_declared_deviation_and_comes_from_the_generator() -> None:
    x, y = data(4, dtype=torch.float32)
    moves = []
    for noise in (0.0, 3.0, 3.0):
        net = network()
        switch(net, "fp8")
        private, optimizer = prepare(net, noise=noise)
        key(net, torch.arange(4))
        moves.append(torch.cat([m.flatten() for m in step(net, private, optimizer, x, y)]).double())
    drawn = (moves[1] - moves[0]) * 4 / (3.0 * C)
    assert torch.equal(moves[1], moves[2])
    n = len(drawn)
    assert abs(float(drawn.mean())) < 5 / math.sqrt(n)
    assert abs(float(drawn.std()) - 1) < 5 / math.sqrt(2 * n)
    assert abs(float((drawn**4).mean()) - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
def test_virtual_batches_make_one_step(clipping: str) -> None:
    x, y = data(12)
    results = []
    for physical in (12, 5):
        net = network().double()
        private, optimizer = prepare(net, clipping, noise=1.0)
        loader = DPDataLoader(TensorDataset(x, y), sample_rate=0.99, generator=torch.Generator().manual_seed(3))
        steps = 0
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as batches:
            for inputs, targets in batches:
                optimizer.zero_grad()
                CRITERION(private(inputs), targets).backward()
                optimizer.step()
                steps += 1
        assert steps == (len(loader) if physical == 12 else 3 * len(loader))
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adaptive_optimizers_see_the_same_noisy_gradient(make: type[torch.optim.Optimizer]) -> None:
    x, y = data(6)
    results = []
    for clipping in ("bookkeeping", "hooks"):
        net = network().double()
        switch(net, POW2)
        private, optimizer = prepare(net, clipping, noise=0.5, make=make)
        for _ in range(3):
            step(net, private, optimizer, x, y)
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_and_schedulers_of_the_wrapped_optimizer_work() -> None:
    net = network()
    private, optimizer = prepare(net)
    seen = []
    optimizer.attach_step_hook(lambda o: seen.append(o.accumulated_iterations))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(net, private, optimizer, *data(3, dtype=torch.float32))
    schedule.step()
    assert seen == [1]
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
def test_misuse_is_refused(clipping: str) -> None:
    x, y = data(3, dtype=torch.float32)
    net = network()
    private, optimizer = prepare(net, clipping)
    CRITERION(private(x), y).backward()

    def again() -> None:
        CRITERION(private(x), y).backward()
        optimizer.step()

    with pytest.raises(InputError, match=r"two backward passes|second forward"):
        again()
    optimizer.zero_grad()
    CRITERION(private(x), y).backward()
    optimizer.step()
    with pytest.raises(InputError, match="twice"):
        optimizer.step()
    with pytest.raises(InputError, match="not prepared"):
        PrivateOptimizer(
            sgd(net.parameters()), module=nn.Linear(1, 1), noise_multiplier=1, max_grad_norm=1, expected_batch_size=1
        )
    with pytest.raises(InputError, match="unknown clipping='hook'"):
        private_module(network(), "hook")


def test_a_frozen_part_and_a_partial_optimizer() -> None:
    net = network().double()
    x, y = data(4)
    head = list(net[10].parameters())  # type: ignore[index]
    gradients = alone(net, x, y)[-2:]
    private = private_module(net)
    optimizer = PrivateOptimizer(
        sgd(head), module=private, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=4
    )
    moves = step(net, private, optimizer, x, y)
    assert not any(m.any() for m in moves[:-2])
    for moved, total in zip(moves[-2:], clipped(gradients), strict=True):
        torch.testing.assert_close(moved * 4, total, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- criterion


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_criterion_is_a_mean_in_value_and_a_sum_in_gradient(reduction: str) -> None:
    y = data(6)[1]
    logits = torch.randn(6, 5, requires_grad=True)
    criterion = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)
    loss = private_criterion(criterion)(logits, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, label_smoothing=0.1))
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.1), logits)
    torch.testing.assert_close(found, expected)
    assert criterion.reduction == reduction, "the user's object is left alone"


def test_criterion_averages_an_examples_own_tokens() -> None:
    logits, targets = torch.randn(3, 7, 4), torch.randint(0, 7, (3, 4))
    token = F.cross_entropy(logits, targets, reduction="none")
    mean, total = private_criterion(nn.CrossEntropyLoss()), private_criterion(nn.CrossEntropyLoss(reduction="sum"))
    torch.testing.assert_close(mean.per_example(logits, targets), token.mean(1))
    torch.testing.assert_close(total.per_example(logits, targets), token.sum(1))
    own = private_criterion(lambda out, _: out.square().sum((1, 2)))
    torch.testing.assert_close(own(logits, targets), logits.square().sum() / 3)


def test_criterion_of_no_examples_and_of_scalars() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    loss = CRITERION(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    with pytest.raises(InputError, match="not one per example"):
        private_criterion(F.cross_entropy)(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
