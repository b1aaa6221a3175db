"""Examples per second of private training on 1 to N devices of one host, through the engine itself.

    python benchmarks/scale.py --device cuda --devices 1 2 --out scale.json
    python benchmarks/scale.py --device cpu --devices 1 2 --model digits --batch-per-device 64

Every number of devices is a `torchrun` of its own. The batch per device stays the same (`--global-batch` keeps the
whole batch instead). Timed: whole steps as `dpquant train` takes them, with sampling, gathering the batch, the ledger
on disk, the all-reduce, noise and update; not timed: the first epochs, in which kernels are chosen and graphs captured,
and what is between epochs. Printed: examples/s of the median epoch and its ratio to one device, milliseconds per step,
and the all-reduce of a step alone. What NCCL may use is the environment's to say, such as `NCCL_NVLS_ENABLE=0` where
NVLink multicast is not to be used.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant import ledger_file, privacy
from dpquant.distributed import Processes, joined
from dpquant.engine import DPQuantEngine
from dpquant.models import build_model

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "digits": ("digits_cnn", {}, (1, 8, 8)),
    "resnet18-cifar": ("resnet18", {"stem": "cifar", "num_classes": 10}, (3, 32, 32)),
    "resnet50": ("resnet50", {"stem": "imagenet", "num_classes": 1000}, (3, 224, 224)),
    "resnet50-32": ("resnet50", {"stem": "imagenet", "num_classes": 10}, (3, 32, 32)),
}
STEPS_PER_EPOCH = 4


def measure(args: argparse.Namespace, processes: Processes, ledger: Path) -> dict[str, Any]:
    """One process's part of a run; the figures are those of all together."""
    name, options, shape = MODELS[args.model]
    batch = args.global_batch or args.batch_per_device * processes.size
    generator = torch.Generator().manual_seed(0)
    size = STEPS_PER_EPOCH * batch
    images = torch.randn(size, *shape, generator=generator).to(args.device)
    labels = torch.randint(0, 10, (size,), generator=generator).to(args.device)
    torch.manual_seed(0)
    model = build_model(name, **options).to(args.device)
    schedule = {"scheduler": "static", "fraction": 1.0, "format": args.format} if args.format else {"scheduler": "full"}
    engine = DPQuantEngine(hardware="h200", basis="peak", seed=0, accountant="rdp", processes=processes, **schedule)
    _, optimizer, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=batch),
        noise_multiplier=1.0,
        sample_rate=1 / STEPS_PER_EPOCH,
        expected_batch_size=batch,
        target_delta=1e-6,
        epochs=args.warmup + args.epochs,
        max_grad_norm=1.0,
        max_physical_batch_size=args.physical_batch,
        cuda_graphs=not args.no_graphs,
    )
    if processes.first:
        ledger_file.create_ledger(ledger, "scale")
        engine.write_ahead(privacy.PrivacyLedger(), partial(ledger_file.append_event, ledger))
    seconds: list[float] = []  # of every timed epoch
    examples: list[float] = []  # that this process took in it
    for epoch in engine.epochs():
        started, count = _now(processes, args.device), 0
        for x, y in loader:
            optimizer.zero_grad()
            engine.backward(x, y)
            optimizer.step()
            count += len(y)
        if epoch.index >= args.warmup:
            seconds.append(_now(processes, args.device) - started)
            examples.append(count)
    (totals,) = processes.sum([torch.tensor(examples, dtype=torch.float64)])
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    processes.sum(gradients)
    started = _now(processes, args.device)
    for _ in range(10):
        processes.sum(gradients)
    reduce_s = (_now(processes, args.device) - started) / 10
    return {
        "devices": processes.size,
        "batch": batch,
        "examples_per_s": statistics.median(n / s for n, s in zip(totals.tolist(), seconds, strict=True)),
        "step_ms": statistics.median(seconds) / STEPS_PER_EPOCH * 1e3,
        "all_reduce_ms": reduce_s * 1e3,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


def _now(processes: Processes, device: str) -> float:
    """The time when all processes and their devices are done."""
    if device == "cuda":
        torch.cuda.synchronize()
    processes.sum([torch.zeros(1)])
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2], help="numbers of devices, one run each")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--format", default="", help="quantize every layer; default: none")
    parser.add_argument("--precision", choices=("float32", "tf32"), default="tf32")
    parser.add_argument("--batch-per-device", type=int, default=128)
    parser.add_argument("--global-batch", type=int, help="the whole batch instead, the same for all")
    parser.add_argument("--physical-batch", type=int, help="most examples of one pass")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    parser.add_argument("--warmup", type=int, default=4, help=f"epochs of {STEPS_PER_EPOCH} steps that are not timed")
    parser.add_argument("--epochs", type=int, default=7, help=f"epochs of {STEPS_PER_EPOCH} steps that are timed")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.worker is not None:
        with joined() as processes:
            found = measure(args, processes, Path(args.worker, f"{processes.size}.jsonl"))
            if processes.first:
                Path(args.worker, "row.json").write_text(json.dumps(found))
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {args.model}, {args.precision}, format {args.format or 'none'}")
    print("devices  batch  examples/s  ratio  ms/step  all-reduce ms")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.devices:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            launcher += ["--nproc-per-node", str(count)]
            subprocess.run([*launcher, __file__, *sys.argv[1:], "--worker", folder], check=True)
            row = json.loads(Path(folder, "row.json").read_text())
            rows.append(row)
            ratio = row["examples_per_s"] / rows[0]["examples_per_s"]
            print(
                f"{count:7d} {row['batch']:6d} {row['examples_per_s']:11.1f} {ratio:5.2f}x"
                f" {row['step_ms']:8.2f} {row['all_reduce_ms']:14.2f}",
                flush=True,
            )
    if args.out:
        facts = {"machine": machine, "torch": torch.__version__, "arguments": vars(args)}
        Path(args.out).write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
