"""Measured step times beside those that the cost model predicts for an eager framework.

    python benchmarks/predicted.py [benchmarks/results/step_h200_tf32.json ...] [--hardware h200_measured]
    python benchmarks/predicted.py --fit               # the constants of the eager framework, and their held-out error

Reads what `benchmarks/step.py --out` wrote. Emulated cases are left out: emulation is no hardware. The GEMMs and the
bandwidth are the profile's calibration, operations and bytes are counted; what is fitted to steps are the constants of
`hwmodels.eager`: to ResNet-18 at every batch size but 256 and to `digits`, and tested on all other rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpquant.models import build_model
from hwmodels import load_profile, trace
from hwmodels.cost import Estimate, estimate
from hwmodels.eager import EAGER, EagerCosts
from hwmodels.profile import HardwareProfile
from hwmodels.workload import Workload

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
    "private, no graphs": {"clipping": "bookkeeping"},
}
BASELINES = {"float32": "float32", "tf32": "tfloat32", "bf16": "bfloat16"}
RESULTS = Path(__file__).parent / "results"
LIMITS = {"product_efficiency": (0.2, 1.2), "pass_efficiency": (0.2, 1.2), "overlap": (1.0, 32.0)}
HOST_LIMITS = (1e-6, 5e-3)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step."""

    model: str
    precision: str
    batch_size: int
    case: str
    seconds: float

    def predicted(self, profile: HardwareProfile) -> Estimate:
        options = CASES[self.case]
        work = traced(self.model).at(self.batch_size)
        return estimate(work, {}, profile, framework="eager", baseline=BASELINES[self.precision], **options)  # type: ignore[arg-type]

    @property
    def held_out(self) -> bool:
        """Whether the fit leaves this row to the test."""
        return self.model not in ("digits", "resnet18-cifar") or (self.batch_size == 256 and self.model != "digits")


@cache
def traced(model: str) -> Workload:
    name, options, shape = MODELS[model]
    with torch.device("meta"):
        return trace(build_model(name, **options), torch.empty(1, *shape), 64)


def measured(files: Sequence[Path]) -> list[Step]:
    """The rows of some result files whose steps are of real hardware."""
    found = []
    for file in files:
        data = json.loads(file.read_text())
        for row in data["rows"]:
            precision, case = row.get("precision"), row["case"]
            if precision is None:  # a file of one precision, from before the private step had graphs
                precision, case = data["arguments"]["precision"], case.replace("private", "private, no graphs")
            if case in CASES and row["model"] in MODELS:
                facts = {key: row[key] for key in ("model", "batch_size")}
                found.append(Step(**facts, case=case, precision=precision, seconds=row["median_ms"] / 1e3))
    return found


def fit(steps: Sequence[Step], profile: HardwareProfile) -> EagerCosts:
    """The constants that minimise a robust loss of ln(predicted / measured)."""
    from scipy.optimize import least_squares

    names = list(asdict(EAGER))
    low, high = (np.log([LIMITS.get(name, HOST_LIMITS)[side] for name in names]) for side in (0, 1))

    def costs(x: Any) -> EagerCosts:
        return EagerCosts(**{name: float(f"{value:.3g}") for name, value in zip(names, np.exp(x), strict=True)})

    def off(x: Any) -> Any:
        trial = replace(profile, eager=EagerCosts(**dict(zip(names, np.exp(x).tolist(), strict=True))))
        return np.log([step.predicted(trial).step_s / step.seconds for step in steps])

    start = np.clip(np.log(list(asdict(replace(EAGER, overlap=4.0)).values())), low + 1e-6, high - 1e-6)
    found = least_squares(off, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, diff_step=1e-3, max_nfev=40)
    return costs(found.x)


def summary(steps: Sequence[Step], profile: HardwareProfile) -> str:
    off = [abs(step.predicted(profile).step_s / step.seconds - 1) for step in steps]
    return f"mean {sum(off) / len(off):.1%} off, at most {max(off):.1%}, {len(off)} rows" if off else "no rows"


def table(steps: Sequence[Step], profile: HardwareProfile) -> str:
    """Milliseconds in Markdown: a row per network, precision and batch size, measured and predicted per case."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for step in steps:
        off = step.predicted(profile).step_s / step.seconds - 1
        cells = rows.setdefault((step.model, step.precision, step.batch_size), [])
        cells.append(f"{step.seconds * 1e3:.1f} ({off:+.0%}){'*' if step.held_out else ''}")
    lines = [["network", "precision", "batch", *CASES], ["---"] * (3 + len(CASES))]
    lines += [[*map(str, key), *cells] for key, cells in rows.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Print one line per measured row, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/calibration.md")
    args = parser.parse_args()
    steps = measured(args.files or sorted(RESULTS.glob(f"step_{args.hardware.split('_')[0]}_*.json")))
    profile = load_profile(args.hardware)
    if args.fit:
        trained = [step for step in steps if not step.held_out]
        tested = [step for step in steps if step.held_out]
        profile = replace(profile, eager=fit(trained, profile))
        print("\n".join(f"  {name}: {value:.3g}" for name, value in asdict(profile.eager).items()))
        print(f"fitted to: {summary(trained, profile)}\nheld out:  {summary(tested, profile)}")
    if args.markdown:
        print(table(steps, profile))
        return
    print("model              precision batch case           measured  predicted    off  bound")
    for step in steps:
        found = step.predicted(profile)
        where = f"{step.model:18s} {step.precision:9s} {step.batch_size:5d} {step.case:13s}"
        times = f"{step.seconds * 1e3:6.2f} ms {found.step_s * 1e3:7.2f} ms"
        print(f"{where} {times} {found.step_s / step.seconds - 1:+6.0%}  {found.bound}")
    print(summary(steps, profile))


if __name__ == "__main__":
    main()
