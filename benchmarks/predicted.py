"""Measured step times beside those that the cost model predicts for an eager framework.

    python benchmarks/predicted.py [benchmarks/results/step_h200_tf32.json ...] [--hardware h200]

Reads what `benchmarks/step.py --out` wrote. Emulated cases are left out: emulation is no hardware. The eager
framework's own constants (`hwmodels.pricing`: two efficiencies, the host's time per kernel, step and layer) were fitted
to the ResNet-18 and digits rows in `benchmarks/results`; everything else comes from public GEMM timings and counting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dpquant.models import build_model
from hwmodels import load_profile, trace
from hwmodels.cost import estimate

MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "digits": ("digits_cnn", {}, (1, 8, 8)),
    "fashion": ("fashion_cnn", {}, (1, 28, 28)),
    "cifar": ("cifar_cnn", {}, (3, 32, 32)),
    "resnet18-imagenet": ("resnet18", {"stem": "imagenet"}, (3, 32, 32)),
    "resnet18-cifar": ("resnet18", {"stem": "cifar"}, (3, 32, 32)),
    "resnet50-imagenet": ("resnet50", {"stem": "imagenet"}, (3, 32, 32)),
    "densenet121": ("densenet121", {}, (3, 32, 32)),
}
CASES: dict[str, dict[str, str]] = {
    "plain SGD": {"method": "sgd"},
    "Opacus hooks": {"clipping": "hooks"},
    "Opacus ghost": {"clipping": "ghost"},
    "private": {"clipping": "bookkeeping"},
}
BASELINES = {"float32": "float32", "tf32": "tfloat32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


def main() -> None:
    """Print one line per measured row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--hardware", default="h200")
    args = parser.parse_args()
    files = args.files or sorted((Path(__file__).parent / "results").glob(f"step_{args.hardware}_*.json"))
    profile = load_profile(args.hardware)
    workloads: dict[str, Any] = {}
    errors = []
    print("model              precision batch case           measured  predicted    off  bound")
    for file in files:
        data = json.loads(file.read_text())
        precision = data["arguments"]["precision"]
        for row in data["rows"]:
            if row["case"] not in CASES or row["model"] not in MODELS:
                continue
            if row["model"] not in workloads:
                name, options, shape = MODELS[row["model"]]
                with torch.device("meta"):
                    workloads[row["model"]] = trace(build_model(name, **options), torch.empty(1, *shape), 64)
            found = estimate(
                workloads[row["model"]].at(row["batch_size"]),
                {},
                profile,
                framework="eager",
                baseline=BASELINES[precision],
                **CASES[row["case"]],
            )
            off = found.step_s * 1e3 / row["median_ms"] - 1
            errors.append(abs(off))
            where = f"{row['model']:18s} {precision:9s} {row['batch_size']:5d} {row['case']:13s}"
            print(f"{where} {row['median_ms']:6.2f} ms {found.step_s * 1e3:7.2f} ms {off:+6.0%}  {found.bound}")
    if errors:
        print(f"mean {sum(errors) / len(errors):.1%} off, at most {max(errors):.1%}, {len(errors)} rows")


if __name__ == "__main__":
    main()
