"""What a step's memory consists of: parts that add up to the peak, and are those that can be counted by hand."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpquant.models import build_model, example_input
from hwmodels.dpsgd import CLIPPINGS
from hwmodels.memory import memory_parts, peak_memory_bytes
from hwmodels.step import FRAMEWORKS, StepOptions
from hwmodels.workload import Workload, trace


@functools.cache
def traced(name: str) -> Workload:
    with torch.device("meta"):
        return trace(build_model(name), example_input(name), 32)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["resnet18", "digits_cnn"]),
    fmt=st.sampled_from(["float8_e4m3fn", "nvfp4", "luq_fp4"]),
    every=st.integers(1, 5),
    clipping=st.sampled_from(CLIPPINGS),
    framework=st.sampled_from(FRAMEWORKS),
    optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
    method=st.sampled_from(["sgd", "dp-sgd"]),
)
def test_parts_add_up(
    name: str, fmt: str, every: int, clipping: str, framework: str, optimizer: str, method: str
) -> None:
    workload = traced(name)
    options = StepOptions(clipping=clipping, framework=framework, optimizer=optimizer, method=method)
    plan = dict.fromkeys(workload.quantizable[::every], fmt)
    parts = memory_parts(workload, plan, options)
    assert sum(parts.values()) == pytest.approx(peak_memory_bytes(workload, plan, options), abs=1)
    assert min(parts.values()) >= 0


def test_parts_by_hand() -> None:
    module = nn.Linear(1024, 512, bias=False, device="meta")
    workload = trace(module, torch.empty(1, 1024, device="meta"), 16)
    count = 1024 * 512

    def part(name: str, **options: str) -> float:
        return memory_parts(workload, {}, StepOptions(**options))[name]  # type: ignore[arg-type]

    assert part("weights") == count * (4 + 2)
    assert part("gradients") == count * 4
    assert [part("optimizer", optimizer=rule) / count for rule in ("sgd", "momentum", "adam")] == [0, 4, 8]
    assert [part("noise", framework=name) / count for name in ("fused", "eager")] == [0, 4]
    assert part("output_gradients") == 16 * 512 * 2
    assert part("example_gradients") == 0
    assert part("example_gradients", clipping="hooks") == 16 * count * 4
    assert part("quantized_inputs") == 0
    plan = {workload.quantizable[0]: "float8_e4m3fn"}
    codes = memory_parts(workload, plan, StepOptions())
    assert codes["quantized_inputs"] == 16 * 1024
    assert codes["output_gradients"] == 16 * 512
    assert part("activations") - codes["activations"] == 16 * 1024 * 2
