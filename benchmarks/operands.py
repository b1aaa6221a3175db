"""Which operands' quantization costs accuracy, and what scales per example cost beside scales per tensor.

    python benchmarks/operands.py digits --out benchmarks/results/operands_digits.jsonl
    python benchmarks/operands.py fashion --device cuda --jobs 4 --out benchmarks/results/operands_fashion.jsonl

DP-SGD with all layers quantized: forward operands (weights, inputs) alone, output gradients alone, both, and both with
one scale per tensor for inputs and gradients. The last is no private training: such a scale lets one example change
what is added of the others, and it is here for its accuracy alone. A line of JSON per run: test accuracy after the last
epoch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor, nn

from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.data import DataSettings, load_data
from dpquant.models import build_model
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding
from emulation.precision import LayerPrecision, layer_precision
from emulation.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, its network and the settings of its private training."""

    data: str
    model: Callable[[], nn.Module]
    epochs: int
    batch: int
    rate: float
    momentum: float
    clip: float
    noise: float


TASKS = {
    "digits": Task(
        data="digits",
        model=lambda: build_model("digits_cnn"),
        epochs=15,
        batch=128,
        rate=0.5,
        momentum=0.0,
        clip=1.0,
        noise=1.0,
    ),
    "fashion": Task(
        data="fashion_mnist",
        model=lambda: build_model("fashion_cnn"),
        epochs=20,
        batch=2048,
        rate=4.0,
        momentum=0.9,
        clip=0.1,
        noise=1.2,
    ),
}
VARIANTS = ("forward", "backward", "both", "both, per tensor")


def main() -> None:
    """Trains every variant over the seeds; writes or prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", nargs="+", default=["luq_fp4", "float4_e2m1fn", "int4"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [(seed, fmt, variant) for seed in range(args.seeds) for fmt, variant in variants(args.formats)]
    tasks = (joblib.delayed(line)(args.task, args.root, args.device, *run) for run in runs)
    lines = joblib.Parallel(n_jobs=args.jobs, return_as="generator")(tasks)
    stream = args.out.open("w", encoding="utf-8") if args.out else None
    for text in lines:
        print(text, file=stream, flush=True)


def variants(formats: list[str]) -> Iterator[tuple[str, str]]:
    """Full precision, and every variant of every format."""
    yield "none", "none"
    yield from ((fmt, variant) for fmt in formats for variant in VARIANTS)


def line(name: str, root: str | None, device: str, seed: int, fmt: str, variant: str) -> str:
    """One run as a line of JSON."""
    torch.set_num_threads(1)
    accuracy = trained(TASKS[name], root, device, seed, None if fmt == "none" else precision(fmt, variant))
    return json.dumps({"task": name, "seed": seed, "format": fmt, "operands": variant, "accuracy": accuracy})


def precision(fmt: str, variant: str) -> LayerPrecision:
    """The recipe of a format with only some operands quantized, or with other scales."""
    recipe, exact = layer_precision(fmt), Quantizer("float32")
    changes: dict[str, Any] = {
        "forward": {"grad_output": exact},
        "backward": {"weight": exact, "input": exact},
        "both": {},
        "both, per tensor": {
            "input": replace(recipe.input, granularity="tensor"),
            "grad_output": replace(recipe.grad_output, granularity="tensor"),
        },
    }[variant]
    return replace(recipe, name=variant, **changes)


def trained(task: Task, root: str | None, device: str, seed: int, precision: LayerPrecision | None) -> float:
    """Trains by DP-SGD with Poisson samples; test accuracy in [0, 1] of the full-precision weights."""
    splits = load_data(DataSettings(name=task.data, root=root))
    images, labels, test_images, test_labels = (t.to(device) for t in (*splits.train.tensors, *splits.test.tensors))
    torch.manual_seed(seed)
    model = quantize_model(task.model().to(device), "luq_fp4")
    private_module(model)
    for layer in quantizable_layers(model).values():
        layer.private = False  # so that scales per tensor are not refused
    plan = {} if precision is None else dict.fromkeys(quantizable_layers(model), precision)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=task.rate, momentum=task.momentum),
        module=model,
        noise_multiplier=task.noise,
        max_grad_norm=task.clip,
        expected_batch_size=task.batch,
        generator=torch.Generator(device).manual_seed(seed),
    )
    criterion, sampling = private_criterion(nn.CrossEntropyLoss()), torch.Generator().manual_seed(seed)
    model.train()
    set_plan(model, plan)
    for step in range(task.epochs * -(-len(images) // task.batch)):
        chosen = (torch.rand(len(images), generator=sampling) < task.batch / len(images)).nonzero().flatten().to(device)
        set_rounding(model, seed=seed, step=step, example_ids=chosen)
        optimizer.zero_grad()
        criterion(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    set_plan(model, {})
    return accuracy(model.eval(), test_images, test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is told right."""
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return float(torch.stack(right).sum()) / len(labels)


if __name__ == "__main__":
    main()
