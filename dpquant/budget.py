"""What a run plans to release, and how much of it its target epsilon affords."""

from __future__ import annotations

from dataclasses import dataclass

from dpquant import privacy
from dpquant.privacy import PrivacyEvent, PrivacyLedger
from dpquant.public_numbers import PublicNumbers
from dpquant.sensitivity import AnalysisSettings
from emulation.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The two releases of a run, its steps and its analyses, and what they may spend together.

    Attributes:
        numbers: sizes of the run.
        analysis: settings of the sensitivity analyses.
        noise_multiplier: of the training steps.
        target_epsilon: None where the noise was given, and nothing limits what is spent.
        target_delta: of the guarantee.
        accountant: ``prv`` or ``rdp``.
    """

    numbers: PublicNumbers
    analysis: AnalysisSettings
    noise_multiplier: float
    target_epsilon: float | None
    target_delta: float
    accountant: privacy.Accountant

    def training(self, steps: int) -> PrivacyEvent:
        """What ``steps`` training steps spend."""
        return PrivacyEvent(
            mechanism="training",
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.numbers.sample_rate,
            steps=steps,
        )

    def analyses(self, times: int) -> PrivacyEvent:
        """What ``times`` analyses spend."""
        return self.analysis.event(self.numbers.dataset_size, times)

    def ledger(self, analyses: int) -> PrivacyLedger:
        """What the whole run spends as it is planned."""
        training = self.training(self.numbers.steps)
        return PrivacyLedger(events=(training, self.analyses(analyses)) if analyses else (training,))

    def affordable(self, spent: PrivacyLedger, steps: int, analyses: int) -> int:
        """How many of ``steps`` further training steps the target affords, ``analyses`` further ones paid for first."""
        if self.target_epsilon is None or steps <= 0:
            return steps
        return privacy.steps_within(
            spent.record(self.analyses(analyses)) if analyses else spent,
            self.training(steps),
            target_epsilon=self.target_epsilon,
            target_delta=self.target_delta,
            accountant=self.accountant,
        )


def planned_budget(
    numbers: PublicNumbers,
    analysis: AnalysisSettings,
    analyses: int,
    *,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    target_delta: float,
    accountant: privacy.Accountant,
) -> Budget:
    """The budget of a run with as many analyses, its noise solved for with all of them composed in.

    Raises:
        InputError: the target cannot be reached, or not one of noise and target is given.
    """
    if (target_epsilon is None) == (noise_multiplier is None):
        raise InputError("give one of target_epsilon and noise_multiplier")
    privacy.check_delta("target_delta", target_delta)
    event = analysis.event(numbers.dataset_size, analyses) if analyses else None
    if noise_multiplier is None:
        assert target_epsilon is not None
        noise_multiplier = privacy.calibrate_noise(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=numbers.sample_rate,
            steps=numbers.steps,
            analyses=[event] if event else [],
            accountant=accountant,
        )
    return Budget(
        numbers=numbers,
        analysis=analysis,
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
    )
