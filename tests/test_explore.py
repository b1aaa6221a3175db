"""Curves over the cost model: their ends, their order, and the searches against a scan."""

import functools

import pytest
import torch
from toy_chip import toy_chip

from dpquant.models import build_model, example_input
from emulation.errors import InputError
from hwmodels import planner
from hwmodels.cost import StepModel, estimate
from hwmodels.explore import break_even, pareto, sweep
from hwmodels.profile import load_profile
from hwmodels.workload import Workload, trace

TOY = toy_chip()


@functools.cache
def traced(name: str, batch: int = 256) -> Workload:
    with torch.device("meta"):
        model = build_model(name)
    return trace(model, example_input(name), batch)


def test_pareto_runs_from_nothing_to_everything() -> None:
    workload = traced("resnet18")
    points = pareto(workload, TOY, "nvfp4", draws=40, basis="peak")
    everything = estimate(workload, dict.fromkeys(workload.quantizable, "nvfp4"), TOY, basis="peak")
    assert [p.quantized for p in points] == list(range(22))
    assert points[0].best == points[0].drawn == points[0].static_low == 1.0
    assert points[-1].best == pytest.approx(everything.speedup)
    assert points[-1].static_high == pytest.approx(everything.speedup)
    assert points[-1].best_joules == pytest.approx(everything.energy_joules)
    for point in points:
        assert point.static_low <= point.drawn * (1 + 1e-9)
        assert point.drawn <= point.static_high * (1 + 1e-9)
        assert point.static_high <= point.best * (1 + 1e-9)
    assert max(p.best for p in points) == pytest.approx(planner.reach(workload, TOY, "nvfp4", basis="peak").max_speedup)
    assert pareto(workload, TOY, "nvfp4", draws=40, basis="peak") == points


def test_break_even_is_where_a_scan_finds_it() -> None:
    workload = traced("resnet18")
    found = break_even(workload, load_profile("h100"), "fp8", largest=4096, basis="peak")

    def pays(batch: int) -> bool:
        model = StepModel(workload.at(batch), load_profile("h100"), basis="peak")
        return model.step_s(dict.fromkeys(workload.quantizable, "float8_e4m3fn")) <= model.step_s({})

    if found.batch_size is None:
        assert not pays(4096)
    else:
        assert pays(found.batch_size)
        assert found.batch_size == 1 or not pays(found.batch_size - 1)
    assert found.largest_tried == 4096
    assert found.first_layer_batch_size is not None
    assert found.batch_size is None or found.first_layer_batch_size <= found.batch_size


def test_a_fallback_never_breaks_even() -> None:
    found = break_even(traced("resnet18"), TOY, "mxfp8", largest=1000, basis="peak")
    assert found.batch_size is None
    assert found.first_layer_batch_size is None
    assert found.largest_tried == 512
    assert found.speedup_at_largest < 1


def test_small_batches_do_not_pay_on_a_calibrated_chip() -> None:
    """Where a kernel has fixed costs, casting small tensors costs more than small products can gain."""
    profile = load_profile("a100")
    found = break_even(traced("digits_cnn"), profile, "nvfp4", largest=1024)
    assert found.batch_size is None


def test_sweep_is_estimate_at_each_batch() -> None:
    workload = traced("digits_cnn")
    rows = list(sweep(workload, TOY, ["fp8", "nvfp4"], [16, 64], basis="peak"))
    assert [(name, e.batch_size) for name, e in rows] == [
        ("float8_e4m3fn", 16), ("nvfp4", 16), ("float8_e4m3fn", 64), ("nvfp4", 64),
    ]  # fmt: skip
    plan = dict.fromkeys(workload.quantizable, "nvfp4")
    assert rows[3][1] == estimate(workload.at(64), plan, TOY, basis="peak")


def test_bad_input() -> None:
    with pytest.raises(InputError, match="largest=0"):
        break_even(traced("digits_cnn"), TOY, "nvfp4", largest=0, basis="peak")
    with pytest.raises(InputError, match="batch_size=0"):
        list(sweep(traced("digits_cnn"), TOY, ["nvfp4"], [0], basis="peak"))
