"""What was spent: frozen events, epsilon as a pure function of them, and the noise that meets a target.

Every private release of a run is one kind of mechanism, the Poisson-subsampled Gaussian, so an event is four numbers.
Training steps and sensitivity analyses are composed together by Opacus's accountants; nothing here draws noise.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from emulation.errors import InputError, suggestion

Mechanism = Literal["training", "analysis"]
Accountant = Literal["prv", "rdp"]
NEIGHBOURING = "add-or-remove-one"

# Opacus's default orders, and larger ones: without them a small epsilon is bounded far too loosely.
_RDP_ORDERS = (
    *(1 + x / 10 for x in range(1, 100)), *range(12, 64), *(64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1000)
)  # fmt: skip
_COARSE_ORDERS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)  # a bound in milliseconds, where a guess is enough
_PRV_ERROR = 0.01  # Opacus's default: PRV's epsilon is an upper bound at most about this much above the true one
_PRV_POINTS = 2**23  # of the discretized privacy loss: beyond this the FFTs need gigabytes
_SIGMA_TOLERANCE = 1e-3
_SIGMA_RANGE = (1e-2, 2.0**14)
_NO_NOISE = 1e-6  # less bounds nothing: one release alone has an epsilon of 1e11, and accountants overflow

Composition = tuple[tuple[float, float, int], ...]
"""Merged and sorted (noise multiplier, sample rate, steps)."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """One or more equal releases of a Poisson-subsampled Gaussian mechanism.

    Args:
        mechanism: what was released: a noisy gradient sum ("training") or noisy sensitivities ("analysis").
        noise_multiplier: standard deviation of the noise over the release's L2 sensitivity; 0 means no privacy.
        sample_rate: probability with which each example takes part, in (0, 1].
        steps: how many such releases.
        neighbouring: the neighbouring relation that the sensitivity is for; only "add-or-remove-one".

    Raises:
        InputError: a value out of range.
    """

    mechanism: Mechanism
    noise_multiplier: float
    sample_rate: float
    steps: int = 1
    neighbouring: str = NEIGHBOURING

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            raise InputError(
                f"unknown mechanism={self.mechanism!r}", hint=suggestion(str(self.mechanism), get_args(Mechanism))
            )
        if not _is_number(self.noise_multiplier) or self.noise_multiplier < 0:
            raise InputError(
                f"noise_multiplier={self.noise_multiplier!r} is out of range", hint="a finite number, zero or more"
            )
        if not _is_number(self.sample_rate) or not 0 < self.sample_rate <= 1:
            raise InputError(
                f"sample_rate={self.sample_rate!r} is out of range",
                hint="a probability above 0, at most 1: expected batch size over data set size",
            )
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f"steps={self.steps!r} is out of range", hint="a whole number, at least 1")
        if self.neighbouring != NEIGHBOURING:
            raise InputError(f"neighbouring={self.neighbouring!r} is not supported", hint=f"only {NEIGHBOURING!r}")

    def to_json(self) -> str:
        """One line of JSON; numbers read back to the same bits."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> PrivacyEvent:
        """The event of one line that :meth:`to_json` wrote.

        Raises:
            InputError: not JSON, a key missing or unknown, or a value out of range.
        """
        try:
            return cls(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"not a privacy event: {line.strip()[:80]!r}") from error


@dataclass(frozen=True, kw_only=True)
class PrivacyLedger:
    """Everything that was released, in order; recording gives a new ledger."""

    events: tuple[PrivacyEvent, ...] = ()

    def record(self, event: PrivacyEvent) -> PrivacyLedger:
        """The ledger after ``event``; a repetition of the last entry adds to that entry's steps."""
        if self.events and replace(self.events[-1], steps=event.steps) == event:
            last = replace(event, steps=self.events[-1].steps + event.steps)
            return PrivacyLedger(events=(*self.events[:-1], last))
        return PrivacyLedger(events=(*self.events, event))

    def only(self, mechanism: Mechanism) -> PrivacyLedger:
        """The entries of one mechanism, as if nothing else had been released."""
        return PrivacyLedger(events=tuple(e for e in self.events if e.mechanism == mechanism))

    def steps(self, mechanism: Mechanism) -> int:
        """How many releases of ``mechanism`` there were."""
        return sum(e.steps for e in self.events if e.mechanism == mechanism)

    def to_json_lines(self) -> str:
        """One event a line."""
        return "".join(event.to_json() + "\n" for event in self.events)

    @classmethod
    def from_json_lines(cls, text: str) -> PrivacyLedger:
        """The ledger that :meth:`to_json_lines` wrote.

        Raises:
            InputError: a line that is not an event.
        """
        return cls(events=tuple(PrivacyEvent.from_json(line) for line in text.splitlines()))


def epsilon(ledger: PrivacyLedger, delta: float, accountant: Accountant = "prv") -> float:
    """The epsilon of (epsilon, delta)-differential privacy of everything in the ledger, composed.

    A pure function of the multiset of entries: their order does not matter. The value is an upper bound. ``prv``
    (numerical composition, arXiv 2106.02848) is within about 0.01 of the true one; where its grid would need more than
    2^23 points (an epsilon in the hundreds) or is too coarse, the ``rdp`` bound is given instead. ``rdp``
    (arXiv 1908.10530) is looser and faster.

    Args:
        ledger: what was released. Nothing released: 0. A release without noise: infinity.
        delta: in (0, 1).
        accountant: "prv" or "rdp".

    Raises:
        InputError: ``delta`` out of range or an unknown accountant.
    """
    check_delta("delta", delta)
    _check_accountant(accountant)
    return _composed_epsilon(_merged(ledger.events), float(delta), accountant)


def calibrate_noise(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    analyses: Sequence[PrivacyEvent] = (),
    accountant: Accountant = "prv",
) -> float:
    """The least noise multiplier of training that meets the target with all planned analyses composed in.

    Args:
        target_epsilon: what training and analyses together may spend at ``target_delta``.
        target_delta: in (0, 1).
        sample_rate: of each training step.
        steps: planned training steps.
        analyses: planned analyses, or anything else that is spent beside the steps.
        accountant: as in :func:`epsilon`.

    Returns:
        A noise multiplier that never spends more than the target, at most 1e-3 above the least one that does so.

    Raises:
        InputError: a value out of range, or a target that no noise meets: the hint says what would fit.
    """
    _check_epsilon(target_epsilon)
    check_delta("target_delta", target_delta)
    _check_accountant(accountant)
    training = PrivacyEvent(mechanism="training", noise_multiplier=1.0, sample_rate=sample_rate, steps=steps)

    def composed(sigma: float) -> Composition:
        return _merged((*analyses, replace(training, noise_multiplier=sigma)))

    def roughly(sigma: float) -> float:
        return _rdp_epsilon(composed(sigma), target_delta, _COARSE_ORDERS)

    if spent_alone := _analyses_alone(analyses, target_epsilon, target_delta, accountant):
        raise _infeasible(target_epsilon, target_delta, spent_alone, analyses, accountant)
    start = _feasible_by_doubling(lambda s: roughly(s) <= target_epsilon)
    if roughly(start) > target_epsilon:  # too loose a bound for what the analyses leave: epsilons add like squares
        left = math.sqrt(target_epsilon**2 - _composed_epsilon(_merged(analyses), target_delta, accountant) ** 2)
        start = _feasible_by_doubling(
            lambda s: _rdp_epsilon(((s, float(sample_rate), steps),), target_delta, _COARSE_ORDERS) <= left
        )
    here, further = roughly(start), roughly(1.05 * start)
    slope = math.log(further / here) / math.log(1.05) if further > 0 else -1.0
    sigma = _least_sigma(
        lambda s: _composed_epsilon(composed(s), target_delta, accountant), target_epsilon, start, slope
    )
    if sigma is None:
        raise _infeasible(target_epsilon, target_delta, None, analyses, accountant)
    return sigma


def steps_within(
    ledger: PrivacyLedger,
    event: PrivacyEvent,
    *,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "prv",
) -> int:
    """How many of ``event.steps`` further releases are affordable: 0 up to all of them.

    Args:
        ledger: what is spent already, and whatever else is planned and must stay affordable.
        event: the releases asked for.
        target_epsilon: the budget that ledger and releases together must not exceed.
        target_delta: in (0, 1).
        accountant: as in :func:`epsilon`.

    Raises:
        InputError: a value out of range.
    """
    _check_epsilon(target_epsilon)

    def fits(steps: int) -> bool:
        after = ledger.record(replace(event, steps=steps)) if steps else ledger
        return epsilon(after, target_delta, accountant) <= target_epsilon

    if fits(event.steps):
        return event.steps
    return _most(fits, event.steps - 1)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number in [0, limit] that fits, where fewer always fit if more do; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _merged(events: Iterable[PrivacyEvent]) -> Composition:
    """Equal mechanisms together and sorted: composition is order-free, and accountants cost time per entry."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (float(event.noise_multiplier), float(event.sample_rate))
        steps[key] = steps.get(key, 0) + event.steps
    return tuple((sigma, rate, count) for (sigma, rate), count in sorted(steps.items()))


@functools.lru_cache(maxsize=4096)
def _composed_epsilon(composition: Composition, delta: float, accountant: Accountant) -> float:
    if not composition:
        return 0.0
    if composition[0][0] < _NO_NOISE:
        return math.inf
    exact = _prv_epsilon(composition, delta) if accountant == "prv" else None
    return _rdp_epsilon(composition, delta) if exact is None else exact


def _rdp_epsilon(composition: Composition, delta: float, orders: Sequence[float] = _RDP_ORDERS) -> float:
    import numpy as np

    total = sum((steps * _rdp(sigma, rate, orders) for sigma, rate, steps in composition), np.zeros(len(orders)))
    alpha = np.array(orders, dtype=float)
    # Balle et al., arXiv 1905.09982, theorem 21, as Opacus converts; an order that overflowed gives no bound.
    bounds = total - (math.log(delta) + np.log(alpha)) / (alpha - 1) + np.log1p(-1 / alpha)
    finite = bounds[np.isfinite(bounds)]
    return max(0.0, float(finite.min())) if finite.size else math.inf


@functools.lru_cache(maxsize=4096)
def _rdp(sigma: float, rate: float, orders: Sequence[float]) -> Any:
    """Renyi divergences of one release at every order; depends on no step count, so a search pays once."""
    import numpy as np
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        values: Any = np.asarray(rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders))
    return values


def _prv_epsilon(composition: Composition, delta: float) -> float | None:
    """Opacus's PRV accountant; None where its discretization does not work or would need too much memory."""
    import numpy as np
    from opacus.accountants import PRVAccountant

    count = sum(steps for _, _, steps in composition)
    mesh = _PRV_ERROR / math.sqrt(count * math.log(12 / (delta / 1000)) / 2)
    if 2 * (_rdp_epsilon(composition, delta / 4000, _COARSE_ORDERS) + 3) / mesh > _PRV_POINTS:
        return None
    accountant = PRVAccountant()
    accountant.history = list(composition)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            value = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
        except (RuntimeError, ValueError):
            return None
    return max(0.0, value) if math.isfinite(value) else None


def _feasible_by_doubling(feasible: Callable[[float], bool]) -> float:
    """A noise multiplier near the least feasible one, from a cheap test: doubled until feasible, then bisected."""
    low, high = _SIGMA_RANGE
    sigma = 1.0
    while feasible(sigma) and sigma > low:
        high, sigma = sigma, sigma / 2
    low = sigma
    sigma = min(2 * low, high)
    while sigma < high and not feasible(sigma):
        low, sigma = sigma, 2 * sigma
    high = min(high, sigma)
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return high


def _least_sigma(spent: Callable[[float], float], target: float, start: float, slope: float) -> float | None:
    """The end of a bracket of width 1e-3 at which ``spent`` is within the target; None if no noise is enough.

    ``spent`` falls, and log epsilon is close to linear in log sigma: a secant there needs about four evaluations.

    Args:
        spent: epsilon by noise multiplier; an evaluation may take seconds.
        target: the epsilon to meet.
        start: a first guess.
        slope: of log epsilon over log sigma there, for the first step.
    """
    low, high = 0.0, math.inf
    sigma, before = start, None
    while high - low > _SIGMA_TOLERANCE:
        value = spent(sigma)
        low, high = (low, sigma) if value <= target else (sigma, high)
        if low >= _SIGMA_RANGE[1]:
            return None
        if high <= _SIGMA_RANGE[0]:
            return high
        point = (math.log(sigma), math.log(max(value, 1e-300) / target))
        if before is not None and before[0] != point[0]:
            slope = (point[1] - before[1]) / (point[0] - before[0])
        slope = min(slope, -0.05)
        root = math.exp(point[0] - max(-0.7, min(0.7, point[1] / slope)))
        sigma, before = _next_sigma(root, low, high), point
    return high


def _next_sigma(root: float, low: float, high: float) -> float:
    """Where to evaluate: just above the estimated root, or where the bracket closes if its end is that near."""
    margin = 0.4 * _SIGMA_TOLERANCE
    if not low < root < high and low == 0:  # the estimate contradicts what was seen: leave the one end there is
        root = high - 2 * margin
    elif not low < root < high:  # ... or halve
        root = (low + high) / 2 if math.isfinite(high) else low + 2 * margin
    elif high - root < 2 * margin:
        root = max(high - 2 * margin, (low + high) / 2)
    elif root - low < margin:
        root = min(low + 2 * margin, (low + high) / 2)
    else:
        root += margin
    return min(max(root, _SIGMA_RANGE[0]), _SIGMA_RANGE[1])


def _analyses_alone(
    analyses: Sequence[PrivacyEvent], target: float, delta: float, accountant: Accountant
) -> float | None:
    """What the analyses alone spend if it reaches the target, else None."""
    events = _merged(analyses)
    if _rdp_epsilon(events, delta, _COARSE_ORDERS) < target / 2:  # far off: spare the slow accountant
        return None
    alone = _composed_epsilon(events, delta, accountant)
    return alone if alone >= target else None


def _infeasible(
    target: float, delta: float, alone: float | None, analyses: Sequence[PrivacyEvent], accountant: Accountant
) -> InputError:
    planned = sum(e.steps for e in analyses)
    if alone is None:
        looser = ", or use accountant 'rdp', whose bound is the smaller one for tiny epsilons"
        return InputError(
            f"target_epsilon={target:g} cannot be met by any noise at target_delta={delta:g} with {accountant}",
            hint="raise target_epsilon or target_delta, or take fewer steps" + looser * (accountant == "prv"),
        )

    def fits(count: int) -> bool:
        first, left = [], count
        for event in analyses:
            if left > 0:
                first.append(replace(event, steps=min(event.steps, left)))
                left -= event.steps
        return _composed_epsilon(_merged(first), delta, accountant) < target

    def scaled(factor: float) -> float:
        louder = [replace(e, noise_multiplier=max(e.noise_multiplier, 0.1) * factor) for e in analyses]
        return _composed_epsilon(_merged(louder), delta, "rdp")

    factor = next((f for f in (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0) if scaled(f) <= target / 2), None)
    options = [f"a target_epsilon above {alone:.4g}"] if alone < math.inf else []
    if count := _most(fits, planned):
        options.append(f"at most {count} analyses")
    if factor is not None:
        sigma = max(max(e.noise_multiplier, 0.1) for e in analyses) * factor
        options.append(f"an analysis noise_multiplier of {sigma:.3g}, which leaves half to training")
    return InputError(
        f"target_epsilon={target:g} is spent by the {planned} planned analyses alone:"
        f" epsilon {alone:.4g} at delta={delta:g}",
        hint="what would fit: " + ", or ".join(options or ["noise in the analyses"]),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_epsilon(value: float) -> None:
    if not _is_number(value) or value <= 0:
        raise InputError(f"target_epsilon={value!r} is out of range", hint="a finite number above 0, usually 1 to 10")


def check_delta(name: str, value: float, examples: int | None = None) -> None:
    """Refuses what is no delta and, where ``examples`` is given, one that would allow to publish an example in so many.

    Raises:
        InputError: not a number between 0 and 1, or not below 1 / ``examples``.
    """
    if not _is_number(value) or not 0 < value < 1:
        raise InputError(
            f"{name}={value!r} is out of range", hint="between 0 and 1, and well below 1 / number of examples"
        )
    if examples is not None and value >= 1 / examples:
        message = f"{name}={value} is not below 1/{examples}, one over the number of examples"
        raise InputError(message, hint=f"{0.1 / examples:.0e}, say")


def _check_accountant(name: str) -> None:
    if name not in get_args(Accountant):
        raise InputError(f"unknown accountant={name!r}", hint=suggestion(str(name), get_args(Accountant)))
