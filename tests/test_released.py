import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant.analysis import estimate
from dpquant.data import DataSettings, load_data
from dpquant.engine import DPQuantEngine
from dpquant.released import ReleasedMoments, combine, loss_impacts, observe, relative, squared_errors
from dpquant.schedule import draw_order
from dpquant.sensitivity import AnalysisSettings, layer_policies, loss_differences
from emulation.errors import InputError
from emulation.gemms import geometry
from emulation.layers import quantizable_layers, quantize_model, set_plan
from emulation.precision import layer_precision


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantize_model(nn.Sequential(nn.Conv2d(2, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)))


def test_observing_averages_then_forgets():
    gradients = [torch.tensor([float(i), 2.0 * i]) for i in range(5)]
    moments = None
    for g in gradients:
        moments = observe(moments, {"w": g})
    stacked = torch.stack(gradients)
    assert moments.steps == 5
    assert torch.allclose(moments.mean["w"], stacked.mean(0))
    assert torch.allclose(moments.square["w"], (stacked**2).mean(0))
    short = None
    for g in gradients:
        short = observe(short, {"w": g}, horizon=2)
    assert short.mean["w"][0] == pytest.approx(0.5 * 4 + 0.25 * 3 + 0.125 * 2 + 0.125 * 0.5)
    assert gradients[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fmt", ["luq_fp4", "fp8", "mxfp4", "nvfp4", "int8"])
def test_squared_errors_are_those_of_the_layers_own_forward_and_a_share_for_its_inputs(fmt):
    model = net()
    errors = squared_errors(model, fmt)
    shares = set()
    for name, layer in quantizable_layers(model).items():
        set_plan(model, {name: fmt})
        x = torch.zeros(1, *((2, 6, 6) if isinstance(layer, nn.Conv2d) else (128,)))
        _, quantized = layer.precision.output_operands(x, layer.weight, geometry(layer), lambda *_: None)
        for_inputs = errors[name] - (quantized - layer.weight).detach().square()
        share = for_inputs.sum() / layer.weight.detach().square().sum()
        torch.testing.assert_close(for_inputs, share * layer.weight.detach().square(), rtol=1e-3, atol=1e-6)
        shares.add(round(float(share), 6))
    assert len(shares) == 1, "the same for all layers: nothing of their inputs is known"
    assert 0 < shares.pop() < 0.05


def test_a_wider_format_has_smaller_impacts():
    model = net()
    generator = torch.Generator().manual_seed(1)
    moments = None
    for _ in range(50):
        draws = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        moments = observe(moments, draws)
    found = {
        fmt: loss_impacts(moments, squared_errors(model, fmt), noise_std=0.0, expected_batch_size=8)
        for fmt in ("luq_fp4", "fp8")
    }
    assert all(found["luq_fp4"][name] > 4 * found["fp8"][name] > 0 for name in quantizable_layers(model))


def test_the_estimate_is_unbiased_for_a_quadratic_loss():
    # per-example gradients g = m + s * z, Poisson batches, Gaussian noise: expected 1/2 sum((m^2 + s^2) e^2)
    generator = torch.Generator().manual_seed(2)
    width, batch, examples, noise = 6, 50, 1000, 0.05
    mean, spread = torch.linspace(-0.1, 0.1, width), torch.linspace(0.5, 1.5, width)
    gradients = mean + spread * torch.randn(examples, width, generator=generator)
    error = {"l": torch.linspace(0.2, -0.3, width).square()}
    fisher = (gradients.double() ** 2).mean(0)
    # Poisson sampling at rate q keeps a share 1 - q of the variance
    expected = float(0.5 * (1 - batch / examples) * (fisher * error["l"]).sum())
    found = []
    for _ in range(200):
        moments = None
        for _ in range(20):
            taken = torch.rand(examples, generator=generator) < batch / examples
            released = gradients[taken].sum(0) / batch + noise * torch.randn(width, generator=generator)
            moments = observe(moments, {"l.weight": released})
        found.append(loss_impacts(moments, error, noise_std=noise, expected_batch_size=batch)["l"])
    found = torch.tensor(found)
    assert abs(found.mean() - expected) < 4 * found.std() / 200**0.5
    assert found.std() < abs(expected)


def test_the_noise_alone_has_no_impact():
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(200):
        moments = None
        for _ in range(10):
            moments = observe(moments, {"l.weight": 0.3 * torch.randn(40, generator=generator)})
        found.append(loss_impacts(moments, {"l": torch.ones(40)}, noise_std=0.3, expected_batch_size=4)["l"])
    found = torch.tensor(found)
    assert abs(found.mean()) < 4 * found.std() / 200**0.5


def test_two_estimates_combine_on_one_scale():
    probe, other = {"a": 1.0, "b": 3.0}, {"a": 300.0, "b": 100.0}
    assert combine(probe, probe) == probe
    assert combine(probe, {"a": 100.0, "b": 300.0}) == pytest.approx(probe)
    assert combine(probe, other) == pytest.approx({"a": 2.0, "b": 2.0})
    assert combine(probe, {"a": 5.0, "b": 5.0}) == pytest.approx({"a": 1.5, "b": 2.5})


@given(st.lists(st.floats(-1, 1).filter(lambda v: v == 0 or abs(v) > 1e-6), max_size=8), st.floats(1e-9, 1e9))
def test_what_clipping_scales_by_does_not_matter_to_the_draw(values, clip):
    impacts = {f"l{i}": value for i, value in enumerate(values)}
    found = relative(impacts)
    assert relative({name: clip * value for name, value in impacts.items()}) == pytest.approx(found)
    assert max(map(abs, found.values()), default=1.0) == (1.0 if any(values) else 0.0) or not values
    assert all(math.copysign(1, found[name]) == math.copysign(1, impacts[name]) for name in impacts if impacts[name])


def test_a_small_clipping_norm_leaves_dpquant_its_preference():
    """Clipped at 0.1 all impacts are some millionths: times beta they would be nothing beside the draw's noise."""
    moments = ReleasedMoments(
        steps=9,
        mean=dict.fromkeys(("a.weight", "b.weight"), torch.zeros(2, 2)),
        square={"a.weight": torch.full((2, 2), 1e-7), "b.weight": torch.full((2, 2), 1e-9)},
    )
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    quantize_model(module)
    with torch.no_grad():
        for layer in module.values():
            layer.weight.copy_(torch.tensor([[0.3, -0.7], [0.9, 0.1]]))
    found = estimate(
        AnalysisSettings(estimator="released"), None, moments, module, layer_policies(["a", "b"], ["luq_fp4"]),
        noise_std=0.0, expected_batch_size=10,
    )  # fmt: skip
    assert found == pytest.approx({"a": 1.0, "b": 0.01}, rel=1e-4)
    first = [draw_order("dpquant", ["a", "b"], sensitivities=found, beta=200.0, epoch=e, seed=0)[0] for e in range(200)]
    assert first.count("b") == 200


def test_too_little_to_go_by_is_refused():
    one = ReleasedMoments(steps=1, mean={"l.weight": torch.ones(1)}, square={"l.weight": torch.ones(1)})
    with pytest.raises(InputError, match="steps=1"):
        loss_impacts(one, {"l": torch.ones(1)}, noise_std=0.0, expected_batch_size=1)
    two = ReleasedMoments(steps=2, mean=one.mean, square=one.square)
    with pytest.raises(InputError, match="layer='k'"):
        loss_impacts(two, {"k": torch.ones(1)}, noise_std=0.0, expected_batch_size=1)


# --- whether it is any good


def trained(seed):
    """A small network with wide and narrow layers, privately trained: the engine, the module, its training data."""
    torch.manual_seed(seed)
    widths = (64, 128, 8, 64, 64, 16, 10)
    module = nn.Sequential(
        *(m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU()))
    )[:-1]  # fmt: skip
    x, y = (t[:1408] for t in load_data(DataSettings(name="digits", root=None, split=None)).train.tensors)
    data = TensorDataset(x.flatten(1), y)
    engine = DPQuantEngine(
        hardware="h100", basis="peak", fraction=0.0, format="mxfp4", seed=seed, accountant="rdp",
        analysis=AnalysisSettings(estimator="released"),
    )  # fmt: skip
    module, optimizer, criterion, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=128), noise_multiplier=1.0, target_delta=1e-4, epochs=15,
        max_grad_norm=1.0, sample_rate=1 / 11, expected_batch_size=128,
    )  # fmt: skip
    for _ in engine.epochs():
        for inputs, labels in loader:
            optimizer.zero_grad()
            criterion(module(inputs), labels).backward()
            optimizer.step()
    return engine, module, data.tensors


@pytest.mark.usefixtures("one_thread")
def test_it_ranks_layers_as_their_true_impact_does_and_the_first_order_term_does_not():
    found, first_order = [], []
    for seed in range(4):
        engine, module, batch = trained(seed)
        moments = engine._evidence.moments
        for fmt in ("luq_fp4", "mxfp4", "nvfp4"):
            policies = list(layer_policies(engine.workload.quantizable, [fmt]).values())
            true = loss_differences(module, engine._parts.losses, batch, policies).mean(0)
            errors = squared_errors(module, fmt)
            nearest = replace(layer_precision(fmt).weight, rounding="nearest_even")
            released = loss_impacts(moments, errors, noise_std=1 / 128, expected_batch_size=128)
            found.append(spearmanr(list(released.values()), true)[0])
            weights = {n: module.get_parameter(f"{n}.weight").detach() for n in released}
            quantized = {n: nearest.fake_quantize(w, axis=1) for n, w in weights.items()}
            slopes = [float((moments.mean[f"{n}.weight"] * (quantized[n] - w)).sum()) for n, w in weights.items()]
            first_order.append(spearmanr(slopes, true)[0])
    print(f"rank correlation {np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})", np.mean(first_order))
    assert np.mean(found) > 0.4
    assert np.mean(first_order) < 0.1
