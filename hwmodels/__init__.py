"""Hardware profiles, workloads and the cost model: what a layer schedule takes in time, energy and memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwmodels.cost import Estimate as Estimate
    from hwmodels.cost import estimate as estimate
    from hwmodels.planner import PrecisionPlan as PrecisionPlan
    from hwmodels.profile import HardwareProfile as HardwareProfile
    from hwmodels.profile import list_profiles as list_profiles
    from hwmodels.profile import load_profile as load_profile
    from hwmodels.workload import LayerWork as LayerWork
    from hwmodels.workload import Workload as Workload
    from hwmodels.workload import trace as trace

# Names load on first use: reading a profile must not wait for torch.
_HOME = {
    "Estimate": "cost",
    "HardwareProfile": "profile",
    "LayerWork": "workload",
    "PrecisionPlan": "planner",
    "Workload": "workload",
    "estimate": "cost",
    "list_profiles": "profile",
    "load_profile": "profile",
    "trace": "workload",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hwmodels.{_HOME[name]}"), name)
