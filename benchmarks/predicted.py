"""Measured steps beside what the cost model predicts for an eager framework: time, peak memory, energy.

    python benchmarks/predicted.py [benchmarks/results/step_h200_resnet18.json ...] [--hardware h200_measured]
    python benchmarks/predicted.py --fit               # the constants of the eager framework, and their held-out error

Reads what `benchmarks/step.py --out` wrote. Emulated cases are left out: emulation is no hardware. The GEMMs and the
bandwidth are the profile's calibration, operations and bytes are counted; what is fitted to steps are the constants of
`hwmodels.eager`: to ResNet-18 at batches of 64 and 1024 and to `digits`, and tested on all other rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpquant.models import build_model
from hwmodels import load_profile, trace
from hwmodels.cost import Estimate, StepModel
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
    "plain SGD": {"method": "sgd", "framework": "eager"},
    "plain SGD, graphed": {"method": "sgd", "framework": "graphs"},
    "Opacus hooks": {"clipping": "hooks", "framework": "eager"},
    "Opacus ghost": {"clipping": "ghost", "framework": "eager"},
    "private, no graphs": {"clipping": "bookkeeping", "framework": "eager"},
    "private": {"clipping": "bookkeeping", "framework": "graphs"},
}
BASELINES = {"float32": "float32", "tf32": "tfloat32", "bf16": "bfloat16"}
RESULTS = Path(__file__).parent / "results"
LIMITS = {"pass_efficiency": (0.2, 1.1), "overlap": (1.0, 32.0)}
LIMITS |= {f"{name}_efficiency": (0.2, 1.5) for name in BASELINES.values()}
HOST_LIMITS = (1e-6, 5e-3)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step; what was not measured of it is None."""

    model: str
    precision: str
    batch_size: int
    case: str
    seconds: float
    device_s: float | None
    joules: float | None
    peak_bytes: int | None

    def modelled(self, profile: HardwareProfile) -> StepModel:
        work = traced(self.model).at(self.batch_size)
        return StepModel(work, profile, baseline=BASELINES[self.precision], **CASES[self.case])

    def predicted(self, profile: HardwareProfile) -> Estimate:
        return self.modelled(profile).estimate({})

    @property
    def held_out(self) -> bool:
        """Whether the fit leaves this row to the test."""
        return self.model != "digits" and (self.model != "resnet18-cifar" or self.batch_size in (256, 512))


@cache
def traced(model: str) -> Workload:
    name, options, shape = MODELS[model]
    with torch.device("meta"):
        return trace(build_model(name, **options), torch.empty(1, *shape), 64)


def measured(files: Sequence[Path]) -> list[Step]:
    """The rows of some result files whose steps are of real hardware."""
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    names = ("model", "precision", "batch_size", "case", "joules", "peak_bytes")
    return [
        Step(
            **{name: row[name] for name in names},
            seconds=row["median_ms"] / 1e3,
            device_s=row["device_ms"] / 1e3 if row["device_ms"] else None,
        )
        for row in rows
        if row["case"] in CASES and row["model"] in MODELS
    ]


def fit(steps: Sequence[Step], profile: HardwareProfile) -> EagerCosts:
    """The constants that minimise a robust loss of ln(predicted / measured): of the device's time and of the step's."""
    from scipy.optimize import least_squares

    names = list(asdict(EAGER))
    low, high = (np.log([LIMITS.get(name, HOST_LIMITS)[side] for name in names]) for side in (0, 1))

    def costs(x: Any) -> EagerCosts:
        return EagerCosts(**{name: float(f"{value:.3g}") for name, value in zip(names, np.exp(x), strict=True)})

    def off(x: Any) -> Any:
        trial = replace(profile, eager=EagerCosts(**dict(zip(names, np.exp(x).tolist(), strict=True))))
        found = [(step, step.modelled(trial)) for step in steps]
        whole = [model.step_s({}) / step.seconds for step, model in found]
        device = [float(model.prices(None).seconds.sum()) / step.device_s for step, model in found if step.device_s]
        return np.log(whole + device)

    start = np.clip(np.log(list(asdict(replace(EAGER, overlap=4.0)).values())), low + 1e-6, high - 1e-6)
    found = least_squares(off, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, diff_step=1e-3, max_nfev=40)
    return costs(found.x)


def summary(steps: Sequence[Step], profile: HardwareProfile) -> str:
    off = [abs(step.predicted(profile).step_s / step.seconds - 1) for step in steps]
    return f"mean {sum(off) / len(off):.1%} off, at most {max(off):.1%}, {len(off)} rows" if off else "no rows"


def milliseconds(step: Step, found: Estimate) -> tuple[float | None, float]:
    return step.seconds * 1e3, found.step_s * 1e3


def joules(step: Step, found: Estimate) -> tuple[float | None, float]:
    return step.joules, found.energy_joules or 0.0


def gibibytes(step: Step, found: Estimate) -> tuple[float | None, float]:
    """None for graphs too: a pool of their own, in which nothing is used twice, is not what a step needs."""
    graphed = CASES[step.case]["framework"] == "graphs"
    seen = None if graphed or step.peak_bytes is None else step.peak_bytes / 2**30
    return seen, found.peak_memory_bytes / 2**30


QUANTITIES: tuple[Callable[[Step, Estimate], tuple[float | None, float]], ...] = (milliseconds, joules, gibibytes)


def table(
    steps: Sequence[Step], profile: HardwareProfile, of: Callable[[Step, Estimate], tuple[float | None, float]]
) -> str:
    """One quantity in Markdown: a row per network, precision and batch size; measured, and how far off predicted."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for step in steps:
        seen, predicted = of(step, step.predicted(profile))
        if seen:
            cells = rows.setdefault((step.model, step.precision, step.batch_size), {})
            cells[step.case] = f"{seen:.3g} ({predicted / seen - 1:+.0%}){'*' if step.held_out else ''}"
    cases = [case for case in CASES if any(case in cells for cells in rows.values())]
    lines = [["network", "precision", "batch", *cases], ["---"] * (3 + len(cases))]
    lines += [[*map(str, key), *(cells.get(case, "") for case in cases)] for key, cells in rows.items()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Print one line per measured row, or the fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/calibration.md")
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
        for quantity in QUANTITIES:
            print(f"{quantity.__name__}\n\n{table(steps, profile, quantity)}")
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
