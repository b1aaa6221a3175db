"""What a run's schedule is to reach, and how it draws the layers of an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpquant import schedule
from dpquant.modelled import ModelledRun
from emulation.errors import InputError, suggestion
from hwmodels import planner

_ROUNDING = 1e-9  # more than it moves sums of seconds by


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A scheduler, and one of a target speedup, a share of the layers, and named layers.

    Attributes:
        scheduler: one of ``schedule.SCHEDULERS``.
        target_speedup: modelled speedup of the whole run.
        fraction: share of the quantizable layers, on average over the run's epochs.
        layers: their names, for ``static``.
        beta: how strongly ``dpquant`` prefers insensitive layers.

    Raises:
        InputError: a value out of range, or not one goal.
    """

    scheduler: str
    target_speedup: float | None = None
    fraction: float | None = None
    layers: tuple[str, ...] | None = None
    beta: float = 200.0

    def __post_init__(self) -> None:
        scheduler, target, fraction = self.scheduler, self.target_speedup, self.fraction
        if scheduler not in schedule.SCHEDULERS:
            raise InputError(f"unknown scheduler={scheduler!r}", hint=suggestion(scheduler, schedule.SCHEDULERS))
        if scheduler != "full" and sum(goal is not None for goal in (target, fraction, self.layers)) != 1:
            hint = "target_speedup=1.5, or fraction=0.9"
            raise InputError("give one of target_speedup, fraction and layers", hint=hint)
        if self.layers is not None and scheduler not in ("full", "static"):
            raise InputError(f"layers is for scheduler='static', and scheduler={scheduler!r} draws its own")
        if target is not None and not (math.isfinite(target) and target >= 1):
            raise InputError(f"target_speedup={target} must be at least 1")
        if fraction is not None and not 0 <= fraction <= 1:
            raise InputError(f"fraction={fraction} must be between 0 and 1")

    def check(self, modelled: ModelledRun, reach: planner.Reach) -> None:
        """Refuses layers that cannot be quantized, and a target that no plan can meet.

        Raises:
            InputError: with the nearest layer, or what can be reached.
        """
        for name in self.layers or ():
            if name not in modelled.workload.quantizable:
                hint = suggestion(name, modelled.workload.quantizable)
                raise InputError(f"layers={name!r} is no layer that can be quantized", hint=hint)
        target = self.target_speedup
        if target is not None and self.scheduler != "full" and target > reach.max_speedup:
            most = math.floor(100 * reach.max_speedup) / 100  # rounded up it could not be reached
            raise InputError(
                f"target speedup {target}x is out of reach on {modelled.profile.name} with "
                f"{'+'.join(modelled.formats)}: at most {most:.2f}x",
                hint=f"lower the target, or compare chips and formats with `dpquant estimate` ({modelled.basis} basis)",
            )

    def plan(
        self,
        modelled: ModelledRun,
        sensitivities: Mapping[str, float] | None,
        *,
        epoch: int,
        seed: int,
        steps: int,
        steps_done: int,
        seconds_done: float,
    ) -> planner.PrecisionPlan:
        """The layers of one epoch: post-processing of released sensitivities.

        Args:
            modelled: the run on its chip.
            sensitivities: by the names of its policies; None: nothing was released.
            epoch: from 0.
            seed: of the run's schedule.
            steps: taken when the epoch ends.
            steps_done: taken when it starts.
            seconds_done: modelled seconds of those, analyses not included.
        """
        if self.layers is not None and self.scheduler == "static":
            return planner.PrecisionPlan(formats=dict.fromkeys(self.layers, modelled.formats[0]))
        order: Sequence[str] = schedule.draw_order(
            self.scheduler,  # type: ignore[arg-type]
            tuple(modelled.policies),
            sensitivities=sensitivities,
            beta=self.beta,
            savings=modelled.savings,
            epoch=epoch,
            seed=seed,
        )
        if self.target_speedup is None:
            return modelled.fraction(order, self._share(modelled, steps, steps_done))
        target = self.target_speedup
        if self.scheduler in ("annealed", "cooldown", "delayed"):
            # as if the epochs that come after were over, all of them in full precision, or all of them quantized
            after = modelled.steps - steps
            others = modelled.reach().plan if self.scheduler == "delayed" else {}
            seconds_done += after * modelled.estimate(others).step_s
            steps, steps_done = modelled.steps, steps_done + after
            if self.scheduler == "cooldown":
                order = self._worth_it(modelled, order)
            target *= 1 - _ROUNDING
        return modelled.meet(order, target, steps=steps, steps_done=steps_done, seconds_done=seconds_done)

    def _worth_it(self, modelled: ModelledRun, order: Sequence[str]) -> Sequence[str]:
        """The policies that ``cooldown`` takes: of those that are worth it the fewest that leave its longest end.

        All of them where they leave a shorter one, and the next too where it would be shorter than its shortest.
        """
        saved = modelled.savings
        least = schedule.WORTH * max(saved.values(), default=0.0)
        least *= 1 - _ROUNDING  # sizes are round numbers, and some save just this share
        worth = sum(saving >= least for saving in saved.values())

        def leaves(count: int, share: float) -> bool:
            """Whether the target is met by so many policies, and none in this share of the steps."""
            left = 1 / (self.target_speedup or 1.0) - share  # of full precision's time, for the steps before
            return modelled.speedup(modelled.fraction(order[:count], 1.0).formats) * left >= 1 - share

        few = (n for n in range(1, worth) if leaves(n, schedule.LONGEST_COOLDOWN))
        many = (n for n in range(worth, len(order)) if leaves(n, schedule.SHORTEST_COOLDOWN))
        return order[: next(few, next(many, len(order)))]

    def _share(self, modelled: ModelledRun, steps: int, steps_done: int) -> float:
        """The share of the layers that this epoch quantizes; over the run as many as a fixed choice has."""
        layers = len(modelled.workload.quantizable)
        share = round((self.fraction or 0.0) * layers) / max(layers, 1)
        return schedule.share_of_epoch(
            self.scheduler,  # type: ignore[arg-type]
            share,
            layers=layers,
            steps=steps,
            steps_done=steps_done,
            run_steps=modelled.steps,
        )
