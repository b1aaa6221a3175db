"""A run's ledger while it trains, stops and goes on: every release is on record before its noise exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from dpquant.clipping import PrivateOptimizer
from dpquant.distributed import Processes
from dpquant.privacy import PrivacyEvent, PrivacyLedger
from emulation.errors import InputError

BLOCK = 16  # releases that one write may put on record


class Spending:
    """What a run has spent, and what its record on disk holds beyond that.

    Attributes:
        ledger: everything spent so far, in order.
    """

    def __init__(self) -> None:
        self.ledger = PrivacyLedger()
        self._append: Callable[[PrivacyEvent], object] = lambda event: None
        self._ahead: dict[str, int] = {}

    def spend(self, event: PrivacyEvent, upcoming: int = 1) -> None:
        """Puts ``event`` into the ledger, before any of its noise exists.

        Args:
            event: one release.
            upcoming: how many such releases come next, this one included. Some of them go on record at once, for a
                synced write takes milliseconds: a run that stops between is recorded to have spent that many more.
        """
        if not self._ahead.get(event.mechanism):
            block = max(1, min(upcoming, BLOCK))
            self._append(replace(event, steps=block * event.steps))
            self._ahead[event.mechanism] = block
        self._ahead[event.mechanism] -= 1
        self.ledger = self.ledger.record(event)

    def write_ahead(
        self, written: PrivacyLedger, append: Callable[[PrivacyEvent], object], *, repeats_to_the_bit: bool
    ) -> None:
        """Has every event from here on recorded by ``append`` first.

        Args:
            written: what the record holds already; where it is ahead, a run was stopped between.
            append: puts an event on record.
            repeats_to_the_bit: whether what was recorded and will be repeated releases the same bits again, and so
                counts once; otherwise all that is written counts, and what is repeated counts again.

        Raises:
            InputError: the record holds less than was spent.
        """
        self._append = append
        if not repeats_to_the_bit:
            self.ledger = written
            return
        ahead = {m: written.steps(m) - self.ledger.steps(m) for m in ("training", "analysis")}
        if min(ahead.values()) < 0:
            raise InputError(
                "the ledger holds less than the checkpoint says was spent", hint="do they belong together?"
            )
        self._ahead = ahead


class AccountedOptimizer(PrivateOptimizer):
    """The clipping optimizer that tells its engine of a step before the step's noise is drawn.

    On several processes the noise is part of what the first one gives to the sum: it exists once, and not before the
    step is in the ledger.
    """

    before_noise: Callable[[], torch.Generator]
    processes: Processes
    noise_multiplier: float

    def add_noise(self) -> None:
        """Records the step, then draws its noise, then adds up what the processes have."""
        self.generator = self.before_noise()
        multiplier = self.noise_multiplier
        try:
            if not self.processes.first:
                self.noise_multiplier = 0.0
            super().add_noise()
        finally:
            self.noise_multiplier = multiplier
        for p, total in zip(self.params, self.processes.sum([p.grad for p in self.params]), strict=True):
            p.grad = total


def arithmetic(module: nn.Module, processes: int) -> str | None:
    """What a step's bits depend on beside its data; None where they differ from run to run."""
    if next(module.parameters()).device.type != "cpu" or any(map(_draws, module.modules())):
        return None
    threads, width = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {width}, {threads} threads, {processes} processes"


def _draws(module: nn.Module) -> bool:
    """Whether a forward takes random numbers from torch's global generator, which no checkpoint holds."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RReLU) or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
