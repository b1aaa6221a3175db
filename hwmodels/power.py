"""What a board draws while it multiplies matrices: what the work asks for, up to its limit."""

from __future__ import annotations

from emulation.errors import InputError
from hwmodels.calibration import KERNELS, PowerCalibration
from hwmodels.gemm import gemm_rates
from hwmodels.profile import HardwareProfile


def capped_power(demand_w: float, limit_w: float, power: PowerCalibration) -> float:
    """Watts of a board whose work asks for ``demand_w``: ``min(demand, limit)`` with a rounded corner.

    The corner is rounded because clocks already fall before the averaged power reaches the limit.
    """
    limit = power.saturation * limit_w
    return demand_w / (1.0 + (demand_w / limit) ** power.sharpness) ** (1.0 / power.sharpness)


def demanded_power(flops: float, moved_bytes: float, seconds: float, kernel: str, power: PowerCalibration) -> float:
    """Watts that work asks for: ``idle + energy of its operations and bytes / seconds``, before the limit.

    Args:
        flops: operations (1 MAC = 2 FLOPs).
        moved_bytes: between the chip and its memory.
        seconds: that the work takes.
        kernel: a key of ``KERNELS``; one that was not measured takes the energy of bfloat16 operations in proportion
            to its bits' share, as published rates do.
        power: the chip's calibration.
    """
    per_flop = power.joules_per_flop.get(kernel)
    if per_flop is None:
        raise InputError(f"no power was measured for kernel={kernel!r}", hint=", ".join(power.joules_per_flop))
    return power.idle_w + (per_flop * flops + power.joules_per_byte * moved_bytes) / seconds


def board_power(m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile) -> float:
    """Board watts during a product [m, k] x [k, n] that takes ``seconds``.

    Raises:
        InputError: the profile has no fitted power, or none for this kernel.
    """
    calibration = profile.calibration
    if calibration is None or calibration.power is None or profile.power is None:
        raise InputError(f"{profile.name} has no fitted power")
    rates = gemm_rates(profile.rate(KERNELS[kernel]), profile)
    moved = rates.operand_bytes * k * (m + n) + rates.output_bytes * m * n
    demand = demanded_power(2.0 * m * n * k, moved, seconds, kernel, calibration.power)
    return capped_power(demand, profile.power.limit_w, calibration.power)
