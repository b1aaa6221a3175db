"""Validation of profiles: the table is read or refused by line, the errors are those of an independent computation."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from emulation.errors import InputError
from hwmodels.gemm import gemm_seconds
from hwmodels.power import board_joules, board_power
from hwmodels.profile import load_profile
from hwmodels.validate import (
    SETTLED_S,
    Measurement,
    of_device,
    predicted_seconds,
    rank_correlation,
    read_measurements,
    validate,
)

HEADER = "device,gemm_dtype,m,n,k,latency_us,power\n"


def table(tmp_path: Path, text: str, name: str = "rows.csv") -> Path:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_rows_are_read(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + HEADER + "h100_sxm,fp8,128,256,512,14.5,\r\n\r\nh100_sxm,bfloat16,1e3,2,3, 2.5 ,640.5\r\n"
    rows = read_measurements(table(tmp_path, text, name))
    assert rows[0] == Measurement(device="h100_sxm", gemm_dtype="fp8", m=128, n=256, k=512, seconds=14.5e-6)
    assert (rows[1].m, rows[1].seconds, rows[1].power_w) == (1000, pytest.approx(2.5e-6), 640.5)


def test_columns_may_be_in_any_order_and_more(tmp_path: Path) -> None:
    rows = read_measurements(table(tmp_path, "latency_us,k,stack,n,m,gemm_dtype\n3,5,x,6,7,nvfp4\n"))
    assert rows == [Measurement(device=None, gemm_dtype="nvfp4", m=7, n=6, k=5, seconds=3e-6)]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "column 'gemm_dtype' is missing", 1),
        ("gemm_dtype,m,n,latency_us\n", "column 'k' is missing", 1),
        (HEADER, "no measurements", None),
        (HEADER + "a,fp8,1,2,3,4,5\na,fp9,1,2,3,4,5\n", "unknown gemm_dtype='fp9'", 3),
        (HEADER + "a,fp8,0,2,3,4,5\n", "m='0' is not above 0", 2),
        (HEADER + "a,fp8,1.5,2,3,4,5\n", "m='1.5' is not a size", 2),
        (HEADER + "a,fp8,1,2,1e12,4,5\n", "k='1e12' is not a size", 2),
        (HEADER + "a,fp8,1,2,3,fast,5\n", "latency_us='fast' is not a number", 2),
        (HEADER + "a,fp8,1,2,3,nan,5\n", "latency_us='nan' is not above 0", 2),
        (HEADER + "a,fp8,1,2,3,4,-5\n", "power='-5' is not above 0", 2),
        (HEADER + "a,fp8,1,2,3\n", "5 values for 7 columns", 2),
        ("quantization," + HEADER + "none,a,fp8,1,2,3,4,5\n", "unknown quantization='none'", 2),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, text: str, message: str, line: int | None) -> None:
    path = table(tmp_path, text)
    with pytest.raises(InputError, match="(?s)" + message.replace("'", ".")) as caught:
        read_measurements(path)
    assert (caught.value.file, caught.value.line) == (path, line)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_measurements(tmp_path / "none.csv")
    with pytest.raises(InputError, match="not a file"):
        read_measurements(tmp_path)
    bad = tmp_path / "bad.csv.gz"
    bad.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match="cannot read"):
        read_measurements(bad)
    whole = gzip.compress((HEADER + "a,fp8,1,2,3,4,5\n" * 1000).encode())
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read"):
        read_measurements(bad)
    odd = tmp_path / "odd.csv"
    odd.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        read_measurements(odd)


def test_rows_say_whether_they_have_the_quantization_in_them(tmp_path: Path) -> None:
    lines = ["gemm_dtype,m,n,k,latency_us,quantization"]
    lines += [f"fp8,64,512,512,10,{word}" for word in ("", "included", "excluded")]
    rows = read_measurements(table(tmp_path, "\n".join(lines) + "\n"))
    assert [one.quantized for one in rows] == [True, True, False]


def test_the_product_alone_is_compared_with_the_product_alone() -> None:
    profile = load_profile("h200")
    whole = row(None, gemm_dtype="fp8")
    alone = replace(whole, quantized=False)
    rate = profile.rate("fp8")
    assert profile.calibration is not None
    product = gemm_seconds(64, 512, 512, params=profile.calibration, rate=rate, profile=profile, quantize=False)
    assert predicted_seconds(profile, whole) == profile.gemm_seconds(64, 512, 512, "fp8")
    assert predicted_seconds(profile, alone) == product < predicted_seconds(profile, whole)
    (line,) = validate(profile, [replace(alone, seconds=product)])
    assert line["mape_percent"] == pytest.approx(0.0, abs=1e-9)


def row(device: str | None, m: int = 64, gemm_dtype: str = "bfloat16", seconds: float = 1e-5) -> Measurement:
    return Measurement(device=device, gemm_dtype=gemm_dtype, m=m, n=512, k=512, seconds=seconds)


def test_rows_of_one_chip() -> None:
    rows = [row("h100_sxm"), row("H100-SXM"), row("h1000"), row("b200"), row(None)]
    assert of_device(rows, "h100") == [rows[0], rows[1], rows[4]]
    assert of_device(rows[:4], "b200") == [rows[3]]
    assert of_device([row("whatever")] * 2, "my_chip") == [row("whatever")] * 2
    with pytest.raises(InputError, match="no measurements of 'l40s'") as caught:
        of_device(rows[:4], "l40s")
    assert "h100_sxm" in str(caught.value.hint)


def test_a_profile_predicts_its_own_predictions_without_error() -> None:
    profile = load_profile("b200")
    rows = []
    for kernel in ("bfloat16", "fp8", "fp8_block", "nvfp4"):
        plain = [row("b200", m=2**power, gemm_dtype=kernel) for power in range(12)]
        rows += [replace(one, seconds=predicted_seconds(profile, one)) for one in plain]
    found = validate(profile, rows)
    assert [line["format"] for line in found] == ["bfloat16", "fp8", "fp8_block", "nvfp4"]
    for line in found:
        assert line["n"] == 12
        assert line["basis"] == "calibrated"
        assert line["note"] is None
        assert line["mape_percent"] == pytest.approx(0.0, abs=1e-9)
        assert line["rank_correlation"] == pytest.approx(1.0)
        assert line["roofline_mape_percent"] > 20


def test_errors_are_those_of_numpy_and_scipy() -> None:
    profile = load_profile("h100")
    noise = np.random.default_rng(0).lognormal(0, 0.3, 25)
    rows = [row(None, m=17 * (i + 1), seconds=1e-5 * float(noise[i])) for i in range(25)]
    (line,) = validate(profile, rows)
    predicted = np.array([profile.gemm_seconds(r.m, r.n, r.k, "bfloat16") for r in rows])
    measured = np.array([r.seconds for r in rows])
    off = np.abs(predicted / measured - 1) * 100
    assert line["mape_percent"] == pytest.approx(off.mean())
    assert line["median_percent"] == pytest.approx(np.median(off))
    assert line["rank_correlation"] == pytest.approx(spearmanr(predicted, measured).statistic)
    roofline = np.array([profile.gemm_seconds(r.m, r.n, r.k, "bfloat16", basis="peak") for r in rows])
    assert line["roofline_mape_percent"] == pytest.approx((np.abs(roofline / measured - 1) * 100).mean())
    assert line["worst"][0]["m"] == rows[int(off.argmax())].m
    assert len(line["worst"]) == 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_rank_correlation_is_spearmans_ties_and_all(pairs: list[tuple[int, int]]) -> None:
    first, second = (list(map(float, side)) for side in zip(*pairs, strict=True))
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


def test_fallbacks_and_borrowed_calibrations_are_named() -> None:
    (line,) = validate(load_profile("a100"), [row(None, gemm_dtype="fp8")])
    assert line["note"] == "falls back to bfloat16"
    (line,) = validate(load_profile("gb200"), [row(None, gemm_dtype="nvfp4")])
    assert line["note"] == "calibrated on b200"
    (line,) = validate(load_profile("mi300x"), [row(None)])
    assert line["basis"] == "peak"
    assert line["mape_percent"] == line["roofline_mape_percent"]


def test_power_and_energy_are_compared_where_they_were_measured() -> None:
    profile = load_profile("h200")
    rows = []
    for power in range(6, 14):
        one = replace(row(None, m=2**power), n=8192, k=8192)
        seconds = predicted_seconds(profile, one)
        watts = board_power(one.m, one.n, one.k, seconds, "bfloat16", profile)
        rows.append(replace(one, seconds=seconds, power_w=watts * 1.1))
    (line,) = validate(profile, rows)
    assert line["power_mape_percent"] == pytest.approx(100 * (1 - 1 / 1.1))
    throttled = [
        abs(board_joules(r.m, r.n, r.k, r.seconds, "bfloat16", profile) / ((r.power_w or 0) * r.seconds) - 1)
        for r in rows
        if r.seconds > SETTLED_S
    ]
    assert line["energy_mape_percent"] == pytest.approx(100 * sum(throttled) / len(throttled))
    assert "power_mape_percent" not in validate(profile, [row(None)])[0]
    short = replace(rows[0], seconds=99e-6)
    assert "power_mape_percent" not in validate(profile, [short])[0]
    fp8 = replace(rows[-1], gemm_dtype="fp8_block")
    assert validate(profile, [fp8])[0]["power_mape_percent"] > 0
    assert "power_mape_percent" not in validate(load_profile("l40s"), rows)[0]
