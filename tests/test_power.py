"""Board power: the sum by hand, the cap, and what was not measured refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import PASSES, POWER
from test_gemm import KERNEL, RATES

from emulation.errors import InputError
from hwmodels.power import board_joules, board_power, kernel_power, moved_bytes
from hwmodels.profile import HardwareProfile, load_profile


def test_by_hand() -> None:
    profile = chip()
    # 4096 x 4096 x 4096 in a second: idle power, that of a running kernel, and little more
    dynamic = 7e-13 * 2 * 4096**3 + 6e-11 * 3 * 2 * 4096**2
    assert board_power(4096, 4096, 4096, 1.0, "bfloat16", profile) == pytest.approx(130 + 20 + dynamic)
    assert board_power(1, 1, 1, 1e-9, "bfloat16", profile) == pytest.approx(130, abs=1)  # all launch
    assert board_joules(4096, 4096, 4096, 1.0, "bfloat16", profile) == pytest.approx(150 + dynamic)
    # in 100 us it would ask for more than the limit
    asked = 150 + dynamic / 1e-4
    assert asked > 0.97 * 700
    assert board_power(4096, 4096, 4096, 1e-4, "bfloat16", profile) == pytest.approx(0.97 * 700)
    expected = 0.97 * 700 * 1e-4 * (asked / (0.97 * 700)) ** 0.5
    assert board_joules(4096, 4096, 4096, 1e-4, "bfloat16", profile) == pytest.approx(expected, rel=1e-2)


def chip() -> HardwareProfile:
    profile = load_profile("h200")
    assert profile.calibration is not None
    return replace(profile, calibration=replace(profile.calibration, power=POWER))


@given(st.integers(64, 8192), st.floats(1e-5, 1e-1))
def test_between_idle_and_limit(size: int, seconds: float) -> None:
    profile = chip()
    watts = board_power(size, size, size, seconds, "bfloat16", profile)
    assert POWER.idle_w <= watts <= 0.97 * 700
    assert board_power(size, size, size, 2 * seconds, "bfloat16", profile) <= watts + 20
    joules = board_joules(size, size, size, seconds, "bfloat16", profile)
    assert joules >= watts * seconds * (1 - 1e-9)
    assert joules == pytest.approx(watts * seconds) or watts == pytest.approx(0.97 * 700)


def test_quantization_moves_bytes_too() -> None:
    rates = replace(RATES, operand_bytes=1.0)
    assert moved_bytes(10, 20, 30, KERNEL, rates) == 10 * 30 + 30 * 20 + 2 * 10 * 20
    two = replace(KERNEL, quantize=PASSES)
    assert moved_bytes(10, 20, 30, two, rates) == 10 * 30 * (1 + 2 + 3) + 30 * 20 + 2 * 10 * 20
    assert moved_bytes(10, 20, 30, two, rates, quantize=False) == moved_bytes(10, 20, 30, KERNEL, rates)
    one = replace(KERNEL, quantize=replace(PASSES, amax_s=0.0, amax_bandwidth_efficiency=None))
    assert moved_bytes(10, 20, 30, one, rates) == 10 * 30 * (1 + 3) + 30 * 20 + 2 * 10 * 20


def test_a_kernel_without_measured_power_takes_bfloat16s_in_proportion_to_the_rates() -> None:
    profile = load_profile("b200")
    assert kernel_power("nvfp4", POWER, profile) == POWER.kernels["nvfp4"]
    found = kernel_power("fp8_block", POWER, profile)
    assert found == replace(POWER.kernels["bfloat16"], joules_per_flop=pytest.approx(7e-13 / 2))
    with pytest.raises(InputError, match="'fp8' has no fitted energy") as caught:
        kernel_power("fp8", replace(POWER, kernels={"nvfp4": POWER.kernels["nvfp4"]}), profile)
    assert "nvfp4" in str(caught.value.hint)


def test_a_chip_without_measured_power_is_refused() -> None:
    with pytest.raises(InputError, match="no fitted power"):
        board_power(64, 64, 64, 1e-5, "bfloat16", load_profile("a100"))


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "gb200", "b300", "gb300"])
def test_shipped_boards_run_at_their_limit_on_large_products_and_below_on_small_ones(name: str) -> None:
    profile = load_profile(name)
    assert profile.power is not None
    seconds = profile.gemm_seconds(8192, 8192, 8192, "bfloat16")
    large = board_power(8192, 8192, 8192, seconds, "bfloat16", profile)
    assert 0.7 * profile.power.limit_w < large <= profile.power.limit_w
    small = board_power(64, 64, 64, profile.gemm_seconds(64, 64, 64, "bfloat16"), "bfloat16", profile)
    assert small < 0.5 * profile.power.limit_w
