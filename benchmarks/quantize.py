"""Speed of quantizers in GB/s (bytes read and written), beside a copy of the same tensor and beside other libraries.

    python benchmarks/quantize.py [--quick] [--device cuda] [--threads 1,2] [--markdown]

Every figure is the best of repeated runs, the copies between them, so that other work on the machine weighs little, and
on both alike. On a GPU there are two: calls in a row, which the host's work may bound, and the same calls replayed from
a CUDA graph, which is the kernels' own time; both by CUDA events. Peers are timed where they are installed: qtorch (its
kernels compile at first use), torchao, and microscaling in plain torch as microxcaling does it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from emulation.codec import derive_keys, round_to
from emulation.errors import InputError
from emulation.formats import FORMATS, scalar_format
from emulation.quantizer import Quantizer

Step = Callable[[], object]
STEPS = 20


@dataclass(frozen=True)
class Row:
    threads: int
    elements: int
    name: str
    seconds: float
    copy_seconds: float
    replay_seconds: float = math.nan
    copy_replay_seconds: float = math.nan

    @property
    def gigabytes_per_s(self) -> float:
        return 8 * self.elements / self.seconds / 1e9

    @property
    def of_copy(self) -> float:
        return self.copy_seconds / self.seconds


def seconds(step: Step, budget_s: float) -> float:
    """The best of the runs in about ``budget_s``."""
    step()
    step()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - begun < budget_s and len(times) < 2000):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def device_seconds(step: Step, budget_s: float) -> float:
    """The same on a GPU: between CUDA events around steps in a row, of which the mean counts."""
    step()
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begun < budget_s and len(times) < 200):
        torch.cuda.synchronize()
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / STEPS)
    return min(times)


def replay_seconds(step: Step, budget_s: float) -> float:
    """The time of a step in a captured graph of many; NaN where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        step()
        with torch.cuda.graph(graph):
            for _ in range(STEPS):
                step()
    except Exception as error:  # a peer that waits for the device
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return math.nan
    return device_seconds(graph.replay, budget_s) / STEPS


def ours(x: Tensor, out: Tensor) -> dict[str, Step]:
    keys = derive_keys(0, torch.arange(len(x), device=x.device))
    steps: dict[str, Step] = {}

    def add(name: str, quantizer: Quantizer, into: Tensor | None = out) -> None:
        bits = keys if quantizer.rounding == "stochastic" else None
        steps[name] = lambda: quantizer.fake_quantize(x, keys=bits, out=into)

    steps["e4m3 nearest, out="] = lambda: round_to(x, "fp8", out=out)
    steps["e4m3 stochastic, out="] = lambda: round_to(x, "fp8", "stochastic", keys=keys, out=out)
    steps["e2m1 nearest, out="] = lambda: round_to(x, "fp4", out=out)
    steps["e4m3 nearest"] = lambda: round_to(x, "fp8")
    steps["e4m3 stochastic"] = lambda: round_to(x, "fp8", "stochastic", keys=keys)
    for rounding in ("nearest_even", "stochastic"):
        kind = rounding.split("_")[0]
        add(f"luq_fp4 per example, {kind}, out=", Quantizer("luq_fp4", rounding=rounding))
        add(f"mxfp4 {kind}, out=", Quantizer("mxfp4", rounding=rounding))
    add("e4m3 per tensor, out=", Quantizer("fp8", "tensor"))
    add("e4m3 per example, out=", Quantizer("fp8"))
    add("nvfp4 per tensor, out=", Quantizer("nvfp4", "tensor"))
    add("nvfp4 per example, out=", Quantizer("nvfp4"))
    add("nvfp4 per example, stochastic, out=", Quantizer("nvfp4", rounding="stochastic"))
    add("mxfp4", Quantizer("mxfp4"), None)
    steps["e4m3 nearest, torch's operations, out="] = lambda: round_to(x, "fp8", out=out, backend="torch")
    return steps


def peers(x: Tensor) -> dict[str, Step]:
    steps: dict[str, Step] = {"peer: torch cast to float8_e4m3fn and back": lambda: x.to(torch.float8_e4m3fn).float()}
    try:
        if x.is_cuda:
            raise InputError("its kernels for a GPU need a CUDA compiler")
        round_to(x[:1], "fp8", backend="qtorch")
        steps["peer: qtorch e4m3 nearest"] = lambda: round_to(x, "fp8", backend="qtorch")
        steps["peer: qtorch e4m3 stochastic"] = lambda: round_to(x, "fp8", "stochastic", backend="qtorch")
    except InputError as error:
        print(f"qtorch left out: {error}", file=sys.stderr)
    if x.shape[-1] % 32 == 0:
        steps["peer: microxcaling-style mxfp4 in torch"] = lambda: microscaled(x)
        if importlib.util.find_spec("torchao"):
            from torchao.prototype.mx_formats.mx_tensor import to_mx  # type: ignore[import-not-found,unused-ignore]

            steps["peer: torchao to_mx fp4 (one way)"] = lambda: to_mx(x, torch.float4_e2m1fn_x2, 32)
    return steps


def microscaled(x: Tensor) -> Tensor:
    """MXFP4 as microxcaling does it: log2 for exponents, half away from zero."""
    element = scalar_format("float4_e2m1fn")
    blocks = x.view(-1, 32)
    shared = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True).clamp(min=2.0**-126))) - element.max_exponent
    a = blocks / 2.0**shared
    private = torch.floor(torch.log2(a.abs() + (a == 0))).clamp(min=element.min_exponent)
    a = a / 2.0**private * 2.0**element.mantissa_bits
    a = torch.sign(a) * torch.floor(a.abs() + 0.5)
    a = (a / 2.0**element.mantissa_bits * 2.0**private).clamp(-element.max_value, element.max_value)
    return (a * 2.0**shared).view(x.shape)


def table(device: str, threads: int, elements: int, budget_s: float) -> list[Row]:
    columns = 640 if elements >= 10**5 else 32
    x = torch.randn(elements // columns, columns, device=device)
    out = torch.empty_like(x)
    steps = ours(x, out) | peers(x)
    rows = []
    for name, step in steps.items():
        if device == "cpu":
            copy_s = seconds(lambda: out.copy_(x), budget_s / 2)
            rows.append(Row(threads, x.numel(), name, seconds(step, budget_s), copy_s))
            continue
        copy_s, copy_replay_s = (f(lambda: out.copy_(x), budget_s / 4) for f in (device_seconds, replay_seconds))
        step_s, replay_s = (f(step, budget_s / 2) for f in (device_seconds, replay_seconds))
        rows.append(Row(threads, x.numel(), name, step_s, copy_s, replay_s, copy_replay_s))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--elements", default="1e4,1e6,1e7,1e8")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second for each figure, up to 1e7 elements")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers' imports
    sizes = [int(float(n)) for n in arguments.elements.split(",")]
    sizes = [n for n in sizes if n <= 10**7] if arguments.quick else sizes
    threads = [int(t) for t in arguments.threads.split(",")] if arguments.device == "cpu" else [1]
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {where}, {len(FORMATS)} formats, float32, GB/s = 8 bytes an element / time")
    edge, join = ("| ", " | ") if arguments.markdown else ("", "  ")
    columns = [f"{'':48}", "threads", "elements", "   GB/s", "of copy", "   time"]
    if arguments.device == "cuda":
        columns += ["replayed", "of copy's"]
    print(edge + join.join(columns))
    for count, size in product(threads, sizes):
        torch.set_num_threads(count)
        for row in table(arguments.device, count, size, 0.1 if arguments.quick else 0.5):
            cells = [f"{row.name:48}", f"{count:7d}", f"{size:8.0e}", f"{row.gigabytes_per_s:7.2f}"]
            cells += [f"{row.of_copy:6.0%}", f"{row.seconds * 1e6:9.1f} us"]
            if arguments.device == "cuda":
                cells += [
                    f"{row.replay_seconds * 1e6:8.1f} us",
                    f"{row.replay_seconds / row.copy_replay_seconds:6.2f} x",
                ]
            print(edge + join.join(cells), flush=True)


if __name__ == "__main__":
    main()
