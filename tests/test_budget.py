"""What a run plans to release, its noise, and how much of it is still affordable."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpquant.budget import Budget, planned_budget
from dpquant.privacy import PrivacyLedger, epsilon
from dpquant.public_numbers import PublicNumbers
from dpquant.sensitivity import AnalysisSettings
from emulation.errors import InputError

NUMBERS = PublicNumbers(sample_rate=0.05, expected_batch_size=50, epochs=5, dataset_size=1000)
ANALYSIS = AnalysisSettings(expected_batch_size=20)


def planned(analyses: int = 3, **changes: Any) -> Budget:
    given = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-4, "accountant": "rdp"}
    return planned_budget(NUMBERS, ANALYSIS, analyses, **(given | changes))


@pytest.mark.parametrize("analyses", [0, 3])
def test_the_planned_run_spends_the_target_and_hardly_less(analyses: int) -> None:
    budget = planned(analyses)
    ledger = budget.ledger(analyses)
    assert 2.97 < epsilon(ledger, 1e-4, "rdp") <= 3.0
    assert ledger.steps("training") == NUMBERS.steps == 100
    assert ledger.steps("analysis") == analyses
    assert budget.analyses(2) == ANALYSIS.event(1000, 2)
    assert budget.training(7).noise_multiplier == budget.noise_multiplier
    assert planned(noise_multiplier=0.0, target_epsilon=None).noise_multiplier == 0


@pytest.mark.parametrize("given", [{"noise_multiplier": 1.0}, {"target_epsilon": None}])
def test_one_of_noise_and_target_is_given(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give one of"):
        planned(**given)


@settings(max_examples=15, deadline=None)
@given(done=st.integers(0, 120), twice=st.integers(0, 120), probed=st.integers(0, 3))
def test_what_is_affordable_is_within_the_target_and_one_step_more_is_not(done: int, twice: int, probed: int) -> None:
    budget = BUDGET
    spent = PrivacyLedger()
    spent = spent.record(budget.training(done + twice)) if done + twice else spent
    spent = spent.record(budget.analyses(probed)) if probed else spent
    left, due = max(0, 100 - done), 3 - probed
    found = budget.affordable(spent, left, due)
    assert 0 <= found <= left

    def after(steps: int) -> float:
        whole = spent.record(budget.training(steps)) if steps else spent
        whole = whole.record(budget.analyses(due)) if due else whole
        return epsilon(whole, 1e-4, "rdp") if whole.events else 0.0

    assert found == 0 or after(found) <= 3.0
    assert found == left or after(found + 1) > 3.0
    assert found == left or twice > 0


def test_without_a_target_everything_is_affordable() -> None:
    budget = planned(noise_multiplier=1.0, target_epsilon=None)
    assert budget.affordable(PrivacyLedger(events=(budget.training(10**6),)), 50, 2) == 50


BUDGET = planned()
