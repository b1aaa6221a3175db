"""The results of a sweep on disk: JSON lines, one per run that ended, enough for every table by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpquant.rundir import dumps_strict, write_atomic
from emulation.errors import InputError, regular_file
from hwmodels.fields import Anything, Fields, Null, Number, OneOf, Table, Text, problems
from hwmodels.strict_yaml import Document, raise_all

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What one run came to; times and energies are the hardware model's, over all steps, on the basis they name."""

    name: str
    settings: Mapping[str, Any]
    """The resolved value of every key that the sweep varies."""
    seed: int
    digest: str
    """Of the configuration: a result is taken only for the configuration it came from."""
    status: str
    """``done`` or ``failed``."""
    error: str | None = None
    """One line: why a run failed."""
    epochs: int = 0
    accuracy: float | None = None
    """On the test data after the last epoch, between 0 and 1."""
    best_accuracy: float | None = None
    """Of the best epoch, chosen on the test data: not what a private run may report as its own."""
    test_loss: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    quantized_share: float | None = None
    speedup_peak: float | None = None
    speedup_calibrated: float | None = None
    """None where the profile has no calibration; the same for energies."""
    energy_joules_peak: float | None = None
    energy_joules_calibrated: float | None = None
    energy_share_peak: float | None = None
    """In shares of full precision's energy."""
    energy_share_calibrated: float | None = None
    wall_s: float | None = None
    """Measured seconds of training and testing, on ``device``."""
    ended_s: float | None = None
    """When it ended, in seconds since 1970: with ``wall_s``, how long runs side by side took together."""
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether every epoch was trained."""
        return self.status == "done"

    def to_json(self) -> str:
        """One line of JSON."""
        return dumps_strict(asdict(self))


_NUMBER = OneOf(options=(Number(), Text(choices=("inf", "-inf", "nan")), Null()), required=False)
_TEXT = OneOf(options=(Text(), Null()), required=False)
_LINE = Fields(
    entries={
        **dict.fromkeys(SweepResult.__dataclass_fields__, _NUMBER),
        "name": Text(),
        "settings": Table(value=Anything()),
        "seed": Number(minimum=0, integer=True),
        "digest": Text(),
        "status": Text(choices=("done", "failed")),
        "epochs": Number(minimum=0, integer=True, required=False),
        "error": _TEXT,
        "device": _TEXT,
        "versions": Table(value=Text(), required=False),
    }
)


def read_results(path: Path) -> dict[str, SweepResult]:
    """Name of a run -> its newest result; empty where there is no file, and without a last line that was cut short.

    Raises:
        InputError: a line that is no result, with file and line.
    """
    try:
        text = regular_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cannot be read", file=path) from error
    found = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        result = _parsed(line, path, number)
        found[result.name] = result
    return found


def _parsed(line: str, path: Path, number: int) -> SweepResult:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("is not JSON", file=path, line=number) from error
    raise_all(problems(Document(file=str(path), data=data, lines={(): number}), _LINE))
    numbers = [name for name, entry in _LINE.entries.items() if entry is _NUMBER]
    return SweepResult(**{**data, **{k: float(v) for k in numbers if isinstance(v := data.get(k), str)}})


def append_result(path: Path, result: SweepResult) -> None:
    """Add one result; it is on disk when this returns."""
    with path.open("ab") as stream:
        stream.write(result.to_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_results(path: Path, results: Iterable[SweepResult]) -> None:
    """Replace the file by these results, whole or not at all."""
    write_atomic(path, "".join(result.to_json() + "\n" for result in results).encode())
