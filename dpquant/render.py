"""What a command prints: data on stdout as table, CSV or JSON, talk on stderr; numbers with units, 80 columns."""

from __future__ import annotations

import csv
import io
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: which key of a row it shows, its title, and how a value is written."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    right: bool = False
    wrap: bool = False
    """Whether long text may take several lines; otherwise it is cut."""
    spare: bool = False
    """Whether a terminal too narrow for the table does without this column (the last spare one goes first)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of plain data under columns: one definition for the terminal, for CSV and for JSON."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    best: int | None = None
    """Index of the row to mark."""
    title: str | None = None
    breaks: frozenset[int] = field(default_factory=frozenset)
    """Indices of rows that a rule is drawn under."""


class Output:
    """Where a command's words go: data to stdout, talk to stderr.

    Args:
        form: ``text``, ``json`` or ``csv``.
        quiet: leave out talk.
    """

    def __init__(self, form: str = "text", quiet: bool = False) -> None:
        self.form, self.quiet = form, quiet

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console; 80 columns where the output is no terminal, colour only on one (and not under NO_COLOR)."""
        from rich.console import Console

        width = (
            shutil.get_terminal_size().columns if os.environ.get("COLUMNS") == "0" else None
        )  # rich would show nothing
        console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)
        console.on_broken_pipe = _reader_gone  # type: ignore[method-assign]  # rich would end with 1
        return console

    def say(self, text: str) -> None:
        """One line of talk; a terminal shows it with whole words."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            text = "\n".join(textwrap.wrap(text, shutil.get_terminal_size().columns, break_on_hyphens=False))
        print(text, file=sys.stderr, flush=True)

    def json(self, data: Mapping[str, Any]) -> None:
        """The whole answer as JSON; ``schema`` grows when a key changes its meaning or goes away."""
        from dpquant.rundir import dumps_strict

        print(dumps_strict({"schema": 1, **data}, indent=2))

    def show(self, *parts: RenderableType) -> None:
        """Anything that rich can draw."""
        console = self.console()
        for part in parts:
            console.print(part)

    def table(self, table: Table) -> None:
        """A table, drawn or as CSV."""
        if self.form == "csv":
            print(to_csv(table), end="")
            return
        self.show(drawn(table, self.console().width))

    def note(self, text: str) -> None:
        """A sentence after a table: what it means, or how far to trust it; CSV keeps stdout to itself."""
        if self.form == "csv":
            self.say(text)
        else:
            self.show(text)


def _reader_gone() -> NoReturn:
    raise BrokenPipeError


def drawn(table: Table, width: int = 80) -> RenderableType:
    """The table for a terminal of so many columns."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = fitting(table, width)
    result = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=table.title, title_justify="left"
    )
    if table.best is not None:
        result.add_column("", width=1)
    for column in columns:
        result.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.wrap,
            overflow="fold" if column.wrap else "ellipsis",
        )
    for index, row in enumerate(table.rows):
        cells = [Text(shown(column, row)) for column in columns]
        if table.best is not None:
            cells.insert(0, Text("*" if index == table.best else ""))
        result.add_row(*cells, style="bold green" if index == table.best else None, end_section=index in table.breaks)
    return result


def fitting(table: Table, width: int) -> list[Column]:
    """The columns that fit: spare ones are left out, the last first, while the table is too wide."""
    columns = list(table.columns)

    def needed() -> int:
        cells = (max([len(c.title), *(len(shown(c, row)) for row in table.rows)]) for c in columns)
        return sum(cells) + 2 * len(columns) + (3 if table.best is not None else 0)

    while needed() > width and (spare := [c for c in columns if c.spare]):
        columns.remove(spare[-1])
    return columns


def to_csv(table: Table) -> str:
    """The table's raw values (no units, full precision), keys as header."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if row.get(c.key) is None else _flat(row[c.key]) for c in table.columns])
    return stream.getvalue()


def shown(column: Column, row: Mapping[str, Any]) -> str:
    """One cell's text; nothing known is a dash."""
    value = row.get(column.key)
    return "-" if value is None else column.show(value)


def si(value: float, unit: str, digits: int = 3) -> str:
    """A quantity with an SI prefix: ``si(0.00123, "s")`` is ``1.23 ms``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    size = abs(value)
    scales = (*_PREFIXES, *_SMALL)
    factor, prefix = next(((f, p) for f, p in scales if size >= f * (1 - 0.5 * 10.0**-digits)), scales[-1])
    return f"{significant(value / factor, digits)} {prefix}{unit}"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, trailing zeros kept, no exponent for what fits without."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if round(abs(value) / 10.0**exponent, digits - 1) >= 10:
        exponent += 1
    if -4 <= exponent < 7:
        return f"{value:.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def seconds(value: float) -> str:
    """A modelled time."""
    return si(value, "s")


def joules(value: float) -> str:
    """An energy."""
    return si(value, "J")


def gibibytes(value: float) -> str:
    """A memory size, in powers of 1024."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{significant(value / factor)} {unit}"
    return f"{value:.0f} B"


def speedup(value: float) -> str:
    """A ratio of times."""
    return f"{value:.2f}x"


def percent(value: float) -> str:
    """A share (0 to 1) in percent."""
    return f"{100 * value:.1f} %"


def number(value: float) -> str:
    """A plain number, four digits at most."""
    return f"{value:.4g}"


def duration(value: float) -> str:
    """A wall-clock time for people: ``7 s``, ``1 min 30 s``, ``2 h 05 min``."""
    whole = round(value)
    if whole < 60:
        return f"{significant(value, 2) if value < 10 else whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _flat(value: Any) -> Any:
    """A CSV cell: lists joined by blanks, truth as true and false as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return value
