"""Board power: the sum by hand, the cap, and what was not measured refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import PASSES, POWER
from test_gemm import KERNEL, RATES

from emulation.errors import InputError
from hwmodels.power import board_power, capped_power, joules_per_flop, moved_bytes
from hwmodels.profile import load_profile


def test_by_hand() -> None:
    assert capped_power(0.76, 1e-2, 700.0, POWER) == pytest.approx(130 + 76)
    assert capped_power(0.76, 1e-3, 700.0, POWER) == pytest.approx(0.97 * 700)
    profile = load_profile("h200")
    assert profile.calibration is not None
    fitted = profile.calibration.power
    assert fitted is not None
    # 4096 x 4096 x 4096 in a second: idle power and little more
    dynamic = fitted.joules_per_flop["bfloat16"] * 2 * 4096**3 + fitted.joules_per_byte * 3 * 2 * 4096**2
    assert board_power(4096, 4096, 4096, 1.0, "bfloat16", profile) == pytest.approx(fitted.idle_w + dynamic)


@given(st.floats(0, 1e6), st.floats(1e-7, 1e3))
def test_between_idle_and_limit(dynamic: float, seconds: float) -> None:
    watts = capped_power(dynamic, seconds, 700.0, POWER)
    assert POWER.idle_w <= watts <= 0.97 * 700
    assert capped_power(dynamic, 2 * seconds, 700.0, POWER) <= watts


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
    assert joules_per_flop("nvfp4", POWER, profile) == 1.5e-13
    assert joules_per_flop("fp8_block", POWER, profile) == pytest.approx(7e-13 / 2)
    with pytest.raises(InputError, match="'fp8' has no fitted energy") as caught:
        joules_per_flop("fp8", replace(POWER, joules_per_flop={"nvfp4": 1e-13}), profile)
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
