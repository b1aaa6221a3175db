"""Where quantized private training pays on real chips: modelled by the cost model, on both bases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from dpquant.models import build_model, example_input
from dpquant.statistics import Sample
from emulation.errors import InputError
from hwmodels.cost import Estimate, estimate
from hwmodels.profile import HardwareProfile, load_profile
from hwmodels.workload import Workload, trace

from .files import Evidence
from .markdown import NONE, difference, table, times
from .sweep_tables import TITLES

CHIPS = (
    ("h200", "fp8"),
    ("b200", "fp8"),
    ("b200", "mxfp4"),
    ("b200", "nvfp4"),
    ("gb300", "nvfp4"),
    ("mi355x", "mxfp4"),
)
BASES = ("peak", "calibrated")
BATCHES = (64, 256, 1024, 4096, 16384, 65536)
WIDTHS = (128, 256, 512, 1024, 2048, 4096)

MODELS: Mapping[str, tuple[str, dict[str, Any], tuple[int, ...] | None]] = {
    "Fashion-MNIST's CNN": ("fashion_cnn", {"norm": "none"}, (1, 28, 28)),
    "CIFAR-10's CNN": ("cifar_cnn", {"activation": "tanh", "norm": "none"}, (3, 32, 32)),
    "ResNet-18, ImageNet stem, 32x32": ("resnet18", {"num_classes": 10}, (3, 32, 32)),
    "ResNet-18, CIFAR stem, 32x32": ("resnet18", {"num_classes": 10, "stem": "cifar"}, (3, 32, 32)),
    "ViT-B/16, 224x224": ("vit_b_16", {}, None),
}
SWEPT = {"fashion": ("Fashion-MNIST's CNN", 2048), "cifar10": ("CIFAR-10's CNN", 1024)}


@lru_cache
def workload(name: str, options: tuple[tuple[str, Any], ...], shape: tuple[int, ...] | None, batch: int) -> Workload:
    """A model's workload, traced without data."""
    with torch.device("meta"):
        model = build_model(name, **dict(options))
    return trace(model, example_input(name, shape), batch)


def modelled(model: str, batch: int) -> Workload:
    """The workload of one of `MODELS`."""
    name, options, shape = MODELS[model]
    return workload(name, tuple(options.items()), shape, batch)


def step(work: Workload, profile: HardwareProfile, fmt: str | None, basis: str) -> Estimate | None:
    """One step with all layers in ``fmt``, or in full precision; None where the chip has no such basis."""
    plan = {} if fmt is None else dict.fromkeys(work.quantizable, fmt)
    with contextlib.suppress(InputError):
        return estimate(work, plan, profile, method="dp-sgd", basis=basis)  # type: ignore[arg-type]
    return None


def speedup(work: Workload, chip: str, fmt: str, basis: str) -> float | None:
    """All layers quantized, over full precision there."""
    profile = load_profile(chip)
    full, quantized = step(work, profile, None, basis), step(work, profile, fmt, basis)
    return full.step_s / quantized.step_s if full and quantized else None


def batches_table() -> str:
    """Speedup over batch sizes, and from which on it is above 1 and stays there."""
    rows = []
    for model in MODELS:
        for chip, fmt in CHIPS:
            for basis in BASES:
                found = [speedup(modelled(model, b), chip, fmt, basis) for b in BATCHES]
                if any(value is None for value in found):
                    continue
                rows.append([model, f"{chip}, {fmt}", basis, *map(times, found), _from(found, BATCHES)])
    return table(["model", "chip, format", "basis", *map(str, BATCHES), "pays from"], rows, range(3, 4 + len(BATCHES)))


def widths_table() -> str:
    """The same over the width of a transformer of six layers on sequences of 128, batch 256."""
    rows = []
    works = [workload("transformer", (("width", w), ("heads", w // 64)), (128,), 256) for w in WIDTHS]
    for chip, fmt in CHIPS:
        for basis in BASES:
            found = [speedup(work, chip, fmt, basis) for work in works]
            if any(value is None for value in found):
                continue
            rows.append([f"{chip}, {fmt}", basis, *map(times, found), _from(found, WIDTHS)])
    return table(["chip, format", "basis", *map(str, WIDTHS), "pays from"], rows, range(2, 3 + len(WIDTHS)))


def _from(found: list[float | None], places: tuple[int, ...]) -> str:
    """The first place from which on the speedup is at least 1.05."""
    for index in range(len(places)):
        if all(value is not None and value >= 1.05 for value in found[index:]):
            return str(places[index])
    return "never"


@dataclass(frozen=True, kw_only=True)
class Trade:
    """What a format loses in accuracy, and what it saves on one chip; against the chip's own full precision."""

    sweep: str
    chip: str
    format: str
    basis: str
    lost: Sample
    speedup: float
    energy_share: float | None


def trades(found: Mapping[str, Evidence]) -> Iterator[Trade]:
    """Every format that was trained with all layers in it, on every chip that has it."""
    for name, evidence in found.items():
        key = name.split("_")[0]
        if not name.endswith("_formats") or key not in SWEPT:
            continue
        work = modelled(*SWEPT[key])
        for settings in evidence.points(scheduler="static", fraction=1.0):
            full = evidence.full_precision(settings)
            if full is None:
                continue
            lost = evidence.compared(settings, full)
            for chip, fmt in CHIPS:
                if fmt != settings["format"]:
                    continue
                profile = load_profile(chip)
                for basis in BASES:
                    base, own = step(work, profile, None, basis), step(work, profile, fmt, basis)
                    if base is None or own is None:
                        continue
                    energy = None
                    if base.energy_joules and own.energy_joules is not None:
                        energy = own.energy_joules / base.energy_joules
                    yield Trade(
                        sweep=name, chip=chip, format=fmt, basis=basis, lost=lost,
                        speedup=base.step_s / own.step_s, energy_share=energy,
                    )  # fmt: skip


def pareto_table(found: Mapping[str, Evidence]) -> str:
    """Accuracy lost in a format beside what the format saves on the chips that have it."""
    rows = [
        [
            TITLES[trade.sweep],
            f"{trade.chip}, {trade.format}",
            trade.basis,
            difference(trade.lost),
            times(trade.speedup),
            NONE if trade.energy_share is None else f"{100 * trade.energy_share:.0f} %",
        ]
        for trade in trades(found)
    ]
    titles = ["sweep", "chip, format", "basis", "accuracy against full precision, points", "speedup", "energy"]
    return table(titles, rows, range(3, 6)) if rows else "No format has been trained yet."


def sentence() -> str:
    """What the cost model says of the networks that were trained here, and of large ones."""
    small = [(modelled(model, batch), chip, fmt) for model, batch in SWEPT.values() for chip, fmt in CHIPS]
    ranges = []
    for basis in BASES:
        known = [value for one in small if (value := speedup(*one, basis)) is not None]
        ranges.append(f"{min(known):.2f}x to {max(known):.2f}x")
    vit = modelled("ViT-B/16, 224x224", 1024)
    wide = workload("transformer", (("width", 4096), ("heads", 64)), (128,), 256)
    b200, gb300 = (
        [[times(speedup(work, chip, "nvfp4", basis)) for basis in BASES] for work in (vit, wide)]
        for chip in ("b200", "gb300")
    )
    return (
        "By published peak rates FP8 and FP4 on H200, B200, GB300 and MI355X would run the small CNNs of this page at "
        f"{ranges[0]} of full precision's speed; modelled on measured kernels (of the MI355X there are none) it is "
        f"{ranges[1]}: their steps are starting kernels, moving data and converting numbers. Of wide layers NVFP4 "
        f"makes more: by measured kernels ViT-B/16 at batch 1024 runs at {b200[0][1]} on a B200 (peak {b200[0][0]}) "
        f"and {gb300[0][1]} on a GB300 ({gb300[0][0]}), a transformer of width 4096 at {b200[1][1]} ({b200[1][0]}) "
        f"and {gb300[1][1]} ({gb300[1][0]}). These are a model's figures, without an interval; its held-out error is "
        "in [calibration](calibration.md)."
    )
