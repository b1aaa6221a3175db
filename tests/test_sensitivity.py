import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpquant import clipping
from dpquant.privacy import PrivacyEvent
from dpquant.sensitivity import (
    AnalysisSettings,
    clip_rows,
    layer_policies,
    loss_differences,
    release,
    smooth,
    undisturbed,
)
from dpquant.streams import GLOBAL_RANDOM
from emulation.errors import InputError
from emulation.layers import PRESETS, quantizable_layers, quantize_model, set_plan, set_rounding


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def per_example(module, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(module(inputs), targets, reduction="none")


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return quantize_model(Net())


def examples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(5, (count,), generator=generator)


POLICIES = list(layer_policies(["conv", "fc"], ["luq_fp4"]).values())


def test_differences_are_the_losses_of_each_policy_minus_full_precision(net):
    batch = examples(7)
    found = loss_differences(net, per_example, batch, [*POLICIES, {}])
    net.eval()
    with torch.no_grad():
        base = per_example(net, batch).double()
        for column, policy in enumerate(POLICIES):
            set_plan(net, policy)
            assert torch.equal(found[:, column], per_example(net, batch).double() - base)
    assert found.shape == (7, 3)
    assert found[:, :2].abs().min() > 0
    assert torch.equal(found[:, 2], torch.zeros(7, dtype=torch.float64))


def test_the_differences_of_an_example_do_not_depend_on_the_others(net):
    # one example alone goes through other kernels than a batch of many, so companions vary, not the batch size
    one, other = examples(8), examples(8, seed=1)
    mixed = [
        torch.cat([a[:1], 30 * b[1:] if b.is_floating_point() else b[1:]]) for a, b in zip(one, other, strict=True)
    ]
    assert torch.equal(
        loss_differences(net, per_example, one, POLICIES)[0], loss_differences(net, per_example, mixed, POLICIES)[0]
    )


def test_ladders_of_formats_are_policies_too(net):
    ladder = [{"conv": name} for name in ("luq_fp4", "fp8")] + [{"conv": "fp8", "fc": "fp8"}]
    found = loss_differences(net, per_example, examples(5), ladder)
    assert found.shape == (5, 3)
    assert found[:, 0].abs().mean() > found[:, 1].abs().mean()  # four bits hurt more than eight


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's hooks, at the layer that meets the data
@pytest.mark.parametrize("wrap", ["plain", "hooks", "bookkeeping"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_leaves_no_trace(net, wrap, fails):
    net.train()
    net.drop.eval()  # a user's own choice that must survive
    module = net if wrap == "plain" else clipping.private_module(net, clipping=wrap)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    per_example(module, examples(4)).sum().backward()
    optimizer.step()

    def state():
        values = [*net.state_dict().values(), *(v["momentum_buffer"] for v in optimizer.state.values())]
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        samples = [getattr(p, "grad_sample", None) for p in net.parameters()]
        counters = [getattr(p, "_forward_counter", 0) for p in net.parameters()]
        hooks = [len(getattr(m, "activations", ())) for m in net.modules()]
        hooks += [len(layer.replay or ()) for layer in quantizable_layers(net).values()]
        tape = getattr(net, "private_tape", None)
        recorded = (
            None if tape is None else ([len(v) for v in vars(tape).values() if isinstance(v, list)], tape.batch_size)
        )
        modes = [m.training for m in net.modules()]
        precisions = [layer.precision for layer in quantizable_layers(net).values()]
        return [v.clone() for v in values], grads, samples, counters, hooks, recorded, modes, precisions

    def loss(module, batch):
        torch.rand(3)  # a loss that draws
        if fails and precision_on(net):
            raise RuntimeError("out of memory")
        return per_example(module, batch)

    before, random_state = state(), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_differences(net, loss, examples(6), POLICIES)  # the hooks sit on its layers
    else:
        loss_differences(net, loss, examples(6), POLICIES)  # the hooks sit on its layers
    assert equal(before, state())
    assert torch.equal(random_state, torch.get_rng_state())


def precision_on(net):
    return any(layer.precision is not None for layer in quantizable_layers(net).values())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_the_plan_asked_for_is_in_force_afterwards(net):
    loss_differences(net, per_example, examples(3), POLICIES, restore={"fc": "fp8"})
    assert {n: layer.precision for n, layer in quantizable_layers(net).items()} == {"conv": None, "fc": PRESETS["fp8"]}


def test_an_empty_sample_has_no_rows(net):
    assert loss_differences(net, per_example, examples(0), POLICIES).shape == (0, 2)


def test_a_reduced_loss_is_refused(net):
    with pytest.raises(InputError, match=r"per_example_loss returned shape=\(\)") as error:
        loss_differences(net, lambda m, b: per_example(m, b).mean(), examples(3), POLICIES)
    assert "reduction='none'" in error.value.hint


def test_it_takes_any_switch():
    seen = []

    def switch(module, plan):
        seen.append(dict(plan))
        module.shift = len(plan)

    model = nn.Linear(2, 1)
    shifts = [{"a": 1}, {"a": 1, "b": 2}]
    found = loss_differences(
        model, lambda m, b: b.new_full((len(b),), m.shift), torch.zeros(3, 2), shifts, set_plan=switch
    )
    assert found.tolist() == [[1, 2]] * 3
    assert seen == [*shifts, {}, {}]  # in full precision last, and put back


def test_stochastic_rounding_keyed_by_example_gives_an_example_the_same_difference_in_any_batch(net):
    fp4 = PRESETS["luq_fp4"]
    stochastic = fp4.__class__(name="stochastic", weight=fp4.weight, input=fp4.grad_output, grad_output=fp4.grad_output)
    x, y = examples(8)
    order = torch.tensor([5, 3, 1, 0, 2, 4, 6, 7])
    set_rounding(net, seed=1, step=2, example_ids=torch.arange(8))
    straight = loss_differences(net, per_example, (x, y), [{"fc": stochastic}])
    set_rounding(net, seed=1, step=2, example_ids=order)
    assert torch.allclose(
        straight[order], loss_differences(net, per_example, (x[order], y[order]), [{"fc": stochastic}]), atol=1e-6
    )


# --- the sensitivity of what is released

ROW = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=3, max_size=3)
ORDINARY = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


def movement(rows, extra, max_norm, contribution):
    """How far the un-noised sum moves, in L2, when one example is added."""
    both = torch.tensor([*rows, extra], dtype=torch.float64)
    return (contribution(both, max_norm) - contribution(both[:-1], max_norm)).norm().item()


@given(rows=st.lists(ROW | ORDINARY, max_size=6), extra=ROW | ORDINARY, max_norm=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_one_example_moves_the_sum_by_at_most_the_clipping_norm(rows, extra, max_norm):
    moved = movement(rows, extra, max_norm, lambda d, c: clip_rows(d, c).sum(0))
    assert moved <= max_norm * (1 + 1e-12)


def aggregate(differences, max_norm):
    """Clipping the vector of sums: its norm is bounded, an example's influence on it is not."""
    total = differences.sum(0)
    return total * min(1.0, max_norm / max(total.norm().item(), 1e-300))


def test_an_aggregate_clip_moves_by_twice_the_norm():
    rows = [[0.6, 0.0, 0.0], [0.6, 0.0, 0.0]]
    assert movement(rows, [-9.0, 0.0, 0.0], 1.0, aggregate) == pytest.approx(2.0)
    assert movement(rows, [-9.0, 0.0, 0.0], 1.0, lambda d, c: clip_rows(d, c).sum(0)) == pytest.approx(1.0)


def test_clipping_every_layer_by_itself_moves_by_the_root_of_their_number():
    def alone(differences, max_norm):
        return differences.clamp(-max_norm, max_norm).sum(0)

    assert movement([], [5.0, 5.0, -5.0], 1.0, alone) == pytest.approx(math.sqrt(3))
    assert movement([], [5.0, 5.0, -5.0], 1.0, lambda d, c: clip_rows(d, c).sum(0)) == pytest.approx(1.0)


def test_short_vectors_are_untouched_and_long_ones_keep_their_direction():
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0], [1e200, 0.0]], dtype=torch.float64)
    expected = [[0.3, 0.4], [0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]
    assert torch.allclose(clip_rows(rows, 1.0), torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_example_contributes_nothing_and_reaches_nobody(bad):
    rows = torch.tensor([[0.1, 0.2], [0.3, bad]])
    assert torch.equal(clip_rows(rows, 1.0), torch.tensor([[0.1, 0.2], [0.0, 0.0]]).double())


OPTIONS = {"max_norm": 0.5, "noise_multiplier": 2.0, "expected_batch_size": 10}


def test_the_release_is_unbiased_with_the_promised_noise():
    differences = torch.tensor([[0.1, -0.2, 0.0], [0.2, 0.1, 0.3]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([release(differences, **OPTIONS, generator=generator) for _ in range(5_000)])
    deviation = 2.0 * 0.5 / 10
    assert (draws.mean(0) - differences.double().sum(0) / 10).abs().max() < 5 * deviation / math.sqrt(5_000)
    assert draws.std(0).numpy() == pytest.approx([deviation] * 3, rel=5 / math.sqrt(2 * 5_000))
    correlation = torch.corrcoef(draws.T) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(5_000)


def test_an_empty_sample_releases_pure_noise():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(release(torch.zeros(0, 3), **OPTIONS, generator=generator), noise * 2.0 * 0.5 / 10)


def test_the_divisor_is_public():
    for size in (0, 1, 5, 50):
        found = release(torch.ones(size, 1) * 0.01, **{**OPTIONS, "noise_multiplier": 0.0}, generator=torch.Generator())
        assert found.item() == pytest.approx(size * 0.01 / 10)


def test_a_release_draws_from_its_own_generator_alone():
    state = torch.get_rng_state()
    release(torch.zeros(2, 2), **OPTIONS, generator=torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.get_rng_state())


def test_smoothing_is_an_exponential_moving_average():
    first = smooth(None, {"a": 1.0, "b": 2.0}, 0.75)
    second = smooth(first, {"a": 3.0, "b": 0.0}, 0.75)
    assert first == {"a": 1.0, "b": 2.0}
    assert second == {"a": 1.5, "b": 1.5}
    assert smooth(first, {"a": 5.0, "b": 6.0}, 0.0) == {"a": 5.0, "b": 6.0}


def test_who_restores_the_global_generator_keeps_others_from_it():
    def free():
        taken = GLOBAL_RANDOM.acquire(blocking=False)
        if taken:
            GLOBAL_RANDOM.release()
        return taken

    with ThreadPoolExecutor(1) as other:
        assert other.submit(free).result()
        with undisturbed(nn.Linear(1, 1)):
            assert not other.submit(free).result()
        assert other.submit(free).result()


# --- settings


def test_what_an_analysis_spends():
    found = AnalysisSettings(noise_multiplier=3.0, expected_batch_size=256).event(1024, analyses=5)
    assert found == PrivacyEvent(mechanism="analysis", noise_multiplier=3.0, sample_rate=0.25, steps=5)
    with pytest.raises(InputError, match="expected_batch_size=256 of the analysis exceeds dataset_size=200"):
        AnalysisSettings().event(200)


@pytest.mark.parametrize(
    "change",
    [
        {"interval": 0},
        {"interval": 1.5},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"max_norm": 0.0},
        {"max_norm": math.inf},
        {"expected_batch_size": 0},
        {"decay": 1.0},
        {"decay": -0.1},
        {"probe_steps": 0},
        {"probe_learning_rate": 0.0},
        {"estimator": "prob"},
        {"probe": "backward"},
    ],
)
def test_settings_out_of_range_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        AnalysisSettings(**change)
