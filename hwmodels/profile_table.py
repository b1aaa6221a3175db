"""The tables of docs/hardware.md, from the profiles and from their fields: ``python -m hwmodels.profile_table``."""

from __future__ import annotations

import sys
from pathlib import Path

from hwmodels.fields import Field, Fields, Flag, Items, Number, OneOf, Table, Text
from hwmodels.profile import HardwareProfile, list_profiles, load_profile
from hwmodels.profile_yaml import PROFILE

_COLUMNS = {
    "TF32": "tfloat32",
    "BF16": "bfloat16",
    "FP16": "float16",
    "INT8": "int8",
    "FP8": "float8_e4m3fn",
    "MXFP8": "mxfp8_e4m3",
    "FP6": "mxfp6_e2m3",
    "MXFP4": "mxfp4_e2m1",
    "NVFP4": "nvfp4",
}
_SHORT = {name: column for column, name in _COLUMNS.items()} | {"float32": "FP32", "float8_e4m3": "IEEE FP8"}
_SHORT |= {"float8_e4m3fnuz": "FNUZ FP8", "float8_e5m2": "FP8"}


def chips_table() -> str:
    """One row per shipped chip, in Markdown: dense TFLOPS per format, memory, power, what times it."""
    heads = ["profile", *_COLUMNS, "memory GB", "GB/s", "W", "emulated unit", "calibrated on"]
    rows = [heads, ["---"] * len(heads)]
    rows += [_chip(load_profile(name)) for name in list_profiles()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _chip(profile: HardwareProfile) -> list[str]:
    cells = [f"`{profile.name}`", *(_rate(profile, name) for name in _COLUMNS.values())]
    memory = profile.memory
    cells += [f"{memory.capacity_bytes / 1e9:.4g}", f"{memory.bandwidth_bytes_per_s / 1e9:.4g}"]
    cells.append(f"{profile.power.limit_w:g}" if profile.power else "?")
    return [*cells, profile.matrix_unit or "?", profile.calibrated_on or "peak only"]


def _rate(profile: HardwareProfile, name: str) -> str:
    rate = profile.rate(name)
    if rate.falls_back_to:
        return f"→ {_SHORT[rate.falls_back_to]}"
    if rate.timed_as != name:
        return f"as {_SHORT[rate.timed_as]}"
    marks = {"derived": "ᵈ", "assumed": "ᵃ", "measured": "ᵐ", "fitted": "ᶠ"}
    return f"{rate.peak_flops_per_s / 1e12:.5g}{marks.get(rate.status, '')}"


def fields_table() -> str:
    """One row per key of a profile, in Markdown: the key, what it holds, what it means."""
    rows = ["| key | holds | meaning |", "| --- | --- | --- |", *_rows("", PROFILE)]
    return "\n".join(rows) + "\n"


def _rows(prefix: str, fields: Fields) -> list[str]:
    rows = []
    for name, entry in fields.entries.items():
        key = prefix + name
        optional = "" if entry.required else " (optional)"
        rows.append(f"| `{key}` | {_holds(entry)}{optional} | {entry.doc} |")
        if name in ("memory", "power") and isinstance(entry, Fields):
            rows += _rows(f"{key}.", entry)
        if name == "formats" and isinstance(entry, Table) and isinstance(entry.value, OneOf):
            for option in entry.value.options:
                assert isinstance(option, Fields)
                rows.append(f"| `{key}.NAME` | either | {option.doc} |")
                rows += [row for row in _rows(f"{key}.NAME.", option) if ".note`" not in row]
    return rows


def _holds(field: Field) -> str:
    match field:
        case Number():
            return "whole number" if field.integer else "number"
        case Text():
            few = field.choices is not None and len(field.choices) < 8
            return " or ".join(f"`{choice}`" for choice in field.choices or ()) if few else "text"
        case Flag():
            return "`true` or `false`"
        case Items():
            return "list"
        case Fields() if "value" in field.entries:
            value = field.entries["value"]
            assert isinstance(value, Number)
            return f"number with source, {value.minimum:g} to {value.maximum:g}"
    return "mapping"


def with_tables(text: str) -> str:
    """``text`` with what stands between its markers replaced by the tables as they are now."""
    for name, table in (("chips", chips_table()), ("fields", fields_table())):
        start, end = f"<!-- {name}: written by `python -m hwmodels.profile_table` -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = before + start + table + rest[rest.index(end) :]
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/hardware.md")
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
