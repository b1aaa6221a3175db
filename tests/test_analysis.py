import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant import privacy
from dpquant.analysis import probe
from dpquant.engine import DPQuantEngine
from dpquant.sensitivity import AnalysisSettings, layer_policies, loss_differences
from emulation.layers import quantize_model

SIZE, BATCH = 96, 16


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4),
        )  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SIZE, 1, 8, 8, generator=generator), torch.randint(4, (SIZE,), generator=generator)
    return TensorDataset(x, y)


def private(settings, epochs=4, module=None):
    engine = DPQuantEngine(
        hardware="b200",
        basis="peak",
        fraction=0.5,
        seed=0,
        accountant="rdp",
        scheduler="dpquant",
        analysis=AnalysisSettings(**{"estimator": "probe", "interval": 2, "expected_batch_size": 24} | settings),
    )
    module = network() if module is None else module
    parts = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data(), batch_size=BATCH),
        noise_multiplier=1.0,
        target_delta=1e-3,
        epochs=epochs,
        max_grad_norm=1.0,
        sample_rate=BATCH / SIZE,
        expected_batch_size=BATCH,
    )
    return engine, parts


def run(engine, parts, stop_after=None):
    module, optimizer, criterion, loader = parts
    seen = []
    for epoch in engine.epochs():
        seen.append(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
        if stop_after == epoch.index:
            break
    return seen


@pytest.mark.parametrize(
    ("settings", "known", "analyses"),
    [
        ({"estimator": "probe"}, [True, True, True, True], 2),
        ({"estimator": "released"}, [False, True, True, True], 0),
        ({"estimator": "both"}, [True, True, True, True], 2),
        ({"probe": "training", "probe_steps": 2}, [True, True, True, True], 2),
    ],
)
def test_every_estimator_gives_a_value_per_layer_and_spends_what_it_says(settings, known, analyses):
    engine, parts = private(settings)
    epochs = run(engine, parts)
    assert [e.sensitivities is not None for e in epochs] == known
    assert all(set(e.sensitivities) == {"0", "4", "6"} for e in epochs if e.sensitivities is not None)
    assert engine.ledger.steps("analysis") == engine.analyses_planned == analyses
    assert engine.ledger.steps("training") == 4 * engine.steps_per_epoch
    changed = [e.sensitivities for e in epochs]
    assert (changed[2] != changed[3]) == (settings.get("estimator") in ("released", "both"))


@pytest.mark.parametrize("estimator", ["probe", "released", "both"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(estimator):
    whole, parts = private({"estimator": estimator})
    run(whole, parts)
    stopped, first_parts = private({"estimator": estimator})
    run(stopped, first_parts, stop_after=1)
    resumed, second_parts = private({"estimator": estimator})
    second_parts[0].load_state_dict(first_parts[0].state_dict())
    resumed.load_state(stopped.state(2))
    run(resumed, second_parts)
    assert resumed.sensitivities == whole.sensitivities
    for a, b in zip(parts[0].parameters(), second_parts[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["forward", "training"])
def test_an_analysis_does_not_move_the_weights(kind):
    module = network()
    engine, _ = private({"probe": kind}, module=module)
    before = [p.clone() for p in module.parameters()]
    assert next(engine.epochs()).analysed
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


def test_a_training_probe_is_charged_its_time():
    forward, _ = private({"probe": "forward"})
    training, _ = private({"probe": "training"})
    assert training.speedup({}) < forward.speedup({}) < 1


def test_a_sample_in_parts_releases_what_it_would_whole():
    module, examples = quantize_model(network()), data()
    policies = list(layer_policies(["0", "4"], ["luq_fp4"]).values())
    settings = AnalysisSettings(expected_batch_size=10, noise_multiplier=0.0, max_norm=0.05)

    def losses(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    def collate(indices):
        sizes.append(len(indices))
        return [t[indices] for t in examples.tensors]

    sizes: list[int] = []
    sample = torch.arange(0, SIZE, 4)
    found = probe(module, losses, sample, collate, policies, settings, torch.Generator(), max_grad_norm=1.0)
    assert sizes == [20, 4]
    rows = loss_differences(module, losses, collate(sample), policies)
    expected = (rows * (0.05 / rows.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0) / 10
    assert torch.allclose(found, expected, atol=1e-6)
    empty = probe(module, losses, sample[:0], collate, policies, settings, torch.Generator(), max_grad_norm=1.0)
    assert empty.tolist() == [0.0, 0.0]


def test_steps_counted_twice_end_the_run_at_the_last_affordable_one(monkeypatch):
    def budgeted():
        engine = DPQuantEngine(
            hardware="b200", basis="peak", fraction=0.5, seed=0, accountant="rdp",
            analysis=AnalysisSettings(interval=2, expected_batch_size=24, noise_multiplier=4.0),
        )  # fmt: skip
        module = network()
        parts = engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data(), batch_size=BATCH),
            target_epsilon=8.0,
            target_delta=1e-3,
            epochs=4,
            max_grad_norm=1.0,
            sample_rate=BATCH / SIZE,
            expected_batch_size=BATCH,
        )
        return engine, parts

    monkeypatch.setattr(DPQuantEngine, "_arithmetic", lambda self: None)
    stopped, parts = budgeted()
    run(stopped, parts, stop_after=1)
    crashed = stopped.ledger.record(stopped._budget.training(4))  # four steps of the third epoch, after the checkpoint
    resumed, parts = budgeted()
    resumed.load_state(stopped.state(2))
    resumed.write_ahead(crashed, lambda event: None)
    epochs = run(resumed, parts)
    assert resumed.step == resumed.last_step < 4 * resumed.steps_per_epoch
    assert resumed.epsilon() <= 8.0
    one_more = resumed.ledger.record(resumed._budget.training(1))
    assert len(epochs) == 2
    assert privacy.epsilon(one_more, 1e-3, "rdp") > 8.0
