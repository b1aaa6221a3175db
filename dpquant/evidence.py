"""What a run has released that tells of its layers' sensitivities: probes, and averages of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpquant import analysis as analyses
from dpquant.distributed import Processes
from dpquant.released import ReleasedMoments, observe
from dpquant.sensitivity import AnalysisSettings, smooth


class Evidence:
    """Released values of a run, from which its schedule estimates sensitivities.

    Args:
        settings: of the analyses.
        policies: what is probed: name to one layer and its format.
        module: the private module.
        noise_std: of each element of the released mean gradients.
        expected_batch_size: of the training steps.

    Attributes:
        probed: smoothed results of the probes, by policy; None where there was none.
        moments: of the released gradients; None where none are kept.
    """

    def __init__(
        self,
        settings: AnalysisSettings,
        policies: Mapping[str, Mapping[str, str]],
        module: nn.Module,
        *,
        noise_std: float,
        expected_batch_size: int,
    ) -> None:
        self._settings, self._policies, self._module = settings, policies, module
        self._noise_std, self._expected_batch_size = noise_std, expected_batch_size
        self.probed: dict[str, float] | None = None
        self.moments: ReleasedMoments | None = None

    def probe(
        self,
        losses: analyses.Losses,
        sample: Tensor,
        collate: Callable[[Tensor], Any],
        generator: torch.Generator,
        *,
        max_grad_norm: float,
        max_physical_batch_size: int | None,
        processes: Processes,
    ) -> None:
        """One private analysis of every policy, smoothed over the earlier ones; arguments as ``analysis.probe``'s."""
        released = analyses.probe(
            self._module,
            losses,
            sample,
            collate,
            list(self._policies.values()),
            self._settings,
            generator,
            max_grad_norm=max_grad_norm,
            max_physical_batch_size=max_physical_batch_size,
            processes=processes,
        )
        now = dict(zip(self._policies, released.tolist(), strict=True))
        self.probed = smooth(self.probed, now, self._settings.decay)

    def observe(self, optimizer: object = None) -> None:
        """Keeps averages of what a step has just released: an optimizer's step hook."""
        gradients = {n: p.grad for n, p in self._module.named_parameters() if p.grad is not None}
        self.moments = observe(self.moments, gradients)

    def sensitivities(self) -> dict[str, float] | None:
        """By policy, from what the settings' estimator uses; None while nothing is known yet."""
        return analyses.estimate(
            self._settings,
            self.probed,
            self.moments,
            self._module,
            self._policies,
            noise_std=self._noise_std,
            expected_batch_size=self._expected_batch_size,
        )

    def state(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {"sensitivities": self.probed, "moments": None if self.moments is None else vars(self.moments)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Sets it to what :meth:`state` gave."""
        self.probed = state["sensitivities"]
        moments = state.get("moments")
        self.moments = None if moments is None else ReleasedMoments(**moments)
