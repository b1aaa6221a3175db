"""What benchmarks/variance.py saw, in tables with intervals over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpquant.statistics import Sample, sample

from .files import RESULTS, by_seed, lines
from .markdown import interval, mean, table

PATH = RESULTS / "variance.jsonl"
NAMES = {
    "int4": "uniform int4",
    "float4_e2m1fn": "E2M1",
    "luq_fp4": "E3M0 (LUQ)",
    "mxfp4_e2m1": "MXFP4",
    "nvfp4": "NVFP4",
    "float8_e4m3fn": "E4M3",
    "float8_e5m2": "E5M2",
}
METHODS = ("sgd", "sgd with noise", "dp-sgd")


def rows(kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """The lines of one kind with these values."""
    return [row for row in lines(PATH) if row["kind"] == kind and all(row[k] == v for k, v in wanted.items())]


def last_step() -> int:
    """The last step that was looked at."""
    return max(row["step"] for row in lines(PATH) if "step" in row)


def ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> Sample:
    """Seed by seed, the mean of one over the mean of the other."""
    a, b = ({s: [r[key] for r in part if r["seed"] == s] for s in {r["seed"] for r in part}} for part in (over, under))
    return sample([(sum(a[s]) / len(a[s])) / (sum(b[s]) / len(b[s])) for s in sorted(a.keys() & b.keys())])


def law() -> str:
    """Exponents of the peak and of the rms."""
    body = []
    for fmt, name in NAMES.items():
        found = rows("law", format=fmt, method="dp-sgd")
        peak, size = (by_seed(found, lambda r, k=key: r[k]) for key in ("max_exponent", "rms_exponent"))  # type: ignore[misc]
        variance = by_seed(rows("output_gradient", format=fmt, method="dp-sgd"), lambda r: r["variance"])
        body.append([name, *(f"{mean(s, 1, 2)} ({interval(s, 1, 2)})" for s in (peak, size)), mean(variance, 1, 4)])
    titles = ["format", "exponent of the largest magnitude", "exponent of the rms", "variance over mean square"]
    return table(titles, body, range(1, 4))


def methods() -> str:
    """Size of gradients and their relative quantization variance, by method."""
    step = last_step()
    body = []
    sizes = (
        ("mean norm of an example's gradient", "example_norm"),
        ("peak over rms of output gradients", "peak_over_rms"),
    )
    for title, key in sizes:
        parts = {m: rows("size", method=m, step=step) for m in METHODS}
        body.append([title, *(mean(by_seed(parts[m], lambda r, k=key: r[k]), 1, 2) for m in METHODS)])  # type: ignore[misc]
        body[-1].append(_ratio_cell(ratio(parts["dp-sgd"], parts["sgd"], key)))
    for fmt, name in NAMES.items():
        parts = {m: rows("output_gradient", method=m, step=step, format=fmt) for m in METHODS}
        cells = [mean(by_seed(parts[m], lambda r: r["variance"]), 1, 4) for m in METHODS]
        both = _ratio_cell(ratio(parts["dp-sgd"], parts["sgd"], "variance"))
        body.append([f"{name}: variance of output gradients over mean square", *cells, both])
    for fmt, name in NAMES.items():
        parts = {m: rows("gradient", method=m, step=step, format=fmt, operands="both", clipped=False) for m in METHODS}
        cells = [mean(by_seed(parts[m], lambda r: r["error"]), 1, 3) for m in METHODS]
        both = _ratio_cell(ratio(parts["dp-sgd"], parts["sgd"], "error"))
        body.append([f"{name}: squared error of the mean weight gradient over its square", *cells, both])
    return table([f"after {step} steps", *METHODS, "DP-SGD over SGD"], body, range(1, 5))


def _ratio_cell(found: Sample) -> str:
    return f"{mean(found, 1, 2)} ({interval(found, 1, 2)})"


def operands() -> str:
    """Forward against backward quantization."""
    body = []
    for fmt, name in NAMES.items():
        parts = {
            o: rows("gradient", method="dp-sgd", format=fmt, operands=o, clipped=True)
            for o in ("forward", "backward", "both")
        }
        cells = [mean(by_seed(part, lambda r: r["error"]), 1, 3) for part in parts.values()]
        body.append([name, *cells, _ratio_cell(ratio(parts["forward"], parts["backward"], "error"))])
    titles = ["format", "forward only", "backward only", "both", "forward over backward"]
    return table(titles, body, range(1, 5))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is told of the tables.

    Attributes:
        uniform: power of the largest magnitude that rounding's variance grows with, on the uniform grid.
        luq: the same on LUQ's grid.
        norm: an example's gradient under DP-SGD over SGD's.
        noise: the same under SGD with DP-SGD's noise and no clipping.
        error: the mean gradient's relative error over all formats, likewise.
    """

    uniform: Sample
    luq: Sample
    norm: Sample
    noise: Sample
    error: Sample


def measured() -> Measured | None:
    """What the lines come to; None where there are none."""
    if not lines(PATH):
        return None
    powers = [rows("law", format=fmt, method="dp-sgd") for fmt in ("int4", "luq_fp4")]
    uniform, luq = (by_seed(own, lambda r: r["max_exponent"]) for own in powers)
    shared = {"kind": "gradient", "operands": "both", "clipped": False, "step": last_step()}
    error = ratio(rows(**shared, method="dp-sgd"), rows(**shared, method="sgd"), "error")
    sizes = {m: rows("size", method=m, step=last_step()) for m in METHODS}
    norm, noise = (ratio(sizes[m], sizes["sgd"], "example_norm") for m in ("dp-sgd", "sgd with noise"))
    return Measured(uniform=uniform, luq=luq, norm=norm, noise=noise, error=error)


def sentences() -> list[str]:
    """What the tables say, with its intervals."""
    found = measured()
    if found is None:
        return []
    shared = {"kind": "gradient", "method": "dp-sgd", "format": "luq_fp4", "clipped": True}
    forward = ratio(rows(**shared, operands="forward"), rows(**shared, operands="backward"), "error")
    shown = "" if excludes(found.error, 1.0) else ", which is not shown to be more"
    return [
        "Unbiased rounding's variance grows with about the square of the largest magnitude on the uniform grid "
        f"(exponent {said(found.uniform)}), not on LUQ's logarithmic one (exponent {said(found.luq)}).",
        f"In LUQ-FP4 the forward operands alone, rounded to nearest, give the mean gradient {said(forward)} times the "
        "squared error that the output gradients alone do.",
        f"After {last_step()} steps of DP-SGD the examples' gradients are {said(found.norm)} times as long as after as "
        f"many of SGD (with the same noise and no clipping {said(found.noise)} times), and the mean gradient's "
        f"relative error over all formats is {said(found.error)} times SGD's{shown}.",
    ]


def excludes(found: Sample, value: float) -> bool:
    """Whether an interval does."""
    return found.low is not None and found.high is not None and not found.low <= value <= found.high


def said(found: Sample) -> str:
    """A mean with its interval."""
    value = "-" if found.mean is None else f"{found.mean:.2f}"
    return f"{value} (95 % {interval(found, 1, 2)})"
