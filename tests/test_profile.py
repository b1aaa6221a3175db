"""Profiles: loading by name and path, rates that never silently are another format's, the roofline by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulation.errors import InputError
from emulation.formats import FORMATS, get_format
from hwmodels.profile import check, describe, list_profiles, load_profile, stored_bytes
from hwmodels.validate import Measurement, predicted_seconds

SHIPPED = Path(__file__).parent.parent / "configs" / "hardware"
H100 = load_profile("h100")
B200 = load_profile("b200")


@pytest.mark.parametrize(
    "name", ["h100", "H100", "RTX PRO 6000", "rtx-pro-6000", "TPU-v5e", str(SHIPPED / "h100.yaml")]
)
def test_names_and_paths(name: str) -> None:
    assert load_profile(name).name in ("h100", "rtx_pro_6000", "tpu_v5e")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("h10", "unknown hardware 'h10'", "'h100'"),
        ("", "unknown hardware ''", "choose from a100"),
        ("./none.yaml", "no such file", None),
        ("a\0b", "unknown hardware", "choose from"),
        ("a\0b.yaml", "no such file|cannot be read", None),
    ],
)
def test_unknown_hardware(name: str, message: str, hint: str | None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_profile(name)
    assert hint is None or hint in (caught.value.hint or "")


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((SHIPPED / "a100.yaml").read_text())
    (tmp_path / "h100.yaml").write_text("extends: h100\ntitle: our H100 80GB\n")
    names = list_profiles(tmp_path)
    assert "mine" in names
    assert len(names) == len(list_profiles()) + 1
    assert load_profile("mine", tmp_path).title == "NVIDIA A100 SXM 80GB"
    ours = load_profile("h100", tmp_path)
    assert (ours.title, ours.units) == ("our H100 80GB", 132)
    assert check("h100", tmp_path) == []
    with pytest.raises(InputError, match="not a folder"):
        list_profiles(tmp_path / "none")


def test_rates_by_name_alias_and_format() -> None:
    rate = H100.rate("fp8")
    assert rate is H100.rate("float8_e4m3fn") is H100.rate(get_format("e4m3"))
    assert (rate.peak_flops_per_s, rate.native, rate.timed_as, rate.layouts) == (1978.9e12, True, rate.format, ("TN",))


def test_a_fallback_is_explicit() -> None:
    rate = H100.rate("nvfp4")
    assert (rate.native, rate.falls_back_to, rate.timed_as) == (False, "bfloat16", "bfloat16")
    assert rate.peak_flops_per_s == H100.rate("bf16").peak_flops_per_s


def test_luq_is_timed_as_the_chips_four_bit_rate() -> None:
    rate = B200.rate("luq_fp4")
    assert (rate.native, rate.falls_back_to, rate.timed_as) == (False, None, "nvfp4")
    assert rate.peak_flops_per_s == 9000e12
    assert H100.rate("luq_fp4").falls_back_to == "bfloat16"


def test_a_format_without_rate_is_an_error() -> None:
    with pytest.raises(InputError, match="format='float8_e8m0fnu' has no rate on h100"):
        H100.rate("float8_e8m0fnu")
    with pytest.raises(InputError, match="unknown format"):
        H100.rate("fp9")


def test_native_is_not_faster() -> None:
    for chip, format in (("tpu_v6e", "fp8"), ("gaudi3", "fp8"), ("trainium3", "mxfp4"), ("b200", "mxfp6")):
        profile = load_profile(chip)
        slower = {"trainium3": "mxfp8", "b200": "fp8"}.get(chip, "bf16")
        assert profile.rate(format).native
        assert profile.rate(format).peak_flops_per_s == profile.rate(slower).peak_flops_per_s


def test_roofline_by_hand() -> None:
    assert H100.gemm_seconds(8192, 8192, 8192, "bf16", basis="peak") == 2 * 8192**3 / 989.4e12
    bytes_moved = (1 * 4096 + 4096 * 4096) * (4 + 8 / 16) / 8 + 4096 * 2
    assert B200.gemm_seconds(1, 4096, 4096, "nvfp4", basis="peak") == pytest.approx(bytes_moved / 7.7e12, rel=1e-12)
    bytes_moved = (1 * 4096 + 4096 * 4096) * 2 + 4096 * 2  # on H100 it moves as bfloat16
    assert H100.gemm_seconds(1, 4096, 4096, "nvfp4", basis="peak") == pytest.approx(bytes_moved / 3.35e12, rel=1e-12)
    bytes_moved = (1 * 64 + 64 * 64) * 4 + 64 * 4
    assert H100.gemm_seconds(1, 64, 64, "tf32", basis="peak") == pytest.approx(bytes_moved / 3.35e12, rel=1e-12)


def test_stored_bytes() -> None:
    expected = {"tf32": 4, "fp32": 4, "bf16": 2, "fp8": 1, "mxfp8": 8.25 / 8, "mxfp6": 6.25 / 8, "nvfp4": 4.5 / 8}
    for name, width in expected.items():
        assert stored_bytes(name) == width
    assert stored_bytes("luq_fp4") == 0.5


@pytest.mark.parametrize("size", [0, -1, 1.5, math.nan, True, "8", None])
@pytest.mark.parametrize("basis", ["peak", "calibrated"])
def test_sizes_that_are_none(size: object, basis: str) -> None:
    for position in range(3):
        sizes = [8, 8, 8]
        sizes[position] = size  # type: ignore[call-overload]
        with pytest.raises(InputError, match="is not a size"):
            H100.gemm_seconds(*sizes, "bf16", basis=basis)  # type: ignore[arg-type]


def test_numpys_integers_are_sizes() -> None:
    assert H100.gemm_seconds(np.int64(64), np.uint8(64), 64, "bf16", "peak") == H100.gemm_seconds(
        64, 64, 64, "bf16", "peak"
    )


def test_unknown_basis_and_no_calibration() -> None:
    with pytest.raises(InputError, match="unknown basis='peek'") as caught:
        H100.gemm_seconds(1, 1, 1, "bf16", basis="peek")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean 'peak'?"
    with pytest.raises(InputError, match="tpu_v5e has no calibration"):
        load_profile("tpu_v5e").gemm_seconds(1, 1, 1, "bf16", basis="calibrated")
    assert load_profile("tpu_v5e").gemm_seconds(64, 64, 64, "bf16") > 0  # the roofline, where there is nothing better


def test_the_block_scaled_kernel_is_priced_by_its_name_where_it_was_measured() -> None:
    seconds = B200.gemm_seconds(512, 4096, 4096, "fp8_block")
    measured = Measurement(device=None, gemm_dtype="fp8_block", m=512, n=4096, k=4096, seconds=1.0)
    assert seconds == predicted_seconds(B200, measured)
    assert seconds != B200.gemm_seconds(512, 4096, 4096, "fp8")
    assert load_profile("gb200").gemm_seconds(512, 4096, 4096, "fp8_block") > 0  # a borrowed calibration has it too
    peak = H100.gemm_seconds(512, 4096, 4096, "fp8_block", basis="peak")
    assert peak == H100.gemm_seconds(512, 4096, 4096, "fp8", basis="peak")
    with pytest.raises(InputError, match="a100 has no calibration of format='fp8_block'") as caught:
        load_profile("a100").gemm_seconds(512, 4096, 4096, "fp8_block")
    assert caught.value.hint == "measured: bfloat16"
    with pytest.raises(InputError, match="tpu_v5p has no calibration"):
        load_profile("tpu_v5p").gemm_seconds(512, 4096, 4096, "fp8_block", basis="calibrated")


SIZE = st.integers(1, 1 << 17)


@given(m=SIZE, n=SIZE, k=SIZE, chip=st.sampled_from(list_profiles()), data=st.data())
def test_no_time_beats_the_roofs(m: int, n: int, k: int, chip: str, data: st.DataObject) -> None:
    profile = PROFILES[chip]
    format = data.draw(st.sampled_from(sorted(profile.formats)))
    seconds = profile.gemm_seconds(m, n, k, format, basis="peak")
    assert seconds >= 2 * m * n * k / profile.rate(format).peak_flops_per_s
    assert profile.gemm_seconds(m, n, k + 1, format, basis="peak") >= seconds
    assert profile.gemm_seconds(n, m, k, format, basis="peak") == pytest.approx(seconds, rel=1e-12)


PROFILES = {name: load_profile(name) for name in list_profiles()}


@pytest.mark.parametrize("name", list_profiles())
def test_every_format_of_every_chip(name: str) -> None:
    profile = PROFILES[name]
    assert set(FORMATS) - set(profile.formats) == {"float8_e8m0fnu"}  # a format of scales alone
    for format, rate in profile.formats.items():
        assert rate.format == format
        target = profile.formats[rate.timed_as]
        assert target.timed_as == rate.timed_as
        assert rate.peak_flops_per_s == target.peak_flops_per_s
        assert rate.falls_back_to in (None, rate.timed_as)
        assert not (rate.native and rate.timed_as != format)
        assert rate.status in ("measured", "fitted", "published", "derived", "assumed")
        assert set(rate.sources) <= set(profile.sources)
        assert profile.gemm_seconds(64, 64, 64, format, basis="peak") > 0


def test_every_number_has_its_provenance() -> None:
    for profile in PROFILES.values():
        assert {"units", "launch_s", "vector_flops_per_s", "memory.capacity_bytes"} <= set(profile.provenance)
        assert all(source in profile.sources for number in profile.provenance.values() for source in number.sources)


def test_profiles_are_frozen() -> None:
    with pytest.raises(AttributeError):
        H100.units = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        H100.formats["bfloat16"] = H100.rate("fp8")  # type: ignore[index]


@pytest.mark.parametrize("name", list_profiles())
def test_describe_is_plain_and_whole(name: str) -> None:
    facts = json.loads(json.dumps(describe(PROFILES[name])))
    assert facts["name"] == name
    numbers = {row["key"]: row for row in facts["numbers"]}
    assert numbers["units"]["value"] == PROFILES[name].units
    assert numbers["memory.bandwidth_bytes_per_s"]["sources"]
    assert (numbers["power.limit_w"]["value"] is None) == (PROFILES[name].power is None)
    assert len(facts["formats"]) == len(PROFILES[name].formats)
    assert all(tag in facts["sources"] for row in facts["formats"] for tag in row["sources"])


def test_a_profile_loads_without_torch_and_numpy() -> None:
    code = "import sys, hwmodels; hwmodels.load_profile('h100'); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SHIPPED.parent.parent, check=False).returncode == 0
