"""docs/results.md is what its files say, by an independent calculation too, and claims nothing without an interval."""

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import results_page  # noqa: E402
from evidence import chips, choices, findings, glance, operand_tables, plots, summary, sweep_tables  # noqa: E402
from evidence.files import Evidence, load_all  # noqa: E402
from evidence.markdown import difference  # noqa: E402

from dpquant.statistics import sample  # noqa: E402
from dpquant.sweep import load_sweep, point_key  # noqa: E402
from dpquant.sweep_results import SweepResult  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
FILES = sorted((ROOT / "benchmarks" / "results" / "sweeps").glob("*.jsonl"))


@pytest.fixture(scope="module")
def built() -> tuple[str, dict[str, str]]:
    return results_page.results()


def test_the_page_and_its_plots_are_those_of_the_files(built: tuple[str, dict[str, str]]) -> None:
    page, drawn = built
    assert page == PAGE.read_text(encoding="utf-8"), "python benchmarks/results_page.py writes it anew"
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "results").glob("*.svg")}
    assert drawn == kept


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading of the page."""
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE.read_text(), flags=re.M | re.S)
    assert found, title
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_means_and_intervals_by_another_hand(path: Path) -> None:
    """Every accuracy, interval and difference from the raw lines, with SciPy's Student t."""
    stats = pytest.importorskip("scipy.stats")
    raw: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        one: dict[str, Any] = json.loads(line)
        if one["status"] == "done":
            raw.setdefault(point_key(one["settings"]), {})[one["seed"]] = one["accuracy"]

    def interval(values: list[float]) -> tuple[float, float]:
        middle, error = statistics.fmean(values), stats.sem(values)
        if not error:  # two schedulers that chose the same layers: SciPy has no interval of no width
            return middle, middle
        low, high = stats.t.interval(0.95, len(values) - 1, middle, error)
        return float(low), float(high)

    evidence = load_all()[path.stem]
    table = {row[0]: row for row in rows(sweep_tables.TITLES[path.stem])} if "anchor" not in path.stem else {}
    checked = 0
    for point in evidence.sweep.points.values():
        values = raw.get(point_key(point))
        if not values or not table:
            continue
        row = table[f"`{sweep_tables.label(evidence, point)}`"]
        assert row[1] == str(len(values))
        assert row[2].startswith(f"{100 * statistics.fmean(values.values()):.1f}")
        assert row[4] == f"{100 * min(values.values()):.1f}"
        checked += 1
        if len(values) < 2:
            assert row[3] == "-"
            continue
        low, high = interval(list(values.values()))
        assert row[3] == f"{100 * low:.1f} to {100 * high:.1f}"
        other = evidence.sweep.compared_with(point)
        pairs = sorted(values.keys() & raw.get(point_key(other), {}).keys()) if other is not None else []
        if len(pairs) > 1 and other is not None:
            found = [values[seed] - raw[point_key(other)][seed] for seed in pairs]
            low, high = interval(found)
            assert row[5] == f"{100 * statistics.fmean(found):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    assert checked == len(table)


def invented(name: str, accuracy: Any, seeds: int, **changes: Any) -> Evidence:
    """A sweep whose runs of the first seeds all have results that ``accuracy(run)`` gives."""
    sweep = load_sweep(name)
    first = sorted({run.seed for run in sweep.runs})[:seeds]
    results = {
        run.name: SweepResult(
            name=run.name, settings=run.settings, seed=run.seed, digest=run.config.digest, status="done",
            accuracy=accuracy(run), wall_s=60.0, device="cpu", **changes,
        )
        for run in sweep.runs
        if run.seed in first
    }  # fmt: skip
    return Evidence(sweep=sweep, results=results, stale=())


GAIN = {
    "full": 0.05,
    "static": 0.0,
    "pls": 0.0,
    "dpquant": 0.02,
    "annealed": 0.0,
    "delayed": 0.0,
    "greedy": 0.0,
    "cooldown": 0.0,
}


def schedules(found: dict[str, Evidence]) -> str:
    """What is told of schedules in detail."""
    return " ".join(findings.details(found)[0][1])


def gains(run: Any) -> float:
    wobble = 1e-3 * ((run.seed * 7 + len(run.name)) % 5)
    return 0.6 + GAIN[run.settings["schedule.scheduler"]] + wobble


def test_one_seed_claims_nothing() -> None:
    found = {"cifar10_main": invented("cifar10_main", gains, 1)}
    text = schedules(found)
    assert "too few seeds" in text
    assert not re.search(r"\bis (better|worse)", text)
    table = sweep_tables.averages_table(found)
    assert table.count("not enough seeds to say") == len(list(sweep_tables.scheduler_averages(found["cifar10_main"])))
    assert "+2.0" not in table


def test_a_clear_difference_is_said_with_its_interval() -> None:
    text = schedules({"cifar10_main": invented("cifar10_main", gains, 5)})
    clear = r"dpquant with the private probe less static is better: \+2\.\d\d \(\+1\.\d\d to \+2\.\d\d\)"
    assert re.search(clear, text)
    assert "less fixed at random (static) is" not in text


def test_results_of_another_configuration_are_not_used(tmp_path: Path) -> None:
    evidence = invented("digits_main", gains, 2)
    lines = [dataclasses.replace(r, digest="0" * 16).to_json() for r in list(evidence.results.values())[:3]]
    lines += [r.to_json() for r in list(evidence.results.values())[3:]]
    (tmp_path / "digits_main.jsonl").write_text("\n".join(lines) + "\n")
    found = load_all(tmp_path)
    assert len(found["digits_main"].stale) == 3
    assert any("3 results of an earlier configuration are not used" in said for said in findings.unfinished(found))


def test_the_best_fixed_choice_is_judged_on_other_seeds() -> None:
    def lucky(run: Any) -> float:
        """One choice is best on the seeds that choose, another on those that judge."""
        early = run.seed < 2
        luckiest = ["conv1", "conv2", "fc1"] if early else ["conv2", "fc1", "fc2"]
        return 0.8 + 0.1 * (run.settings["schedule.layers"] == luckiest)

    found = {n: invented(n, f, 5) for n, f in (("fashion_main", gains), ("fashion_subsets", lucky))}
    table = choices.best_static(choices.known_choices(found, equal_time=False))
    three = [line for line in table.splitlines() if line.startswith("| Fashion-MNIST's CNN, 3 of 4 layers")]
    assert len(three) == len(table.splitlines()) - 2 > 0
    assert all("conv1, conv2, fc1 | 80.0 ± 0.0" in line for line in three)


def test_annealed_is_held_against_every_fixed_choice() -> None:
    def accuracy(run: Any) -> float:
        choice = run.settings.get("schedule.layers")
        return 0.8 + 1e-3 * run.seed + (0.05 if choice == ["conv2", "fc1", "fc2"] else 0.0)

    def scheduled(run: Any) -> float:
        wobble = 1e-3 * (run.seed % 2)
        return accuracy(run) + (0.02 + wobble if run.settings["schedule.scheduler"] == "annealed" else 0.0)

    speedups = {"speedup_peak": 1.2}
    known = {
        f"fashion_{n}": invented(f"fashion_{n}", f, 5, **speedups)
        for n, f in (("main", scheduled), ("subsets", accuracy))
    }
    table = choices.every_choice_table(choices.known_choices(known, equal_time=False), "annealed")
    found = table.splitlines()[2:]
    assert len(found) == 4
    assert sum("| better |" in line for line in found) == 3
    assert sum("conv2, fc1, fc2" in line and "| worse |" in line for line in found) == 1
    assert all(line.count("1.20x") == 2 for line in found)
    said = schedules(known)
    assert (
        "Of the 4 fixed choices of as many layers that were trained, `annealed` is shown to be better than 3 " in said
    )
    assert re.search(r"\(3 of 4 on Fashion-MNIST's CNN\), by \+2\.\d\d .* and worse than 1 \(by -2\.\d\d", said)


def test_choices_are_held_against_the_highest_speedup_that_they_reach() -> None:
    def accuracy(run: Any) -> float:
        """Of two choices that reach the second target one is better than cooldown there, the other worse."""
        wobble = 1e-3 * ((run.seed * 7 + len(run.name)) % 3)
        chosen = run.settings.get("schedule.layers")
        if chosen is None:
            ahead = run.settings["schedule.scheduler"] == "cooldown"
            return (
                0.5 + wobble + (0.04 if ahead else 0.0) - (0.02 if run.settings["schedule.target_speedup"] > 1.2 else 0)
            )
        return 0.5 + wobble + (0.06 if "convs.3" in chosen and "convs.1" in chosen and len(chosen) == 4 else 0.0)

    main, subsets = (invented(n, accuracy, 4, speedup_peak=1.2) for n in ("cifar10_time", "cifar10_time_subsets"))
    fast = {n: dataclasses.replace(r, speedup_peak=1.31) for n, r in subsets.results.items() if n.count("convs") == 4}
    known = {
        "cifar10_time": main,
        "cifar10_time_subsets": Evidence(sweep=subsets.sweep, results={**subsets.results, **fast}, stale=()),
    }
    both = choices.known_choices(known, equal_time=True)
    lines = choices.every_choice_table(both, "cooldown").splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| CIFAR-10's CNN, ") for line in lines] == ["1.15x"] * 5 + ["1.31x"] * 3
    assert ["better" in line for line in lines] == [True] * 5 + [False, True, False]
    assert sum("| worse |" in line for line in lines) == 2
    said = schedules({**known, "cifar10_main": invented("cifar10_main", gains, 5)})
    clear = r"Of the 8 fixed choices that were trained and reach the same modelled speedup, `cooldown` is shown to be "
    assert re.search(clear + r"better than 6 \(6 of 8 on CIFAR-10's CNN\), by .* and worse than 2 \(by -[34]\.", said)
    best = list(choices.best_choices(both[0]))
    assert {(one.goal, len(one.layers)) for one in best} == {(1.15, 2), (1.31, 4)}
    slow = {n: dataclasses.replace(r, speedup_peak=1.1) for n, r in subsets.results.items()}
    none = choices.Choices(
        subject="", main=main, fixed=Evidence(sweep=subsets.sweep, results=slow, stale=()), layers=8
    )  # fmt: skip
    assert list(choices.every_choice(none, "cooldown")) == []
    assert list(choices.best_choices(none)) == []


def test_long_lists_of_layers_are_folded() -> None:
    assert choices.folded(["convs.0", "fc1"]) == "convs.0, fc1"
    deep = [
        "conv1",
        *(f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)),
        "layer2.0.downsample.0",
    ]
    assert choices.folded(deep) == (
        "10: conv1, layer1 (0.conv1, 0.conv2, 1.conv1, 1.conv2), "
        "layer2 (0.conv1, 0.conv2, 1.conv1, 1.conv2, 0.downsample.0)"
    )


def raw(name: str) -> list[dict[str, Any]]:
    """The lines of a sweep's results; none where it was not trained."""
    path = ROOT / "benchmarks" / "results" / "sweeps" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of(lines: list[dict[str, Any]], **settings: Any) -> dict[int, float]:
    """Seed -> accuracy of the lines with these settings, named by the last part of their keys."""
    return {
        line["seed"]: line["accuracy"]
        for line in lines
        if settings.items() <= {k.split(".")[-1]: v for k, v in line["settings"].items()}.items()
    }


def by_hand(values: dict[int, float], others: dict[int, float]) -> tuple[str, str]:
    """A paired difference as the page writes it and its verdict, with SciPy's Student t."""
    stats = pytest.importorskip("scipy.stats")
    pairs = [100 * (values[seed] - others[seed]) for seed in sorted(values.keys() & others.keys())]
    middle, half = statistics.fmean(pairs), stats.sem(pairs) * stats.t.ppf(0.975, len(pairs) - 1)
    verdict = "better" if middle > half else "worse" if middle < -half else "no difference shown"
    return f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})", verdict


def found_said() -> str:
    """What the page tells in detail, in one line."""
    return " ".join(PAGE.read_text().split("## In detail")[1].split("## Full precision against")[0].split())


EQUAL_TIME = {
    "fashion_time": "Fashion-MNIST's CNN",
    "cifar10_time": "CIFAR-10's CNN",
    "cifar10_resnet18": "ResNet-18 on CIFAR-10",
    "cifar10_time_fresh": "CIFAR-10's CNN on fresh seeds",
    "cifar10_resnet18_fresh": "ResNet-18 on CIFAR-10 on fresh seeds",
}


def reached(name: str) -> list[tuple[float, list[str], dict[int, float]]]:
    """Target, layers and accuracies of the fixed choices that are held against a sweep's schedulers."""
    main, subsets = raw(name), raw(name if name.endswith("_fresh") else f"{name}_subsets")
    targets = sorted({one for line in main if (one := line["settings"]["schedule.target_speedup"]) is not None})
    choices: dict[str, tuple[float, list[str], dict[int, float]]] = {}
    for line in subsets:
        if (layers := line["settings"]["schedule.layers"]) is not None:
            target = max(target for target in targets if target <= line["speedup_peak"])
            choices.setdefault(str(layers), (target, layers, {}))[2][line["seed"]] = line["accuracy"]
    return list(choices.values())


def test_choices_of_the_same_speedup_by_another_hand() -> None:
    section = PAGE.read_text().split("### Every fixed choice that reaches the same speedup\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    start = next((i for i, line in enumerate(lines) if "cooldown less choice" in line), len(lines))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    shown = {(row[0], row[1]): dict(zip(cells[0], row, strict=True)) | {"": row[8]} for row in cells[2:]}
    verdicts: dict[str, list[str]] = {}
    for name, subject in EQUAL_TIME.items():
        for target, layers, own in reached(name):
            main = [line for line in raw(name) if line["settings"].get("schedule.layers") is None]
            if not of(main, scheduler="cooldown", target_speedup=target):
                continue
            row = shown.pop((f"{subject}, {target:g}x", choices.folded(layers)))
            assert row["its accuracy, %"].startswith(f"{100 * statistics.fmean(own.values()):.1f} ")
            for title in (title for title in row if " less choice" in title):
                theirs = of(main, scheduler=title.split()[0], target_speedup=target)
                assert row[title] == (by_hand(theirs, own)[0] if theirs else ""), (layers, title)
            difference, said = by_hand(of(main, scheduler="cooldown", target_speedup=target), own)
            assert row[""] == said
            if name.endswith("_fresh"):
                assert f"less [{choices.folded(layers)}] {difference} points, {said}" in found_said()
            else:
                verdicts.setdefault(subject, []).append(said)
    assert not shown
    known = [one for many in verdicts.values() for one in many]
    parts = ", ".join(f"{many.count('better')} of {len(many)} on {subject}" for subject, many in verdicts.items())
    counted = re.search(
        r"Of the (\d+) fixed choices that were trained and reach the same modelled speedup, `cooldown` is shown to be "
        r"better than (\d+) \((.*?)\).*? and worse than (\d+).*?(?:; for (\d+) no difference|\.) ",
        found_said(),
    )
    assert bool(counted) == bool(known)
    if counted:
        found = (len(known), known.count("better"), parts, known.count("worse"), known.count("no difference shown"))
        assert (int(counted[1]), int(counted[2]), counted[3], int(counted[4]), int(counted[5] or 0)) == found


def averaged(name: str, scheduler: str, other: str) -> tuple[str, str] | None:
    """One scheduler less another, each seed's mean over the settings of a sweep that both have."""
    known: dict[str, dict[tuple[str, int], float]] = {}
    for line in raw(name):
        settings = dict(line["settings"])
        estimator, kind = settings.pop("analysis.estimator", "released"), settings.pop("schedule.scheduler")
        if line["status"] == "done" and (kind != "dpquant" or estimator == "released"):
            known.setdefault(kind, {})[point_key(settings), line["seed"]] = line["accuracy"]
    by_seed: dict[int, list[float]] = {}
    theirs = known.get(other, {})
    for (point, seed), accuracy in known.get(scheduler, {}).items():
        if (point, seed) in theirs:
            by_seed.setdefault(seed, []).append(accuracy - theirs[point, seed])
    differences = {seed: statistics.fmean(values) for seed, values in by_seed.items()}
    return by_hand(differences, dict.fromkeys(differences, 0.0)) if len(differences) >= 3 else None


@pytest.mark.parametrize(("scheduler", "other"), [("pls", "static"), ("dpquant", "static"), ("dpquant", "pls")])
def test_in_how_many_comparisons_by_another_hand(scheduler: str, other: str) -> None:
    values = [one for name in glance.SUBJECTS if (one := averaged(name, scheduler, other)) is not None]
    better, worse = ([text for text, verdict in values if verdict == word] for word in ("better", "worse"))
    name = "one fixed random choice (`static`)" if scheduler == "pls" else f"`{other}`"
    said = found_said().split("Changing *when*")[0]
    counted = re.search(rf"better than {re.escape(name)} in (\d+) of (\d+) comparisons(.*?) and worse in (\d+)", said)
    assert counted
    assert (int(counted[1]), int(counted[2]), int(counted[4])) == (len(better), len(values), len(worse))
    assert all(text in better for text in re.findall(r"[+-]\S+ \(\S+ to \S+\)(?= points)", counted[3]))


def test_preference_accumulation_and_operands_by_another_hand() -> None:
    said, beta = found_said(), raw("cifar10_beta")
    none = of(beta, beta=0)
    strengths = sorted({line["settings"]["schedule.beta"] for line in beta} - {0})
    found = [by_hand(of(beta, beta=strength), none) for strength in strengths]
    better, worse = (sum(verdict == word for _, verdict in found) for word in ("better", "worse"))
    text = ", ".join(f"{one} points at {strength:g}" for (one, _), strength in zip(found, strengths, strict=True))
    assert (
        f"better than none (`beta` 0) at {better} of {len(strengths)} strengths and worse at {worse}: {text}." in said
    )
    sums = raw("fashion_accumulate")
    for fmt, chip in (("fp8", "h200"), ("nvfp4", "b200")):
        one, verdict = by_hand(
            *(of(sums, format=fmt, accumulate=how) for how in ("hardware", "float32")),
        )
        assert f"{one} points in {fmt} on {chip} ({verdict})" in said
    for task, name in operand_tables.TASKS.items():
        path = ROOT / "benchmarks" / "results" / f"operands_{task}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        luq = {
            which: {x["seed"]: x["accuracy"] for x in lines if (x["format"], x["operands"]) == ("luq_fp4", which)}
            for which in ("forward", "backward", "both", "both, per tensor")
        }
        one, verdict = by_hand(luq["forward"], luq["backward"])
        assert f"{one} points on {name} ({verdict})" in said
        one, verdict = by_hand(luq["both, per tensor"], luq["both"])
        assert f"{one} on {name} ({verdict})" in said


def test_the_summary_counts_as_the_details_do() -> None:
    text = " ".join(PAGE.read_text().split("## What was found")[1].split("## At a glance")[0].split())
    for short, long in (
        (r"fixed random choice \(`static`\) in (\d+) of (\d+)", r"random choice \(`static`\) in (\d+) of (\d+)"),
        (r"does better than `pls` in (\d+) of (\d+)", r"better than `pls` in (\d+) of (\d+)"),
        (r"as many layers in all, in (\d+) of (\d+)", r"\(`annealed`\) is better than `static` in (\d+) of (\d+)"),
    ):
        told, counted = re.search(short, text), re.search(long, found_said())
        assert told
        assert counted
        assert told.groups() == counted.groups()
    told = re.search(r"does better than (\d+) of the (\d+) fixed choices .*?, and worse than (\d+)", text)
    counted = re.search(
        r"reach the same modelled speedup, `cooldown` .*? better than (\d+) .*? and worse than (\d+)", found_said()
    )
    assert bool(told) == bool(counted)
    assert not (told and counted) or (told[1], told[3]) == counted.groups()
    for path, fmt in (("luq_fp4", "LUQ-FP4"), ("nvfp4", "NVFP4")):
        lines = raw("cifar10_formats")
        lost, _ = by_hand(of(lines, format=path, scheduler="static", fraction=1.0), of(lines, scheduler="full"))
        assert f"{fmt} {lost}" in text


def test_the_summary_of_few_seeds_claims_nothing() -> None:
    text = " ".join(summary.paragraphs({"cifar10_main": invented("cifar10_main", gains, 2)})[:2])
    assert "too few seeds" in text
    assert "better" not in text


def test_what_helps_is_said_only_where_it_does() -> None:
    def when(run: Any) -> float:
        late = run.settings["schedule.scheduler"] in ("annealed", "cooldown")
        return 0.6 + 0.03 * late + 1e-3 * ((run.seed * 7 + len(run.name)) % 5)

    names = ("cifar10_main", "cifar10_time", "words_main")
    said = schedules({name: invented(name, when, 5) for name in names})
    assert "Changing *which* layers are quantized is not shown to help" in said
    assert "Changing *when* helps" in said
    assert re.search(r"`static` in 2 of 2 comparisons \(by \+[23]\.\d\d .* on .* to \+3\.\d\d", said)
    assert re.search(r"`static` in 1 of 1 and worse in 0: \+[23]\.\d\d .* \(less `greedy` \+[23]\.", said)
    flat = {name: invented(name, lambda run: 0.6 + 1e-3 * ((run.seed * 5 + len(run.name)) % 7), 5) for name in names}
    said = schedules(flat)
    assert "Changing *when* is not shown to help" in said
    two = {name: invented(name, when, 2) for name in names}
    assert "too few seeds" in schedules(two)


def test_the_glance_holds_schedules_to_full_precision_on_what_all_of_them_have() -> None:
    def accuracy(run: Any) -> float:
        budget = run.settings["privacy.target_epsilon"] / 100
        return 0.5 + budget + 0.01 * run.seed - 0.04 * (run.settings["schedule.scheduler"] != "full")

    evidence = invented("fashion_main", accuracy, 4)
    partial = {n: r for n, r in evidence.results.items() if "scheduler=pls" not in n or "target_epsilon=8.0" in n}
    (half, *_), known = (list(glance.lines({"fashion_main": e})) for e in (
        Evidence(sweep=evidence.sweep, results=partial, stale=()), evidence
    ))  # fmt: skip
    assert half.budgets == "8"  # the other two have no pls
    assert known[0].budgets == "8, 4, 1"
    assert known[0].full.mean == pytest.approx(0.5 + 13 / 300 + 0.015)
    assert set(known[0].lost) == {"static", "pls", "dpquant", "annealed", "cooldown"}
    assert all(value.mean == pytest.approx(-0.04) for value in known[0].lost.values())
    cut = {n: r for n, r in evidence.results.items() if r.seed < 3 or "target_epsilon=8.0" in n}
    (line, *_) = glance.lines({"fashion_main": Evidence(sweep=evidence.sweep, results=cut, stale=())})
    assert line.budgets == "8, 4, 1"
    assert line.full.n == line.lost["static"].n == 3  # the fourth seed has one budget of three
    assert line.full.mean == pytest.approx(0.5 + 13 / 300 + 0.01)
    text = glance.glance_table({"fashion_main": evidence}, equal_time=False)
    assert "| Fashion-MNIST's CNN | 50 % of the layers | 8, 4, 1 | 55.8 ± 1.3 | -4.00 (-4.00 to -4.00) |" in text
    assert glance.glance_table({"fashion_main": evidence}, equal_time=True) == ""


def test_what_readme_and_guides_quote_is_what_was_found() -> None:
    def lost(value: Any) -> str:
        return f"{-100 * value.mean:.1f} ({-100 * value.high:.1f} to {-100 * value.low:.1f})"

    found = load_all()
    readme, guides = (" ".join((ROOT / path).read_text().split()) for path in ("README.md", "docs/guides.md"))
    (fresh,) = (
        one for one in choices.known_choices(found, equal_time=True) if one.subject == "CIFAR-10's CNN on fresh seeds"
    )
    first, second = (difference(value) for *_, value in choices.every_choice(fresh, "cooldown"))
    assert f"CIFAR-10's CNN gained {first} points by it at 1.15x and {second} at 1.31x." in readme
    formats = found["cifar10_formats"]
    full = formats.points(scheduler="full")[0]
    nvfp4, luq = (
        lost(formats.compared(formats.points(scheduler="static", fraction=1.0, format=name)[0], full))
        for name in ("nvfp4", "luq_fp4")
    )
    assert f"NVFP4 loses {nvfp4} points where LUQ-FP4 loses {luq}." in guides


def test_device_hours_count_time_shared_once() -> None:
    runs = list(invented("digits_schedulers", gains, 3).results.values())[:3]
    ends = (3600.0, 3700.0, 9000.0)  # the first two overlap
    timed = [dataclasses.replace(r, wall_s=3600.0, ended_s=end) for r, end in zip(runs, ends, strict=True)]
    assert results_page.busy_hours(timed) == f"{(3700 + 3600) / 3600:.2f}"
    assert results_page.busy_hours(runs) == "-"


def test_failures_are_told() -> None:
    evidence = invented("digits_schedulers", gains, 3)
    name = next(iter(evidence.results))
    failed = dataclasses.replace(evidence.results[name], status="failed", error="MemoryError: no memory", accuracy=None)
    said = findings.unfinished({"digits_schedulers": Evidence(
        sweep=evidence.sweep, results={**evidence.results, name: failed}, stale=()
    )})  # fmt: skip
    assert any("1 runs failed: MemoryError: no memory" in line for line in said)


def test_plots_show_interval_and_mean() -> None:
    panel = plots.Panel(title="a < b", places=["0.5"], series={"static": {"0.5": sample([0.1, 0.2, 0.3])}})
    svg = plots.dots([panel], "accuracy")
    assert svg.count("<circle") == 2  # the dot and the legend's
    assert 'stroke-width="1.4"' in svg
    assert "a &lt; b" in svg


def test_a_forest_has_a_line_for_each_difference() -> None:
    groups = {"one": {"pls": sample([0.01, 0.02]), "annealed": sample([0.03, 0.05])}, "two": {"pls": sample([-0.1, 0])}}
    svg = plots.forest(groups, "points")
    assert svg.count("<circle") == 3
    assert svg.count('stroke-width="1.4"') == 3
    assert svg.count('stroke="#1f2328"') == 1  # the rule at 0
    assert svg.count(f'fill="{plots.COLOURS[0]}">pls</text>') == 2


def test_a_scatter_puts_speed_across_and_accuracy_up() -> None:
    near, far = sample([-0.01, -0.02]), sample([-0.03, -0.05])
    clouds = [plots.Cloud(title="peak", points=[("a", 1.5, near), ("b", 2.0, far)])]
    svg = plots.scatter(clouds, "speedup", "points")
    dots = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', svg)
    assert len(dots) == 4  # two of the legend
    (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in dots[:2])
    assert x1 < x2
    assert y1 < y2  # less is further down
    assert svg.count('stroke="#1f2328"') == 2  # the rules at 0 and at 1


def test_trades_on_chips_are_the_cost_models_and_the_runs() -> None:
    found = load_all()
    known = list(chips.trades(found))
    one = next(t for t in known if (t.sweep, t.chip, t.format, t.basis) == ("cifar10_formats", "b200", "nvfp4", "peak"))
    evidence = found["cifar10_formats"]
    here = evidence.points(scheduler="static", fraction=1.0, format="nvfp4")[0]
    assert one.lost == evidence.compared(here, evidence.points(scheduler="full")[0])
    results = [r.speedup_peak for r in evidence.finished(here)]
    assert one.speedup == pytest.approx(results[0], rel=1e-6)  # as the runs' own model had it
