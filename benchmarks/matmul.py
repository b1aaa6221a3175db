"""Matrix units: speed on the CPU and on CUDA, CUDA against the CPU bit for bit, and products of real silicon.

python benchmarks/matmul.py                   multiply-adds a second of every kind of unit
python benchmarks/matmul.py --check           CUDA against the CPU, every unit, every kind of operands
python benchmarks/matmul.py --golden FILE     products of this GPU's tensor cores (a Hopper) into FILE, compared
python benchmarks/matmul.py --tiles           CUDA kernels with other tile sizes
python benchmarks/matmul.py --memory          peak memory of a 4096 x 4096 x 4096 product on the CPU
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emulation.formats import NumberFormat, get_format
from emulation.matmul import matmul
from emulation.matrix_units import MATRIX_UNITS, SCALE_BLOCKS, MatrixUnit

KINDS = ("normal", "wide", "codes", "finite", "subnormal", "cancelling")


def grid(fmt: NumberFormat) -> np.ndarray:
    """All values of a format; of TF32 the exponents with 4 mantissa bits."""
    if fmt.bits > 16:
        return np.array(
            [s * 2.0**e * (1 + m / 16) for s in (1, -1) for e in range(-126, 128) for m in range(16)] + [0.0]
        )
    return np.array([value for _, value in fmt.values()])


def draw(fmt: NumberFormat, shape: tuple[int, int], kind: str, rng: np.random.Generator) -> Tensor:
    """Random values of ``fmt``: Gaussian, over many octaves, of all codes, of the finite ones, near zero, in pairs."""
    values = grid(fmt)
    finite = np.unique(values[np.isfinite(values)])
    if kind in ("codes", "finite"):
        x = rng.choice(values if kind == "codes" else finite, shape)
    elif kind == "subnormal":
        x = rng.choice(finite[np.abs(finite) <= 4 * fmt.min_normal], shape)
    else:
        x = rng.standard_normal(shape) * (np.exp2(rng.uniform(-12, 12, shape)) if kind == "wide" else 1)
        x = finite[np.clip(np.searchsorted(finite, x), 0, len(finite) - 1)]
        if kind == "cancelling":
            x[..., 1::2] = -x[..., : x.shape[-1] // 2 * 2 : 2]
            x *= rng.random(shape) < 0.9
    return torch.from_numpy(x.astype(np.float32))


def cases() -> Iterator[tuple[MatrixUnit, str, str, str | None]]:
    """Every row with every kind of operands: the first format, and the first two where they may be mixed."""
    for row in MATRIX_UNITS:
        if row.arithmetic == "plain":
            continue
        pairs = [(a, a) for a in row.operands] + ([row.operands[:2]] if row.mixed else [])
        for a, b in pairs:
            if row.arithmetic != "block_scaled":
                yield row, a, b, None
            for scale in row.scales:
                yield row, a, b, scale


def label(row: MatrixUnit, a: str, b: str, scale: str | None) -> str:
    mode = " precise" if row.accumulation == "precise" else ""
    return f"{row.name}{mode} {a} x {b}" + (f" scales {scale}" if scale else "")


def operands(
    a: str, b: str, scale: str | None, shape: tuple[int, int, int], kind: str, rng: np.random.Generator
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    m, n, k = shape
    x, y = draw(get_format(a), (m, k), kind, rng), draw(get_format(b), (n, k), kind, rng).t()
    if scale is None:
        return x, y, {}
    fmt = get_format(scale)
    blocks = -(-k // SCALE_BLOCKS[scale])
    if kind == "codes" or fmt.kind == "float":
        values = torch.from_numpy(grid(fmt)).float()
        s, t = (values[torch.from_numpy(rng.integers(0, len(values), size))] for size in ((m, blocks), (blocks, n)))
    else:
        spread = {"wide": 60, "finite": 127}.get(kind, 4)
        s, t = (
            torch.from_numpy(np.exp2(rng.integers(-spread, spread + 1, size)).astype(np.float32))
            for size in ((m, blocks), (blocks, n))
        )
    if kind != "codes":
        s, t = s.nan_to_num(1.0), t.nan_to_num(1.0)
    return x, y, {"a_scale": s, "b_scale": t, "scale_format": scale}


def moved(scales: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in scales.items()}


def differences(x: Tensor, y: Tensor) -> int:
    return int((x.cpu().view(torch.int32) != y.cpu().view(torch.int32)).sum())


def check() -> int:
    """CUDA (the Triton kernels, and the torch operations where those do not go) against the CPU."""
    rng = np.random.default_rng(0)
    bad = 0
    for row, a, b, scale in cases():
        counts = []
        for kind in KINDS:
            for shape in ((70, 130, 330), (33, 1, 64), (129, 257, 1000)):
                x, y, scales = operands(a, b, scale, shape, kind, rng)
                expected = matmul(x, y, row, a, b, **scales)
                got = matmul(x.cuda(), y.cuda(), row, a, b, **moved(scales, "cuda"))
                count = differences(got, expected)
                if shape[0] == 70:  # the same torch operations on the other device
                    count += differences(torch_path(x.cuda(), y.cuda(), row, a, b, moved(scales, "cuda")), expected)
                counts.append(count)
        bad += sum(counts)
        print(
            f"{'ok ' if not sum(counts) else 'BAD'} {label(row, a, b, scale)}: {counts if sum(counts) else 'equal'}",
            flush=True,
        )
    print(f"elements that differ: {bad}")
    return 1 if bad else 0


def torch_path(a: Tensor, b: Tensor, row: MatrixUnit, a_format: str, b_format: str, scales: dict[str, Any]) -> Tensor:
    """The product without the Triton kernels."""
    from emulation import matmul_triton

    taken = matmul_triton.takes
    try:
        matmul_triton.takes = lambda left, right, unit: False
        return matmul(a, b, row, a_format, b_format, **scales)
    finally:
        matmul_triton.takes = taken


def seconds(f: Callable[[], Tensor], device: str, repeats: int) -> float:
    f()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def table(device: str, shapes: list[tuple[int, int, int]], only: str = "") -> None:
    rng = np.random.default_rng(0)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{device} ({threads}), torch {torch.__version__}: multiply-adds a second, checks of the operands included")
    for row, a, b, scale in cases():
        if only not in label(row, a, b, scale):
            continue
        speeds = []
        for shape in shapes:
            m, n, k = shape
            x, y, scales = operands(a, b, scale, (min(m, 512), min(n, 512), k), "normal", rng)
            # the same rows and columns again: drawing takes longer than multiplying
            x, y = x.repeat(m // len(x), 1).to(device), y.repeat(1, n // y.shape[1]).to(device)
            if scale is not None:
                scales["a_scale"] = scales["a_scale"].repeat(m // len(scales["a_scale"]), 1).to(device)
                scales["b_scale"] = scales["b_scale"].repeat(1, n // scales["b_scale"].shape[1]).to(device)
            time_s = seconds(partial(matmul, x, y, row, a, b, **scales), device, 3)
            speeds.append(f"{m * n * k / time_s:.2e}")
        print(f"{label(row, a, b, scale):70s} " + "  ".join(speeds), flush=True)


def tiles() -> None:
    from emulation import matmul_triton

    default = dict(matmul_triton.TILES)
    options = [
        (32, 32, 4),
        (32, 64, 4),
        (64, 64, 4),
        (64, 64, 8),
        (16, 128, 4),
        (64, 32, 4),
        (64, 128, 8),
        (128, 64, 8),
    ]
    for tile in options:
        print(f"tile {tile}")
        for name in default:
            matmul_triton.TILES[name] = tile
        for only in (
            "hopper float8_e4m3fn x float8_e4m3fn",
            "hopper float16",
            "cdna3 float8_e4m3fnuz x float8_e4m3fnuz",
            "scales float8_e4m3fn",
        ):
            table("cuda", [(2048, 2048, 2048), (4096, 4096, 4096)], only)
    matmul_triton.TILES.update(default)


def golden(path: Path) -> int:
    """Products of the tensor cores, with their operands' codes; says how many the emulation does not reproduce."""
    rng = np.random.default_rng(20260101)
    dtypes = {
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    plan = [
        (a, b, kind, 160) for a, b in ((e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2)) for kind in KINDS if kind != "finite"
    ]
    plan += [(e4m3, e4m3, kind, k) for kind in ("normal", "wide", "cancelling") for k in (16, 336)]
    plan += [(a, a, kind, 80) for a in ("float16", "bfloat16") for kind in ("normal", "wide", "cancelling")]
    arrays: dict[str, np.ndarray] = {}
    entries, bad = [], 0
    for i, (a, b, kind, k) in enumerate(plan):
        x, y = draw(get_format(a), (16, k), kind, rng), draw(get_format(b), (16, k), kind, rng)
        own = [t.to(dtypes[name]).cuda() for t, name in ((x, a), (y, b))]
        modes = ("fast", "precise") if a in (e4m3, e5m2) else ("fast",)
        for mode in modes:
            if a in (e4m3, e5m2):
                one = torch.ones((), device="cuda")
                product = torch._scaled_mm(
                    own[0], own[1].t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=mode == "fast"
                )
            else:
                product = torch.mm(own[0], own[1].t(), out_dtype=torch.float32)
            emulated = matmul(x, y.t(), "hopper", a, b, mode)
            nan = emulated.isnan() & product.cpu().isnan()
            count = int(((emulated.view(torch.int32) != product.cpu().view(torch.int32)) & ~nan).sum())
            bad += count
            print(f"{a} x {b} {kind} K={k} {mode}: {count} of {emulated.numel()} differ")
            arrays[f"y{i}_{mode}"] = product.cpu().numpy()
        unsigned = torch.uint8 if a in (e4m3, e5m2) else torch.uint16
        arrays[f"a{i}"], arrays[f"b{i}"] = (t.cpu().view(unsigned).numpy() for t in own)
        entries.append({"a": a, "b": b, "kind": kind, "k": k, "modes": modes})
    about = {
        "made by": "python benchmarks/matmul.py --golden FILE",
        "products": "torch._scaled_mm (8 bits, scales 1) and torch.mm(out_dtype=float32) (16 bits): y = a @ b^T",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "entries": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    print(f"{path}: {path.stat().st_size} bytes, {len(entries)} pairs of operands; elements that differ: {bad}")
    return 1 if bad else 0


def memory() -> None:
    n = 4096
    rng = np.random.default_rng(0)
    fmt = get_format("float8_e4m3fn")
    a, b = draw(fmt, (n, n), "normal", rng), draw(fmt, (n, n), "normal", rng)
    matmul(a[:64], b)  # what is loaded and compiled once
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    matmul(a, b)
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    above = (peak - before) / 2**30
    print(f"hopper float8_e4m3fn {n}^3: {took:.1f} s, {n**3 / took:.2e}/s, {above:.2f} GiB beyond the operands at most")


def _resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--golden", type=Path, metavar="FILE")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="time the rows whose label holds TEXT")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="time on this one alone")
    arguments = parser.parse_args()
    code = 0
    if arguments.check:
        code |= check()
    if arguments.golden:
        code |= golden(arguments.golden)
    if arguments.tiles:
        tiles()
    if arguments.memory:
        memory()
    if not (arguments.check or arguments.golden or arguments.tiles or arguments.memory):
        if arguments.device != "cuda":
            table("cpu", [(256, 256, 256), (512, 512, 512)], arguments.only)
        if arguments.device != "cpu" and torch.cuda.is_available():
            table("cuda", [(1024, 1024, 1024), (4096, 4096, 4096)], arguments.only)
    return code


if __name__ == "__main__":
    sys.exit(main())
