"""Several processes train what one would: the same sample, noise, ledger and schedule; and they fail together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, TensorDataset

from dpquant import ledger_file
from dpquant.cli import main
from dpquant.distributed import ALONE, Processes, joined
from dpquant.engine import DPQuantEngine
from dpquant.rundir import load_checkpoint, load_run
from dpquant.sensitivity import AnalysisSettings

CONFIG = """\
model: {name: digits_cnn}
data: {name: digits}
hardware: {profile: b200, basis: peak}
format: luq_fp4
schedule: {scheduler: dpquant, fraction: 0.5}
training: {epochs: 2, batch_size: 300, dataset_size: 1500, learning_rate: 0.5, max_grad_norm: 1.0}
privacy: {noise_multiplier: 1.0, target_delta: 1e-4, accountant: rdp}
analysis: {interval: 2, expected_batch_size: 32}
seed: 3
"""

# --- processes as torchrun starts them, but forked from a server that has everything imported already

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["dpquant.train", "dpquant.commands.train", "torch._dynamo"])


def _child(rank: int, size: int, port: int, said: str, scenario: Callable[..., Any], given: Any, answer: Any) -> None:
    stream = os.open(f"{said}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answer.send_bytes(pickle.dumps(scenario(*given)))  # tensors by value: this process ends


class World:
    """``size`` processes that run one scenario; what each of them answered, said, and ended with."""

    def __init__(self, folder: Path, size: int, scenario: Callable[..., Any], *given: Any) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        said = str(folder / "said")
        pipes = [_SERVER.Pipe(duplex=False) for _ in range(size)]
        self.processes = [
            _SERVER.Process(target=_child, args=(r, size, self._store.port, said, scenario, given, pipes[r][1]))
            for r in range(size)
        ]
        for process, (_, sender) in zip(self.processes, pipes, strict=True):
            process.start()
            sender.close()
        self._receivers = [receiver for receiver, _ in pipes]
        self._said = [Path(f"{said}.{r}") for r in range(size)]

    def answers(self) -> list[Any]:
        found = []
        for receiver in self._receivers:
            try:
                found.append(pickle.loads(receiver.recv_bytes()) if receiver.poll(60) else None)
            except EOFError:
                found.append(None)
        for process in self.processes:
            process.join(60)
        return found

    def said(self) -> list[str]:
        return [path.read_text() for path in self._said]

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]


def together(folder: Path, size: int, scenario: Callable[..., Any], *given: Any) -> list[Any]:
    """What each process answers."""
    world = World(folder, size, scenario, *given)
    answers = world.answers()
    assert world.codes() == [0] * size, "\n".join(world.said())
    return answers


pytestmark = pytest.mark.usefixtures("one_thread")


# --- one alone


def test_alone_every_method_is_the_identity() -> None:
    x = torch.randn(3)
    assert ALONE.first
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.sum([x])[0] is x
    assert ALONE.broadcast(x) is x
    ALONE.agree("anything", 1)
    with joined() as processes:
        assert processes is ALONE


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 21])
def test_shares_are_a_partition_into_equal_parts(size: int, count: int) -> None:
    parts = [Processes(rank=r, size=size).share(list(range(count))) for r in range(size)]
    assert sorted(x for part in parts for x in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- what goes between them

Answer = dict[str, Any]

CASES: dict[str, dict[str, Any]] = {
    "full": {"steps": 8, "scheduler": "full"},
    "parts": {"steps": 8, "scheduler": "full", "physical": 5},
    "forward": {"steps": 1, "scheduler": "dpquant"},
    "training": {"steps": 1, "scheduler": "dpquant", "probe": "training"},
    "released": {"steps": 6, "scheduler": "dpquant", "estimator": "both"},
    "keyed": {"steps": 1, "scheduler": "static", "fraction": 1.0},
    "by position": {"steps": 1, "scheduler": "static", "fraction": 1.0, "by_position": True},
}


def _everything() -> Answer:
    """What one process answers to every case; the processes are started once, for starting them is what takes time."""
    with joined() as processes:
        found: Answer = {name: _trained(processes, **case) for name, case in CASES.items()}
        return found | {"exchange": _exchange(processes)}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Answer]]:
    """By number of processes, every process's answers."""
    folder = tmp_path_factory.mktemp("worlds")
    return {size: together(folder, size, _everything) for size in (2, 3)}


@pytest.fixture(scope="module")
def alone() -> Answer:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: _trained(ALONE, **case) for name, case in CASES.items() if name != "by position"}
    torch.set_num_threads(threads)
    return found


def _exchange(processes: Processes) -> tuple[Any, ...]:
    own = [torch.full((2, 2), float(processes.rank)), torch.ones(3, dtype=torch.float64)]
    told = processes.broadcast({"x": torch.arange(3), "n": [processes.rank, None, "a", 2.5]})
    processes.agree("nothing", told, tensors=own[1:])
    refused = []
    for values, tensors in (([processes.rank], own[1:]), ([0], own[:1])):
        try:
            processes.agree("themselves", *values, tensors=tensors)
        except RuntimeError as error:
            refused.append(str(error))
    x, n = told.values()
    return [t.tolist() for t in processes.sum(own)], torch.as_tensor(x).tolist(), n, refused


def test_sums_broadcasts_and_checksums(worlds: dict[int, list[Answer]]) -> None:
    refusal = "the 3 processes of this run differ in themselves, and cannot go on together"
    expected = ([[[3.0, 3.0], [3.0, 3.0]], [3.0] * 3], [0, 1, 2], [0, None, "a", 2.5], [refusal] * 2)
    assert [answer["exchange"] for answer in worlds[3]] == [expected] * 3


# --- the same training


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def _private(
    processes: Processes,
    physical: int | None = None,
    probe: Any = "forward",
    estimator: Any = "probe",
    target_epsilon: float | None = None,
    **changes: Any,
) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 4)
    given: dict[str, Any] = {"hardware": "b200", "basis": "peak", "accountant": "rdp", "seed": 0, "fraction": 0.5}
    analysis = AnalysisSettings(interval=1, expected_batch_size=16, probe=probe, estimator=estimator)
    engine = DPQuantEngine(**(given | changes), analysis=analysis, processes=processes)
    network = _network()
    parts = engine.make_private(
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0 if target_epsilon is None else None,
        target_epsilon=target_epsilon,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
        sample_rate=0.25,
        expected_batch_size=16,
        max_physical_batch_size=physical,
    )
    return engine, parts


def _trained(processes: Processes, steps: int, by_position: bool = False, **settings: Any) -> Answer:
    engine, (module, optimizer, criterion, loader) = _private(processes, **settings)
    if by_position:  # what the keys must not be
        loader.collate_fn._on_batch = lambda ids: engine._key_rounding(torch.arange(len(ids)))
    sizes, released = [], []
    for epoch in engine.epochs():
        released.append((dict(epoch.sensitivities or {}), tuple(epoch.plan)))
        for x, y in loader:
            if engine.step == steps:
                break
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
            sizes.append(len(y))
    return {
        "weights": _flat(module),
        "sizes": sizes,
        "released": released,
        "ledger": engine.ledger.to_json_lines(),
        "epsilon": engine.epsilon(),
    }


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("case", ["full", "parts"])
@pytest.mark.parametrize("size", [2, 3])
def test_full_precision_training_is_that_of_one_process_up_to_float_order(
    worlds: dict[int, list[Answer]], alone: Answer, size: int, case: str
) -> None:
    answers, one = [a[case] for a in worlds[size]], alone[case]
    assert all(torch.equal(a["weights"], answers[0]["weights"]) for a in answers)
    torch.testing.assert_close(answers[0]["weights"], one["weights"], rtol=0, atol=2e-6)
    assert (one["weights"] - _flat(_network())).norm() > 1
    assert sum(sum(a["sizes"]) for a in answers) == sum(one["sizes"])
    assert all(a["ledger"] == one["ledger"] and a["epsilon"] == one["epsilon"] for a in answers)


@pytest.mark.parametrize("probe", ["forward", "training"])
@pytest.mark.parametrize("size", [2, 3])
def test_quantized_training_and_its_analysis_are_those_of_one_process(
    worlds: dict[int, list[Answer]], alone: Answer, size: int, probe: str
) -> None:
    answers, one = [a[probe] for a in worlds[size]], alone[probe]
    assert all(torch.equal(a["weights"], answers[0]["weights"]) for a in answers)
    assert all(a["released"] == answers[0]["released"] and a["ledger"] == one["ledger"] for a in answers)
    assert answers[0]["released"][0][1] == one["released"][0][1] != ()
    assert answers[0]["released"][0][0] == pytest.approx(one["released"][0][0], abs=1e-6)
    assert answers[0]["epsilon"] == one["epsilon"]
    # one rounding that falls to the other side moves a weight more than the order of additions does
    torch.testing.assert_close(answers[0]["weights"], one["weights"], rtol=0, atol=1e-4)


def test_sensitivities_from_released_gradients_are_the_same_everywhere(worlds: dict[int, list[Answer]]) -> None:
    answers = [answer["released"] for answer in worlds[3]]
    assert len(answers[0]["released"]) == 2
    assert all(a["released"] == answers[0]["released"] for a in answers)
    assert all(torch.equal(a["weights"], answers[0]["weights"]) for a in answers)


def test_rounding_bits_by_position_would_be_seen(worlds: dict[int, list[Answer]], alone: Answer) -> None:
    one = alone["keyed"]["weights"]
    torch.testing.assert_close(worlds[2][0]["keyed"]["weights"], one, rtol=0, atol=1e-4)
    assert (worlds[2][0]["by position"]["weights"] - one).abs().max() > 1e-3


# --- the ledger first


def _refused_by_the_ledger() -> tuple[str, bool]:
    with joined() as processes:
        engine, (module, optimizer, criterion, loader) = _private(processes, scheduler="full")

        def full(event: object) -> None:
            raise OSError("disk full")

        if processes.first:
            engine.spending._append = full
        before = _flat(module)
        next(engine.epochs())
        x, y = next(iter(loader))
        criterion(module(x), y).backward()
        seen = ""
        try:
            optimizer.step()
        except OSError as error:
            seen = str(error)
        if processes.first:
            os._exit(0)
        return seen, torch.equal(before, _flat(module))


def test_no_process_sees_noise_that_the_ledger_did_not_take(tmp_path: Path) -> None:
    answers = together(tmp_path, 2, _refused_by_the_ledger)
    seen, same = answers[1]
    assert "another process of this run stopped" in seen
    assert same


def test_steps_repeated_by_another_arithmetic_count_again_and_the_end_that_they_cost_is_kept() -> None:
    def engine(state: dict[str, Any] | None = None) -> DPQuantEngine:
        made: DPQuantEngine = _private(ALONE, scheduler="pls", target_epsilon=8.0)[0]
        if state is not None:
            made.load_state(state)
        return made

    first = engine()
    first.spending.spend(first._budget.training(first.steps_per_epoch))
    state = first.state(1)
    written = first.ledger.record(first._budget.training(2))  # two steps into the second epoch it was stopped
    repeating = engine(state)
    repeating.write_ahead(written, lambda event: None)
    assert repeating.ledger == first.ledger
    assert repeating.last_step == first.last_step

    other = engine(state | {"arithmetic": "another"})
    other.write_ahead(written, lambda event: None)
    assert other.ledger == written
    assert other.last_step == first.last_step - 2
    again = engine(other.state(1))  # now the arithmetic is that of the checkpoint
    again.write_ahead(written, lambda event: None)
    assert again.ledger == written
    assert again.last_step == other.last_step


# --- runs, as the command makes them


def _command(words: list[str], dies: tuple[int, int] | None = None) -> None:
    """Runs the command; ``dies``: which process, and at which step, is killed."""
    if dies is not None and int(os.environ["RANK"]) == dies[0]:
        before_noise = DPQuantEngine._before_noise

        def killed(engine: DPQuantEngine) -> torch.Generator:
            if engine.step == dies[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return before_noise(engine)

        setattr(DPQuantEngine, "_before_noise", killed)  # noqa: B010
    sys.exit(main(words))


def _model(run: Path) -> Tensor:
    state = load_checkpoint(run / "checkpoint.pt")["model"]
    return torch.cat([t.flatten().float() for t in state.values()])


def test_a_run_that_loses_a_process_ends_with_one_line_and_goes_on_on_any_number(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    whole = World(tmp_path, 2, _command, ["train", str(config), "--out", str(tmp_path / "whole")])
    whole.answers()
    assert whole.codes() == [0, 0]
    assert whole.said()[1] == ""
    assert "2/2" in whole.said()[0]

    started = time.monotonic()
    world = World(tmp_path, 2, _command, ["train", str(config), "--out", str(tmp_path / "same")], (1, 7))
    world.answers()
    assert world.codes() == [1, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    errors = [line for line in world.said()[0].splitlines() if re.match("error|hint|Traceback", line)]
    assert len(errors) == 1
    assert "another process of this run stopped" in errors[0]
    assert "--resume" in errors[0]
    assert len(load_run(tmp_path / "same").records) == 1
    shutil.copytree(tmp_path / "same", tmp_path / "other")

    for name, size in (("same", 2), ("other", 3)):
        world = World(tmp_path, size, _command, ["train", "--resume", str(tmp_path / name)])
        world.answers()
        assert world.codes() == [0] * size, world.said()
        assert load_run(tmp_path / name).complete
    ledgers = {name: ledger_file.read_ledger(tmp_path / name / "ledger.jsonl") for name in ("whole", "same", "other")}
    # on as many processes the repeated steps repeat to the bit; on others they are counted again
    assert torch.equal(_model(tmp_path / "same"), _model(tmp_path / "whole"))
    assert ledgers["same"] == ledgers["whole"]
    assert ledgers["whole"].steps("training") == 10
    assert ledgers["other"].steps("training") == 15  # all of the epoch was on record when it was lost


def test_an_error_that_all_processes_make_is_told_once(tmp_path: Path) -> None:
    world = World(tmp_path, 3, _command, ["train", str(tmp_path / "missing.yaml")])
    world.answers()
    assert world.codes() == [2, 2, 2]
    assert len(re.findall("^error:", "".join(world.said()), re.MULTILINE)) == 1


def _waits(folder: str) -> None:
    with joined() as processes:
        if processes.first:
            Path(folder, "ready").touch()
            processes.sum([torch.ones(1)])
        time.sleep(120)


def test_a_process_that_is_told_to_stop_says_so_also_from_within_a_collective(tmp_path: Path) -> None:
    world = World(tmp_path, 2, _waits, str(tmp_path))
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    world.processes[0].terminate()
    world.processes[0].join(30)
    assert world.processes[0].exitcode == 1
    assert world.said()[0].count("another process of this run stopped") == 1
    world.processes[1].kill()
    world.processes[1].join(30)


def test_sharded_weights_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--parallel", "fsdp", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "--parallel fsdp" in said
    assert "second backward" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_torchrun_trains(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dpquant"]
    words = ["train", str(config), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert load_run(tmp_path / "run").complete
