"""A profile's YAML: every problem at once with file and line, variants, and no traceback whatever is in the file."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.errors import InputError
from hwmodels.fields import problems
from hwmodels.profile import check, list_profiles, load_profile
from hwmodels.profile_yaml import PROFILE, SCHEMA_FILE, hardware_schema
from hwmodels.strict_yaml import Document, parse_yaml

SHIPPED = Path(__file__).parent.parent / "configs" / "hardware"
VALIDATOR = jsonschema.Draft202012Validator(hardware_schema())
A100 = (SHIPPED / "a100.yaml").read_text().partition("calibration:\n")[0]


def said(file: Path) -> list[str]:
    return [f"{error.line}: {error.message}" for error in check(file)]


def changed(tmp_path: Path, old: str, new: str) -> Path:
    assert old in A100
    file = tmp_path / "my.yaml"
    file.write_text(A100.replace(old, new, 1))
    return file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("units:", "unitz:", "unknown key 'unitz'"),
        ("value: 80e9", "value: -80e9", "memory.capacity_bytes.value=-80000000000 is below 1e+09"),
        ("value: 80e9", "value: 80", "memory.capacity_bytes.value=80 is below 1e+09"),
        ("value: 80e9", "value: 80GB", "memory.capacity_bytes.value='80GB' is not a number"),
        ("value: 80e9", "value: .nan", "memory.capacity_bytes.value=nan is not finite"),
        ("value: 312e12", "value: 0", "formats.bfloat16.peak_flops_per_s.value=0 is below 1e+09"),
        ("value: 312e12", "value: 312", "formats.bfloat16.peak_flops_per_s.value=312 is below 1e+09"),
        ("value: 2.039e12", "value: 2.039e15", "is above 1e+14"),
        ("value: 108", "value: 108.5", "units.value=108.5 is not a whole number"),
        ("status: published", "status: guessed", "status='guessed' is unknown"),
        ("source: GKL", "source: GLK", "source='GLK' is not in `sources`"),
        ("bfloat16: {native", "bfloat17: {native", "unknown name 'bfloat17' in formats"),
        ("falls_back_to: bfloat16", "falls_back_to: int3", "falls_back_to='int3' is unknown"),
        ("falls_back_to: bfloat16", "falls_back_to: nvfp4", "falls_back_to='nvfp4' has no rate of its own"),
        ("falls_back_to: bfloat16", "falls_back: bfloat16", "unknown key 'falls_back'"),
        ("matrix_unit: ampere", "matrix_unit: pascal", "matrix_unit='pascal' is unknown"),
        ("year: 2020", "year: soon", "year='soon' is not a whole number"),
        ("title: NVIDIA A100 SXM 80GB", "title: ''", "title='' is empty"),
        ("units:", "calibration: {from: tpu_v5e}\nunits:", "tpu_v5e has no calibration of its own"),
        ("units:", "calibration: {from: nothing}\nunits:", "unknown hardware 'nothing'"),
        ("units:", "extends: nothing\nunits:", "extends: unknown hardware 'nothing'"),
        ("units:", "extends: 3\nunits:", "extends=3 is not text"),
    ],
)
def test_one_thing_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = changed(tmp_path, old, new)
    wrong = next(number for number, line in enumerate(file.read_text().splitlines(), 1) if new.split("\n")[0] in line)
    assert any(message in line and line.startswith(f"{wrong}: ") for line in said(file)), said(file)
    with pytest.raises(InputError, match=re.escape(message)):
        load_profile(file)


def test_all_problems_in_order(tmp_path: Path) -> None:
    text = A100.replace("vendor: NVIDIA", "vendr: NVIDIA").replace("value: 80e9", "value: 80").replace("400", "x")
    (tmp_path / "my.yaml").write_text(text + "title: twice\n")
    lines = said(tmp_path / "my.yaml")
    assert len(lines) == 5
    assert lines == sorted(lines, key=lambda line: int(line.split(":")[0]))


def test_missing_keys_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("title: x\n")
    errors = {error.message: error.hint for error in check(tmp_path / "my.yaml")}
    assert errors["missing key 'launch_s'"] == "least time of one kernel"
    assert len(errors) == 9


class TestExtends:
    def test_a_variant_says_only_what_differs(self, tmp_path: Path) -> None:
        file = tmp_path / "slow.yaml"
        file.write_text(
            "extends: h100\ntitle: H100 PCIe 80GB\nsources: {OWN: {title: measured here}}\n"
            "formats:\n  bfloat16: {native: true, peak_flops_per_s: {value: 700e12, status: measured, source: OWN}}\n"
        )
        base, variant = load_profile("h100"), load_profile(file)
        assert check(file) == []
        assert (variant.name, variant.title, variant.vendor) == ("slow", "H100 PCIe 80GB", "NVIDIA")
        assert variant.memory == base.memory
        assert variant.rate("bf16").peak_flops_per_s == 700e12
        assert variant.rate("bf16").sources == ("OWN",)
        assert variant.rate("nvfp4").peak_flops_per_s == 700e12  # falls back to this chip's bfloat16
        assert variant.rate("fp8") == base.rate("fp8")
        assert set(variant.sources) == {*base.sources, "OWN"}

    def test_problems_point_into_the_file_they_are_in(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text(A100)
        (tmp_path / "my.yaml").write_text("extends: ./base.yaml\nlaunch_s: {value: 1e-6}\nvendor: x\nvendor: y\n")
        assert said(tmp_path / "my.yaml") == [
            "2: missing key 'status' in launch_s",
            "2: missing key 'source' in launch_s",
            "4: key 'vendor' given twice",
        ]
        (tmp_path / "my.yaml").write_text("extends: ./base.yaml\nformats: {bfloat16: {falls_back_to: float16}}\n")
        (error, *_) = check(tmp_path / "my.yaml")
        assert error.file == str(tmp_path / "base.yaml")
        assert "falls_back_to='bfloat16' has no rate" in error.message

    def test_a_broken_base_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text(A100.replace("year: 2020", "year: x"))
        (tmp_path / "my.yaml").write_text("extends: base.yaml\n")
        (error,) = check(tmp_path / "my.yaml")
        assert error.line == 1
        assert "base.yaml:5: year='x' is not a whole number" in error.message

    def test_circles_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("extends: b\n")
        (tmp_path / "b.yaml").write_text("extends: a\n")
        with pytest.raises(InputError, match="unknown hardware"):
            load_profile("a", tmp_path)
        (tmp_path / "c.yaml").write_text("extends: ./c.yaml\n")
        with pytest.raises(InputError, match="more than 8 files"):
            load_profile(tmp_path / "c.yaml")


def test_a_variant_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "extends: h100\ntitle: Mine\nsources: {S: {title: mine}}\n"
    text += "memory:\n  bandwidth_bytes_per_s: {value: 3e12, status: measured, source: S}\n"
    text += "power:\n  limit_w: {value: 600, status: published, source: S}\n"
    file.write_text(text)
    assert check(file) == []
    found, base = load_profile("mine", hardware_dir=tmp_path), load_profile("h100")
    assert found.memory.bandwidth_bytes_per_s == 3e12
    assert found.memory.capacity_bytes == base.memory.capacity_bytes
    assert found.power is not None
    assert base.power is not None
    assert (found.power.limit_w, found.power.idle_w) == (600, base.power.idle_w)
    data = parse_yaml(text).data
    assert VALIDATOR.is_valid(data)
    assert not VALIDATOR.is_valid({key: value for key, value in data.items() if key != "extends"})
    alone = parse_yaml(A100).data
    del alone["memory"]["capacity_bytes"]
    assert not VALIDATOR.is_valid(alone)


def test_the_schema_that_ships_is_current() -> None:
    assert json.loads(SCHEMA_FILE.read_text()) == hardware_schema(), "run `python -m hwmodels.profile_yaml`"


def test_profiles_are_found_in_an_install(tmp_path: Path) -> None:
    """The wheel's layout: the YAML inside the package, no checkout beside it."""
    for package in ("hwmodels", "emulation"):
        shutil.copytree(
            SHIPPED.parent.parent / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copytree(SHIPPED, tmp_path / "hwmodels" / "configs" / "hardware")
    code = (
        "import hwmodels; print(hwmodels.__file__, len(hwmodels.list_profiles()), hwmodels.load_profile('h200').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "hwmodels" / "__init__.py"), str(len(list_profiles())), "h200"]


VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 2.5, 1e15, "x", "float8_e5m2", "published", [], ["GKL"], {}, {"value": 1}]
)


@given(seed=st.integers(0, 2**32), value=VALUES)
def test_the_schema_and_the_checker_agree_on_changed_profiles(seed: int, value: object) -> None:
    draw, data = random.Random(seed), parse_yaml(A100).data
    node, key = data, draw.choice(list(data))
    while isinstance(node[key], dict) and draw.random() < 0.8:
        node, key = node[key], draw.choice(list(node[key]))
    if draw.random() < 0.2:
        del node[key]
    else:
        node[draw.choice([key, key, key, "other"])] = value
    document = Document(file="f", data=data, lines={(): 1})
    assert (problems(document, PROFILE) == []) == VALIDATOR.is_valid(data)


LINES = A100.splitlines(keepends=True)
PIECES = st.sampled_from(
    ["", "null", "[]", "{}", "-1", "1e400", ".nan", "x", "[1, [2]]", "{value: 1}", "true", "&a 1", "{a"]
)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), piece=PIECES, cuts=st.integers(1, 6))
def test_no_file_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, seed: int, piece: str, cuts: int
) -> None:
    """Lines of a true profile lost, doubled, swapped, or with another value: a profile or InputError, never else."""
    draw, lines = random.Random(seed), list(LINES)
    for _ in range(cuts):
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.randrange(5):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[other])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = lines[at].split(":")[0] + ": " + piece + "\n"
            case 4:
                lines[at] = lines[at][: draw.randrange(len(lines[at]))] + "\n"
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_text(draw.choice(["", "extends: a100\n"]) + "".join(lines))
    errors = check(file)
    assert all("\n" not in str(error) for error in errors)
    if not errors:
        load_profile(file)
