"""``dpquant hardware``: the accelerator profiles, where their numbers are from, and how far to trust them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, gibibytes, number, percent, seconds, si
from emulation.errors import InputError

if TYPE_CHECKING:
    from hwmodels.profile import HardwareProfile

SUMMARY = "List, show, check and validate hardware profiles; measure a chip into one."
EXAMPLES = """\
examples:
  dpquant hardware list
  dpquant hardware show h100
  dpquant hardware show h100 --csv > h100.csv    every number, as a table
  dpquant hardware check my-chip.yaml
  dpquant hardware validate h100 --data measured.csv
  dpquant hardware calibrate --out mine.yaml"""

_UNITS = {  # the longer ends first
    "_flops_per_s": "FLOP/s",
    "_bytes_per_s": "B/s",
    "_bytes_per_flop": "B/FLOP",
    "joules_per_byte": "J/B",
    "joules_per_flop": "J/FLOP",
    "_percent": "%",
    "_bytes": "B",
    "_s": "s",
    "_w": "W",
}
_SHOWN_FORMATS = ("bfloat16", "float8_e4m3fn", "nvfp4", "mxfp4_e2m1")


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=type(parser))

    def action(name: str, text: str) -> argparse.ArgumentParser:
        result = actions.add_parser(name, help=text, description=text, parents=[common])
        result.add_argument("--hardware-dir", metavar="DIR", help="a folder of your own profiles, looked up first")
        result.set_defaults(action=name)
        return result

    action("list", "Every profile on one line.")
    action("show", "One profile: every number with status and source.").add_argument(
        "name", metavar="NAME", help="a profile's name, or a YAML file"
    )
    action("check", "Every problem of profile files at once, with file and line.").add_argument(
        "files", metavar="FILE", nargs="*", help="YAML files, or names"
    )
    validate = action("validate", "The model of GEMM time against a table of measurements.")
    validate.add_argument("name", metavar="NAME", help="a profile's name, or a YAML file")
    validate.add_argument("--data", metavar="CSV", help="columns gemm_dtype, m, n, k, latency_us; device if several")
    validate.add_argument("--device", metavar="NAME", help="which device's rows; default: the profile's own")
    calibrate = action("calibrate", "Measure this machine into a profile, in under five minutes.")
    calibrate.add_argument("--out", metavar="FILE", help="the profile to write: mine.yaml")
    calibrate.add_argument("--data", metavar="CSV", help="also write what was timed, as `validate` reads it")
    calibrate.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu; default: CUDA where there is any")
    calibrate.add_argument("--extends", metavar="PROFILE", help="the chip's profile; default: known by its name")
    calibrate.add_argument("--seconds", metavar="N", type=float, default=200.0, help="of measuring (default: 200)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    if args.action is None:
        raise InputError("no action given", hint="dpquant hardware list, show, check, validate or calibrate")
    actions = {"list": _list, "show": _show, "check": _check, "validate": _validate, "calibrate": _calibrate}
    return actions[args.action](args, out)


def _list(args: argparse.Namespace, out: Output) -> int:
    from hwmodels.profile import list_profiles, load_profile

    rows = [_summary(load_profile(name, args.hardware_dir)) for name in list_profiles(args.hardware_dir)]
    if out.form == "json":
        out.json({"rows": rows})
        return 0
    columns = [
        Column(key="name", title="name"),
        Column(key="vendor", title="vendor", spare=True),
        Column(key="year", title="year", right=True, spare=True),
        Column(key="memory_bytes", title="GB", show=lambda v: f"{v / 1e9:.0f}", right=True),
        Column(key="bandwidth_bytes_per_s", title="TB/s", show=lambda v: f"{v / 1e12:.2f}", right=True),
        *(
            Column(key=f, title=t, show=lambda v: f"{v / 1e12:.0f}", right=True)
            for f, t in zip(_SHOWN_FORMATS, ("bf16", "fp8", "nvfp4", "mxfp4"), strict=True)
        ),
        Column(key="power_limit_w", title="W", show=lambda v: f"{v:.0f}", right=True),
        Column(key="calibrated_on", title="calibrated on"),
    ]
    if out.form == "csv":
        columns = [Column(key=key, title=key) for key in rows[0]]
    out.table(Table(columns=columns, rows=rows))
    out.note("Rates are dense TFLOPS of formats that the matrix unit takes itself; a dash is none, or not published.")
    out.note("Peaks are published figures, not what kernels reach; `show NAME` says where each number is from.")
    return 0


def _summary(profile: HardwareProfile) -> dict[str, Any]:
    rates = {f: r.peak_flops_per_s for f in _SHOWN_FORMATS if (r := profile.formats.get(f)) is not None and r.native}
    return {
        "name": profile.name,
        "title": profile.title,
        "vendor": profile.vendor,
        "family": profile.family,
        "year": profile.year,
        "memory_bytes": profile.memory.capacity_bytes,
        "bandwidth_bytes_per_s": profile.memory.bandwidth_bytes_per_s,
        "power_limit_w": profile.power.limit_w if profile.power else None,
        **{f: rates.get(f) for f in _SHOWN_FORMATS},
        "native_formats": [name for name, rate in profile.formats.items() if rate.native],
        "calibrated_on": profile.calibrated_on,
    }


def _show(args: argparse.Namespace, out: Output) -> int:
    from hwmodels.profile import describe, load_profile

    profile = load_profile(args.name, args.hardware_dir)
    facts = describe(profile) | {"calibration": _fitted(profile)}
    if out.form == "json":
        out.json(facts)
        return 0
    if out.form == "csv":
        keys = ("key", "value", "unit", "status", "source", "url", "note")
        out.table(Table(columns=[Column(key=key, title=key) for key in keys], rows=_every_number(profile, facts)))
        return 0
    out.show(f"{facts['name']}: {facts['title']} ({facts['vendor']}, {facts['family']}, {facts['year']})")
    if facts["note"]:
        out.show(facts["note"])
    rows = [
        row | {"text": _quantity(row["key"], row["value"]), "from": ", ".join(row["sources"])}
        for row in facts["numbers"]
    ]
    out.table(
        Table(
            columns=[
                Column(key="key", title="number"),
                Column(key="text", title="value", right=True),
                Column(key="status", title="status"),
                Column(key="sources", title="source", show=", ".join, wrap=True),
            ],
            rows=rows,
        )
    )
    own = [row for row in facts["formats"] if row["timed_as"] == row["format"]]
    columns = [
        Column(key="format", title="format"),
        Column(key="peak_flops_per_s", title="dense peak", show=lambda v: si(v, "FLOPS"), right=True),
        Column(key="way", title="matrix unit", wrap=True),
        Column(key="status", title="status"),
        Column(key="sources", title="source", show=", ".join, wrap=True),
    ]
    out.table(Table(columns=columns, rows=[row | {"way": _way(row)} for row in own]))
    for text in _borrowed(facts["formats"]):
        out.show(text)
    out.show("")
    for tag, source in facts["sources"].items():
        print(f"{tag}: {source['title']}" + (f" <{source['url']}>" if source["url"] else ""))
    out.show("")
    _show_calibration(facts, out)
    return 0


def _every_number(profile: HardwareProfile, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per number, under its key in the YAML: the chip's, its formats' own peaks, its calibration's constants."""
    rates = [
        rate | {"key": f"formats.{rate['format']}.peak_flops_per_s", "value": rate["peak_flops_per_s"]}
        for rate in facts["formats"]
        if rate["timed_as"] == rate["format"]
    ]
    rows = []
    for row in (*facts["numbers"], *rates):
        sources = [facts["sources"][tag] for tag in row["sources"]]
        rows.append(
            {name: row[name] for name in ("key", "value", "status", "note")}
            | {"source": "; ".join(source["title"] for source in sources)}
            | {"url": " ".join(source["url"] for source in sources if source["url"])}
        )
    if profile.calibration is not None:
        rows += _constants("calibration", profile.calibration, None)
    return [row | {"unit": _unit(row["key"])} for row in rows]


def _constants(path: str, part: Any, source: str | None) -> Iterator[dict[str, Any]]:
    """The single numbers of a calibration, tables such as tiles and corrections aside, with what each was fitted on."""
    entries = part if isinstance(part, Mapping) else vars(part)
    source = entries["fitted"].source if "fitted" in entries else source
    for name, value in entries.items():
        key = f"{path}.{name}"
        if isinstance(value, (int, float)):
            yield {"key": key, "value": value, "status": "fitted", "source": source}
        elif isinstance(value, Mapping) or is_dataclass(value):
            yield from () if name == "correction" else _constants(key, value, source)


def _unit(key: str) -> str | None:
    """The SI unit that a key's end names; None for a plain number."""
    return next((unit for end, unit in _UNITS.items() if key.endswith(end)), None)


def _fitted(profile: HardwareProfile) -> list[dict[str, Any]]:
    """What each kernel's constants were fitted on, and how far off they were on shapes the fit had not seen."""
    if profile.calibration is None:
        return []
    return [{"kernel": name} | vars(kernel.fitted) for name, kernel in profile.calibration.kernels.items()]


def _show_calibration(facts: dict[str, Any], out: Output) -> None:
    on = facts["calibrated_on"]
    if on is None:
        out.note("No calibration: only the peak basis, a roofline, is to be had.")
        return
    columns = [
        Column(key="kernel", title="calibrated"),
        Column(key="rows", title="rows", right=True),
        _error("held_out_mape_percent", "mean error"),
        _error("held_out_median_percent", "median"),
        Column(key="held_out_rank_correlation", title="rank corr.", show=lambda v: f"{v:.3f}", right=True),
    ]
    out.table(Table(columns=columns, rows=facts["calibration"]))
    for source in dict.fromkeys(row["source"] for row in facts["calibration"]):
        out.note(f"Fitted on {source}.")
    base = "its own measurements" if on == facts["name"] else f"measurements of {on}, a chip of its family"
    out.note(f"Calibrated on {base}; errors are those of products that the fit had not seen.")


def _quantity(key: str, value: float | None) -> str | None:
    if value is None:
        return None
    if key.endswith("bytes_per_s"):
        return si(value, "B/s", 4)
    if key == "cache_bytes":
        return gibibytes(value)
    if key.endswith("_bytes"):
        return si(value, "B", 4)
    if key.endswith("flops_per_s"):
        return si(value, "FLOPS", 4)
    if key.endswith("_w"):
        return f"{value:g} W"
    return seconds(value) if key.endswith("_s") else number(value)


def _way(rate: dict[str, Any]) -> str:
    block = f", blocks of {rate['scale_block']}" if rate["scale_block"] else ""
    return ("native" if rate["native"] else "not native") + block


def _borrowed(formats: list[dict[str, Any]]) -> list[str]:
    """A sentence for each rate that other formats use, and why."""
    lines = []
    for rate in formats:
        name = rate["format"]
        stored = [r["format"] for r in formats if r["timed_as"] == name != r["format"] and not r["falls_back_to"]]
        converted = [r["format"] for r in formats if r["falls_back_to"] == name]
        if stored:
            lines.append(f"Timed as {name}, as if the matrix unit took them: {', '.join(stored)}.")
        if converted:
            lines.append(f"Not taken by the matrix unit, converted to {name}: {', '.join(converted)}.")
    return lines


def _check(args: argparse.Namespace, out: Output) -> int:
    from hwmodels.profile import check

    if not args.files:
        raise InputError("no file to check", hint="dpquant hardware check FILE...")
    rows: list[dict[str, Any]] = []
    for file in args.files:
        path = Path(file)
        try:
            found = check(path if path.exists() else file, args.hardware_dir)
        except InputError as error:
            found = [error]
        rows += [
            {"file": str(e.file or file), "line": e.line, "message": e.message, "hint": e.hint, "text": str(e)}
            for e in found
        ]
        if not found and out.form == "text":
            print(f"{file}: no problem found")
    keys = ("file", "line", "message", "hint")
    if out.form == "json":
        out.json({"files": len(args.files), "problems": [{key: row[key] for key in keys} for row in rows]})
    elif out.form == "csv":
        out.table(Table(columns=[Column(key=key, title=key) for key in keys], rows=rows))
    else:
        for row in rows:
            print(row["text"] + (f"\n  hint: {row['hint']}" if row["hint"] else ""))  # not wrapped: editors parse it
    return 1 if rows else 0


def _validate(args: argparse.Namespace, out: Output) -> int:
    from hwmodels.profile import load_profile
    from hwmodels.validate import of_device, read_measurements, validate

    if args.data is None:
        raise InputError("no measurements given", hint="--data FILE.csv with columns gemm_dtype, m, n, k, latency_us")
    profile = load_profile(args.name, args.hardware_dir)
    rows = validate(profile, of_device(read_measurements(args.data), args.device or profile.name))
    if out.form == "json":
        out.json({"hardware": profile.name, "rows": rows})
        return 0
    columns = [
        Column(key="format", title="kernel"),
        Column(key="n", title="rows", right=True),
        _error("mape_percent", "mean error"),
        _error("median_percent", "median"),
        Column(key="rank_correlation", title="rank corr.", show=lambda v: f"{v:.3f}", right=True),
        _error("roofline_mape_percent", "roofline's"),
        *([_error("energy_mape_percent", "energy")] if any("energy_mape_percent" in row for row in rows) else []),
    ]
    if out.form == "csv":
        columns = [Column(key=column.key, title=column.key) for column in columns]
    out.table(Table(columns=columns, rows=rows))
    for row in rows:
        worst = row["worst"][0]
        size = f"{worst['m']}x{worst['n']}x{worst['k']}"
        note = f" ({row['note']})" if row["note"] else ""
        measured, predicted = worst["measured_us"], worst["predicted_us"]
        out.note(
            f"{row['format']}{note}: furthest off is {size}, {measured:.3g} us measured, {predicted:.3g} predicted."
        )
    out.note("Mean and median are absolute errors of the predicted time; roofline's is that of published peaks alone.")
    return 0


def _calibrate(args: argparse.Namespace, out: Output) -> int:
    if args.out is None:
        raise InputError("no file to write the profile to", hint="--out mine.yaml")
    if not 1 <= args.seconds <= 3600:
        raise InputError(f"seconds={args.seconds:g} is not between 1 and 3600", hint="200 measures a GPU well")
    for path in filter(None, (args.out, args.data)):
        if Path(path).exists():
            raise InputError(f"{path} is already there", hint="name a new file")
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise InputError(f"{path}: its folder is not there", hint="make it first")
        if not os.access(folder, os.W_OK, effective_ids=True):  # said now, not after minutes of measuring
            raise InputError(f"{path}: its folder cannot be written")
    from dpquant.progress import Progress
    from dpquant.rundir import write_atomic
    from hwmodels.calibrate import calibrate, measurements_csv

    with Progress(out, "starting", 1.0) as progress:
        found = calibrate(
            args.device,
            base=args.extends,
            budget_s=args.seconds,
            progress=lambda label, fraction: progress.update(fraction, label=label),
        )
    write_atomic(Path(args.out), found.profile_yaml.encode())
    if args.data:
        write_atomic(Path(args.data), measurements_csv(found.measurements).encode())
    if out.form == "json":
        out.json({"profile": args.out, "rows": list(found.rows), "notes": list(found.notes)})
        return 0
    table = [
        Column(key="format", title="kernel"),
        Column(key="n", title="shapes", right=True),
        _error("mape_percent", "mean error"),
        _error("median_percent", "median"),
        Column(key="rank_correlation", title="rank corr.", show=lambda v: f"{v:.3f}", right=True),
    ]
    if out.form == "csv":
        table = [Column(key=column.key, title=column.key) for column in table]
    out.table(Table(columns=table, rows=list(found.rows)))
    for note in (*found.notes, "Errors are of shapes that were kept from the fit.", f"wrote {args.out}"):
        out.note(note)
    return 0


def _error(key: str, title: str) -> Column:
    return Column(key=key, title=title, show=lambda v: percent(v / 100), right=True)
