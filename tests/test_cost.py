"""The cost model against arithmetic done by hand, against the profile's own GEMM times, and its laws."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_chip import rate, toy_chip

from dpquant.models import build_model, example_input
from emulation.errors import InputError
from hwmodels.cost import Estimate, StepModel, estimate
from hwmodels.dpsgd import demand
from hwmodels.gemm import gemm_rates, kernel_seconds
from hwmodels.gemm_arrays import Products, products_seconds
from hwmodels.memory import footprint, peak_memory_bytes
from hwmodels.profile import load_profile
from hwmodels.step import CLIPPINGS, FRAMEWORKS, PHASES, StepOptions
from hwmodels.workload import Workload, trace

TOY = toy_chip()
MICRO = 1e-6


@functools.cache
def traced(name: str, batch: int = 64, **options: object) -> Workload:
    with torch.device("meta"):
        model = build_model(name, **options)
    return trace(model, example_input(name), batch)


def linear(batch: int, features: int, out: int) -> Workload:
    return trace(nn.Sequential(nn.Linear(features, out, bias=False)), torch.zeros(1, features), batch)


def close(seconds: float, expected_us: float) -> None:
    assert seconds == pytest.approx(expected_us * MICRO, rel=1e-9)


# --- by hand: one linear layer [4096, 1024] -> 512; GEMM of 2 * 4096 * 1024 * 512 = 4,294,967,296 FLOPs


def test_plain_step_of_a_linear_layer_by_hand() -> None:
    found = estimate(linear(4096, 1024, 512), {}, TOY, method="sgd", basis="peak")
    close(found.phases["forward"], 42.94967296)  # 4.29 GFLOP at 100 TFLOP/s; its 13.6 MB take 13.6 us
    close(found.phases["grad_input"], 0)  # the first layer has none
    close(found.phases["weight_gradient"], 42.94967296)
    close(found.phases["optimizer_step"], 524288 * (4 + 4 + 4 + 2) / 1e6)  # gradient, weight read; weight, copy written
    close(found.phases["other"], 5 * 2 * 4096 * 512 / 1e6)  # log-softmax: forward 2, backward 3 passes of 2 bytes
    close(found.phases["quantization"], 0)
    close(found.phases["norm_and_clip"] + found.phases["noise"] + found.phases["launch"], 0)
    assert found.bound == "compute"


def test_memory_bound_linear_layer_by_hand() -> None:
    found = estimate(linear(8, 1024, 512), {}, TOY, method="sgd", basis="peak")
    close(found.phases["forward"], (8 * 1024 + 1024 * 512 + 8 * 512) * 2 / 1e6)
    close(found.phases["weight_gradient"], ((8 * 1024 + 8 * 512) * 2 + 1024 * 512 * 4) / 1e6)
    assert found.bound == "memory"


def test_quantized_linear_layer_by_hand() -> None:
    workload = linear(4096, 1024, 512)
    found = estimate(workload, {"0": "fp8"}, TOY, method="sgd", basis="peak")
    close(found.phases["forward"], 21.47483648)
    close(found.phases["weight_gradient"], 21.47483648)
    tensors = 4096 * 1024 + 4096 * 512 + 1024 * 512  # activation, output gradient, weight: each read and written once
    close(found.phases["quantization"], tensors * (2 + 1) / 1e6)
    blocks = estimate(workload, {"0": "nvfp4"}, TOY, method="sgd", basis="peak")
    close(blocks.phases["forward"], 10.73741824)
    # blocks run along the inner dimension: the activation is written once per product that reads it (2), the output
    # gradient and the weight have one reader each, for there is no input gradient
    written = 2 * 4096 * 1024 + 4096 * 512 + 1024 * 512
    close(blocks.phases["quantization"], (tensors * 2 + written * 4.5 / 8) / 1e6)


def test_private_step_of_a_linear_layer_by_hand() -> None:
    found = estimate(linear(4096, 1024, 512), {}, TOY, basis="peak")
    close(found.phases["norm_and_clip"], 2 * 4096 * (1024 + 512) / 1e6)  # |x|^2 |g|^2 of each example
    close(found.phases["noise"], 50 * 524288 / 1e6)  # 50 float32 operations a draw at 1 TFLOP/s
    close(found.phases["weight_gradient"], 42.94967296)
    hooks = estimate(linear(4096, 1024, 512), {}, TOY, basis="peak", clipping="hooks")
    gradients = 4096 * 524288 * 4
    moved = (4096 * 1024 + 4096 * 512) * 2 + gradients
    close(hooks.phases["weight_gradient"], moved / 1e6)  # 8.6 GB written: memory, not the 4.29 GFLOP
    close(hooks.phases["norm_and_clip"], 2 * gradients / 1e6)  # read for the norms and for the weighted sum
    eager = estimate(linear(4096, 1024, 512), {}, TOY, basis="peak", clipping="hooks", framework="eager")
    # the batch gradient thrown away, gradients in the network's own type, zeros written, gradients copied, the output's
    # gradient scaled
    written, scaled = gradients / 2, 2 * 2 * 4096 * 512
    expected = 42.94967296 + (moved - gradients + written + 3 * written + scaled) / 1e6
    close(eager.phases["weight_gradient"], expected)


# --- by hand: one convolution 3x3, 64 -> 32 channels, 16x16 pixels, stride 2, padding 1


def convolution(batch: int) -> Workload:
    model = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.Conv2d(64, 32, 3, 2, 1, bias=False), nn.Flatten())
    return trace(model, torch.zeros(1, 64, 16, 16), batch)


def layer_phase(workload: Workload, layer: str, phase: str, **options: object) -> float:
    model = StepModel(workload, TOY, basis="peak", **options)
    return float(model.prices(None).seconds[PHASES.index(phase), model.index[layer]])


def test_convolution_by_hand() -> None:
    work = convolution(32)
    flops = 2 * 32 * (8 * 8) * 32 * (64 * 9)
    image, result, weight = 32 * 64 * 256, 32 * 32 * 64, 32 * 64 * 9  # each pixel is read once, not nine times
    moved = (image + weight + result) * 2
    assert flops / 100 < moved  # in units of 1e-12 s: memory-bound
    close(layer_phase(work, "1", "forward", method="sgd"), moved / 1e6)
    close(layer_phase(work, "1", "grad_input", method="sgd"), moved / 1e6)
    close(layer_phase(work, "1", "weight_gradient", method="sgd"), ((image + result) * 2 + weight * 4) / 1e6)
    # T = 64 positions: 2 T^2 = 8192 < p d = 18432, so norms are Gram matrices [64, 64] of 576 and of 32 features
    gram = (2 * (32 * 64 * 576) * 2 + 2 * (32 * 64 * 32) * 2) / 1e6
    gram_flops = 2 * 32 * 64 * 64 * (576 + 32)
    assert gram_flops / 100 < gram * 1e6
    close(layer_phase(work, "1", "norm_and_clip", clipping="mixed"), gram)
    # the 1x1 layer has T = 256: 2 T^2 > p d = 4096, so each example's gradient is made, squared and dropped
    close(layer_phase(work, "0", "norm_and_clip", clipping="mixed"), ((32 * 64 * 256) * 2 * 2) / 1e6)
    # so does book-keeping, T (p + d) > p d, and makes the clipped sum anew from the same operands
    close(layer_phase(work, "0", "norm_and_clip"), ((32 * 64 * 256) * 2 * 2) / 1e6)
    close(layer_phase(work, "0", "weight_gradient"), ((32 * 64 * 256) * 2 * 2 + 4096 * 4) / 1e6)
    # with T = 4096 it keeps them: written once, read for the norms and for the weighted sum
    large = trace(nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.Flatten()), torch.zeros(1, 64, 64, 64), 32)
    kept = 32 * 4096 * 4
    close(layer_phase(large, "0", "weight_gradient"), ((32 * 64 * 4096) * 2 * 2 + kept) / 1e6)
    close(layer_phase(large, "0", "norm_and_clip"), 2 * kept / 1e6)


def test_eager_convolution_by_hand() -> None:
    work = convolution(32)
    image, result, weight = 32 * 64 * 256, 32 * 32 * 64, 32 * 64 * 9
    turned = 140 * (image + result)  # both activations into the other layout or out of it, at 1 TFLOP/s
    product = (image + weight + result) * 2
    close(layer_phase(work, "1", "forward", method="sgd", framework="eager"), (turned + product) / 1e6)
    wide = layer_phase(work, "1", "forward", method="sgd", framework="eager", baseline="float32")
    assert wide == layer_phase(work, "1", "forward", method="sgd", baseline="float32")  # no tensor cores, no turning
    patches = 32 * (64 * 9) * 64
    gradients = 32 * weight * 2  # as Opacus keeps them: in the network's own type
    batch = turned + (image + result) * 2 + weight * 4  # autograd's own, thrown away
    unfold = 4 * image * 2 + 250 * patches  # padded: filled, read, written, read again; the patches one by one
    each = (patches + result) * 2 + gradients
    expected = batch + unfold + each + 3 * gradients + 2 * 2 * result  # filled, copied; the output's gradient scaled
    close(layer_phase(work, "1", "weight_gradient", clipping="hooks", framework="eager"), expected / 1e6)


def test_eager_group_norm_by_hand() -> None:
    workload = trace(nn.Sequential(nn.GroupNorm(4, 16), nn.Flatten()), torch.zeros(1, 16, 8, 8), 32)
    elements, channels = 32 * 16 * 64, 32 * 16
    passes = 2 * 250 * elements + 3 * 250 * elements + 25_000 * channels
    close(layer_phase(workload, "0", "other", method="sgd", framework="eager"), passes / 1e6)
    for baseline in ("float32", "bfloat16"):  # such kernels take as long for two bytes as for four
        options = {"method": "sgd", "framework": "eager", "baseline": baseline}
        close(layer_phase(workload, "0", "other", **options), passes / 1e6)
    again = 2 * 250 * elements + 7 * 2 * elements  # Opacus normalises again; scaled, multiplied, summed twice
    close(layer_phase(workload, "0", "weight_gradient", clipping="hooks", framework="eager"), again / 1e6)


def test_graphs_replay_the_same_kernels_without_a_host() -> None:
    workload = traced("digits_cnn", 16)
    eager, graphs = (
        estimate(workload, {}, load_profile("h200"), framework=name, basis="calibrated") for name in ("eager", "graphs")
    )
    assert {k: v for k, v in eager.phases.items() if k != "launch"} == {
        k: v for k, v in graphs.phases.items() if k != "launch"
    }
    assert graphs.step_s < 0.5 * eager.step_s


# --- against other functions


@pytest.mark.parametrize("hardware", ["h100", "b200", "mi300x", "a100"])
@pytest.mark.parametrize("fmt", ["bfloat16", "float32", "float8_e4m3fn", "nvfp4", "luq_fp4"])
def test_a_linear_forward_pass_is_the_profiles_gemm(hardware: str, fmt: str) -> None:
    profile = load_profile(hardware)
    for batch, features, out in [(3, 5, 7), (256, 64, 64), (4096, 8192, 2048)]:
        workload = linear(batch, features, out)
        wide = fmt == "float32"
        plan = {} if wide else {"0": fmt}
        found = estimate(workload, plan, profile, basis="peak", baseline=fmt if wide else "bfloat16")
        assert found.phases["forward"] == pytest.approx(
            profile.gemm_seconds(batch, out, features, fmt, "peak"), rel=1e-12
        )


@settings(max_examples=100, deadline=None)
@given(m=st.integers(1, 40000), n=st.integers(1, 9000), k=st.integers(1, 70000), batch=st.integers(1, 300))
def test_the_gemm_model_on_arrays_is_the_gemm_model(m: int, n: int, k: int, batch: int) -> None:
    profile = load_profile("a100")
    assert profile.calibration is not None
    kernel, rates = profile.calibration.kernels["bfloat16"], gemm_rates(profile.rate("bfloat16"), profile)
    columns = {
        "m": m, "n": n, "k": k, "batch": batch,
        "operand_elements": batch * k * (m + n), "result_bytes": batch * m * n * 2,
    }  # fmt: skip
    products = Products(**{name: np.array([value, value], float) for name, value in columns.items()})
    expected = kernel_seconds(m, n, k, kernel, rates, batch=batch)
    assert products_seconds(products, kernel, rates) == pytest.approx([expected, expected], rel=1e-9)


def test_calibrated_linear_forward_pass_is_the_fitted_model() -> None:
    profile = load_profile("a100")
    assert profile.calibration is not None
    kernel, rates = profile.calibration.kernels["bfloat16"], gemm_rates(profile.rate("bfloat16"), profile)
    found = estimate(linear(512, 1024, 2048), {}, profile)
    assert found.basis == "calibrated"
    assert found.phases["forward"] == pytest.approx(kernel_seconds(512, 2048, 1024, kernel, rates), rel=1e-9)
    assert found.phases["launch"] > 0
    assert found.step_band_s is not None
    low, high = found.step_band_s
    products = found.phases["forward"] + found.phases["weight_gradient"]
    assert low == pytest.approx(found.step_s + products * math.expm1(kernel.band[0]))
    assert high == pytest.approx(found.step_s + products * math.expm1(kernel.band[1]))
    assert low < found.step_s < high
    assert not any("outside" in note for note in found.notes)
    assert found.step_s > estimate(linear(512, 1024, 2048), {}, profile, basis="peak").step_s


def test_calibrations_say_where_they_do_not_reach() -> None:
    profile = load_profile("a100")
    huge = estimate(linear(2**20, 4, 4), {"0": "int8"}, profile)
    assert any("products of the step have sizes outside" in note for note in huge.notes)
    assert any("int8 was not measured: its own peak, efficiencies of bfloat16 kernels" in n for n in huge.notes)
    sibling = dataclasses.replace(profile, name="a30", calibrated_on="a100")
    found = estimate(linear(64, 64, 64), {}, sibling)
    assert "a30 has no measurements of its own: calibrated on a100" in found.notes
    assert estimate(linear(64, 64, 64), {}, profile, basis="peak").step_band_s is None


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "digits_cnn"])
def test_flops_of_the_phases(name: str) -> None:
    workload = traced(name, 8)

    def flops(phase: str, **options: object) -> float:
        work = demand(workload, StepOptions(**options))
        rows = np.zeros(len(work.product))
        for cell, start, stop in zip(work.cells, work.starts, [*work.starts[1:], len(rows)], strict=True):
            rows[start:stop] = cell // len(workload.layers) == PHASES.index(phase)
        return float((rows * work.repeats * work.products.flops[work.product]).sum())

    backward = workload.backward_flops
    for options in ({"method": "sgd"}, {"clipping": "bookkeeping"}, {"clipping": "hooks"}):
        assert flops("forward", **options) == workload.forward_flops
        assert flops("grad_input", **options) + flops("weight_gradient", **options) == backward
    for clipping in ("ghost", "mixed"):
        assert flops("second_backward", clipping=clipping) == backward
        assert flops("weight_gradient", clipping=clipping) == 0
    thrown_away = flops("weight_gradient", clipping="hooks", framework="eager")
    assert thrown_away == 2 * flops("weight_gradient", clipping="hooks")
    # the rule 2 T^2 < p d compares memory (Bu et al.); FLOPs may come out either way, but not far
    assert flops("norm_and_clip", clipping="mixed") <= 1.05 * flops("norm_and_clip", clipping="ghost")


def test_physical_batches_repeat_the_passes_and_not_the_noise() -> None:
    workload = traced("resnet18", 64)
    whole = estimate(workload, {}, TOY, basis="peak")
    parts = estimate(workload, {}, TOY, basis="peak", physical_batch_size=16)
    one = estimate(workload.at(16), {}, TOY, basis="peak")
    assert parts.phases["forward"] == pytest.approx(4 * one.phases["forward"])
    assert parts.phases["noise"] == whole.phases["noise"]
    assert parts.phases["optimizer_step"] == whole.phases["optimizer_step"]
    added = 3 * 3 * 4 * workload.parameters / 1e12  # three times: two sums read, one written
    assert parts.phases["norm_and_clip"] == pytest.approx(4 * one.phases["norm_and_clip"] + added)
    assert parts.peak_memory_bytes < whole.peak_memory_bytes


# --- memory


def test_memory_by_hand() -> None:
    workload = linear(16, 1024, 512)
    weights = 524288 * (4 + 4 + 2)  # weight, gradient, bfloat16 copy
    kept = 16 * (1024 + 512) * 2  # the input, and the loss's probabilities
    options = StepOptions(method="sgd")
    assert peak_memory_bytes(workload, {}, options) == pytest.approx(weights + kept, rel=1e-4)  # plus the labels
    hooks = StepOptions(clipping="hooks")
    assert peak_memory_bytes(workload, {}, hooks) - peak_memory_bytes(workload, {}, options) == 16 * 524288 * 4
    book = StepOptions()
    assert peak_memory_bytes(workload, {}, book) - peak_memory_bytes(workload, {}, options) == 16 * 512 * 2
    adam = StepOptions(method="sgd", optimizer="adam")
    assert peak_memory_bytes(workload, {}, adam) - peak_memory_bytes(workload, {}, options) == 2 * 524288 * 4
    codes = peak_memory_bytes(workload, {"0": "float8_e4m3fn"}, options) - peak_memory_bytes(workload, {}, options)
    assert codes == -16 * 1024  # the input's codes in place of its bfloat16 values


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_memory_is_a_line_over_the_batch(clipping: str, framework: str) -> None:
    workload, options = traced("resnet18"), StepOptions(clipping=clipping, framework=framework)
    line = footprint(workload, {}, options)
    assert line.at(100) == peak_memory_bytes(workload.at(100), {}, options)
    most = line.most_examples(80e9)
    assert line.at(most) <= 80e9 < line.at(most + 1)
    assert line.most_examples(1.0) == 0


# --- laws

PLANS = st.sampled_from(["float8_e4m3fn", "nvfp4", "luq_fp4", "mxfp8_e4m3"])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["digits_cnn", "transformer", "resnet18"]),
    batch=st.integers(1, 4000),
    clipping=st.sampled_from(CLIPPINGS),
    framework=st.sampled_from(FRAMEWORKS),
    method=st.sampled_from(["dp-sgd", "sgd"]),
    optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
    fmt=PLANS,
    physical=st.none() | st.integers(1, 500),
    seed=st.integers(0, 2**32 - 1),
)
def test_laws_of_every_estimate(
    name: str, batch: int, clipping: str, framework: str, method: str, optimizer: str, fmt: str,
    physical: int | None, seed: int,
) -> None:  # fmt: skip
    workload = traced(name).at(batch)
    chosen = np.random.default_rng(seed).random(len(workload.quantizable)) < 0.5
    plan = {layer: fmt for layer, yes in zip(workload.quantizable, chosen, strict=True) if yes}
    options = {
        "method": method, "clipping": clipping, "framework": framework, "optimizer": optimizer, "basis": "peak",
        "physical_batch_size": physical,
    }  # fmt: skip
    found = estimate(workload, plan, TOY, **options)
    assert all(s >= 0 and math.isfinite(s) for s in (*found.phases.values(), *found.layers.values()))
    assert sum(found.phases.values()) == pytest.approx(found.step_s, rel=1e-9)
    assert sum(found.layers.values()) == pytest.approx(found.step_s, rel=1e-9)
    assert list(found.phases) == list(PHASES)
    assert found.speedup == pytest.approx(found.baseline_s / found.step_s)
    assert 100 * found.step_s <= found.energy_joules * (1 + 1e-9) <= 700 * found.step_s * (1 + 1e-8)
    plain = estimate(workload, {}, TOY, **options)
    assert plain.speedup == 1.0
    assert plain.energy_joules == plain.baseline_energy_joules == pytest.approx(found.baseline_energy_joules)
    assert plain.step_s == pytest.approx(found.baseline_s)
    larger = estimate(workload.at(batch + 1), plan, TOY, **options)
    if physical is None:
        assert larger.step_s >= found.step_s * (1 - 1e-12)
        assert larger.peak_memory_bytes >= found.peak_memory_bytes
    if method == "dp-sgd":
        public = estimate(workload, plan, TOY, **(options | {"method": "sgd"}))
        if framework == "fused":
            assert public.step_s <= found.step_s * (1 + 1e-12)


def test_quantizing_a_layer_changes_no_other_layer() -> None:
    workload = traced("resnet18")
    plain, one = (estimate(workload, plan, TOY, basis="peak") for plan in ({}, {"layer2.0.conv1": "nvfp4"}))
    assert {n for n in plain.layers if plain.layers[n] != one.layers[n]} == {"layer2.0.conv1"}


def test_a_mixed_plan_is_made_of_its_columns() -> None:
    workload = traced("resnet18")
    names = workload.quantizable
    plan = {names[3]: "fp8", names[4]: "nvfp4", names[5]: "fp8"}
    mixed = estimate(workload, plan, TOY, basis="peak")
    alone = {fmt: estimate(workload, dict.fromkeys(names, fmt), TOY, basis="peak") for fmt in ("fp8", "nvfp4")}
    plain = estimate(workload, {}, TOY, basis="peak")
    for name in mixed.layers:
        source = alone[plan[name]] if name in plan else plain
        assert mixed.layers[name] == pytest.approx(source.layers[name], rel=1e-12)


def test_eager_hosts_hold_small_models_up() -> None:
    workload = traced("digits_cnn", 16)
    eager = estimate(workload, {}, TOY, basis="peak", framework="eager")
    assert eager.bound == "launch"
    assert eager.phases["launch"] > 0.9 * eager.step_s
    big = estimate(traced("resnet18", 4096), {}, TOY, basis="peak", framework="eager")
    assert big.phases["launch"] < 1e-3 * big.step_s
    assert big.bound != "launch"


# --- what is said of formats and chips


def test_formats_that_a_chip_lacks_are_said_aloud() -> None:
    workload = linear(64, 64, 64)
    native = estimate(workload, {"0": "nvfp4"}, TOY, basis="peak")
    assert native.native
    assert native.notes == ()
    fallen = estimate(workload, {"0": "mxfp8"}, TOY, basis="peak")
    assert not fallen.native
    assert any("mxfp8_e4m3 falls back to bfloat16 on toy" in note for note in fallen.notes)
    assert fallen.speedup < 1  # emulation costs its casts and gains nothing
    timed = estimate(workload, {"0": "luq_fp4"}, TOY, basis="peak")
    assert not timed.native
    assert any("luq_fp4 is timed as nvfp4" in note for note in timed.notes)


def test_more_memory_than_there_is_is_said_aloud() -> None:
    found = estimate(traced("resnet18", 4096), {}, TOY, basis="peak", clipping="hooks")
    assert found.peak_memory_bytes > 80e9
    assert any("GB of memory, toy has 80.0 GB" in note for note in found.notes)


def test_what_the_trace_could_not_count_is_said_aloud() -> None:
    class Sorts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values

    workload = trace(nn.Sequential(nn.Linear(3, 3), Sorts()), torch.zeros(1, 3), 4)
    assert any("not counted: aten.sort" in note for note in estimate(workload, {}, TOY).notes)


def test_no_energy_where_no_power_is_published() -> None:
    found = estimate(linear(4, 4, 4), {}, toy_chip(power=None))
    assert found.energy_joules is None
    assert found.baseline_energy_joules is None
    assert isinstance(found, Estimate)


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda w: estimate(w, {"1": "fp8"}, TOY), "layer '1' of the plan is not quantizable", "0"),
        (lambda w: estimate(w, {"0": "fp9"}, TOY), "fp9", "fp8"),
        (lambda w: estimate(w, {"0": "int8"}, TOY), "format='int8' has no rate on toy", None),
        (lambda w: estimate(w, {}, TOY, basis="calibrated"), "toy has no calibration", "peak"),
        (lambda w: estimate(w, {}, TOY, basis="paper"), "unknown basis='paper'", "peak"),
        (lambda w: estimate(w, {}, TOY, clipping="hook"), "unknown clipping='hook'", "hooks"),
        (lambda w: estimate(w, {}, TOY, method="dpsgd"), "unknown method='dpsgd'", "dp-sgd"),
        (lambda w: estimate(w, {}, TOY, framework="lazy"), "unknown framework='lazy'", "eager"),
        (lambda w: estimate(w, {}, TOY, optimizer="adm"), "unknown optimizer='adm'", "adam"),
        (lambda w: estimate(w, {}, TOY, physical_batch_size=0), "physical_batch_size=0", None),
        (lambda w: estimate(w, {}, TOY, baseline="float16"), "format='float16' has no rate on toy", None),
        (lambda w: StepModel(w, TOY, cliping="hooks"), "unknown option cliping='hooks'", "clipping"),
        (lambda w: estimate(w.at(0), {}, TOY), "batch_size=0", None),
    ],
)
def test_bad_input(call, message: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        call(linear(4, 4, 4))
    assert message in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")


def test_casts_of_an_eager_framework_by_hand() -> None:
    workload = linear(4096, 1024, 512)
    chip = toy_chip(formats={**TOY.formats, "float8_e4m3fn": rate("float8_e4m3fn", 200e12, layouts=("TN",))})
    x, g, w = 4096 * 1024, 4096 * 512, 1024 * 512
    once = estimate(workload, {"0": "fp8"}, TOY, method="sgd", basis="peak", framework="eager")
    close(once.phases["quantization"], (x + g + w) * (2 + 2 + 1) / 1e6)  # largest value; read; written
    turned = estimate(workload, {"0": "fp8"}, chip, method="sgd", basis="peak", framework="eager")
    close(turned.phases["quantization"], ((x + g + w) * (2 + 2 + 1) + x * (1 + 1)) / 1e6)  # the codes of x, transposed


def test_a_layer_in_the_baseline_format_is_not_quantized() -> None:
    work = trace(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.zeros(1, 64), 32)
    for name in ("a100", "b200"):
        profile = load_profile(name)
        same = estimate(work, dict.fromkeys(work.quantizable, "bf16"), profile)
        assert same.speedup == 1.0
        assert same.step_s == estimate(work, {}, profile).step_s
