"""The privacy ledger on disk: an entry is there, durably, before its noise is drawn.

The file is small (equal neighbouring entries are one line), so every entry rewrites it whole through a rename: a crash
leaves the old ledger or the new one, never a part. Its first line says how much must follow, so that a file cut short,
also at the end of a line, is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dpquant.privacy import PrivacyEvent, PrivacyLedger
from dpquant.rundir import write_atomic
from emulation.errors import InputError, regular_file

_FORMAT = "dpquant-ledger-1"
_DAMAGED = "without its ledger nobody can say what a run has spent: restore the file, or start again in a new folder"


def create_ledger(path: str | Path, run: str) -> None:
    """Start an empty ledger.

    Args:
        path: a file that does not exist yet.
        run: identity of the run that owns it.

    Raises:
        InputError: the file exists or cannot be written.
    """
    if Path(path).exists():
        raise InputError("a ledger exists already", file=path, hint="resume its run, or choose a new folder")
    write_atomic(Path(path), _render(PrivacyLedger(), run))


def append_event(path: str | Path, event: PrivacyEvent) -> PrivacyLedger:
    """Record ``event``: it is on disk when this returns, and only then may its noise be drawn.

    Returns:
        The ledger with the event in it.

    Raises:
        InputError: no ledger there, a damaged one, or the disk does not take it (the old ledger is then untouched).
    """
    run, ledger = _read(Path(path))
    ledger = ledger.record(event)
    write_atomic(Path(path), _render(ledger, run))
    return ledger


def read_ledger(path: str | Path, run: str | None = None) -> PrivacyLedger:
    """The ledger in a file, every byte checked.

    Args:
        path: the file.
        run: if given, the run that must own it.

    Raises:
        InputError: missing, truncated, changed, or of another run; with the line where there is one.
    """
    owner, ledger = _read(Path(path))
    if run is not None and owner != run:
        raise InputError(f"ledger belongs to run={owner!r}, not {run!r}", file=path, line=1, hint=_DAMAGED)
    return ledger


def _render(ledger: PrivacyLedger, run: str) -> bytes:
    lines, previous = [], _digest(run)
    for event in ledger.events:
        previous = _digest(previous + event.to_json())
        lines.append(json.dumps({"event": json.loads(event.to_json()), "sha256": previous}))
    head = {"format": _FORMAT, "run": run, "entries": len(lines), "sha256": previous}
    return "".join(line + "\n" for line in [json.dumps(head), *lines]).encode()


def _read(path: Path) -> tuple[str, PrivacyLedger]:
    try:
        data = regular_file(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the ledger: {error.strerror}", file=path, hint=_DAMAGED) from error
    lines = data.decode("utf-8", errors="replace").split("\n")
    head = _parse(lines[0])
    if head.get("format") != _FORMAT or not isinstance(head.get("run"), str):
        raise InputError("is not a privacy ledger", file=path, line=1, hint=_DAMAGED)
    run, events, previous = head["run"], [], _digest(head["run"])
    promised = head.get("entries")
    if not isinstance(promised, int) or len(lines) != promised + 2 or lines[-1]:
        raise InputError(f"is truncated or extended: it promises entries={promised!r}", file=path, hint=_DAMAGED)
    for number, line in enumerate(lines[1:-1], start=2):
        entry = _parse(line)
        try:
            event = PrivacyEvent(**entry["event"])
            previous = _digest(previous + event.to_json())
        except (KeyError, TypeError, InputError) as error:
            raise InputError("entry was changed or is damaged", file=path, line=number, hint=_DAMAGED) from error
        if previous != entry.get("sha256"):
            raise InputError("entry was changed or is damaged", file=path, line=number, hint=_DAMAGED)
        events.append(event)
    ledger = PrivacyLedger(events=tuple(events))
    if data != _render(ledger, run):
        raise InputError("was changed or is damaged", file=path, line=1, hint=_DAMAGED)
    return run, ledger


def _parse(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
