"""Fitting: what is known is recovered from noisy rows, halves share no shape, a correction removes what is smooth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_calibration import PASSES
from test_gemm import KERNEL, RATES

from emulation.errors import InputError
from hwmodels.calibration import KernelCalibration
from hwmodels.fit import (
    GemmRows,
    errors,
    fit_kernel,
    fit_quantize,
    fit_rows,
    gemm_rows,
    halves,
    predict,
)
from hwmodels.fit_power import PowerRows, fit_power
from hwmodels.gemm import kernel_seconds, quantize_seconds
from hwmodels.gemm_arrays import Array

CHIP = replace(
    RATES,
    peak_flops_per_s=9.9e14,
    reference_flops_per_s=9.9e14,
    bandwidth_bytes_per_s=3.35e12,
    cache_bytes=5e7,
    units=132,
)
TRUE = replace(
    KERNEL,
    compute_efficiency=0.8,
    cache_bytes_per_flop=0.04,
    resident=0.05,
    split_s=2e-6,
    wave_s=3e-7,
    overlap=3.0,
    wave_rounding=0.5,
    tiles=((64, 128),),
    splits=(1, 2, 4, 8, 16),
)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A menu of three instead of all shapes: the search is the same, and takes seconds."""
    monkeypatch.setattr("hwmodels.fit.TILES", ((64, 64), (64, 128), (256, 128)))


def measured(kernel: KernelCalibration, count: int, noise: float = 0.02, seed: int = 0) -> GemmRows:
    random = np.random.default_rng(seed)
    m = 2 ** random.uniform(0, 15, count)
    n, k = 2 ** random.uniform(5, 14, (2, count))
    shapes = [tuple(map(int, shape)) for shape in np.stack([m, n, k], axis=1)]
    rows = gemm_rows(shapes, np.ones(count))
    rates = CHIP if kernel.quantize is None else replace(CHIP, operand_bytes=1.0, peak_flops_per_s=1.98e15)
    return replace(rows, seconds=predict(rows, kernel, rates) * random.lognormal(0, noise, count))


def test_predictions_are_those_of_the_scalar_model() -> None:
    narrow = replace(CHIP, operand_bytes=1.0)
    for kernel, rates in ((TRUE, CHIP), (replace(TRUE, quantize=PASSES), narrow)):
        rows = measured(TRUE, 50)
        found = predict(rows, kernel, rates)
        for i in range(50):
            m, n, k = int(rows.m[i]), int(rows.n[i]), int(rows.k[i])
            expected = kernel_seconds(m, n, k, kernel, rates) + quantize_seconds(m * k, kernel, rates)
            assert found[i] == pytest.approx(expected, rel=1e-11)


def test_a_noisy_chip_is_recovered_and_its_error_is_that_of_the_noise() -> None:
    fitted = fit_kernel(measured(TRUE, 300), CHIP, source="synthetic")
    assert fitted.fitted.source == "synthetic"
    assert fitted.fitted.rows == 300
    assert fitted.fitted.held_out_mape_percent < 6.0
    assert fitted.fitted.held_out_rank_correlation > 0.99
    assert fitted.correction is None  # too few rows for one
    low, high = fitted.band
    assert -0.15 < low < 0 < high < 0.15
    fresh = measured(TRUE, 300, noise=0.0, seed=1)
    assert errors(predict(fresh, fitted, CHIP), fresh.seconds).mape_percent < 5.0
    assert fitted.bandwidth_efficiency == pytest.approx(TRUE.bandwidth_efficiency, rel=0.1)
    assert fitted.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.4)


def test_quantization_that_was_not_measured_apart_is_fitted_with_the_rest() -> None:
    true = replace(TRUE, quantize=replace(PASSES, amax_s=0.0, amax_bandwidth_efficiency=None, cast_s=4e-6))
    rates = replace(CHIP, operand_bytes=1.0, peak_flops_per_s=1.98e15)
    fitted = fit_rows(measured(true, 250), rates, dynamic=True, fixed_s=true.fixed_s, correct=False)
    assert fitted.quantize is not None
    assert fitted.fixed_s == true.fixed_s
    assert fitted.quantize.cast_s == pytest.approx(4e-6, rel=0.4)
    known = fit_rows(measured(replace(TRUE, quantize=PASSES), 250), rates, quantize=PASSES, correct=False)
    assert known.quantize == PASSES


def test_a_correction_removes_what_is_smooth_and_helps_on_shapes_apart() -> None:
    rows = measured(TRUE, 1200, noise=0.01)

    def bent(rows: GemmRows) -> GemmRows:
        bump: Array = 0.3 * np.sin(np.log2(rows.m) / 2.5) * np.cos(np.log2(rows.k) / 3)
        return replace(rows, seconds=rows.seconds * np.exp(bump))

    fitted = fit_rows(bent(rows), CHIP)
    assert fitted.correction is not None
    fresh = bent(measured(TRUE, 500, noise=0.0, seed=2))
    with_it = errors(predict(fresh, fitted, CHIP), fresh.seconds).mape_percent
    without = errors(predict(fresh, replace(fitted, correction=None), CHIP), fresh.seconds).mape_percent
    assert with_it < 0.5 * without
    assert with_it < 6.0
    assert all(abs(value * 100 - round(value * 100)) < 1e-9 for value in fitted.correction.values)


def test_halves_share_no_shape() -> None:
    shapes = [(m, 64, k) for m in (1, 2, 3, 4, 5) for k in (32, 64)] * 3
    first, second = halves(gemm_rows(shapes, [1e-5] * len(shapes)))
    seen = [set(zip(half.m, half.n, half.k, strict=True)) for half in (first, second)]
    assert not seen[0] & seen[1]
    assert len(first) + len(second) == 30
    assert len(seen[0]) == len(seen[1]) == 5


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="23 measurements are too few"):
        fit_kernel(measured(TRUE, 23), CHIP, source="")


def test_errors_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(1, 20, 50).astype(float)
    guess = truth * random.lognormal(0, 0.3, 50).round(1)
    found = errors(guess, truth)
    assert found.rank_correlation == pytest.approx(spearmanr(guess, truth).statistic)
    assert found.mape_percent == pytest.approx(np.mean(np.abs(guess / truth - 1)) * 100)
    assert found.median_percent == pytest.approx(np.median(np.abs(guess / truth - 1)) * 100)
    assert math.isnan(errors(truth[:1], truth[:1]).rank_correlation)


def test_a_pass_over_a_tensor_is_recovered() -> None:
    random = np.random.default_rng(0)
    elements = 2 ** random.uniform(5, 30, 200)
    seconds = (7e-6 + elements * 2 / (0.4 * 3e12)) * random.lognormal(0, 0.03, 200)
    fixed, efficiency, error = fit_quantize(elements.tolist(), seconds.tolist(), 2.0, 3e12)
    assert fixed == pytest.approx(7e-6, rel=0.02)
    assert efficiency == pytest.approx(0.4, rel=0.02)
    assert error < 4.0


def power_rows(kernel: str, per_flop: float, seed: int) -> PowerRows:
    random = np.random.default_rng(seed)
    flops, moved = 10 ** random.uniform(9, 13, 80), 10 ** random.uniform(7, 9.5, 80)
    seconds = np.maximum(flops / 7e14, moved / 3e12) * random.uniform(1.05, 3.0, 80)
    watts = np.minimum(0.98 * 700, 140 + (per_flop * flops + 6e-11 * moved) / seconds)
    asked = 140 + (per_flop * flops + 6e-11 * moved) / seconds
    return PowerRows(
        kernel=kernel,
        flops=flops,
        moved=moved,
        seconds=seconds,
        predicted_s=seconds / np.maximum(asked / (0.98 * 700), 1.0) ** 0.5,
        watts=watts * random.lognormal(0, 0.01, 80),
        fixed_s=0.0,
    )


def test_power_is_recovered() -> None:
    rows = [power_rows("bfloat16", 9e-13, 0), power_rows("nvfp4", 3e-13, 1)]
    found = fit_power(rows, limit_w=700.0, floor_w=130.0, source="synthetic")
    for kernel, per_flop in (("bfloat16", 9e-13), ("nvfp4", 3e-13)):
        one = found.kernels[kernel]
        assert found.idle_w + one.active_w == pytest.approx(140, rel=0.05)
        assert one.joules_per_byte == pytest.approx(6e-11, rel=0.1)
        assert one.joules_per_flop == pytest.approx(per_flop, rel=0.1)
    assert found.throttle > 0.1
    assert found.saturation == pytest.approx(0.98, rel=0.02)
    assert found.fitted.held_out_mape_percent < 2.0
    arrays = ("flops", "moved", "seconds", "predicted_s", "watts")
    few = replace(rows[0], **{name: getattr(rows[0], name)[:5] for name in arrays})
    with pytest.raises(InputError, match="too few power"):
        fit_power([few], limit_w=700.0, floor_w=130.0, source="")
