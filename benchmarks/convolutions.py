"""Convolutions and copies of this machine beside what the cost model takes for them.

    python benchmarks/convolutions.py --device cuda --hardware h200_measured --out convolutions.json
    python benchmarks/convolutions.py --read benchmarks/results/convolutions_h200.json --hardware h200_measured

Every convolution of ResNet-18 (CIFAR stem) and three of ResNet-50, forward, input gradient and weight gradient, in each
precision and memory layout, timed in a CUDA graph; beside it what the cost model takes for it in an eager framework: a
matrix product of its sizes and, where tensor cores meet channels first, both activations' change of layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwmodels import load_profile, measure
from hwmodels.cost import StepModel
from hwmodels.dpsgd import CONVOLUTION_KERNELS, TURNED_FLOPS
from hwmodels.profile import HardwareProfile
from hwmodels.step import PHASE
from hwmodels.workload import LayerWork, Product, Workload

# channels in and out, height = width, kernel, stride
SHAPES = (
    (3, 64, 32, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (64, 128, 32, 1, 2),
    (128, 128, 16, 3, 1),
    (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1),
    (256, 512, 8, 3, 2),
    (512, 512, 4, 3, 1),
    (3, 64, 224, 7, 2),
    (256, 64, 56, 1, 1),
    (1024, 256, 14, 1, 1),
)
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"float32": "float32", "tf32": "tfloat32", "bf16": "bfloat16"}
PHASES = {"forward": "forward", "grad_input": "grad_input", "grad_weight": "weight_gradient"}
COPIES = tuple(1 << power for power in range(12, 33, 2))


def call(x: Tensor, weight: Tensor, stride: int, name: str) -> Callable[[], object]:
    """One of a convolution's three products."""
    padding = weight.shape[-1] // 2
    if name == "forward":
        return lambda: F.conv2d(x, weight, stride=stride, padding=padding)
    grad = torch.randn_like(F.conv2d(x, weight, stride=stride, padding=padding))
    mask = [name == "grad_input", name == "grad_weight", False]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )


def convolutions(device: torch.device, batch: int, budget_s: float) -> list[dict[str, Any]]:
    rows = []
    for precision, last, shape in product(PRECISIONS, (False, True), SHAPES):
        wide = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wide
        inputs, outputs, size, kernel, stride = shape
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch, inputs, size, size, device=device, dtype=PRECISIONS[precision])
        weight = torch.randn(outputs, inputs, kernel, kernel, device=device, dtype=x.dtype)
        x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        for name in PHASES:
            seconds = measure.seconds_per_call([call(x, weight, stride, name)], device, budget_s)
            facts = {"shape": shape, "batch_size": batch, "precision": precision, "channels_last": last}
            rows.append(facts | {"pass": name, "seconds": seconds})
    return rows


def workload(shape: Sequence[int], batch: int) -> Workload:
    """One convolution as the cost model sees it."""
    inputs, outputs, size, kernel, stride = shape
    product = Product(
        rows=(-(-size // stride)) ** 2,
        inputs=inputs * kernel * kernel,
        outputs=outputs,
        input_elements=inputs * size * size,
        weighted=True,
        grad_input=True,
        grad_weight=True,
        convolution=True,
    )
    layer = LayerWork(name="convolution", kind="conv", products=(product,), parameters=product.weight_elements)
    return Workload(layers=(layer,), batch_size=batch, parameters=layer.parameters)


def predicted_s(row: dict[str, Any], profile: HardwareProfile) -> tuple[float, float]:
    """Seconds of the product alone, and with what an eager framework brings: the layout's change and small kernels."""
    work = workload(row["shape"], row["batch_size"])
    options = {"method": "sgd", "framework": "eager", "baseline": FORMATS[row["precision"]]}
    phase = PHASE[PHASES[row["pass"]]]
    found = StepModel(work, profile, **options)
    product = work.layers[0].products[0]
    elements = product.input_elements + product.output_elements
    turned_s = TURNED_FLOPS * row["batch_size"] * elements / profile.vector_flops_per_s
    turns = row["precision"] != "float32"
    whole = float(found.prices(None).seconds[phase].sum())
    alone = whole - turned_s * turns
    turned = turns and not row["channels_last"]
    kernels = CONVOLUTION_KERNELS + 2 * turned
    return alone, (whole if turned else alone) + kernels * profile.launch_s


def table(found: dict[str, Any], profile: HardwareProfile) -> str:
    """How long convolutions take beside their prediction, in Markdown: medians and quartiles over shapes."""
    ratios: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in found["convolutions"]:
        alone, whole = predicted_s(row, profile)
        key = row["precision"], "last" if row["channels_last"] else "first", row["pass"]
        ratios.setdefault(key, []).append((alone / row["seconds"], whole / row["seconds"]))
    head = ["format", "channels", "pass", "product alone", "predicted", "quartiles", "within 1.5x"]
    lines = [head, ["---"] * len(head)]
    for key, values in ratios.items():
        alone, whole = ([value[index] for value in values] for index in (0, 1))
        low, middle, high = statistics.quantiles(whole, n=4)
        near = sum(1 / 1.5 <= ratio <= 1.5 for ratio in whole)
        figures = [f"{statistics.median(alone):.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append([*key, *figures, f"{near} of {len(whole)}"])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(found: dict[str, Any], profile: HardwareProfile) -> None:
    print("convolution                   batch pass         measured  predicted  ratio")
    ratios: dict[tuple[str, bool], list[float]] = {}
    for row in found["convolutions"]:
        _, guess = predicted_s(row, profile)
        ratios.setdefault((row["precision"], row["channels_last"]), []).append(guess / row["seconds"])
        inputs, outputs, size, kernel, stride = row["shape"]
        what = f"{inputs:4d} > {outputs:4d}, {size:3d}^2, {kernel}^2 / {stride}"
        layout = "last" if row["channels_last"] else "first"
        times = f"{row['seconds'] * 1e6:9.1f} us {guess * 1e6:9.1f} us {guess / row['seconds']:5.2f}"
        print(f"{what:30s} {row['batch_size']:4d} {row['pass']:11s} {times}  {row['precision']}, channels {layout}")
    for (precision, last), values in ratios.items():
        where = "last" if last else "first"
        print(f"{precision}, channels {where}: median ratio {statistics.median(values):.2f} of {len(values)}")
    bandwidth = profile.memory.bandwidth_bytes_per_s
    for size, seconds in found["copies"]:
        print(
            f"copy of {size:>11} bytes: {seconds * 1e6:9.2f} us, {2 * size / seconds / bandwidth:6.1%} of the bandwidth"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.02, help="per product")
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--read", type=Path, help="JSON file: measure nothing")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/calibration.md")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.read:
        found = json.loads(args.read.read_text())
    else:
        torch.backends.cudnn.benchmark = True
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        largest = 1 << 30 if device.type == "cuda" else 1 << 24
        copies = [(size, 2 * size / measure.copy_bytes_per_s(device, size)) for size in COPIES if size <= largest]
        rows = convolutions(device, args.batch, args.seconds)
        found = {"machine": machine, "torch": torch.__version__, "convolutions": rows, "copies": copies}
        if args.out:
            args.out.write_text(json.dumps(found))
    if args.markdown:
        print(table(found, load_profile(args.hardware)), end="")
        return
    show(found, load_profile(args.hardware))


if __name__ == "__main__":
    main()
