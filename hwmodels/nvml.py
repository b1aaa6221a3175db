"""A GPU's energy counter and power limit, through NVIDIA's management library where the driver brings it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from emulation.errors import InputError

LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True, kw_only=True)
class PowerMeter:
    """One board, found by its UUID; the counter ticks about every 100 ms, so that windows have to last a second."""

    library: Any
    handle: Any

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        value = ctypes.c_ulonglong()
        _call(self.library, "nvmlDeviceGetTotalEnergyConsumption", self.handle, ctypes.byref(value))
        return value.value / 1e3

    def limit_w(self) -> float:
        """The limit that the driver enforces."""
        value = ctypes.c_uint()
        _call(self.library, "nvmlDeviceGetEnforcedPowerLimit", self.handle, ctypes.byref(value))
        return value.value / 1e3


def power_meter(uuid: str, library: Any = None) -> PowerMeter:
    """The meter of the board with this UUID (``GPU-...`` as ``nvidia-smi -L`` prints it).

    Raises:
        InputError: no library, no such board, or a board without an energy counter.
    """
    if library is None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise InputError(f"{LIBRARY} is not there", hint="energy is measured on NVIDIA boards only") from None
    _call(library, "nvmlInit_v2")
    handle = ctypes.c_void_p()
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    _call(library, "nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(handle))
    meter = PowerMeter(library=library, handle=handle)
    meter.joules()
    return meter


def _call(library: Any, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        raise InputError(
            f"{function} failed with code {code}", hint="the board has no such counter, or none is allowed"
        )
