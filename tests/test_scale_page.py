"""The plan for many devices quotes the cost model: here it is asked again."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dpquant.models import build_model, example_input
from hwmodels.cost import estimate
from hwmodels.planner import analysis_seconds
from hwmodels.profile import load_profile
from hwmodels.workload import trace

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def test_the_modelled_figures_are_those_of_the_cost_model() -> None:
    page, h200 = PAGE.read_text(), load_profile("h200")
    with torch.device("meta"):
        model = build_model("resnet50", num_classes=1000)
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]+) ms \| (\d+) % \|$", page, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [256, 64, 16, 4]
    for batch, whole, step_ms, share in rows:
        workload = trace(model, example_input("resnet50"), int(batch))
        step_s = estimate(workload, {}, h200, method="dp-sgd", clipping="bookkeeping", framework="fused").step_s
        assert f"{step_s * 1e3:.1f}" == step_ms
        assert int(whole.replace(",", "")) == 1000 * int(batch)
        assert int(share) == round(100 * 0.9e-3 / (0.9e-3 + step_s))
    policies = [{layer: "fp8"} for layer in workload.quantizable]
    found = [analysis_seconds(workload, h200, policies, size) for size in (256, 256 // 8, 1)]
    quoted = re.search(
        r"\*\*Analysis\.\*\* (\d+) forward .*? (\d+) ms by .*? (\d+) ms on 8.*? at (\d+) ms", page, re.DOTALL
    )
    assert quoted is not None
    assert quoted.groups() == (str(len(policies) + 1), *(f"{seconds * 1e3:.0f}" for seconds in found))
