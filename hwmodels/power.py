"""What a board draws while it multiplies matrices: what the work asks for, up to its limit."""

from __future__ import annotations

from dataclasses import replace

from emulation.errors import InputError
from hwmodels.calibration import KERNELS, KernelCalibration, KernelPower, PowerCalibration
from hwmodels.gemm import GemmRates, gemm_rates, kernel_of
from hwmodels.profile import HardwareProfile


def moved_bytes(m: int, n: int, k: int, kernel: KernelCalibration, rates: GemmRates, *, quantize: bool = True) -> float:
    """Bytes between chip and memory of a product [m, k] x [k, n], its activation's quantization included or not."""
    passes = kernel.quantize if quantize else None
    per_activation = rates.operand_bytes
    if passes is not None:  # bfloat16 read and codes written, and read once more where the largest value comes first
        per_activation += 2.0 + rates.operand_bytes + (2.0 if passes.amax_bandwidth_efficiency is not None else 0.0)
    return per_activation * m * k + rates.operand_bytes * k * n + rates.output_bytes * m * n


def kernel_power(kernel: str, power: PowerCalibration, profile: HardwareProfile) -> KernelPower:
    """What a kernel asks for: as fitted, else as bfloat16, an operation in inverse proportion to the peak rates.

    The measured formats are roughly in that proportion.

    Raises:
        InputError: neither was fitted, or the chip has no rate for one of the formats.
    """
    if kernel in power.kernels:
        return power.kernels[kernel]
    if "bfloat16" not in power.kernels:
        raise InputError(f"kernel={kernel!r} has no fitted energy", hint="fitted: " + ", ".join(power.kernels))
    found = power.kernels["bfloat16"]
    ratio = profile.rate("bfloat16").peak_flops_per_s / profile.rate(KERNELS[kernel]).peak_flops_per_s
    return replace(found, joules_per_flop=found.joules_per_flop * ratio)


def board_power(
    m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile, *, quantize: bool = True
) -> float:
    """Board watts during products [m, k] x [k, n] that take ``seconds`` each, back to back, quantization in it or not.

    Raises:
        InputError: the profile has no fitted power.
    """
    asked, cap, _ = _asked(m, n, k, seconds, kernel, profile, quantize)
    return min(asked, cap)


def board_joules(
    m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile, *, quantize: bool = True
) -> float:
    """Board energy of one of many products [m, k] x [k, n], back to back, that take ``seconds`` each while cool.

    Where they ask for more power than the limit, the clocks fall and each lasts longer.

    Raises:
        InputError: the profile has no fitted power.
    """
    asked, cap, throttle = _asked(m, n, k, seconds, kernel, profile, quantize)
    return min(asked, cap) * seconds * float(max(asked / cap, 1.0) ** throttle)


def _asked(
    m: int, n: int, k: int, seconds: float, kernel: str, profile: HardwareProfile, quantize: bool
) -> tuple[float, float, float]:
    """Watts asked for, most watts drawn, and the exponent of throttling."""
    calibration = profile.calibration
    if calibration is None or calibration.power is None or profile.power is None:
        raise InputError(f"{profile.name} has no fitted power")
    power, rate = calibration.power, profile.rate(KERNELS[kernel])
    constants = calibration.kernels.get(kernel) or calibration.kernels[kernel_of(rate, calibration)]
    moved = moved_bytes(m, n, k, constants, gemm_rates(rate, profile), quantize=quantize)
    one = kernel_power(kernel, power, profile)
    dynamic_j = one.joules_per_flop * 2.0 * m * n * k + one.joules_per_byte * moved
    dynamic_j += one.active_w * max(seconds - constants.fixed_s, 0.0)
    asked = power.idle_w + dynamic_j / seconds
    return asked, power.saturation * profile.power.limit_w, power.throttle
