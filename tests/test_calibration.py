"""Calibrations as data: written and read back to the same, malformed ones refused with what is wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from test_gemm import FITTED, GRID, KERNEL, RICH

from emulation.errors import InputError
from hwmodels.calibration import (
    CALIBRATION_FIELDS,
    GemmCalibration,
    KernelPower,
    PowerCalibration,
    QuantizeCalibration,
    calibration_from,
    calibration_yaml,
)
from hwmodels.fields import problems
from hwmodels.strict_yaml import parse_yaml

PASSES = QuantizeCalibration(amax_s=7e-6, amax_bandwidth_efficiency=0.4, cast_s=1.3e-6, cast_bandwidth_efficiency=0.9)
POWER = PowerCalibration(
    idle_w=130.0,
    saturation=0.97,
    throttle=0.5,
    kernels={
        "bfloat16": KernelPower(active_w=20.0, joules_per_byte=6e-11, joules_per_flop=7e-13),
        "nvfp4": KernelPower(active_w=0.0, joules_per_byte=7e-11, joules_per_flop=1.5e-13),
    },
    fitted=FITTED,
)
WHOLE = GemmCalibration(
    kernels={
        "bfloat16": KERNEL,
        "fp8": replace(RICH, quantize=PASSES),
        "nvfp4": replace(KERNEL, quantize=replace(PASSES, amax_s=0.0, amax_bandwidth_efficiency=None)),
    },
    power=POWER,
)


def block() -> dict[str, Any]:
    data: dict[str, Any] = parse_yaml(calibration_yaml(WHOLE)).data["calibration"]
    return copy.deepcopy(data)


def test_what_is_written_is_read_back() -> None:
    document = parse_yaml(calibration_yaml(WHOLE))
    assert calibration_from(document.data["calibration"]) == WHOLE
    assert replace(WHOLE, power=None) == calibration_from(
        parse_yaml(calibration_yaml(replace(WHOLE, power=None))).data["calibration"]
    )


def test_what_is_written_passes_the_schema() -> None:
    text = calibration_yaml(WHOLE)
    inner = "\n".join(line[2:] for line in text.splitlines()[1:])
    assert problems(parse_yaml(inner), CALIBRATION_FIELDS) == []
    wrong = problems(parse_yaml(inner.replace("overlap", "overlab")), CALIBRATION_FIELDS)
    assert any("overlab" in str(error) and "overlap" in str(error.hint) for error in wrong)


def test_quotes_in_a_source_survive() -> None:
    odd = replace(KERNEL, fitted=replace(FITTED, source='a "quoted" \\ source: {x}'))
    data = parse_yaml(calibration_yaml(GemmCalibration(kernels={"bfloat16": odd}))).data["calibration"]
    assert calibration_from(data).kernels["bfloat16"] == odd


def broken(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    data = block()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kernels",), None, "missing key 'kernels'"),
        (("kernels", "fp8", "overlap"), None, "missing key 'overlap'"),
        (("kernels", "fp8", "range"), {"m": [4, 2], "n": [1, 2], "k": [1, 2]}, "lower and an upper"),
        (("kernels", "fp8", "tiles"), [[64, 64, 64]], "not a pair"),
        (("kernels", "fp8", "correction", "k"), [32, 32, 64], "does not rise"),
        (("kernels", "fp8", "correction", "m"), [32], "does not rise"),
        (("kernels", "fp8", "correction", "percent"), ["1 2 3"], "3 values for a grid of 3 x 2 x 3"),
        (("kernels", "fp8", "correction", "percent"), ["1 2 x"], "whole numbers"),
        (("kernels", "fp8", "splits"), 3, "wrong type"),
        (("power", "idle_w"), None, "missing key 'idle_w'"),
    ],
)
def test_what_is_malformed_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibration_from(broken(path, value))


def test_an_unknown_kernel_has_a_hint() -> None:
    data = block()
    data["kernels"]["fp8blok"] = data["kernels"]["fp8"]
    with pytest.raises(InputError, match="fp8blok") as caught:
        calibration_from(data)
    assert "fp8_block" in str(caught.value.hint)


def test_the_grid_is_stored_in_hundredths() -> None:
    read = calibration_from(block()).kernels["fp8"].correction
    assert read is not None
    assert read.values == GRID.values
