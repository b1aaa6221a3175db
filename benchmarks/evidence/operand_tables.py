"""What benchmarks/operands.py saw: which operands cost accuracy, and scales per example beside scales per tensor."""

from __future__ import annotations

from collections.abc import Mapping

from dpquant.statistics import paired, sample

from .files import RESULTS, lines
from .markdown import difference, mean, table, verdict
from .variance_tables import NAMES

TASKS = {"fashion": "Fashion-MNIST", "digits": "the digits"}


def accuracies(task: str) -> Mapping[tuple[str, str], Mapping[int, float]]:
    """(format, operands) -> seed -> accuracy."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in lines(RESULTS / f"operands_{task}.jsonl"):
        found.setdefault((row["format"], row["operands"]), {})[row["seed"]] = row["accuracy"]
    return found


def operands() -> str:
    """Accuracy lost by each variant, and what scales per tensor would add; empty where nothing was trained."""
    body = []
    for task, name in TASKS.items():
        found = accuracies(task)
        full = found.get(("none", "none"), {})
        for fmt in dict.fromkeys(fmt for fmt, _ in found if fmt != "none"):
            cells = [
                difference(paired(found.get((fmt, variant), {}), full)) for variant in ("forward", "backward", "both")
            ]
            tensor = paired(found.get((fmt, "both, per tensor"), {}), found.get((fmt, "both"), {}))
            row = [name, NAMES.get(fmt, fmt), mean(sample(list(full.values()))), *cells]
            body.append([*row, difference(tensor), verdict(tensor)])
    titles = ["data", "format", "full precision, %", "forward only, points", "backward only", "both"]
    return table([*titles, "per tensor less per example", ""], body, range(2, 7)) if body else ""


def in_luq(seeds: int) -> str:
    """What either operand alone costs in LUQ-FP4; empty for fewer than ``seeds``."""
    parts = []
    for task, name in TASKS.items():
        found = accuracies(task)
        full = found.get(("none", "none"), {})
        forward, backward = (paired(found.get(("luq_fp4", operand), {}), full) for operand in ("forward", "backward"))
        if min(forward.n, backward.n) >= seeds:
            apart = paired(found[("luq_fp4", "forward")], found[("luq_fp4", "backward")])
            shown = "" if apart.sign else ", which shows none"
            parts.append(
                f"{difference(forward)} points on {name} (the output gradients alone {difference(backward)}; the "
                f"difference is {difference(apart)}{shown})"
            )
    if not parts:
        return ""
    return f"weights and inputs alone, which are rounded to the nearest value, cost {' and '.join(parts)}"


def sentence(seeds: int) -> str:
    """LUQ-FP4 in either operands, and its scales per tensor, in accuracy; empty for fewer than ``seeds``."""
    fmt = "luq_fp4"
    parts, tensors = [], []
    for task, name in TASKS.items():
        found = accuracies(task)
        operands, scales = (
            paired(found.get((fmt, here), {}), found.get((fmt, there), {}))
            for here, there in (("forward", "backward"), ("both, per tensor", "both"))
        )
        if min(operands.n, scales.n) >= seeds:
            parts.append(f"{difference(operands)} points on {name} ({verdict(operands)})")
            tensors.append(f"{difference(scales)} on {name} ({verdict(scales)})")
    if not parts:
        return ""
    return (
        f"In accuracy, LUQ-FP4 in the forward operands alone less in the output gradients alone: {', '.join(parts)}; "
        f"one scale per tensor less one per example: {', '.join(tensors)}, but such scales leave clipping nothing to "
        "bound."
    )
