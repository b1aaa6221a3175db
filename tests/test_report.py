"""Reports: figures that add up from the records, a map that fits its width, a statement that says everything."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dpquant import report
from dpquant.render import Column, Table, drawn, duration, fitting, gibibytes, si, significant, to_csv
from dpquant.rundir import EpochRecord, Run, RunFacts, dumps_strict

LAYERS = ("conv1", "blocks.0.convolution_with_a_long_name", "fc")


def facts(**changes: object) -> RunFacts:
    base = RunFacts(
        name="tiny",
        model="digits_cnn",
        dataset="digits",
        layers=LAYERS,
        hardware="b200",
        format="luq_fp4",
        scheduler="dpquant",
        basis="peak",
        target_speedup=1.5,
        max_speedup=2.25,
        epochs=4,
        steps=40,
        expected_batch_size=128,
        sample_rate=0.1,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
        target_epsilon=8.0,
        delta=1e-5,
        analyses=2,
        analysis_noise_multiplier=2.0,
        analysis_sample_rate=0.17,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def record(epoch: int, quantized: tuple[str, ...] = ("fc",), **changes: object) -> EpochRecord:
    base = EpochRecord(
        epoch=epoch,
        quantized=dict.fromkeys(quantized, "luq_fp4"),
        step_s=2e-3,
        baseline_step_s=3e-3,
        speedup=1.5,
        speedup_calibrated=0.5,
        energy_joules=4.0,
        baseline_energy_joules=5.0,
        steps=10,
        noise_multiplier=1.1,
        epsilon=1.0 * epoch,
        epsilon_analysis=0.1,
        test_loss=1.0 / epoch,
        test_accuracy=0.5 + 0.1 * epoch,
        sensitivities=dict.fromkeys(LAYERS, 0.01),
        wall_s=3.0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def run(records: list[EpochRecord], **changes: object) -> Run:
    return Run(
        path=Path("runs/tiny"), run_id="x", config={}, facts=facts(**changes), versions={}, records=tuple(records)
    )


def text(*parts: object, width: int = 80) -> str:
    console = Console(width=width, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_summary_adds_up() -> None:
    records = [record(1, speedup=1.0, step_s=3e-3), record(2, speedup=3.0, steps=30), record(3, quantized=LAYERS)]
    summary = report.summarize(facts(), records)
    assert summary.steps == 50
    assert summary.baseline_time_s == pytest.approx(0.15)
    assert summary.time_s == pytest.approx(10 * 3e-3 + 30 * 1e-3 + 10 * 2e-3)
    assert summary.speedup == pytest.approx(0.15 / 0.08)
    assert summary.speedup_calibrated == pytest.approx(0.5)
    assert summary.energy_joules == pytest.approx(200)
    assert summary.quantized_share == pytest.approx(5 / 9)
    assert (summary.test_accuracy, summary.epsilon, summary.epochs_done) == (0.8, 3.0, 3)
    assert not summary.finished


def test_the_analyses_share_of_the_time_is_said() -> None:
    one = run([record(1, wall_s=90.0, analysis_wall_s=4.0), record(2, wall_s=5.0, analysis_wall_s=1.0)])
    assert "Emulated in 1 min 40 s, the sensitivity analyses 5.0 % of it." in text(*report.report(one))
    assert report.to_json(one)["summary"]["analysis_share"] == 0.05
    assert "Emulated in 30 s.\n" in text(*report.report(run([record(1, wall_s=30.0)])))


def test_summary_of_nothing() -> None:
    summary = report.summarize(facts(), [])
    assert summary.speedup is None
    assert summary.epsilon == 0
    assert "No epoch is complete" in text(*report.report(run([])))


@given(epochs=st.integers(1, 400), width=st.integers(60, 160), seed=st.integers(0, 2**32))
def test_schedule_map_fits_and_counts(epochs: int, width: int, seed: int) -> None:
    draw = random.Random(seed).random
    chosen = [tuple(name for name in LAYERS if draw() < 0.5) for _ in range(epochs)]
    lines = report.schedule_map(facts(), [record(i + 1, q) for i, q in enumerate(chosen)], width)
    assert len(lines) == len(LAYERS) + 2
    assert max(map(len, lines)) <= width
    for name, line in zip(LAYERS, lines[1:], strict=False):
        share = sum(name in q for q in chosen) / epochs
        assert f"{100 * share:.0f}%" in line
        if epochs <= 10:  # a column each
            assert line.count("█") == sum(name in q for q in chosen)
            assert line.count("·") == epochs - line.count("█")


def test_report_says_everything() -> None:
    done = text(*report.report(run([record(e) for e in range(1, 5)])))
    for words in (
        "tiny: digits_cnn on digits",
        "1.50x on b200 (peak basis)",
        "the target of 1.50x is met",
        "Calibrated, the same schedule is 0.50x, a slow-down",
        "full precision (bfloat16)",
        "33.3 %",
        "epsilon 4 of at most 8",
        "delta 1e-05",
        "adding or removing one example",
        "Poisson sampling at rate 0.1",
        "PRV accountant",
        "2.5 % of the whole",
    ):
        assert words in " ".join(done.split()), words
    assert max(map(len, done.splitlines())) <= 80


def test_missed_target_and_stopped_run_are_said() -> None:
    done = " ".join(text(*report.report(run([record(1, speedup=1.2)]))).split())
    assert "below the target of 1.50x" in done
    assert "1 of 4 epochs are complete" in done


def test_no_privacy_is_said_plainly() -> None:
    done = text(*report.report(run([record(1, epsilon=math.inf)], noise_multiplier=0.0)))
    assert "not differentially private" in " ".join(done.split())


def test_nonfinite_examples_are_said() -> None:
    assert "3 examples had a gradient" in text(*report.report(run([record(1, nonfinite_examples=3)])))


def test_live_line_fits_and_lines_up() -> None:
    for epoch, layers in ((1, ()), (100, LAYERS)):
        line = report.live_line(record(epoch, layers, wall_s=3700, test_accuracy=None), facts(epochs=100))
        assert len(line) <= 80
        assert line.index("x") == report.LIVE_HEADER.index("p  energy")


def test_status_says_what_is_left() -> None:
    line = report.status(record(2, examples=300), facts())
    assert line == "epsilon 2.00, 6.00 left; 1.50x of 1.5x, 100 examples/s"
    assert (
        report.status(record(1, wall_s=0.0), facts(target_epsilon=None, target_speedup=None)) == "epsilon 1.00; 1.50x"
    )


def test_comparison_marks_the_best_and_gives_differences() -> None:
    runs = [run([record(1, test_accuracy=a)]) for a in (0.8, 0.85, 0.7)]
    table = report.comparison(runs)
    assert table.best == 1
    shown = text(drawn(table))
    assert max(map(len, shown.splitlines())) <= 80
    assert "+5.0" in shown
    assert "-10.0" in shown


def test_json_is_strict_and_whole() -> None:
    data = json.loads(dumps_strict(report.to_json(run([record(1, epsilon=math.inf)]))), parse_constant=pytest.fail)
    assert data["records"][0]["epsilon"] == "inf"
    assert data["summary"]["epochs_done"] == 1
    assert set(data) == {"path", "run_id", "facts", "versions", "config", "summary", "records"}


def test_bars_cover_the_range() -> None:
    assert report.bars([0.0, 1.0], 10) == "▁█"
    assert report.bars([1.0, 1.0, 1.0], 10) == "▁▁▁"
    assert report.bars([None, math.inf, 1.0], 10) == "  ▁"
    assert len(report.bars([float(i) for i in range(1000)], 40)) == 40


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.00123, "1.23 ms"), (1.5e15, "1.50 PB"), (0.9999, "1.00 B"), (999.9, "1.00 kB"), (0, "0 B"), (12, "12.0 B")],
)
def test_si(value: float, shown: str) -> None:
    assert si(value, "s" if "s" in shown else "B") == shown


@given(st.floats(1e-12, 1e20))
def test_si_keeps_three_digits(value: float) -> None:
    number, unit = si(value, "s").split(" ")
    factor = {"": 1, "m": 1e-3, "µ": 1e-6, "n": 1e-9, "p": 1e-12}
    factor |= {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    assert float(number) * factor[unit[:-1]] == pytest.approx(value, rel=6e-3)
    assert 0.99 <= float(number) < 1000


def test_small_renderings() -> None:
    assert significant(9.999) == "10.0"
    assert significant(123456) == "123456"
    assert gibibytes(3 * 2**30) == "3.00 GiB"
    assert gibibytes(12) == "12 B"
    assert duration(3.21) == "3.2 s"
    assert duration(75) == "1 min 15 s"
    assert duration(7500) == "2 h 05 min"


def test_spare_columns_go_first_and_csv_keeps_all() -> None:
    columns = [Column(key=k, title=k * 10, spare=k in "bc") for k in "abcd"]
    table = Table(columns=columns, rows=[{"a": 1, "b": None, "c": True, "d": [1, 2]}])
    assert [c.key for c in fitting(table, 80)] == ["a", "b", "c", "d"]
    assert [c.key for c in fitting(table, 40)] == ["a", "b", "d"]
    assert [c.key for c in fitting(table, 10)] == ["a", "d"]
    assert to_csv(table) == "a,b,c,d\n1,,true,1 2\n"
