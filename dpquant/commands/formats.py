"""``dpquant formats``: what each number format can hold, and how much of some data survives in it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Column, Output, Table, number
from emulation.errors import InputError, regular_file, suggestion
from emulation.formats import ALIASES, FORMATS, BlockFormat, Format, NumberFormat, get_format

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "Compare number formats: codes, range, epsilon, error on data."
EXAMPLES = """\
examples:
  dpquant formats                        every format, and which chips have it
  dpquant formats float8_e4m3fn --codes  its facts and all its 256 codes
  dpquant formats --data normal          which keep a normal distribution best?
  dpquant formats --data gradients.npy   ... or your own tensor
  dpquant formats --compare qtorch       where qtorch's kernels differ"""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show one format: a name or an alias, such as fp8")
    parser.add_argument("--codes", action="store_true", help="with NAME: list every code with its value")
    parser.add_argument("--data", metavar="DATA", help="rank formats on normal, lognormal, laplace, or a FILE.npy")
    parser.add_argument("--compare", metavar="qtorch", help="count differences from qtorch's own kernels")
    parser.add_argument("--hardware-dir", metavar="DIR", help="a folder of your own hardware profiles")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    if sum(bool(given) for given in (args.name, args.data, args.compare)) > 1:
        raise InputError("give one of NAME, --data and --compare")
    if args.codes and not args.name:
        raise InputError("--codes needs the NAME of a format", hint="dpquant formats float8_e4m3fn --codes")
    if args.name:
        return _one(get_format(args.name), args, out)
    if args.data:
        return _ranking(args.data, out)
    if args.compare:
        return _comparison(args.compare, out)
    return _all(args, out)


def facts(fmt: Format, native: list[str]) -> dict[str, Any]:
    """One format as plain data: its element's figures, and its own scales'."""
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    row = {
        "name": fmt.name,
        "aliases": [alias for alias, name in ALIASES.items() if name == fmt.name],
        "bits": fmt.bits,
        "bits_per_element": fmt.bits_per_element,
        "codes": element.code_count,
        "max": element.max_value,
        "min_normal": element.min_normal,
        "min_subnormal": element.min_subnormal,
        "epsilon": element.epsilon,
        "exponent_bits": element.exponent_bits,
        "mantissa_bits": element.mantissa_bits,
        "bias": element.bias,
        "has_inf": element.has_inf,
        "has_nan": element.has_nan,
        "native_on": native,
    }
    if isinstance(fmt, BlockFormat):
        row |= {
            "element": fmt.element.name,
            "block_size": fmt.block_size,
            "scale": fmt.scale.name,
            "scale_rule": fmt.scale_rule,
            "tensor_scale": fmt.tensor_scale,
        }
    return row


def _native(hardware_dir: str | None) -> dict[str, list[str]]:
    """Format name -> profiles whose matrix units take it themselves."""
    from hwmodels.profile import list_profiles, load_profile

    found: dict[str, list[str]] = {name: [] for name in FORMATS}
    for name in list_profiles(hardware_dir):
        for format_name, rate in load_profile(name, hardware_dir).formats.items():
            if rate.native:
                found[format_name].append(name)
    return found


def _all(args: argparse.Namespace, out: Output) -> int:
    native = _native(args.hardware_dir)
    rows = [facts(fmt, native[name]) for name, fmt in FORMATS.items()]
    if out.form == "json":
        out.json({"rows": rows})
        return 0
    columns = [
        Column(key="name", title="format"),
        Column(key="bits_per_element", title="bits", show=number, right=True),
        Column(
            key="codes", title="codes", show=lambda v: f"{v:,}" if v <= 65536 else f"2^{v.bit_length() - 1}", right=True
        ),
        Column(key="max", title="max", show=number, right=True),
        Column(key="min_subnormal", title="min", show=number, right=True),
        Column(key="epsilon", title="epsilon", show=number, right=True),
        Column(key="native_on", title="native on", show=_short_list, wrap=True),
    ]
    if out.form == "csv":
        columns = [Column(key=key, title=key) for key in rows[0]]
    out.table(Table(columns=columns, rows=rows))
    out.note(
        "Bits count each element's share of its block's scale; max, min (smallest positive) and epsilon are of the "
        "elements before scaling."
    )
    out.note(
        "Native is what the profiles say a matrix unit takes itself, which need not be faster: `dpquant estimate`."
    )
    return 0


def _short_list(names: list[str]) -> str:
    if not names:
        return "-"
    return " ".join(names) if len(names) <= 3 else f"{' '.join(names[:2])} +{len(names) - 2}"


def _one(fmt: Format, args: argparse.Namespace, out: Output) -> int:
    row = facts(fmt, _native(args.hardware_dir)[fmt.name] if fmt.name in FORMATS else [])
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    codes = [{"code": c, "value": v} for c, v in element.values()] if args.codes or element.bits <= 8 else []
    if out.form == "json":
        out.json(row | {"values": codes})
        return 0
    if out.form == "csv":
        out.table(Table(columns=[Column(key="code", title="code"), Column(key="value", title="value")], rows=codes))
        return 0
    out.show(f"{fmt.name}: {_sentence(fmt)}")
    shown = [{"fact": key, "text": _fact(value)} for key, value in row.items() if key != "name"]
    out.table(
        Table(columns=[Column(key="fact", title="fact"), Column(key="text", title="value", wrap=True)], rows=shown)
    )
    if codes:
        out.show(f"every code of {element.name} and its value:")
        _code_grid(codes, element, out)
    elif element.bits <= 16:
        out.say("--codes lists all of its values")
    return 0


def _sentence(fmt: Format) -> str:
    if isinstance(fmt, BlockFormat):
        share = f"blocks of {fmt.block_size}" if fmt.block_size else "each example or channel"
        return f"{fmt.element.name} elements; {share} share a {fmt.scale.name} scale"
    if fmt.kind == "int":
        return f"two's complement integers of {fmt.bits} bits"
    sign = "sign, " if fmt.signed else "no sign, "
    return f"{sign}{fmt.exponent_bits} exponent bits, {fmt.mantissa_bits} mantissa bits"


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, list):
        return " ".join(value) or "-"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _code_grid(codes: list[dict[str, Any]], element: NumberFormat, out: Output) -> None:
    """All codes in as many columns as fit, read downwards."""
    width = max(len(f"{c['value']:.6g}") for c in codes)
    digits = (element.bits + 3) // 4
    cells = [f"{c['code']:0{digits}x} {c['value']:>{width}.6g}" for c in codes]
    columns = max(1, (out.console().width + 3) // (digits + 1 + width + 3))
    height = -(-len(cells) // columns)
    for line in range(height):
        out.show("   ".join(cells[line::height]))


def _ranking(data: str, out: Output) -> int:
    """Formats on data, best signal-to-noise ratio first."""
    from emulation.compare import DISTRIBUTIONS, rank_formats, sample_data

    if data in DISTRIBUTIONS:
        x = sample_data(data)
    elif data.endswith(".npy") or Path(data).exists():
        x = _npy(Path(data))
    else:
        hint = f"{suggestion(data, DISTRIBUTIONS).rstrip('?')}, or give a FILE.npy"
        raise InputError(f"--data {data!r} is neither a distribution nor a file", hint=hint)
    rows = [vars(row) for row in rank_formats(x)]
    if out.form == "json":
        out.json({"data": data, "count": x.numel(), "rows": rows})
        return 0
    columns = [
        Column(key="format", title="format"),
        Column(key="bits_per_element", title="bits", show=number, right=True),
        Column(key="sqnr_db", title="SQNR", show=lambda v: f"{v:.2f} dB", right=True),
        Column(key="overflow_share", title="overflow", show=_share, right=True),
        Column(key="underflow_share", title="to zero", show=_share, right=True),
    ]
    if out.form == "csv":
        columns = [Column(key=column.key, title=column.key) for column in columns]
    small = next((i for i, row in enumerate(rows) if row["bits_per_element"] < 8), None)
    out.table(Table(columns=columns, rows=rows, best=small))
    if small is not None:
        best = rows[small]
        out.note(f"Of the formats under 8 bits {best['format']} keeps this data best: {best['sqnr_db']:.2f} dB.")
    out.note(
        f"{x.numel():,} numbers, one scale per tensor (and per block where the format has blocks), nearest rounding; "
        "training also depends on how errors correlate, which no such figure shows."
    )
    return 0


def _share(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.3g} %"


def _npy(path: Path) -> Tensor:
    """The numbers in a file, as rows for block scales to run along."""
    import numpy as np
    import torch

    try:
        array = np.load(regular_file(path), allow_pickle=False)
    except FileNotFoundError:
        raise InputError("does not exist", file=path) from None
    except InputError:
        raise
    except Exception as error:  # numpy reads a header as Python: damaged ones end in syntax, token and other errors
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot be read as .npy ({line})", file=path) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.size == 0:
        raise InputError("holds no array of numbers", file=path, hint="save one with numpy.save")
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(tensor).all()):
        raise InputError("holds NaN or infinity (or values beyond float32)", file=path)
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _comparison(other: str, out: Output) -> int:
    """Where qtorch's own kernels round differently, on every bfloat16 value."""
    if other != "qtorch":
        raise InputError(f"--compare {other!r} is not known", hint="--compare qtorch")
    from emulation.compare import qtorch_differences

    rows = []
    for fmt in FORMATS.values():
        if isinstance(fmt, NumberFormat) and fmt.name != "float32":
            try:
                rows.append(_differences(vars(qtorch_differences(fmt))))
            except InputError as error:
                if "qtorch has no number" not in error.message:
                    raise  # the kernels cannot be built
    if out.form == "json":
        out.json({"rows": rows})
        return 0
    causes = list(rows[0]["by_cause"])
    flat = [row | row["by_cause"] for row in rows]
    columns = [
        Column(key="format", title="format"),
        Column(key="differing", title="differ", show=lambda v: f"{v:,}", right=True),
        *(Column(key=cause, title=_SHORT.get(cause, cause), show=lambda v: f"{v:,}", right=True) for cause in causes),
    ]
    if out.form == "csv":
        columns = [Column(key=column.key, title=column.key) for column in columns]
    out.table(Table(columns=columns, rows=flat))
    out.note(f"Differences from exact nearest-even rounding among all {rows[0]['count']:,} bfloat16 values, by cause.")
    out.note("The exact codec is the path that everything here takes; qtorch's kernels are a cross-check.")
    return 0


_SHORT = {"sign of zero": "-0", "rounded twice": "twice"}


def _differences(found: dict[str, Any]) -> dict[str, Any]:
    """One format's row, mappings as plain dicts."""
    by_cause = dict(found["by_cause"])
    examples = {cause: [list(example) for example in three] for cause, three in found["examples"].items()}
    return found | {"by_cause": by_cause, "differing": sum(by_cause.values()), "examples": examples}
