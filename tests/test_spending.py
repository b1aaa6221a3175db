"""What is on record while a run trains, stops, and goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpquant.privacy import PrivacyEvent, PrivacyLedger
from dpquant.spending import BLOCK, Spending
from emulation.errors import InputError

STEP = PrivacyEvent(mechanism="training", noise_multiplier=1.0, sample_rate=0.1)
ANALYSIS = PrivacyEvent(mechanism="analysis", noise_multiplier=2.0, sample_rate=0.2)


class Record:
    """Stands in for the file: holds what was appended, and says when."""

    def __init__(self) -> None:
        self.ledger = PrivacyLedger()
        self.writes = 0

    def append(self, event: PrivacyEvent) -> None:
        self.ledger = self.ledger.record(event)
        self.writes += 1


def run(
    spending: Spending,
    record: Record,
    epochs: int,
    steps: int,
    *,
    stop: int | None = None,
    first: int = 0,
    fresh: bool = True,
) -> int:
    """Takes epochs of one analysis and some steps; returns how many releases there were when it stopped."""
    releases = 0
    for _ in range(first, epochs):
        for event, upcoming in ((ANALYSIS, 1), *((STEP, steps - i) for i in range(steps))):
            if releases == stop:
                return releases
            spending.spend(event, upcoming)
            releases += 1
            for mechanism in ("training", "analysis"):
                assert record.ledger.steps(mechanism) >= spending.ledger.steps(mechanism)
            if fresh:
                assert record.ledger.steps("training") < spending.ledger.steps("training") + BLOCK
    return releases


@given(st.integers(1, 3), st.integers(1, 40))
def test_the_record_is_never_behind_and_ends_equal(epochs: int, steps: int) -> None:
    spending, record = Spending(), Record()
    spending.write_ahead(PrivacyLedger(), record.append, repeats_to_the_bit=True)
    run(spending, record, epochs, steps)
    assert record.ledger == spending.ledger
    assert record.writes == epochs * (1 + -(-steps // BLOCK))


@given(st.integers(1, 40), st.data())
def test_what_repeats_to_the_bit_counts_once_and_what_does_not_counts_again(steps: int, data: st.DataObject) -> None:
    for repeats in (True, False):
        record, first = Record(), Spending()
        first.write_ahead(PrivacyLedger(), record.append, repeats_to_the_bit=True)
        stop = data.draw(st.integers(0, 2 * (steps + 1) - 1))
        run(first, record, 2, steps, stop=stop)
        done = stop // (steps + 1)  # epochs in the checkpoint
        resumed = Spending()
        for _ in range(done):
            resumed.ledger = resumed.ledger.record(ANALYSIS).record(PrivacyEvent(**{**vars(STEP), "steps": steps}))
        kept = record.ledger
        resumed.write_ahead(kept, record.append, repeats_to_the_bit=repeats)
        run(resumed, record, 2, steps, first=done, fresh=False)
        if repeats:
            assert record.ledger.steps("training") == 2 * steps
            assert record.ledger.steps("analysis") == 2
        else:
            assert record.ledger.steps("training") == kept.steps("training") + (2 - done) * steps
            assert record.ledger.steps("analysis") == kept.steps("analysis") + 2 - done


def test_a_record_that_cannot_be_written_lets_nothing_be_spent() -> None:
    def full(event: PrivacyEvent) -> None:
        raise InputError("cannot be written")

    spending = Spending()
    spending.write_ahead(PrivacyLedger(), full, repeats_to_the_bit=True)
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be written"):
            spending.spend(STEP, 5)
    assert spending.ledger == PrivacyLedger()


def test_a_record_behind_the_checkpoint_is_refused() -> None:
    spending = Spending()
    spending.spend(STEP)
    with pytest.raises(InputError, match="less than the checkpoint"):
        spending.write_ahead(PrivacyLedger(), lambda event: None, repeats_to_the_bit=True)
