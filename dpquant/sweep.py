"""A sweep as data: from a specification to the runs it means, from their results to means and paired differences.

Nothing here trains (`dpquant.sweep_runs` does) or prints.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpquant.config import RunConfig, load_config, shipped_configs, with_alternatives
from dpquant.rundir import dumps_strict
from dpquant.statistics import Sample, paired, sample
from dpquant.sweep_results import SweepResult
from emulation.errors import InputError, suggestion
from hwmodels.fields import Anything, Fields, Items, Number, OneOf, Table, Text, problems
from hwmodels.strict_yaml import Document, KeyPath, parse_yaml, raise_all, read_yaml

_FOLDER = Path(__file__).parent
_SHIPPED = (_FOLDER.parent / "configs" / "sweeps", _FOLDER / "configs" / "sweeps")

_SETTINGS = Table(value=Anything(), minimum=1, doc="dotted key of the configuration -> value")
_SEED = Number(minimum=0, maximum=2**63 - 1, integer=True)
SPECIFICATION = Fields(
    entries={
        "base": Text(doc="the configuration that all runs start from: a file beside this one, or a shipped name"),
        "grid": Table(
            value=Items(item=Anything(), minimum=1),
            doc="dotted key of the configuration -> the values to try; every combination is run",
            required=False,
        ),
        "seeds": OneOf(
            options=(Items(item=_SEED, minimum=1), Number(minimum=1, maximum=10_000, integer=True)),
            doc="a list of seeds, or how many: a run per seed and point",
        ),
        "include": Items(item=_SETTINGS, doc="points beside the grid's", required=False),
        "exclude": Items(item=_SETTINGS, doc="points of the grid with all these values are left out", required=False),
        "compare": Fields(
            entries={"to": _SETTINGS},
            doc="to: settings of the baseline; each point is compared with the one that differs in these alone",
            required=False,
        ),
    }
)
RUNS_LIMIT = 10_000


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder, unique in the sweep.
        settings: the resolved value of every key that the sweep varies.
        seed: its seed.
        config: its checked configuration.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A checked specification.

    Attributes:
        name: of its file, without the ending.
        keys: what it varies, as dotted keys.
        runs: seed by seed, so that a sweep that was stopped has few seeds of every point.
        refused: combinations that contradict themselves, and why; they are not run.
        baseline: settings of the baseline; None for the first point.
    """

    name: str
    keys: tuple[str, ...]
    runs: tuple[SweepRun, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None

    @cached_property
    def points(self) -> Mapping[str, Mapping[str, Any]]:
        """The different settings, in the specification's order, by their `point_key`."""
        return {point_key(run.settings): run.settings for run in self.runs}

    def compared_with(self, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The point that ``settings`` is compared with; None for a baseline, or where there is no such point."""
        other = next(iter(self.points.values())) if self.baseline is None else {**settings, **self.baseline}
        return other if other != settings and point_key(other) in self.points else None


def point_key(settings: Mapping[str, Any]) -> str:
    """Text that is equal for equal settings: 50 and 50.0 are one number, whatever order the keys are in."""
    numbers = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in settings.items()}
    return dumps_strict(dict(sorted(numbers.items())))


def shipped_sweeps() -> dict[str, Path]:
    """Name -> path of the sweeps that come with the project."""
    return {p.stem: p for folder in reversed(_SHIPPED) if folder.is_dir() for p in sorted(folder.glob("*.yaml"))}


def load_sweep(path: str | Path, overrides: Mapping[KeyPath, Any] | None = None) -> Sweep:
    """Reads and checks a specification, and every configuration it means.

    Args:
        path: a YAML file, or the name of a shipped sweep.
        overrides: key path -> value, in the place of what the base says, for all runs.

    Raises:
        InputError: no such file, or every problem in it, each with file and line; or no combination is left to run.
    """
    if not Path(path).exists():
        shipped = shipped_sweeps()
        if str(path) not in shipped:
            raise InputError(f"no such sweep: {path}", hint=suggestion(str(path), shipped))
        path = shipped[str(path)]
    document = read_yaml(path)
    raise_all(problems(document, SPECIFICATION))
    raise_all(_misuses(document))
    seeds = document.data["seeds"]
    seeds = list(range(seeds)) if isinstance(seeds, int) else seeds
    keys = _varied(document.data)
    runs, refused = _expanded(document, Path(path), keys, seeds, overrides or {})
    if not runs:
        name, reason = next(iter(refused.items()), ("", "every point of the grid is excluded"))
        raise document.error((), f"nothing to run: {f'{name}: ' if name else ''}{reason}")
    baseline = document.data.get("compare", {}).get("to")
    found = Sweep(name=Path(path).stem, keys=keys, runs=tuple(runs), refused=refused, baseline=baseline)
    if baseline is not None and all(found.compared_with(point) is None for point in found.points.values()):
        hint = "every other setting of the two has to be the same"
        raise document.error(("compare", "to"), f"compare.to={_text(baseline)} is the baseline of no point", hint=hint)
    return found


def only(sweep: Sweep, wanted: Sequence[str]) -> Sweep:
    """The part of a sweep whose points have all these values.

    Args:
        sweep: the whole.
        wanted: ``KEY=VALUE``, the key dotted or its last part, the value as YAML has it.

    Raises:
        InputError: a key that the sweep does not vary, or no run is left.
    """
    short = {name: key for key, name in short_names(sweep.keys).items()}
    values: dict[str, Any] = {}
    for text in wanted:
        name, _, value = text.partition("=")
        key = short.get(name, name)
        if key not in sweep.keys:
            raise InputError(f"the sweep does not vary {name!r}", hint=suggestion(name, [*short, *sweep.keys]))
        values[key] = parse_yaml(value, file=text).data
    runs = tuple(run for run in sweep.runs if point_key({k: run.settings[k] for k in values}) == point_key(values))
    if not runs:
        raise InputError(f"no run of the sweep has {' '.join(wanted)}", hint="--dry-run lists them")
    return replace(sweep, runs=runs)


def _varied(data: Mapping[str, Any]) -> tuple[str, ...]:
    included = [key for point in data.get("include", ()) for key in point]
    return tuple(dict.fromkeys([*data.get("grid", {}), *included]))


def _misuses(document: Document) -> Iterator[InputError]:
    """What the fields alone do not show: values given twice, keys of nothing, too many runs."""
    data = document.data
    grid, seeds = data.get("grid", {}), data["seeds"]
    for path, values in [*((("grid", k), v) for k, v in grid.items()), (("seeds",), seeds)]:
        seen: list[Any] = []
        for index, value in enumerate(values if isinstance(values, list) else ()):
            if any(value == other and type(value) is type(other) for other in seen):
                yield document.error((*path, index), f"the same run comes twice: {'.'.join(path)}={value}")
            seen.append(value)
    count = math.prod(len(v) for v in grid.values()) * (seeds if isinstance(seeds, int) else len(seeds))
    if count > RUNS_LIMIT:
        yield document.error(("grid",), f"grid and seeds make {count:,} runs", hint=f"at most {RUNS_LIMIT:,}")
    keys = _varied(data)
    places: list[tuple[KeyPath, Any]] = [(("grid", k), k) for k in grid]
    places += [(("include", i, k), k) for i, point in enumerate(data.get("include", ())) for k in point]
    yield from (
        document.error(path, f"{key!r} is varied by seeds", hint="seeds: [0, 1, 2]")
        for path, key in places
        if key == "seed"
    )
    named: list[KeyPath] = [("exclude", i, k) for i, point in enumerate(data.get("exclude", ())) for k in point]
    for place in [*named, *(("compare", "to", k) for k in data.get("compare", {}).get("to", ()))]:
        if place[-1] not in keys:
            hint = suggestion(str(place[-1]), keys) if keys else "give a grid"
            yield document.error(place, f"the sweep does not vary {place[-1]!r}", hint=hint)


def _points(document: Document) -> Iterator[tuple[KeyPath, dict[str, tuple[Any, KeyPath]]]]:
    """Where each point stands in the file; its values, and where each stands."""
    data = document.data
    grid, excluded = data.get("grid", {}), data.get("exclude", ())
    used: set[int] = set()
    axes = [[(value, ("grid", key, i)) for i, value in enumerate(values)] for key, values in grid.items()]
    for values in itertools.product(*axes) if grid or "include" not in data else ():
        point: dict[str, tuple[Any, KeyPath]] = dict(zip(grid, values, strict=True))
        hits = [i for i, left in enumerate(excluded) if all(point.get(k, (left,))[0] == v for k, v in left.items())]
        used.update(hits)
        if not hits:
            yield ("grid",), point
    for i, left in enumerate(excluded):
        if i not in used:
            raise document.error(("exclude", i), f"exclude[{i}]={_text(left)} leaves no point out")
    for i, extra in enumerate(data.get("include", ())):
        yield ("include", i), {k: (v, ("include", i, k)) for k, v in extra.items()}


def _base(document: Document, path: Path) -> Path:
    name: str = document.data["base"]
    if (beside := path.parent / name).exists():
        return beside
    shipped = shipped_configs()
    if name not in shipped:
        raise document.error(("base",), f"no such configuration: base={name}", hint=suggestion(name, shipped))
    return shipped[name]


def _expanded(
    document: Document, path: Path, keys: Sequence[str], seeds: Sequence[int], shared: Mapping[KeyPath, Any]
) -> tuple[list[SweepRun], dict[str, str]]:
    base = _base(document, path)
    short = short_names(keys)
    runs, refused, wrong = [], {}, {}
    names: set[str] = set()
    for seed, (place, point) in itertools.product(seeds, _points(document)):
        overrides: dict[KeyPath, Any] = {tuple(key.split(".")): value for key, (value, _) in point.items()}
        lines = {tuple(k.split(".")): (document.file, document.lines[at]) for k, (_, at) in point.items()}
        try:
            config = load_config(base, {**shared, **with_alternatives(overrides), ("seed",): seed}, lines)
        except InputError as error:
            errors = getattr(error, "errors", (error,))
            ours = [one for one in errors if one.file == document.file]
            wrong.update({(one.line, one.message): one for one in ours})
            if not ours:
                said = _name({short[key]: value for key, (value, _) in point.items()}, None)
                refused[said] = "; ".join(one.message for one in errors)
            continue
        settings = {key: _at(config.data, key) for key in keys}
        name = _name({short[key]: value for key, value in settings.items()}, seed)
        if name in names:
            raise document.error(place, f"the same run comes twice: {name}")
        names.add(name)
        runs.append(SweepRun(name=name, settings=settings, seed=seed, config=config))
    raise_all(wrong.values())
    return runs, refused


def _at(data: Mapping[str, Any], key: str) -> Any:
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two end alike."""
    ends = [key.split(".")[-1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _name(settings: Mapping[str, Any], seed: int | None) -> str:
    """A folder's name, safe on every file system and not the same for two settings."""
    values = {**settings, "seed": seed} if seed is not None else settings
    text = ",".join(f"{key}={'none' if value is None else value}" for key, value in values.items())
    safe = re.sub(r"[^A-Za-z0-9=.,_+-]", "_", text)
    if safe == text and len(safe) <= 150:
        return safe
    return f"{safe[:130]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _text(settings: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One point of a sweep over its seeds; accuracies and their differences are shares, between 0 and 1."""

    settings: Mapping[str, Any]
    runs: int
    failed: int
    accuracy: Sample
    """Test accuracy after the last epoch: of the model that is kept."""
    best_accuracy: float | None
    """Mean over seeds of each run's best epoch: chosen by looking at the test data."""
    worst_seed: int | None
    worst_accuracy: float | None
    compared_with: Mapping[str, Any] | None
    difference: Sample
    """Paired difference in accuracy from the point it is compared with, seed by seed."""
    speedup_peak: float | None
    speedup_calibrated: float | None
    energy_share_peak: float | None
    """Modelled energy in shares of full precision's."""
    energy_share_calibrated: float | None
    epsilon: float | None
    """The largest of any run."""
    wall_s: float
    """Of all runs together."""


def outcomes(sweep: Sweep, results: Mapping[str, SweepResult]) -> list[Outcome]:
    """Every point of a sweep over the runs that have a result."""
    by_point: dict[str, list[SweepResult]] = {}
    for run in sweep.runs:
        found = by_point.setdefault(point_key(run.settings), [])
        if run.name in results:
            found.append(results[run.name])
    accuracies = {
        point: {r.seed: r.accuracy for r in found if r.accuracy is not None} for point, found in by_point.items()
    }
    points = sweep.points.values()
    return [_outcome(settings, by_point, accuracies, sweep.compared_with(settings)) for settings in points]


def _outcome(
    settings: Mapping[str, Any],
    by_point: Mapping[str, Sequence[SweepResult]],
    accuracies: Mapping[str, Mapping[int, float]],
    other: Mapping[str, Any] | None,
) -> Outcome:
    point = point_key(settings)
    done = [result for result in by_point[point] if result.done]
    own = accuracies[point]
    worst = min(own, key=lambda seed: (own[seed], seed), default=None)

    def mean(name: str) -> float | None:
        return sample([value for r in done if (value := getattr(r, name)) is not None]).mean

    return Outcome(
        settings=settings,
        runs=len(done),
        failed=len(by_point[point]) - len(done),
        accuracy=sample(list(own.values())),
        best_accuracy=mean("best_accuracy"),
        worst_seed=worst,
        worst_accuracy=None if worst is None else own[worst],
        compared_with=other,
        difference=sample([]) if other is None else paired(own, accuracies[point_key(other)]),
        speedup_peak=mean("speedup_peak"),
        speedup_calibrated=mean("speedup_calibrated"),
        energy_share_peak=mean("energy_share_peak"),
        energy_share_calibrated=mean("energy_share_calibrated"),
        epsilon=max((r.epsilon for r in done if r.epsilon is not None), default=None),
        wall_s=math.fsum(r.wall_s or 0.0 for r in by_point[point]),
    )
