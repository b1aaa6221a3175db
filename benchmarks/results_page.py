"""Writes docs/results.md and its plots from the result files under benchmarks/results.

    python benchmarks/results_page.py

Every number on the page is computed here from those files, or by the cost model; nothing is trained.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from evidence import as_trained, chips, claims, findings, glance, operand_tables, summary, variance_tables
from evidence.choices import best_static, every_choice_table, known_choices
from evidence.files import ROOT, SEEDS, Evidence, Settings, load_all, whole
from evidence.markdown import table
from evidence.plots import Cloud, Panel, dots, forest, scatter
from evidence.sweep_tables import (
    TITLES,
    anchors_table,
    averages_table,
    probe_table,
    scheduler_averages,
    section,
)
from evidence.told import DATA

from dpquant.statistics import Sample, sample
from dpquant.sweep import shipped_sweeps
from dpquant.sweep_results import SweepResult

PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "results"
INTRODUCTION = """What was trained to find out whether scheduling saves accuracy under FP4, where, and what it buys on
real chips. `python benchmarks/results_page.py` writes this page from the files under `benchmarks/results` (one line a
run; a run is a configuration and a seed), and a test holds it to them. Accuracy is that of the test data after the
last epoch, in percent, in full precision, however the network was trained (whether that decides is told
[below](#schedulers-against-each-other)); a point is one percent of the test data. Modelled time is that of a B200 by
its published peak rates, LUQ-FP4, which no chip has, timed as its FP4. Epsilon is the privacy budget: the smaller,
the stricter. LUQ-FP4, the paper's format, has four bits. Differences are paired: the same seed with and without; `(a
to b)` is their 95 % interval by Student's t over the seeds (not over test images: the digits have 297, each a third
of a point), and where it holds 0 nothing is claimed. Of twenty such intervals one misses by chance; hence counts of
comparisons are told with Holm's correction for their number too. A comparison is one of two schedulers over the
settings of one sweep, and several sweeps are of one network. CIFAR-10 is its JPEG copy."""
VARIANCE = (
    """`python benchmarks/variance.py --out benchmarks/results/variance.jsonl`: Fashion-MNIST's CNN, five seeds, three
    ways of training with one learning rate and, where there is noise, the same noise. Mean ± sd over seeds, then the
    95 % interval. First, what the variance of unbiased rounding grows with under DP-SGD:
    `variance ~ max^b rms^c` over the examples; with a scale per example b + c is 2.""",
    "Second, whether private training makes it worse.",
    """Third, which operands do it, under DP-SGD: squared error of the mean clipped weight gradient over its square.
    Forward operands (weights, inputs) are rounded to nearest, output gradients stochastically (FP8: to nearest).""",
)
GLANCE = """Test accuracy lost against full precision, in points, with as many layers times epochs quantized to LUQ-FP4
by every schedule (layers are unequal, and so their modelled times differ), averaged over the budgets named. `static`
draws its layers once, `pls` anew every epoch, `dpquant` anew with a preference for layers that were found insensitive
in gradients that training releases anyway, `greedy` takes those that save most time; `annealed` quantizes all of them
in the first epochs and none in the last, `cooldown` those that save most time, none in the last fifth of the run, or
less of it where so many layers leave less."""
GLANCE_TIME = """The same with the same modelled time for every schedule, by the published peak rates of a B200, in
LUQ-FP4 where no other format is named;
`cooldown` quantizes the layers that save most time at first, and none at the end."""
GLANCE_BUDGET = """Budget by budget, averaged over the shares of the layers, or over the speedups named."""
CLAIMS = """DPQuant's claims (arXiv 2509.03472), as far as its abstract and what others wrote of it tell them, beside
what the runs of this page show. Networks, data and formats are not all the same."""
AVERAGES = """Each row is one comparison averaged over the budgets and fractions or speedups of a sweep; a seed's
average is one value. Where a goal leaves no choice of layers, schedulers run alike, and the average has differences of
0 (Fashion-MNIST's CNN at 1.165x)."""
PROBES = """What the private probe takes of the budget: the noise multiplier of training without it and with it, and
dpquant's accuracy with the probe less with the free estimate, averaged over a sweep's other settings."""
TESTED = """Whether the arithmetic of the test decides, by `python benchmarks/tested.py SWEEP --out FILE`: the fixed
choices of a sweep trained again, and tested in full precision and with their layers' weights and inputs quantized as in
training; `cooldown` with as many layers or, on fresh seeds, of the same modelled time, which ends in full precision,
beside both."""
OPERANDS = """And in accuracy, all layers quantized, by `python benchmarks/operands.py TASK --out FILE`: points lost
against full precision with only some operands quantized; last, what one scale per tensor would change beside a scale
per example. Scales per tensor mix the examples of a batch, so that clipping bounds nothing: not to be used."""
CHIPS = """Speedup of DP-SGD with all layers quantized over the chip's own full precision (bfloat16), by the
[cost model](cost-model.md): `peak` takes the published rates, `calibrated` what was measured of kernels (there are no
measurements of the MI355X). `pays from`: the first from which on it is 1.05x or more."""
BEST = """The best fixed choice is chosen on the first half of the seeds and judged on the second; choosing and judging
on the same runs would favour it."""
CHOICES = (
    (
        "Every fixed choice of as many layers",
        "annealed",
        "",
        """Each of the fixed choices by itself against `annealed`, and then the others, with as many layers times
        epochs, over all seeds: no choice was made, and so none is favoured. Their modelled times differ, for layers are
        unequal.""",
    ),
    (
        "Every fixed choice that reaches the same speedup",
        "cooldown",
        """Fixed choices of layers that reach the modelled speedup that the schedulers aim at, by the published peak
        rates of a B200, and would not without any one of their layers; so some are faster than that. For the small
        networks these are all there are; for ResNet-18 the one of fewest layers, and others that were drawn; on fresh
        seeds, those that nothing was chosen on, the ones that came nearest to `cooldown`, or all of them. A scheduler
        is held against those alone whose modelled speedup is its own within half a percent.""",
        """Each of the fixed choices by itself against `cooldown`, and then the others, where they run as fast, over all
        seeds: no choice was made, and so none is favoured.""",
    ),
)
"""Title, scheduler that is told first, what the choices are, and of the table of all."""
PARETO = """What a format loses in accuracy, all layers in it, beside what it saves in time and energy on the chips that
have it, for the networks and batches that were trained."""
FAILED = (
    "Sensitivities from released gradients were first taken in the units that clipping leaves them in, some 1e-6 to "
    "1e-4: times `beta` they were nothing beside the noise of the draw, and `dpquant` drew as `pls` does. Those 172 "
    "runs are not on this page: sensitivities are relative to the largest now, and the runs were trained anew.",
    "`cooldown` at equal modelled time first quantized the layers that save most time until the last fifth of the run. "
    "Seeds were doubled to ten where five had left that open against `greedy` (CIFAR-10 and ResNet-18): an interval "
    "looked at twice misses the truth somewhat more often than one in twenty times. Then its rule was chosen anew on "
    "the runs there were. The 46 runs by the rule before are not on this page, and on the seeds that it was chosen on "
    "its comparisons may favour it: hence the fresh seeds. On ResNet-18 thirty of these were planned after ten had "
    "left it open: what those show alone stands beside.",
    "Fixed choices were first held against `cooldown` at the nearest of a few targets, where some were up to 4 % "
    "faster than it, which favoured it: better than 13 of 15 on fresh seeds. Now only what runs as fast is compared.",
    "So compared, `cooldown` was not better than [convs.3] on the digits at epsilon 8 and 1.141x, and hardly as good: "
    "-0.12 (-0.27 to +0.03) points over 160 fresh seeds. It took a third layer in the first epochs, to end in full "
    "precision for 42 % of the run. Two layers and 35 % did better on 59 seeds that are not on this page, by +0.31 "
    "(+0.11 to +0.52), and at epsilon 1 no difference was shown on 15 (+0.02 (-1.51 to +1.56)); so it takes no more "
    "layers now than leave the last third. No other plan of this page changed. The 380 runs on the digits at 1.1x and "
    "1.141x were trained anew; but that their fresh seeds had been seen with the rule before, and were the reason to "
    "change it, leaves them fresh no more: seeds from 300 on were added, and on the digits these alone are counted.",
    "At 1.2x and epsilon 8 on the digits it takes three layers for 77 % of the run. Two layers for seven eighths of "
    "it, as fast, were tried on 60 seeds that are not on this page: +0.17 (-0.06 to +0.41) points less the rule's, "
    "+0.08 (-0.12 to +0.28) less `greedy`. No difference is shown, and the rule stayed.",
)
"""What no file says."""
GROUPS = (
    (
        "Schedulers, sweep by sweep",
        (
            "fashion_main",
            "fashion_time",
            "fashion_time_fresh",
            "fashion_epsilon1_fresh",
            "fashion_time_budgets",
            "fashion_time_shares",
            "cifar10_main",
            "cifar10_epsilon3",
            "cifar10_time",
            "cifar10_time_budgets",
            "cifar10_time_shares",
            "cifar10_time_fresh",
            "cifar10_epsilon1_fresh",
            "digits_main",
            "digits_time",
            "digits_time_budgets",
            "digits_time_fresh",
            "digits_epsilon1_fresh",
            "digits_epochs",
        ),
    ),
    ("Learning rates and quantizers", ("fashion_rates", "cifar10_rates", "cifar10_quantizers")),
    (
        "Fixed choices of layers",
        (
            "fashion_subsets",
            "cifar10_subsets",
            "fashion_time_subsets",
            "cifar10_time_subsets",
            "digits_time_subsets",
            "cifar10_resnet18_subsets",
        ),
    ),
    ("Settings of the scheduler", ("digits_ablation", "cifar10_beta", "digits_draw", "cifar10_draw")),
    ("Formats and accumulation", ("fashion_formats", "cifar10_formats", "fashion_accumulate")),
    (
        "Other networks, optimizers and no privacy",
        (
            "cifar10_resnet18_main",
            "cifar10_resnet18",
            "cifar10_resnet18_budgets",
            "cifar10_resnet18_shares",
            "cifar10_resnet18_fresh",
            "cifar10_resnet18_epsilon1_fresh",
            "cifar10_resnet18_epochs",
            "fashion_resnet18",
            "fashion_resnet18_time",
            "fashion_resnet18_budgets",
            "fashion_resnet18_shares",
            "cifar10_deep",
            "cifar10_deep_fresh",
            "cifar10_deep_epochs",
            "cifar10_resnet18_nvfp4",
            "cifar10_deep_nvfp4",
            "cifar10_vit",
            "words_main",
            "cifar10_finetune",
            "cifar10_nonprivate",
        ),
    ),
)


def main() -> None:
    """Writes the page and the plots, and takes away plots that are no longer on it."""
    page, plots = results()
    PAGE.write_text(page, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    for path in PLOTS.glob("*.svg"):
        if path.name not in plots:
            path.unlink()
    for name, text in plots.items():
        (PLOTS / name).write_text(text, encoding="utf-8")


def results(folder: Path | None = None) -> tuple[str, dict[str, str]]:
    """The page, and its plots by file name."""
    known = load_all() if folder is None else load_all(folder)
    found = whole(known)
    plots = {f"{name}.svg": text for name, evidence in known.items() if (text := scheduler_plot(evidence))}
    if text := differences_plot(found):
        plots["differences.svg"] = text
    if text := pareto_plot(found):
        plots["pareto.svg"] = text
    parts = [
        "# Results",
        "",
        prose(INTRODUCTION),
        "",
        "## What was found",
        "",
        "\n\n".join(prose(paragraph) for paragraph in summary.paragraphs(found)),
        "",
        "## At a glance",
        "",
        *(["![Schedulers against a fixed random choice](results/differences.svg)", ""] * ("differences.svg" in plots)),
        *_glance(found),
        "## What was said of the method before",
        "",
        prose(CLAIMS),
        "",
        claims.claims_table(found),
        "",
        "## In detail",
        "",
        *(f"### {title}\n\n{bullets(told)}\n" for title, told in findings.details(found)),
        "## Full precision against published figures",
        "",
        "Tramer and Boneh (arXiv 2011.11660): the same networks, rates and budgets.",
        "",
        anchors_table(found),
        "",
        "## Schedulers against each other",
        "",
        prose(AVERAGES),
        "",
        averages_table(found),
    ]
    if table_of_probes := probe_table(found):
        parts += ["", prose(PROBES), "", table_of_probes]
    if table_of_tests := as_trained.tested_table(found):
        parts += ["", prose(TESTED), "", table_of_tests]
    parts += _choices(found)
    for title, names in GROUPS:
        present = [name for name in names if name in known]
        if present:
            parts += ["", f"## {title}"]
        for name in present:
            plot = f"results/{name}.svg" if f"{name}.svg" in plots else None
            parts += ["", section(name, known[name], plot)]
    parts += (
        _variance()
        + _chips(found, "results/pareto.svg" if "pareto.svg" in plots else None)
        + _unfinished(known)
        + ["", "## Hours", "", hours(known)]
    )
    text = "\n".join(parts) + "\n"
    first = "\n## What was found\n"
    return text.replace(first, f"\n{contents(text)}\n{first}", 1), plots


def contents(page: str) -> str:
    """Links to the page's sections, as GitHub names them."""
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    links = [f"[{title}](#{re.sub(r'[^a-z0-9 -]', '', title.lower()).replace(' ', '-')})" for title in titles]
    return "\n".join(["On this page:", "", *(f"- {link}" for link in links)])


def _glance(found: Mapping[str, Evidence]) -> list[str]:
    parts: list[str] = []
    known = list(glance.lines(found))
    by_share, by_speedup = ([line for line in known if line.goal.endswith("x") == equal] for equal in (False, True))
    for text, lines, goal in (
        (GLANCE, by_share, "quantized"),
        (GLANCE_TIME, by_speedup, "speedup"),
        (GLANCE_BUDGET, list(glance.lines_by_budget(found)), "quantized, or speedup"),
    ):
        if body := glance.glance_table(lines, goal):
            parts += [prose(text), "", body, ""]
    return parts


def _choices(found: Mapping[str, Evidence]) -> list[str]:
    parts: list[str] = []
    for equal_time, (title, scheduler, said, every) in enumerate(CHOICES):
        if known := known_choices(found, equal_time=bool(equal_time)):
            parts += ["", f"### {title}", "", *([prose(said), ""] if said else [])]
            parts += [prose(BEST), "", best_static(known), "", prose(every), "", every_choice_table(known, scheduler)]
    return parts


def _variance() -> list[str]:
    parts = ["", "## Why: what quantization does to gradients"]
    tables = (variance_tables.law(), variance_tables.methods(), variance_tables.operands())
    for text, found in zip(VARIANCE, tables, strict=True):
        parts += ["", prose(text), "", found]
    if found := operand_tables.operands():
        parts += ["", prose(OPERANDS), "", found]
    return parts


def _chips(found: Mapping[str, Evidence], plot: str | None) -> list[str]:
    parts = ["", "## Where it pays on chips", "", prose(CHIPS)]
    width = "A transformer of six layers on sequences of 128, batch 256."
    for title, text, body in (
        ("By batch size", "", chips.batches_table()),
        ("By width", width, chips.widths_table()),
        ("Accuracy against speed", PARETO, chips.pareto_table(found)),
    ):
        drawn = [f"![{title}]({plot})", ""] if plot and text == PARETO else []
        parts += ["", f"### {title}", "", *([prose(text), ""] if text else []), *drawn, body]
    return parts


def prose(text: str) -> str:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def bullets(told: Iterable[str]) -> str:
    """A list, in lines of at most 120 characters."""
    wrap = textwrap.TextWrapper(
        width=120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.fill(one) for one in told)


def _unfinished(found: Mapping[str, Evidence]) -> list[str]:
    said = findings.unfinished(found)
    missing = [TITLES.get(name, name) for name in shipped_sweeps() if name not in found and name != "digits_schedulers"]
    if missing:
        said.append(f"Not run yet: {'; '.join(missing)}.")
    if not said:
        runs = sum(len(evidence.results) for evidence in found.values())
        said.append(f"Nothing is missing: all {runs} planned runs of the sweeps on this page are done.")
    return ["", "## What failed, and what is missing", "", bullets([*FAILED, *said])]


def hours(found: Mapping[str, Evidence]) -> str:
    """Run-hours of every sweep, and hours in which any of it was under way."""
    rows = []
    for name, evidence in found.items():
        for device in sorted({r.device or "-" for r in evidence.results.values()}):
            own = [r for r in evidence.results.values() if (r.device or "-") == device]
            ran = sum(r.wall_s or 0.0 for r in own) / 3600
            rows.append([TITLES.get(name, name), device, f"{len(own)}", f"{ran:.2f}", busy_hours(own)])
    results = [r for evidence in found.values() for r in evidence.results.values()]
    totals = [
        f"{sum(r.wall_s or 0.0 for r in results if r.device == device) / 3600:.1f} on {device}"
        for device in sorted({r.device for r in results if r.device})
    ]
    note = f"""{len(results)} runs, run-hours: {", ".join(totals)}. Runs share a device or several of a kind, so
    run-hours add up to more than the last column, the hours in which any run of the sweep was under way; `-`: not
    recorded. What `tested.py`, `variance.py` and `operands.py` trained is not in it."""
    return prose(note) + "\n\n" + table(["sweep", "device", "runs", "run-hours", "hours"], rows, range(2, 5))


def busy_hours(own: list[SweepResult]) -> str:
    """Hours in which at least one of the runs was under way."""
    if any(r.ended_s is None or r.wall_s is None for r in own):
        return "-"
    total, end = 0.0, float("-inf")
    for start, stop in sorted((r.ended_s - r.wall_s, r.ended_s) for r in own if r.ended_s and r.wall_s is not None):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return f"{total / 3600:.2f}"


def scheduler_plot(evidence: Evidence) -> str | None:
    """Accuracy over the fraction of layers quantized, a panel per budget."""
    keys = evidence.sweep.keys
    if not {"schedule.scheduler", "schedule.fraction"} <= set(keys) or "format" in keys:
        return None
    points = list(evidence.sweep.points.values())
    budgets = sorted({p.get("privacy.target_epsilon") for p in points}, key=lambda budget: -(budget or 0.0))
    panels = []
    for budget in budgets:
        own = [p for p in points if p.get("privacy.target_epsilon") == budget]
        fractions = sorted({p["schedule.fraction"] for p in own if p["schedule.fraction"] is not None})
        series: dict[str, dict[str, Sample]] = {}
        for p in own:
            value = sample(list(evidence.accuracies(p).values()))
            if value.n < SEEDS:  # an interval that would dwarf all others
                value = replace(value, low=None, high=None)
            if value.n and p["schedule.fraction"] is not None:
                places = fractions if p["schedule.scheduler"] == "full" else [p["schedule.fraction"]]
                series.setdefault(_series(p), {}).update({f"{f:g}": value for f in places})
        title = "all budgets" if budget is None else f"epsilon {budget:g}"
        panels.append(Panel(title=title, places=[f"{f:g}" for f in fractions], series=series))
    panels = [panel for panel in panels if panel.series]
    return dots(panels, "test accuracy, %; by share of layers quantized") if panels else None


def differences_plot(found: Mapping[str, Evidence]) -> str | None:
    """What each scheduler gains on a fixed random choice, wherever enough seeds were trained."""
    groups: dict[str, dict[str, Sample]] = {}
    for name in glance.SUBJECTS:
        if name not in found:
            continue
        title = glance.SUBJECTS[name] + (", equal time" if glance.at_equal_time(found[name]) else "")
        for comparison, model, value in scheduler_averages(found[name]):
            if comparison.other == "static" and value.n >= SEEDS:
                groups.setdefault(glance.narrowed(title, model), {})[comparison.short] = value
    return forest(groups, "points of test accuracy over static, a fixed random choice, 95 %") if groups else None


def pareto_plot(found: Mapping[str, Evidence]) -> str | None:
    """Accuracy lost over modelled speedup, a panel per network and basis."""
    known = list(chips.trades(found))
    clouds = [
        Cloud(
            title=f"{DATA[sweep.split('_')[0]]}'s CNN, {basis}",
            points=[
                (f"{t.chip}, {t.format}", t.speedup, t.lost) for t in known if (t.sweep, t.basis) == (sweep, basis)
            ],
        )
        for sweep in dict.fromkeys(t.sweep for t in known)
        for basis in chips.BASES
    ]
    return scatter(clouds, "modelled speedup of a step", "accuracy against full precision, points") if clouds else None


def _series(settings: Settings) -> str:
    scheduler = str(settings["schedule.scheduler"])
    model = settings.get("model.name")
    estimator = settings.get("analysis.estimator")
    name = f"{scheduler}, {estimator}" if scheduler == "dpquant" and estimator else scheduler
    return f"{model}: {name}" if model and model in ("resnet50", "densenet121") else name


if __name__ == "__main__":
    main()
