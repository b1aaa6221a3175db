"""Statistics of privacy audits: from scores to a lower bound on epsilon that holds with a stated confidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from emulation.errors import InputError

Counts = npt.NDArray[np.float64]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at ``delta`` of one Gaussian mechanism whose sensitivity is ``mu`` standard deviations; exact.

    The least epsilon with Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu) <= delta (Balle and Wang,
    arXiv 1805.06530, theorem 8).
    """
    if mu <= 0:
        return 0.0
    if not math.isfinite(mu):
        return math.inf

    def excess(epsilon: float) -> float:
        upper = special.log_ndtr(mu / 2 - epsilon / mu)
        lower = epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
        return float(np.exp(upper) * -np.expm1(min(0.0, lower - upper))) - delta

    return _root(excess, 0.0, mu * mu / 2 + 40 * mu)


def gdp_lower_bound(with_canary: Sequence[float], without: Sequence[float], confidence: float) -> float:
    """A lower bound on mu if the mechanism is mu-GDP: no Gaussian mechanism with a smaller mu gives such scores.

    The first quarter of the scores chooses a threshold; on the rest, Clopper-Pearson intervals bound the true and the
    false positive rate, and mu >= Phi^-1(true) - Phi^-1(false) (Nasr et al., arXiv 2302.07956). The scores need no
    distribution of their own.

    Args:
        with_canary: scores of runs whose data holds the canary; larger means more like it.
        without: scores of runs without.
        confidence: probability with which the bound holds.

    Returns:
        The bound, 0 at least; infinity where a score is not finite (a NaN tells of the canary with certainty).
    """
    scores = [np.asarray(s, dtype=float) for s in (with_canary, without)]
    if min(len(s) for s in scores) < 8:
        raise InputError("too few trials for an audit", hint="2000 or more give a useful bound")
    if not all(np.isfinite(s).all() for s in scores):
        return math.inf
    pilots = [s[: len(s) // 4] for s in scores]
    rest = [s[len(s) // 4 :] for s in scores]
    n_with, n_without = len(rest[0]), len(rest[1])
    thresholds = np.unique(np.quantile(np.concatenate(pilots), np.linspace(0, 1, 201)))
    above = [(p[:, None] > thresholds).sum(0).astype(float) for p in pilots]
    promised = _mu_bound(above[0], len(pilots[0]), above[1], len(pilots[1]), confidence)
    threshold = thresholds[int(np.argmax(promised))]
    hits = [np.array([(s > threshold).sum()], dtype=float) for s in rest]
    return max(0.0, float(_mu_bound(hits[0], n_with, hits[1], n_without, confidence)[0]))


def _mu_bound(true: Counts, n_with: int, false: Counts, n_without: int, confidence: float) -> Counts:
    tail = (1 - confidence) / 2  # each of the two intervals may fail with half of what is left
    least_true = np.where(true > 0, stats.beta.ppf(tail, np.maximum(true, 1), n_with - true + 1), 0.0)
    room = n_without - false
    most_false = np.where(room > 0, stats.beta.ppf(1 - tail, false + 1, np.maximum(room, 1)), 1.0)
    with np.errstate(invalid="ignore"):
        bound = special.ndtri(least_true) - special.ndtri(most_false)
    return np.asarray(np.nan_to_num(bound, nan=-np.inf, neginf=-np.inf), dtype=float)


def one_run_lower_bound(scores: Sequence[float], included: Sequence[bool], delta: float, confidence: float) -> float:
    """A lower bound on epsilon from one run with many canaries, each included by a fair coin.

    The highest scores are guessed to be included and the lowest not, the rest is not guessed. The number of right
    guesses is bounded for any (epsilon, delta)-private run (Steinke, Nasr and Jagielski, arXiv 2305.08846, theorem
    5.2). Four numbers of guesses are tried, each at a quarter of the error.

    Args:
        scores: of every canary; larger means more likely included.
        included: whether it was.
        delta: of the guarantee.
        confidence: probability with which the bound holds.
    """
    order = np.argsort(np.asarray(scores, dtype=float), kind="stable")
    truth = np.asarray(included, dtype=bool)[order]
    count = len(truth)
    best = 0.0
    for share in (8, 4, 2, 1):
        half = count // share // 2
        if half:
            right = int(truth[count - half :].sum() + (~truth[:half]).sum())
            best = max(best, _one_run_epsilon(count, 2 * half, right, delta, (1 - confidence) / 4))
    return best


def _one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon that so many right guesses refute."""

    def excess(epsilon: float) -> float:  # falls as the claim that is to be refuted gets stronger
        return error - one_run_p_value(canaries, guesses, right, epsilon, delta)

    return _root(excess, 0.0, 60.0)


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability of at least ``right`` right guesses, at most, in an (epsilon, delta)-private run."""
    chance = 1 / (1 + math.exp(-epsilon))
    p_value = float(stats.binom.sf(right - 1, guesses, chance))
    if right:
        below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
        p_value += 2 * canaries * delta * float((below / np.arange(1, right + 1)).max())
    return min(1.0, p_value)


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, from below in its argument; ``low`` if it is not positive there."""
    if excess(low) <= 0:
        return low
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low
