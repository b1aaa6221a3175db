"""Many runs from one specification: a grid of settings times seeds, resumable, each in a run folder of its own."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dpquant.report import summarize
from dpquant.rundir import Run, RunFolder, dumps_strict, load_run, write_atomic
from emulation.errors import InputError
from hwmodels.fields import Anything, Fields, Items, Number, Table, Text, problems
from hwmodels.strict_yaml import Document, KeyPath, raise_all, read_yaml

SPECIFICATION = Fields(
    entries={
        "base": Text(doc="the configuration that all runs start from: a file beside this one, or a shipped name"),
        "seeds": Items(item=Number(minimum=0, maximum=2**63 - 1, integer=True), minimum=1, doc="a run per seed"),
        "grid": Table(
            value=Items(item=Anything(), minimum=1),
            doc="dotted key of the configuration -> the values to try; every combination is run",
            required=False,
        ),
    }
)
RUNS_LIMIT = 10_000

# Student's t, 97.5 % quantiles for 1 to 30 degrees of freedom (two-sided 95 % intervals).
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep: what it changes in the base configuration, its seed, and the folder it lies in."""

    base: str
    settings: Mapping[str, Any]
    seed: int
    name: str

    @property
    def overrides(self) -> dict[KeyPath, Any]:
        """The changes as `load_config` takes them."""
        changed: dict[KeyPath, Any] = {tuple(key.split(".")): value for key, value in self.settings.items()}
        return {**changed, ("seed",): self.seed}


def read_cells(path: str | Path) -> tuple[Cell, ...]:
    """All runs of a specification, every configuration checked.

    Raises:
        InputError: the specification, or any configuration that it makes, is wrong; nothing has run then.
    """
    from dpquant.config import load_config

    document = read_yaml(path)
    raise_all(problems(document, SPECIFICATION))
    base = _base(document, Path(path))
    grid = document.data.get("grid") or {}
    seeds = document.data["seeds"]
    count = len(seeds) * math.prod(len(values) for values in grid.values())
    if count > RUNS_LIMIT:
        raise document.error(("grid",), f"grid and seeds make {count:,} runs", hint=f"at most {RUNS_LIMIT:,}")
    cells = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        cells += [Cell(base=base, settings=settings, seed=seed, name=_name(settings, seed)) for seed in seeds]
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise document.error(("grid",), f"the same run comes twice: {twice[0]}", hint="list every value once")
    for cell in cells:
        try:
            load_config(cell.base, cell.overrides)
        except InputError as error:
            raise InputError(f"{cell.name}: {error.message}", hint=error.hint, file=path) from error
    return tuple(cells)


def _base(document: Document, path: Path) -> str:
    beside = path.parent / document.data["base"]
    return str(beside) if beside.exists() else str(document.data["base"])


def _name(settings: Mapping[str, Any], seed: int) -> str:
    """A folder's name: the last part of each key and its value."""
    parts = [f"{key.split('.')[-1]}={'none' if value is None else value}" for key, value in settings.items()]
    return re.sub(r"[^A-Za-z0-9=.,_+-]", "_", ",".join([*parts, f"seed={seed}"]))[:150]


def run_cell(cell: Cell, root: Path) -> str | None:
    """Train one run, go on with one that was stopped, or leave a complete one alone; returns what went wrong, if so."""
    from dpquant.config import load_config
    from dpquant.train import prepare, train

    path = root / cell.name
    try:
        if (path / "run.json").exists():
            if load_run(path).complete:
                return None
            folder = RunFolder.resume(path)
            with folder:
                state = folder.load_checkpoint()
                training = prepare(
                    load_config(path / "config.yaml"), root=state["engine"]["root"] if state is not None else None
                )
                for _ in train(training, folder):
                    pass
            return None
        config = load_config(cell.base, cell.overrides)
        training = prepare(config)
        with RunFolder.create(path, config=config.data, facts=training.facts) as folder:
            for _ in train(training, folder):
                pass
    except InputError as error:
        return str(error)
    return None


def run_all(cells: Sequence[Cell], root: Path, jobs: int, done: Callable[[int], None]) -> dict[str, str]:
    """Run every cell, ``jobs`` at a time; what went wrong, by the cell's name.

    Args:
        cells: the runs.
        root: the folder their folders lie in.
        jobs: above 1, and with joblib installed, in as many processes; joblib's active backend decides where.
        done: called with the number of runs that ended.
    """
    failures = {}
    for count, (cell, failure) in enumerate(_results(cells, root, jobs), start=1):
        if failure is not None:
            failures[cell.name] = failure
        write_results(cells, root, failures)
        done(count)
    return failures


def _results(cells: Sequence[Cell], root: Path, jobs: int) -> Iterator[tuple[Cell, str | None]]:
    if jobs == 1:
        for cell in cells:
            yield cell, run_cell(cell, root)
        return
    try:
        joblib: Any = importlib.import_module("joblib")
    except ImportError as error:
        raise InputError(f"--jobs {jobs} needs the package joblib", hint="pip install joblib, or --jobs 1") from error
    tasks = (joblib.delayed(_named)(cell, root) for cell in cells)
    yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)


def _named(cell: Cell, root: Path) -> tuple[Cell, str | None]:
    return cell, run_cell(cell, root)


def write_results(cells: Sequence[Cell], root: Path, failures: Mapping[str, str]) -> None:
    """``results.jsonl``: one line per run that is complete or has failed, in the specification's order."""
    lines = []
    for cell in cells:
        shared = {"name": cell.name, "settings": cell.settings, "seed": cell.seed}
        if cell.name in failures:
            lines.append(shared | {"error": failures[cell.name]})
        elif (run := _complete(root / cell.name)) is not None:
            lines.append(shared | {"summary": vars(summarize(run.facts, run.records)), "versions": run.versions})
    write_atomic(root / "results.jsonl", "".join(dumps_strict(line) + "\n" for line in lines).encode())


def _complete(path: Path) -> Run | None:
    if not (path / "run.json").exists():
        return None
    run = load_run(path)
    return run if run.complete else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One setting over its seeds; accuracies in shares, differences against the first setting, seed by seed."""

    settings: Mapping[str, Any]
    runs: int
    accuracy: float | None
    accuracy_sd: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    """Ends of the 95 % interval of the paired difference; None for fewer than two pairs."""
    speedup: float | None
    epsilon: float | None


def outcomes(cells: Sequence[Cell], root: Path) -> list[Outcome]:
    """Every setting of a sweep over the runs that are complete."""
    groups: dict[str, tuple[Mapping[str, Any], dict[int, Any]]] = {}
    for cell in cells:
        _, summaries = groups.setdefault(dumps_strict(cell.settings), (cell.settings, {}))
        if (run := _complete(root / cell.name)) is not None:
            summaries[cell.seed] = summarize(run.facts, run.records)
    first = next(iter(groups.values()))[1] if groups else {}
    return [_outcome(settings, found, first) for settings, found in groups.values()]


def _outcome(settings: Mapping[str, Any], found: Mapping[int, Any], first: Mapping[int, Any]) -> Outcome:
    accuracies = [s.test_accuracy for s in found.values() if s.test_accuracy is not None]
    pairs = [found[seed].test_accuracy - first[seed].test_accuracy for seed in found if seed in first]
    low, high = interval(pairs)
    speedups = [s.speedup for s in found.values() if s.speedup is not None]
    return Outcome(
        settings=settings,
        runs=len(found),
        accuracy=fmean(accuracies) if accuracies else None,
        accuracy_sd=stdev(accuracies) if len(accuracies) > 1 else None,
        difference=fmean(pairs) if pairs else None,
        difference_low=low,
        difference_high=high,
        speedup=fmean(speedups) if speedups else None,
        epsilon=max((s.epsilon for s in found.values()), default=None),
    )


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % confidence interval of a mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None, None
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96 + 2.5 / len(values)
    half = quantile * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half
