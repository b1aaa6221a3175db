"""Timing matrix products, copies, casts and launches with torch, on the machine at hand."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from hwmodels.nvml import PowerMeter

Call = Callable[[], object]

GRAPH_S = 5e-4  # a captured graph of calls lasts at least about this long
OPERAND_LIMIT_BYTES = 2e9
ONE_GIB = 1 << 30


def seconds_per_call(calls: Sequence[Call], device: torch.device, budget_s: float) -> float:
    """Seconds of one call, the calls made in turn: on CUDA the median, in a graph, so without the host's launches.

    On a CPU the fastest: what else runs there only ever adds time.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return _on_host(calls, budget_s)
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize(device)
    repeats = max(1, math.ceil(GRAPH_S / max(time.perf_counter() - begin, 1e-6) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3 / (repeats * len(calls)))
    return statistics.median(found)


def _on_host(calls: Sequence[Call], budget_s: float) -> float:
    found: list[float] = []
    start = time.perf_counter()
    while True:
        begin = time.perf_counter()
        calls[len(found) % len(calls)]()
        now = time.perf_counter()
        found.append(now - begin)
        # on a busy machine few calls are undisturbed: more of them, for four times as long at most
        wanted = 20 if now - start < 4 * budget_s else 5
        if len(found) >= 200 or (len(found) >= wanted and now - start > budget_s):
            return min(found)


def waiting() -> tuple[float, float]:
    """Seconds that this thread has run on a processor, and that it has waited for one; zeros where none can tell."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) / 1e9, int(waited) / 1e9


def watts(calls: Sequence[Call], device: torch.device, meter: PowerMeter, seconds: float = 1.2) -> tuple[float, float]:
    """Board watts, and seconds per call, while the calls are made in turn for some ``seconds``, after a warm-up."""
    once = seconds_per_call(calls, device, 0.05)
    rounds = max(1, math.ceil(0.02 / (once * len(calls))))

    def spell(lasting: float) -> int:
        end, count = time.perf_counter() + lasting, 0
        while time.perf_counter() < end:
            for _ in range(rounds):
                for call in calls:
                    call()
            torch.cuda.synchronize(device)
            count += rounds * len(calls)
        return count

    spell(0.3)
    begin, energy = time.perf_counter(), meter.joules()
    count = spell(seconds)
    lasted = time.perf_counter() - begin
    return (meter.joules() - energy) / lasted, lasted / count


def gemm_calls(kernel: str, m: int, n: int, k: int, device: torch.device, cache_bytes: float) -> list[Call]:
    """Calls that multiply [m, k] by [k, n] in a kernel's format, each with another weight, past the cache in all."""
    width = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5}[kernel]
    copies = max(1, min(8, math.ceil(2 * cache_bytes / (n * k * width)), int(OPERAND_LIMIT_BYTES / (n * k * width))))
    activation = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    if kernel == "bfloat16":
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        return [lambda w=w: torch.mm(activation, w.t(), out=out) for w in weights]  # type: ignore[misc]
    if kernel == "fp8_block" and torch.cuda.get_device_capability(device)[0] == 9:
        return _hopper_block_calls(activation, weights)
    operands = [_operand(kernel, one) for one in (activation, *weights)]
    scales = [_scales(kernel, rows, k, device) for rows in (m, n)]
    return [lambda w=w: _scaled_mm(operands[0], w, scales) for w in operands[1:]]  # type: ignore[misc]


def _hopper_block_calls(activation: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[Call]:
    """Products with float32 scales: one per 128 of an activation's row, one per 128 x 128 of a weight."""
    from torch.nn.functional import ScalingType, scaled_mm

    (m, k), n, device = activation.shape, len(weights[0]), activation.device
    blocks, rows = math.ceil(k / 128), math.ceil(m / 4) * 4  # the library takes rows by fours, and blocks
    operand = torch.zeros(rows, k, device=device, dtype=activation.dtype)
    operand[:m] = activation
    codes = operand.to(torch.float8_e4m3fn)
    scale = torch.ones(blocks, rows, device=device).t()
    weight_scale = torch.ones(math.ceil(n / 128), math.ceil(blocks / 4) * 4, device=device).t()
    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    operands = [weight.to(torch.float8_e4m3fn).t() for weight in weights]
    return [lambda w=w: scaled_mm(codes, w, scale, recipes[0], weight_scale, recipes[1]) for w in operands]  # type: ignore[misc]


def _operand(kernel: str, values: torch.Tensor) -> torch.Tensor:
    if kernel != "nvfp4":
        return values.to(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, (values.shape[0], values.shape[1] // 2), device=values.device, dtype=torch.uint8)
    return codes.view(torch.float4_e2m1fn_x2)


def _scales(kernel: str, rows: int, k: int, device: torch.device) -> torch.Tensor:
    if kernel == "fp8":
        return torch.ones((), device=device)
    block, kind = (32, torch.float8_e8m0fnu) if kernel == "fp8_block" else (16, torch.float8_e4m3fn)
    # the block-scaled instructions read their scales in tiles of 128 rows and 4 blocks
    count = math.ceil(rows / 128) * 128 * math.ceil(k / block / 4) * 4
    return torch.ones(count, device=device).to(kind)


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scales: Sequence[torch.Tensor]) -> torch.Tensor:
    per_tensor = scales[0].ndim == 0  # the others have no such choice
    return torch._scaled_mm(
        a, b.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=per_tensor
    )


def kernels_of(device: torch.device) -> dict[str, str | None]:
    """Which kernels torch runs here: each with None, or with why it does not."""
    found: dict[str, str | None] = {}
    for kernel in ("bfloat16", "fp8", "fp8_block", "nvfp4"):
        if device.type != "cuda" and kernel != "bfloat16":
            found[kernel] = "no such unit in a CPU"
            continue
        try:
            gemm_calls(kernel, 128, 128, 128, device, 0.0)[0]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[kernel] = None
        except (RuntimeError, ValueError, AttributeError, NotImplementedError, TypeError, ImportError) as error:
            found[kernel] = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return found


MULTIPLES = {"bfloat16": 16, "fp8": 16, "nvfp4": 32, "fp8_block": 128}
"""What a kernel asks n and k to be multiples of."""


def shapes(largest: Sequence[int], heaviest_flops: float, multiple: int = 16) -> Iterator[tuple[int, int, int]]:
    """Endless (m, n, k) spread evenly over the logarithms of the sizes, every other m a power of two.

    n and k are multiples of ``multiple``; products above ``heaviest_flops`` are left out.
    """
    golden = 1.2207440846057596  # the root of x^4 = x + 1: its powers spread points evenly in three dimensions
    index = 0
    while True:
        index += 1
        u = [(0.5 + index * golden**-axis) % 1.0 for axis in (1, 2, 3)]
        m = max(1, round(largest[0] ** u[0]))
        m = 1 << round(math.log2(m)) if index % 2 else m
        n, k = (
            multiple * max(1, round(32 / multiple * (size / 32) ** x))
            for size, x in zip(largest[1:], u[1:], strict=True)
        )
        if 2.0 * m * n * k <= heaviest_flops:
            yield m, n, k


def copy_bytes_per_s(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying ``size`` bytes.

    On CUDA negated on the way: passes over tensors are kernels, and a mere copy of a gigabyte in a graph ran at 56 % of
    an H200's bandwidth, where the same copies outside of one, and kernels, reach 87 %.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    kernel = device.type == "cuda"
    copy = (lambda: torch.neg(source, out=target)) if kernel else (lambda: target.copy_(source))
    return 2 * size / seconds_per_call([copy], device, 0.5)


def launch_seconds(device: torch.device) -> float:
    """Seconds of a kernel that does nothing to speak of."""
    cell = torch.zeros(1, device=device)
    return seconds_per_call([lambda: cell.add_(1.0)] * 16, device, 0.2)


def passes(device: torch.device, sizes: Sequence[int], budget_s: float) -> tuple[list[float], list[float]]:
    """Seconds of finding a bfloat16 tensor's largest value, and of casting it to fp8, for each count of elements."""
    amax, cast = [], []
    for size in sizes:
        values = torch.randn(size, device=device).to(torch.bfloat16)
        codes = torch.empty(size, device=device, dtype=torch.float8_e4m3fn)
        amax.append(seconds_per_call([lambda v=values: torch.linalg.vector_norm(v, math.inf)], device, budget_s))  # type: ignore[misc]
        cast.append(seconds_per_call([lambda v=values, c=codes: c.copy_(v)], device, budget_s))  # type: ignore[misc]
    return amax, cast


def best_flops_per_s(dtype: torch.dtype, device: torch.device, sizes: Sequence[int]) -> float:
    """The highest rate of square products of a dtype, float32 without tfloat32."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2.0 * size**3 / seconds_per_call([lambda a=a, b=b: torch.mm(a, b)], device, 0.3))  # type: ignore[misc]
    return best
