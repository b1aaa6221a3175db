"""A profile against a table of measured matrix products: how far off, how well ordered, and where worst."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from emulation.errors import InputError, regular_file, suggestion
from hwmodels.calibration import KERNELS
from hwmodels.gemm import gemm_rates, kernel_of, kernel_seconds, quantize_seconds
from hwmodels.power import board_joules, board_power
from hwmodels.profile import HardwareProfile

COLUMNS = ("gemm_dtype", "m", "n", "k", "latency_us")
QUANTIZATION = {"": True, "included": True, "excluded": False}
WORST = 5  # cases listed per format
SETTLED_S = 100e-6  # shorter products are rarely run long enough for a board's averaged power to settle


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured product [m, k] x [k, n].

    Attributes:
        device: the chip; None: not said.
        gemm_dtype: key of ``KERNELS``.
        m, n, k: its sizes.
        seconds: its time.
        power_w: board watts meanwhile; None: not measured.
        quantized: whether the time includes turning the bfloat16 activation into the format; False: the product alone.
    """

    device: str | None
    gemm_dtype: str
    m: int
    n: int
    k: int
    seconds: float
    power_w: float | None = None
    quantized: bool = True


def read_measurements(path: str | Path) -> list[Measurement]:
    """The rows of a CSV file, plain or gzip: gemm_dtype, m, n, k, latency_us, and device, power, quantization or not.

    ``quantization`` says whether latencies have the activation's quantization ``included`` (so too where nothing is
    said) or ``excluded``. Other columns are ignored.

    Raises:
        InputError: the file is not readable, has no rows or lacks a column; a value is not what its column holds
            (with file and line).
    """
    file = regular_file(Path(path))
    try:
        with _opened(file) as stream:
            rows = list(_parsed(stream, file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read the measurements: {reason}", file=file) from None
    if not rows:
        raise InputError("no measurements", hint=f"one row per product: {','.join(COLUMNS)}", file=file)
    return rows


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _parsed(stream: TextIO, file: Path) -> Iterator[Measurement]:
    reader = csv.reader(stream)
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(
            f"column {missing[0]!r} is missing",
            hint=f"the first line has to name {', '.join(COLUMNS)}",
            file=file,
            line=1,
        )
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            message = f"{len(cells)} values for {len(header)} columns"
            raise InputError(message, file=file, line=reader.line_num)
        row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        try:
            yield _measurement(row)
        except InputError as error:
            raise InputError(error.message, hint=error.hint, file=file, line=reader.line_num) from None


def _measurement(row: dict[str, str]) -> Measurement:
    if row["gemm_dtype"] not in KERNELS:
        raise InputError(f"unknown gemm_dtype={row['gemm_dtype']!r}", hint=suggestion(row["gemm_dtype"], KERNELS))
    power, quantization = row.get("power", ""), row.get("quantization", "")
    if quantization not in QUANTIZATION:
        raise InputError(f"unknown quantization={quantization!r}", hint="included or excluded")
    return Measurement(
        device=row.get("device") or None,
        gemm_dtype=row["gemm_dtype"],
        m=_size(row, "m"),
        n=_size(row, "n"),
        k=_size(row, "k"),
        seconds=_positive(row, "latency_us") * 1e-6,
        power_w=_positive(row, "power") if power else None,
        quantized=QUANTIZATION[quantization],
    )


def _size(row: dict[str, str], name: str) -> int:
    value = _positive(row, name)
    if value != int(value) or value > 1e9:
        raise InputError(f"{name}={row[name]!r} is not a size", hint="whole numbers from 1")
    return int(value)


def _positive(row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        raise InputError(f"{name}={row[name]!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}={row[name]!r} is not above 0")
    return value


def of_device(rows: Sequence[Measurement], name: str) -> list[Measurement]:
    """The rows of one chip: those named ``name`` or ``name_...``, and those that name no chip.

    A table of a single chip is taken whole, whatever it calls the chip.

    Raises:
        InputError: the table has several chips and none is this one.
    """
    wanted = name.lower().replace("-", "_")

    def fits(device: str | None) -> bool:
        plain = (device or wanted).lower().replace("-", "_")
        return plain == wanted or plain.startswith(wanted + "_")

    devices = sorted({row.device or "" for row in rows})
    chosen = [row for row in rows if fits(row.device)]
    if chosen or len(devices) <= 1:
        return chosen or list(rows)
    raise InputError(f"no measurements of {name!r}", hint="the table has " + ", ".join(devices))


def predicted_seconds(profile: HardwareProfile, row: Measurement) -> float:
    """Seconds of a measured product as the profile predicts it, dynamic quantization included where the row has it.

    On peak rates where the profile has no calibration.
    """
    rate = profile.rate(KERNELS[row.gemm_dtype])
    calibration = profile.calibration
    if calibration is None:
        return profile.gemm_seconds(row.m, row.n, row.k, rate.format, basis="peak")
    own = row.gemm_dtype in calibration.kernels and rate.falls_back_to is None
    kernel = calibration.kernels[row.gemm_dtype if own else kernel_of(rate, calibration)]
    rates = gemm_rates(rate, profile)
    seconds = kernel_seconds(row.m, row.n, row.k, kernel, rates)
    return seconds + quantize_seconds(row.m * row.k, kernel, rates) if row.quantized else seconds


def validate(profile: HardwareProfile, rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """How far a profile's predictions are from measurements, one plain row per gemm_dtype.

    Args:
        profile: the chip.
        rows: measurements of it (``of_device`` chooses them from a table of several chips).

    Returns:
        rows with ``format`` (the gemm_dtype), ``n``, ``basis``, ``note``, ``mape_percent``, ``median_percent``,
        ``rank_correlation`` (Spearman's; None where it is undefined), ``roofline_mape_percent`` (the same of the
        roofline on published peaks), ``worst`` (the cases that are furthest off), and, where power was measured for
        products over 100 us, ``power_mape_percent`` (board power at the measured latency) and ``energy_mape_percent``
        (energy at the predicted latency) of those.

    Raises:
        InputError: a format has no rate on the chip.
    """
    return [
        _validated(profile, gemm_dtype, [row for row in rows if row.gemm_dtype == gemm_dtype])
        for gemm_dtype in KERNELS
        if any(row.gemm_dtype == gemm_dtype for row in rows)
    ]


def _validated(profile: HardwareProfile, gemm_dtype: str, rows: Sequence[Measurement]) -> dict[str, Any]:
    rate = profile.rate(KERNELS[gemm_dtype])
    measured = [row.seconds for row in rows]
    predicted = [predicted_seconds(profile, row) for row in rows]
    roofline = [profile.gemm_seconds(row.m, row.n, row.k, rate.format, basis="peak") for row in rows]
    off = _percent_off(predicted, measured)
    note = None
    if rate.falls_back_to is not None:
        note = f"falls back to {rate.falls_back_to}"
    elif profile.calibration is not None and not _has(profile, gemm_dtype):
        note = f"timed by the {kernel_of(rate, profile.calibration)} kernel"
    elif profile.calibrated_on not in (None, profile.name):
        note = f"calibrated on {profile.calibrated_on}"
    worst = sorted(range(len(rows)), key=lambda index: -off[index])[:WORST]
    result = {
        "format": gemm_dtype,
        "n": len(rows),
        "basis": "peak" if profile.calibration is None else "calibrated",
        "note": note,
        "mape_percent": sum(off) / len(off),
        "median_percent": _median(off),
        "rank_correlation": rank_correlation(predicted, measured),
        "roofline_mape_percent": sum(_percent_off(roofline, measured)) / len(rows),
        "worst": [
            {
                "m": rows[i].m,
                "n": rows[i].n,
                "k": rows[i].k,
                "measured_us": measured[i] * 1e6,
                "predicted_us": predicted[i] * 1e6,
            }
            for i in worst
        ],
    }
    return result | _power_errors(profile, gemm_dtype, rows, predicted)


def _has(profile: HardwareProfile, gemm_dtype: str) -> bool:
    assert profile.calibration is not None
    return gemm_dtype in profile.calibration.kernels


def _power_errors(
    profile: HardwareProfile, gemm_dtype: str, rows: Sequence[Measurement], predicted: Sequence[float]
) -> dict[str, float]:
    known = [i for i, row in enumerate(rows) if row.power_w is not None and row.seconds > SETTLED_S]
    if not known or profile.power is None or profile.calibration is None or profile.calibration.power is None:
        return {}
    watts, watts_predicted, joules, joules_predicted = [], [], [], []
    for index in known:
        row, seconds = rows[index], predicted[index]
        watts.append(row.power_w or 0.0)
        watts_predicted.append(
            board_power(row.m, row.n, row.k, row.seconds, row.gemm_dtype, profile, quantize=row.quantized)
        )
        joules.append(watts[-1] * row.seconds)
        joules_predicted.append(
            board_joules(row.m, row.n, row.k, seconds, row.gemm_dtype, profile, quantize=row.quantized)
        )
    return {
        "power_mape_percent": sum(_percent_off(watts_predicted, watts)) / len(known),
        "energy_mape_percent": sum(_percent_off(joules_predicted, joules)) / len(known),
    }


def _percent_off(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    return [abs(guess / truth - 1.0) * 100.0 for guess, truth in zip(predicted, measured, strict=True)]


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where one side does not vary."""
    ranks = [_ranks(first), _ranks(second)]
    mean = (len(first) - 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    norm = math.sqrt(math.prod(sum((a - mean) ** 2 for a in side) for side in ranks))
    return product / norm if norm > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end - 1) / 2
        start = end
    return ranks
