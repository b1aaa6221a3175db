"""The committed result files as sweeps with their results; what belongs to another configuration is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpquant.statistics import Sample, paired, sample
from dpquant.sweep import Sweep, load_sweep, point_key, shipped_sweeps, short_names
from dpquant.sweep_results import SweepResult, read_results

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SEEDS = 3
"""Fewer say nothing here: of two, a narrow interval is chance."""

Settings = Mapping[str, Any]
Accuracies = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A sweep and the results there are of it.

    Attributes:
        sweep: its specification.
        results: of its runs, by name.
        stale: names of results that another configuration gave; they are not used.
    """

    sweep: Sweep
    results: Mapping[str, SweepResult]
    stale: tuple[str, ...]

    def finished(self, settings: Settings) -> list[SweepResult]:
        """A point's runs that are done."""
        return self._finished.get(point_key(settings), [])

    @cached_property
    def _finished(self) -> Mapping[str, list[SweepResult]]:
        known: dict[str, list[SweepResult]] = {}
        for run in self.sweep.runs:
            if (result := self.results.get(run.name)) is not None and result.done:
                known.setdefault(point_key(result.settings), []).append(result)
        return known

    def accuracies(self, settings: Settings) -> Accuracies:
        """Seed -> test accuracy after the last epoch of a point's finished runs."""
        return {r.seed: r.accuracy for r in self.finished(settings) if r.accuracy is not None}

    def speedup(self, settings: Settings) -> float | None:
        """Mean modelled speedup of a point's finished runs, at the published peak rates."""
        return sample([r.speedup_peak for r in self.finished(settings) if r.speedup_peak is not None]).mean

    def points(self, **wanted: Any) -> list[Settings]:
        """The points whose settings have these values, named by the last part of their keys."""
        short = {name: key for key, name in short_names(self.sweep.keys).items()}
        return [
            p for p in self.sweep.points.values() if all(p.get(short.get(k, k)) == value for k, value in wanted.items())
        ]

    def compared(self, here: Settings, there: Settings) -> Sample:
        """Paired difference in accuracy between two points."""
        return paired(self.accuracies(here), self.accuracies(there))

    def full_precision(self, settings: Settings) -> Settings | None:
        """The point in full precision that goes with a point: the same but for schedule, format and analysis."""
        free = ("schedule.", "analysis.", "format", "training.accumulate", "hardware.")
        kept = {key: value for key, value in settings.items() if not key.startswith(free)}
        for point in self.points(scheduler="full"):
            if point != settings and all(point[key] == value for key, value in kept.items()):
                return point
        return None

    def lost(self, settings: Settings) -> Accuracies:
        """Seed -> accuracy less full precision's; none where that was not trained."""
        full = self.full_precision(settings)
        return {} if full is None else differences(self, [(settings, full)])


def load_all(folder: Path = RESULTS / "sweeps") -> dict[str, Evidence]:
    """Name -> evidence of every shipped sweep that has a results file."""
    found = {}
    for name, path in sorted(shipped_sweeps().items()):
        known = read_results(folder / f"{name}.jsonl")
        if not known:
            continue
        sweep = load_sweep(path)
        digests = {run.name: run.config.digest for run in sweep.runs}
        own = {n: r for n, r in known.items() if digests.get(n) == r.digest}
        found[name] = Evidence(sweep=sweep, results=own, stale=tuple(n for n in known if n not in own))
    return found


def whole(known: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The sweeps whose every planned run is done: what is half done may mislead."""
    return {
        name: evidence
        for name, evidence in known.items()
        if all(run.name in evidence.results and evidence.results[run.name].done for run in evidence.sweep.runs)
    }


Pair = tuple[Settings, Settings]
Pairs = Sequence[Pair]
"""Points to compare."""


def differences(evidence: Evidence, pairs: Pairs) -> Accuracies:
    """Seed -> mean difference in accuracy over the pairs, of the seeds that have them all.

    Else one seed's value would be of other settings than another's.
    """
    by_seed: dict[int, list[float]] = {}
    for here, there in pairs:
        a, b = evidence.accuracies(here), evidence.accuracies(there)
        for seed in a.keys() & b.keys():
            by_seed.setdefault(seed, []).append(a[seed] - b[seed])
    return {seed: sum(values) / len(values) for seed, values in sorted(by_seed.items()) if len(values) == len(pairs)}


def average(evidence: Evidence, pairs: Pairs) -> Sample:
    """`differences` over the seeds."""
    return sample(list(differences(evidence, pairs).values()))


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_seed(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Sample:
    """Mean per seed of ``value``, as a sample over seeds."""
    seeds: dict[int, list[float]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(value(row))
    return sample([sum(v) / len(v) for _, v in sorted(seeds.items())])
