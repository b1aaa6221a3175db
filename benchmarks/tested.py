"""A fixed choice of layers tested in the arithmetic that it was trained in, beside full precision.

    python benchmarks/tested.py digits_main --out benchmarks/results/tested.jsonl

Sweeps test every network in full precision, and so a schedule that ends in full precision ends in the arithmetic of the
test. This trains the `static` runs of a sweep again and tests each twice: in full precision, and with its layers'
weights and inputs quantized as in training. A line of JSON per run is added to the file; runs that it has are not
repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import joblib
import torch

from dpquant.sweep import SweepRun, load_sweep, only
from dpquant.train import evaluate, prepare, train
from emulation.layers import set_plan


def main() -> None:
    """Trains what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="name of a shipped sweep")
    parser.add_argument("--root", help="folder or file of the data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    changes = {("training", "device"): args.device} | ({("data", "root"): args.root} if args.root else {})
    runs = only(load_sweep(args.sweep, changes), ["scheduler=static"]).runs
    args.out.touch()
    known = {(row["sweep"], row["run"]) for row in map(json.loads, args.out.read_text(encoding="utf-8").splitlines())}
    left = [run for run in runs if (args.sweep, run.name) not in known]
    lines = joblib.Parallel(n_jobs=args.jobs, return_as="generator")(
        joblib.delayed(line)(args.sweep, run) for run in left
    )
    with args.out.open("a", encoding="utf-8") as stream:
        for text in lines:
            print(text, file=stream, flush=True)


def line(sweep: str, run: SweepRun) -> str:
    """One run as a line of JSON: accuracies in [0, 1] after the last epoch."""
    torch.set_num_threads(1)
    training = prepare(run.config)
    *_, last = train(training, None)
    module = training.parts[0]
    set_plan(module, last.quantized)
    _, own = evaluate(module, training.splits.test)
    row = {"sweep": sweep, "run": run.name, "digest": run.config.digest, "seed": run.seed}
    return json.dumps(row | {"in_full_precision": last.test_accuracy, "as_trained": own})


if __name__ == "__main__":
    main()
