"""Run configurations: one YAML file says everything a run needs, and is checked whole before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpquant.schedule import SCHEDULERS
from emulation.errors import InputError, suggestion
from hwmodels.fields import Anything, Field, Fields, Flag, Items, Number, OneOf, Table, Text, json_schema, problems
from hwmodels.strict_yaml import Document, KeyPath, raise_all, read_yaml

# The order of lookup: beside the package in a checkout, inside it in an install.
_SHIPPED = (Path(__file__).parent.parent / "configs" / "runs", Path(__file__).parent / "configs" / "runs")
_OPTIMIZERS = ("sgd", "adam", "adamw")


def _optional(entry: Field) -> Field:
    return replace(entry, required=False)


_POSITIVE = Number(above=0, required=False)
_COUNT = Number(minimum=1, integer=True, required=False)
_INDIFFERENT = (
    ("training", "device"),
    ("training", "cuda_graphs"),
    ("training", "keep_freed_memory"),
    ("data", "root"),
)  # settings that change where and how fast a run trains, not what it trains

SPECIFICATION = Fields(
    entries={
        "name": Text(doc="what the run is called in its folder and report; default: the file's name", required=False),
        "model": Fields(
            entries={
                "name": Text(doc="a model of the project: `digits_cnn`, `resnet18`, `gpt2`, ..."),
                "options": Table(
                    value=Anything(), doc="what the model's class takes, such as `stem: cifar`", required=False
                ),
                "weights": Text(doc="a state dict to start from; what it lacks is initialised", required=False),
            }
        ),
        "data": Fields(
            entries={
                "name": Text(doc="a data set"),
                "root": Text(doc="the folder of its files", required=False),
                "split": Text(doc="EMNIST's part", required=False),
                "size": replace(_COUNT, doc="of images in folders: pixels of a side; of texts: bytes"),
            }
        ),
        "hardware": Fields(
            entries={
                "profile": Text(doc="name or path of a hardware profile"),
                "basis": Text(
                    choices=("peak", "calibrated"),
                    doc="what speedup is modelled on; default: calibrated where the profile is",
                    required=False,
                ),
            }
        ),
        "format": OneOf(
            options=(Text(), Items(item=Text(), minimum=1)),
            doc="number format or preset of the quantized layers; of a list, a ladder, each layer takes one",
        ),
        "schedule": Fields(
            entries={
                "scheduler": Text(
                    choices=SCHEDULERS,
                    doc="layers quantized: none; drawn once; drawn every epoch; drawn by sensitivity; those that save "
                    "most time; all in the first epochs alone; those that save most time in all but the last epochs; "
                    "all in the last epochs alone",
                ),
                "target_speedup": Number(minimum=1, doc="modelled speedup of the whole run", required=False),
                "fraction": Number(minimum=0, maximum=1, doc="share of the layers quantized", required=False),
                "layers": Items(item=Text(), doc="of scheduler static: the layers quantized, by name", required=False),
                "beta": Number(
                    minimum=0,
                    doc="the draw's weights are softmax(-beta * sensitivity), in units of the loss, or with "
                    "`analysis.estimator: released` of the largest",
                    required=False,
                ),
            }
        ),
        "training": Fields(
            entries={
                "epochs": Number(minimum=1, integer=True, doc="epochs of the whole run"),
                "batch_size": Number(minimum=1, integer=True, doc="expected size of a Poisson batch: a public number"),
                "dataset_size": replace(_COUNT, doc="declared number of examples, public; default: the data's"),
                "device": Text(choices=("cpu", "cuda"), doc="where it trains; the data stay there", required=False),
                "max_physical_batch_size": replace(_COUNT, doc="larger batches are processed in parts"),
                "optimizer": Text(choices=_OPTIMIZERS, doc="what steps along the noisy gradient", required=False),
                "learning_rate": Number(above=0, doc="of the optimizer"),
                "momentum": Number(minimum=0, below=1, doc="of `sgd`", required=False),
                "weight_decay": Number(minimum=0, doc="of the optimizer", required=False),
                "max_grad_norm": Number(above=0, doc="norm each example's gradient is clipped to"),
                "clipping": Text(
                    choices=("bookkeeping", "hooks"),
                    doc="bookkeeping: norms from each layer's operands; hooks: from per-example gradients",
                    required=False,
                ),
                "accumulate": Text(
                    choices=("float32", "hardware"), doc="hardware: sums as the profile's matrix units", required=False
                ),
                "cuda_graphs": Flag(doc="on a GPU: steps are replayed as CUDA graphs", required=False),
                "keep_freed_memory": Flag(
                    doc="on the CPU: glibc keeps freed memory for the next step, which is faster", required=False
                ),
            }
        ),
        "privacy": Fields(
            entries={
                "target_epsilon": Number(above=0, doc="spent by training and analyses together", required=False),
                "noise_multiplier": Number(minimum=0, doc="instead of target_epsilon", required=False),
                "target_delta": Number(above=0, below=1, doc="delta of the guarantee; below one over the examples"),
                "accountant": Text(choices=("prv", "rdp"), doc="prv: tight; rdp: faster, looser", required=False),
            }
        ),
        "analysis": Fields(
            required=False,
            entries={
                "interval": replace(_COUNT, doc="epochs between two analyses"),
                "noise_multiplier": Number(
                    minimum=0, doc="of the released loss differences; 0 is no privacy", required=False
                ),
                "max_norm": replace(_POSITIVE, doc="norm each example's vector of loss differences is clipped to"),
                "expected_batch_size": replace(_COUNT, doc="of the Poisson sample that is analysed"),
                "decay": Number(minimum=0, below=1, doc="of the moving average over analyses", required=False),
                "estimator": Text(
                    choices=("released", "probe", "both"),
                    doc="released: free, from released gradients; probe: private analyses; both: their average",
                    required=False,
                ),
                "probe": Text(
                    choices=("forward", "training"),
                    doc="forward: loss differences as they are; training: after some steps under each policy",
                    required=False,
                ),
                "probe_steps": replace(_COUNT, doc="gradient steps of probe: training"),
                "probe_learning_rate": replace(_POSITIVE, doc="of those steps"),
            },
        ),
        "seed": Number(
            minimum=0,
            maximum=2**63 - 1,
            integer=True,
            doc="root of all random streams; leave out for a secret one",
            required=False,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked run configuration.

    Attributes:
        path: the file it was read from.
        data: its content as plain data with every default filled in, which a run folder keeps.
    """

    path: str
    data: Mapping[str, Any]
    _document: Document = field(repr=False, compare=False)

    def __getitem__(self, section: str) -> Any:
        return self.data[section]

    @property
    def digest(self) -> str:
        """Equal for configurations that train the same: name, place of data, device, speed and defaults aside."""
        data = {key: value for key, value in self.data.items() if key != "name"}
        if self["schedule"]["scheduler"] != "dpquant":  # nothing is estimated
            data["analysis"] = {**self["analysis"], "estimator": "probe"}
        decisive = _set(data, _UNSAID)
        for section, key in _INDIFFERENT:
            decisive.get(section, {}).pop(key, None)
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    def changed(self, overrides: Mapping[KeyPath, Any]) -> RunConfig:
        """This configuration with other values, checked as :func:`load_config` does; None removes a key."""
        return _checked(self.path, _overridden(self._document, overrides, {}))

    def error(self, key: KeyPath, message: str, *, hint: str | None = None) -> InputError:
        """An error that points at the line of ``key``, such as ``("training", "batch_size")``."""
        return self._document.error(key, message, hint=hint)

    @contextmanager
    def at(self, *key: str) -> Iterator[None]:
        """Gives errors raised inside the line they are about: of the argument they name, or of ``key``."""
        try:
            yield
        except InputError as error:
            if error.file is not None:
                raise
            raise self.error(self._named(error.message, key), error.message, hint=error.hint) from error

    def _named(self, message: str, key: KeyPath) -> KeyPath:
        found = re.search(r"\b([a-z_]+)=", message)
        if found is None:
            return key
        first = [str(key[0])] if key else []
        sections = [*first, *(s for s in self.data if s not in first)]
        for section in sections:
            if isinstance(self.data[section], dict) and found[1] in self.data[section]:
                return (section, found[1])
        return (found[1],) if found[1] in self.data else key


DEFAULTS: dict[str, Any] = {
    "name": None,
    "model": {"options": {}, "weights": None},
    "data": {"root": None, "split": None, "size": None},
    "hardware": {"basis": None},
    "schedule": {"target_speedup": None, "fraction": None, "layers": None, "beta": 200.0},
    "training": {
        "dataset_size": None,
        "device": "cpu",
        "max_physical_batch_size": None,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clipping": "bookkeeping",
        "accumulate": "float32",
        "cuda_graphs": True,
        "keep_freed_memory": True,
    },
    "privacy": {"target_epsilon": None, "noise_multiplier": None, "accountant": "prv"},
    "analysis": {
        "interval": 2,
        "noise_multiplier": 2.0,
        "max_norm": 0.1,
        "expected_batch_size": 256,
        "decay": 0.5,
        "estimator": "released",
        "probe": "forward",
        "probe_steps": 4,
        "probe_learning_rate": 0.5,
    },
    "seed": None,
}

# What a digest leaves unsaid: the defaults, but for one that has changed since the first results were written.
_UNSAID = {**DEFAULTS, "analysis": {**DEFAULTS["analysis"], "estimator": "probe"}}

# (section, keys that exclude each other)
_ALTERNATIVES = (
    ("schedule", "target_speedup", "fraction", "layers"),
    ("privacy", "target_epsilon", "noise_multiplier"),
)


def shipped_configs() -> dict[str, Path]:
    """Name -> path of the run configurations that come with the project."""
    return {p.stem: p for folder in reversed(_SHIPPED) if folder.is_dir() for p in sorted(folder.glob("*.yaml"))}


def load_config(
    path: str | Path,
    overrides: Mapping[KeyPath, Any] | None = None,
    origins: Mapping[KeyPath, tuple[str, int]] | None = None,
) -> RunConfig:
    """Reads and checks a run configuration.

    Args:
        path: a YAML file, or the name of a shipped configuration.
        overrides: key path -> value, put in the file's place before anything is checked; None removes the key.
        origins: file and line that an override comes from, for errors; default: none, as on the command line.

    Raises:
        InputError: no such file, or every problem in it, each with file and line.
    """
    shipped = shipped_configs()
    if not Path(path).exists():
        name = Path(path).name.removesuffix(".yaml")
        if name not in shipped or len(Path(path).parts) > 3:
            raise InputError(f"no such configuration: {path}", hint=suggestion(name, shipped))
        path = shipped[name]
    return _checked(str(path), _overridden(read_yaml(path), overrides or {}, origins or {}))


def run_schema() -> dict[str, Any]:
    """The JSON Schema of run configurations, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dpquant run"} | json_schema(
        SPECIFICATION
    )


def _checked(path: str, document: Document) -> RunConfig:
    document = _without_nulls(document, DEFAULTS)
    raise_all(problems(document, SPECIFICATION))
    data = document.data
    resolved = {key: _filled(data.get(key), DEFAULTS.get(key)) for key in SPECIFICATION.entries}
    resolved["name"] = resolved["name"] or Path(path).stem
    config = RunConfig(path=path, data=resolved, _document=document)
    raise_all(_contradictions(config))
    return config


def _filled(value: Any, default: Any) -> Any:
    if isinstance(default, dict):
        return {**default, **(value or {})}
    return default if value is None else value


def with_alternatives(overrides: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
    """The overrides, and for a key that excludes another, such as fraction and target_speedup, the other's removal."""
    removed: dict[KeyPath, Any] = {}
    for section, *keys in _ALTERNATIVES:
        if any(overrides.get((section, key)) is not None for key in keys):
            removed.update({(section, key): None for key in keys if (section, key) not in overrides})
    return {**overrides, **removed}


def _overridden(
    document: Document, overrides: Mapping[KeyPath, Any], origins: Mapping[KeyPath, tuple[str, int]]
) -> Document:
    data, lines, files = document.data, dict(document.lines), dict(document.files)
    if not isinstance(data, dict):
        return document
    data = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    wrong = []
    for key, value in overrides.items():
        section: Any = data
        file, line = origins.get(key, ("", 0))
        for depth, part in enumerate(key[:-1], start=1):
            if part not in section:
                lines[key[:depth]], files[key[:depth]] = line, file
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                message = f"unknown key {'.'.join(map(str, key))!r}: {part} holds no keys"
                wrong.append(InputError(message, file=file, line=line or None))
                break
        else:
            section.pop(key[-1], None)
            if value is not None:
                section[key[-1]] = value
            lines[key], files[key] = line, file
    return replace(document, data=data, lines=lines, files=files, problems=(*document.problems, *wrong))


def _set(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``data`` is not at its default."""
    nested = {k: _set(v, defaults.get(k) or {}) if isinstance(v, Mapping) else v for k, v in data.items()}
    return {k: v for k, v in nested.items() if v != defaults.get(k) and v != {}}


def _without_nulls(document: Document, defaults: Mapping[str, Any]) -> Document:
    """The document without the keys that say null where null is the default, as a run folder's resolved file does."""

    def kept(value: Any, default: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(default, dict):
            return value
        return {k: kept(v, default.get(k)) for k, v in value.items() if not (v is None and default.get(k, 0) is None)}

    return replace(document, data=kept(document.data, defaults))


def _contradictions(config: RunConfig) -> list[InputError]:
    found = []
    schedule, privacy = config["schedule"], config["privacy"]
    given = [key for key in ("target_speedup", "fraction", "layers") if schedule[key] is not None]
    if schedule["scheduler"] != "full" and len(given) != 1:
        message = f"schedule has {' and '.join(given) or 'neither target_speedup nor fraction'}: give one of them"
        found.append(config.error(("schedule",), message, hint="target_speedup: 1.5, or fraction: 0.9"))
    if schedule["layers"] is not None and schedule["scheduler"] not in ("full", "static"):
        message = f"layers is for scheduler static, and {schedule['scheduler']} draws its own"
        found.append(config.error(("schedule", "layers"), message))
    if (privacy["target_epsilon"] is None) == (privacy["noise_multiplier"] is None):
        message = "privacy needs one of target_epsilon and noise_multiplier"
        found.append(config.error(("privacy",), message, hint="target_epsilon: 8.0"))
    return found
