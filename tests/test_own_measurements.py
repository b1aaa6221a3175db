"""An H200's own measurements: both of its calibrations have the errors on them that the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwmodels.profile import load_profile
from hwmodels.validate import read_measurements, validate

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "gemm_h200.csv.gz"
PAGE = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    """The page's rows for one profile."""
    found = []
    for row in validate(load_profile(name), read_measurements(TABLE)):
        cells = [name, row["format"], str(row["n"]), f"{row['mape_percent']:.1f} ({row['median_percent']:.1f})"]
        cells += [f"{row['rank_correlation']:.3f}", f"{row['roofline_mape_percent']:.0f}"]
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("power_mape_percent", "energy_mape_percent")]
        found.append("| " + " | ".join(cells) + " |")
    return found


@pytest.mark.parametrize("name", ["h200", "h200_measured"])
def test_the_page_has_the_errors_of_both_calibrations(name: str) -> None:
    for line in lines(name):
        assert line + "\n" in PAGE, line


def test_the_own_calibration_was_fitted_to_these_rows() -> None:
    profile, rows = load_profile("h200_measured"), read_measurements(TABLE)
    assert profile.calibration is not None
    for name, kernel in profile.calibration.kernels.items():
        assert kernel.fitted.rows == sum(row.gemm_dtype == name and row.power_w is None for row in rows)
        held_out = f"| h200_measured, held out | {name} | {kernel.fitted.rows} | "
        held_out += f"{kernel.fitted.held_out_mape_percent:.1f} ({kernel.fitted.held_out_median_percent:.1f}) | "
        assert held_out in PAGE, held_out
    assert not any(row.quantized for row in rows)
