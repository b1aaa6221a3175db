"""What the hardware model says of a run: its steps, its analyses, and which layers meet a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpquant.sensitivity import AnalysisSettings
from hwmodels import cost, planner
from hwmodels.profile import Basis, HardwareProfile
from hwmodels.workload import Workload


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelledRun:
    """A planned run on a chip.

    Attributes:
        workload: of one step at its expected batch size.
        profile: the chip.
        format: number format or preset of the quantized layers.
        basis: ``peak`` or ``calibrated``.
        clipping: how per-example gradients are clipped.
        analysis: settings of the sensitivity analyses.
        analyses: how many are planned.
        expected_batch_size: of a training step.
        steps: how many are planned.
    """

    workload: Workload
    profile: HardwareProfile
    format: str
    basis: Basis
    clipping: str
    analysis: AnalysisSettings
    analyses: int
    expected_batch_size: int
    steps: int

    @property
    def _options(self) -> dict[str, Any]:
        return {"method": "dp-sgd", "clipping": self.clipping}

    def estimate(self, plan: Mapping[str, str], basis: Basis | None = None) -> cost.Estimate:
        """Modelled time, energy and memory of one step under ``plan``, analyses not included."""
        return cost.estimate(self.workload, plan, self.profile, basis=basis or self.basis, **self._options)

    def analysis_s_per_step(self, basis: Basis | None = None) -> float:
        """Modelled seconds of the planned analyses, spread over all steps."""
        if not self.analyses:
            return 0.0
        basis = basis or self.basis
        policies, expected = len(self.workload.quantizable), self.analysis.expected_batch_size
        seconds = planner.analysis_seconds(self.workload, self.profile, policies, expected, basis=basis)
        if self.analysis.probe == "training":
            share = expected / self.expected_batch_size
            seconds += (policies + 1) * self.analysis.probe_steps * share * self.estimate({}, basis).step_s
        return seconds * self.analyses / self.steps

    def speedup(self, plan: Mapping[str, str], basis: Basis | None = None) -> float:
        """Modelled speedup of ``plan`` over full precision, the analyses' time spread over all steps."""
        planned_s = self.estimate(plan, basis).step_s + self.analysis_s_per_step(basis)
        return self.estimate({}, basis).step_s / planned_s

    def reach(self, basis: Basis | None = None) -> planner.Reach:
        """The most that quantizing any set of layers can reach."""
        seconds, basis = self.analysis_s_per_step(basis), basis or self.basis
        return planner.reach(
            self.workload, self.profile, self.format, analysis_s_per_step=seconds, basis=basis, **self._options
        )

    def fill(self, order: Sequence[str], target_speedup: float) -> planner.PrecisionPlan:
        """Layers in the given order until the modelled epoch meets the target."""
        return planner.fill(
            self.workload,
            self.profile,
            order,
            self.format,
            target_speedup,
            analysis_s_per_step=self.analysis_s_per_step(),
            basis=self.basis,
            **self._options,
        )
