import json
import math
from functools import cache

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from dpquant import privacy
from dpquant.privacy import PrivacyEvent, PrivacyLedger, calibrate_noise, epsilon, steps_within
from emulation.errors import InputError


def training(sigma, rate, steps=1):
    return PrivacyEvent(mechanism="training", noise_multiplier=sigma, sample_rate=rate, steps=steps)


def analysis(sigma, rate, steps=1):
    return PrivacyEvent(mechanism="analysis", noise_multiplier=sigma, sample_rate=rate, steps=steps)


def ledger(*events):
    return PrivacyLedger(events=events)


DIGITS = 256 / 60000
COMPOSITIONS = {
    "training alone": [training(1.0, DIGITS, 2340)],
    "full-batch analyses": [training(1.0, DIGITS, 2340), analysis(10.0, 1.0, 10)],
    "subsampled analyses": [training(1.0, DIGITS, 2340), analysis(2.0, 0.01, 10)],
    "loud analyses": [training(1.0, DIGITS, 2340), analysis(0.5, 1 / 60, 20)],
    "three phases": [training(1.2, DIGITS, 780), training(1.0, DIGITS, 780), training(0.8, DIGITS, 780)],
    "interleaved": [e for _ in range(10) for e in (training(1.0, DIGITS, 234), analysis(2.0, 0.01))],
    "large batches": [training(3.0, 4096 / 50000, 875)],
    "low noise": [training(0.5, 0.02, 300)],
    "rare analyses with little noise": [training(0.7, DIGITS, 500), analysis(0.3, 0.001, 5)],
    "one Gaussian": [training(5.0, 1.0, 1)],
    "digits with analyses": [e for _ in range(15) for e in (analysis(2.0, 256 / 1500), training(1.2, 64 / 1500, 46))],
    "small data, small analyses": [training(2.0, 0.08, 300), analysis(4.0, 0.3, 8)],
    "analyses alone": [analysis(2.0, 0.02, 30)],
    "two kinds of analyses, interleaved": [
        e for _ in range(6) for e in (analysis(2.0, 0.05), training(1.1, 0.01, 100), analysis(1.0, 0.005))
    ],
}


@cache
def pld(name):
    """Google's privacy loss distributions, pessimistic: tight bounds from an independent implementation."""
    accountant = PLDAccountant()
    counts = {}
    for event in COMPOSITIONS[name]:  # composition is order-free, and composing one by one takes minutes
        key = (event.noise_multiplier, event.sample_rate)
        counts[key] = counts.get(key, 0) + event.steps
    for (sigma, rate), steps in counts.items():
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps))
    return accountant.get_epsilon(1e-5)


def sandwiched(name, prv, rdp):
    return pld(name) <= prv <= pld(name) + 0.0125 and rdp >= prv


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_epsilon_is_just_above_an_independent_accountant(name):
    spent = ledger(*COMPOSITIONS[name])
    assert sandwiched(name, epsilon(spent, 1e-5, "prv"), epsilon(spent, 1e-5, "rdp"))


def test_the_comparison_catches_a_forgotten_analysis_and_a_halved_noise():
    forgot = epsilon(ledger(*COMPOSITIONS["full-batch analyses"]).only("training"), 1e-5)
    assert not sandwiched("full-batch analyses", forgot, math.inf)
    halved = epsilon(ledger(training(2.5, 1.0)), 1e-5)
    assert not sandwiched("one Gaussian", halved, math.inf)


def test_values_that_opacus_gives():
    two = ledger(training(1.0, DIGITS, 2340), analysis(2.0, 0.01, 10))
    assert epsilon(two, 1e-5, "prv") == pytest.approx(1.1110, abs=1e-4)
    assert epsilon(two, 1e-5, "rdp") == pytest.approx(1.3531, abs=1e-4)


def test_order_does_not_matter_and_equal_entries_merge():
    events = COMPOSITIONS["interleaved"]
    once = ledger(training(1.0, DIGITS, 2340), analysis(2.0, 0.01, 10))
    for accountant in ("prv", "rdp"):
        values = {epsilon(ledger(*e), 1e-5, accountant) for e in (events, events[::-1], sorted(events, key=str))}
        assert values == {epsilon(once, 1e-5, accountant)}


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_nothing_spends_nothing_and_no_noise_spends_everything(accountant):
    assert epsilon(PrivacyLedger(), 1e-5, accountant) == 0
    assert epsilon(ledger(training(1.0, 0.1), training(0.0, 0.1)), 1e-5, accountant) == math.inf


@pytest.mark.parametrize("sigma", [1e-300, 1e-100, 1e-7, 1e-6, 0.02, 0.05, 0.2])
def test_hopeless_noise_has_a_finite_or_infinite_bound_but_no_crash(sigma):
    prv = epsilon(ledger(training(sigma, 0.3, 100_000)), 1e-5)
    assert prv > 1e4
    assert prv == epsilon(ledger(training(sigma, 0.3, 100_000)), 1e-5, "rdp")


@given(
    sigma=st.floats(0.6, 20),
    rate=st.floats(1e-4, 1),
    steps=st.integers(1, 500),
    extra=st.integers(1, 500),
)
@settings(max_examples=10, deadline=None)
def test_more_steps_and_less_noise_never_spend_less(sigma, rate, steps, extra):
    base = epsilon(ledger(training(sigma, rate, steps)), 1e-5, "rdp")
    assert epsilon(ledger(training(sigma, rate, steps + extra)), 1e-5, "rdp") >= base - 1e-9
    assert epsilon(ledger(training(0.9 * sigma, rate, steps)), 1e-5, "rdp") >= base - 1e-9
    assert epsilon(ledger(training(sigma, rate, steps), analysis(2.0, 0.1)), 1e-5, "rdp") >= base - 1e-9


PLANS = [
    (8.0, 1e-5, 64 / 1500, 700, [analysis(2.0, 256 / 1500, 15)]),
    (3.0, 1e-5, 128 / 1437, 300, [analysis(2.0, 256 / 1437, 10), analysis(4.0, 0.1, 5)]),
    (1.0, 1e-6, 0.01, 1000, []),
    (0.3, 1e-5, 0.001, 3000, [analysis(4.0, 0.01, 30)]),
    (0.05, 1e-5, 0.001, 100, []),
    (30.0, 1e-5, 0.02, 300, []),
    (8.0, 1e-5, 1.0, 30, [analysis(10.0, 1.0, 2)]),
    (3.0, 1e-5, 0.05, 300, [analysis(1.0, 0.1, 10)]),  # nearly all of it goes to the analyses
]


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "analyses", "accountant"),
    [*((*plan, "rdp") for plan in PLANS[:-1]), *((*plan, "prv") for plan in PLANS[1:5] + PLANS[6:])],
)
def test_joint_calibration_meets_the_target_from_below_and_wastes_no_noise(
    target, delta, rate, steps, analyses, accountant
):
    sigma = calibrate_noise(
        target_epsilon=target,
        target_delta=delta,
        sample_rate=rate,
        steps=steps,
        analyses=analyses,
        accountant=accountant,
    )
    assert epsilon(ledger(training(sigma, rate, steps), *analyses), delta, accountant) <= target
    assert epsilon(ledger(training(sigma - 1e-3, rate, steps), *analyses), delta, accountant) > target


def test_calibration_ends_where_the_first_guess_meets_the_target_exactly():
    target = epsilon(ledger(training(1.0, 0.02, 500)), 1e-5, "rdp")
    sigma = calibrate_noise(target_epsilon=target, target_delta=1e-5, sample_rate=0.02, steps=500, accountant="rdp")
    assert 0.999 <= sigma <= 1.001


def test_calibration_evaluates_the_slow_accountant_few_times(monkeypatch):
    calls = []

    def counted(composition, delta, prv=privacy._prv_epsilon):
        calls.append(composition)
        return prv(composition, delta)

    monkeypatch.setattr(privacy, "_prv_epsilon", counted)
    privacy._composed_epsilon.cache_clear()
    calibrate_noise(target_epsilon=5.0, target_delta=1e-5, sample_rate=0.03, steps=700, analyses=[analysis(2, 0.1, 9)])
    assert len(calls) <= 6


def test_an_unaccounted_analysis_would_need_less_noise():
    options = {
        "target_epsilon": 3.0, "target_delta": 1e-5, "sample_rate": 0.05, "steps": 300, "accountant": "rdp"
    }  # fmt: skip
    joint = calibrate_noise(**options, analyses=[analysis(2.0, 0.1, 10)])
    assert joint > calibrate_noise(**options) + 0.02


def test_infeasible_analyses_are_refused_with_what_would_fit():
    planned = [analysis(1.0, 0.2, 30)]
    with pytest.raises(InputError, match=r"target_epsilon=3 is spent by the 30 planned analyses alone") as error:
        calibrate_noise(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=100, analyses=planned)
    hint = error.value.hint
    alone = epsilon(ledger(*planned), 1e-5)
    assert f"a target_epsilon above {alone:.4g}" in hint
    count = int(hint.split("at most ")[1].split(" analyses")[0])
    assert 0 < count < 30
    assert epsilon(ledger(analysis(1.0, 0.2, count)), 1e-5) < 3 <= epsilon(ledger(analysis(1.0, 0.2, count + 1)), 1e-5)
    quieter = float(hint.split("noise_multiplier of ")[1].split(",")[0])
    assert calibrate_noise(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=100, analyses=[analysis(quieter, 0.2, 30)]
    )


def test_a_target_below_what_the_accountant_can_resolve_is_refused():
    with pytest.raises(InputError, match="cannot be met by any noise") as error:
        calibrate_noise(target_epsilon=0.005, target_delta=1e-5, sample_rate=0.01, steps=100)
    assert "rdp" in error.value.hint


def test_noiseless_analyses_are_infeasible():
    with pytest.raises(InputError, match="spent by the 2 planned analyses alone: epsilon inf") as error:
        calibrate_noise(
            target_epsilon=3.0, target_delta=1e-5, sample_rate=0.1, steps=10, analyses=[analysis(0.0, 0.1, 2)]
        )
    assert "inf" not in error.value.hint


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_steps_within_stops_at_the_last_affordable_step(accountant):
    spent = ledger(training(1.0, 0.05, 100), analysis(2.0, 0.1, 3))
    budget = {"target_epsilon": 6.0, "target_delta": 1e-5, "accountant": accountant}
    count = steps_within(spent, training(1.0, 0.05, 250), **budget)
    assert 0 < count < 250
    assert epsilon(spent.record(training(1.0, 0.05, count)), 1e-5, accountant) <= 6
    assert epsilon(spent.record(training(1.0, 0.05, count + 1)), 1e-5, accountant) > 6
    assert steps_within(spent, training(1.0, 0.05, count), **budget) == count
    assert steps_within(spent.record(training(1.0, 0.05, count)), training(1.0, 0.05), **budget) == 0
    assert steps_within(spent, training(0.0, 0.05, 5), **budget) == 0


def test_a_calibrated_plan_is_affordable_to_its_last_step():
    planned = ledger(analysis(2.0, 256 / 1500, 3))
    sigma = calibrate_noise(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=64 / 1500, steps=60, analyses=planned.events
    )
    budget = {"target_epsilon": 3.0, "target_delta": 1e-5}
    assert steps_within(planned, training(sigma, 64 / 1500, 60), **budget) == 60
    assert 60 <= steps_within(planned, training(sigma, 64 / 1500, 62), **budget) < 62


def test_recording_gives_a_new_ledger_and_merges_repetitions():
    empty = PrivacyLedger()
    one = empty.record(training(1.0, 0.1))
    two = one.record(training(1.0, 0.1)).record(analysis(2.0, 0.1)).record(training(1.0, 0.1, 3))
    assert empty.events == ()
    assert one.events == (training(1.0, 0.1),)
    assert two.events == (training(1.0, 0.1, 2), analysis(2.0, 0.1), training(1.0, 0.1, 3))
    assert (two.steps("training"), two.steps("analysis")) == (5, 1)
    assert two.only("analysis").events == (analysis(2.0, 0.1),)
    with pytest.raises(AttributeError):
        one.events[0].noise_multiplier = 0.0


EVENTS = st.builds(
    PrivacyEvent,
    mechanism=st.sampled_from(["training", "analysis"]),
    noise_multiplier=st.floats(0, 1e6),
    sample_rate=st.floats(0, 1, exclude_min=True),
    steps=st.integers(1, 10**9),
)


@given(st.lists(EVENTS, max_size=5))
def test_json_lines_read_back_to_the_same_bits(events):
    before = PrivacyLedger(events=tuple(events))
    text = before.to_json_lines()
    assert PrivacyLedger.from_json_lines(text) == before
    assert all(json.loads(line) for line in text.splitlines())


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"mechanism": "training"}', '{"foo": 1}'])
def test_a_line_that_is_no_event_is_refused(line):
    with pytest.raises(InputError, match="not a privacy event"):
        PrivacyEvent.from_json(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mechanism": "trainign"}, "mechanism='trainign'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"noise_multiplier": "1"}, "noise_multiplier='1'"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": True}, "sample_rate=True"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"neighbouring": "replace-one"}, "neighbouring='replace-one'"),
    ],
)
def test_events_out_of_range_are_refused(change, message):
    good = {"mechanism": "training", "noise_multiplier": 1.0, "sample_rate": 0.1}
    with pytest.raises(InputError, match=message) as error:
        PrivacyEvent(**{**good, **change})
    assert error.value.hint


@pytest.mark.parametrize("value", [0, 1, -1e-5, 2, math.nan, "1e-5", None])
def test_delta_out_of_range_is_refused(value):
    with pytest.raises(InputError, match="delta="):
        epsilon(PrivacyLedger(), value)
    with pytest.raises(InputError, match="target_delta="):
        calibrate_noise(target_epsilon=1.0, target_delta=value, sample_rate=0.1, steps=10)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "8"])
def test_target_epsilon_out_of_range_is_refused(value):
    with pytest.raises(InputError, match="target_epsilon="):
        calibrate_noise(target_epsilon=value, target_delta=1e-5, sample_rate=0.1, steps=10)
    with pytest.raises(InputError, match="target_epsilon="):
        steps_within(PrivacyLedger(), training(1.0, 0.1), target_epsilon=value, target_delta=1e-5)


def test_unknown_accountant_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="accountant='prvv'") as error:
        epsilon(PrivacyLedger(), 1e-5, "prvv")
    assert "'prv'" in error.value.hint
