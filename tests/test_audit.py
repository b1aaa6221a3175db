import dataclasses
import math

import pytest
import torch
from torch import nn

from dpquant import analysis, audit, clipping, models, sensitivity
from dpquant.config import load_config
from dpquant.privacy import PrivacyEvent
from dpquant.spending import Spending
from emulation import layers
from emulation.errors import InputError
from emulation.layers import PRESETS, LayerPrecision, quantizable_layers
from emulation.quantizer import Quantizer

EXAMPLES = 16
NOISE = 0.5  # the quieter, the fewer trials tell a broken mechanism from a sound one: mu is 2 instead of 1
CONFIG = """
model: {{name: tiny}}
data: {{name: digits}}
hardware: {{profile: b200, basis: peak}}
format: {format}
schedule: {{scheduler: {scheduler}, fraction: 0.5}}
training: {{epochs: 2, batch_size: 64, dataset_size: 1437, optimizer: sgd, learning_rate: 0.5, max_grad_norm: {norm}}}
privacy: {{noise_multiplier: {noise}, target_delta: 1e-5}}
analysis: {{estimator: probe, interval: 1, noise_multiplier: {noise}, max_norm: 0.02, expected_batch_size: 64}}
seed: 0
"""


class Tiny(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", {**models.MODELS, "tiny": Tiny})

    def write(scheduler="dpquant", *, noise=NOISE, norm=1.0, fmt="luq_fp4"):
        path = tmp_path / "run.yaml"
        path.write_text(CONFIG.format(scheduler=scheduler, noise=noise, norm=norm, format=fmt))
        return load_config(path)

    return write


def audited(subject, trials=240):
    return audit.audit_mechanism(subject, trials=trials)


def both(subject):
    return subject.smaller, subject.bigger


# --- what is sound is not accused


@pytest.mark.parametrize("canary", ["mislabelled", "outlier", "blank", "overflow", "infinite"])
@pytest.mark.parametrize("mechanism", ["training", "analysis"])
def test_no_canary_moves_what_is_released_by_more_than_the_sensitivity(config, mechanism, canary):
    _, movement = audit.direction(audit.pair(config(), mechanism, canary, examples=EXAMPLES, seed=0))
    assert movement <= 1 + 1e-5


def test_no_canary_moves_an_analysis_that_trains_by_more_than_its_sensitivity(config):
    """Its vector of loss differences is clipped as one, and no mean over the sample: one example may turn it round."""
    trained = config().changed({("analysis", "probe"): "training", ("analysis", "probe_steps"): 2})
    for canary in ("mislabelled", "outlier"):
        subject = audit.pair(trained, "analysis", canary, examples=EXAMPLES, seed=0)
        assert subject.smaller.engine.analysis.probe == "training"
        _, movement = audit.direction(subject)
        assert movement <= 1 + 1e-5
    assert sensitivity.AnalysisSettings(probe="training", max_norm=0.1).sensitivity == 0.2
    assert sensitivity.AnalysisSettings(max_norm=0.1, expected_batch_size=50).sensitivity == pytest.approx(0.002)


def test_what_is_audited_is_the_configuration_given_and_not_its_file(config):
    given = config().changed({("training", "max_grad_norm"): 0.123})
    assert (
        both(audit.pair(given, "training", "blank", examples=4, seed=0))[1].config["training"]["max_grad_norm"] == 0.123
    )
    assert config()["training"]["max_grad_norm"] == 1.0


@pytest.mark.parametrize("mechanism", ["training", "analysis"])
def test_a_sound_mechanism_passes_and_is_nearly_worth_its_claim(config, mechanism):
    subject = audit.worst_canary(config(), mechanism, examples=EXAMPLES, seed=0)
    found = audited(subject, trials=400)
    assert not found.violated
    assert found.epsilon_claimed == pytest.approx(audit.gaussian_epsilon(1 / NOISE, 1e-5))
    assert found.epsilon_lower_bound > 0.4 * found.epsilon_claimed
    assert found.movement == pytest.approx(1, abs=1e-5)


def test_the_audited_step_quantizes_every_layer_and_leaves_the_weights(config):
    subject = audit.pair(config(), "training", "outlier", examples=EXAMPLES, seed=0)
    before = [p.clone() for p in subject.bigger.model.parameters()]
    seen = []
    subject.bigger.model.register_forward_hook(
        lambda m, *_: seen.append([layer.precision for layer in quantizable_layers(m).values()])
    )
    one, ledger = audit.release(subject.bigger, "training", 1)
    assert seen == [[PRESETS["luq_fp4"]] * 2]
    assert ledger.events == (PrivacyEvent(mechanism="training", noise_multiplier=NOISE, sample_rate=1.0),)
    assert all(torch.equal(p, q) for p, q in zip(before, subject.bigger.model.parameters(), strict=True))
    assert torch.equal(one, audit.release(subject.bigger, "training", 1)[0])
    assert not torch.equal(one, audit.release(subject.bigger, "training", 2)[0])


# --- planted defects are caught


@pytest.mark.parametrize("mechanism", ["training", "analysis"])
def test_half_the_noise_is_caught(config, monkeypatch, mechanism):
    subject = audit.pair(config(), mechanism, "outlier", examples=EXAMPLES, seed=0)
    if mechanism == "training":
        for training in both(subject):
            training.parts[1].noise_multiplier /= 2
    else:
        release = analysis.release
        monkeypatch.setattr(
            analysis,
            "release",
            lambda d, *, noise_multiplier, **k: release(d, noise_multiplier=noise_multiplier / 2, **k),
        )
    found = audited(subject)
    assert found.violated
    assert found.movement == pytest.approx(1, abs=0.05)


def test_twice_the_clipping_norm_is_caught(config, monkeypatch):
    factors = clipping.clip_factors
    monkeypatch.setattr(clipping, "clip_factors", lambda norms, bound: factors(norms, 2 * bound))
    found = audited(audit.pair(config(norm=0.2), "training", "outlier", examples=EXAMPLES, seed=0))
    assert found.movement == pytest.approx(2, abs=1e-3)
    assert found.violated


def test_twice_the_clipping_norm_of_the_analysis_is_caught(config, monkeypatch):
    clip_rows = sensitivity.clip_rows
    monkeypatch.setattr(sensitivity, "clip_rows", lambda differences, bound: clip_rows(differences, 2 * bound))
    found = audited(audit.pair(config(), "analysis", "outlier", examples=EXAMPLES, seed=0))
    assert found.movement == pytest.approx(2, abs=1e-3)
    assert found.violated


def quantize_as(monkeypatch, subject, precision):
    """Puts ``precision`` in the place of whatever the plan says, past the refusal of quantizers that mix examples."""
    monkeypatch.setattr(layers, "layer_precision", lambda entry: precision)
    for training in both(subject):
        for layer in quantizable_layers(training.model).values():
            layer.private = False


def test_scales_over_the_batch_are_caught(config, monkeypatch):
    subject = audit.pair(config(), "training", "outlier", examples=EXAMPLES, seed=0)
    fp4 = Quantizer("luq_fp4", granularity="tensor")
    quantize_as(monkeypatch, subject, LayerPrecision(name="tensor", weight=fp4, input=fp4, grad_output=fp4))
    found = audited(subject)
    assert found.movement > 1.5
    assert found.violated


def test_a_mean_loss_with_a_fixed_grid_is_caught(config, monkeypatch):
    # an output gradient starts at about 0.9 / n, and the grid rounds up from 1/16: for 14 examples, but not for 15
    subject = audit.pair(config(norm=0.05), "training", "mislabelled", examples=14, seed=0)
    weight = Quantizer("luq_fp4", granularity="tensor")
    fixed = Quantizer("float6_e2m3fn", scale_rule="none")
    quantize_as(monkeypatch, subject, LayerPrecision(name="fixed", weight=weight, input=fixed, grad_output=fixed))
    assert audit.direction(subject)[1] <= 1 + 1e-5  # the same grid is sound under a sum
    mean = nn.CrossEntropyLoss()
    runs = [dataclasses.replace(t, parts=(*t.parts[:2], mean, t.parts[3])) for t in both(subject)]
    found = audited(dataclasses.replace(subject, smaller=runs[0], bigger=runs[1]))
    assert found.movement > 1.5
    assert found.violated


def test_an_unrecorded_analysis_is_caught(config, monkeypatch):
    spend = Spending.spend
    monkeypatch.setattr(
        Spending, "spend", lambda self, event: spend(self, event) if event.mechanism == "training" else None
    )
    found = audited(audit.pair(config(), "analysis", "outlier", examples=EXAMPLES, seed=0))
    assert found.epsilon_claimed == 0
    assert found.violated


def test_an_example_that_poisons_the_release_is_caught_at_once(config, monkeypatch):
    monkeypatch.setattr(clipping, "clip_factors", lambda norms, bound: bound / norms)
    monkeypatch.setattr(
        clipping, "_weighted_sums", lambda found, f, *_: {c.parameter: c.weighted_sum(f) for c in found}
    )
    found = audited(audit.pair(config(), "training", "infinite", examples=EXAMPLES, seed=0))
    assert found.epsilon_lower_bound == math.inf
    assert found.violated


def test_a_run_without_analyses_has_none_to_audit(config):
    with pytest.raises(InputError, match="makes no analyses"):
        audit.pair(config("static"), "analysis", "outlier")


# --- a whole run


def test_a_whole_run_spends_less_than_it_claims(config):
    found = audit.audit_run(config(noise=1.0), count=200, epochs=2, seed=1)
    assert not found.violated
    assert 1 < found.epsilon_claimed < 100
    assert found.trials == 200


def test_a_whole_run_with_a_twentieth_of_its_noise_is_caught(config, monkeypatch):
    prepare = audit.train.prepare

    def quiet(*args, **options):
        training = prepare(*args, **options)
        training.parts[1].noise_multiplier /= 20
        return training

    monkeypatch.setattr(audit.train, "prepare", quiet)
    found = audit.audit_run(config(noise=4.0), count=200, epochs=2, seed=1)
    assert found.epsilon_claimed < found.epsilon_lower_bound
    assert found.violated


@pytest.mark.long
@pytest.mark.parametrize("mechanism", ["training", "analysis"])
def test_two_thousand_trials_of_the_demonstration(mechanism):
    config = load_config("digits")
    found = audit.audit_mechanism(audit.worst_canary(config, mechanism, examples=32, seed=0), trials=2000)
    assert not found.violated
    assert found.epsilon_lower_bound > 0.5 * found.epsilon_claimed
