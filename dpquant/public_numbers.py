"""The numbers of a run that anyone may know: fixed before training, and not functions of the private data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from emulation.errors import InputError

_log = logging.getLogger("dpquant")


@dataclass(frozen=True, kw_only=True)
class PublicNumbers:
    """Sizes of a private run.

    Attributes:
        sample_rate: probability of an example in a batch.
        expected_batch_size: divisor of the noisy sum.
        epochs: planned.
        dataset_size: declared number of examples.
    """

    sample_rate: float
    expected_batch_size: int
    epochs: int
    dataset_size: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate={self.sample_rate} must be above 0 and at most 1")
        if isinstance(self.epochs, bool) or self.epochs < 1:
            raise InputError(f"epochs={self.epochs} must be at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """As many as it takes for an example to be drawn once on average."""
        return max(1, round(1 / self.sample_rate))

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.steps_per_epoch


def public_numbers(
    loader: DataLoader[Any], *, sample_rate: float | None, expected_batch_size: int | None, epochs: int
) -> PublicNumbers:
    """The numbers given, completed from the loader where they are not, which is said aloud.

    Raises:
        InputError: a number is out of range, or missing.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    batch_size = loader.batch_size if expected_batch_size is None else expected_batch_size
    if batch_size is None:
        raise InputError("the loader has no batch_size", hint="give expected_batch_size and sample_rate")
    if batch_size < 1:
        raise InputError(f"expected_batch_size={batch_size} must be at least 1")
    if sample_rate is None:
        if batch_size > size:
            raise InputError(
                f"batch_size={batch_size} is larger than the data ({size} examples)", hint=f"at most {size}"
            )
        sample_rate = batch_size / size
        _log.warning(
            "sample_rate=%.6g from the number of examples (%d), which thereby becomes public; "
            "give sample_rate to keep it private",
            sample_rate,
            size,
        )
    return PublicNumbers(
        sample_rate=sample_rate,
        expected_batch_size=batch_size,
        epochs=epochs,
        dataset_size=round(batch_size / sample_rate) if sample_rate > 0 else 0,
    )
