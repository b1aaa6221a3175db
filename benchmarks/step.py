"""One training step, private and not, quantized and not: times, memory and ratios, interleaved in one process.

    python benchmarks/step.py                                   # CPU: the small networks
    python benchmarks/step.py --device cuda --models resnet18-cifar --batch-sizes 64 256 1024 --precision tf32
    python benchmarks/step.py --out step.json

Each case is a network of its own; the cases take turns, step by step, so that what else the machine does hits all of
them alike. Printed: median milliseconds, the ratio to plain SGD of the same run, examples/s, and on CUDA the peak
memory of a step. `--allocator default` shows what the C library's own settings cost on the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.models import build_model
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding
from hwmodels.nvml import power_meter

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "digits": ("digits_cnn", {}, (1, 8, 8)),
    "fashion": ("fashion_cnn", {}, (1, 28, 28)),
    "cifar": ("cifar_cnn", {}, (3, 32, 32)),
    "resnet18-imagenet": ("resnet18", {"stem": "imagenet", "num_classes": 10}, (3, 32, 32)),
    "resnet18-cifar": ("resnet18", {"stem": "cifar", "num_classes": 10}, (3, 32, 32)),
    "resnet50-imagenet": ("resnet50", {"stem": "imagenet", "num_classes": 10}, (3, 32, 32)),
    "densenet121": ("densenet121", {"num_classes": 10}, (3, 32, 32)),
}
FORMATS = ("luq_fp4", "fp8", "mxfp4", "nvfp4")
Step = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One case of one model and batch size."""

    model: str
    batch_size: int
    case: str
    median_ms: float
    ratio: float
    examples_per_s: float
    peak_bytes: int | None
    joules: float | None = None


def plain(module: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


def opacus_hooks(module: nn.Module, x: Tensor, y: Tensor) -> Step:
    wrapped = GradSampleModule(module)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(x),
    )
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return step


def opacus_ghost(module: nn.Module, x: Tensor, y: Tensor) -> Step:
    wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=1.0)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=1e-3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return step


def ours(module: nn.Module, x: Tensor, y: Tensor, format: str | None = None, share: float = 1.0) -> Step:
    module = private_module(quantize_model(module, format or "luq_fp4"))
    names = list(quantizable_layers(module))
    set_plan(module, dict.fromkeys(names[: round(share * len(names))], format) if format else {})
    optimizer = PrivateOptimizer(
        torch.optim.SGD(module.parameters(), lr=1e-3),
        module=module,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(x),
    )
    criterion = private_criterion(nn.CrossEntropyLoss())
    ids = torch.arange(len(x))
    taken = iter(range(1 << 40))

    def step() -> None:
        set_rounding(module, seed=0, step=next(taken), example_ids=ids)
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()

    return step


def cases(formats: list[str], peers: bool) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Step]]:
    found: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {"plain SGD": plain}
    if peers:
        found |= {"Opacus hooks": opacus_hooks, "Opacus ghost": opacus_ghost}
    found["private"] = ours
    for name in formats:
        found[f"private, {name}"] = lambda m, x, y, f=name: ours(m, x, y, f)
        found[f"private, {name} on half"] = lambda m, x, y, f=name: ours(m, x, y, f, 0.5)
    return found


def measure(model: str, batch: int, args: argparse.Namespace) -> list[Row]:
    """Every case of one model and batch size, taking turns."""
    name, options, shape = MODELS[model]
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator).to(device)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    x = x.to(dtype)
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    for case, make in cases(args.formats, not args.no_peers).items():
        try:
            steps[case] = make(build_model(name, **options).to(device, dtype), x, y)
            for _ in range(args.warmup):
                steps[case]()
            peaks[case] = _peak(steps[case], device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            steps.pop(case, None)
            print(f"# {model} {batch} {case}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    times: dict[str, list[float]] = {case: [] for case in steps}
    started = time.perf_counter()
    while len(times["plain SGD"]) < args.repeats and time.perf_counter() - started < args.seconds:
        for case, step in steps.items():
            times[case].append(_seconds(step, device))
    medians = {case: statistics.median(t) for case, t in times.items()}
    energy = {case: _joules(step, device) for case, step in steps.items()} if args.energy else {}
    return [
        Row(
            model=model,
            batch_size=batch,
            case=case,
            median_ms=m * 1e3,
            ratio=m / medians["plain SGD"],
            examples_per_s=batch / m,
            peak_bytes=peaks[case],
            joules=energy.get(case),
        )
        for case, m in medians.items()
    ]


def _seconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _peak(step: Step, device: torch.device) -> int | None:
    """Memory of one step beyond what was there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _joules(step: Step, device: torch.device, seconds: float = 0.7) -> float:
    """Energy of the board per step, while it is made over and over, after as long a warm-up."""
    meter = power_meter(str(torch.cuda.get_device_properties(device).uuid))
    before, count = 0.0, 0
    for lasting in (0.3, seconds):
        before, count, end = meter.joules(), 0, time.perf_counter() + lasting
        while time.perf_counter() < end:
            step()
            torch.cuda.synchronize()
            count += 1
    return (meter.joules() - before) / count


def keep_freed_memory() -> bool:
    """Has glibc keep what tensors free: returning it to the kernel costs more than a step's arithmetic."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1) and libc.mallopt(-2, 64 << 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["digits", "fashion", "resnet18-imagenet"], choices=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--formats", nargs="*", default=["luq_fp4", "fp8"], choices=FORMATS)
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--energy", action="store_true", help="also joules per step of the board (CUDA)")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, per model and batch size")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook")
    kept = args.allocator == "kept" and keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.precision}, kept: {kept}")
    rows = []
    for model in args.models:
        for batch in args.batch_sizes:
            found = measure(model, batch, args)
            rows += found
            print(f"\n{model}, batch {batch}")
            for r in found:
                peak = "" if r.peak_bytes is None else f" {r.peak_bytes / 2**20:9.0f} MiB"
                peak += "" if r.joules is None else f" {r.joules:8.2f} J"
                print(
                    f"  {r.case:28s} {r.median_ms:10.2f} ms {r.ratio:6.2f}x {r.examples_per_s:10.0f}/s{peak}",
                    flush=True,
                )
    print(
        f"\npeak resident memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
    if args.out:
        with open(args.out, "w") as stream:
            facts = {"machine": machine, "torch": torch.__version__, "arguments": vars(args)}
            json.dump(facts | {"rows": [asdict(r) for r in rows]}, stream, indent=1)


if __name__ == "__main__":
    main()
