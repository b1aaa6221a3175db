import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpquant import clipping
from dpquant.sensitivity import layer_policies
from dpquant.training_probe import clip_vector, release_aggregate, training_differences
from emulation.errors import InputError
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding

POLICIES = [*layer_policies(["0", "3"], ["fp8"]).values(), {}]
OPTIONS = {"steps": 3, "learning_rate": 0.5, "max_grad_norm": 0.7, "expected_batch_size": 10}


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = quantize_model(nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3)))
    set_rounding(model, seed=None)
    return model


def examples(count):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def per_example(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def by_hand(model, batch, plan):
    """The same steps with one backward per example."""
    model = copy.deepcopy(model)
    set_plan(model, plan)
    parameters = list(model.parameters())
    for _ in range(OPTIONS["steps"]):
        total = [torch.zeros_like(p) for p in parameters]
        for i in range(len(batch[0])):
            loss = per_example(model, [t[i : i + 1] for t in batch]).sum()
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([g.norm() for g in gradients]).norm()
            for t, g in zip(total, gradients, strict=True):
                t += g * (OPTIONS["max_grad_norm"] / norm).clamp(max=1)
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= OPTIONS["learning_rate"] * t / OPTIONS["expected_batch_size"]
    with torch.no_grad():
        return per_example(model, batch).sum().item() / OPTIONS["expected_batch_size"]


def test_differences_are_those_of_clipped_gradient_steps_from_the_same_weights(net):
    batch = examples(12)
    expected = [by_hand(net, batch, policy) - by_hand(net, batch, {}) for policy in POLICIES]
    module = clipping.private_module(net)
    found = training_differences(module, per_example, lambda: [batch], POLICIES, **OPTIONS)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    parts = [[t[:3] for t in batch], [t[3:] for t in batch]]
    in_parts = training_differences(module, per_example, lambda: parts, POLICIES, **OPTIONS)
    assert in_parts.tolist() == pytest.approx(found.tolist(), abs=1e-6)
    assert found[2] == 0
    assert found[:2].abs().min() > 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(net, fails):
    module = clipping.private_module(net)
    module.train()
    optimizer = clipping.PrivateOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        module=module,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    per_example(module, examples(4)).sum().backward()
    optimizer.step()

    def state():
        tensors = [*module.state_dict().values(), *(p.grad for p in module.parameters())]
        tape = module.private_tape
        plan = [layer.precision for layer in quantizable_layers(module).values()]
        recorded = [len(v) for v in vars(tape).values() if isinstance(v, list)]
        return [t.clone() for t in tensors], recorded, plan, module.training

    calls = []

    def loss(module, batch):
        calls.append(torch.rand(2))
        if fails and len(calls) == 6:
            raise RuntimeError("out of memory")
        return per_example(module, batch)

    before, random_state = state(), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            training_differences(module, loss, lambda: [examples(8)], POLICIES, **OPTIONS)
    else:
        training_differences(module, loss, lambda: [examples(8)], POLICIES, **OPTIONS)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert torch.equal(random_state, torch.get_rng_state())


def test_an_empty_sample_shows_no_difference(net):
    found = training_differences(clipping.private_module(net), per_example, lambda: [examples(0)], POLICIES, **OPTIONS)
    assert found.tolist() == [0.0] * 3


def test_hooks_are_refused(net):
    with pytest.raises(InputError, match="needs clipping='bookkeeping'"):
        training_differences(
            clipping.private_module(net, "hooks"), per_example, lambda: [examples(2)], POLICIES, **OPTIONS
        )


VECTOR = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3)


@given(one=VECTOR, other=VECTOR, max_norm=st.floats(1e-3, 1e3))
def test_any_two_samples_are_at_most_twice_the_norm_apart(one, other, max_norm):
    a, b = (clip_vector(torch.tensor(v, dtype=torch.float64), max_norm) for v in (one, other))
    assert (a - b).norm() <= 2 * max_norm * (1 + 1e-12)


def test_opposite_samples_are_twice_the_norm_apart():
    a, b = (clip_vector(torch.tensor([v, 0.0]), 0.5) for v in (9.0, -9.0))
    assert 1 - 1e-8 < (a - b).norm() <= 1


def test_the_noise_is_made_for_twice_the_norm():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            release_aggregate(torch.tensor([0.3, -0.1]), max_norm=0.5, noise_multiplier=2.0, generator=generator)
            for _ in range(5_000)
        ]
    )
    assert draws.std(0).tolist() == pytest.approx([2.0] * 2, rel=5 / math.sqrt(10_000))
    assert draws.mean(0).tolist() == pytest.approx([0.3, -0.1], abs=5 * 2 / math.sqrt(5_000))
