"""docs/results.md is what its files say, by an independent calculation too."""

import functools
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
from evidence import as_trained, chips, choices, endings, glance, operand_tables, sweep_tables, told  # noqa: E402
from evidence.files import load_all, whole  # noqa: E402
from evidence.markdown import difference  # noqa: E402

from dpquant.sweep import load_sweep, point_key  # noqa: E402

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


def raw(name: str) -> list[dict[str, Any]]:
    """The lines of a sweep's results; none where it was not trained, or not all of it."""
    path = ROOT / "benchmarks" / "results" / "sweeps" / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines if len(lines) == planned(name) else []


@functools.cache
def planned(name: str) -> int:
    """How many runs a sweep has."""
    return len(load_sweep(name).runs)


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
    pairs = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    middle, half = statistics.fmean(pairs), stats.sem(pairs) * stats.t.ppf(0.975, len(pairs) - 1)
    middle, half = 100 * middle, 100 * half  # in this order: halves of a hundredth occur, and round by the last bit
    verdict = "better" if middle > half else "worse" if middle < -half else "no difference shown"
    verdict = verdict if any(pairs) else "the same runs"
    return f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})", verdict


def found_said() -> str:
    """What the page tells in detail, in one line."""
    return " ".join(PAGE.read_text().split("## In detail")[1].split("## Full precision against")[0].split())


EQUAL_TIME = {
    "fashion_time": "Fashion-MNIST's CNN",
    "cifar10_time": "CIFAR-10's CNN",
    "digits_time": "the digits' CNN",
    "cifar10_resnet18": "ResNet-18 on CIFAR-10",
    "cifar10_time_fresh": "CIFAR-10's CNN on fresh seeds",
    "cifar10_epsilon1_fresh": "CIFAR-10's CNN at epsilon 1 on fresh seeds",
    "cifar10_resnet18_fresh": "ResNet-18 on CIFAR-10 on fresh seeds",
    "cifar10_resnet18_epsilon1_fresh": "ResNet-18 on CIFAR-10 at epsilon 1 on fresh seeds",
    "digits_time_fresh": "the digits' CNN on fresh seeds",
    "digits_epsilon1_fresh": "the digits' CNN at epsilon 1 on fresh seeds",
    "fashion_time_fresh": "Fashion-MNIST's CNN on fresh seeds",
    "fashion_epsilon1_fresh": "Fashion-MNIST's CNN at epsilon 1 on fresh seeds",
}


LATER = {"cifar10_resnet18_fresh": 20, "digits_time_fresh": 300, "digits_epsilon1_fresh": 300}
"""Fresh seeds that were planned after those before had been looked at."""


def reached(name: str) -> list[tuple[dict[str, float], list[str], dict[int, float]]]:
    """Targets, layers and accuracies of the fixed choices: scheduler -> the target at which it runs as fast."""
    main, subsets = raw(name), raw(name if name.endswith("_fresh") else f"{name}_subsets")
    scheduled = [line for line in main if line["settings"].get("schedule.layers") is None]
    known: dict[tuple[str, float], list[float]] = {}
    for line in scheduled:
        aim = line["settings"]["schedule.scheduler"], line["settings"]["schedule.target_speedup"]
        known.setdefault(aim, []).append(line["speedup_peak"])
    speeds = {aim: statistics.fmean(values) for aim, values in known.items()}
    choices: dict[str, tuple[dict[str, float], list[str], dict[int, float]]] = {}
    for line in subsets:
        if (layers := line["settings"]["schedule.layers"]) is not None:
            apart = {aimed: abs(own / line["speedup_peak"] - 1) for aimed, own in speeds.items()}
            fast = dict(
                sorted((aimed for aimed in apart if apart[aimed] <= 0.005), key=apart.__getitem__, reverse=True)
            )
            choices.setdefault(str(layers), (fast, layers, {}))[2][line["seed"]] = line["accuracy"]
    return list(choices.values())


def test_choices_of_the_same_speedup_by_another_hand() -> None:
    section = PAGE.read_text().split("### Every fixed choice that reaches the same speedup\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    start = next((i for i, line in enumerate(lines) if "cooldown less choice" in line), len(lines))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    shown = {(row[0], row[1]): dict(zip(cells[0], row, strict=True)) | {"": row[8]} for row in cells[2:]}
    verdicts: dict[str, list[str]] = {}
    fresh: list[tuple[str, str]] = []  # of cooldown and of full precision on the same choice
    for name, subject in EQUAL_TIME.items():
        for fast, layers, own in reached(name):
            main = [line for line in raw(name) if line["settings"].get("schedule.layers") is None]
            if (target := fast.get("cooldown")) is None:
                continue
            row = shown.pop((f"{subject}, {target:g}x", choices.folded(layers)))
            assert row["its accuracy, %"].startswith(f"{100 * statistics.fmean(own.values()):.1f} ")
            for title in (title for title in row if " less choice" in title):
                scheduler = title.split()[0]
                theirs = of(main, scheduler=scheduler, target_speedup=fast[scheduler]) if scheduler in fast else {}
                assert row[title] == (by_hand(theirs, own)[0] if theirs else ""), (layers, title)
            difference, said = by_hand(of(main, scheduler="cooldown", target_speedup=target), own)
            assert row[""] == said
            if said == "the same runs":  # they show nothing, and are not counted
                continue
            if name.endswith("_fresh"):
                assert f"less [{choices.folded(layers)}] {difference} points, {said}" in found_said()
                full = by_hand(of(main, scheduler="full"), own)[1]
                late = {seed: value for seed, value in own.items() if seed >= LATER.get(name, 0)}
                if name in LATER and late:
                    difference, said = by_hand(of(main, scheduler="cooldown", target_speedup=target), late)
                    own_part = found_said().split(f"On {subject}, all of them, ")[1]
                    alone = own_part.split(f"On its seeds from {LATER[name]} on alone, ")[1].split(" - ")[0]
                    assert f"less [{choices.folded(layers)}] {difference} points, {said}" in alone
                if late:
                    fresh.append((said, full))
            else:
                verdicts.setdefault(subject, []).append(said)
    assert not shown
    left = [room for said, room in fresh if said == "no difference shown"]
    verdicts_fresh = [said for said, _ in fresh]
    counts = rf"better than {verdicts_fresh.count('better')} of {len(fresh)} (?:\[\d+\] )?fixed choices of the same "
    counts += "modelled time, and worse than "
    counts += f"{verdicts_fresh.count('worse')}"
    if left:
        none = len(left) - left.count("better")
        counts += rf" \(for the other {len(left)} no difference is shown"
        counts += "; full precision less th" if len(left) > none else ""
        counts += f".*?; in {none} of them quantizing costs nothing" if none else r"[^;]*\)"
    assert re.search(rf"On seeds that nothing was chosen on it does {counts}", " ".join(PAGE.read_text().split()))
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


def gained(name: str, scheduler: str, other: str, estimator: str = "released") -> dict[int, float]:
    """One scheduler less another, each seed's mean over the settings of a sweep that both have."""
    known: dict[str, dict[tuple[str, int], float]] = {}
    for line in raw(name):
        settings = dict(line["settings"])
        own, kind = settings.pop("analysis.estimator", "released"), settings.pop("schedule.scheduler")
        if line["status"] == "done" and (kind != "dpquant" or own == estimator):
            known.setdefault(kind, {})[point_key(settings), line["seed"]] = line["accuracy"]
    by_seed: dict[int, list[float]] = {}
    theirs = known.get(other, {})
    for (point, seed), accuracy in known.get(scheduler, {}).items():
        if (point, seed) in theirs:
            by_seed.setdefault(seed, []).append(accuracy - theirs[point, seed])
    return {seed: statistics.fmean(values) for seed, values in by_seed.items()}


def compared(scheduler: str, other: str, estimator: str = "released") -> tuple[int, list[str], list[str], int]:
    """How many comparisons there are; those better and worse; of how many Holm's correction leaves better."""
    stats = pytest.importorskip("scipy.stats")
    known = [own for name in glance.SUBJECTS if len(own := gained(name, scheduler, other, estimator)) >= 3]
    found = [by_hand(own, dict.fromkeys(own, 0.0)) for own in known]
    better, worse = ([text for text, verdict in found if verdict == word] for word in ("better", "worse"))
    tested = sorted((stats.ttest_1samp([*own.values()], 0).pvalue, statistics.fmean(own.values())) for own in known)
    left = 0
    for i, (p, mean) in enumerate(tested):
        if p * (len(tested) - i) > 0.05:
            break
        left += mean > 0
    return len(known), better, worse, left


@pytest.mark.parametrize(("scheduler", "other"), [("pls", "static"), ("dpquant", "static"), ("dpquant", "pls")])
def test_in_how_many_comparisons_by_another_hand(scheduler: str, other: str) -> None:
    count, better, worse, left = compared(scheduler, other)
    name = "one fixed random choice (`static`)" if scheduler == "pls" else f"`{other}`"
    said = found_said().split("Changing *when*")[0]
    counted = re.search(
        rf"better than {re.escape(name)} in (\d+) of (\d+) comparisons(.*?) and worse in (\d+)"
        r".*?, after Holm's correction in (\d+)",
        said,
    )
    assert counted
    assert (*map(int, counted.group(1, 2, 4, 5)),) == (len(better), count, len(worse), left)
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
    draws = raw("digits_draw")
    for scheduler in ("pls", "dpquant"):
        one, verdict = by_hand(
            of(draws, scheduler=scheduler, fraction=None),
            of(draws, scheduler=scheduler, fraction=0.75),
        )
        assert f"{one} points for `{scheduler}` on the digits ({verdict})" in said
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
    holm = r" of (\d+) comparisons.*?, after Holm's correction in (\d+)"
    for short, long in (
        (
            r"for the whole run \(`static`\) in (\d+) of (\d+) \[(\d+)\]",
            r"random choice \(`static`\) in (\d+)" + holm,
        ),
        (r"releases anyway better in (\d+) of (\d+) \[(\d+)\]", r"better than `pls` in (\d+)" + holm),
    ):
        short_one, counted = re.search(short, text), re.search(long, found_said())
        assert short_one
        assert counted
        assert short_one.groups() == counted.groups()
    count, better, worse, _ = compared("dpquant", "pls", "probe")
    measured = f"the private measurement of the paper in {len(better)} of {count} and worse in {len(worse)} of {count}"
    assert measured in text
    assert f"`dpquant` with it is better than `pls` in {len(better)} of {count} comparisons" in found_said()
    assert all(one in found_said() for one in worse)
    ended = {
        name: own for name in glance.SUBJECTS if len(own := gained(name, "cooldown", "greedy")) >= 3
        and "schedule.target_speedup" in raw(name)[0]["settings"]
    }  # fmt: skip
    words = {name: by_hand(own, dict.fromkeys(own, 0.0))[1] for name, own in ended.items() if "deep" not in name}
    for kind, names in (
        ("in LUQ-FP4 on smaller networks", [name for name in words if not name.endswith("nvfp4")]),
        ("in NVFP4", [name for name in words if name.endswith("nvfp4")]),
    ):
        better = sum(words[name] == "better" for name in names)
        deep = 2 * (kind == "in NVFP4")  # ResNet-50 and DenseNet-121, in one sweep
        assert re.search(rf"{better} of {len(names) + deep} (\[\d+\] )?{kind}", text), (kind, better, len(names))
    for path, fmt in (("luq_fp4", "LUQ-FP4"), ("nvfp4", "NVFP4")):
        lines = raw("cifar10_formats")
        lost, _ = by_hand(of(lines, format=path, scheduler="static", fraction=1.0), of(lines, scheduler="full"))
        assert f"{fmt} {lost}" in text


def claimed(said: str) -> tuple[str, str]:
    """What was found of a claim, and the verdict."""
    lines = PAGE.read_text().split("## What was said of the method before")[1].split("\n## ")[0].splitlines()
    (line,) = (line for line in lines if said in line)
    _, found, verdict = (cell.strip() for cell in line.strip("|").split(" | "))
    return found, verdict


def test_claims_by_another_hand() -> None:
    places = {"released": "by gradients that are released anyway", "probe": "by the private measurement"}
    for estimator, place in places.items():
        count, better, worse, left = compared("dpquant", "pls", estimator)
        found, verdict = claimed(f"insensitive {place}")
        assert found.startswith(f"Better in {len(better)} of {count} comparisons")
        assert f"worse in {len(worse)}; after Holm's correction in {left} and " in found
        assert all(text in found for text in better)
        harmless = found.endswith("and 0.")
        assert verdict == ("yes" if left == count else "in places" if left else "not shown" if harmless else "no")

    goals = ("fraction", "target_speedup")

    def lost(lines: list[dict[str, Any]], **settings: Any) -> dict[int, float]:
        full = of(lines, scheduler="full", **{k: v for k, v in settings.items() if k not in goals})
        return {s: a - full[s] for s, a in of(lines, scheduler="static", **settings).items() if s in full}

    found, _ = claimed("costs private training more")
    private, other = raw("cifar10_main"), raw("cifar10_nonprivate")
    for share in {line["settings"]["schedule.fraction"] for line in other}:
        more, _ = by_hand(lost(private, fraction=share, target_epsilon=8.0), lost(other, fraction=share))
        assert f"the one less the other {more}." in found
    found, _ = claimed("the stricter the privacy")
    more_by_name = {}
    for name in glance.SUBJECTS:
        lines = raw(name)
        if not {1.0, 8.0} <= {one["settings"].get("privacy.target_epsilon") for one in lines}:
            continue
        fixed = [one["settings"] for one in lines if one["settings"]["schedule.scheduler"] == "static"]
        aims = {tuple((key, one[f"schedule.{key}"]) for key in goals if f"schedule.{key}" in one) for one in fixed}
        mean = {}
        for epsilon in (1.0, 8.0):
            known = [lost(lines, target_epsilon=epsilon, **dict(aim)) for aim in aims]
            seeds = set.intersection(*map(set, known))
            mean[epsilon] = {seed: statistics.fmean(own[seed] for own in known) for seed in seeds}
        more_by_name[name] = by_hand(mean[8.0], mean[1.0])
    assert ", ".join(f"{text} on {glance.SUBJECTS[name]}" for name, (text, _) in more_by_name.items()) in found
    summary = " ".join(PAGE.read_text().split("## What was found")[1].split("## At a glance")[0].split())
    said = re.search(
        r"quantization costs more than at epsilon 8 in (\d+ of \d+).*? by share of the layers and (\d+ of \d+)", summary
    )
    assert said
    for text, equal in zip(said.groups(), (False, True), strict=True):
        timed = [any(part in name for part in ("_time", "_budgets", "_shares")) for name in more_by_name]
        own = [word for (_, word), one in zip(more_by_name.values(), timed, strict=True) if one == equal]
        assert text == f"{own.count('better')} of {len(own)}"
    main = raw("cifar10_resnet18_main")
    for estimator, place in places.items():
        found, verdict = claimed(f"are lost, layers preferred {place}")
        drawn = of(main, scheduler="dpquant", fraction=0.9, target_epsilon=8.0, estimator=estimator)
        less, _ = by_hand(drawn, of(main, scheduler="full", target_epsilon=8.0))
        assert f"ResNet-18 on CIFAR-10 {less} at " in found
        losses = re.findall(r"\(([+-][0-9.]+) to ([+-][0-9.]+)\)", found)
        counts = sum(float(low) > -2 for low, _ in losses), sum(float(high) < -2 for _, high in losses)
        assert verdict == f"less in {counts[0]}, more in {counts[1]} of {len(losses)}"
    found, _ = claimed("negligible part of the budget")
    digits = raw("digits_main")
    noise = {
        estimator: max(
            line["noise_multiplier"] for line in digits
            if line["settings"]["schedule.scheduler"] == "dpquant" and line["settings"]["privacy.target_epsilon"] == 1.0
            and line["settings"]["analysis.estimator"] == estimator
        ) for estimator in ("probe", "released")
    }  # fmt: skip
    most = re.search(r"to (\d+\.\d) % \(on the digits' CNN[^)]*\) at epsilon 1\.", found)
    assert most
    assert most[1] == f"{100 * (noise['probe'] / noise['released'] - 1):.1f}"
    for estimator, place in places.items():
        found, _ = claimed(f"Its gain on `pls`, {place}")
        ends: dict[float, dict[int, float]] = {}
        for share in (0.5, 0.9):
            gains: dict[int, list[float]] = {}
            for epsilon in (8.0, 4.0, 1.0):
                point = {"fraction": share, "target_epsilon": epsilon}
                there = of(private, scheduler="pls", **point)
                for seed, accuracy in of(private, scheduler="dpquant", estimator=estimator, **point).items():
                    gains.setdefault(seed, []).append(accuracy - there[seed])
            ends[share] = {seed: statistics.fmean(own) for seed, own in gains.items()}
        assert f"the last less the first {by_hand(ends[0.9], ends[0.5])[0]}" in found.split("CIFAR-10's CNN")[1]


@pytest.mark.parametrize(
    ("subject", "names", "wanted"),
    [
        ("the digits at epsilon 1", ["digits_epochs"], {}),
        ("ResNet-18 on CIFAR-10", ["cifar10_resnet18", "cifar10_resnet18_epochs"], {}),
        ("DenseNet-121 on CIFAR-10", ["cifar10_deep_fresh", "cifar10_deep_epochs"], {"name": "densenet121"}),
    ],
)
def test_what_hangs_on_the_length_by_another_hand(subject: str, names: list[str], wanted: dict[str, str]) -> None:
    lines = [line for name in names for line in raw(name)]
    lengths = sorted({line["settings"]["training.epochs"] for line in lines})
    cooled, greedy, full = (
        {length: of(lines, epochs=length, scheduler=scheduler, **wanted) for length in lengths}
        for scheduler in ("cooldown", "greedy", "full")
    )
    text = "; ".join(
        f"{by_hand(cooled[n], greedy[n])[0]} points after {n} epochs, where that loses {by_hand(greedy[n], full[n])[0]}"
        for n in lengths
    )
    assert f"`cooldown` less `greedy` on {subject}: {text} against full precision." in found_said()
    first, last = (
        {seed: cooled[n][seed] - greedy[n][seed] for seed in cooled[n].keys() & greedy[n].keys()}
        for n in (lengths[0], lengths[-1])
    )
    change = by_hand(last, first)[0]
    assert f"against full precision. The longest less the shortest: {change}." in found_said().split(text)[1]


@pytest.mark.parametrize("scheduler", ["annealed", "cooldown"])
def test_what_hangs_on_the_budget_by_another_hand(scheduler: str) -> None:
    found = []
    for name, subject in glance.SUBJECTS.items():
        lines = [line for line in raw(name) if line["settings"].get("privacy.target_epsilon") in (1.0, 8.0)]
        gains: dict[tuple[float, int], list[float]] = {}
        for line in lines:
            keys = ("schedule.fraction", "schedule.target_speedup")
            goal = {k.split(".")[1]: line["settings"][k] for k in keys if k in line["settings"]}
            epsilon, seed = line["settings"]["privacy.target_epsilon"], line["seed"]
            here, there = (of(lines, scheduler=s, target_epsilon=epsilon, **goal) for s in (scheduler, "static"))
            if line["settings"]["schedule.scheduler"] == scheduler and seed in there:
                gains.setdefault((epsilon, seed), []).append(here[seed] - there[seed])
        most = max(map(len, gains.values()), default=0)  # a seed that lacks a goal would be a mean of others
        means = {key: statistics.fmean(own) for key, own in gains.items() if len(own) == most}
        small, large = ({seed: mean for (one, seed), mean in means.items() if one == at} for at in (1.0, 8.0))
        if small and large:
            found.append((*by_hand(small, large), subject))
    assert found
    clear = [sum(word == one for _, word, _ in found) for one in ("better", "worse")]
    said = f"is above 0 in {clear[0]} of {len(found)} and below in {clear[1]}: "
    text = f"`{scheduler}` less `static` at epsilon 1, less the same at epsilon 8, {said}"
    assert text + ", ".join(f"{difference} on {subject}" for difference, _, subject in found) + "." in found_said()


def test_what_readme_and_guides_quote_is_what_was_found() -> None:
    def lost(value: Any) -> str:
        return f"{-100 * value.mean:.1f} ({-100 * value.high:.1f} to {-100 * value.low:.1f})"

    found = whole(load_all())
    readme, guides = (" ".join((ROOT / path).read_text().split()) for path in ("README.md", "docs/guides.md"))
    fresh = {one.subject: one for one in choices.known_choices(found, equal_time=True) if one.fresh}
    gains = {
        name: [
            (here["schedule.target_speedup"], choices.looked_at_once(one, here, there))
            for here, there, _ in choices.every_choice(one, "cooldown")
        ]
        for name, one in fresh.items()
    }
    every = [value for own in gains.values() for _, value in own if value.n >= 3]
    better, worse = (sum(value.sign == sign for value in every) for sign in (1, -1))
    own = [value for _, value in as_trained.beside_fresh(found)]
    assert (
        f"it did better than {better} of {len(every)} and worse than {worse} (than {sum(v.sign == 1 for v in own)} of "
        f"{len(own)} tested in the arithmetic that they were trained in" in readme
    )
    (large,), (small,) = (
        [difference(value) for aim, value in gains[name] if aim == 1.31]
        for name in ("CIFAR-10's CNN on fresh seeds", "CIFAR-10's CNN at epsilon 1 on fresh seeds")
    )
    assert f"CIFAR-10's CNN gained {large} points at 1.31x and epsilon 8, {small} at epsilon 1;" in readme
    least = min((value for _, value in gains["the digits' CNN at epsilon 1 on fresh seeds"]), key=lambda v: v.mean or 0)
    digits = [value for _, value in gains["the digits' CNN on fresh seeds"]]
    some = f"at epsilon 8 on {sum(value.sign == 1 for value in digits)} of {len(digits)}."
    assert f"the demonstration's digits gained {difference(least)} or more at epsilon 1, {some}" in readme
    formats = found["cifar10_formats"]
    full = formats.points(scheduler="full")[0]
    nvfp4, luq = (
        lost(formats.compared(formats.points(scheduler="static", fraction=1.0, format=name)[0], full))
        for name in ("nvfp4", "luq_fp4")
    )
    itself = lost(as_trained.cost_of_all(found, "CIFAR-10's CNN", 8.0))
    told_of_both = f"NVFP4 loses {nvfp4} points where LUQ-FP4 loses {luq}; tested in its own arithmetic that loses"
    assert f"{told_of_both} {itself}." in guides
    # what they say without a number
    to_the_end = [(name, value) for name, _, value in told.compared(found, "cooldown", "greedy", equal_time=True)]
    unhelped = [value for name, value in to_the_end if "NVFP4" in name or "ResNet-50" in name or "DenseNet" in name]
    assert unhelped
    assert all(value.sign != 1 for value in unhelped)
    long = [lengths[-1] for subject, lengths in endings.by_length(found) if subject.startswith("DenseNet-121")]
    assert [f"in {one.epochs} epochs it gained {difference(one.gain)}." in readme for one in long] == [True]
    by_budget = told.by_budget(found, "cooldown", "static")
    more = (
        f"{len(told.shown(by_budget, 1))} of {len(by_budget)} comparisons ({len(told.firm(by_budget, 1))} after Holm's"
    )
    assert f"At epsilon 1 it gains more than at 8 in {more} correction for their number), less in none;" in guides
    assert not told.shown(by_budget, -1)
    small = {"fashion_time_fresh", "cifar10_time_fresh", "cifar10_resnet18_fresh", "digits_time_fresh"}
    quantized = [
        r for name in small for r in found[name].results.values() if r.settings["schedule.scheduler"] != "full"
    ]
    assert all(r.speedup_calibrated < 1 for r in quantized)


def test_trades_on_chips_are_the_cost_models_and_the_runs() -> None:
    found = whole(load_all())
    known = list(chips.trades(found))
    one = next(t for t in known if (t.sweep, t.chip, t.format, t.basis) == ("cifar10_formats", "b200", "nvfp4", "peak"))
    evidence = found["cifar10_formats"]
    here = evidence.points(scheduler="static", fraction=1.0, format="nvfp4")[0]
    assert one.lost == evidence.compared(here, evidence.points(scheduler="full")[0])
    results = [r.speedup_peak for r in evidence.finished(here)]
    assert one.speedup == pytest.approx(results[0], rel=1e-6)  # as the runs' own model had it
