"""What a board draws while it multiplies matrices: what the work asks for, up to its limit."""

from __future__ import annotations

from emulation.errors import InputError
from hwmodels.calibration import KERNELS, KernelCalibration, PowerCalibration
from hwmodels.gemm import GemmRates, gemm_rates
from hwmodels.profile import HardwareProfile


def moved_bytes(m: int, n: int, k: int, kernel: KernelCalibration, rates: GemmRates) -> float:
    """Bytes between chip and memory of a product [m, k] x [k, n], its activation's quantization included."""
    passes = kernel.quantize
    per_activation = rates.operand_bytes
    if passes is not None:  # bfloat16 read and codes written, and read once more where the largest value comes first
        per_activation += 2.0 + rates.operand_bytes + (2.0 if passes.amax_bandwidth_efficiency is not None else 0.0)
    return per_activation * m * k + rates.operand_bytes * k * n + rates.output_bytes * m * n


def capped_power(
    flops: float, moved: float, seconds: float, kernel: str, limit_w: float, power: PowerCalibration
) -> float:
    """Watts of a board during work: ``min(limit, idle + energy of its operations and bytes / seconds)``.

    Args:
        flops: operations (1 MAC = 2 FLOPs).
        moved: bytes between the chip and its memory.
        seconds: that the work takes.
        kernel: a key of ``KERNELS``.
        limit_w: of the board.
        power: fitted constants.

    Raises:
        InputError: no energy was fitted for the kernel.
    """
    if kernel not in power.joules_per_flop:
        raise InputError(f"kernel={kernel!r} has no fitted energy", hint="fitted: " + ", ".join(power.joules_per_flop))
    dynamic_j = power.joules_per_flop[kernel] * flops + power.joules_per_byte * moved
    return min(power.saturation * limit_w, power.idle_w + dynamic_j / seconds)


def board_power(m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile) -> float:
    """Board watts during products [m, k] x [k, n] that take ``seconds`` each, back to back.

    Raises:
        InputError: the profile has no fitted power, or none for this kernel.
    """
    calibration = profile.calibration
    if calibration is None or calibration.power is None or profile.power is None:
        raise InputError(f"{profile.name} has no fitted power")
    rates = gemm_rates(profile.rate(KERNELS[kernel]), profile)
    moved = moved_bytes(m, n, k, calibration.kernels[kernel], rates)
    return capped_power(2.0 * m * n * k, moved, seconds, kernel, profile.power.limit_w, calibration.power)
