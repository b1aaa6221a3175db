"""The usual lies of accelerator datasheets and of those who copy them, as checks on a profile's data.

Each lint has a name. A chip for which the finding is true says so, with the reason, under ``accepted: {name: reason}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from emulation.errors import InputError
from hwmodels.strict_yaml import Document, KeyPath, dotted

LINTS = (
    "fp8_over_16bit",
    "fp4_over_fp8",
    "sparse_note",
    "energy_per_flop",
    "flops_per_byte",
    "gb_or_gib",
    "rate_per_unit",
    "idle_over_limit",
)
_FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "mxfp8_e4m3", "mxfp8_e5m2")
_FP4 = ("nvfp4", "mxfp4_e2m1", "float4_e2m1fn")
_16BIT = ("bfloat16", "float16")
# Dense FP8 is twice the 16-bit rate and dense FP4 two to three times FP8 on every chip that shares one accumulator
# width; 2:4 sparsity doubles a rate, and a table that mixes both columns shows here.
_FP8_LIMIT, _FP4_LIMIT = 2.2, 3.5
# Board power over dense 16-bit peak: the lowest of any chip here is B200's 0.44 pJ/FLOP; a sparse H100 would be 0.35.
_LEAST_PICOJOULES = 0.40
# Dense 16-bit peak over bandwidth runs from 117 (MI250X) to 949 (Jetson Thor); units typed wrong miss by 1000.
_FLOPS_PER_BYTE = (20.0, 3000.0)
_PER_UNIT_LIMIT = 1.8
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([GM])(i?)B\b(?!/)")
_SPARSE, _NOT_SPARSE = re.compile(r"spars|2:4", re.IGNORECASE), re.compile(r"hal[fv]|dense|without", re.IGNORECASE)

Finding = tuple[str, KeyPath, str, str]


def lints(document: Document) -> list[InputError]:
    """What looks wrong inside one profile, and what it accepts although nothing is wrong.

    Values that are missing or of the wrong type are passed over: the check of the fields reports those.
    """
    data = document.data
    found = [*_ratios(data), *_sparse_notes(data), *_power(data), *_flops_per_byte(data), *_sizes(data)]
    accepted = _at(data, "accepted", kind=dict) or {}
    errors = [_error(document, finding) for finding in found if finding[0] not in accepted]
    for name in accepted:
        # rate_per_unit is judged beside other profiles, which are not at hand on every load
        if name in LINTS and name != "rate_per_unit" and name not in {finding[0] for finding in found}:
            message = f"accepted.{name}: nothing of the kind was found"
            errors.append(document.error(("accepted", name), message, hint="take the line out"))
    return errors


def family_lints(document: Document, others: Mapping[str, Mapping[str, Any]]) -> list[InputError]:
    """Rates per unit far above those of ``others``, chips of the same family: the mark of a sparse rate."""
    accepted = _at(document.data, "accepted", kind=dict) or {}
    return [_error(document, f) for f in _per_unit(document.data, others) if f[0] not in accepted]


def _error(document: Document, finding: Finding) -> InputError:
    name, path, message, hint = finding
    return document.error(path, f"{message} [{name}]", hint=f"{hint}; if it is true: accepted: {{{name}: reason}}")


def _at(data: Any, *path: str, kind: type | tuple[type, ...]) -> Any:
    """The value at a path where it is there and of the kind, else None."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, kind) and not isinstance(data, bool) else None


def _number(data: Any, *path: str) -> float | None:
    value = _at(data, *path, "value", kind=(int, float))
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _rates(data: Any, names: Iterable[str]) -> dict[str, float]:
    found = {name: _number(data, "formats", name, "peak_flops_per_s") for name in names}
    return {name: rate for name, rate in found.items() if rate is not None}


def _ratios(data: Any) -> Iterator[Finding]:
    pairs = (("fp8_over_16bit", _FP8, _16BIT, _FP8_LIMIT), ("fp4_over_fp8", _FP4, _FP8, _FP4_LIMIT))
    for lint, fast, slow, limit in pairs:
        slower = _rates(data, slow)
        if not slower:
            continue
        reference = max(slower, key=lambda name: slower[name])
        for name, rate in _rates(data, fast).items():
            if rate > limit * slower[reference]:
                times = rate / slower[reference]
                message = f"{name} at {rate:g} FLOP/s is {times:.2f} times {reference}'s {slower[reference]:g}"
                hint = f"more than {limit:g} times is usual for rates with 2:4 sparsity: give dense rates"
                yield lint, ("formats", name, "peak_flops_per_s", "value"), message, hint


def _sparse_notes(data: Any) -> Iterator[Finding]:
    for name in _at(data, "formats", kind=dict) or {}:
        note = _at(data, "formats", name, "peak_flops_per_s", "note", kind=str)
        if note and _SPARSE.search(note) and not _NOT_SPARSE.search(note):
            message = f"the note of {name}'s rate speaks of sparsity: {note!r}"
            yield (
                "sparse_note",
                ("formats", name, "peak_flops_per_s", "note"),
                message,
                "give the dense rate, and say so",
            )


def _power(data: Any) -> Iterator[Finding]:
    limit, idle, rates = _number(data, "power", "limit_w"), _number(data, "power", "idle_w"), _rates(data, _16BIT)
    if limit and idle and idle >= limit:
        message = f"power.idle_w={idle:g} is not below power.limit_w={limit:g}"
        yield "idle_over_limit", ("power", "idle_w", "value"), message, "idle power is a tenth to a third of the limit"
    if limit and rates:
        name = max(rates, key=lambda name: rates[name])
        energy = 1e12 * limit / rates[name]
        if energy < _LEAST_PICOJOULES:
            message = f"{name} at {rates[name]:g} FLOP/s in {limit:g} W is {energy:.2f} pJ per FLOP"
            hint = f"under {_LEAST_PICOJOULES:g} is usual for rates with 2:4 sparsity: give dense rates"
            yield "energy_per_flop", ("formats", name, "peak_flops_per_s", "value"), message, hint


def _flops_per_byte(data: Any) -> Iterator[Finding]:
    bandwidth, rates = _number(data, "memory", "bandwidth_bytes_per_s"), _rates(data, _16BIT)
    if not bandwidth or not rates:
        return
    name = max(rates, key=lambda name: rates[name])
    low, high = _FLOPS_PER_BYTE
    ratio = rates[name] / bandwidth
    if not low <= ratio <= high:
        message = f"{name} at {rates[name]:g} FLOP/s over {bandwidth:g} bytes/s is {ratio:g} FLOP per byte"
        hint = f"{low:g} to {high:g} is usual: is one of them 1000 times off?"
        yield "flops_per_byte", ("memory", "bandwidth_bytes_per_s", "value"), message, hint


def _sizes(data: Any) -> Iterator[Finding]:
    capacity, cache = ("memory", "capacity_bytes"), ("cache_bytes",)
    notes = {path: _at(data, *path, "note", kind=str) or "" for path in (capacity, cache)}
    title = _at(data, "title", kind=str) or ""
    for path, text, prefix, unit in ((capacity, f"{title}; {notes[capacity]}", "G", 3), (cache, notes[cache], "M", 2)):
        value = _number(data, *path)
        decimal, binary = 1000.0**unit, 1024.0**unit
        for match in _SIZE.finditer(text):
            if match[2] != prefix:
                continue
            said, other = (binary, decimal) if match[3] else (decimal, binary)
            if value == float(match[1]) * other:
                message = f"{dotted(path)}={value:g} is not the {match[0]!r} of the text beside it"
                hint = f"that is {float(match[1]) * said:.0f} bytes: 1 GB = 1e9, 1 GiB = 2^30"
                yield "gb_or_gib", (*path, "value"), message, hint


def _per_unit(data: Any, others: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    units = _number(data, "units")
    if not units:
        return
    names = [name for name in _at(data, "formats", kind=dict) or {} if name != "float32"]  # vector units differ
    for name, rate in _rates(data, names).items():
        per_unit = {
            other: _rates(chip, (name,)).get(name, 0.0) / chip["units"]["value"] for other, chip in others.items()
        }
        peers = {other: peer for other, peer in per_unit.items() if peer}
        if peers and rate / units > _PER_UNIT_LIMIT * max(peers.values()):
            peer = max(peers, key=lambda other: peers[other])
            times = rate / units / peers[peer]
            message = f"{name} at {rate:g} FLOP/s over {units} units is {times:.2f} times {peer}'s rate per unit"
            hint = "is it the rate with 2:4 sparsity, or of a package with two dies?"
            yield "rate_per_unit", ("formats", name, "peak_flops_per_s", "value"), message, hint
