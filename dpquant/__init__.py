"""Differentially private training in low precision, scheduled by what an accelerator would gain."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpquant.engine import DPQuantEngine as DPQuantEngine
    from dpquant.privacy import PrivacyEvent as PrivacyEvent
    from dpquant.privacy import PrivacyLedger as PrivacyLedger
    from dpquant.rundir import EpochRecord as EpochRecord

__version__ = "0.1.0"

# Names load on first use: `dpquant --help` must not wait for torch.
_HOME = {"DPQuantEngine": "engine", "PrivacyEvent": "privacy", "PrivacyLedger": "privacy", "EpochRecord": "rundir"}
__all__ = ["DPQuantEngine", "EpochRecord", "PrivacyEvent", "PrivacyLedger", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpquant.{_HOME[name]}"), name)
