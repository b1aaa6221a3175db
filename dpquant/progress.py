"""How far a long command is: on a terminal a bar with rate and time left, elsewhere a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dpquant.render import Output, duration


class Progress:
    """A bar below the lines that a command prints on stderr (a context manager); without a terminal no bar.

    Args:
        out: where it goes; if quiet, nothing is shown.
        label: what is going on, one or two words.
        total: when it is done.
        unit: what is counted, in the plural; None: ``total`` is 1 and percent are shown.
        done: where it starts.
        plain_every_s: without a terminal, how long no line may come before one says how far it is.
        clock: seconds.
    """

    def __init__(
        self,
        out: Output,
        label: str,
        total: float,
        unit: str | None = None,
        *,
        done: float = 0,
        plain_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self.label, self._total, self._unit = out, label, total, unit
        self._first = self._done = done
        self._clock, self._begun, self._spoken = clock, clock(), clock()
        self._plain_every_s = plain_every_s
        self._rate: str | None = None
        self._status = ""
        self._console = out.console(stderr=True)
        self._live: Any = None

    def __enter__(self) -> Progress:
        if not self._out.quiet and self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, transient=True, get_renderable=self._drawn, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: float, *, label: str | None = None, rate: str | None = None) -> None:
        """Say how much is done, and at what rate where that is not counted in the bar's own unit."""
        self._done, self._rate, self.label = done, rate, self.label if label is None else label
        if self._live is None and self._clock() - self._spoken >= self._plain_every_s:
            self.line(f"{self.label}: {self.text()}")

    def start(self, done: float) -> None:
        """Count rate and time left from here: so much was done before."""
        self._first = self._done = done
        self._begun = self._clock()

    def status(self, text: str) -> None:
        """What stands above the bar."""
        self._status = text

    def line(self, text: str) -> None:
        """A line that stays."""
        self._spoken = self._clock()
        if not self._out.quiet:
            self._console.print(text, soft_wrap=True)

    def text(self) -> str:
        """``37/240 steps, 1.2 steps/s, 2 min 49 s left``: how far, how fast, how long still, as far as is known."""
        counted = f"{100 * self._done / self._total:.0f} %"
        parts = [counted if self._unit is None else f"{self._done:,.0f}/{self._total:,.0f} {self._unit}"]
        passed, elapsed = self._done - self._first, self._clock() - self._begun
        if passed > 0 and elapsed > 0:
            if rate := self._rate or (self._unit and rate_of(passed, elapsed, self._unit)):
                parts.append(rate)
            if self._done < self._total:
                parts.append(f"{duration(elapsed / passed * (self._total - self._done))} left")
        return ", ".join(parts)

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # room for the terminal's ^C: a line that it wraps could not be wiped
        row = Table.grid(padding=(0, 1, 0, 0), expand=True)
        row.width = max(40, self._console.width - 4)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_row(Text(self.label), ProgressBar(total=self._total, completed=self._done), Text(self.text()))
        return Group(Text(self._status), row) if self._status else row


def rate_of(count: float, elapsed_s: float, unit: str) -> str:
    """How many in a second, minute or hour: the first in which there is at least one."""
    per_s = count / elapsed_s
    seconds, per = next(((s, per) for s, per in ((1, "s"), (60, "min")) if per_s * s >= 1), (3600, "h"))
    return f"{per_s * seconds:,.3g} {unit}/{per}"
