"""The library door: what it promises about steps, budgets, targets and randomness, seen on a small network."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant import privacy
from dpquant.engine import DPQuantEngine
from dpquant.sensitivity import AnalysisSettings
from emulation.errors import InputError
from emulation.layers import quantizable_layers

SIZE, BATCH = 64, 16


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def data(size: int = SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)
    )


def engine(**changes: Any) -> DPQuantEngine:
    given: dict[str, Any] = {"hardware": "b200", "basis": "peak", "fraction": 0.5, "seed": 0, "accountant": "rdp"}
    given |= {"analysis": AnalysisSettings(estimator="probe", interval=2, expected_batch_size=16)}
    return DPQuantEngine(**(given | changes))


def private(
    e: DPQuantEngine, module: nn.Module | None = None, dataset: TensorDataset | None = None, **changes: Any
) -> tuple[nn.Module, Any, Any, DataLoader[Any]]:
    module = network() if module is None else module
    given: dict[str, Any] = {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=1.0),
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(dataset or data(), batch_size=BATCH),
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "epochs": 3,
        "max_grad_norm": 1.0,
        "sample_rate": BATCH / SIZE,
        "expected_batch_size": BATCH,
    }
    return e.make_private(**(given | changes))


def step(parts: tuple[nn.Module, Any, Any, Any], x: Tensor, y: Tensor) -> None:
    module, optimizer, criterion, _ = parts
    optimizer.zero_grad()
    criterion(module(x), y).backward()
    optimizer.step()


def run(e: DPQuantEngine, parts: tuple[nn.Module, Any, Any, Any]) -> list[Any]:
    epochs = []
    for epoch in e.epochs():
        epochs.append(epoch)
        for x, y in parts[3]:
            step(parts, x, y)
    return epochs


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# --- what a step does


def test_a_step_moves_by_minus_the_clipped_sum_over_the_expected_batch() -> None:
    e = engine(scheduler="full")
    module = network()
    parts = private(e, module, noise_multiplier=0.0, max_grad_norm=0.5)
    twin = network()
    for _ in e.epochs():
        for x, y in parts[3]:
            before = weights(module)
            step(parts, x, y)
            total = torch.zeros_like(before)
            for i in range(len(x)):
                twin.load_state_dict(dict(zip(twin.state_dict(), _split(before, twin), strict=True)))
                twin.zero_grad()
                nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
                gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])  # type: ignore[union-attr]
                total += gradient * min(1.0, 0.5 / (gradient.norm().item() + 1e-6))
            torch.testing.assert_close(before - weights(module), total / BATCH, rtol=1e-4, atol=1e-6)
        break
    assert e.epsilon() == float("inf")


def _split(flat: Tensor, module: nn.Module) -> list[Tensor]:
    parts = flat.split([p.numel() for p in module.parameters()])
    return [v.view_as(p) for v, p in zip(parts, module.parameters(), strict=True)]


def test_the_noise_has_the_size_that_was_accounted() -> None:
    """With a loss that no parameter changes, what a step adds is the noise alone."""
    e = engine(scheduler="full")
    module = network()
    parts = private(e, module, noise_multiplier=2.0, max_grad_norm=0.5)
    moves = []
    for _ in e.epochs():
        for x, _y in parts[3]:
            before = weights(module)
            parts[1].zero_grad()
            (parts[0](x).sum() * 0).backward()
            parts[1].step()
            moves.append(weights(module) - before)
    noise = torch.cat(moves)
    expected = 2.0 * 0.5 / BATCH
    assert abs(noise.std().item() / expected - 1) < 5 / (2 * len(noise)) ** 0.5
    assert abs(noise.mean().item()) < 5 * expected / len(noise) ** 0.5
    assert not torch.equal(moves[0], moves[1])


# --- the budget


def test_nothing_planned_exceeds_the_target_and_nothing_is_left_unused() -> None:
    e = engine(scheduler="dpquant")
    parts = private(e, noise_multiplier=None, target_epsilon=5.0)
    epochs = run(e, parts)
    assert [epoch.analysed for epoch in epochs] == [True, False, True]
    assert e.ledger.steps("analysis") == e.analyses_planned == 2
    assert e.ledger.steps("training") == 3 * e.steps_per_epoch == 12
    assert 4.9 < e.epsilon() <= 5.0
    assert e.epsilon() == pytest.approx(privacy.epsilon(e.plan_ledger, 1e-3, "rdp"))
    assert e.epsilon() > privacy.epsilon(e.ledger.only("training"), 1e-3, "rdp")


def test_a_step_beyond_the_plan_is_refused() -> None:
    e = engine(scheduler="pls")
    parts = private(e, epochs=1)
    run(e, parts)
    with pytest.raises(RuntimeError, match="exceed the budget"):
        step(parts, *data()[:4])


def test_what_is_recorded_is_recorded_before_its_noise() -> None:
    e = engine(scheduler="dpquant")
    parts = private(e)
    seen: list[tuple[str, bool]] = []
    before = weights(parts[0])
    e.write_ahead(
        privacy.PrivacyLedger(),
        lambda event: seen.append((event.mechanism, torch.equal(weights(parts[0]), before))),
    )
    epochs = e.epochs()
    next(epochs)
    assert [m for m, _ in seen] == ["analysis"]
    x, y = next(iter(parts[3]))
    step(parts, x, y)
    assert seen[-1] == ("training", True)
    assert not torch.equal(weights(parts[0]), before)


def test_a_ledger_behind_the_checkpoint_is_refused() -> None:
    e = engine(scheduler="pls")
    parts = private(e, epochs=1)
    run(e, parts)
    with pytest.raises(InputError, match="less than the checkpoint"):
        e.write_ahead(privacy.PrivacyLedger(), lambda event: None)


# --- the schedule


def test_quantization_is_on_inside_the_loader_and_off_outside() -> None:
    e = engine(scheduler="pls", fraction=0.5)
    module = network()
    parts = private(e, module)

    def on() -> set[str]:
        return {n for n, layer in quantizable_layers(module).items() if layer.precision is not None}

    for epoch in e.epochs():
        assert on() == set()
        for x, y in parts[3]:
            assert on() == set(epoch.plan)
            assert len(epoch.plan) == 2
            step(parts, x, y)
        assert on() == set()


@pytest.mark.parametrize(("scheduler", "distinct"), [("full", 1), ("static", 1), ("pls", 5)])
def test_schedulers_differ_in_what_they_redraw(scheduler: str, distinct: int) -> None:
    e = engine(scheduler=scheduler)
    private(e, epochs=20)
    plans = {frozenset(epoch.plan) for epoch in e.epochs()}
    assert len(plans) >= distinct
    assert distinct > 1 or len(plans) == 1
    assert (plans == {frozenset()}) == (scheduler == "full")


def test_layers_chosen_by_name_are_quantized_in_every_epoch() -> None:
    e = engine(scheduler="static", fraction=None, layers=["3"], format="fp8")
    private(e, epochs=3)
    assert [dict(epoch.plan) for epoch in e.epochs()] == [{"3": "fp8"}] * 3
    with pytest.raises(InputError, match="layers='conv7'"):
        private(engine(scheduler="static", fraction=None, layers=["conv7"]))


def test_the_draw_prefers_layers_that_were_found_insensitive() -> None:
    e = engine(scheduler="dpquant", fraction=0.25, beta=1000.0)
    private(e)
    e.sensitivities = dict.fromkeys(e.workload.quantizable, 1.0) | {"6": 0.0}
    assert set(e._draw(1)) == {"6"}


@pytest.mark.parametrize("scheduler", ["annealed", "cooldown", "delayed"])
@pytest.mark.parametrize("goal", [{"fraction": 0.5}, {"fraction": None, "target_speedup": 1.02}])
def test_a_resumed_run_goes_on_choosing_the_same_epochs(scheduler: str, goal: dict[str, Any]) -> None:
    def made() -> tuple[DPQuantEngine, Any]:
        e = engine(scheduler=scheduler, **goal)
        return e, private(e, epochs=6)

    whole, parts = made()
    plans = [dict(epoch.plan) for epoch in run(whole, parts)]
    full, most = plans[::-1][: 1 + (scheduler != "cooldown")], plans[:2]
    if scheduler == "delayed":
        full, most = most, full
    assert not any(full)
    assert most[0]
    if "target_speedup" in goal and scheduler != "cooldown":
        assert most[0].keys() == most[1].keys() == whole.reach.plan.keys()
    for stop in (1, 3, 5):
        resumed, parts = made()
        resumed.load_state(whole.state(stop))
        assert [dict(epoch.plan) for epoch in run(resumed, parts)] == plans[stop:]


@pytest.mark.parametrize("settings", [{"scheduler": "pls"}, {"scheduler": "static"}, {"scheduler": "dpquant"}])
@pytest.mark.parametrize("format", ["luq_fp4", ["bf16", "fp8", "nvfp4"]])
def test_the_whole_run_meets_its_target_within_a_hundredth(settings: dict[str, Any], format: Any) -> None:
    analysis = AnalysisSettings(estimator="probe", interval=3, expected_batch_size=16)
    e, epochs = engine(fraction=None, target_speedup=1.03, format=format, analysis=analysis, **settings), 7
    parts = private(e, epochs=epochs, sample_rate=0.05, expected_batch_size=256)
    seen = run(e, parts)
    full_s = e.estimate({}).step_s
    analyses = e.ledger.steps("analysis")
    assert analyses == (3 if settings["scheduler"] == "dpquant" else 0)
    spent_s = sum(e.steps_per_epoch * epoch.estimate.step_s for epoch in seen) + analyses * e.modelled.analysis_s()
    assert 1 <= epochs * e.steps_per_epoch * full_s / spent_s / 1.03 < 1.01
    assert len({epoch.speedup for epoch in seen}) > 1  # epochs differ
    assert max(epoch.speedup for epoch in seen) > 1.03 * 1.01  # and alone miss it by more
    for done in range(1, epochs):  # and a run that stops early has met it too
        assert done / sum(1 / epoch.speedup for epoch in seen[:done]) >= 1.03 * (1 - 1e-9)


def test_a_resumed_run_makes_up_for_the_same_seconds() -> None:
    def made() -> tuple[DPQuantEngine, Any]:
        e = engine(scheduler="pls", fraction=None, target_speedup=1.02)
        return e, private(e, epochs=6)

    whole, parts = made()
    plans = [dict(epoch.plan) for epoch in run(whole, parts)]
    assert len({len(plan) for plan in plans}) > 1
    for stop in range(1, 6):
        resumed, parts = made()
        resumed.load_state(whole.state(stop))
        assert [dict(epoch.plan) for epoch in run(resumed, parts)] == plans[stop:]


def test_a_layer_of_a_ladder_takes_one_format_and_all_are_analysed() -> None:
    e = engine(scheduler="dpquant", format=["bf16", "fp8", "nvfp4"], fraction=0.75)
    module = network()
    parts = private(e, module)
    seen = run(e, parts)
    names = {f"{layer}:{fmt}" for layer in e.workload.quantizable for fmt in ("fp8", "nvfp4")}
    assert all(epoch.sensitivities is not None and set(epoch.sensitivities) == names for epoch in seen)
    assert all(len(epoch.plan) == 3 and set(epoch.plan.values()) <= {"fp8", "nvfp4"} for epoch in seen)
    assert {fmt for epoch in seen for fmt in epoch.plan.values()} == {"fp8", "nvfp4"}
    assert e.ledger.steps("analysis") == 2  # one release each, however many policies


def test_a_ladder_puts_what_is_insensitive_into_the_lowest_format() -> None:
    e = engine(scheduler="dpquant", format=["fp8", "nvfp4"], fraction=1.0, beta=1e4)
    private(e)
    first, *others = e.workload.quantizable
    e.sensitivities = {f"{n}:fp8": 0.0 for n in others} | {f"{n}:nvfp4": 1.0 for n in others}
    e.sensitivities |= {f"{first}:fp8": 1.0, f"{first}:nvfp4": 0.0}
    assert dict(e._draw(1)) == {first: "nvfp4"} | dict.fromkeys(others, "fp8")


def test_a_ladder_of_nothing_or_of_unknown_formats_is_refused() -> None:
    with pytest.raises(InputError, match="fp5"):
        private(engine(format=["fp8", "fp5"]))
    with pytest.raises(InputError, match="holds no format"):
        engine(format=[])


def test_the_analyses_count_against_the_speedup() -> None:
    with_them, without = engine(scheduler="dpquant"), engine(scheduler="pls")
    private(with_them)
    private(without)
    assert with_them.reach.max_speedup < without.reach.max_speedup
    assert with_them.speedup({}) < 1.0


# --- randomness


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    ends = []
    for seed in (0, 0, 1):
        e = engine(scheduler="dpquant", seed=seed)
        module = network()
        torch.manual_seed(torch.seed() % 2**31)  # the global state has no say
        run(e, private(e, module))
        ends.append(weights(module))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_without_a_seed_every_run_is_another() -> None:
    ends = []
    for _ in range(2):
        e = engine(scheduler="full", seed=None)
        module = network()
        run(e, private(e, module))
        ends.append(weights(module))
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("probe", ["forward", "training"])
def test_virtual_batches_change_nothing_analyses_included(probe: Any) -> None:
    ends, released, sizes = [], [], []
    for part in (None, 5):
        e = engine(
            scheduler="dpquant",
            fraction=1.0,
            analysis=AnalysisSettings(estimator="probe", expected_batch_size=24, probe=probe, interval=1),
        )
        module = network()
        parts = private(e, module, max_physical_batch_size=part, epochs=2, noise_multiplier=0.1)
        seen: list[int] = []
        module[0].register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(len(inputs[0])))
        released.append([list((epoch.sensitivities or {}).values()) for epoch in run(e, parts)])
        ends.append(weights(module))
        sizes.append(max(seen))
        assert e.ledger.steps("analysis") == 2
        assert e.ledger.steps("training") == 2 * e.steps_per_epoch
    assert sizes[1] <= 5 < sizes[0]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(released[0]), torch.tensor(released[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's hook on the first layer
def test_hooks_and_bookkeeping_agree() -> None:
    ends = []
    for clipping in ("bookkeeping", "hooks"):
        e = engine(scheduler="full")
        module = network()
        run(e, private(e, module, clipping=clipping, epochs=1))
        ends.append(weights(module))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "dpqant"}, "unknown scheduler='dpqant'"),
        ({"hardware": "b20"}, "b20"),
        ({"format": "fp5"}, "fp5"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": None}, "one of target_speedup, fraction and layers"),
        ({"target_speedup": 1.2}, "one of target_speedup, fraction and layers"),
        ({"layers": ["0"]}, "one of target_speedup, fraction and layers"),
        ({"fraction": None, "layers": ["0"], "scheduler": "pls"}, "scheduler='pls'"),
        ({"fraction": None, "target_speedup": 0.5}, "target_speedup=0.5"),
        ({"fraction": None, "target_speedup": float("nan")}, "target_speedup=nan"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        private(engine(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_epsilon": 3.0}, "one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": None}, "one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": None, "target_epsilon": -1.0}, "epsilon"),
        ({"target_delta": 0.0, "noise_multiplier": None, "target_epsilon": 1.0}, "delta"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"epochs": 0}, "epochs=0"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"clipping": "ghost"}, "ghost"),
        ({"sample_rate": None, "expected_batch_size": SIZE + 1}, "larger than the data"),
    ],
)
def test_bad_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        private(engine(scheduler="pls"), **changes)


def test_batch_normalisation_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(InputError, match=r"'1' \(BatchNorm2d\) mixes examples"):
        private(engine(), module)


def test_half_precision_parameters_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"parameter '0.weight' is torch.bfloat16"):
        private(engine(), network().bfloat16())


def test_a_target_out_of_reach_is_refused_before_anything_is_spent() -> None:
    e = engine(fraction=None, target_speedup=50.0)
    with pytest.raises(InputError, match=r"target speedup 50.0x is out of reach on b200 with luq_fp4: at most \d"):
        private(e)
    assert e.ledger.events == ()


def test_a_sample_rate_from_the_data_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dpquant"):
        private(engine(scheduler="pls"), sample_rate=None, expected_batch_size=None)
    assert "becomes public" in caplog.text
    caplog.clear()
    private(engine(scheduler="pls"))
    assert caplog.text == ""


def test_an_epoch_is_frozen() -> None:
    e = engine(scheduler="pls")
    private(e)
    with pytest.raises(dataclasses.FrozenInstanceError):
        next(e.epochs()).index = 3  # type: ignore[misc]


def test_the_chips_own_accumulation_changes_the_bits_and_little_else() -> None:
    ends = []
    for accumulate in ("float32", "hardware"):
        e = engine(hardware="h100", scheduler="pls", fraction=1.0, format="fp8", accumulate=accumulate)
        module = network()
        parts = private(e, module, noise_multiplier=0.0, epochs=1)
        run(e, parts)
        ends.append(weights(module))
    assert not torch.equal(ends[0], ends[1])
    moved = (ends[0] - weights(network())).norm()
    assert (ends[0] - ends[1]).norm() < 0.2 * moved


def test_a_chip_whose_addition_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="accumulate='hardware': how mi355x adds is not publicly described"):
        engine(hardware="mi355x", accumulate="hardware")


# --- a loop that was left, and noise that is never the same twice


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
def test_a_batch_left_half_way_counts_none_of_its_examples_twice(clipping: str) -> None:
    def total(dataset: TensorDataset, left: bool) -> tuple[Tensor, int]:
        e, module = engine(scheduler="full"), network()
        parts = private(
            e, module, dataset, noise_multiplier=0.0, sample_rate=1.0, expected_batch_size=8, epochs=1,
            max_physical_batch_size=3, clipping=clipping,
        )  # fmt: skip
        before = weights(module)
        for again in range(1 + left):
            for _ in e.epochs():
                for part, (x, y) in enumerate(parts[3]):
                    step(parts, x, y)
                    if left and not again and part == 1:  # two parts of three
                        break
                if left and not again:
                    break
        return 8 * (before - weights(module)), e.ledger.steps("training")

    whole = data(8)
    fewer = TensorDataset(*(t[1:] for t in whole.tensors))
    straight, interrupted = (total(whole, left) for left in (False, True))
    assert straight[1] == interrupted[1] == 1
    torch.testing.assert_close(interrupted[0], straight[0])
    assert (interrupted[0] - total(fewer, True)[0]).norm() <= 1 + 1e-5


def test_an_epoch_entered_again_is_not_analysed_again() -> None:
    e = engine(scheduler="dpquant")
    private(e, epochs=2)
    first = next(e.epochs())
    again = next(e.epochs())
    assert first.analysed
    assert not again.analysed
    assert again.sensitivities == first.sensitivities
    assert e.ledger.steps("analysis") == 1


def noises(e: DPQuantEngine) -> list[Tensor]:
    """The first numbers of every stream that a run draws noise or batches from."""
    known = []
    for epoch in range(3):
        for purpose in ("noise", "sampling", "analysis-noise", "analysis-sampling"):
            known.append(torch.randn(64, generator=e._stream(purpose, epoch)))
    return known


def test_the_draws_of_a_run_are_those_of_its_named_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step and every analysis has a stream of its own; no two are alike, seeded or secret."""
    asked: list[tuple[str, int]] = []
    named = DPQuantEngine._stream

    def spied(self: DPQuantEngine, purpose: str, position: int, device: Any = "cpu") -> torch.Generator:
        asked.append((purpose, position))
        return named(self, purpose, position, device)

    monkeypatch.setattr(DPQuantEngine, "_stream", spied)
    e = engine(scheduler="dpquant", analysis=AnalysisSettings(estimator="probe", interval=1, expected_batch_size=16))
    run(e, private(e, epochs=3))
    steps = [(p, s) for s in range(e.step) for p in ("noise", "sampling")]
    analyses = [(p, epoch) for epoch in range(3) for p in ("analysis-noise", "analysis-sampling")]
    assert sorted(asked) == sorted(steps + analyses)
    for seed in (0, None):
        drawn = torch.stack(noises(engine(seed=seed)))
        assert torch.corrcoef(drawn).triu(1).abs().max() < 0.7


def test_steps_that_count_again_have_other_batches_and_other_noise() -> None:
    first = engine()
    private(first)
    written = first.ledger.record(first._budget.training(2))  # two steps into the first epoch it was stopped
    same, other = engine(), engine()
    for e, state in ((same, first.state(0)), (other, first.state(0) | {"arithmetic": "another"})):
        private(e)
        e.load_state(state)
        e.write_ahead(written, lambda event: None)
    drawn, repeated, apart = map(noises, (first, same, other))
    assert all(map(torch.equal, drawn, repeated))  # the same release, counted once
    assert not any(map(torch.equal, drawn, apart))
    once_more = engine()
    private(once_more)
    once_more.load_state(other.state(0))  # stopped once more, with the arithmetic of its checkpoint
    once_more.write_ahead(other.ledger, lambda event: None)
    assert all(map(torch.equal, apart, noises(once_more)))


def test_a_state_brings_its_root_to_noise_and_batches_alike() -> None:
    known, fresh = engine(seed=None), engine(seed=None)
    for e in (known, fresh):
        private(e)
    before = [batch for batch, _ in private_batches(known)]
    fresh.load_state(known.state(0))
    after = [batch for batch, _ in private_batches(fresh)]
    assert len(before) == len(after) > 1
    assert all(map(torch.equal, before, after))


def private_batches(e: DPQuantEngine) -> list[tuple[Tensor, Tensor]]:
    return list(e._parts.loader)


@pytest.mark.parametrize(
    ("layer", "repeats"),
    [(nn.Dropout(0.1), False), (nn.Dropout(0.0), True), (nn.RReLU(), False), (nn.ReLU(), True)],
)
def test_a_forward_that_draws_repeats_no_step_to_the_bit(layer: nn.Module, repeats: bool) -> None:
    e = engine()
    private(e, nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 4)))
    assert (e._arithmetic() is not None) == repeats


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_delta": 0.0}, "target_delta=0.0"),
        ({"target_delta": 2.0}, "target_delta=2.0"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size=0"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_spent(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        private(engine(), **wrong)


def test_a_declared_rate_keeps_the_number_of_examples_out_of_the_ledger() -> None:
    e = engine(scheduler="dpquant")
    private(e, dataset=data(60), sample_rate=0.25, expected_batch_size=None)  # of the loader's 16
    assert e.dataset_size == 64
    assert next(event for event in e.plan_ledger.events if event.mechanism == "analysis").sample_rate == 0.25
