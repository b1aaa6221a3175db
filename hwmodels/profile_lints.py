"""The usual lies of accelerator datasheets and of those who copy them, as checks on a profile's data.

Each lint has a name. A chip for which the finding is true says so, with the reason, under ``accepted: {name: reason}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from emulation.errors import InputError
from hwmodels.strict_yaml import Document, KeyPath, dotted

LINTS = (
    "fp8_over_16bit",
    "fp4_over_fp8",
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
# Dense 16-bit peak over bandwidth runs from 120 (MI250X) to 950 (Jetson Thor); units typed wrong miss by 1000.
_FLOPS_PER_BYTE = (20.0, 3000.0)
_PER_UNIT_LIMIT = 1.8
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([GM])(i?)B\b(?!/)")

Finding = tuple[str, KeyPath, str, str]


def lints(document: Document) -> list[InputError]:
    """What looks wrong inside one profile whose fields are right, and what it accepts although nothing is wrong."""
    return _errors(document, [*_ratios(document.data), *_magnitudes(document.data), *_sizes(document.data)])


def family_lints(document: Document, others: Mapping[str, Mapping[str, Any]]) -> list[InputError]:
    """Rates per unit far above those of ``others``, chips of the same family: the mark of a sparse rate."""
    accepted = document.data.get("accepted", {})
    found = [f for f in _per_unit(document.data, others) if f[0] not in accepted]
    return [_error(document, finding) for finding in found]


def _errors(document: Document, found: list[Finding]) -> list[InputError]:
    accepted = document.data.get("accepted", {})
    errors = [_error(document, finding) for finding in found if finding[0] not in accepted]
    for name in accepted:
        # rate_per_unit is judged beside other profiles, which are not at hand on every load
        if name != "rate_per_unit" and name not in {finding[0] for finding in found}:
            message = f"accepted.{name}: nothing of the kind was found"
            errors.append(document.error(("accepted", name), message, hint="take the line out"))
    return errors


def _error(document: Document, finding: Finding) -> InputError:
    name, path, message, hint = finding
    return document.error(path, f"{message} [{name}]", hint=f"{hint}; if it is true: accepted: {{{name}: reason}}")


def _rates(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    formats = data["formats"]
    return {name: r["value"] for name in names if (r := formats.get(name, {}).get("peak_flops_per_s")) is not None}


def _ratios(data: Mapping[str, Any]) -> Iterator[Finding]:
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


def _magnitudes(data: Mapping[str, Any]) -> Iterator[Finding]:
    rates = _rates(data, _16BIT)
    power = data.get("power")
    if power is not None and power["idle_w"]["value"] >= power["limit_w"]["value"]:
        message = f"power.idle_w={power['idle_w']['value']:g} is not below power.limit_w={power['limit_w']['value']:g}"
        yield "idle_over_limit", ("power", "idle_w", "value"), message, "idle power is a tenth to a third of the limit"
    if not rates:
        return
    name = max(rates, key=lambda name: rates[name])
    path = ("formats", name, "peak_flops_per_s", "value")
    if power is not None and (energy := 1e12 * power["limit_w"]["value"] / rates[name]) < _LEAST_PICOJOULES:
        message = f"{name} at {rates[name]:g} FLOP/s in {power['limit_w']['value']:g} W is {energy:.2f} pJ per FLOP"
        yield "energy_per_flop", path, message, f"under {_LEAST_PICOJOULES:g} is usual for rates with 2:4 sparsity"
    bandwidth = data["memory"]["bandwidth_bytes_per_s"]["value"]
    low, high = _FLOPS_PER_BYTE
    if not low <= rates[name] / bandwidth <= high:
        message = (
            f"{name} at {rates[name]:g} FLOP/s over {bandwidth:g} bytes/s is {rates[name] / bandwidth:g} FLOP per byte"
        )
        hint = f"{low:g} to {high:g} is usual: is one of them 1000 times off?"
        yield "flops_per_byte", ("memory", "bandwidth_bytes_per_s", "value"), message, hint


def _sizes(data: Mapping[str, Any]) -> Iterator[Finding]:
    capacity = data["memory"]["capacity_bytes"]
    texts: list[tuple[KeyPath, Any, str, str]] = [
        (("memory", "capacity_bytes"), capacity, f"{data['title']}; {capacity.get('note', '')}", "G")
    ]
    if cache := data.get("cache_bytes"):
        texts.append((("cache_bytes",), cache, cache.get("note", ""), "M"))
    for path, number, text, prefix in texts:
        decimal, binary = (1e9, 2.0**30) if prefix == "G" else (1e6, 2.0**20)
        for match in _SIZE.finditer(text):
            if match[2] != prefix:
                continue
            said, other = (binary, decimal) if match[3] else (decimal, binary)
            if number["value"] == float(match[1]) * other != float(match[1]) * said:
                message = f"{dotted(path)}={number['value']:g} is not the {match[0]!r} of the text beside it"
                hint = f"that is {float(match[1]) * said:.0f} bytes: 1 GB = 1e9, 1 GiB = 2^30"
                yield "gb_or_gib", (*path, "value"), message, hint


def _per_unit(data: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for name, entry in data["formats"].items():
        if "peak_flops_per_s" not in entry or name == "float32":  # vector units differ within a family
            continue
        rate = entry["peak_flops_per_s"]["value"] / data["units"]["value"]
        peers = {
            other: rates[name] / chip["units"]["value"]
            for other, chip in others.items()
            if (rates := _rates(chip, (name,)))
        }
        if peers and rate > _PER_UNIT_LIMIT * max(peers.values()):
            peer = max(peers, key=lambda other: peers[other])
            times = rate / peers[peer]
            message = f"{name} at {rate:g} FLOP/s per unit is {times:.2f} times {peer}'s, of the same family"
            hint = "is it the rate with 2:4 sparsity, or of a package with two dies?"
            yield "rate_per_unit", ("formats", name, "peak_flops_per_s", "value"), message, hint
