"""Constants fitted to measurements of a chip: as frozen data, as YAML fields, and from the one to the other.

A calibration holds only ratios to a chip's published numbers and times in seconds, so that one that was fitted on a
chip predicts its siblings. What the constants mean is in ``hwmodels.gemm``; how they are fitted in ``hwmodels.fit``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from emulation.errors import InputError, suggestion
from hwmodels.fields import Field, Fields, Items, Number, OneOf, Table, Text

# The kernels that inference libraries ship and publish times of, and the format whose peak rate bounds each.
KERNELS: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "bfloat16", "fp8": "float8_e4m3fn", "fp8_block": "float8_e4m3fn", "nvfp4": "nvfp4"}
)


@dataclass(frozen=True, kw_only=True)
class QuantizeCalibration:
    """The passes that turn a bfloat16 activation into a GEMM's operand: find the largest values, then scale and cast.

    Attributes:
        amax_s, cast_s: fixed seconds of each pass; ``amax_s`` is 0 where one kernel does both.
        amax_bandwidth_efficiency, cast_bandwidth_efficiency: fraction of the memory's bandwidth that each pass reaches
            (above 1 where the tensor is still cached); the first is None where one kernel does both.
    """

    amax_s: float
    amax_bandwidth_efficiency: float | None
    cast_s: float
    cast_bandwidth_efficiency: float


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A smooth factor on the physical model: its natural logarithm on a coarse grid over log2 of m, n and k.

    Linear between the knots; outside them the edge's value fades to no correction. ``values`` is in row-major order
    of (m, n, k).
    """

    log2_m: tuple[float, ...]
    log2_n: tuple[float, ...]
    log2_k: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What was fitted on, and the error on rows that a fit to the other half of the shapes did not see."""

    source: str
    rows: int
    held_out_mape_percent: float
    held_out_median_percent: float
    held_out_rank_correlation: float


@dataclass(frozen=True, kw_only=True)
class KernelCalibration:
    """The constants of one kernel (a key of ``KERNELS``).

    Attributes:
        compute_efficiency: fraction of the peak rate inside a full tile.
        bandwidth_efficiency: fraction of the memory's bandwidth.
        cache_bytes_per_flop: bytes per second that the units draw from the cache, per FLOP/s of the bfloat16 peak.
        resident: fraction of the cache in which operands survive from one product to the next.
        fixed_s: launch, pipeline fill and drain of one kernel.
        wave_s: start and end of a tile.
        wave_rounding: 1 where a part-filled wave costs a whole one, 0 where it costs its part.
        overlap: exponent that joins compute and memory time: 1 adds them, infinity takes the longer.
        split_s: fixed cost of splitting the inner dimension.
        tiles: output tiles (rows, columns) that the library chooses from; the fastest is taken.
        splits: how many parts the inner dimension may be split into.
        quantize: the activation's passes that the measurements include; None for bfloat16.
        correction: on top of the physical model; None for none.
        band: 10 % and 90 % quantiles of ln(measured / predicted) on held-out rows.
        range_m, range_n, range_k: smallest and largest size fitted.
    """

    compute_efficiency: float
    bandwidth_efficiency: float
    cache_bytes_per_flop: float
    resident: float
    fixed_s: float
    wave_s: float
    wave_rounding: float
    overlap: float
    split_s: float
    tiles: tuple[tuple[int, int], ...]
    splits: tuple[int, ...]
    quantize: QuantizeCalibration | None
    correction: Correction | None
    band: tuple[float, float]
    range_m: tuple[int, int]
    range_n: tuple[int, int]
    range_k: tuple[int, int]
    fitted: Fitted


@dataclass(frozen=True, kw_only=True)
class KernelPower:
    """What a kernel asks of the board beside idle power.

    Attributes:
        active_w: watts while it runs at all, its launch (``fixed_s``) aside.
        joules_per_byte: of memory traffic.
        joules_per_flop: of an operation.
    """

    active_w: float
    joules_per_byte: float
    joules_per_flop: float


@dataclass(frozen=True, kw_only=True)
class PowerCalibration:
    """The constants of the board's power, ``min(limit, idle + dynamic)``.

    Attributes:
        idle_w: board power of a kernel that hardly does anything.
        saturation: fraction of its limit that a board draws when the work asks for more.
        throttle: exponent t of ``(power asked for / power drawn) ** t``, by which work lasts longer that goes on and on
            and asks for more than the limit: clocks fall.
        kernels: a key of ``KERNELS`` -> what that kernel asks for.
        fitted: errors are of power at the measured time.
    """

    idle_w: float
    saturation: float
    throttle: float
    kernels: Mapping[str, KernelPower]
    fitted: Fitted


@dataclass(frozen=True, kw_only=True)
class GemmCalibration:
    """All that was fitted on one chip: a calibration per measured kernel, and the board's power if it was measured."""

    kernels: Mapping[str, KernelCalibration]
    power: PowerCalibration | None = None


_RANGE = Items(item=Number(minimum=1, integer=True), minimum=2)
_KNOTS = Items(item=Number(minimum=1, integer=True), minimum=2)
_SECONDS = Number(minimum=0.0, below=1e-3)
_FITTED = Fields(
    doc="what was fitted on, and the error on the half of the shapes that the fit did not see",
    entries={
        "source": Text(),
        "rows": Number(minimum=1, integer=True),
        "held_out_mape_percent": Number(minimum=0.0),
        "held_out_median_percent": Number(minimum=0.0),
        "held_out_rank_correlation": Number(minimum=-1.0, maximum=1.0),
    },
)
_KERNEL_FIELDS = Fields(
    doc="constants of one kernel",
    entries={
        "compute_efficiency": Number(above=0.0, maximum=1.2, doc="fraction of the peak rate inside a full tile"),
        "bandwidth_efficiency": Number(above=0.0, maximum=1.5, doc="fraction of the memory's bandwidth"),
        "cache_bytes_per_flop": Number(above=0.0, doc="cache bytes per second, per FLOP/s of the bfloat16 peak"),
        "resident": Number(minimum=0.0, doc="fraction of the cache that survives between products"),
        "fixed_s": Number(minimum=0.0, below=1e-3, doc="launch, fill and drain of one kernel, seconds"),
        "wave_s": Number(minimum=0.0, below=1e-3, doc="start and end of a tile, seconds"),
        "wave_rounding": Number(minimum=0.0, maximum=1.0, doc="how whole a part-filled wave counts"),
        "overlap": Number(minimum=1.0, maximum=32.0, doc="exponent that joins compute and memory time"),
        "split_s": Number(minimum=0.0, below=1e-3, doc="cost of splitting the inner dimension, seconds"),
        "tiles": Items(
            item=Items(item=Number(minimum=1, integer=True), minimum=2), minimum=1, doc="output tiles: rows, columns"
        ),
        "splits": Items(item=Number(minimum=1, integer=True), minimum=1, doc="parts of the inner dimension"),
        "quantize": Fields(
            required=False,
            doc="passes over the bfloat16 activation: largest values, then scale and cast",
            entries={
                "amax_s": _SECONDS,
                "amax_bandwidth_efficiency": Number(above=0.0, required=False),
                "cast_s": _SECONDS,
                "cast_bandwidth_efficiency": Number(above=0.0),
            },
        ),
        "correction": Fields(
            required=False,
            doc="residual on a coarse grid: a text per m, in it a value per (n, k), k fastest, in hundredths of ln",
            entries={
                "m": _KNOTS,
                "n": _KNOTS,
                "k": _KNOTS,
                "percent": Items(item=Text(pattern=r"-?[0-9]{1,4}( -?[0-9]{1,4})*")),
            },
        ),
        "band": Items(item=Number(), minimum=2, doc="10 % and 90 % quantiles of ln(measured / predicted)"),
        "range": Fields(entries={"m": _RANGE, "n": _RANGE, "k": _RANGE}, doc="smallest and largest size fitted"),
        "fitted": _FITTED,
    },
)
_POWER_FIELDS = Fields(
    required=False,
    doc="board power: min(limit, idle + dynamic)",
    entries={
        "idle_w": Number(minimum=0.0, doc="of a kernel that hardly does anything"),
        "saturation": Number(above=0.0, maximum=1.1, doc="fraction of the limit that a saturated board draws"),
        "throttle": Number(minimum=0.0, maximum=1.0, doc="how far a saturated board slows down"),
        "kernels": Table(
            keys=tuple(KERNELS),
            value=Fields(
                entries={
                    "active_w": Number(minimum=0.0),
                    "joules_per_byte": Number(minimum=0.0, below=1e-6),
                    "joules_per_flop": Number(minimum=0.0, below=1e-6),
                }
            ),
            minimum=1,
        ),
        "fitted": _FITTED,
    },
)
CALIBRATION_FIELDS: Field = OneOf(
    required=False,
    doc="fitted constants of the GEMM and power models (docs/calibration.md), or another chip's",
    options=(
        Fields(entries={"from": Text(doc="the profile that was measured")}),
        Fields(
            entries={"kernels": Table(keys=tuple(KERNELS), value=_KERNEL_FIELDS, minimum=1), "power": _POWER_FIELDS}
        ),
    ),
)


def calibration_from(data: Mapping[str, Any]) -> GemmCalibration:
    """A profile's ``calibration`` block (one that ``CALIBRATION_FIELDS`` accepts) as data.

    Raises:
        InputError: a key is missing or of the wrong type, knots do not rise, a correction does not fill its grid.
    """
    try:
        kernels = {name: _kernel_from(name, block) for name, block in data["kernels"].items()}
        power = None if data.get("power") is None else _power_from(data["power"])
    except KeyError as error:
        raise InputError(f"missing key {error.args[0]!r}") from None
    except (TypeError, AttributeError) as error:
        raise InputError(f"a value has the wrong type ({error})") from None
    return GemmCalibration(kernels=MappingProxyType(kernels), power=power)


_PLAIN = tuple(field.name for field in fields(KernelCalibration) if field.type == "float")
_PLAIN_POWER = tuple(field.name for field in fields(PowerCalibration) if field.type == "float")


def _kernel_from(name: str, data: Mapping[str, Any]) -> KernelCalibration:
    if name not in KERNELS:
        raise InputError(f"unknown kernel {name!r}", hint=suggestion(name, KERNELS))
    quantize, correction, sizes = data.get("quantize"), data.get("correction"), data["range"]
    return KernelCalibration(
        **{key: float(data[key]) for key in _PLAIN},
        tiles=tuple(_pair(tile, f"{name}.tiles") for tile in data["tiles"]),
        splits=tuple(data["splits"]),
        quantize=None if quantize is None else _quantize_from(quantize),
        correction=None if correction is None else _correction_from(name, correction),
        band=_ordered(data["band"], f"{name}.band"),
        range_m=_ordered(sizes["m"], f"{name}.range.m"),
        range_n=_ordered(sizes["n"], f"{name}.range.n"),
        range_k=_ordered(sizes["k"], f"{name}.range.k"),
        fitted=Fitted(**data["fitted"]),
    )


def _pair(values: list[Any], name: str) -> tuple[Any, Any]:
    if len(values) != 2:
        raise InputError(f"{name}: {values!r} is not a pair")
    return values[0], values[1]


def _ordered(values: list[Any], name: str) -> tuple[Any, Any]:
    low, high = _pair(values, name)
    if not low <= high:
        raise InputError(f"{name}: {values!r} is not a lower and an upper limit")
    return low, high


def _quantize_from(data: Mapping[str, Any]) -> QuantizeCalibration:
    return QuantizeCalibration(
        amax_s=float(data["amax_s"]),
        amax_bandwidth_efficiency=data.get("amax_bandwidth_efficiency"),
        cast_s=float(data["cast_s"]),
        cast_bandwidth_efficiency=float(data["cast_bandwidth_efficiency"]),
    )


def _correction_from(name: str, data: Mapping[str, Any]) -> Correction:
    m, n, k = (tuple(math.log2(knot) for knot in data[axis]) for axis in "mnk")
    for axis, knots in zip("mnk", (m, n, k), strict=True):
        if len(knots) < 2 or any(low >= high for low, high in pairwise(knots)):
            raise InputError(f"{name}.correction.{axis}: {data[axis]!r} does not rise")
    try:
        values = tuple(int(value) / 100 for row in data["percent"] for value in row.split())
    except ValueError:
        raise InputError(f"{name}.correction.percent holds something else than whole numbers") from None
    if len(values) != len(m) * len(n) * len(k):
        raise InputError(
            f"{name}.correction.percent has {len(values)} values for a grid of {len(m)} x {len(n)} x {len(k)}",
            hint="one text for each m, in it one value for each (n, k)",
        )
    return Correction(log2_m=m, log2_n=n, log2_k=k, values=values)


def _power_from(data: Mapping[str, Any]) -> PowerCalibration:
    return PowerCalibration(
        **{key: float(data[key]) for key in _PLAIN_POWER},
        kernels=MappingProxyType(
            {
                name: KernelPower(**{field.name: float(kernel[field.name]) for field in fields(KernelPower)})
                for name, kernel in data["kernels"].items()
            }
        ),
        fitted=Fitted(**data["fitted"]),
    )


def calibration_yaml(calibration: GemmCalibration) -> str:
    """The ``calibration`` block of a profile; ``calibration_from`` reads it back to the same data."""
    lines = ["calibration:", "  kernels:"]
    for name, kernel in calibration.kernels.items():
        lines += [f"    {name}:", *("      " + line for line in _kernel_lines(kernel))]
    power = calibration.power
    if power is not None:
        lines += ["  power:", *(f"    {key}: {_number(getattr(power, key))}" for key in _PLAIN_POWER), "    kernels:"]
        for name, asked in power.kernels.items():
            shown = ", ".join(f"{field.name}: {_number(getattr(asked, field.name))}" for field in fields(asked))
            lines.append(f"      {name}: {{{shown}}}")
        lines.append(f"    fitted: {_fitted_text(power.fitted)}")
    return "\n".join(lines) + "\n"


def _kernel_lines(kernel: KernelCalibration) -> list[str]:
    lines = [f"{key}: {_number(getattr(kernel, key))}" for key in _PLAIN]
    lines += [f"tiles: [{', '.join(f'[{rows}, {columns}]' for rows, columns in kernel.tiles)}]"]
    lines += [f"splits: {list(kernel.splits)}"]
    if kernel.quantize is not None:
        passes = {field.name: getattr(kernel.quantize, field.name) for field in fields(kernel.quantize)}
        shown = ", ".join(f"{key}: {_number(value)}" for key, value in passes.items() if value is not None)
        lines.append(f"quantize: {{{shown}}}")
    lines.append(f"band: [{_number(kernel.band[0])}, {_number(kernel.band[1])}]")
    ranges = (f"{axis}: {list(getattr(kernel, f'range_{axis}'))}" for axis in "mnk")
    lines += [f"range: {{{', '.join(ranges)}}}", f"fitted: {_fitted_text(kernel.fitted)}"]
    grid = kernel.correction
    if grid is not None:
        knots = {axis: [round(2**log) for log in getattr(grid, f"log2_{axis}")] for axis in "mnk"}
        lines += ["correction:", *(f"  {axis}: {values}" for axis, values in knots.items()), "  percent:"]
        width = len(knots["n"]) * len(knots["k"])
        percent = [str(round(value * 100)) for value in grid.values]
        lines += [f'    - "{" ".join(percent[i : i + width])}"' for i in range(0, len(percent), width)]
    return lines


def _number(value: float) -> str:
    return repr(float(value)) if abs(value) < 1e16 else f"{value:.6g}"


def _fitted_text(fitted: Fitted) -> str:
    source = fitted.source.replace("\\", "\\\\").replace('"', '\\"')
    rest = (f"{field.name}: {getattr(fitted, field.name)!r}" for field in fields(fitted) if field.name != "source")
    return f'{{source: "{source}", {", ".join(rest)}}}'
