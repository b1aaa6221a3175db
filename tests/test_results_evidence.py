"""What is told of results that were made up: nothing without an interval, and the right verdicts."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import results_page
from evidence import as_trained, choices, endings, findings, glance, plots, summary, sweep_tables, told
from evidence.files import Evidence, load_all, whole

from dpquant.statistics import sample
from dpquant.sweep import load_sweep
from dpquant.sweep_results import SweepResult


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
    clear = r"probe `dpquant` is better than `static` in 1 of 1 comparisons \(by \+2\.\d\d \(\+1\.\d\d to \+2\.\d\d\)"
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


def test_choices_are_held_against_schedules_that_run_as_fast() -> None:
    def accuracy(run: Any) -> float:
        """Of the choices as fast as the second target one is better than cooldown there, the others worse."""
        wobble = 1e-3 * ((run.seed * 7 + len(run.name)) % 3)
        chosen = run.settings.get("schedule.layers")
        if chosen is None:
            ahead = run.settings["schedule.scheduler"] == "cooldown"
            return (
                0.5 + wobble + (0.04 if ahead else 0.0) - (0.02 if run.settings["schedule.target_speedup"] > 1.2 else 0)
            )
        return 0.5 + wobble + (0.06 if "convs.3" in chosen and "convs.1" in chosen and len(chosen) == 4 else 0.0)

    def at(evidence: Evidence, speedup: Any) -> Evidence:
        results = {
            name: dataclasses.replace(r, speedup_peak=speedup(r.settings)) for name, r in evidence.results.items()
        }
        return Evidence(sweep=evidence.sweep, results=results, stale=())

    main, subsets = (invented(name, accuracy, 10) for name in ("cifar10_time", "cifar10_time_subsets"))
    wide = 1.31 * 0.9951  # of choices of four layers; of those of two, one is a little too fast for its target, and one
    # for all
    fast = {"convs.0": 1.15 * 1.0051, "convs.3": 1.4}
    known = {
        "cifar10_time": at(main, lambda settings: settings["schedule.target_speedup"]),
        "cifar10_time_subsets": at(
            subsets,
            lambda settings: wide if len(own := settings["schedule.layers"]) == 4 else fast.get(own[0], 1.15),
        ),
    }
    both = choices.known_choices(known, equal_time=True)
    lines = choices.every_choice_table(both, "cooldown").splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| CIFAR-10's CNN, ") for line in lines] == ["1.15x"] * 3 + ["1.31x"] * 3
    assert ["better" in line for line in lines] == [True] * 3 + [False, True, False]
    assert sum("| worse |" in line for line in lines) == 2
    said = schedules({**known, "cifar10_main": invented("cifar10_main", gains, 5)})
    clear = r"Of the 6 fixed choices that were trained and reach the same modelled speedup, `cooldown` is shown to be "
    assert re.search(clear + r"better than 4 \(4 of 6 on CIFAR-10's CNN\), by .* and worse than 2 \(by -[34]\.", said)
    best = list(choices.best_choices(both[0]))
    assert {(one.goal, len(one.layers)) for one in best} == {(1.31, 4)}  # the best near the other target is too fast
    same = {
        "cifar10_time": at(invented("cifar10_time", lambda run: 0.5 + 1e-3 * run.seed, 4), lambda settings: 1.3),
        "cifar10_time_subsets": at(
            invented("cifar10_time_subsets", lambda run: 0.5 + 1e-3 * run.seed, 4), lambda settings: 1.3
        ),
    }
    (equal,) = choices.known_choices(same, equal_time=True)
    assert list(choices.every_choice(equal, "cooldown")) == []
    assert "the same runs" in choices.every_choice_table([equal], "cooldown")
    none = choices.Choices(
        subject="", main=main, fixed=Evidence(sweep=subsets.sweep, results={}, stale=()), layers=8
    )  # fmt: skip
    assert list(choices.every_choice(none, "cooldown")) == []
    assert list(choices.best_choices(none)) == []


def test_fresh_seeds_are_told_network_by_network() -> None:
    def deep(run: Any) -> float:
        """ResNet-50 gains by it, DenseNet-121 loses."""
        gain = 0.02 if run.settings["model.name"] == "resnet50" else -0.02
        ends = run.settings["schedule.scheduler"] == "cooldown"
        return 0.4 + 1e-2 * run.seed + ends * (gain + 1e-3 * (run.seed % 2))

    said = endings.sentences({"cifar10_deep_fresh": invented("cifar10_deep_fresh", deep, 5)})
    assert len(said) == 2
    assert re.search(r"less `greedy` on ResNet-50 \+2\.04 \(.*?\) points, better;", said[0])
    assert re.search(r"less `greedy` on DenseNet-121 -1\.96 \(.*?\) points, worse\.$", said[0])
    assert re.search(
        r"is better in 1 of 2 \(by \+2\.04 \(.*?\) points on ResNet-50 on CIFAR-10 on fresh seeds\)", said[1]
    )
    assert re.search(r"worse in 1 \(by -1\.96 \(.*?\) points on DenseNet-121 on CIFAR-10 on fresh seeds\)\.$", said[1])
    few = {"cifar10_deep_fresh": invented("cifar10_deep_fresh", deep, 2)}
    assert not endings.sentences(few)


def test_what_full_precision_has_over_a_fixed_choice_is_told() -> None:
    def accuracy(run: Any) -> float:
        gain = {"full": 0.03, "cooldown": 0.01}.get(run.settings["schedule.scheduler"], 0.0)
        return 0.5 + 1e-2 * run.seed + gain + 1e-3 * (run.seed % 2) * (gain > 0)

    name = "cifar10_time_fresh"
    said = " ".join(endings.sentences({name: invented(name, accuracy, 4, speedup_peak=1.15)}))
    assert re.search(
        r"less \[convs.2, convs.5\] \+1\.05 \(.*?\) points, better \(full precision less it: \+3\.05 ", said
    )


def test_the_length_of_runs_is_told_from_two_sweeps() -> None:
    def accuracy(run: Any) -> float:
        """A point more for every epoch beyond ten, a point less for every one before."""
        ends = run.settings["schedule.scheduler"] == "cooldown"
        gain = ends * 1e-2 * (run.settings["training.epochs"] - 10)
        return 0.5 + 0.1 * (run.settings["schedule.scheduler"] == "full") + gain + 1e-3 * ((run.seed + 3 * ends) % 4)

    names = ("cifar10_resnet18", "cifar10_resnet18_epochs")
    (said,) = (
        one
        for one in endings.sentences({n: invented(n, accuracy, 4) for n in names})
        if one.startswith("Whether its gain depends on the length of the run")
    )
    gains = re.findall(r"([+-]\d+\.\d+) \([^)]*\) points after (\d+) epochs, where that loses (-\d+\.\d+)", said)
    assert gains == [
        ("-6.00", "4", "-10.00"),
        ("-2.00", "8", "-10.00"),
        ("+5.00", "15", "-10.00"),
        ("+20.00", "30", "-10.00"),
    ]
    assert said.endswith("The longest less the shortest: +26.00 (+26.00 to +26.00).")
    one = {names[0]: invented(names[0], accuracy, 4)}
    assert not any("length of the run" in text for text in endings.sentences(one))


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


def test_other_rates_and_quantizers_are_told_one_by_one() -> None:
    def accuracy(run: Any) -> float:
        gain = {"pls": 0.01, "dpquant": 0.03}.get(run.settings["schedule.scheduler"], 0.0)
        return 0.5 + gain * (1 + (run.settings.get("format") == "fp4")) + 1e-3 * run.seed

    found = {name: invented(name, accuracy, 4) for name in ("cifar10_rates", "cifar10_quantizers")}
    text = schedules(found)
    gain, more = "+1.00 (+1.00 to +1.00), +2.00 (+2.00 to +2.00)", "+2.00 (+2.00 to +2.00), +4.00 (+4.00 to +4.00)"
    told = "`pls` less `static` and `dpquant` less `pls` in points"
    assert f"depends on the learning rate, {told}: CIFAR-10, 0.5: {gain}; CIFAR-10, 2.0: {gain}." in text
    formats = f"CIFAR-10, int4: {gain}; CIFAR-10, fp4: {more}; CIFAR-10, mxfp4: {gain}."
    assert f"depends on the quantizer, {told}: {formats}" in text


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
    text = glance.glance_table(list(glance.lines({"fashion_main": evidence})), "quantized")
    assert "| Fashion-MNIST's CNN | 50 % of the layers | 8, 4, 1 | 55.8 ± 1.3 | -4.00 (-4.00 to -4.00) |" in text
    assert glance.glance_table([], "speedup") == ""
    by_budget = list(glance.lines_by_budget({"fashion_main": evidence}))
    assert [line.budgets for line in by_budget] == ["8", "4", "1"]
    assert [line.goal for line in by_budget] == ["50 to 75 % of the layers"] * 3
    shares = {"fashion_time_shares": invented("fashion_time_shares", accuracy, 3)}
    assert [line.goal for line in glance.lines_by_budget(shares)] == ["1.085x and 1.165x"] * 3
    assert not whole({"fashion_main": evidence})  # four seeds of five
    assert list(whole(shares | {"fashion_main": invented("fashion_main", accuracy, 5)})) == ["fashion_main"]
    assert [line.full.mean for line in by_budget] == pytest.approx([0.595, 0.555, 0.525])


def test_a_seed_that_lacks_a_setting_is_in_no_average() -> None:
    def accuracy(run: Any) -> float:
        """`annealed` gains a point at epsilon 8 and three at others."""
        gained = 0.01 if run.settings["privacy.target_epsilon"] == 8.0 else 0.03
        return 0.8 + (gained if run.settings["schedule.scheduler"] == "annealed" else 0.0)

    whole = invented("fashion_main", accuracy, 3)
    lacked = {
        run.name for run in whole.sweep.runs
        if run.seed == 0 and run.settings["schedule.scheduler"] == "annealed"
        and run.settings["privacy.target_epsilon"] != 8.0
    }  # fmt: skip
    results = {name: one for name, one in whole.results.items() if name not in lacked}
    assert len(results) < len(whole.results)
    values = {
        n: next(
            value
            for comparison, _, value in sweep_tables.scheduler_averages(evidence)
            if (comparison.scheduler, comparison.other) == ("annealed", "static")
        )
        for n, evidence in ((3, whole), (2, dataclasses.replace(whole, results=results)))
    }
    assert {n: value.n for n, value in values.items()} == {3: 3, 2: 2}
    assert values[2].mean == pytest.approx(values[3].mean)  # 1 + 3 + 3 points over three budgets, not 1 of one


def test_what_hangs_on_the_budget_is_told() -> None:
    def accuracy(run: Any) -> float:
        """`static` loses 4 points at epsilon 1 and 1 at others; `annealed` loses 1 at all."""
        scheduler, small = run.settings["schedule.scheduler"], run.settings["privacy.target_epsilon"] == 1.0
        lost = {"full": 0.0, "static": 0.04 if small else 0.01}.get(scheduler, 0.01)
        return 0.8 - lost + 1e-3 * ((run.seed * 5 + 3 * small + len(scheduler)) % 4)

    found = {"fashion_main": invented("fashion_main", accuracy, 5)}
    ((subject, more),) = told.by_budget(found, "full", "static")
    ((_, gained),) = told.by_budget(found, "annealed", "static")
    assert subject == "Fashion-MNIST's CNN"
    assert more.mean == pytest.approx(0.03, abs=2e-3)
    assert gained.mean == pytest.approx(0.03, abs=2e-3)
    assert "`annealed` less `static` at epsilon 1, less the same at epsilon 8, is above 0 in 1 of 1" in schedules(found)
    assert (
        "At epsilon 1 quantization costs more than at epsilon 8 in 1 of 1 [1] by share of the layers."
        in summary.paragraphs(found)[1]
    )
    assert not told.by_budget({"fashion_time": invented("fashion_time", accuracy, 5)}, "full", "static")


def test_fixed_choices_are_told_as_they_were_trained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their own arithmetic they do two points worse; `cooldown` is a point better than in full precision."""

    def accuracy(run: Any) -> float:
        return 0.8 + 0.01 * (run.settings["schedule.scheduler"] == "cooldown") + 1e-3 * (run.seed % 3)

    evidence = invented("digits_main", accuracy, 5)
    rows = [
        {"sweep": "digits_main", "run": run.name, "digest": run.config.digest, "seed": run.seed}
        | {"in_full_precision": accuracy(run), "as_trained": accuracy(run) - 0.02 - 1e-3 * (run.seed % 2)}
        for run in evidence.sweep.runs
        if run.settings["schedule.scheduler"] == "static" and run.settings["privacy.target_epsilon"] == 8.0
    ]
    stale = [row | {"digest": "another"} for row in rows if "fraction=0.5" in row["run"]]
    other = [row for row in rows if "fraction=0.5" not in row["run"]]
    monkeypatch.setattr(as_trained, "lines", lambda path: [*other, *stale])
    found = {"digits_main": evidence}
    assert [one.choice for one in as_trained.tested(found)] == ["75 % of the layers", "90 % of the layers"]
    (first, _), text = as_trained.tested(found), as_trained.sentence(found)
    assert sample([b - a for a, b in zip(first.full.values(), first.own.values(), strict=True)]).mean == pytest.approx(
        -0.0204, abs=1e-6
    )
    assert "do better than in full precision in 0 of 2 settings and worse in 2 (by -2.04 (" in text
    assert "does better than these so tested in 2 of 2 settings (by +3.04 (" in text
    table = as_trained.tested_table(found)
    assert "| the digits' CNN | 75 % of the layers | 8 | 5 | 80.1 ± 0.1 | 78.0 ± 0." in table
    assert table.count("| worse | +1.00 (+1.00 to +1.00) | +3.04 (") == 2
    assert as_trained.tested_table({}) == as_trained.sentence({}) == ""
    assert not as_trained.beside_fresh(found)


def test_choices_of_fresh_seeds_are_told_as_they_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that were planned after others had been looked at are told of alone."""

    def accuracy(run: Any) -> float:
        late = run.seed >= choices.LATER["digits_epsilon1_fresh"]
        gain = (0.01 if late else 0.05) * (run.settings["schedule.scheduler"] == "cooldown")
        return 0.8 + gain + 1e-3 * (run.seed % 3)

    evidence = invented("digits_epsilon1_fresh", accuracy, 40, speedup_peak=1.2)
    rows = [
        {"sweep": "digits_epsilon1_fresh", "run": run.name, "digest": run.config.digest, "seed": run.seed}
        | {"in_full_precision": accuracy(run), "as_trained": accuracy(run) - 0.02 - 1e-3 * (run.seed % 2)}
        for run in evidence.sweep.runs
        if run.settings["schedule.scheduler"] == "static"
    ]
    monkeypatch.setattr(as_trained, "lines", lambda path: rows)
    found = {"digits_epsilon1_fresh": evidence}
    one, *_ = known = list(as_trained.tested(found))
    assert all(one.fresh for one in known)
    assert (one.epsilon, one.subject) == (1.0, "the digits' CNN at epsilon 1 on fresh seeds")
    assert min(one.own) == choices.LATER["digits_epsilon1_fresh"]
    values = as_trained.beside_fresh(found)
    assert values
    assert all(value.mean == pytest.approx(0.0305, abs=1e-6) for _, value in values)


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
    colours = dict(re.findall(r'fill="(#[0-9a-f]{6})">(pls|annealed)</text>', svg))
    assert len(colours) == 2  # one for each, in both groups
    other = plots.forest({"one": {"annealed": sample([0.03, 0.05]), "pls": sample([0.01, 0.02])}}, "points")
    assert dict(re.findall(r'fill="(#[0-9a-f]{6})">(pls|annealed)</text>', other)) == colours  # and in all plots


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
