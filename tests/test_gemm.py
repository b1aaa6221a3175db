"""The GEMM model: by hand where it is small, monotone, equal to its array form, sane on every shipped calibration."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.errors import InputError
from hwmodels.calibration import Correction, Fitted, KernelCalibration, QuantizeCalibration
from hwmodels.gemm import (
    GemmRates,
    band,
    extrapolated,
    gemm_rates,
    gemm_seconds,
    kernel_of,
    kernel_seconds,
    measured_kernel,
    quantize_seconds,
)
from hwmodels.gemm_arrays import Products, products_seconds
from hwmodels.profile import list_profiles, load_profile

FITTED = Fitted(
    source="made up", rows=1, held_out_mape_percent=1.0, held_out_median_percent=1.0, held_out_rank_correlation=1.0
)
RATES = GemmRates(
    peak_flops_per_s=1e12,
    reference_flops_per_s=1e12,
    bandwidth_bytes_per_s=1e11,
    cache_bytes=1e6,
    units=10,
    operand_bytes=2.0,
)
KERNEL = KernelCalibration(
    compute_efficiency=0.5,
    bandwidth_efficiency=0.8,
    cache_bytes_per_flop=10.0,
    resident=0.0,
    fixed_s=2e-6,
    wave_s=1e-7,
    wave_rounding=1.0,
    overlap=2.0,
    split_s=5e-4,
    tiles=((64, 64),),
    splits=(1,),
    quantize=None,
    correction=None,
    band=(-0.1, 0.2),
    range_m=(1, 4096),
    range_n=(32, 4096),
    range_k=(32, 4096),
    fitted=FITTED,
)
GRID = Correction(
    log2_m=(0.0, 5.0, 10.0),
    log2_n=(5.0, 10.0),
    log2_k=(5.0, 8.0, 12.0),
    values=tuple(float(v) / 100 for v in np.random.default_rng(0).integers(-30, 30, 18)),
)
RICH = replace(
    KERNEL,
    tiles=((64, 64), (128, 256), (16, 32)),
    splits=(1, 2, 8),
    resident=0.3,
    split_s=1e-6,
    wave_rounding=0.6,
    overlap=3.0,
    cache_bytes_per_flop=0.02,
    correction=GRID,
)

sizes = st.integers(1, 1 << 17)


def test_by_hand() -> None:
    # 4 x 2 tiles on 10 units: one wave of a tile of 2 * 64 * 64 * 1000 FLOPs at a tenth of half the peak
    tile_s = 2 * 64 * 64 * 1000 / (0.5e12 / 10) + 1e-7
    memory_s = 2.0 * (256 * 1000 + 1000 * 128 + 256 * 128) / 0.8e11
    assert kernel_seconds(256, 128, 1000, KERNEL, RATES) == pytest.approx(math.hypot(tile_s, memory_s) + 2e-6, rel=1e-6)


def test_a_part_filled_wave_costs_what_rounding_says() -> None:
    memoryless = replace(RATES, bandwidth_bytes_per_s=1e30)

    def waves(rounding: float, m: int) -> float:
        kernel = replace(KERNEL, wave_rounding=rounding)
        tile_s = 2 * 64 * 64 * 512 / (0.5e12 / 10) + 1e-7
        return (kernel_seconds(m, 64, 512, kernel, memoryless) - 2e-6) / tile_s

    assert waves(1.0, 64 * 11) == pytest.approx(2.0, rel=1e-6)
    assert waves(0.0, 64 * 11) == pytest.approx(1.1, rel=1e-6)
    assert waves(0.5, 64 * 15) == pytest.approx(1.75, rel=1e-6)
    assert waves(0.0, 64) == pytest.approx(1.0, rel=1e-6)  # one tile takes its time however many units idle


def test_the_fastest_tile_and_split_is_taken() -> None:
    small = replace(KERNEL, tiles=((16, 16),))
    both = replace(KERNEL, tiles=((64, 64), (16, 16)))
    for m in (1, 64, 5000):
        one, other = (kernel_seconds(m, 256, 512, kernel, RATES) for kernel in (KERNEL, small))
        assert kernel_seconds(m, 256, 512, both, RATES) == min(one, other)
    deep = replace(KERNEL, splits=(1, 8), split_s=1e-7)
    assert kernel_seconds(64, 64, 1 << 16, deep, RATES) < 0.3 * kernel_seconds(64, 64, 1 << 16, KERNEL, RATES)
    assert kernel_seconds(64, 64, 200, deep, RATES) == kernel_seconds(64, 64, 200, KERNEL, RATES)


def test_resident_operands_are_not_read_again() -> None:
    kept = replace(KERNEL, resident=1.0, overlap=8.0)
    nothing = replace(KERNEL, resident=0.0, overlap=8.0)
    assert kernel_seconds(1, 300, 300, kept, RATES) < kernel_seconds(1, 300, 300, nothing, RATES)
    large = kernel_seconds(1, 20000, 20000, nothing, RATES)
    assert kernel_seconds(1, 20000, 20000, kept, RATES) == pytest.approx(large, rel=1e-6)


@given(sizes, sizes, sizes, sizes)
def test_more_work_never_takes_less_time(m: int, n: int, k: int, more: int) -> None:
    physical = replace(RICH, correction=None)
    least = kernel_seconds(m, n, k, physical, RATES)
    assert kernel_seconds(m + more, n, k, physical, RATES) >= least * (1 - 1e-12)
    assert kernel_seconds(m, n + more, k, physical, RATES) >= least * (1 - 1e-12)
    whole = replace(physical, splits=(1,))
    longer = kernel_seconds(m, n, k + more, whole, RATES)
    assert longer >= kernel_seconds(m, n, k, whole, RATES) * (1 - 1e-12)
    assert least >= physical.fixed_s


@given(st.lists(st.tuples(sizes, sizes, sizes, st.integers(1, 64)), min_size=1, max_size=20))
@settings(max_examples=50)
def test_arrays_hold_the_same_formula(shapes: list[tuple[int, int, int, int]]) -> None:
    m, n, k, batch = np.array(shapes, dtype=float).T
    products = Products(
        m=m, n=n, k=k, batch=batch, operand_elements=batch * k * (m + n), result_bytes=2.0 * batch * m * n
    )
    for kernel in (KERNEL, RICH):
        expected = [kernel_seconds(*shape[:3], kernel, RATES, batch=shape[3]) for shape in shapes]
        np.testing.assert_allclose(products_seconds(products, kernel, RATES), expected, rtol=1e-11)


def test_a_batch_is_one_launch() -> None:
    single = kernel_seconds(64, 64, 64, RICH, RATES)
    assert single < kernel_seconds(64, 64, 64, RICH, RATES, batch=50) < 50 * single


def test_correction_is_exact_at_knots_linear_between_and_fades_outside() -> None:
    physical = replace(RICH, correction=None)

    def correction(m: int, n: int, k: int) -> float:
        return math.log(kernel_seconds(m, n, k, RICH, RATES) / kernel_seconds(m, n, k, physical, RATES))

    values = np.array(GRID.values).reshape(3, 2, 3)
    for i, log_m in enumerate(GRID.log2_m):
        for j, log_n in enumerate(GRID.log2_n):
            for h, log_k in enumerate(GRID.log2_k):
                there = correction(round(2**log_m), round(2**log_n), round(2**log_k))
                assert there == pytest.approx(values[i, j, h], abs=1e-9)
    assert correction(1, 32, 1 << 10) == pytest.approx((values[0, 0, 1] + values[0, 0, 2]) / 2, abs=1e-9)
    assert correction(1 << 12, 1 << 10, 1 << 12) == pytest.approx(values[2, 1, 2] / 2, abs=1e-9)
    assert correction(1 << 14, 1 << 10, 1 << 12) == pytest.approx(0.0, abs=1e-12)
    assert correction(1 << 20, 1 << 10, 1 << 12) == pytest.approx(0.0, abs=1e-12)


def test_quantization_passes() -> None:
    assert quantize_seconds(10**6, KERNEL, RATES) == 0.0
    one = QuantizeCalibration(amax_s=0.0, amax_bandwidth_efficiency=None, cast_s=3e-6, cast_bandwidth_efficiency=0.5)
    narrow = replace(RATES, operand_bytes=1.0)
    assert quantize_seconds(10**6, replace(KERNEL, quantize=one), narrow) == pytest.approx(3e-6 + 3e6 / 0.5e11)
    two = replace(one, amax_s=7e-6, amax_bandwidth_efficiency=0.25)
    expected = 10e-6 + 3e6 / 0.5e11 + 2e6 / 0.25e11
    assert quantize_seconds(10**6, replace(KERNEL, quantize=two), narrow) == pytest.approx(expected)


def test_band_and_range() -> None:
    low, high = band(1.0, KERNEL)
    assert (low, high) == (pytest.approx(math.exp(-0.1)), pytest.approx(math.exp(0.2)))
    assert not extrapolated(1, 32, 4096, KERNEL)
    assert not extrapolated(4096, 4096, 32, KERNEL)
    for shape in ((4097, 64, 64), (64, 31, 64), (64, 64, 31), (64, 4097, 64)):
        assert extrapolated(*shape, KERNEL)
    assert not extrapolated(64, 64, 64, KERNEL, batch=64)
    assert extrapolated(64, 64, 64, KERNEL, batch=65)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_sizes_below_one_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="below 1"):
        kernel_seconds(*shape, KERNEL, RATES)
    with pytest.raises(InputError, match="batch=0"):
        kernel_seconds(1, 1, 1, KERNEL, RATES, batch=0)


CALIBRATED = [name for name in list_profiles() if load_profile(name).calibration is not None]


def test_the_measured_chips_are_calibrated() -> None:
    assert {"a100", "l40s", "h100", "h200", "b200", "gb200", "b300", "gb300", "rtx_pro_6000"} <= set(CALIBRATED)


@pytest.mark.parametrize("name", CALIBRATED)
def test_shipped_calibrations_are_sane_far_beyond_what_was_measured(name: str) -> None:
    profile = load_profile(name)
    assert profile.calibration is not None
    for format_name, rate in profile.formats.items():
        kernel = profile.calibration.kernels[kernel_of(rate, profile.calibration)]
        rates = gemm_rates(rate, profile)
        for n, k in ((1, 1), (17, 3), (32, 65536), (1000, 1000), (4096, 4096), (1 << 20, 64), (1 << 17, 1 << 17)):
            times = [kernel_seconds(1 << power, n, k, kernel, rates) for power in range(0, 25, 2)]
            for less, more in pairwise(times):
                # four times the rows: never much less time; more than four times where they outgrow the cache
                assert 0.6 * less <= more <= 12 * less, (format_name, n, k, times)
            flops = 2.0 * (1 << 24) * n * k
            assert times[-1] >= 0.99 * flops / rates.peak_flops_per_s, (format_name, n, k)
        assert 5e-7 < kernel_seconds(1, 32, 32, kernel, rates) < 3e-5


@pytest.mark.parametrize("name", CALIBRATED)
def test_quantized_operands_cost_only_the_product(name: str) -> None:
    profile = load_profile(name)
    params = profile.calibration
    assert params is not None
    for rate in profile.formats.values():
        whole = gemm_seconds(512, 512, 512, params=params, rate=rate, profile=profile)
        product = gemm_seconds(512, 512, 512, params=params, rate=rate, profile=profile, quantize=False)
        passes = params.kernels[kernel_of(rate, params)].quantize
        assert (whole > product) == (passes is not None)
        assert whole == profile.gemm_seconds(512, 512, 512, rate.format)


def test_kernels_that_were_not_measured_are_borrowed_and_say_so() -> None:
    profile = load_profile("a100")
    assert profile.calibration is not None
    assert kernel_of(profile.rate("int8"), profile.calibration) == "bfloat16"
    assert not measured_kernel(profile.rate("int8"), profile.calibration)
    assert measured_kernel(profile.rate("float16"), profile.calibration)
    b200 = load_profile("b200")
    assert b200.calibration is not None
    kernels = {
        name: kernel_of(b200.rate(name), b200.calibration) for name in ("bf16", "fp8", "mxfp8", "nvfp4", "mxfp4")
    }
    assert kernels == {"bf16": "bfloat16", "fp8": "fp8", "mxfp8": "fp8_block", "nvfp4": "nvfp4", "mxfp4": "nvfp4"}
    assert measured_kernel(b200.rate("nvfp4"), b200.calibration)
    assert not measured_kernel(b200.rate("mxfp4"), b200.calibration)
