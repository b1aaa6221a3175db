"""What a board draws while it multiplies matrices: what the work asks for, up to its limit."""

from __future__ import annotations

from emulation.errors import InputError
from hwmodels.calibration import KERNELS, KernelCalibration, PowerCalibration
from hwmodels.gemm import GemmRates, gemm_rates, kernel_of
from hwmodels.profile import HardwareProfile


def moved_bytes(m: int, n: int, k: int, kernel: KernelCalibration, rates: GemmRates, *, quantize: bool = True) -> float:
    """Bytes between chip and memory of a product [m, k] x [k, n], its activation's quantization included or not."""
    passes = kernel.quantize if quantize else None
    per_activation = rates.operand_bytes
    if passes is not None:  # bfloat16 read and codes written, and read once more where the largest value comes first
        per_activation += 2.0 + rates.operand_bytes + (2.0 if passes.amax_bandwidth_efficiency is not None else 0.0)
    return per_activation * m * k + rates.operand_bytes * k * n + rates.output_bytes * m * n


def capped_power(dynamic_j: float, seconds: float, limit_w: float, power: PowerCalibration) -> float:
    """Watts of a board that spends ``dynamic_j`` on operations and bytes: ``min(limit, idle + dynamic)``."""
    return min(power.saturation * limit_w, power.idle_w + dynamic_j / seconds)


def joules_per_flop(kernel: str, power: PowerCalibration, profile: HardwareProfile) -> float:
    """Energy of an operation of a kernel: fitted, else bfloat16's in inverse proportion to the peak rates.

    The measured formats are roughly in that proportion.

    Raises:
        InputError: neither was fitted, or the chip has no rate for one of the formats.
    """
    if kernel in power.joules_per_flop:
        return power.joules_per_flop[kernel]
    if "bfloat16" not in power.joules_per_flop:
        raise InputError(f"kernel={kernel!r} has no fitted energy", hint="fitted: " + ", ".join(power.joules_per_flop))
    ratio = profile.rate("bfloat16").peak_flops_per_s / profile.rate(KERNELS[kernel]).peak_flops_per_s
    return power.joules_per_flop["bfloat16"] * ratio


def board_power(
    m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile, *, quantize: bool = True
) -> float:
    """Board watts during products [m, k] x [k, n] that take ``seconds`` each, back to back, quantization in it or not.

    Raises:
        InputError: the profile has no fitted power.
    """
    calibration = profile.calibration
    if calibration is None or calibration.power is None or profile.power is None:
        raise InputError(f"{profile.name} has no fitted power")
    rate = profile.rate(KERNELS[kernel])
    constants = calibration.kernels.get(kernel) or calibration.kernels[kernel_of(rate, calibration)]
    moved = moved_bytes(m, n, k, constants, gemm_rates(rate, profile), quantize=quantize)
    dynamic_j = joules_per_flop(kernel, calibration.power, profile) * 2.0 * m * n * k
    dynamic_j += calibration.power.joules_per_byte * moved
    return capped_power(dynamic_j, seconds, profile.power.limit_w, calibration.power)
