"""What quantization does to gradients, with and without private training: the variance behind the accuracy.

    python benchmarks/variance.py --out benchmarks/results/variance.jsonl

Small networks are trained on Fashion-MNIST by SGD, by SGD with noise on the mean gradient, and by DP-SGD with the same
noise and learning rate. At some steps the gradients of a fixed probe batch of test images are taken in full precision
and quantized, unbiased (stochastic rounding) and with a scale per example (or block), in every format. Lines of JSON:

- ``law``: exponents (b, c) of ``variance per element ~ max^b * rms^c`` over examples, within layer and step. A grid of
  even steps has (2, 0), a logarithmic one (0, 2).
- ``output_gradient``: variance over mean square of the layers' output gradients.
- ``gradient``: squared error of the probe batch's mean weight gradient over its square, with only the forward operands
  quantized (weights, inputs; to nearest), only the backward one (output gradients), and both; ``clipped``: of the
  mean of clipped gradients.
- ``size``: mean norm of the examples' weight gradients, peak over rms of output gradients, and the noise on a step's
  mean gradient over that gradient, both as norms.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.data import DataSettings, load_data
from dpquant.models import build_model
from emulation.gemms import WeightGradient
from emulation.layers import LayerGradient, quantizable_layers, quantize_model, set_plan, set_rounding
from emulation.precision import LayerPrecision, layer_precision
from emulation.quantizer import Quantizer

FORMATS = ("int4", "float4_e2m1fn", "luq_fp4", "mxfp4_e2m1", "nvfp4", "float8_e4m3fn", "float8_e5m2")
METHODS = ("sgd", "sgd with noise", "dp-sgd")
STEPS = (0, 40, 120)
BATCH, PROBE, CLIP, NOISE, RATE, DRAWS = 256, 64, 1.0, 1.0, 0.5, 4


def main() -> None:
    """Measures every seed and method, and writes or prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=12_000, help="training images used")
    parser.add_argument("--out", type=Path, help="JSON lines; default: printed")
    args = parser.parse_args()
    splits = load_data(DataSettings(name="fashion_mnist", root=args.root))
    train = tuple(t[: args.examples] for t in splits.train.tensors)
    probe = tuple(t[:PROBE] for t in splits.test.tensors)
    lines = [
        json.dumps({"seed": seed, "method": method, **row})
        for seed in range(args.seeds)
        for method in METHODS
        for row in measured(method, seed, train, probe)
    ]
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def measured(method: str, seed: int, train: tuple[Tensor, ...], probe: tuple[Tensor, ...]) -> Iterator[dict[str, Any]]:
    """Trains one network and yields what is seen of its gradients."""
    torch.manual_seed(seed)
    model = build_model("fashion_cnn")
    points: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in FORMATS}
    for step, norm_of_noise in trained(model, method, seed, train):
        if step not in STEPS:
            continue
        records = captured(model, *probe)
        generator = torch.Generator().manual_seed(seed)
        gradients = [weight.per_example().flatten(1) for weight in records]
        norms = torch.cat(gradients, 1).norm(dim=1)
        mean = torch.cat([g.mean(0) for g in gradients]).norm()
        peaks = torch.cat([w.grad_output.flatten(1).abs().amax(1) / rms(w.grad_output) for w in records])
        yield {
            "kind": "size",
            "step": step,
            "example_norm": norms.mean().item(),
            "peak_over_rms": peaks.nanmean().item(),
            "noise_over_gradient": norm_of_noise / mean.item(),
        }
        for fmt in FORMATS:
            relative = []
            for weight in records:
                peak, size, variance = spread(weight, fmt, generator)
                points[fmt].append((peak.log(), size.log(), variance.log()))
                relative.append(variance / size**2)
            shared = {"step": step, "format": fmt}
            yield {"kind": "output_gradient", **shared, "variance": torch.cat(relative).nanmean().item()}
            for operands in ("forward", "backward", "both"):
                rounded = captured(model, *probe, precision(fmt, operands), seed)
                errors = {clipped: relative_error(rounded, records, clipped=clipped) for clipped in (False, True)}
                yield from (
                    {"kind": "gradient", **shared, "operands": operands, "clipped": clipped, "error": error}
                    for clipped, error in errors.items()
                )
    for fmt, found in points.items():
        b, c = exponents(found)
        yield {"kind": "law", "format": fmt, "max_exponent": b, "rms_exponent": c}


def trained(model: nn.Module, method: str, seed: int, train: tuple[Tensor, ...]) -> Iterator[tuple[int, float]]:
    """Trains ``model`` in place; yields before each step its number and the norm of the noise on a mean gradient."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    criterion: Any = F.cross_entropy
    if method == "dp-sgd":
        private_module(quantize_model(model, "luq_fp4"))
        optimizer = PrivateOptimizer(
            optimizer,
            module=model,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            expected_batch_size=BATCH,
            generator=generator,
        )
        criterion = private_criterion(nn.CrossEntropyLoss())
    deviation = NOISE * CLIP / BATCH
    norm = deviation * sum(p.numel() for p in model.parameters()) ** 0.5
    for step in range(max(STEPS) + 1):
        yield step, 0.0 if method == "sgd" else norm
        chosen = torch.randint(len(train[0]), (BATCH,), generator=generator)
        model.train()
        optimizer.zero_grad()
        criterion(model(train[0][chosen]), train[1][chosen]).backward()
        if method == "sgd with noise":
            for p in model.parameters():
                assert p.grad is not None
                p.grad += deviation * torch.randn(p.shape, generator=generator)
        optimizer.step()


def captured(
    model: nn.Module, images: Tensor, labels: Tensor, precision: LayerPrecision | None = None, seed: int = 0
) -> list[WeightGradient]:
    """The operands of every layer's weight gradient for a batch, as they were quantized, first layer first."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "private_tape"):
        twin.private_tape.close()
    quantize_model(twin, "luq_fp4")
    records: list[LayerGradient] = []
    for layer in quantizable_layers(twin).values():
        layer.tape, layer.private = records, False
    set_plan(twin, {} if precision is None else dict.fromkeys(quantizable_layers(twin), precision))
    set_rounding(twin, seed=seed, example_ids=torch.arange(len(images)))
    twin.train()
    F.cross_entropy(twin(images), labels, reduction="sum").backward()
    order = list(quantizable_layers(twin).values())
    ordered = sorted(records, key=lambda r: order.index(r.layer))
    return [r.weight for r in ordered if isinstance(r.weight, WeightGradient)]


def rms(values: Tensor) -> Tensor:
    """Root mean square of every example, [B]."""
    return values.flatten(1).square().mean(1).sqrt()


def spread(weight: WeightGradient, fmt: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every example's peak, rms and variance per element when its output gradient is rounded without bias, each [B]."""
    quantizer = layer_precision(fmt).grad_output
    quantizer = replace(quantizer, rounding="stochastic")
    g = weight.grad_output
    axis = -1 if weight.conv is None else 1
    errors = [quantizer.fake_quantize(g, generator=generator, axis=axis) - g for _ in range(DRAWS)]
    variance = torch.stack([e.flatten(1).square().mean(1) for e in errors]).mean(0)
    return g.flatten(1).abs().amax(1), rms(g), variance


def exponents(points: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Least squares of log variance on log peak and log rms, each centred within its layer and step."""
    rows = []
    for peak, size, variance in points:
        table = torch.stack([peak, size, variance], 1).double()
        table = table[torch.isfinite(table).all(1)]
        if len(table):
            rows.append(table - table.mean(0))
    table = torch.cat(rows)
    found = torch.linalg.lstsq(table[:, :2], table[:, 2:]).solution.flatten()
    return float(found[0]), float(found[1])


def precision(fmt: str, operands: str) -> LayerPrecision:
    """The recipe of a format with only the forward operands quantized, only the backward one, or both."""
    recipe, exact = layer_precision(fmt), Quantizer("float32")
    changes: dict[str, Any] = {
        "forward": {"grad_output": exact, "hadamard": False},
        "backward": {"weight": exact, "input": exact, "hadamard": False},
        "both": {},
    }[operands]
    return replace(recipe, name=operands, **changes)


def relative_error(rounded: list[WeightGradient], exact: list[WeightGradient], *, clipped: bool) -> float:
    """Squared error over square of the batch's mean weight gradient."""
    plain = mean_gradient(exact, clipped=clipped)
    return float((mean_gradient(rounded, clipped=clipped) - plain).square().sum() / plain.square().sum())


def mean_gradient(records: list[WeightGradient], *, clipped: bool) -> Tensor:
    """The mean of the examples' weight gradients, all layers in a row, each clipped first where asked for."""
    rows = torch.cat([w.per_example().flatten(1) for w in records], 1)
    if clipped:
        rows = rows * (CLIP / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    return rows.mean(0)


if __name__ == "__main__":
    main()
