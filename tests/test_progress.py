"""How far a long command is: rate and time left from a clock, a bar on a terminal, few plain lines elsewhere."""

import pytest

from dpquant.progress import Progress, rate_of
from dpquant.render import Output


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_text_says_how_far_how_fast_and_how_long_still() -> None:
    clock = Clock()
    progress = Progress(Output("text", True), "training", 240, "steps", clock=clock)
    assert progress.text() == "0/240 steps"
    clock.now = 10.0
    progress.update(60)
    assert progress.text() == "60/240 steps, 6 steps/s, 30 s left"
    progress.update(60, rate="1,234 examples/s")
    assert progress.text() == "60/240 steps, 1,234 examples/s, 30 s left"
    progress.update(240)
    assert progress.text() == "240/240 steps, 24 steps/s"


def test_what_was_done_before_counts_for_no_rate() -> None:
    clock = Clock()
    progress = Progress(Output("text", True), "sweep", 10, "runs", clock=clock)
    clock.now = 100.0
    progress.start(6)
    assert progress.text() == "6/10 runs"
    clock.now = 160.0
    progress.update(8)
    assert progress.text() == "8/10 runs, 2 runs/min, 1 min 00 s left"


def test_a_share_needs_no_unit() -> None:
    clock = Clock()
    progress = Progress(Output("text", True), "fitting", 1.0, clock=clock)
    clock.now = 30.0
    progress.update(0.25)
    assert progress.text() == "25 %, 1 min 30 s left"


@pytest.mark.parametrize(("count", "elapsed", "said"), [(2, 1, "2 x/s"), (1, 60, "1 x/min"), (1, 7200, "0.5 x/h")])
def test_rates(count: float, elapsed: float, said: str) -> None:
    assert rate_of(count, elapsed, "x") == said


def test_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(Output(), "audit", 1000, "trials", clock=clock) as progress:
        for done in range(1, 101):
            clock.now = float(done)
            progress.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" trials")[0] for line in lines] == ["audit: 30/1,000", "audit: 60/1,000", "audit: 90/1,000"]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(Output("text", True), "audit", 10, "trials", clock=clock) as progress:
        clock.now = 100.0
        progress.update(5)
        progress.line("a line")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_fits_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock = Clock()
    with Progress(Output(), "training", 240, "steps", clock=clock) as progress:
        progress.status("epsilon 2.00, 6.00 left; 1.17x of 1.15x")
        clock.now = 3000.0
        progress.update(60, rate="12,345 examples/s")
        progress.line("a line that stays")
    err = capsys.readouterr().err
    assert "a line that stays" in err
    assert "60/240 steps, 12,345 examples/s, 2 h 30 min left" in err
    assert "epsilon 2.00" in err
    assert "━" in err
