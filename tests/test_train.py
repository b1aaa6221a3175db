"""Runs from a configuration: what is written, what is refused, and that a stopped run ends as if it never stopped."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from dpquant import ledger_file
from dpquant.config import load_config
from dpquant.rundir import EpochRecord, RunFolder, load_checkpoint, load_run
from dpquant.train import Training, evaluate, prepare, train
from emulation.errors import InputError

CONFIG = """\
model: {name: digits_cnn}
data: {name: digits}
hardware: {profile: b200, basis: peak}
format: luq_fp4
schedule: {scheduler: dpquant, fraction: 0.5}
training: {epochs: 4, batch_size: 150, dataset_size: 1500, learning_rate: 0.5, max_grad_norm: 1.0}
privacy: {target_epsilon: 8.0, target_delta: 1e-4, accountant: rdp}
analysis: {estimator: probe, interval: 2, expected_batch_size: 64}
seed: 3
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def write(tmp_path: Path, text: str = CONFIG) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


def start(tmp_path: Path, name: str, text: str = CONFIG) -> tuple[Training, RunFolder]:
    config = load_config(write(tmp_path, text))
    training = prepare(config)
    return training, RunFolder.create(tmp_path / name, config=config.data, facts=training.facts)


def timeless(records: tuple[EpochRecord, ...]) -> list[EpochRecord]:
    return [dataclasses.replace(r, wall_s=0.0, analysis_wall_s=0.0) for r in records]


def state(folder: Path) -> tuple[dict[str, Any], list[EpochRecord], str]:
    """All that a finished run leaves, but for how long things took."""
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    ledger = ledger_file.read_ledger(folder / "ledger.jsonl").to_json_lines()
    return checkpoint, timeless(load_run(folder).records), ledger


def same(a: tuple[dict[str, Any], list[EpochRecord], str], b: tuple[dict[str, Any], list[EpochRecord], str]) -> bool:
    return equal(a[0], b[0]) and a[1:] == b[1:]


def equal(a: Any, b: Any) -> bool:
    """Plain data and tensors, to the bit: weights, the optimizer's state, the engine's."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    training, folder = start(tmp_path, "run")
    with folder:
        yielded = list(train(training, folder))
    assert list(load_run(folder.path).records) == yielded
    return folder.path


def test_a_run_learns_within_its_budget_and_writes_everything_down(undisturbed: Path) -> None:
    run = load_run(undisturbed)
    assert run.complete
    assert [r.epoch for r in run.records] == [1, 2, 3, 4]
    assert [r.epsilon for r in run.records] == sorted(r.epsilon for r in run.records)
    assert 7.9 < run.records[-1].epsilon <= 8.0
    assert 0 < run.records[-1].epsilon_analysis < run.records[-1].epsilon
    assert all(len(r.quantized) == 3 and r.steps == 10 for r in run.records)
    assert run.records[-1].test_accuracy is not None
    assert run.records[-1].test_accuracy > 0.2  # ten classes
    ledger = ledger_file.read_ledger(undisturbed / "ledger.jsonl", run.run_id)
    assert (ledger.steps("training"), ledger.steps("analysis")) == (40, 2)


def test_a_run_that_stops_between_epochs_ends_the_same(tmp_path: Path, undisturbed: Path) -> None:
    training, folder = start(tmp_path, "run")
    with folder:
        for record in train(training, folder):
            if record.epoch == 2:
                break
    _finish(folder.path)
    assert same(state(folder.path), state(undisturbed))


def test_a_run_that_stops_inside_an_epoch_ends_the_same(tmp_path: Path, undisturbed: Path) -> None:
    training, folder = start(tmp_path, "run")
    training.engine._before_noise = _stop_after(training.engine._before_noise, 17)  # type: ignore[method-assign]
    training.parts[1].before_noise = training.engine._before_noise
    with folder, pytest.raises(KeyboardInterrupt):
        list(train(training, folder))
    assert len(folder.records()) == 1
    assert ledger_file.read_ledger(folder.ledger_path).steps("training") == 20  # to the end of the epoch, in one write
    _finish(folder.path)
    assert same(state(folder.path), state(undisturbed))


def test_a_run_without_a_seed_goes_on_from_its_secret_root(tmp_path: Path) -> None:
    training, folder = start(tmp_path, "run", CONFIG.replace("seed: 3\n", "").replace("epochs: 4", "epochs: 2"))
    with folder:
        next(train(training, folder))
        before = load_checkpoint(folder.checkpoint_path)
    _finish(folder.path)
    after = load_checkpoint(folder.checkpoint_path)
    assert before["engine"]["root"] == after["engine"]["root"] > 1 << 128
    assert [before["engine"]["epoch"], after["engine"]["epoch"]] == [1, 2]
    assert not equal(before["model"], after["model"])


def test_a_run_with_a_ladder_adamw_and_a_target_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """What else a checkpoint must hold: the optimizer's moments, averages of releases, and the modelled seconds."""
    text = (
        CONFIG.replace("format: luq_fp4", "format: [fp8, nvfp4]")
        .replace("epochs: 4", "epochs: 3, optimizer: adamw, weight_decay: 0.01")
        .replace("learning_rate: 0.5", "learning_rate: 0.005")
        .replace("fraction: 0.5", "target_speedup: 1.03")
        .replace("estimator: probe", "estimator: both")
    )
    training, folder = start(tmp_path, "whole", text)
    with folder:
        whole = list(train(training, folder))
    assert {fmt for record in whole for fmt in record.quantized.values()} <= {"fp8", "nvfp4"}
    assert all(len(record.sensitivities or {}) == 2 * len(training.facts.layers) for record in whole)
    steps_s = sum(record.steps * record.baseline_step_s / record.speedup for record in whole)
    reached = sum(record.steps * record.baseline_step_s for record in whole) / steps_s
    assert 1 <= reached / 1.03 < 1.01
    training, stopped = start(tmp_path, "stopped", text)
    with stopped:
        next(train(training, stopped))
    _finish(stopped.path)
    assert same(state(stopped.path), state(folder.path))
    moments = load_checkpoint(stopped.path / "checkpoint.pt")["optimizer"]["state"]
    assert all(values[key].dtype == torch.float32 for values in moments.values() for key in ("exp_avg", "exp_avg_sq"))


def _stop_after(step: Any, count: int) -> Any:
    taken = iter(range(count))

    def limited() -> Any:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return step()

    return limited


def _finish(path: Path) -> None:
    with RunFolder.resume(path) as folder:
        saved = folder.load_checkpoint()
        assert saved is not None
        list(train(prepare(load_config(path / "config.yaml"), root=saved["engine"]["root"]), folder))


def test_the_guard_sees_a_run_that_ended_otherwise(tmp_path: Path, undisturbed: Path) -> None:
    training, folder = start(tmp_path, "run", CONFIG.replace("seed: 3", "seed: 4"))
    with folder:
        list(train(training, folder))
    assert not same(state(folder.path), state(undisturbed))


def test_evaluation_is_in_full_precision(tmp_path: Path) -> None:
    training = prepare(load_config(write(tmp_path)))
    loss, accuracy = evaluate(training.parts[0], training.splits.test)
    images, labels = training.splits.test.tensors
    outputs = training.model(images)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((outputs.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        ("batch_size: 150", "batch_size: 15000", "larger than the data", 6),
        ("target_delta: 1e-4", "target_delta: 0.01", "is not below 1/1500", 7),
        ("name: digits_cnn", "name: digits_cn", "unknown model", 1),
        ("name: digits}", "name: digitz}", "unknown data set", 2),
        ("profile: b200", "profile: b20", "b20", 3),
        ("format: luq_fp4", "format: luq_fp5", "luq_fp5", 4),
        ("fraction: 0.5", "target_speedup: 9.0", "target speedup 9.0x is out of reach on b200", 5),
        ("target_epsilon: 8.0", "target_epsilon: 0.0001", "target_epsilon", 7),
        ("name: digits_cnn", "name: digits_cnn, options: {num_classes: 5}", "num_classes=5 is below the 10", 1),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, old: str, new: str, message: str, line: int
) -> None:
    assert old in CONFIG
    with pytest.raises(InputError, match=message) as caught:
        start(tmp_path, "run", CONFIG.replace(old, new))
    assert caught.value.line == line
    assert not (tmp_path / "run").exists()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    training, folder = start(tmp_path, "run")
    (folder.path / "checkpoint.pt").write_bytes((undisturbed / "checkpoint.pt").read_bytes())
    with folder, pytest.raises(InputError, match="another run"):
        list(train(training, folder))


def test_other_data_are_refused(tmp_path: Path, undisturbed: Path) -> None:
    """Steps that are taken again have their noise again: on other data it would show the difference."""
    training, folder = start(tmp_path, "run")
    with folder:
        next(train(training, folder))
    splits = training.splits
    images, labels = (t.clone() for t in splits.train.tensors)
    images[-1, 0, 0, 0] += 1e-6
    for data, refused in ((splits.train, False), (TensorDataset(images, labels), True)):
        training = prepare(training.config, splits=dataclasses.replace(splits, train=data))
        with RunFolder.resume(tmp_path / "run") as folder:
            if refused:
                with pytest.raises(InputError, match="the training data are not those that the run began with"):
                    next(train(training, folder))
            else:
                next(train(training, folder))


@pytest.mark.parametrize("lost", [["checkpoint.pt"], ["ledger.jsonl"], ["checkpoint.pt", "ledger.jsonl"]])
def test_a_folder_that_lost_what_was_spent_is_refused_and_left_alone(tmp_path: Path, lost: list[str]) -> None:
    training, folder = start(tmp_path, "run", CONFIG.replace("seed: 3\n", ""))
    with folder:
        next(train(training, folder))
    for name in lost:
        (folder.path / name).unlink()
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    for _ in range(2):
        with RunFolder.resume(folder.path) as again, pytest.raises(InputError, match=f"has no {lost[0]}"):
            next(train(training, again))
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_lost_record_is_missed(tmp_path: Path) -> None:
    training, folder = start(tmp_path, "run")
    with folder:
        epochs = train(training, folder)
        next(epochs), next(epochs)
    path = folder.path / "records.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    fresh = prepare(training.config)
    with RunFolder.resume(folder.path) as again, pytest.raises(InputError, match=r"records\.jsonl has no epoch 1, "):
        next(train(fresh, again))
    assert len(path.read_text().splitlines()) == 1


def test_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    training, folder = start(tmp_path, "run")
    with folder:
        next(train(training, folder))
    other = prepare(training.config.changed({("training", "max_grad_norm"): 9.0}))
    with RunFolder.resume(folder.path) as again, pytest.raises(InputError, match="is not the one that the run"):
        next(train(other, again))


def test_a_foreign_ledger_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    training, folder = start(tmp_path, "run")
    (folder.path / "ledger.jsonl").write_bytes((undisturbed / "ledger.jsonl").read_bytes())
    with folder, pytest.raises(InputError):
        list(train(training, folder))


# --- crashes


def _command(*words: object) -> subprocess.Popen[bytes]:
    code = "import sys, torch; torch.set_num_threads(1); from dpquant.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def killed_runs_end_the_same(tmp_path: Path, expected: Path, moments: int, seed: int) -> None:
    """Kills runs at random moments after their training began, resuming each until it ends by itself."""
    config = write(tmp_path)
    chosen = random.Random(seed)
    kills = run = 0
    while kills < moments:
        folder = tmp_path / f"run{run}"
        run += 1
        process, written = _command("train", config, "--out", folder), 0
        while kills < moments:
            while process.poll() is None and _written(folder) == written:
                time.sleep(0.005)  # training begins with a checkpoint: what comes before has nothing to lose
            time.sleep(chosen.uniform(0, 1.5))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            process, written = _command("train", "--resume", folder), _written(folder)
        assert process.wait() == 0
        assert same(state(folder), state(expected))
    print(f"{kills} kills in {run} runs")


def _written(folder: Path) -> int:
    """When the newest checkpoint was written; 0 before there is one."""
    try:
        return (folder / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_a_run_killed_at_any_moment_ends_the_same(tmp_path: Path, undisturbed: Path) -> None:
    killed_runs_end_the_same(tmp_path, undisturbed, moments=2, seed=0)


@pytest.mark.long
def test_runs_killed_at_fifty_moments_end_the_same(tmp_path: Path, undisturbed: Path) -> None:
    killed_runs_end_the_same(tmp_path, undisturbed, moments=50, seed=1)


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    fresh = prepare(load_config(write(tmp_path))).model.state_dict()
    given = {name: torch.randn_like(tensor) for name, tensor in fresh.items() if not name.startswith("fc2")}
    torch.save(given, path)
    model = prepare(load_config(write(tmp_path), {("model", "weights"): str(path)})).model.state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in given.items())
    assert torch.equal(model["fc2.weight"], fresh["fc2.weight"])
    for wrong, message in (
        ({"fc9.weight": torch.zeros(1)}, "no such tensor"),
        ({"fc2.bias": torch.zeros(1)}, "it of shape"),
        ({}, "holds no tensors"),
        ([1], "is no state dict"),
    ):
        torch.save(wrong, path)
        with pytest.raises(InputError, match=message):
            prepare(load_config(write(tmp_path), {("model", "weights"): str(path)}))
