"""Hardware profiles: what one accelerator can do per number format, every number with its source and status."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from emulation.errors import InputError, suggestion
from emulation.formats import Format, get_format
from hwmodels.calibration import KERNELS, GemmCalibration, calibration_from
from hwmodels.eager import EAGER, EagerCosts
from hwmodels.gemm import gemm_seconds
from hwmodels.profile_lints import family_lints
from hwmodels.profile_yaml import family_of, find_profile, profile_files, read_profile
from hwmodels.strict_yaml import Document, InputErrors, dotted, raise_all

Basis = Literal["calibrated", "peak"]
BASES: tuple[Basis, ...] = ("calibrated", "peak")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a number is from.

    Args:
        status: ``measured``, ``fitted``, ``published``, ``derived`` or ``assumed``.
        sources: tags of the profile's ``sources``.
        note: what a reader of the number has to know, if anything.
    """

    status: str
    sources: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A document that numbers are from."""

    title: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class FormatRate:
    """How fast a chip multiplies matrices of one format.

    Args:
        format: canonical name.
        peak_flops_per_s: dense peak, 1 multiply-add = 2 FLOPs; that of ``timed_as``.
        native: whether the chip takes operands of this format as they are; the rate says whether that is faster.
        timed_as: the format whose rate and kernels time this one; its own name where the chip computes in it.
        falls_back_to: the format that operands are converted to before they are multiplied, where the chip has no way
            to compute in this one; None elsewhere. It equals ``timed_as`` then, and operands move as that format.
        accumulate: format of the sums, where known.
        scale_format: format of the block scales that the matrix unit applies by itself; None: it applies none.
        scale_block: elements that share such a scale.
        layouts: operand layouts that the unit takes (``TN``: both contiguous along K); empty: any.
        status: how the rate came about.
        sources: tags of the profile's ``sources``.
        note: what a reader has to know.
    """

    format: str
    peak_flops_per_s: float
    native: bool
    timed_as: str
    falls_back_to: str | None = None
    accumulate: str | None = None
    scale_format: str | None = None
    scale_block: int | None = None
    layouts: tuple[str, ...] = ()
    status: str
    sources: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Device memory: usable capacity and peak bandwidth."""

    capacity_bytes: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Power:
    """Board power at its limit and when idle."""

    limit_w: float
    idle_w: float


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One accelerator as one process sees it (a GPU of a superchip, a die of a two-die package where they are apart).

    Args:
        name: the file's name without suffix.
        title: what the chip is called.
        vendor: who makes it.
        family: architecture.
        year: of first shipment.
        formats: canonical format name -> rate; formats that are not here have none on this chip.
        memory: capacity and bandwidth.
        cache_bytes: the last on-chip level that all units share; None where not published.
        launch_s: least time of one kernel.
        power: None where nobody has published it.
        vector_flops_per_s: float32 peak outside the matrix unit.
        units: cores that a GEMM is spread over (SM, CU, MXU, MME).
        matrix_unit: the emulator's unit with this chip's arithmetic; None where it is not publicly known.
        calibration: fitted parameters of the GEMM and energy models; None where there are none.
        calibrated_on: the profile whose measurements they were fitted to: this one's name, or one of its family.
        provenance: dotted key of every number -> where it is from.
        sources: tag -> document.
        note: what a reader has to know.
        eager: what an eager framework adds on a host with this chip.
    """

    name: str
    title: str
    vendor: str
    family: str
    year: int
    formats: Mapping[str, FormatRate]
    memory: Memory
    cache_bytes: float | None
    launch_s: float
    power: Power | None
    vector_flops_per_s: float
    units: int
    matrix_unit: str | None
    calibration: GemmCalibration | None
    calibrated_on: str | None
    provenance: Mapping[str, Provenance]
    sources: Mapping[str, Source]
    note: str | None = None
    eager: EagerCosts = EAGER

    def rate(self, format: str | Format) -> FormatRate:
        """The rate of a format, by name, alias or object; raises ``InputError`` where this chip has none for it."""
        rate = self.formats.get(format) if isinstance(format, str) else None
        if rate is None:
            name = get_format(format).name
            rate = self.formats.get(name)
            if rate is None:
                hint = suggestion(name, self.formats)
                raise InputError(f"format={name!r} has no rate on {self.name}", hint=hint)
        return rate

    def gemm_seconds(self, m: int, n: int, k: int, format: str | Format, basis: Basis | None = None) -> float:
        """Seconds of one matrix product [m, k] x [k, n].

        Args:
            m: rows of the first operand.
            n: columns of the second.
            k: the length of the sums.
            format: of both operands; one that this chip has no rate for is an error, never another one's time.
                ``fp8_block`` is E4M3 in blocks of 128 x 128 (activations: 1 x 128), scales applied in software.
            basis: ``peak``: a roofline on published peaks, ``max(2mnk / peak, bytes / bandwidth)``, where operands are
                read once at the format's width, scales included, and the result is written once (float32 for float32
                and tfloat32 operands, else 2 bytes). ``calibrated``: the model of ``hwmodels.gemm`` fitted to
                measurements, dynamic quantization of the first operand included. None: ``calibrated`` where the
                profile has a calibration, else ``peak``.

        Raises:
            InputError: a size below 1, a format without rate, or ``calibrated`` where the profile has no calibration
                (``fp8_block``: none of that kernel).
        """
        m, n, k = (_size(name, size) for name, size in (("m", m), ("n", n), ("k", k)))
        kernel = "fp8_block" if format == "fp8_block" else None  # a kernel, no format: its elements are E4M3
        rate = self.rate(KERNELS[kernel] if kernel else format)
        if basis is None:
            basis = "peak" if self.calibration is None else "calibrated"
        if basis == "peak":
            return self._roofline_seconds(m, n, k, rate)
        if basis != "calibrated":
            raise InputError(f"unknown basis={basis!r}", hint=suggestion(str(basis), BASES))
        if self.calibration is None:
            hint = "basis='peak' gives the roofline on published peaks"
            raise InputError(f"{self.name} has no calibration", hint=hint)
        if kernel and (rate.falls_back_to or kernel not in self.calibration.kernels):
            hint = "measured: " + ", ".join(self.calibration.kernels)
            raise InputError(f"{self.name} has no calibration of format={kernel!r}", hint=hint)
        return float(gemm_seconds(m, n, k, params=self.calibration, rate=rate, profile=self, kernel=kernel))

    def _roofline_seconds(self, m: int, n: int, k: int, rate: FormatRate) -> float:
        moved = (m * k + k * n) * stored_bytes(rate.falls_back_to or rate.format)
        moved += m * n * (4 if rate.timed_as in ("float32", "tfloat32") else 2)
        return max(2 * m * n * k / rate.peak_flops_per_s, moved / self.memory.bandwidth_bytes_per_s)


def _size(name: str, size: int) -> int:
    try:
        whole = 0 if isinstance(size, bool) else operator.index(size)  # numpy's integers are sizes too
    except TypeError:
        whole = 0
    if whole < 1:
        raise InputError(f"{name}={size!r} is not a size", hint="sizes of a matrix product are whole numbers from 1")
    return whole


def stored_bytes(format: str | Format) -> float:
    """Bytes that one element takes in memory, its share of the block scales included (4 for tfloat32)."""
    fmt = get_format(format)
    return 4.0 if fmt.name == "tfloat32" else fmt.bits_per_element / 8


def list_profiles(hardware_dir: str | Path | None = None) -> list[str]:
    """Names of all profiles, sorted: those shipped, and those of ``hardware_dir``."""
    return list(profile_files(hardware_dir))


def load_profile(name_or_path: str | Path, hardware_dir: str | Path | None = None) -> HardwareProfile:
    """A hardware profile, by name or from a YAML file.

    Args:
        name_or_path: ``h100`` (case, ``-`` and ``_`` do not matter), or a path: ``./my.yaml``.
        hardware_dir: a folder of one's own profiles, which stand before the shipped ones.

    Raises:
        InputError: no such profile, or the file has problems: ``InputErrors`` holds every one with file and line.
    """
    document, found = read_profile(name_or_path, hardware_dir)
    raise_all(found)
    return _built(document, hardware_dir)


def check(path: str | Path, hardware_dir: str | Path | None = None) -> list[InputError]:
    """Every problem of a profile, in the order of its lines; none means that ``load_profile`` takes it.

    More than loading finds: rates per unit are compared with the shipped chips of the same family.
    """
    try:
        document, found = read_profile(path, hardware_dir)
        if isinstance(document.data, dict):
            found += family_lints(document, family_of(document))
        raise_all(found)
        _built(document, hardware_dir)
    except InputErrors as errors:
        return list(errors.errors)
    except InputError as error:
        return [error]
    return []


def _built(document: Document, hardware_dir: str | Path | None) -> HardwareProfile:
    data = document.data
    provenance: dict[str, Provenance] = {}
    profile = {
        "vector_flops_per_s": _value(data, ("vector_flops_per_s",), provenance),
        "units": _value(data, ("units",), provenance),
        "launch_s": _value(data, ("launch_s",), provenance),
        "cache_bytes": _value(data, ("cache_bytes",), provenance) if "cache_bytes" in data else None,
        "memory": Memory(**{key: _value(data, ("memory", key), provenance) for key in data["memory"]}),
        "power": Power(**{key: _value(data, ("power", key), provenance) for key in data["power"]})
        if "power" in data
        else None,
        "formats": MappingProxyType({name: _format_rate(data, name, provenance) for name in data["formats"]}),
        "eager": EagerCosts(**{key: _value(data, ("eager", key), provenance) for key in data.get("eager", {})}),
    }
    name = Path(document.file).stem
    calibration, calibrated_on = _calibration(document, name, hardware_dir)
    return HardwareProfile(
        name=name,
        title=data["title"],
        vendor=data["vendor"],
        family=data["family"],
        year=data["year"],
        matrix_unit=data.get("matrix_unit"),
        calibration=calibration,
        calibrated_on=calibrated_on,
        provenance=MappingProxyType(provenance),
        sources=MappingProxyType({tag: Source(**source) for tag, source in data["sources"].items()}),
        note=data.get("note"),
        **profile,
    )


def _value(data: Any, path: tuple[str, ...], provenance: dict[str, Provenance]) -> Any:
    for key in path:
        data = data[key]
    source = data["source"]
    provenance[dotted(path)] = Provenance(
        status=data["status"], sources=tuple(source) if isinstance(source, list) else (source,), note=data.get("note")
    )
    return data["value"]


def _format_rate(data: Any, name: str, provenance: dict[str, Provenance]) -> FormatRate:
    entry = data["formats"][name]
    target = entry.get("timed_as") or entry.get("falls_back_to") or name
    timed = data["formats"][target]
    path = ("formats", target, "peak_flops_per_s")
    peak = _value(data, path, provenance)
    own = provenance[dotted(path)]
    scale = entry.get("hardware_scale", {})
    return FormatRate(
        format=name,
        peak_flops_per_s=float(peak),
        native=entry.get("native", False),
        timed_as=target,
        falls_back_to=entry.get("falls_back_to"),
        accumulate=timed.get("accumulate"),
        scale_format=scale.get("format"),
        scale_block=scale.get("block"),
        layouts=tuple(timed.get("layouts", ())),
        status=own.status,
        sources=own.sources,
        note=entry.get("note") or (own.note if target == name else None),
    )


def _calibration(
    document: Document, name: str, hardware_dir: str | Path | None
) -> tuple[GemmCalibration | None, str | None]:
    """The parsed calibration and the chip it was fitted on, from the block itself or from the profile it names."""
    block = document.data.get("calibration")
    if block is None:
        return None, None
    path: tuple[str, ...] = ("calibration",)
    try:
        if isinstance(block, dict) and "from" in block:
            path = ("calibration", "from")
            file = find_profile(str(block["from"]), hardware_dir, beside=(Path(document.file),))
            other, found = read_profile(file, hardware_dir)
            raise_all(found)
            block, name = other.data.get("calibration"), file.stem
            if not isinstance(block, dict) or "from" in block:
                raise InputError(f"{name} has no calibration of its own", hint="name the profile that was measured")
        return calibration_from(block), name
    except InputError as error:
        raise document.error(path, f"{dotted(path)}: {error}", hint=error.hint) from None


def describe(profile: HardwareProfile) -> dict[str, Any]:
    """A profile as plain data, for JSON and for tables.

    Returns:
        name, title, vendor, family, year, note, matrix_unit, calibrated_on; ``numbers``: rows of key, value, status,
        sources, note; ``formats``: rows with the fields of ``FormatRate``; ``sources``: tag -> title and url.
    """
    values: dict[str, Any] = {
        "units": profile.units,
        "vector_flops_per_s": profile.vector_flops_per_s,
        "memory.capacity_bytes": profile.memory.capacity_bytes,
        "memory.bandwidth_bytes_per_s": profile.memory.bandwidth_bytes_per_s,
        "cache_bytes": profile.cache_bytes,
        "launch_s": profile.launch_s,
        "power.limit_w": profile.power.limit_w if profile.power else None,
        "power.idle_w": profile.power.idle_w if profile.power else None,
    }
    eager = (key for key in profile.provenance if key.startswith("eager."))  # only what the profile says of its own
    values |= {key: getattr(profile.eager, key.removeprefix("eager.")) for key in eager}
    numbers = []
    for key, value in values.items():
        from_ = profile.provenance.get(key, Provenance(status="not published", sources=()))
        numbers.append(
            {"key": key, "value": value, "status": from_.status, "sources": list(from_.sources), "note": from_.note}
        )
    names = ("name", "title", "vendor", "family", "year", "note", "matrix_unit", "calibrated_on")
    formats = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in vars(rate).items()}
        for rate in profile.formats.values()
    ]
    sources = {tag: {"title": source.title, "url": source.url} for tag, source in profile.sources.items()}
    return {name: getattr(profile, name) for name in names} | {
        "numbers": numbers,
        "formats": formats,
        "sources": sources,
    }
