"""What a hardware profile's YAML may hold: the one table of its fields, where files are found, how ``extends`` merges.

The fields below are checked on every load, printed as JSON Schema for editors (``python -m hwmodels.profile_yaml``
writes ``hwmodels/hardware.schema.json``) and explained in ``docs/hardware.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emulation.errors import InputError, suggestion
from emulation.formats import FORMATS
from hwmodels.calibration import CALIBRATION_FIELDS
from hwmodels.fields import Fields, Flag, Items, Number, OneOf, Table, Text, json_schema, problems
from hwmodels.profile_lints import LINTS, lints
from hwmodels.strict_yaml import Document, KeyPath, dotted, raise_all, read_yaml

STATUSES = ("measured", "fitted", "published", "derived", "assumed")
MATRIX_UNITS = ("volta", "turing", "ampere", "ada", "hopper", "blackwell", "cdna3")
SCHEMA_FILE = Path(__file__).with_name("hardware.schema.json")
EXTENDS_LIMIT = 8

_RATE_HINT = "FLOP/s, dense, one multiply-add = 2: 989.4 TFLOPS is 989.4e12"


def _sourced(
    doc: str, minimum: float, maximum: float, hint: str, *, integer: bool = False, required: bool = True
) -> Fields:
    value = Number(doc=doc, minimum=minimum, maximum=maximum, hint=hint, integer=integer)
    status = Text(doc="how the number came about", choices=STATUSES)
    tag = Text(doc="a tag of the table `sources`")
    source = OneOf(doc="where it stands: one tag of `sources`, or several", options=(tag, Items(item=tag, minimum=1)))
    note = Text(doc="what a reader of the number has to know", required=False)
    return Fields(
        doc=doc, required=required, entries={"value": value, "status": status, "source": source, "note": note}
    )


_FORMAT = Text(doc="a canonical format name", choices=tuple(FORMATS))
_NOTE = Text(doc="what a reader of the entry has to know", required=False)
_OWN_RATE = Fields(
    doc="the chip computes in this format",
    entries={
        "native": Flag(
            doc="whether the chip takes operands of this format as they are (which may still not be faster)"
        ),
        "peak_flops_per_s": _sourced("dense peak of the matrix product", 1e9, 1e18, _RATE_HINT),
        "accumulate": Text(doc="format of the sums", choices=("float32", "float16", "int32"), required=False),
        "hardware_scale": Fields(
            doc="block scales that the matrix unit applies by itself; left out: none, scales are applied in software",
            required=False,
            entries={"format": _FORMAT, "block": Number(doc="elements that share a scale", integer=True, minimum=1)},
        ),
        "layouts": Items(
            doc="operand layouts the unit takes (T: contiguous along K for A, N: for B); left out: any",
            required=False,
            item=Text(choices=("TN", "NT", "NN", "TT")),
            minimum=1,
        ),
        "note": _NOTE,
    },
)
_TIMED_AS = Fields(
    doc="not in hardware; stored in this format and timed as another one of the same width",
    entries={"timed_as": _FORMAT, "note": _NOTE},
)
_FALLS_BACK = Fields(
    doc="not in hardware; operands are converted to another format and multiplied there",
    entries={"falls_back_to": _FORMAT, "note": _NOTE},
)

_EAGER = {
    "float32_efficiency": ("speed of float32 products beside fitted GEMMs", 0.05, 2.0, "1 is as fast"),
    "tfloat32_efficiency": ("speed of tfloat32 products beside fitted GEMMs", 0.05, 2.0, "1 is as fast"),
    "bfloat16_efficiency": ("speed of other formats' products beside fitted GEMMs", 0.05, 2.0, "1 is as fast"),
    "pass_efficiency": ("bandwidth of norms and elementwise kernels beside the fitted one", 0.05, 2.0, "1 is as fast"),
    "kernel_s": ("host time per kernel", 1e-7, 1e-3, "seconds: 20 microseconds is 20e-6"),
    "step_s": ("host time per step", 0.0, 1.0, "seconds"),
    "hooks_layer_s": ("host time per layer of Opacus's hooks", 0.0, 0.1, "seconds"),
    "ghost_layer_s": ("host time per layer of ghost clipping", 0.0, 0.1, "seconds"),
    "bookkeeping_layer_s": ("host time per layer of book-keeping", 0.0, 0.1, "seconds"),
    "replay_s": ("host time per step of replayed kernels", 0.0, 1.0, "seconds"),
    "overlap": ("exponent that joins host and device time: high takes the longer", 1.0, 32.0, "1 adds them"),
}
_BYTES_HINT = "bytes: 80 GB is 80e9, 50 MiB is 52428800"
PROFILE = Fields(
    doc="A hardware profile: one accelerator as one process sees it, every number with its source.",
    entries={
        "extends": Text(
            doc="another profile (name, or a .yaml file beside this one) that this one varies", required=False
        ),
        "title": Text(doc="what the chip is called, with form factor and memory size"),
        "vendor": Text(doc="who makes it"),
        "family": Text(doc="architecture, in lower case: `hopper`", pattern=r"[a-z0-9_]+"),
        "year": Number(doc="year of first shipment", integer=True, minimum=1990, maximum=2100),
        "note": Text(doc="what a reader of the profile has to know", required=False),
        "sources": Table(
            doc="tag -> document that the numbers are from",
            minimum=1,
            value=Fields(
                entries={"title": Text(doc="what the document is"), "url": Text(doc="where it is", required=False)}
            ),
        ),
        "matrix_unit": Text(
            doc="the unit of the emulator with this chip's arithmetic; left out: not publicly known",
            choices=MATRIX_UNITS,
            required=False,
        ),
        "units": _sourced(
            "cores that a GEMM is spread over (SM, CU, MXU, MME)", 1, 100_000, "a count of cores", integer=True
        ),
        "memory": Fields(
            doc="the device memory",
            entries={
                "capacity_bytes": _sourced("usable capacity", 1e9, 1e13, _BYTES_HINT),
                "bandwidth_bytes_per_s": _sourced(
                    "peak bandwidth", 1e9, 1e14, "bytes per second: 3.35 TB/s is 3.35e12"
                ),
            },
        ),
        "cache_bytes": _sourced("last on-chip level that all units share", 1e5, 1e11, _BYTES_HINT, required=False),
        "launch_s": _sourced("least time of one kernel", 1e-8, 1e-2, "seconds: 3 microseconds is 3e-6"),
        "power": Fields(
            doc="board power; left out where nobody has published it",
            required=False,
            entries={
                "limit_w": _sourced("power limit", 1, 20_000, "watts"),
                "idle_w": _sourced("power when idle", 0.1, 5_000, "watts"),
            },
        ),
        "vector_flops_per_s": _sourced("float32 peak outside the matrix unit", 1e9, 1e17, _RATE_HINT),
        "formats": Table(
            doc="canonical format name -> its rate, or what it is timed as, or what it falls back to",
            minimum=1,
            keys=tuple(FORMATS),
            value=OneOf(options=(_OWN_RATE, _TIMED_AS, _FALLS_BACK)),
        ),
        "calibration": CALIBRATION_FIELDS,
        "eager": Fields(
            doc="what eager PyTorch adds on a host with this chip; left out: as on the H200 that the defaults are from",
            required=False,
            entries={
                name: _sourced(doc, low, high, hint, required=False) for name, (doc, low, high, hint) in _EAGER.items()
            },
        ),
        "accepted": Table(
            doc="lint -> why what it finds is true of this chip",
            required=False,
            keys=LINTS,
            value=Text(doc="the reason"),
        ),
    },
)
# A variant says only what differs: nothing but `extends` is needed in it, as everything else comes from its base.
_BY_NAME = ("formats", "sources", "memory", "power", "eager")


def _optional(fields: Fields) -> Fields:
    return replace(fields, entries={name: replace(entry, required=False) for name, entry in fields.entries.items()})


_PARTS = {name: _optional(entry) for name in _BY_NAME if isinstance(entry := PROFILE.entries[name], Fields)}
VARIANT = _optional(replace(PROFILE, entries={**PROFILE.entries, **_PARTS}))


def shipped_dir() -> Path:
    """The folder of the profiles that come with the package: inside it when installed, beside it in a checkout."""
    here = Path(__file__).parent
    return next(folder for root in (here, here.parent) if (folder := root / "configs" / "hardware").is_dir())


def profile_files(hardware_dir: str | Path | None = None) -> dict[str, Path]:
    """Profile name -> file, sorted; a file in ``hardware_dir`` stands before a shipped one of the same name."""
    folders = [shipped_dir()]
    if hardware_dir is not None:
        folders.append(Path(hardware_dir))
        if not folders[1].is_dir():
            raise InputError(f"hardware_dir={str(hardware_dir)!r} is not a folder")
    files = {_key(file.stem): file for folder in folders for file in sorted(folder.glob("*.y*ml"))}
    return dict(sorted((file.stem, file) for file in files.values()))


def find_profile(
    name_or_path: str | Path, hardware_dir: str | Path | None = None, *, beside: Sequence[Path] = ()
) -> Path:
    """The file of a profile, by name (``h100``; case, ``-`` and ``_`` do not matter) or by path (``./my.yaml``).

    Args:
        name_or_path: a name, or what ends in .yaml or holds a slash.
        hardware_dir: a folder of one's own profiles, which stand before the shipped ones.
        beside: files that refer to the name: a relative path is relative to the last one, and a name means none of
            them, so that one's own ``h100.yaml`` may extend the shipped ``h100``.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or _is_path(text):
        return beside[-1].parent / name_or_path if beside else Path(name_or_path)
    known: dict[str, Path] = {}
    for folder in (hardware_dir, None):
        known = profile_files(folder)
        for name, file in known.items():
            if _key(name) == _key(text) and file.resolve() not in [other.resolve() for other in beside]:
                return file
    raise InputError(f"unknown hardware {text!r}", hint=suggestion(text, known | profile_files(hardware_dir)))


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or "/" in text


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "-_ ")


def read_profile(name_or_path: str | Path, hardware_dir: str | Path | None = None) -> tuple[Document, list[InputError]]:
    """A profile's document with its ``extends`` merged in, and every problem that was found in it and in its bases."""
    return _read(find_profile(name_or_path, hardware_dir), hardware_dir, ())


def _read(file: Path, hardware_dir: str | Path | None, above: tuple[Path, ...]) -> tuple[Document, list[InputError]]:
    document = read_yaml(file)
    if not isinstance(document.data, dict) or "extends" not in document.data:
        return document, _all_problems(document)
    above = (*above, file)
    try:
        if len(above) > EXTENDS_LIMIT:
            raise InputError(f"more than {EXTENDS_LIMIT} files, one extending the other")
        if not isinstance(document.data["extends"], str):
            return document, problems(document, VARIANT)
        base_file = find_profile(document.data["extends"], hardware_dir, beside=above)
        base, found = _read(base_file, hardware_dir, above)
        raise_all(found)
    except InputError as error:
        here = document.error(("extends",), f"extends: {error}", hint=error.hint)
        return document, [*problems(document, VARIANT), here]
    by_path = _is_path(document.data["extends"])
    merged = merge(base, document, base_name=str(base_file.resolve()) if by_path else base_file.stem)
    return merged, _all_problems(merged)


def _all_problems(document: Document) -> list[InputError]:
    """Problems of the fields, then of what hangs together, where the fields' own check did not speak of that line."""
    found = problems(document, PROFILE)
    if isinstance(document.data, dict):
        said = {(error.file, error.line) for error in found}
        more = [*_unknown_tags(document), *_dangling_formats(document), *lints(document)]
        found += [error for error in more if (error.file, error.line) not in said]
    return found


def merge(base: Document, child: Document, *, base_name: str) -> Document:
    """``child`` over ``base``: its top-level keys stand, except that those of ``_BY_NAME`` merge name by name.

    A calibration belongs to the chip that it was fitted on: a variant without one takes its base's, and says so.
    """
    data = dict(base.data)
    data.pop("accepted", None)  # what was true of the base need not be of the variant
    if "calibration" in data and "from" not in data["calibration"]:
        data["calibration"] = {"from": base_name}
    replaced: set[KeyPath] = set()
    for name, value in child.data.items():
        if name in _BY_NAME and isinstance(value, dict) and isinstance(data.get(name), dict):
            data[name] = data[name] | value
            replaced |= {(name, key) for key in value}
        elif name != "extends":
            data[name] = value
            replaced.add((name,))

    def from_child(path: KeyPath) -> bool:
        return path == () or path[:1] in replaced or path[:2] in replaced

    lines = {path: line for path, line in base.lines.items() if not from_child(path)}
    files = {path: base.files.get(path, base.file) for path in lines}
    lines |= {path: line for path, line in child.lines.items() if from_child(path)}
    return Document(file=child.file, data=data, lines=lines, files=files, problems=child.problems)


def _unknown_tags(document: Document) -> list[InputError]:
    tags = document.data.get("sources")
    found: list[InputError] = []

    def walk(value: Any, path: KeyPath) -> None:
        if isinstance(value, dict) and "value" in value:
            given = value.get("source")
            for tag in given if isinstance(given, list) else [given]:
                if isinstance(tag, str) and isinstance(tags, dict) and tag not in tags:
                    message = f"{dotted(path)}.source={tag!r} is not in `sources`"
                    found.append(document.error((*path, "source"), message, hint=suggestion(tag, tags)))
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in ("calibration", "sources"):
                    walk(item, (*path, key))

    walk(document.data, ())
    return found


def _dangling_formats(document: Document) -> list[InputError]:
    formats = document.data.get("formats")
    entries = {name: e for name, e in formats.items() if isinstance(e, dict)} if isinstance(formats, dict) else {}
    own = [name for name, entry in entries.items() if "peak_flops_per_s" in entry]
    found = []
    for name, entry in entries.items():
        for key in ("timed_as", "falls_back_to"):
            target = entry.get(key)
            if isinstance(target, str) and target not in own:
                message = f"formats.{name}.{key}={target!r} has no rate of its own in this profile"
                found.append(document.error(("formats", name, key), message, hint=suggestion(target, own)))
    return found


def family_of(document: Document) -> dict[str, Mapping[str, Any]]:
    """The other shipped chips of the same family, name -> data: what a suspicious rate is compared with."""
    found = {}
    for name, file in profile_files().items():
        data = read_yaml(file).data
        same = file.resolve() == Path(document.file).resolve()
        if not same and "extends" not in data and data["family"] == document.data.get("family"):
            found[name] = data
    return found


def hardware_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a profile, from the same table of fields that ``check`` uses."""
    whole = json_schema(PROFILE)
    parts = {name: {"required": needed} for name in _PARTS if (needed := whole["properties"][name].get("required"))}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Hardware profile"}
    alone = {"required": whole["required"], "properties": parts}
    return head | json_schema(VARIANT) | {"anyOf": [{"required": ["extends"]}, alone]}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(hardware_schema(), indent=1) + "\n")
    sys.stdout.write(f"{SCHEMA_FILE}\n")
