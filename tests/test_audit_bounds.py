import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy import stats

from dpquant.audit_bounds import gaussian_epsilon, gdp_lower_bound, one_run_lower_bound, one_run_p_value
from emulation.errors import InputError


def excess_delta(epsilon, mu):
    """Delta at epsilon of a Gaussian mechanism, from the privacy loss, which is normal with mean mu^2/2."""
    return stats.norm.sf(epsilon / mu - mu / 2) - math.exp(epsilon) * stats.norm.sf(epsilon / mu + mu / 2)


@pytest.mark.parametrize("mu", [0.05, 0.2, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_gaussian_epsilon_is_exact(mu, delta):
    found = gaussian_epsilon(mu, delta)
    assert excess_delta(found, mu) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_gaussian_epsilon_agrees_with_an_accountant(mu):
    accountant = PLDAccountant().compose(GaussianDpEvent(1 / mu))
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_gaussian_epsilon_at_the_ends():
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-9, 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert 200 < gaussian_epsilon(20.0, 1e-5) < 300


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_the_bound_holds_as_often_as_promised_and_is_near(mu):
    draw = np.random.default_rng(7)
    found = [gdp_lower_bound(draw.normal(mu, 1, 1000), draw.normal(0, 1, 1000), 0.9) for _ in range(200)]
    assert np.mean(np.array(found) > mu) < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)
    assert np.median(found) > mu - 0.3 - 0.15 * mu


def test_the_bound_needs_no_gaussian_scores():
    draw = np.random.default_rng(8)
    with_canary, without = draw.normal(2, 1, 2000), draw.normal(0, 1, 2000)
    same = gdp_lower_bound(np.exp(with_canary), np.exp(without), 0.95)  # any increasing map: thresholds move along
    assert same == gdp_lower_bound(with_canary, without, 0.95)


def test_scores_that_are_not_finite_give_the_canary_away():
    good = [0.0] * 20
    assert gdp_lower_bound([math.nan] * 20, good, 0.95) == math.inf


def test_too_few_trials_are_refused():
    with pytest.raises(InputError, match="too few trials"):
        gdp_lower_bound([1.0] * 7, [0.0] * 7, 0.95)


def binomial_tail(right, guesses, chance):
    return sum(math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(right, guesses + 1))


@pytest.mark.parametrize(("guesses", "right", "epsilon"), [(10, 9, 0.0), (10, 9, 1.0), (50, 40, 0.5), (5, 0, 3.0)])
def test_without_delta_right_guesses_are_at_most_binomial(guesses, right, epsilon):
    expected = binomial_tail(right, guesses, 1 / (1 + math.exp(-epsilon)))
    assert one_run_p_value(100, guesses, right, epsilon, 0.0) == pytest.approx(min(1.0, expected))


def test_delta_adds_what_the_theorem_says():
    canaries, guesses, right, epsilon, delta = 40, 12, 9, 0.7, 1e-3
    chance = 1 / (1 + math.exp(-epsilon))
    below = [binomial_tail(right - i, guesses, chance) - binomial_tail(right, guesses, chance) for i in range(1, 10)]
    expected = binomial_tail(right, guesses, chance) + 2 * canaries * delta * max(
        b / i for i, b in enumerate(below, start=1)
    )
    assert one_run_p_value(canaries, guesses, right, epsilon, delta) == pytest.approx(expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
def test_one_run_bounds_hold_for_randomized_response(epsilon):
    draw = np.random.default_rng(9)
    found = []
    for _ in range(40):
        included = draw.random(400) < 0.5
        answers = np.where(draw.random(400) < 1 / (1 + math.exp(-epsilon)), included, ~included)
        found.append(one_run_lower_bound(answers + 0.01 * draw.random(400), included, 1e-6, 0.9))
    assert np.mean(np.array(found) > epsilon) < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 40)
    assert np.median(found) > 0.7 * epsilon - 0.15


def test_one_run_without_a_signal_finds_nothing():
    draw = np.random.default_rng(10)
    assert one_run_lower_bound(draw.random(500), draw.random(500) < 0.5, 1e-5, 0.95) < 0.5
