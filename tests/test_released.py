import pytest
import torch
from torch import nn

from dpquant.released import ReleasedMoments, combine, loss_impacts, observe, weight_errors
from emulation.errors import InputError
from emulation.gemms import geometry
from emulation.layers import quantizable_layers, quantize_model, set_plan


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
def test_weight_errors_are_those_of_the_layers_own_forward(fmt):
    model = net()
    errors = weight_errors(model, fmt)
    for name, layer in quantizable_layers(model).items():
        set_plan(model, {name: fmt})
        x = torch.zeros(1, *((2, 6, 6) if isinstance(layer, nn.Conv2d) else (128,)))
        _, quantized = layer.precision.output_operands(x, layer.weight, geometry(layer), lambda *_: None)
        assert torch.equal(errors[name], (quantized - layer.weight).detach())
        assert errors[name].abs().max() > 0


def test_a_wider_format_has_smaller_impacts():
    model = net()
    generator = torch.Generator().manual_seed(1)
    moments = None
    for _ in range(50):
        draws = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        moments = observe(moments, draws)
    found = {
        fmt: loss_impacts(moments, weight_errors(model, fmt), noise_std=0.0, expected_batch_size=8)
        for fmt in ("luq_fp4", "fp8")
    }
    assert all(found["luq_fp4"][name] > 4 * found["fp8"][name] > 0 for name in quantizable_layers(model))


def test_the_estimate_is_unbiased_for_a_quadratic_loss():
    # per-example gradients g = m + s * z, Poisson batches, Gaussian noise: expected m.e + 1/2 sum((m^2 + s^2) e^2)
    generator = torch.Generator().manual_seed(2)
    width, batch, examples, noise = 6, 50, 1000, 0.05
    mean, spread = torch.linspace(-0.1, 0.1, width), torch.linspace(0.5, 1.5, width)
    gradients = mean + spread * torch.randn(examples, width, generator=generator)
    error = {"l": torch.linspace(0.2, -0.3, width)}
    e, fisher = error["l"].double(), (gradients.double() ** 2).mean(0)
    # Poisson sampling at rate q keeps a share 1 - q of the variance
    expected = float((gradients.double().mean(0) * e).sum() + 0.5 * (1 - batch / examples) * (fisher * e**2).sum())
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


def test_too_little_to_go_by_is_refused():
    one = ReleasedMoments(steps=1, mean={"l.weight": torch.ones(1)}, square={"l.weight": torch.ones(1)})
    with pytest.raises(InputError, match="steps=1"):
        loss_impacts(one, {"l": torch.ones(1)}, noise_std=0.0, expected_batch_size=1)
    two = ReleasedMoments(steps=2, mean=one.mean, square=one.square)
    with pytest.raises(InputError, match="layer='k'"):
        loss_impacts(two, {"k": torch.ones(1)}, noise_std=0.0, expected_batch_size=1)
