"""What several seeds say: mean, standard deviation, and paired differences with Student's 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emulation.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Values of one quantity over ``n`` seeds.

    Attributes:
        n: how many values.
        mean: None for no value.
        sd: the sample's standard deviation (n - 1 below the sum); None for fewer than two values.
        low: lower end of the mean's 95 % interval; None for fewer than two values: nothing can be claimed then.
        high: its upper end.
    """

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None

    @property
    def sign(self) -> int | None:
        """1 or -1 where the interval lies above or below 0, 0 where it holds 0, None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def p_value(self) -> float | None:
        """How often a mean of 0 would give one at least as far from it (Student's t, two-sided); None as for `sign`."""
        if self.mean is None or self.sd is None:
            return None
        if not self.sd:
            return 0.0 if self.mean else 1.0
        return 2 * t_cdf(-abs(self.mean) * math.sqrt(self.n) / self.sd, self.n - 1)


def sample(values: Sequence[float], confidence: float = 0.95) -> Sample:
    """Mean, standard deviation and the mean's interval, taking the values as independent and normal."""
    n = len(values)
    if n == 0:
        return Sample(n=0, mean=None, sd=None, low=None, high=None)
    mean = math.fsum(values) / n
    if n == 1:
        return Sample(n=1, mean=mean, sd=None, low=None, high=None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * sd / math.sqrt(n)
    return Sample(n=n, mean=mean, sd=sd, low=mean - half, high=mean + half)


def paired(values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Sample:
    """Differences ``values - baseline`` seed by seed, over the seeds that both have."""
    seeds = sorted(values.keys() & baseline.keys())
    return sample([values[seed] - baseline[seed] for seed in seeds], confidence)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several hypotheses are refused so that one true among them is refused at most ``level`` of the time.

    Holm's step-down method (Scandinavian Journal of Statistics 6, 1979), whatever their dependence.
    """
    refused = [False] * len(p_values)
    for done, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > level / (len(p_values) - done):
            break
        refused[i] = True
    return refused


def t_cdf(t: float, degrees: int) -> float:
    """Student's distribution function for whole degrees of freedom, in closed form (Abramowitz and Stegun 26.7.3-4)."""
    if degrees < 1:
        raise InputError(f"degrees={degrees} is below 1")
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 if odd else 1, degrees - 2, 2):
        term *= square * k / (k + 1)
        total += term
    total *= math.sin(angle)
    return 0.5 + ((angle + total) / math.pi if odd else total / 2)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's distribution stays below with ``probability``, to 12 digits.

    Raises:
        InputError: a probability outside (0, 1), or degrees below 1.
    """
    if not 0 < probability < 1:
        raise InputError(f"probability={probability} is not between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability and high < 1e15:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2
