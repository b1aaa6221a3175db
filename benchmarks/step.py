"""One training step, private and not, quantized and not: times, memory and ratios, interleaved in one process.

    python benchmarks/step.py                                   # CPU: the small networks
    python benchmarks/step.py --models resnet18-imagenet --memory
    python benchmarks/step.py --device cuda --models resnet18-cifar --batch-sizes 64 256 1024 --precision tf32
    python benchmarks/step.py --out step.json

Each case is a network of its own. A few cases at a time take turns with plain SGD, step by step, so that what else the
machine does hits all of them alike; then their memory is given back. Printed: median milliseconds, the ratio to plain
SGD beside them, examples/s, and the peak memory. On CUDA that is the most a case holds during a step beyond what lay
there before its network was built: parameters, gradients, activations, and all that is set aside for its graph, which
nothing else can use; on the CPU (`--memory`) what a process of its own holds. The floor is a plain step and then the
norms alone, of operands kept from a private backward: less than that no clipping can take that forms the batch's
gradients as torch does. On CUDA plain SGD and the floor are graphs too, as private steps are, and plain SGD is there
once more as most programs run it; ratios are to that one. `--allocator default` shows what the C library's own settings
cost on the CPU, where with one thread (OMP_NUM_THREADS=1) times are CPU time, which other programs hardly disturb.
`--out` is written as the run goes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from dpquant.allocator import keep_freed_memory
from dpquant.clipping import PrivateOptimizer, Tape, per_example_norms, private_criterion, private_module
from dpquant.graphs import GraphedBackward
from dpquant.models import build_model
from emulation.layers import LayerGradient, quantizable_layers, quantize_model, set_plan, set_rounding
from hwmodels.nvml import power_meter

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "digits": ("digits_cnn", {}, (1, 8, 8)),
    "fashion": ("fashion_cnn", {}, (1, 28, 28)),
    "cifar": ("cifar_cnn", {}, (3, 32, 32)),
    "resnet18-imagenet": ("resnet18", {"stem": "imagenet", "num_classes": 10}, (3, 32, 32)),
    "resnet18-cifar": ("resnet18", {"stem": "cifar", "num_classes": 10}, (3, 32, 32)),
    "resnet50-imagenet": ("resnet50", {"stem": "imagenet", "num_classes": 10}, (3, 32, 32)),
    "densenet121": ("densenet121", {"num_classes": 10}, (3, 32, 32)),
    "vit": ("vit_small", {"num_classes": 10}, (3, 32, 32)),
    "transformer": ("transformer", {"num_classes": 10}, (128,)),
}
FORMATS = ("luq_fp4", "fp8", "mxfp4", "nvfp4")
Step = Callable[[], None]
_STARTED = time.perf_counter()


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
    precision: str = "float32"
    host_ms: float | None = None
    kernels: int | None = None
    device_ms: float | None = None


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


def floor(module: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A plain step, then every example's gradient norm from operands that one private backward has left."""
    private = private_module(quantize_model(copy.deepcopy(module)))
    tape: Tape = private.private_tape  # type: ignore[assignment]
    records: list[LayerGradient] = []
    for layer in quantizable_layers(private).values():
        layer.tape = records
    normed: list[tuple[Tensor, Tensor]] = []  # of the layers that normalise: input and output gradient

    def keep(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach()
        out.register_hook(lambda grad: normed.append((_by_channel(layer, x), _by_channel(layer, grad))))

    for layer in private.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.register_forward_hook(keep)
    private_criterion(nn.CrossEntropyLoss())(private(x), y).backward()
    others, step_without = list(tape.contributions), plain(module, x, y)

    def step() -> None:
        step_without()
        tape.contributions = list(others)
        for record in records:
            tape.append(record)
        for kept, grad in normed:
            _, _ = grad.sum(1), (kept * grad).sum(1)
        per_example_norms(tape)

    return step


def _by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """[B, positions, channels]."""
    return values.flatten(1, -2) if isinstance(layer, nn.LayerNorm) else values.flatten(2).transpose(1, 2)


def ours(
    module: nn.Module, x: Tensor, y: Tensor, format: str | None = None, share: float = 1.0, graphs: bool = True
) -> Step:
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
    graphed = GraphedBackward(module, criterion, optimizer, len(x), most=len(x)) if x.is_cuda and graphs else None
    ids = torch.arange(len(x))
    taken = iter(range(1 << 40))

    def step() -> None:
        set_rounding(module, seed=0, step=next(taken), example_ids=ids)
        optimizer.zero_grad()
        if graphed is not None:
            graphed(x, y)
        else:
            criterion(module(x), y).backward()
        optimizer.step()

    return step


Make = Callable[[nn.Module, Tensor, Tensor], Step]


def graphed(make: Make) -> Make:
    """The same step, captured once and then replayed."""

    def make_graphed(module: nn.Module, x: Tensor, y: Tensor) -> Step:
        step, stream = make(module, x, y), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # chooses kernels, which a capture does not allow
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()

        def replay() -> None:
            _ = step  # whose network the graph works on
            graph.replay()

        return replay

    return make_graphed


def groups(formats: list[str], peers: bool, cuda: bool) -> list[dict[str, Make]]:
    """The cases beside plain SGD that take turns, and hold memory, at a time."""
    quantized: list[dict[str, Make]] = [
        {
            f"private, {name}{'' if share == 1 else ' on half'}": partial(ours, format=name, share=share)
            for name in formats
        }
        for share in (1.0, 0.5)
    ]
    own: dict[str, Make] = {"floor": graphed(floor) if cuda else floor, "private": ours}
    if cuda:
        own = {"plain SGD, graphed": graphed(plain)} | own
        if peers:
            own["private, no graphs"] = partial(ours, graphs=False)
    opacus: dict[str, Make] = {"Opacus hooks": opacus_hooks, "Opacus ghost": opacus_ghost}
    found = [own, quantized[0], opacus if peers else {}, quantized[1]]
    return [group for group in found if group]


@dataclass
class Seen:
    """What was measured of one case: seconds of its steps, of the host's part, and those of plain SGD beside them."""

    times: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    peak: int | None = None
    joules: float | None = None
    kernels: dict[str, tuple[int, float]] | None = None

    def row(self, case: str, facts: dict[str, Any], cuda: bool) -> Row:
        median = statistics.median(self.times)
        return Row(
            **facts,
            case=case,
            median_ms=median * 1e3,
            ratio=median / statistics.median(self.beside),
            examples_per_s=facts["batch_size"] / median,
            peak_bytes=self.peak,
            joules=self.joules,
            host_ms=statistics.median(self.hosts) * 1e3 if cuda else None,
            kernels=None if self.kernels is None else sum(count for count, _ in self.kernels.values()),
            device_ms=None if self.kernels is None else sum(ms for _, ms in self.kernels.values()),
        )


def measure(model: str, batch: int, precision: str, args: argparse.Namespace) -> Iterator[dict[str, Seen]]:
    """Every case of one model, batch size and precision, as far as they are measured after each group."""
    device = torch.device(args.device)
    x, y = _batch(model, batch, precision, args)
    seen: dict[str, Seen] = {}
    plain_step: dict[str, Step] = {}
    for group in groups(args.formats, not args.no_peers, device.type == "cuda"):
        if time.perf_counter() - _STARTED > args.within:
            break
        steps = dict(plain_step)
        for case, make in (group if steps else {"plain SGD": plain} | group).items():
            if precision == "bf16" and case.startswith("private"):
                continue  # bfloat16 parameters, which the engine refuses
            found = Seen()
            try:
                if args.memory and device.type == "cpu":
                    found.peak = _resident(case, model, batch)
                steps[case], peak = _built(make, model, precision, x, y, args.warmup)
                found.peak = found.peak or peak
                seen[case] = found
            except RuntimeError as error:  # also for want of memory
                print(f"# {model} {batch} {case}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        plain_step = {"plain SGD": steps["plain SGD"]}
        _take_turns(steps, seen, device, args)
        del steps
        _give_back(device)
        yield seen


def _take_turns(steps: dict[str, Step], seen: dict[str, Seen], device: torch.device, args: argparse.Namespace) -> None:
    started, beside = time.perf_counter(), seen["plain SGD"].times[:0]
    while len(beside) < args.repeats and time.perf_counter() - started < args.seconds:
        for case, step in steps.items():
            seconds, host = _seconds(step, device)
            seen[case].times.append(seconds)
            seen[case].hosts.append(host)
            if case == "plain SGD":
                beside.append(seconds)
    for case, step in steps.items():
        seen[case].beside += beside
        if device.type == "cuda" and args.energy:
            seen[case].joules = _joules(step, device)
        if device.type == "cuda" and args.kernels:
            seen[case].kernels = _kernels(step)


def _built(make: Make, model: str, precision: str, x: Tensor, y: Tensor, warmup: int) -> tuple[Step, int | None]:
    """A case ready to be timed, and on CUDA the most that it holds during a step."""
    if not x.is_cuda:
        step = make(_network(model, precision, x.device), x, y)
        for _ in range(warmup):
            step()
        return step, None
    _give_back(x.device)
    before = torch.cuda.memory_allocated() + _set_aside()
    step = make(_network(model, precision, x.device), x, y)
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() + _set_aside() - before


def _set_aside() -> int:
    """Bytes that graphs keep for their replays, and that count as free while none runs."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _give_back(device: torch.device) -> None:
    """Frees what nothing refers to any more: modules and their hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _network(model: str, precision: str, device: torch.device) -> nn.Module:
    name, options, _ = MODELS[model]
    return build_model(name, **options).to(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _batch(model: str, size: int, precision: str, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    shape = MODELS[model][2]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (size,), generator=generator).to(args.device)
    if len(shape) == 1:
        return torch.randint(0, 1000, (size, *shape), generator=generator).to(args.device), labels
    x = torch.randn(size, *shape, generator=generator).to(args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(torch.bfloat16 if precision == "bf16" else torch.float32), labels


def _seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and those until the host had launched all of it."""
    if device.type != "cuda":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        step()
        return (clock() - started,) * 2
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    step()
    launched = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, launched


def _resident(case: str, model: str, batch: int) -> int:
    """Most memory that a process holds that takes some steps of one case and nothing else."""
    words = [sys.executable, __file__, *sys.argv[1:], "--alone", case, "--models", model, "--batch-sizes", str(batch)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def alone(case: str, args: argparse.Namespace) -> None:
    """Takes some steps of one case and prints what the process held at most, in bytes."""
    (model,), (batch,), precision = args.models, args.batch_sizes, args.precision[0]
    x, y = _batch(model, batch, precision, args)
    makes = {"plain SGD": plain} | {
        name: make for group in groups(args.formats, True, False) for name, make in group.items()
    }
    step = makes[case](_network(model, precision, torch.device("cpu")), x, y)
    for _ in range(10):
        step()
    # not getrusage's ru_maxrss, in which Linux counts what the process that started this one held
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak) * 1024)


def _joules(step: Step, device: torch.device, seconds: float = 0.8) -> float:
    """Energy of the board per step, made over and over after a warm-up; from tick to tick of a slow counter."""
    meter = power_meter(str(torch.cuda.get_device_properties(device).uuid))
    for lasting in (0.2, seconds):
        begin, count, ticks = time.perf_counter(), 0, [(0.0, meter.joules())]
        while (now := time.perf_counter() - begin) < lasting:
            step()
            torch.cuda.synchronize()
            count += 1
            if (joules := meter.joules()) != ticks[-1][1]:
                ticks.append((time.perf_counter() - begin, joules))
        ticks = ticks[1:] if len(ticks) > 2 else [*ticks, (now, meter.joules())]
    watts = (ticks[-1][1] - ticks[0][1]) / (ticks[-1][0] - ticks[0][0])
    return watts * (time.perf_counter() - begin) / count


def _kernels(step: Step) -> dict[str, tuple[int, float]]:
    """What a step runs on the device: name -> how often, and milliseconds of all together."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, ms = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, ms + event.time_range.elapsed_us() / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["digits", "fashion", "resnet18-imagenet"], choices=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--energy", action="store_true", help="also joules per step of the board (CUDA)")
    parser.add_argument("--kernels", help="JSON file: every kernel that a step launches, and its time (CUDA)")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each case (CPU)")
    parser.add_argument("--alone", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of turns at most, per few cases of a model and batch"
    )
    parser.add_argument("--within", type=float, default=86400.0, help="seconds after which no group is begun")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook")
    kept = args.allocator == "kept" and keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    if args.alone:
        alone(args.alone, args)
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, kept: {kept}")
    facts = {"machine": machine, "torch": torch.__version__, "arguments": vars(args)}
    whole: list[tuple[dict[str, Any], dict[str, Seen]]] = []
    for model, precision, batch in product(args.models, args.precision, args.batch_sizes):
        whole.append(({"model": model, "precision": precision, "batch_size": batch}, {}))
        for seen in measure(model, batch, precision, args):
            whole[-1] = whole[-1][0], seen
            _write(whole, facts, args)
        if whole[-1][1]:
            print(f"\n{model}, {precision}, batch {batch}")
            _print([found.row(case, whole[-1][0], args.device == "cuda") for case, found in whole[-1][1].items()])


def _print(rows: list[Row]) -> None:
    plain_peak = rows[0].peak_bytes
    for r in rows:
        peak = "" if r.peak_bytes is None else f" {r.peak_bytes / 2**20:9.0f} MiB"
        if r.peak_bytes is not None and plain_peak:
            peak += f" {r.peak_bytes / plain_peak:5.2f}x"
        peak += "" if r.joules is None else f" {r.joules:8.2f} J"
        peak += "" if r.device_ms is None else f" {r.device_ms:9.2f} ms in {r.kernels} kernels"
        print(f"  {r.case:28s} {r.median_ms:10.2f} ms {r.ratio:6.2f}x {r.examples_per_s:10.0f}/s{peak}", flush=True)


def _write(
    whole: list[tuple[dict[str, Any], dict[str, Seen]]], facts: dict[str, Any], args: argparse.Namespace
) -> None:
    """The files as of now: a run that is stopped loses what it was at."""
    each = [(keys, case, found) for keys, seen in whole for case, found in seen.items()]
    if args.out:
        rows = [asdict(found.row(case, keys, args.device == "cuda")) for keys, case, found in each]
        with open(args.out, "w") as stream:
            json.dump(facts | {"rows": rows}, stream, indent=1)
    if args.kernels:
        with open(args.kernels, "w") as stream:
            json.dump([keys | {"case": case, "kernels": found.kernels} for keys, case, found in each], stream)


if __name__ == "__main__":
    main()
