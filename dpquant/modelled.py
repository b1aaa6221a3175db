"""What the hardware model says of a run: its steps, its analyses, and which layers meet its target."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpquant.sensitivity import AnalysisSettings, layer_policies
from emulation.errors import InputError, suggestion
from emulation.formats import get_format
from hwmodels import cost, ladder, planner
from hwmodels.profile import Basis, HardwareProfile
from hwmodels.step import StepOptions
from hwmodels.workload import Workload

ACCUMULATIONS = ("float32", "hardware")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelledRun:
    """A planned run on a chip.

    Attributes:
        workload: of one step at its expected batch size.
        profile: the chip.
        formats: number formats or presets that layers may be quantized to, one each.
        basis: ``peak`` or ``calibrated``.
        clipping: how per-example gradients are clipped.
        analysis: settings of the sensitivity analyses.
        analyses: how many are planned.
        expected_batch_size: of a training step.
        steps: how many are planned.
    """

    workload: Workload
    profile: HardwareProfile
    formats: Sequence[str]
    basis: Basis
    clipping: str
    analysis: AnalysisSettings
    analyses: int
    expected_batch_size: int
    steps: int

    @cached_property
    def policies(self) -> dict[str, Mapping[str, str]]:
        """What is drawn and analysed: every layer alone in every format, but for the one that it has anyway."""
        baseline = get_format(StepOptions().baseline)
        rungs = [fmt for fmt in self.formats if get_format(fmt) != baseline] or list(self.formats)
        return layer_policies(self.workload.quantizable, rungs)

    @cached_property
    def savings(self) -> dict[str, float]:
        """Modelled seconds that each policy by itself saves of a step."""
        full_s = self.estimate({}).step_s
        return {name: full_s - self.estimate(policy).step_s for name, policy in self.policies.items()}

    @property
    def _options(self) -> dict[str, Any]:
        return {"method": "dp-sgd", "clipping": self.clipping}

    def estimate(self, plan: Mapping[str, str], basis: Basis | None = None) -> cost.Estimate:
        """Modelled time, energy and memory of one step under ``plan``, analyses not included."""
        return cost.estimate(self.workload, plan, self.profile, basis=basis or self.basis, **self._options)

    def analysis_s(self, basis: Basis | None = None) -> float:
        """Modelled seconds of one sensitivity analysis."""
        basis = basis or self.basis
        policies, expected = list(self.policies.values()), self.analysis.expected_batch_size
        seconds = planner.analysis_seconds(self.workload, self.profile, policies, expected, basis=basis)
        if self.analysis.probe == "training":
            share = expected / self.expected_batch_size
            seconds += (len(policies) + 1) * self.analysis.probe_steps * share * self.estimate({}, basis).step_s
        return seconds

    def analysis_s_per_step(self, basis: Basis | None = None) -> float:
        """Modelled seconds of the planned analyses, spread over all steps."""
        return self.analysis_s(basis) * self.analyses / self.steps if self.analyses else 0.0

    def speedup(self, plan: Mapping[str, str], basis: Basis | None = None) -> float:
        """Modelled speedup of ``plan`` over full precision, the analyses' time spread over all steps."""
        planned_s = self.estimate(plan, basis).step_s + self.analysis_s_per_step(basis)
        return self.estimate({}, basis).step_s / planned_s

    def reach(self, basis: Basis | None = None) -> planner.Reach:
        """The most that quantizing any set of layers can reach."""
        seconds, basis = self.analysis_s_per_step(basis), basis or self.basis
        return planner.reach(
            self.workload, self.profile, self.formats, analysis_s_per_step=seconds, basis=basis, **self._options
        )

    def fraction(self, order: Sequence[str], fraction: float) -> planner.PrecisionPlan:
        """The first ``fraction`` of the layers by count, each in the format that it was first drawn with."""
        first: dict[str, str] = {}
        for layer, fmt in self._choices(order):
            first.setdefault(layer, fmt)
        count = round(fraction * len(self.workload.quantizable))
        return planner.PrecisionPlan(formats=dict(list(first.items())[:count]))

    def meet(
        self, order: Sequence[str], target_speedup: float, *, steps: int, steps_done: int, seconds_done: float
    ) -> planner.PrecisionPlan:
        """The plan of an epoch at whose end all steps so far meet the target speedup.

        Layers are of finite size, so an epoch does more than the target, by up to what its last layer saves; the next
        ones do less by as much. A run of few epochs ends above its target by what the last one did more.

        Args:
            order: names of policies, as they were drawn.
            target_speedup: over full precision, the analyses' time spread over all steps.
            steps: taken when the epoch ends.
            steps_done: taken when it starts.
            seconds_done: modelled seconds of those, analyses not included.
        """
        analysis_s = self.analysis_s_per_step()
        seconds_done += analysis_s * steps_done
        target = planner.remaining_target(target_speedup, self.estimate({}).step_s, steps, steps_done, seconds_done)
        return ladder.climb(
            self.workload,
            self.profile,
            self._choices(order),
            min(target, sys.float_info.max),
            analysis_s_per_step=analysis_s,
            basis=self.basis,
            **self._options,
        )

    def _choices(self, order: Sequence[str]) -> list[tuple[str, str]]:
        return [choice for name in order for choice in self.policies[name].items()]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of the schedule: what is quantized in it, and what the hardware model says of that.

    Attributes:
        index: from 0.
        plan: layer name -> number format; the layers that are not in it run in full precision.
        estimate: modelled time, energy and memory of one step under the plan, analyses not included.
        speedup: modelled speedup over full precision, the analyses' time included.
        sensitivities: layer name (with several formats ``layer:format``) -> loss impact that the draw used: smoothed
            and private, or from released gradients and relative to the largest; None where none was released.
        analysed: whether a sensitivity analysis ran at the start of this epoch.
        analysis_wall_s: how long that took on this machine.
    """

    index: int
    plan: planner.PrecisionPlan
    estimate: cost.Estimate
    speedup: float
    sensitivities: Mapping[str, float] | None
    analysed: bool
    analysis_wall_s: float = 0.0


def adding_unit(profile: HardwareProfile, accumulate: str) -> str:
    """Name of the matrix unit that quantized GEMMs add as: ``float32``, or with ``hardware`` the chip's own.

    Raises:
        InputError: ``accumulate`` is neither, or how the chip adds is not known.
    """
    if accumulate not in ACCUMULATIONS:
        raise InputError(f"unknown accumulate={accumulate!r}", hint=suggestion(accumulate, ACCUMULATIONS))
    if accumulate == "hardware" and profile.matrix_unit is None:
        raise InputError(
            f"accumulate='hardware': how {profile.name} adds is not publicly described",
            hint="use accumulate='float32'",
        )
    return profile.matrix_unit or "float32" if accumulate == "hardware" else "float32"
