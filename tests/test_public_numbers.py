"""Public numbers: as given, or from the data and said aloud."""

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpquant.public_numbers import PublicNumbers, public_numbers
from emulation.errors import InputError


def loader(size: int = 60, batch: int | None = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(size, 1)), batch_size=batch)


@pytest.mark.parametrize("size", [59, 60, 61])
def test_given_numbers_do_not_depend_on_the_data(size: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dpquant"):
        found = public_numbers(loader(size), sample_rate=0.1, expected_batch_size=6, epochs=3)
    assert found == PublicNumbers(sample_rate=0.1, expected_batch_size=6, epochs=3, dataset_size=60)
    assert (found.steps_per_epoch, found.steps) == (10, 30)
    assert not caplog.text


def test_numbers_from_the_data_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dpquant"):
        found = public_numbers(loader(), sample_rate=None, expected_batch_size=None, epochs=1)
    assert found == PublicNumbers(sample_rate=0.1, expected_batch_size=6, epochs=1, dataset_size=60)
    assert "number of examples (60), which thereby becomes public" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": 0.0, "expected_batch_size": 6}, "sample_rate=0.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": True}, "epochs=True"),
        ({"expected_batch_size": 61}, "batch_size=61 is larger than the data"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        public_numbers(loader(), **({"sample_rate": None, "expected_batch_size": None, "epochs": 1} | given))


def test_a_loader_without_batches_needs_a_size() -> None:
    with pytest.raises(InputError, match="no batch_size"):
        public_numbers(loader(batch=None), sample_rate=0.1, expected_batch_size=None, epochs=1)
