"""Means and intervals as scipy has them; no interval where nothing can be claimed."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpquant.statistics import Sample, holm, paired, sample, t_cdf, t_quantile
from emulation.errors import InputError

stats = pytest.importorskip("scipy.stats")

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=40)
SERIES = st.dictionaries(st.integers(0, 9), st.floats(0, 1), max_size=8)


@pytest.mark.parametrize("degrees", [*range(1, 41), 100, 999, 1000])
def test_quantiles_are_scipys(degrees: int) -> None:
    for probability in (0.005, 0.1, 0.4, 0.5, 0.75, 0.9, 0.95, 0.975, 0.995, 0.9995):
        expected = stats.t.ppf(probability, degrees)
        assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(-50, 50), st.integers(1, 200))
@example(2.1448572290575266e-10, 1)  # where SciPy's own says 0.5
def test_distribution_is_scipys(t: float, degrees: int) -> None:
    if abs(t) < 1e-3:  # the series of the density: SciPy's distribution loses t in df / (df + t^2)
        expected = 0.5 + t * stats.t.pdf(0, degrees) * (1 - t**2 * (degrees + 1) / (6 * degrees))
    else:
        expected = stats.t.cdf(t, degrees)
    assert t_cdf(t, degrees) == pytest.approx(expected, abs=1e-12)


@given(VALUES)
@example([0.25, 0.25])
@example([0.0, 0.0])
def test_p_values_are_scipys_and_agree_with_the_interval(values: list[float]) -> None:
    found = sample(values)
    assert found.p_value is not None
    if len(set(values)) == 1:  # no spread: SciPy divides by 0
        assert found.p_value == (0.0 if values[0] else 1.0)
    elif found.sd and found.sd > 1e-9:  # below that SciPy's differences cancel
        assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-9)
    if abs(found.p_value - 0.05) > 1e-6:
        assert (found.p_value < 0.05) == bool(found.sign)


def test_no_p_value_without_two_values() -> None:
    assert sample([]).p_value is None
    assert sample([1.0]).p_value is None


@given(st.lists(st.floats(0, 1), max_size=6), st.floats(0.001, 0.5))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float], level: float) -> None:
    """A hypothesis is refused where Bonferroni refuses every intersection that it is part of."""
    count = len(p_values)
    subsets = [[i for i in range(count) if chosen >> i & 1] for chosen in range(1, 2**count)]
    expected = [
        all(min(p_values[j] for j in own) <= level / len(own) for own in subsets if i in own) for i in range(count)
    ]
    assert holm(p_values, level) == expected


@given(VALUES, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(deadline=None)
def test_interval_is_scipys(values: list[float], confidence: float) -> None:
    found = sample(values, confidence)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    sd = float(np.std(values, ddof=1))
    assert found.sd == pytest.approx(sd, abs=1e-12)
    if sd > 1e-9:
        interval = stats.t.interval(confidence, len(values) - 1, np.mean(values), sd / len(values) ** 0.5)
        assert (found.low, found.high) == pytest.approx(interval, abs=1e-9)


@given(SERIES, SERIES)
def test_paired_is_scipys_over_the_seeds_that_both_have(ours: dict[int, float], theirs: dict[int, float]) -> None:
    found = paired(ours, theirs)
    seeds = [seed for seed in range(10) if seed in ours and seed in theirs]
    assert found.n == len(seeds)
    if found.sd is not None and found.sd > 1e-6:
        tested = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
        interval = tested.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
        if abs(tested.pvalue - 0.05) > 1e-9:
            assert (found.sign != 0) == (tested.pvalue < 0.05)


def test_pairing_removes_what_the_seeds_share() -> None:
    baseline = {seed: seed / 10 for seed in range(5)}
    better = {seed: value + 0.01 + (0.001 if seed % 2 else 0) for seed, value in baseline.items()}
    assert paired(better, baseline).sign == 1
    assert paired(baseline, better).sign == -1
    both = sample(list(better.values())).low, sample(list(baseline.values())).high
    assert both[0] is not None
    assert both[1] is not None
    assert both[0] < both[1]  # unpaired, the intervals overlap


def test_no_interval_no_claim() -> None:
    assert sample([]) == Sample(n=0, mean=None, sd=None, low=None, high=None)
    assert sample([0.5]) == Sample(n=1, mean=0.5, sd=None, low=None, high=None)
    assert sample([0.5]).sign is None
    assert paired({0: 1.0, 1: 1.0}, {1: 0.0, 2: 0.0}) == sample([1.0])
    assert paired({0: 1.0}, {1: 0.0}).n == 0


def test_coverage_of_the_interval() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for values in rng.normal(size=(2000, 5)).tolist():
        found = sample(values)
        inside += found.sign == 0
    assert inside / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.9, 0)])
def test_wrong_arguments(probability: float, degrees: int) -> None:
    with pytest.raises(InputError):
        t_quantile(probability, degrees)
