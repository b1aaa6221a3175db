"""A run on disk: what was asked, with which versions, one record per epoch, the ledger and the checkpoint.

``config.yaml`` (the configuration as resolved), ``run.json`` (facts fixed before the first step, and versions),
``records.jsonl`` (one `EpochRecord` a line), ``ledger.jsonl`` (the privacy ledger), ``checkpoint.pt``, ``lock``.
Reading needs neither torch nor the lock, so a run can be looked at while it trains.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar, get_args, get_type_hints

from emulation.errors import InputError, regular_file, suggestion
from hwmodels.strict_yaml import dump_yaml, load_yaml

RUN_FILES = ("config.yaml", "run.json", "records.jsonl", "ledger.jsonl", "checkpoint.pt", "lock")
_CHECKPOINT_MAGIC = b"dpquant-checkpoint-1"
_DEPENDENCIES = ("dpquant", "torch", "opacus", "qtorch", "numpy", "pyyaml", "rich")
_NONFINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch as it was planned, modelled, trained and accounted.

    Times and energies are the hardware model's, per step, on the run's basis; ``wall_s`` alone was measured, on the
    machine that emulated. Loss, accuracy on training data and ``nonfinite_examples`` are diagnostics that the privacy
    statement does not cover.
    """

    epoch: int
    """1-based."""
    quantized: Mapping[str, str]
    """Layer name to format; layers that stayed in full precision are absent."""
    step_s: float
    """Modelled seconds of one step under this epoch's plan."""
    baseline_step_s: float
    """Modelled seconds of one step in the baseline format."""
    speedup: float
    """Baseline time over this epoch's time, analyses included, on the run's basis."""
    energy_joules: float | None
    """None where the chip's power is not known."""
    baseline_energy_joules: float | None
    steps: int
    """Optimizer steps taken in this epoch."""
    noise_multiplier: float
    epsilon: float
    """Everything spent so far, analyses included; infinite where no noise is added."""
    epsilon_analysis: float = 0.0
    """What the analyses so far would have spent alone."""
    speedup_calibrated: float | None = None
    """The same plan on the calibrated basis, where the profile has a calibration."""
    sensitivities: Mapping[str, float] | None = None
    """The released (and smoothed) sensitivities that the schedule used, by layer; in a ladder by ``layer:format``."""
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    """Between 0 and 1."""
    examples: int = 0
    """Examples drawn in this epoch."""
    nonfinite_examples: int = 0
    """Examples whose gradient was not finite and therefore contributed zero."""
    wall_s: float = 0.0
    analysis_wall_s: float = 0.0

    def sensitivity(self, layer: str) -> float | None:
        """The released sensitivity of a layer: in a ladder, in the format it was quantized to, or else the largest."""
        released = self.sensitivities or {}
        for name in (layer, f"{layer}:{self.quantized.get(layer)}"):
            if name in released:
                return released[name]
        return max((value for name, value in released.items() if name.startswith(f"{layer}:")), default=None)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back to an equal record."""
        return dumps_strict(_plain(self))

    @classmethod
    def from_json(cls, line: str) -> EpochRecord:
        """The record of one line.

        Raises:
            InputError: not JSON, a key missing or unknown, or a value of the wrong type or out of range.
        """
        record = _from_mapping(cls, _parse_object(line))
        for name in ("step_s", "baseline_step_s", "speedup"):
            if not 0 < getattr(record, name) < math.inf:
                raise InputError(f"{name}={getattr(record, name)} is not a finite number above 0")
        if record.epoch < 1 or record.steps < 0:
            raise InputError(f"epoch={record.epoch}, steps={record.steps} are no counts")
        return record


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is fixed before the first step and what a report needs beside the records."""

    name: str
    model: str
    dataset: str
    layers: tuple[str, ...]
    """Quantizable layers in forward order: the rows of the schedule's map."""
    hardware: str
    format: str
    scheduler: str
    basis: str
    """``peak`` or ``calibrated``: what speedup and energy are modelled on."""
    baseline: str = "bfloat16"
    target_speedup: float | None = None
    fraction: float | None = None
    max_speedup: float | None = None
    """The most that this hardware and format can reach for this workload, on the run's basis."""
    max_speedup_calibrated: float | None = None
    epochs: int
    steps: int
    """Planned optimizer steps in all."""
    expected_batch_size: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float | None = None
    delta: float
    accountant: str = "prv"
    neighbouring: str = "add-or-remove-one"
    sampling: str = "poisson"
    analyses: int = 0
    """Planned sensitivity analyses in all."""
    analysis_noise_multiplier: float | None = None
    analysis_sample_rate: float | None = None
    seed: int | None = None
    parameters: int | None = None
    notes: tuple[str, ...] = ()
    """Sentences that the report repeats, such as why the peak basis was used."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder as read: everything but the checkpoint."""

    path: Path
    run_id: str
    config: Mapping[str, Any]
    facts: RunFacts
    versions: Mapping[str, str]
    records: tuple[EpochRecord, ...]

    @property
    def complete(self) -> bool:
        """Whether every planned epoch has its record."""
        return len(self.records) == self.facts.epochs


class RunFolder:
    """A run folder open for writing, held by one process until closed (a context manager)."""

    def __init__(self, path: Path, run_id: str, lock: IO[bytes]) -> None:
        self.path, self.run_id = path, run_id
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, *, config: Mapping[str, Any], facts: RunFacts) -> RunFolder:
        """Start a run in a new or empty folder.

        Raises:
            InputError: the folder already holds something, is held by another process, or cannot be written.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = sorted(p.name for p in path.iterdir() if p.name != "lock")
        except OSError as error:
            raise InputError(f"cannot make run folder '{path}': {error.strerror}") from error
        if held:
            hint = f"continue it with --resume {path}, or choose another folder with --out"
            raise InputError(f"run folder '{path}' is not empty: it holds {held[0]!r}", hint=hint)
        folder = cls(path, uuid.uuid4().hex, take_lock(path))
        if (path / "run.json").exists():  # another process was quicker between the look and the lock
            raise InputError(f"run folder '{path}' is not empty: it holds 'run.json'")
        write_atomic(path / "config.yaml", dump_yaml(_plain(config)).encode())
        start = {"schema": 1, "run_id": folder.run_id, "facts": _plain(facts), "versions": versions()}
        write_atomic(path / "run.json", (dumps_strict(start, indent=2) + "\n").encode())
        return folder

    @classmethod
    def resume(cls, path: str | Path) -> RunFolder:
        """Open an existing run to continue it.

        Raises:
            InputError: no run folder, a damaged one, or one that another process holds.
        """
        path = Path(path)
        folder = cls(path, _read_start(path)["run_id"], take_lock(path))
        for leftover in path.glob(".*"):  # what a process that was killed had begun to write
            if re.fullmatch(r"\..+\.\d+", leftover.name):
                leftover.unlink(missing_ok=True)
        folder.keep_records(sys.maxsize)  # a line cut short by a crash must not be continued by the next one
        return folder

    @property
    def ledger_path(self) -> Path:
        """Where the privacy ledger lies."""
        return self.path / "ledger.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """Where the newest checkpoint lies."""
        return self.path / "checkpoint.pt"

    def append(self, record: EpochRecord) -> None:
        """Add one record; it is on disk when this returns."""
        with (self.path / "records.jsonl").open("ab") as stream:
            stream.write(record.to_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def records(self) -> tuple[EpochRecord, ...]:
        """The records so far, in order."""
        return _read_records(self.path / "records.jsonl")

    def keep_records(self, epochs: int) -> None:
        """Drop the records of epochs after ``epochs``: those that a resumed run is about to repeat."""
        kept = [r for r in self.records() if r.epoch <= epochs]
        write_atomic(self.path / "records.jsonl", "".join(r.to_json() + "\n" for r in kept).encode())

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by ``state`` (tensors, numbers, strings and containers of them), atomically."""
        import torch

        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        digest = hashlib.sha256(payload).hexdigest()
        header = b" ".join([_CHECKPOINT_MAGIC, self.run_id.encode(), digest.encode()])
        write_atomic(self.checkpoint_path, header + b"\n" + payload)

    def load_checkpoint(self, map_location: str | None = None) -> dict[str, Any] | None:
        """The newest checkpoint, or None where none was written yet; no code in it is ever run.

        Raises:
            InputError: truncated, changed, or of another run.
        """
        if not self.checkpoint_path.exists():
            return None
        return load_checkpoint(self.checkpoint_path, run_id=self.run_id, map_location=map_location)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_replaceable(path: Path) -> None:
    """Refuses to write a file where something is that must not be replaced.

    Raises:
        InputError: a folder, a device, or what a run folder holds.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"'{path}' is no regular file", hint="give a file's name")
    if path.name in RUN_FILES and (path.parent / "run.json").exists():
        raise InputError(f"'{path}' belongs to a run", hint="give another name")


def load_run(path: str | Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        InputError: not a run folder, or a file in it is damaged (with file and line).
    """
    path = Path(path)
    start = _read_start(path)
    config, _ = load_yaml(path / "config.yaml")
    return Run(
        path=path,
        run_id=start["run_id"],
        config=config if isinstance(config, dict) else {},
        facts=start["facts"],
        versions=start["versions"],
        records=_read_records(path / "records.jsonl"),
    )


def load_checkpoint(path: Path, *, run_id: str | None = None, map_location: str | None = None) -> dict[str, Any]:
    """The state in a checkpoint file, checked against its digest and loaded as data only.

    Raises:
        InputError: not a checkpoint, truncated, changed, or of another run than ``run_id``.
    """
    import torch

    try:
        header, _, payload = regular_file(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    parts = header.split(b" ")
    if len(parts) != 3 or parts[0] != _CHECKPOINT_MAGIC:
        raise InputError("is not a dpquant checkpoint", file=path)
    if run_id is not None and parts[1] != run_id.encode():
        raise InputError("belongs to another run", file=path, hint="a checkpoint continues only the run that wrote it")
    if hashlib.sha256(payload).hexdigest().encode() != parts[2]:
        raise InputError("is truncated or was changed", file=path, hint="start the run again in a new folder")
    state = torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)
    if not isinstance(state, dict):
        raise InputError("holds no state", file=path)
    return state


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, without importing them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _DEPENDENCIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and durably: a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot be written: {error.strerror}", file=path) from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def dumps_strict(data: object, indent: int | None = None) -> str:
    """JSON that every reader takes: infinities and NaN, which JSON lacks, as the strings "inf", "-inf", "nan"."""
    return json.dumps(_plain(data), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dicts and lists, non-finite floats as strings."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value


Record = TypeVar("Record", EpochRecord, RunFacts)


def _from_mapping(cls: type[Record], data: Mapping[str, Any]) -> Record:
    """The dataclass whose fields ``data`` holds, every type checked; the inverse of `_plain`."""
    hints = get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise InputError(f"unknown key {unknown[0]!r}", hint="was it written by a newer version?")
    values = {}
    for name, value in data.items():
        values[name] = _typed(name, value, hints[name])
    try:
        return cls(**values)
    except TypeError as error:
        missing = [f.name for f in fields(cls) if f.name not in data]
        raise InputError(f"key {missing[0]!r} is missing") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    text = str(options[0])
    wrong = InputError(f"{name}={value!r} is not of the type written here ({text})")
    if options[0] is float:
        if isinstance(value, str) and value in _NONFINITE:
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong
        return float(value)
    if options[0] in (int, str):
        if isinstance(value, bool) or not isinstance(value, options[0]):
            raise wrong
        return value
    if "tuple" in text:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise wrong
        return tuple(value)
    if not isinstance(value, dict):
        raise wrong
    inner = get_args(options[0])[1]
    return {key: _typed(f"{name}.{key}", item, inner) for key, item in value.items()}


def _parse_object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("is not JSON") from error
    if not isinstance(data, dict):
        raise InputError("is not a JSON object")
    return data


def _read_start(path: Path) -> dict[str, Any]:
    """``run.json``, checked."""
    start_path = path / "run.json"
    try:
        text = regular_file(start_path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        others = [str(one.parent) for one in path.parent.glob("*/run.json")]
        near = suggestion(str(path), others)
        hint = near if near.startswith("did") else "give the folder that `dpquant train` wrote"
        raise InputError(f"no run in '{path}': it has no run.json", hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", file=start_path) from error
    try:
        data = _parse_object(text)
        if data.get("schema") != 1:
            raise InputError(f"schema={data.get('schema')!r} is not one that this version reads (1)")
        facts, ran, run_id = data.get("facts"), data.get("versions"), data.get("run_id")
        if not isinstance(facts, dict) or not isinstance(ran, dict) or not isinstance(run_id, str):
            raise InputError("keys 'run_id', 'facts' and 'versions' are needed")
        return {"run_id": run_id, "facts": _from_mapping(RunFacts, facts), "versions": ran}
    except InputError as error:
        raise InputError(error.message, hint=error.hint, file=start_path) from error


def _read_records(path: Path) -> tuple[EpochRecord, ...]:
    """All whole lines; a last line without its end is a write in flight (or cut short) and is left out."""
    try:
        text = regular_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", file=path) from error
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            records.append(EpochRecord.from_json(line))
        except InputError as error:
            raise InputError(error.message, hint=error.hint, file=path, line=number) from error
    return tuple(records)


def take_lock(path: Path) -> IO[bytes]:
    """Hold the folder until the returned file is closed or the process ends."""
    try:
        stream = locked(path / "lock")
    except OSError as error:
        raise InputError(f"run folder '{path}' cannot be written: {error.strerror}") from error
    if stream is None:
        raise InputError(f"run folder '{path}' is in use by another process", hint="wait for it, or use another folder")
    return stream


def locked(path: Path) -> IO[bytes] | None:
    """Hold a file until it is closed or the process ends; None where another process holds it.

    Raises:
        OSError: it cannot be written.
    """
    stream = path.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream
