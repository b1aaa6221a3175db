"""Energy by operations against sums done by hand."""

import pytest
import torch
from torch import nn

from emulation.errors import InputError
from emulation.formats import FORMATS
from hwmodels.operation_energy import TECHNOLOGIES, mac_picojoules, operation_energy
from hwmodels.workload import Workload, trace


def linear() -> Workload:
    return trace(nn.Sequential(nn.Linear(1024, 512, bias=False)), torch.zeros(1, 1024), 4096)


def test_a_linear_layer_by_hand() -> None:
    found = operation_energy(linear(), {}, "7nm", method="sgd")
    macs = 2 * 4096 * 1024 * 512  # forward and weight gradient
    assert found.compute_joules == pytest.approx(macs * (0.21 + 0.38) * 1e-12)
    x, g, w = 4096 * 1024, 4096 * 512, 1024 * 512
    operands = (x + w) * 2 + (x + g) * 2
    assert found.sram_joules == pytest.approx(operands * 1.8e-12)
    step = w * 14 + 5 * 2 * g  # optimizer, loss
    assert found.memory_joules == pytest.approx((operands + g * 2 + w * 4 + step) * 31.8e-12)
    assert sum(found.phases.values()) == pytest.approx(found.joules)
    assert found.estimated == ()


def test_smaller_formats_cost_less_and_are_marked_as_estimates() -> None:
    plain = operation_energy(linear(), {})
    quantized = operation_energy(linear(), {"0": "nvfp4"})
    assert quantized.joules < plain.joules
    assert quantized.estimated == ("nvfp4",)


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_every_format_has_a_figure(name: str) -> None:
    technology = TECHNOLOGIES[name]
    for fmt in FORMATS:
        pico, status = mac_picojoules(fmt, technology)
        assert 0 < pico <= mac_picojoules("float32", technology)[0]
        assert status in ("published", "secondary", "estimated")
    assert mac_picojoules("int8", technology)[0] < mac_picojoules("float8_e4m3fn", technology)[0]
    assert mac_picojoules("nvfp4", technology) == mac_picojoules("mxfp4", technology)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="unknown technology='7mn'"):
        operation_energy(linear(), {}, "7mn")
    with pytest.raises(InputError, match="layer '1'"):
        operation_energy(linear(), {"1": "fp8"})
