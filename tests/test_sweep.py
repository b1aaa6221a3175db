"""Sweeps: every combination once, checked before anything runs, resumable, the same numbers however it is spread."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpquant import sweep_runs
from dpquant.cli import main
from dpquant.config import load_config
from dpquant.modelled import ModelledRun
from dpquant.models import build_model
from dpquant.report import summarize
from dpquant.rundir import load_run, take_lock
from dpquant.sensitivity import AnalysisSettings
from dpquant.statistics import paired, sample
from dpquant.sweep import Sweep, load_sweep, only, outcomes, shipped_sweeps
from dpquant.sweep_results import SweepResult, append_result, read_results, write_results
from emulation.errors import InputError
from hwmodels.profile import load_profile
from hwmodels.workload import trace
from tests.test_cli import DOCUMENTED, Capture, answer, refused, shown, write_config

SCHEDULERS = "seeds: [0, 1]\ngrid: {schedule.scheduler: [full, pls]}\n"


def spec(folder: Path, text: str) -> str:
    write_config(folder)
    (folder / "spec.yaml").write_text(f"base: tiny.yaml\n{text}")
    return str(folder / "spec.yaml")


def made_up(sweep: Sweep, accuracies: Mapping[str, float]) -> dict[str, SweepResult]:
    """Results of the runs that ``accuracies`` names, with nothing trained."""
    return {
        run.name: SweepResult(
            name=run.name,
            settings=run.settings,
            seed=run.seed,
            digest=run.config.digest,
            status="done",
            accuracy=accuracies[run.name],
            best_accuracy=accuracies[run.name],
            epsilon=1.0 + run.seed,
            speedup_peak=1.5,
            wall_s=2.0,
        )
        for run in sweep.runs
        if run.name in accuracies
    }


# --- the specification


def test_every_combination_once(tmp_path: Path) -> None:
    grid = "seeds: [3, 4]\ngrid: {schedule.fraction: [0.25, 0.5], training.epochs: [1, 2, 3]}\n"
    sweep = load_sweep(spec(tmp_path, grid))
    found = [(r.settings["schedule.fraction"], r.settings["training.epochs"], r.seed) for r in sweep.runs]
    assert found == [(f, e, s) for s in (3, 4) for f in (0.25, 0.5) for e in (1, 2, 3)]  # seed by seed
    assert len({run.name for run in sweep.runs}) == 12
    assert sweep.runs[0].name == "fraction=0.25,epochs=1,seed=3"
    assert all(run.config["seed"] == run.seed for run in sweep.runs)
    assert all(run.config["schedule"]["fraction"] == run.settings["schedule.fraction"] for run in sweep.runs)


def test_seeds_as_a_count(tmp_path: Path) -> None:
    assert [run.seed for run in load_sweep(spec(tmp_path, "seeds: 3\n")).runs] == [0, 1, 2]


def test_include_and_exclude(tmp_path: Path) -> None:
    text = (
        "seeds: [0]\ngrid: {schedule.scheduler: [full, pls], schedule.fraction: [0.25, 0.5]}\n"
        "exclude: [{schedule.scheduler: full, schedule.fraction: 0.25}]\n"
        "include: [{schedule.scheduler: dpquant, schedule.beta: 50}]\n"
    )
    found = [list(run.settings.values()) for run in load_sweep(spec(tmp_path, text)).runs]
    # the included point says what the base says where it is silent, and so do the grid's
    assert found == [["full", 0.5, 200.0], ["pls", 0.25, 200.0], ["pls", 0.5, 200.0], ["dpquant", 0.5, 50]]
    alone = load_sweep(spec(tmp_path, "seeds: [0]\ninclude: [{format: nvfp4}]\n"))
    assert [run.name for run in alone.runs] == ["format=nvfp4,seed=0"]


def test_a_key_takes_the_place_of_the_one_it_excludes(tmp_path: Path) -> None:
    sweep = load_sweep(
        spec(tmp_path, "seeds: [0]\ngrid: {schedule.target_speedup: [1.1], privacy.target_epsilon: [8]}\n")
    )
    config = sweep.runs[0].config
    assert config["schedule"]["fraction"] is None
    assert config["privacy"]["noise_multiplier"] is None


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("seeds: []\n", 2, "seeds"),
        ("seeds: 0\n", 2, "below 1"),
        ("seeds: [0]\ngrd: {}\n", 3, "'grd'"),
        ("seeds: [0, 0]\n", 2, "comes twice: seeds=0"),
        ("seeds: [0]\ngrid:\n  schedule.fraction:\n  - 0.5\n  - 2.0\n", 6, "2.0 is above 1"),
        ("seeds: [0]\ngrid:\n  schedule.fractoin: [0.5]\n", 4, "'fractoin'"),
        ("seeds: [0]\ngrid:\n  schedul.fraction: [0.5]\n", 4, "'schedul'"),
        ("seeds: [0]\ngrid:\n  format.x: [0.5]\n", 4, "'format.x'"),
        ("seeds: [0]\ngrid: {}\ninclude:\n- {training.: 3}\n", 5, "unknown key ''"),
        ("seeds: [0]\ngrid:\n  seed: [1]\n", 4, "varied by seeds"),
        ("seeds: [0]\ngrid: {schedule.fraction: []}\n", 3, "at least 1"),
        ("seeds: [0]\ngrid: {schedule.fraction: [0.5, 0.5]}\n", 3, "comes twice"),
        ("seeds: [0]\ngrid: {schedule.fraction: [0.5]}\ninclude: [{schedule.fraction: 0.5}]\n", 4, "comes twice"),
        ("seeds: [0]\ngrid: {format: [nvfp4]}\nexclude: [{format: luq_fp4}]\n", 4, "leaves no point out"),
        ("seeds: [0]\ngrid: {format: [nvfp4]}\nexclude: [{format: nvfp4}]\n", 1, "nothing to run"),
        ("seeds: [0]\ngrid: {format: [nvfp4]}\nexclude: [{fromat: nvfp4}]\n", 4, "does not vary 'fromat'"),
        ("seeds: [0]\ngrid: {format: [nvfp4]}\ncompare: {to: {format: fp8}}\n", 4, "baseline of no point"),
        ("seeds: [0]\ncompare: {to: {format: fp8}}\n", 3, "does not vary 'format'"),
        ("seeds: [0.5]\n", 2, "seeds"),
        ("grid: {}\n", 1, "seeds"),
    ],
)
def test_wrong_specifications(tmp_path: Path, text: str, line: int, error: str) -> None:
    path = spec(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(error)) as caught:
        load_sweep(path)
    assert (caught.value.file, caught.value.line) == (path, line)


def test_every_problem_at_once(tmp_path: Path) -> None:
    text = "seeds: [0, 1]\ngrid:\n  schedule.fraction: [2.0, 0.5]\n  training.epochs: [0]\n  formt: [fp8]\n"
    with pytest.raises(InputError) as caught:
        load_sweep(spec(tmp_path, text))
    assert [error.line for error in getattr(caught.value, "errors", ())] == [4, 5, 6]


def test_contradictions_are_left_out_and_said(tmp_path: Path, capsys: Capture) -> None:
    text = "seeds: [0, 1]\ngrid: {schedule.scheduler: [full, pls], schedule.fraction: [null, 0.5]}\n"
    path = spec(tmp_path, text)
    sweep = load_sweep(path)
    assert {(r.settings["schedule.scheduler"], r.settings["schedule.fraction"]) for r in sweep.runs} == {
        ("full", None),
        ("full", 0.5),
        ("pls", 0.5),
    }
    assert list(sweep.refused) == ["scheduler=pls,fraction=none"]
    assert "neither target_speedup nor fraction" in sweep.refused["scheduler=pls,fraction=none"]
    assert main(["sweep", path, "--dry-run"]) == 0
    assert "left out: scheduler=pls,fraction=none: " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"nothing to run: .*neither target_speedup nor fraction"):
        load_sweep(spec(tmp_path, "seeds: [0]\ngrid: {schedule.fraction: [null]}\n"))


KEYS = ["schedule.scheduler", "schedule.fraction", "format.x", "model.options.a.b", "training.epochs", "seed", ".", ""]
NAMES = ["base", "grid", "seeds", "include", "exclude", "compare", "to", "format", "schedule", "analysis", "digits"]
WORDS = st.sampled_from(KEYS) | st.sampled_from(NAMES)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from([0.5, 1e300]) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(WORDS, st.lists(VALUES, min_size=1, max_size=2), max_size=2)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_specification_ends_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    write_config(tmp_path)
    made = data.draw(st.dictionaries(WORDS, VALUES, max_size=3))
    made |= {"base": "tiny.yaml", "seeds": 1, "grid": data.draw(TABLES)} if data.draw(st.booleans()) else {}
    (tmp_path / "spec.yaml").write_text(json.dumps(made))
    try:
        sweep = load_sweep(tmp_path / "spec.yaml")
    except InputError:
        return
    assert outcomes(sweep, {})


def test_too_many_runs(tmp_path: Path) -> None:
    values = list(range(1, 200))
    text = f"seeds: [0]\ngrid: {{training.epochs: {values}, training.batch_size: {values}}}\n"
    with pytest.raises(InputError, match="39,601 runs"):
        load_sweep(spec(tmp_path, text))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such sweep"):
        load_sweep("digits_schedule")
    (tmp_path / "spec.yaml").write_text("seeds: 1\nbase: digts\n")
    with pytest.raises(InputError, match="no such configuration: base=digts") as caught:
        load_sweep(tmp_path / "spec.yaml")
    assert caught.value.line == 2
    assert "digits" in str(caught.value.hint)


def test_names_are_safe_and_different(tmp_path: Path) -> None:
    names = [f"a/{i}" for i in range(3)] + ["a_0", "ü" * 200]
    noises = "privacy.noise_multiplier: [1], analysis.noise_multiplier: [2]"
    text = f"seeds: [0]\ngrid: {{name: {json.dumps(names)}, {noises}}}\n"
    found = [run.name for run in load_sweep(spec(tmp_path, text)).runs]
    assert len(set(found)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9=.,_+-]{1,150}", name) for name in found)
    assert "privacy.noise_multiplier=1,analysis.noise_multiplier=2" in found[0]


@pytest.mark.parametrize("name", sorted(shipped_sweeps()))
def test_shipped_sweeps_are_sound(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.runs
    assert not sweep.refused


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [
        ("digits_time", (1, 8, 8), 6),
        ("fashion_time", (1, 28, 28), 4),
        ("cifar10_time", (3, 32, 32), 8),
        ("cifar10_resnet18", (3, 32, 32), 21),
    ],
)
def test_fixed_choices_reach_the_speedups_of_the_schedulers(name: str, shape: tuple[int, ...], layers: int) -> None:
    """Each reaches a target and would not without any one of its layers; of small networks they are all such.

    ``cooldown`` aims at the speedup of each, too.
    """
    schedulers, subsets = load_sweep(name), load_sweep(f"{name}_subsets")
    aims: dict[str, set[float]] = {}
    for planned in schedulers.runs:
        aims.setdefault(planned.settings["schedule.scheduler"], set()).add(planned.settings["schedule.target_speedup"])
    targets = aims["greedy"]
    listed = {tuple(run.settings["schedule.layers"]) for run in subsets.runs}
    config = subsets.runs[0].config
    model = build_model(config["model"]["name"], **config["model"]["options"], num_classes=10, in_channels=shape[0])
    workload = trace(model, torch.zeros(1, *shape), config["training"]["batch_size"])
    assert len(workload.quantizable) == layers
    run = ModelledRun(
        workload=workload,
        profile=load_profile(config["hardware"]["profile"]),
        formats=[config["format"]],
        basis=config["hardware"]["basis"],
        clipping=config["training"]["clipping"],
        analysis=AnalysisSettings(),
        analyses=0,
        expected_batch_size=config["training"]["batch_size"],
        steps=100,
    )

    def speedup(choice: tuple[str, ...]) -> float:
        return run.speedup(dict.fromkeys(choice, config["format"]))

    def least(choice: tuple[str, ...]) -> bool:
        without = [speedup(choice[:i] + choice[i + 1 :]) for i in range(len(choice))]
        return any(max(without) < target <= speedup(choice) for target in targets)

    assert all(least(choice) for choice in listed)
    # what an epoch quantizes is a whole layer, and so a schedule runs a little faster than it aims
    assert all(any(0.99 < aim / speedup(choice) < 1.005 for aim in aims["cooldown"]) for choice in listed)
    if layers <= 8:
        known = (c for k in range(1, layers + 1) for c in combinations(workload.quantizable, k))
        assert {choice for choice in known if least(choice)} == listed


def test_the_demonstration_is_shipped() -> None:
    sweep = load_sweep("digits_schedulers")
    assert len(sweep.runs) == 12
    assert sweep.baseline == {"schedule.scheduler": "static"}


def test_digest_is_of_what_decides_the_numbers() -> None:
    digest = load_config("digits").digest
    for key, value in ((("name",), "x"), (("training", "device"), "cuda"), (("training", "momentum"), 0.0)):
        assert load_config("digits", {key: value}).digest == digest
    for key, value in ((("seed",), 1), (("training", "momentum"), 0.5), (("format",), "nvfp4")):
        assert load_config("digits", {key: value}).digest != digest


# --- results and outcomes


def test_each_point_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    text = (
        "seeds: 3\ngrid: {schedule.scheduler: [static, pls], format: [luq_fp4, nvfp4]}\n"
        "include: [{schedule.scheduler: full, format: bf16}]\ncompare: {to: {schedule.scheduler: static}}\n"
    )
    sweep = load_sweep(spec(tmp_path, text))
    accuracies = {run.name: 0.5 + 0.01 * i * i for i, run in enumerate(sweep.runs)}
    del accuracies["scheduler=static,format=nvfp4,seed=1"]
    found = {tuple(o.settings.values()): o for o in outcomes(sweep, made_up(sweep, accuracies))}
    assert len(found) == 5
    by_seed = {
        key: {
            s: accuracies[name]
            for s in range(3)
            if (name := f"scheduler={key[0]},format={key[1]},seed={s}") in accuracies
        }
        for key in found
    }
    for (scheduler, kind), outcome in found.items():
        own = by_seed[scheduler, kind]
        assert outcome.accuracy == sample(list(own.values()))
        assert outcome.worst_seed == min(own, key=own.__getitem__)
        if scheduler == "pls":
            assert outcome.compared_with == {"schedule.scheduler": "static", "format": kind}
            assert outcome.difference == paired(own, by_seed["static", kind])
        else:  # a baseline, and a point that has none
            assert outcome.compared_with is None
            assert outcome.difference.n == 0
    assert found["pls", "nvfp4"].difference.n == 2
    assert found["pls", "nvfp4"].epsilon == 3.0
    assert found["pls", "nvfp4"].wall_s == 6.0


def test_whole_and_decimal_numbers_are_one_setting(tmp_path: Path) -> None:
    text = "seeds: [0]\ngrid: {schedule.beta: [50.0, 60]}\ncompare: {to: {schedule.beta: 50}}\n"
    sweep = load_sweep(spec(tmp_path, text))
    assert sweep.compared_with({"schedule.beta": 60}) == {"schedule.beta": 50}
    assert sweep.compared_with({"schedule.beta": 50.0}) is None


def test_without_a_baseline_the_first_point_is_it(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, SCHEDULERS))
    full, pls = outcomes(sweep, made_up(sweep, {run.name: 0.5 for run in sweep.runs}))
    assert full.compared_with is None
    assert pls.compared_with == full.settings
    assert pls.difference.sign == 0


def test_claims_have_intervals(tmp_path: Path, capsys: Capture) -> None:
    text = "grid: {schedule.scheduler: [static, full, pls, dpquant]}\ncompare: {to: {schedule.scheduler: static}}\n"
    above = {"static": (0, 0, 0), "full": (0.05, 0.06, 0.05), "pls": (-0.1, 0, 0.1), "dpquant": (-0.05, -0.06, -0.05)}

    def said(seeds: int) -> str:
        path = spec(tmp_path, f"{text}seeds: {seeds}\n")
        sweep = load_sweep(path)
        accuracies = {r.name: 0.8 + above[r.settings["schedule.scheduler"]][r.seed] + r.seed / 20 for r in sweep.runs}
        write_results(tmp_path / "results.jsonl", made_up(sweep, accuracies).values())
        return " ".join(shown(capsys, "sweep", path, "--out", str(tmp_path), "--report").split())

    three = said(3)
    assert "Better than static (the 95 % interval leaves 0 out): full." in three
    assert "Worse than static (the 95 % interval leaves 0 out): dpquant." in three
    assert "No difference shown: pls." in three
    assert "Each interval stands alone" in three
    one = said(1)
    assert "without one nothing is claimed" in one
    assert not any(word in one for word in ("Better", "Worse", "No difference"))


RESULTS = st.builds(
    SweepResult,
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Zs", "Cc")), min_size=1, max_size=5),
    settings=st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2),
    seed=st.integers(0, 2**63 - 1),
    digest=st.just("0"),
    status=st.sampled_from(["done", "failed"]),
    error=st.none() | st.just("it broke"),
    accuracy=st.none() | st.floats(0, 1),
    epsilon=st.none() | st.floats(0, allow_nan=False),
    versions=st.just({"python": "3"}),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(RESULTS, max_size=5, unique_by=lambda result: result.name))
def test_results_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, results: list[SweepResult]) -> None:
    path = tmp_path_factory.getbasetemp() / "back.jsonl"
    write_results(path, results[:2])
    for result in results[2:]:
        append_result(path, result)
    assert list(read_results(path).values()) == results
    with path.open("ab") as stream:
        stream.write(b'{"name": "cut sho')
    assert list(read_results(path).values()) == results


@pytest.mark.parametrize(
    ("line", "error"),
    [("{", "not JSON"), ("[]", "a list"), ("{}", "missing"), ('{"name": 3}', "name=3"), ("[" * 10**5, "not JSON")],
)
def test_damaged_results(tmp_path: Path, line: str, error: str) -> None:
    good = SweepResult(name="a", settings={}, seed=0, digest="0", status="done")
    (tmp_path / "r.jsonl").write_text(f"{good.to_json()}\n{line}\n")
    with pytest.raises(InputError, match=error) as caught:
        read_results(tmp_path / "r.jsonl")
    assert caught.value.line == 2


# --- training


def test_sweep_trains_resumes_and_reports(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpquant import train as loop

    path, out = spec(tmp_path, SCHEDULERS), tmp_path / "out"
    whole, trained = loop.train, []

    def counted(training: Any, folder: Any) -> Any:
        trained.append(folder.path.name)
        if len(trained) == 3:
            yield next(iter(whole(training, folder)))
            raise KeyboardInterrupt
        yield from whole(training, folder)

    monkeypatch.setattr(loop, "train", counted)
    assert main(["sweep", path, "--out", str(out)]) == 130
    assert "goes on" in capsys.readouterr().err
    assert [row["runs"] for row in answer(capsys, "sweep", path, "--out", str(out), "--report")["rows"]] == [1, 1]
    assert len(trained) == 3
    data = answer(capsys, "sweep", path, "--out", str(out))
    third = "scheduler=full,seed=1"
    assert trained == ["scheduler=full,seed=0", "scheduler=pls,seed=0", third, third, "scheduler=pls,seed=1"]
    assert [row["runs"] for row in data["rows"]] == [2, 2]
    section = DOCUMENTED.read_text(encoding="utf-8").split("### `sweep`\n")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {*data, *data["rows"][0]} - {"schema"} == set(re.findall(r"`(\w+)`", " ".join(cells)))

    results = read_results(out / "results.jsonl")
    assert list(results) == [run.name for run in load_sweep(path).runs]
    for name, result in results.items():
        run = load_run(out / name)
        assert result.accuracy == run.records[-1].test_accuracy
        assert result.best_accuracy == max(r.test_accuracy or 0 for r in run.records)
        assert result.epsilon == run.records[-1].epsilon
        summary = summarize(run.facts, run.records)
        assert result.speedup_peak == pytest.approx(summary.speedup)
        assert result.speedup_calibrated == pytest.approx(summary.speedup_calibrated)
        assert result.energy_joules_peak == pytest.approx(summary.energy_joules)
        assert result.versions == run.versions
        assert result.epochs == 2
    assert results["scheduler=full,seed=0"].energy_share_peak == pytest.approx(1)
    assert results["scheduler=pls,seed=0"].energy_share_peak != pytest.approx(1)
    assert "95 %" in shown(capsys, "sweep", path, "--out", str(out))
    assert len(trained) == 5  # everything was complete

    # the results file alone is enough for the tables, and a lost results file is made again from the folders
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes())
    assert answer(capsys, "sweep", path, "--out", str(tmp_path / "copy"), "--report") == data
    before = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").unlink()
    assert answer(capsys, "sweep", path, "--out", str(out)) == data
    assert (out / "results.jsonl").read_bytes() == before
    assert len(trained) == 5

    assert main(["sweep", path, "--out", str(out), "--report", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["settings"] for row in rows] == ["schedule.scheduler=full", "schedule.scheduler=pls"]

    # another configuration under the same names is refused, in the results and in a run's folder
    (tmp_path / "tiny.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace("epochs: 2", "epochs: 1"))
    assert "another configuration" in refused(capsys, "sweep", path, "--out", str(out))[0]
    (out / "results.jsonl").unlink()
    failures = answer(capsys, "sweep", path, "--out", str(out), code=1)["failures"]
    assert len(failures) == 4
    assert all("another configuration" in failure for failure in failures.values())


def test_a_run_that_fails_is_said_and_the_others_go_on(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpquant import train as loop

    text = "seeds: [0]\ngrid: {training.batch_size: [9999, 32], hardware.profile: [b200, h100], training.epochs: [1]}\n"
    text += "exclude: [{training.batch_size: 9999, hardware.profile: h100}]\n"
    path, out = spec(tmp_path, text), tmp_path / "out"
    whole = loop.train

    def breaks(training: Any, folder: Any) -> Any:
        if training.facts.hardware == "h100":
            raise RuntimeError("out of\nmemory")
        yield from whole(training, folder)

    monkeypatch.setattr(loop, "train", breaks)
    data = answer(capsys, "sweep", path, "--out", str(out), code=1)
    assert list(data["failures"]) == [
        "batch_size=9999,profile=b200,epochs=1,seed=0",
        "batch_size=32,profile=h100,epochs=1,seed=0",
    ]
    assert [(row["runs"], row["failed"]) for row in data["rows"]] == [(0, 1), (1, 0), (0, 1)]
    results = read_results(out / "results.jsonl")
    assert "batch_size=9999" in str(results["batch_size=9999,profile=b200,epochs=1,seed=0"].error)
    assert results["batch_size=32,profile=h100,epochs=1,seed=0"].error == "RuntimeError: out of memory"
    assert "0/1" in shown(capsys, "sweep", path, "--out", str(out), "--report", code=1)
    monkeypatch.setattr(loop, "train", whole)
    data = answer(capsys, "sweep", path, "--out", str(out), code=1)  # failures are tried again, and only they
    assert [row["runs"] for row in data["rows"]] == [0, 1, 1]


def test_a_sweep_does_not_mix_with_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="is the folder of a run"):
        sweep_runs.train_sweep(load_sweep(spec(tmp_path, "seeds: [0, 1]\n")), tmp_path)
    assert not (tmp_path / "results.jsonl").exists()


def test_threads_do_not_share_a_gpu(tmp_path: Path) -> None:
    """Whether float32 products are exact is a setting of the whole process."""
    sweep = load_sweep(spec(tmp_path, "seeds: [0, 1]\n"), {("training", "device"): "cuda"})
    with pytest.raises(InputError, match="--backend threading cannot train on a GPU"):
        sweep_runs.train_sweep(sweep, tmp_path / "out", jobs=2, backend="threading")


@pytest.mark.parametrize(("jobs", "backend"), [(1, "loky"), (2, "threading")])
def test_time_limit_stops_between_epochs_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, backend: str
) -> None:
    sweep = load_sweep(spec(tmp_path, "seeds: [0, 1]\n"))
    whole = sweep_runs.train_sweep(sweep, tmp_path / "whole")
    out = tmp_path / "out"
    clock = SimpleNamespace(
        time=lambda: 100.0 if any(out.glob("*/records.jsonl")) else 1.0, perf_counter=time.perf_counter
    )
    with monkeypatch.context() as patched:
        patched.setattr(sweep_runs, "time", clock)
        cut = sweep_runs.train_sweep(sweep, out, jobs=jobs, backend=backend, time_limit=50.0)
    assert cut == read_results(out / "results.jsonl") == {}
    started = list(out.glob("*/records.jsonl"))
    assert 1 <= len(started) <= jobs
    assert all(len(records.read_text().splitlines()) == 1 for records in started)
    assert figures(sweep_runs.train_sweep(sweep, out, time_limit=1e6)) == figures(whole)


def test_a_part_of_a_sweep_by_its_settings(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, SCHEDULERS))
    part = only(sweep, ["scheduler=pls"])
    assert [run.settings["schedule.scheduler"] for run in part.runs] == ["pls"] * len(part.runs)
    assert 0 < len(part.runs) < len(sweep.runs)
    assert only(sweep, ["schedule.scheduler=pls"]) == part
    with pytest.raises(InputError, match="does not vary 'schedler'"):
        only(sweep, ["schedler=pls"])
    with pytest.raises(InputError, match="no run of the sweep has scheduler=none"):
        only(sweep, ["scheduler=none"])


def figures(results: Mapping[str, SweepResult]) -> dict[str, Any]:
    return {name: (r.status, r.error, r.accuracy, r.test_loss, r.epsilon) for name, r in results.items()}


def test_runs_travel_to_other_processes(tmp_path: Path) -> None:
    for run in load_sweep(spec(tmp_path, SCHEDULERS)).runs:
        there = pickle.loads(pickle.dumps(run))
        assert there == run
        assert there.config.digest == run.config.digest


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("loky", "dask", "ray")]


@pytest.mark.parametrize("backend", ["threading", *LONG])
@pytest.mark.filterwarnings("default")  # of the clusters' own
def test_side_by_side_gives_the_same_numbers(tmp_path: Path, backend: str) -> None:
    if backend in ("dask", "ray"):
        pytest.importorskip({"dask": "distributed", "ray": "ray"}[backend])
    sweep = load_sweep(spec(tmp_path, "seeds: [0, 1]\ngrid: {training.epochs: [1]}\n"))
    alone = sweep_runs.train_sweep(sweep, tmp_path / "alone")
    counts: list[int] = []
    ended: list[str] = []
    together = sweep_runs.train_sweep(
        sweep,
        tmp_path / "together",
        jobs=2,
        backend=backend,
        started=counts.append,
        ended=lambda result: ended.append(result.name),
    )
    assert figures(together) == figures(alone)
    assert all(result.done for result in together.values())
    assert counts == [0]
    assert sorted(ended) == sorted(alone)


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_sweep_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(spec(tmp_path, "seeds: [0, 1]\n"))
    monkeypatch.setattr(sweep_runs, "run_result", _ends_its_process)
    with pytest.raises(OSError, match="goes on with what is left"):
        sweep_runs.train_sweep(sweep, tmp_path / "out", jobs=2)
    assert read_results(tmp_path / "out" / "results.jsonl") == {}


@pytest.mark.long
def test_runs_end_with_the_sweep_that_waits_for_them(tmp_path: Path) -> None:
    path, out = spec(tmp_path, "seeds: [0, 1]\ngrid: {training.epochs: [3000]}\n"), tmp_path / "out"
    command = [sys.executable, "-m", "dpquant.cli", "sweep", path, "--out", str(out), "--jobs", "2", "--quiet"]
    process = subprocess.Popen(command)
    try:
        assert waited(lambda: len(list(out.glob("*/records.jsonl"))) == 2)
    finally:
        process.kill()
        process.wait()
    assert waited(lambda: all(map(free, out.glob("epochs*"))))
    assert all(len(file.read_text().splitlines()) < 3000 for file in out.glob("*/records.jsonl"))


def waited(true: Callable[[], bool], seconds: float = 90.0) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def free(folder: Path) -> bool:
    """Whether no process trains in a run folder."""
    try:
        take_lock(folder).close()
    except InputError:
        return False
    return True


def _ends_its_process(run: Any, root: Path, *rest: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.cuda
@pytest.mark.skipif("not __import__('torch').cuda.is_available()")
def test_runs_share_one_gpu(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, SCHEDULERS), {("training", "device"): "cuda"})
    results = sweep_runs.train_sweep(sweep, tmp_path / "out", jobs=2)
    assert all(result.done for result in results.values()), [result.error for result in results.values()]
    assert all("cpu" not in str(result.device) for result in results.values())


def placed(root: Path, answers: Any, barrier: Any) -> None:
    """A process of a sweep that says where it is, and stays until all have."""
    torch.cuda.device_count = lambda: 3
    torch.cuda.set_device = answers.put
    for _ in range(2):  # of two runs the second stays where the first was
        sweep_runs._take_gpu(root)
    barrier.wait(60)


def test_processes_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    for count in (4, 1):  # who ends leaves the place to another
        answers, barrier = context.Queue(), context.Barrier(count)
        processes = [context.Process(target=placed, args=(tmp_path, answers, barrier)) for _ in range(count)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=60) for _ in range(2 * count)]
        for process in processes:
            process.join(60)
        assert sorted(found) == sorted(2 * [place % 3 for place in range(count)])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", pytest.fail)
    sweep_runs._take_gpu(tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif("not __import__('torch').cuda.is_available()")
def test_a_run_gives_the_gpus_memory_back(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, "seeds: [0, 1, 2]\n"), {("training", "device"): "cuda"})
    left = []
    for run in sweep.runs:
        result = sweep_runs.run_result(run, tmp_path)
        assert result is not None
        assert result.done
        left.append(torch.cuda.memory_reserved())
    assert left[2] <= left[1] <= 256 << 20  # cuBLAS keeps workspaces of 66 MiB for each of two streams


def test_device_and_data_are_this_machines(tmp_path: Path) -> None:
    path = spec(tmp_path, "seeds: [0]\n")
    here = load_sweep(path).runs[0]
    there = load_sweep(path, {("training", "device"): "cuda", ("data", "root"): "/elsewhere"}).runs[0]
    assert there.config["training"]["device"] == "cuda"
    assert there.config["data"]["root"] == "/elsewhere"
    assert (there.name, there.config.digest) == (here.name, here.config.digest)


def test_a_folder_is_held_by_one_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, "seeds: [0]\n"))
    (tmp_path / "out").mkdir()
    with take_lock(tmp_path / "out"), pytest.raises(InputError, match="in use"):
        sweep_runs.train_sweep(sweep, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make folder"):
        sweep_runs.train_sweep(sweep, tmp_path / "file" / "out")


def test_a_run_that_was_stopped_before_its_first_line_is_started_again(tmp_path: Path) -> None:
    sweep = load_sweep(spec(tmp_path, "seeds: [0]\ngrid: {training.epochs: [1]}\n"))
    folder = tmp_path / "out" / sweep.runs[0].name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("half")
    (folder / ".run.json.123").write_text("half")
    assert all(result.done for result in sweep_runs.train_sweep(sweep, tmp_path / "out").values())


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("format", "luq_fp5", "luq_fp4"),
        ("hardware.profile", "b20", "b200"),
        ("model.name", "digits_cn", "digits_cnn"),
        ("data.name", "digit", "digits"),
    ],
)
def test_a_name_of_none_is_refused_before_the_first_run(
    capsys: Capture, tmp_path: Path, key: str, value: str, hint: str
) -> None:
    known = {"format": "mxfp4", "hardware.profile": "a100", "model.name": "fashion_cnn", "data.name": "fashion_mnist"}
    path = spec(tmp_path, f"seeds: [0]\ngrid:\n  {key}: [{known[key]}, {value}]\n")
    for words in (["--dry-run"], ["--out", str(tmp_path / "out")]):
        error, told = refused(capsys, "sweep", path, *words)
        assert "spec.yaml:4: unknown" in error
        assert repr(value) in error
        assert hint in told
    assert not (tmp_path / "out").exists()


def test_dry_run_and_wrong_words(capsys: Capture, tmp_path: Path) -> None:
    path = spec(tmp_path, "seeds: [0, 1]\n")
    assert [row["name"] for row in answer(capsys, "sweep", path, "--dry-run")["rows"]] == ["seed=0", "seed=1"]
    assert "2 runs" in shown(capsys, "sweep", path, "--dry-run")
    assert "--time-limit 0" in refused(capsys, "sweep", path, "--time-limit", "0")[0]
    assert "--jobs 0" in refused(capsys, "sweep", path, "--jobs", "0")[0]
    error, hint = refused(capsys, "sweep", path, "--backend", "lokky")
    assert "'lokky'" in error
    assert "loky" in hint
    assert "no such sweep" in refused(capsys, "sweep", str(tmp_path / "none.yaml"))[0]
    assert "digits_schedulers" in refused(capsys, "sweep", "digits_scheduler")[1]
    assert "no specification" in refused(capsys, "sweep")[0]
    assert "no results" in refused(capsys, "sweep", path, "--report", "--out", str(tmp_path / "none"))[0]
