"""Tables and numbers as the results page writes them: no difference without its interval."""

from __future__ import annotations

from collections.abc import Sequence

from dpquant.statistics import Sample

NONE = "-"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; ``right`` are the columns of numbers."""
    rule = ["---:" if i in right else "---" for i in range(len(titles))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, rule, *rows))


def mean(found: Sample, factor: float = 100.0, digits: int = 1) -> str:
    """Mean and standard deviation, in percent by default."""
    if found.mean is None:
        return NONE
    sd = "" if found.sd is None else f" ± {factor * found.sd:.{digits}f}"
    return f"{factor * found.mean:.{digits}f}{sd}"


def interval(found: Sample, factor: float = 100.0, digits: int = 1) -> str:
    """The mean's 95 % interval; nothing for fewer than two values."""
    if found.low is None or found.high is None:
        return NONE
    return f"{factor * found.low:.{digits}f} to {factor * found.high:.{digits}f}"


def difference(found: Sample, factor: float = 100.0, digits: int = 2) -> str:
    """A signed difference with its 95 % interval, in points by default; nothing where there is no interval."""
    if found.mean is None or found.low is None or found.high is None:
        return NONE
    low, high = factor * found.low, factor * found.high
    return f"{factor * found.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(found: Sample, better: str = "better", worse: str = "worse") -> str:
    """What an interval allows to say."""
    return {1: better, -1: worse, 0: "no difference shown", None: "not enough seeds to say"}[found.sign]


def times(value: float | None) -> str:
    """A speedup."""
    return NONE if value is None else f"{value:.2f}x"
