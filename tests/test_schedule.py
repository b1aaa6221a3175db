import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpquant.schedule import COOLDOWN, SCHEDULERS, draw_order, probability, share_of_epoch
from emulation.errors import InputError

LAYERS = ("conv1", "conv2", "fc1", "fc2")
SENSITIVITIES = dict(zip(LAYERS, (0.3, -0.1, 0.0, 0.8), strict=True))
DRAWS = 20_000


def orders(scheduler, beta=2.0, layers=LAYERS, sensitivities=SENSITIVITIES, draws=DRAWS):
    return Counter(
        draw_order(scheduler, layers, sensitivities=sensitivities, beta=beta, epoch=epoch, seed=7)
        for epoch in range(draws)
    )


def sequential(layers, weights):
    """Probability of every order when layers are drawn one by one, each with its weight's share of what is left."""
    found = {}
    for order in itertools.permutations(range(len(layers))):
        left, chance = set(order), 1.0
        for i in order:
            chance *= weights[i] / sum(weights[j] for j in left)
            left.remove(i)
        found[tuple(layers[i] for i in order)] = chance
    return found


def agree(counts, expected):
    """Within five standard errors everywhere, and by a chi-square test with the same improbability."""
    draws = sum(counts.values())
    worst = max(abs(counts[o] - draws * p) / math.sqrt(draws * p * (1 - p)) for o, p in expected.items())
    return worst < 5 and set(counts) <= set(expected)


def test_probability_is_softmax():
    values = list(SENSITIVITIES.values())
    expected = torch.softmax(-2.0 * torch.tensor(values, dtype=torch.float64), dim=0)
    assert probability(values, 2.0) == pytest.approx(expected.tolist(), rel=1e-12)
    assert probability([1e308, 0.0], 1.0) == [0.0, 1.0]
    assert probability([], 1.0) == []


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0, 5.0])
def test_first_draws_follow_softmax(beta):
    first = Counter()
    for order, count in orders("dpquant", beta).items():
        first[order[0]] += count
    assert agree(first, dict(zip(LAYERS, probability(list(SENSITIVITIES.values()), beta), strict=True)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_orders_are_those_of_sequential_sampling_without_replacement(size):
    layers = LAYERS[:size]
    weights = probability([SENSITIVITIES[name] for name in layers], 2.0)
    assert agree(
        orders("dpquant", layers=layers), {o: min(p, 1 - 1e-12) for o, p in sequential(layers, weights).items()}
    )


def test_the_comparison_catches_an_order_by_independent_draws():
    draw = random.Random(0)
    wrong = Counter()
    for _ in range(DRAWS):  # sorted uniform keys times weights: a popular mistake
        keys = [draw.random() * w for w in probability(list(SENSITIVITIES.values()), 2.0)]
        wrong[tuple(LAYERS[i] for i in sorted(range(4), key=lambda i: -keys[i]))] += 1
    assert not agree(wrong, sequential(LAYERS, probability(list(SENSITIVITIES.values()), 2.0)))


@pytest.mark.parametrize(("scheduler", "sensitivities"), [("pls", SENSITIVITIES), ("dpquant", None)])
def test_without_sensitivities_every_order_is_as_likely(scheduler, sensitivities):
    assert agree(orders(scheduler, sensitivities=sensitivities), sequential(LAYERS, [1.0] * 4))


def test_static_is_one_order_for_the_whole_run_and_uniform_over_seeds():
    assert len(orders("static", draws=50)) == 1
    counts = Counter(draw_order("static", LAYERS, epoch=3, seed=seed) for seed in range(DRAWS))
    assert agree(counts, sequential(LAYERS, [1.0] * 4))


def test_full_quantizes_nothing():
    assert draw_order("full", LAYERS, epoch=0, seed=0) == ()


def test_greedy_takes_what_saves_most_first():
    savings = dict(zip(LAYERS, (0.1, -0.2, 0.3, 0.1), strict=True))
    orders = {draw_order("greedy", LAYERS, savings=savings, epoch=epoch, seed=epoch) for epoch in range(5)}
    assert orders == {(LAYERS[2], LAYERS[0], LAYERS[3], LAYERS[1])}  # ties in forward order
    with pytest.raises(InputError, match="layer='conv1' has no savings"):
        draw_order("greedy", LAYERS, epoch=0, seed=0)


def test_a_draw_is_a_function_of_seed_and_epoch():
    drawn = [draw_order("pls", LAYERS, epoch=epoch, seed=5) for epoch in range(20)]
    assert drawn == [draw_order("pls", LAYERS, epoch=epoch, seed=5) for epoch in range(20)]
    assert len(set(drawn)) > 5
    assert drawn != [draw_order("pls", LAYERS, epoch=epoch, seed=6) for epoch in range(20)]


def test_a_draw_is_the_same_on_every_machine_and_version():
    assert draw_order("pls", LAYERS, epoch=1, seed=0) == ("fc2", "fc1", "conv1", "conv2")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_global_random_states_are_untouched(scheduler):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    draw_order(scheduler, LAYERS, sensitivities=SENSITIVITIES, beta=1.0, savings=SENSITIVITIES, epoch=2, seed=1)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@given(
    share=st.floats(0, 1), epochs=st.integers(1, 30), per_epoch=st.integers(1, 50), short=st.integers(0, 49),
    scheduler=st.sampled_from(SCHEDULERS),
)  # fmt: skip
def test_shares_of_epochs_average_to_the_runs_share(scheduler, share, epochs, per_epoch, short):
    ends = [min((e + 1) * per_epoch, epochs * per_epoch - short % per_epoch) for e in range(epochs)]
    starts, run_steps = [0, *ends[:-1]], ends[-1]
    found = [
        share_of_epoch(scheduler, share, layers=7, steps=end, steps_done=start, run_steps=run_steps)
        for start, end in zip(starts, ends, strict=True)
    ]
    assert all(0 <= s <= 1 for s in found)
    total = sum(s * (end - start) for s, start, end in zip(found, starts, ends, strict=True))
    assert total == pytest.approx(share * run_steps)
    if scheduler in ("annealed", "delayed"):
        assert found == sorted(found, reverse=scheduler == "annealed")
        assert sum(0 < s < 1 for s in found) <= 1 + (share * run_steps != pytest.approx(total, abs=1e-12))
    elif scheduler == "cooldown":
        assert found == sorted(found, reverse=True)
        assert found[0] * 7 == pytest.approx(round(found[0] * 7)) or epochs * share < 1
        late = [s for s, start in zip(found, starts, strict=True) if start >= (1 - COOLDOWN) * run_steps]
        assert share > 1 - COOLDOWN or sum(late) == pytest.approx(0, abs=1e-9)
    else:
        assert set(found) == {share}


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    beta=st.floats(0, 1e6),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**63),
)
def test_every_layer_is_drawn_exactly_once(values, beta, epoch, seed):
    layers = [f"layer{i}" for i in range(len(values))]
    drawn = draw_order(
        "dpquant", layers, sensitivities=dict(zip(layers, values, strict=True)), beta=beta, epoch=epoch, seed=seed
    )
    assert sorted(drawn) == sorted(layers)
    assert math.fsum(probability(values, beta)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "dpqant"}, "scheduler='dpqant'"),
        ({"layers": ("a", "b", "a")}, "layer='a' is given twice"),
        ({"sensitivities": {"conv1": 1.0}}, "layer='conv2' has no sensitivity"),
        ({"sensitivities": {**SENSITIVITIES, "fc1": math.nan}}, "sensitivity=nan"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": math.inf}, "beta=inf"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {
        "scheduler": "dpquant",
        "layers": LAYERS,
        "sensitivities": SENSITIVITIES,
        "beta": 1.0,
        "epoch": 0,
        "seed": 0,
    }
    given_ = {**good, **arguments}
    with pytest.raises(InputError, match=message):
        draw_order(given_.pop("scheduler"), given_.pop("layers"), **given_)
