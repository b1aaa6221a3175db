"""The profiles that ship: all there, all right, all sourced, and their core numbers against a second copy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jsonschema
import pytest

from hwmodels.profile import check, list_profiles, load_profile
from hwmodels.profile_yaml import SCHEMA_FILE
from hwmodels.strict_yaml import load_yaml, parse_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "configs" / "hardware"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))

# Dense TFLOPS, GB, TB/s, MiB, W, as tabulated apart from the YAML files; blank: not published or no hardware.
CORE = """profile,float32,tfloat32,bfloat16,float8_e4m3fn,int8,mxfp6_e2m3,nvfp4,memory,bandwidth,cache,limit
v100,15.7,,,,,,,32,0.9,6,300
a100,19.5,156,312,,624,,,80,2.039,40,400
h100,66.9,494.7,989.4,1978.9,1978.9,,,80,3.35,50,700
h200,67,494.5,989.5,1979,1979,,,141,4.8,50,700
l40s,91.6,183,362.05,733,733,,,48,0.864,96,350
b200,80,1125,2250,4500,4500,4500,9000,180,7.7,,1000
gb200,80,1250,2500,5000,5000,5000,10000,186,8.0,,1200
b300,75,1125,2250,4500,153.5,4500,14000,288,7.75,,1100
gb300,80,1250,2500,5000,165,5000,15000,288,8.0,,1400
rtx4090,82.6,82.6,165.2,330.3,660.6,,,24,1.008,72,450
rtx5090,104.8,104.8,209.5,419,838,419,1676,32,1.792,96,575
rtx_pro_6000,,,467.8,935.6,935.6,,1871,96,1.792,,600
mi250x,23.95,,191.5,,191.5,,,64,1.64,8,280
mi300x,163.4,653.7,1307.4,,2614.9,,,192,5.3,256,750
mi325x,163.4,653.7,1307.4,,2614.9,,,256,6.0,256,1000
mi355x,157.3,,2516.6,5033,5033,10066,,288,8.0,256,1400
tpu_v5e,,,197,,393,,,16,0.819,128,
tpu_v5p,,,459,459,918,,,102,2.765,,
tpu_v6e,,,918,918,1836,,,34.36,1.638,,
tpu_v7,,,2307,4614,,,,206,7.38,,
gaudi2,,,432,865,,,,96,2.46,48,600
gaudi3,229,459,1677,1677,,,,128,3.7,96,900
trainium2,181,667,667,,,,,103,2.9,,
trainium3,183,671,671,,,,,155,4.9,256,
jetson_orin,5.3,21,42.5,,85,,,64,0.2048,4,60
jetson_thor,8,,259,517,,,1035,128,0.273,32,130
"""
ROWS = {row["profile"]: row for row in csv.DictReader(CORE.splitlines())}
MEASURED = ("h200_measured",)  # written by `dpquant hardware calibrate`: another calibration of a chip that ships
NAMES = sorted([*ROWS, *MEASURED])
OTHER = {"mi300x": ("float8_e4m3fnuz", 2614.9), "trainium2": ("float8_e4m3", 1299), "trainium3": ("mxfp4_e2m1", 2517)}
OTHER |= {"v100": ("float16", 125), "mi355x": ("mxfp4_e2m1", 10066)}


def test_every_chip_is_there_and_no_other() -> None:
    assert list_profiles() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_nothing(name: str) -> None:
    assert [str(error) for error in check(SHIPPED / f"{name}.yaml")] == []


@pytest.mark.parametrize("name", NAMES)
def test_json_schema_agrees(name: str) -> None:
    data, _ = load_yaml(SHIPPED / f"{name}.yaml")
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []


def test_the_schema_is_a_schema_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    data, _ = load_yaml(SHIPPED / "a100.yaml")
    for change in (
        {"unit": 1},
        {"year": "x"},
        {"formats": {"fp9": {"falls_back_to": "bfloat16"}}},
        {"units": {"value": 1}},
    ):
        assert not VALIDATOR.is_valid(data | change)
    del data["memory"]
    assert not VALIDATOR.is_valid(data)
    assert VALIDATOR.is_valid({"extends": "a100"})


@pytest.mark.parametrize("name", sorted(ROWS))
def test_core_numbers(name: str) -> None:
    row, profile = ROWS[name], load_profile(name)
    for format in ("float32", "tfloat32", "bfloat16", "float8_e4m3fn", "int8", "mxfp6_e2m3", "nvfp4"):
        if row[format]:
            assert profile.rate(format).native
            assert profile.rate(format).peak_flops_per_s == pytest.approx(float(row[format]) * 1e12, rel=1e-2)
        elif format in ("float8_e4m3fn", "nvfp4"):
            assert not profile.rate(format).native
    assert profile.memory.capacity_bytes == pytest.approx(float(row["memory"]) * 1e9, rel=1e-2)
    assert profile.memory.bandwidth_bytes_per_s == pytest.approx(float(row["bandwidth"]) * 1e12, rel=1e-2)
    if row["cache"]:
        assert profile.cache_bytes == float(row["cache"]) * 2**20
    assert (profile.power.limit_w if profile.power else "") == (float(row["limit"]) if row["limit"] else "")
    if name in OTHER:
        format, rate = OTHER[name]
        assert profile.rate(format).native
        assert profile.rate(format).peak_flops_per_s == pytest.approx(rate * 1e12, rel=1e-3)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_numbers_that_are_not_published_say_why(name: str) -> None:
    """What is assumed or derived has a note, or a source that holds the arithmetic."""
    profile = load_profile(name)
    for key, number in profile.provenance.items():
        if number.status == "assumed" and key != "vector_flops_per_s":
            assert number.note or number.sources == ("HERE",), key
    assert all(source.url for source in profile.sources.values())


def test_chips_have_their_familys_calibration_or_none() -> None:
    for name in list_profiles():
        profile = load_profile(name)
        assert (profile.calibration is None) == (profile.calibrated_on is None)
        if profile.calibrated_on is not None:
            assert load_profile(profile.calibrated_on).calibrated_on == profile.calibrated_on


def test_the_pages_tables_are_current() -> None:
    from hwmodels.profile_table import with_tables

    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m hwmodels.profile_table`"


def test_the_pages_example_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert parse_yaml(example).data["extends"] == "h100"
    (tmp_path / "h100_pcie.yaml").write_text(example)
    assert check(tmp_path / "h100_pcie.yaml") == []
    assert load_profile("h100_pcie", tmp_path).rate("bf16").peak_flops_per_s == 756e12


def test_family_members_are_alike_per_unit() -> None:
    """The oracle of `rate_per_unit`: within a family, dense bfloat16 per core differs by less than twice."""
    per_unit: dict[str, list[float]] = {}
    for name in list_profiles():
        profile = load_profile(name)
        per_unit.setdefault(profile.family, []).append(profile.rate("bf16").peak_flops_per_s / profile.units)
    assert all(max(rates) < 2.0 * min(rates) for family, rates in per_unit.items() if family != "blackwell_rtx"), (
        per_unit
    )
