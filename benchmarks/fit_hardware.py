"""Fits the calibration of hardware profiles to tables of measured GEMMs, and shows the error on what was held out.

The tables are NVIDIA AIConfigurator's (repository ai-dynamo/aiconfigurator, Apache-2.0) as CSV: gemm_latency (device,
gemm_dtype, m, n, k, latency_us), quantize_latency (device, kernel, quant_dtype, m, k, latency_us) and gemm_power
(gemm_latency with stack and power). With --write the `calibration:` block of each profile is replaced.

    python benchmarks/fit_hardware.py DATA_DIR [--device b200 ...] [--write]
    python benchmarks/fit_hardware.py DATA_DIR --held-out     # by (n, k) pairs, by sizes, by device
"""

from __future__ import annotations

import argparse
import csv
import gzip
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np

from hwmodels.calibration import (
    KERNELS,
    GemmCalibration,
    KernelCalibration,
    PowerCalibration,
    QuantizeCalibration,
    calibration_yaml,
)
from hwmodels.fit import GemmRows, errors, fit_kernel, fit_quantize, fit_rows, gemm_rows, predict
from hwmodels.fit_power import PowerRows, fit_power
from hwmodels.gemm import GemmRates, gemm_rates, kernel_seconds, quantize_seconds
from hwmodels.power import board_joules, board_power, moved_bytes
from hwmodels.profile import HardwareProfile, load_profile
from hwmodels.profile_yaml import shipped_dir
from hwmodels.validate import Measurement, predicted_seconds, read_measurements

DEVICES = {
    "a100": "a100_sxm",
    "l40s": "l40s",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "gb300": "gb300",
    "rtx_pro_6000": "rtx_pro_6000_server",
}
TITLE = "NVIDIA AIConfigurator GEMM timings (Apache-2.0), {}, CUDA graphs, random data"
# fitted on one device, tried on its sibling with nothing but the sibling's published numbers
SIBLINGS = (("h100", "h200"), ("h200", "h100"), ("b200", "gb300"), ("gb300", "b200"))


def rates_of(profile: HardwareProfile, kernel: str) -> GemmRates:
    return gemm_rates(profile.rate(KERNELS[kernel]), profile)


def rows_of(table: Sequence[Measurement], device: str, kernel: str) -> GemmRows:
    rows = [row for row in table if row.device == device and row.gemm_dtype == kernel]
    return gemm_rows([(row.m, row.n, row.k) for row in rows], [row.seconds for row in rows])


def fit_passes(data: Path, device: str, profile: HardwareProfile) -> QuantizeCalibration | None:
    """The amax and cast passes of dynamic fp8 quantization, measured apart."""
    found = {}
    with gzip.open(data / "quantize_latency.csv.gz", "rt", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["device"] == device]
    for kernel, moved in (("computescale", 2.0), ("scale_matrix", 3.0)):
        chosen = [row for row in rows if row["kernel"] == kernel and float(row["latency_us"]) > 0]
        if not chosen:
            return None
        elements = [float(row["m"]) * float(row["k"]) for row in chosen]
        seconds = [float(row["latency_us"]) * 1e-6 for row in chosen]
        found[kernel] = fit_quantize(elements, seconds, moved, profile.memory.bandwidth_bytes_per_s)
        print(f"{profile.name:13} {kernel:13} {len(chosen):5} rows, held out: {found[kernel][2]:.1f} %", flush=True)
    return QuantizeCalibration(
        amax_s=found["computescale"][0],
        amax_bandwidth_efficiency=found["computescale"][1],
        cast_s=found["scale_matrix"][0],
        cast_bandwidth_efficiency=found["scale_matrix"][1],
    )


def fit_device(name: str, data: Path) -> dict[str, KernelCalibration]:
    profile, device = load_profile(name), DEVICES[name]
    table = read_measurements(data / "gemm_latency.csv.gz")
    passes = fit_passes(data, device, profile)
    kernels: dict[str, KernelCalibration] = {}
    for kernel in KERNELS:
        rows = rows_of(table, device, kernel)
        if not len(rows):
            continue
        apart = passes if kernel == "fp8" else None
        dynamic = kernel != "bfloat16" and apart is None
        kernels[kernel] = fit_kernel(
            rows,
            rates_of(profile, kernel),
            source=TITLE.format("vLLM 0.14" if name == "a100" else "TensorRT-LLM 1.3.0rc20"),
            quantize=apart,
            dynamic=dynamic,
            fixed_s=kernels["bfloat16"].fixed_s if dynamic else None,
        )
        show(name, kernel, kernels[kernel], rows, rates_of(profile, kernel))
    return kernels


# Where power was measured, and whose constants a sibling takes. The vLLM fp8_block rows were bound by launches and
# those of TensorRT-LLM are few, so that kernel has no energy of its own.
POWER = {"h200": {"bfloat16"}, "b200": {"bfloat16", "fp8", "nvfp4"}}
POWER_OF = {"h100": "h200", "h200": "h200", "b200": "b200", "gb300": "b200"}
LONG_S = 100e-6  # shorter products were run for 0.3 s only, too short for the board's averaged power to settle


def power_rows(data: Path, name: str, kernels: dict[str, KernelCalibration]) -> list[PowerRows]:
    profile = load_profile(name)
    found = []
    for kernel in sorted(POWER[name]):
        rows = [row for row in read_measurements(data / "gemm_power.csv.gz") if row.device == DEVICES[name]]
        rows = [row for row in rows if row.gemm_dtype == kernel and row.seconds > LONG_S]
        rates = rates_of(profile, kernel)
        found.append(
            PowerRows(
                kernel=kernel,
                flops=np.array([2.0 * row.m * row.n * row.k for row in rows]),
                moved=np.array([moved_bytes(row.m, row.n, row.k, kernels[kernel], rates) for row in rows]),
                seconds=np.array([row.seconds for row in rows]),
                predicted_s=np.array(
                    [
                        kernel_seconds(row.m, row.n, row.k, kernels[kernel], rates)
                        + quantize_seconds(row.m * row.k, kernels[kernel], rates)
                        for row in rows
                    ]
                ),
                watts=np.array([row.power_w for row in rows]),
                fixed_s=kernels[kernel].fixed_s,
            )
        )
    return found


def fit_device_power(data: Path, name: str, kernels: dict[str, KernelCalibration]) -> PowerCalibration | None:
    measured = POWER_OF.get(name)
    if measured is None:
        return None
    board = load_profile(measured).power
    if measured != name:
        kernels = dict((load_profile(measured).calibration or GemmCalibration(kernels=kernels)).kernels)
    source = (
        "NVIDIA AIConfigurator board power (Apache-2.0), vLLM 0.22 and TensorRT-LLM 1.3.0rc15, products over 100 us"
    )
    if measured != name:
        source += f", of {load_profile(measured).title}"
    found = fit_power(power_rows(data, measured, kernels), limit_w=board.limit_w, floor_w=board.idle_w, source=source)
    held = found.fitted
    print(
        f"{name:13} power: {held.rows} rows of {measured}, held out: {held.held_out_mape_percent:.2f} % "
        f"(median {held.held_out_median_percent:.2f} %) | idle {found.idle_w:.0f} W, "
        f"throttle {found.throttle:.2f}, "
        + ", ".join(
            f"{kernel} {asked.active_w:.0f} W, {asked.joules_per_byte * 1e12:.0f} pJ/B, "
            f"{asked.joules_per_flop * 1e12:.3f} pJ/FLOP"
            for kernel, asked in found.kernels.items()
        ),
        flush=True,
    )
    return found


def show_energy(data: Path) -> None:
    """Power at the measured time, and energy at the predicted time, by table of origin, of what the profiles hold."""
    with gzip.open(data / "gemm_power.csv.gz", "rt", newline="") as stream:
        stacks = [row["stack"] for row in csv.DictReader(stream)]
    rows = list(zip(stacks, read_measurements(data / "gemm_power.csv.gz"), strict=True))
    for name, kernels in POWER.items():
        profile = load_profile(name)
        for kernel in sorted(kernels):
            for stack in sorted(set(stacks)):
                chosen = [row for origin, row in rows if origin == stack and row.device == DEVICES[name]]
                chosen = [row for row in chosen if row.gemm_dtype == kernel and row.seconds > LONG_S]
                if not chosen:
                    continue
                power, energy, time = [], [], []
                for row in chosen:
                    seconds = predicted_seconds(profile, row)
                    power.append(board_power(row.m, row.n, row.k, row.seconds, kernel, profile) / row.power_w - 1)
                    joules = board_joules(row.m, row.n, row.k, seconds, kernel, profile)
                    energy.append(joules / (row.power_w * row.seconds) - 1)
                    time.append(seconds / row.seconds - 1)
                shown = (
                    f"{label} {100 * np.abs(off).mean():5.2f} %"
                    for label, off in (("power", power), ("energy", energy), ("time", time))
                )
                print(f"{name:6} {kernel:9} {stack:17} {len(chosen):4} rows over 100 us: {', '.join(shown)}")


def show(name: str, kernel: str, fitted: KernelCalibration, rows: GemmRows, rates: GemmRates) -> None:
    seen = errors(predict(rows, fitted, rates), rows.seconds)
    plain = errors(predict(rows, replace(fitted, correction=None), rates), rows.seconds)
    held = fitted.fitted
    print(
        f"{name:13} {kernel:10} {held.rows:5} rows | held out: {held.held_out_mape_percent:5.2f} % "
        f"(median {held.held_out_median_percent:5.2f} %, rank {held.held_out_rank_correlation:.4f}) | "
        f"seen: {seen.mape_percent:5.2f} %, without correction {plain.mape_percent:5.2f} %",
        flush=True,
    )


def write_block(name: str, calibration: GemmCalibration) -> None:
    """Replaces the profile's `calibration` block, from its key to the next key or the end."""
    path = shipped_dir() / f"{name}.yaml"
    text = re.sub(r"^calibration:.*\n(?:[ #].*\n|\n)*", "", path.read_text(), flags=re.MULTILINE)
    path.write_text(text.rstrip("\n") + "\n" + calibration_yaml(calibration))


def held_out(data: Path) -> None:
    """Errors where whole (n, k) pairs, sizes or devices were kept from the fit."""
    table = read_measurements(data / "gemm_latency.csv.gz")
    for name, device in DEVICES.items():
        profile = load_profile(name)
        for kernel in KERNELS:
            rows = rows_of(table, device, kernel)
            if not len(rows):
                continue
            line = f"{name:13} {kernel:10}"
            for label, kept in _groups(rows).items():
                fitted = fit_rows(rows.where(~kept), rates_of(profile, kernel), dynamic=kernel != "bfloat16")
                off = errors(predict(rows.where(kept), fitted, rates_of(profile, kernel)), rows.seconds[kept])
                line += f" | {label} {off.mape_percent:5.2f} %"
            print(line, flush=True)


def _groups(rows: GemmRows) -> dict[str, np.ndarray]:
    """Masks of rows to keep from a fit: half of the (n, k) pairs, a third of the values of m, a fifth of those of n."""
    random = np.random.default_rng(0)
    pairs = np.unique(np.stack([rows.n, rows.k]), axis=1, return_inverse=True)[1].reshape(-1)
    found = {"half of (n, k)": (random.random(pairs.max() + 1) < 0.5)[pairs]}
    for axis, share in (("m", 0.33), ("n", 0.2), ("k", 0.2)):
        values, index = np.unique(getattr(rows, axis), return_inverse=True)
        chosen = random.random(len(values)) < share
        chosen[[0, -1]] = False
        found[f"of {axis}"] = chosen[index]
    return found


def siblings(data: Path) -> None:
    """Errors on a device of which no row was fitted: its sibling's calibration and its own published numbers."""
    table = read_measurements(data / "gemm_latency.csv.gz")
    for source, target in SIBLINGS:
        profile, fitted = load_profile(target), load_profile(source).calibration
        for kernel, calibration in (fitted.kernels if fitted else {}).items():
            rows = rows_of(table, DEVICES[target], kernel)
            off = errors(predict(rows, calibration, rates_of(profile, kernel)), rows.seconds)
            print(f"{source} -> {target:8} {kernel:10} {off.mape_percent:5.2f} % (median {off.median_percent:.2f} %)")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with gemm_latency.csv.gz, quantize_latency.csv.gz, ...")
    parser.add_argument("--device", nargs="*", choices=sorted(DEVICES), default=list(DEVICES))
    parser.add_argument("--write", action="store_true", help="replace the calibration blocks of the profiles")
    parser.add_argument("--held-out", action="store_true", help="errors on (n, k) pairs, sizes and devices kept apart")
    parser.add_argument("--power", action="store_true", help="fit the power constants alone")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.held_out:
        siblings(options.data)
        held_out(options.data)
        return 0
    if options.power:
        for name in options.device:
            calibration = load_profile(name).calibration
            power = fit_device_power(options.data, name, dict(calibration.kernels)) if calibration else None
            if options.write and calibration:
                write_block(name, replace(calibration, power=power))
        show_energy(options.data)
        return 0
    with ProcessPoolExecutor(options.workers) as pool:
        running = {pool.submit(fit_device, name, options.data): name for name in options.device}
        for done in as_completed(running):
            kernels, name = done.result(), running[done]
            power = fit_device_power(options.data, name, kernels)
            if options.write:
                write_block(name, GemmCalibration(kernels=kernels, power=power))
    return 0


if __name__ == "__main__":
    sys.exit(main())
