"""The one error that bad input raises, and the hint that goes with it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what and where, and a hint that says what to do.

    Args:
        message: what is wrong, with the value: ``unknown format name='float5'``.
        hint: what is allowed, or what to do; None where the message says it all.
        file: the file that holds the value, if any.
        line: its 1-based line.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, file: str | Path | None = None, line: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.file, self.line = message, hint, file, line

    def __str__(self) -> str:
        where = "" if not self.file else f"{self.file}: " if not self.line else f"{self.file}:{self.line}: "
        return where + self.message


def regular_file(path: Path) -> Path:
    """The path of a file to be read to its end, which a folder has not, and a pipe or a device may never come to.

    Raises:
        InputError: something else than a file is there; nothing at all is left to whoever opens it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError("not a file", file=path)
    return path


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """A hint for a name that is not in ``allowed``: the nearest ones, or all of them where none is near."""
    names = list(dict.fromkeys(allowed))
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=3, cutoff=0.6)
    found = [n for n in names if n.lower() in near]
    if found:
        return "did you mean " + " or ".join(repr(n) for n in found) + "?"
    return "choose from " + ", ".join(names)
