"""How long the cost model itself takes: tracing, and every chip in every format.

    python benchmarks/estimate.py [--json]

Prints medians of several runs in seconds, processor time beside wall time, and how the time grows with layers and with
chips times formats.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WHOLE = """
import torch, time, resource
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter(), time.process_time()
from dpquant.models import build_model, example_input
from hwmodels import list_profiles, load_profile, trace
from hwmodels.cost import StepModel
with torch.device("meta"):
    module = build_model("resnet50")
workload = trace(module, example_input("resnet50"), 256)
traced = time.perf_counter(), time.process_time()
for name in list_profiles():
    profile = load_profile(name)
    baseline = "bfloat16" if "bfloat16" in profile.formats else "float16"
    model = StepModel(workload, profile, baseline=baseline)
    for fmt in profile.formats:
        model.estimate(dict.fromkeys(workload.quantizable, fmt))
done = time.perf_counter(), time.process_time()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
print(traced[0] - start[0], done[0] - start[0], done[1] - start[1], grown)
"""


def timed(call: Callable[[], object], runs: int = 5) -> dict[str, float]:
    """Median wall and processor seconds."""
    walls, cpus = [], []
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


def fresh_process(runs: int = 3) -> dict[str, float]:
    """ResNet-50 from nothing in a process that has torch: build, trace, all profiles in all their formats."""
    columns = []
    for _ in range(runs):
        out = subprocess.run([sys.executable, "-c", WHOLE], check=True, capture_output=True, text=True).stdout
        columns.append([float(value) for value in out.split()])
    traced, wall, cpu, grown = (statistics.median(column) for column in zip(*columns, strict=True))
    return {"wall_s": wall, "cpu_s": cpu, "of_which_build_and_trace_s": traced, "memory_grown_mib": grown}


def measure() -> dict[str, dict[str, float]]:
    """All rows of the report."""
    import torch

    from dpquant.models import build_model, example_input
    from dpquant.transformers import Gpt2
    from hwmodels import list_profiles, load_profile, trace
    from hwmodels.cost import StepModel
    from hwmodels.workload import Workload

    rows = {"resnet50, all chips and formats, fresh process beyond importing torch": fresh_process()}
    for name in ("resnet18", "resnet50", "densenet121", "bert_base", "gpt2"):
        with torch.device("meta"):
            module = build_model(name)
        example = example_input(name)
        rows[f"trace {name}"] = timed(lambda module=module, example=example: trace(module, example, 256))
    with torch.device("meta"):
        deep = Gpt2(depth=48, width=1600, heads=25)
    rows["trace a 48-layer transformer"] = timed(lambda: trace(deep, example_input("gpt2"), 8))

    profiles = [load_profile(name) for name in list_profiles()]
    combinations = sum(len(profile.formats) for profile in profiles)

    def everywhere(workload: Workload, share: int = 1) -> None:
        for profile in profiles[::share]:
            baseline = "bfloat16" if "bfloat16" in profile.formats else "float16"
            model = StepModel(workload, profile, baseline=baseline)
            for fmt in profile.formats:
                model.estimate(dict.fromkeys(workload.quantizable, fmt))

    for name in ("resnet18", "resnet50", "densenet121"):
        with torch.device("meta"):
            workload = trace(build_model(name), example_input(name), 256)
        rows[f"estimate {name}, {len(workload.layers)} layers, {combinations} chips x formats"] = timed(
            lambda workload=workload: everywhere(workload)
        )
    half = sum(len(profile.formats) for profile in profiles[::2])
    with torch.device("meta"):
        workload = trace(build_model("resnet50"), example_input("resnet50"), 256)
    rows[f"estimate resnet50, {half} chips x formats"] = timed(lambda: everywhere(workload, 2))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    rows = measure()
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:78s} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
