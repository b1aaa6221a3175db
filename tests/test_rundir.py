"""The run folder: what is written is what is read, whole or not at all, and damage is named with file and line."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpquant import report
from dpquant.page import page
from dpquant.rundir import EpochRecord, RunFacts, RunFolder, load_checkpoint, load_run, write_atomic
from emulation.errors import InputError

numbers = st.floats(allow_nan=False)
names = st.text(min_size=1, max_size=20)


def record(epoch: int = 1, **changes: object) -> EpochRecord:
    base = EpochRecord(
        epoch=epoch,
        quantized={"conv1": "luq_fp4"},
        step_s=1e-3,
        baseline_step_s=1.5e-3,
        speedup=1.5,
        energy_joules=0.5,
        baseline_energy_joules=0.7,
        steps=10,
        noise_multiplier=1.1,
        epsilon=0.9,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


FACTS = RunFacts(
    name="tiny",
    model="digits_cnn",
    dataset="digits",
    layers=("conv1", "conv2"),
    hardware="b200",
    format="luq_fp4",
    scheduler="dpquant",
    basis="peak",
    epochs=2,
    steps=20,
    expected_batch_size=128,
    sample_rate=0.1,
    noise_multiplier=1.1,
    max_grad_norm=1.0,
    delta=1e-5,
)


def started(path: Path) -> Path:
    with RunFolder.create(path, config={"epochs": 2}, facts=FACTS) as folder:
        folder.append(record(1))
        folder.append(record(2, epsilon=math.inf))
    return path


optional = st.none() | numbers


@given(
    epoch=st.integers(1, 10**6),
    quantized=st.dictionaries(names, names, max_size=4),
    sensitivities=st.none() | st.dictionaries(names, numbers, max_size=4),
    epsilon=numbers,
    calibrated=optional,
    loss=optional,
)
def test_record_round_trips(
    epoch: int,
    quantized: dict[str, str],
    sensitivities: dict[str, float] | None,
    epsilon: float,
    calibrated: float | None,
    loss: float | None,
) -> None:
    before = record(
        epoch,
        quantized=quantized,
        sensitivities=sensitivities,
        epsilon=epsilon,
        speedup_calibrated=calibrated,
        train_loss=loss,
    )
    line = before.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no Infinity, no NaN
    assert EpochRecord.from_json(line) == before


def test_record_keeps_nan() -> None:
    back = EpochRecord.from_json(record(train_loss=math.nan).to_json())
    assert back.train_loss is not None
    assert math.isnan(back.train_loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "1"}, "epoch='1'"),
        ({"epoch": True}, "epoch=True"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"speedup": "fast"}, "speedup='fast'"),
        ({"speedup": None}, "speedup=None"),
        ({"quantized": ["conv1"]}, "quantized="),
        ({"quantized": {"conv1": 4}}, "quantized.conv1=4"),
        ({"epsilom": 1.0}, "unknown key 'epsilom'"),
    ],
)
def test_wrong_record_is_named(change: dict[str, object], message: str) -> None:
    data = json.loads(record().to_json()) | change
    with pytest.raises(InputError, match=message):
        EpochRecord.from_json(json.dumps(data))


def test_missing_key_is_named() -> None:
    data = json.loads(record().to_json())
    del data["epsilon"]
    with pytest.raises(InputError, match="'epsilon' is missing"):
        EpochRecord.from_json(json.dumps(data))


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "[" * 100_000])
def test_not_a_record(line: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        EpochRecord.from_json(line)


def test_folder_reads_back_what_was_written(tmp_path: Path) -> None:
    run = load_run(started(tmp_path / "run"))
    assert run.facts == FACTS
    assert run.config == {"epochs": 2}
    assert [r.epoch for r in run.records] == [1, 2]
    assert run.records[1].epsilon == math.inf
    assert run.versions["torch"].startswith("2.")


def test_create_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty: it holds 'notes.txt'"):
        RunFolder.create(tmp_path, config={}, facts=FACTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_create_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make run folder"):
        RunFolder.create(tmp_path / "file" / "run", config={}, facts=FACTS)


def test_second_process_is_refused(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    code = f"from dpquant.rundir import RunFolder; RunFolder.resume({str(path)!r})"
    with RunFolder.resume(path):
        with pytest.raises(InputError, match="in use by another process"):
            RunFolder.resume(path)
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another process" in second.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_line_cut_short_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    with (path / "records.jsonl").open("a") as stream:
        stream.write('{"epoch": 3, "quan')
    assert [r.epoch for r in load_run(path).records] == [1, 2]
    with RunFolder.resume(path) as folder:
        folder.append(record(3))
        assert [r.epoch for r in folder.records()] == [1, 2, 3]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    lines = (path / "records.jsonl").read_text().replace('"steps": 10', '"steps": "x"', 1)
    (path / "records.jsonl").write_text(lines)
    with pytest.raises(InputError, match=r"records\.jsonl:1: steps='x'"):
        load_run(path)


def test_keep_records(tmp_path: Path) -> None:
    with RunFolder.resume(started(tmp_path / "run")) as folder:
        folder.keep_records(1)
        assert [r.epoch for r in folder.records()] == [1]


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 2}', '{"schema": 1, "facts": 3}', "\x00"])
def test_damaged_start_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json: "):
        load_run(tmp_path)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in") as caught:
        load_run(tmp_path / "nowhere")
    assert "dpquant train" in str(caught.value.hint)


def test_checkpoint_round_trips(tmp_path: Path) -> None:
    with RunFolder.resume(started(tmp_path / "run")) as folder:
        assert folder.load_checkpoint() is None
        state = {"model": {"w": torch.arange(3.0)}, "epoch": 2, "order": ["a", "b"], "ema": {"a": 0.5}}
        folder.save_checkpoint(state)
        back = folder.load_checkpoint()
    assert back is not None
    assert torch.equal(back["model"]["w"], state["model"]["w"])  # type: ignore[index]
    assert {k: v for k, v in back.items() if k != "model"} == {k: v for k, v in state.items() if k != "model"}


def test_every_damage_to_a_checkpoint_is_seen(tmp_path: Path) -> None:
    with RunFolder.resume(started(tmp_path / "run")) as folder:
        folder.save_checkpoint({"w": torch.zeros(4)})
        whole = folder.checkpoint_path.read_bytes()
        damaged = [whole[:n] for n in range(0, len(whole), 97)]
        for place in range(0, len(whole), 61):
            damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for content in damaged:
            folder.checkpoint_path.write_bytes(content)
            with pytest.raises(InputError, match=r"checkpoint\.pt: "):
                folder.load_checkpoint()


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with RunFolder.resume(started(tmp_path / "a")) as folder:
        folder.save_checkpoint({"epoch": 1})
        content = folder.checkpoint_path.read_bytes()
    with RunFolder.resume(started(tmp_path / "b")) as folder:
        folder.checkpoint_path.write_bytes(content)
        with pytest.raises(InputError, match="belongs to another run"):
            folder.load_checkpoint()
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt") == {"epoch": 1}


def test_write_atomic_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "none" / "file", b"x")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["run.json", "records.jsonl", "config.yaml"]),
    place=st.floats(0, 1),
    junk=st.binary(max_size=6)
    | st.sampled_from([b'"', b"}", b"\n", b"null", b"-1", b"1e999", b"[", b"\xff", b"&a [*a]"]),
    drop=st.integers(0, 12),
)
def test_a_damaged_folder_is_read_or_refused(tmp_path: Path, name: str, place: float, junk: bytes, drop: int) -> None:
    path = tmp_path / "run"
    if not path.exists():
        started(path)
    whole = (path / name).read_bytes()
    start = round(place * len(whole))
    refused = None
    try:
        (path / name).write_bytes(whole[:start] + junk + whole[start + drop :])
        run = load_run(path)
        report.report(run)
        report.to_json(run)
        page([run])
    except InputError as error:
        refused = error
    finally:
        (path / name).write_bytes(whole)
    if refused is not None:
        assert str(refused.file).startswith(str(path))
        assert "\n" not in str(refused)


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    for name in ("records.jsonl", "config.yaml", "run.json"):
        whole = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).mkdir()
        with pytest.raises(InputError, match=name):
            load_run(path)
        (path / name).rmdir()
        (path / name).write_bytes(whole.replace(b"\n", b"\r\n"))
        load_run(path)  # Windows line ends


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    code = f"import sys; from dpquant.rundir import load_run; load_run({str(path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_killed_process_had_begun_to_write_goes_on_resume(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", config={}, facts=FACTS):
        pass
    begun = [tmp_path / "run" / name for name in (".ledger.jsonl.4242", ".checkpoint.pt.17")]
    kept = [tmp_path / "run" / name for name in (".notes", "ledger.jsonl.1", ".cache.d")]
    for path in (*begun, *kept):
        path.write_text("half")
    with RunFolder.resume(tmp_path / "run"):
        assert not any(path.exists() for path in begun)
        assert all(path.exists() for path in kept)


def test_a_layers_sensitivity_in_a_ladder_is_that_of_its_format() -> None:
    plain = dataclasses.replace(record(1), quantized={"a": "fp8"}, sensitivities={"a": 1.0, "a.b": 9.0})
    assert [plain.sensitivity(layer) for layer in ("a", "a.b", "c")] == [1.0, 9.0, None]
    released = {"a:fp8": 1.0, "a:nvfp4": 2.0, "b:fp8": 3.0, "b:nvfp4": 4.0, "a.b:fp8": 9.0}
    ladder = dataclasses.replace(record(1), quantized={"a": "fp8"}, sensitivities=released)
    assert [ladder.sensitivity(layer) for layer in ("a", "b")] == [1.0, 4.0]
    assert dataclasses.replace(record(1), sensitivities=None).sensitivity("a") is None
