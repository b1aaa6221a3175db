import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dpquant.ledger_file import append_event, create_ledger, read_ledger
from dpquant.privacy import PrivacyEvent, PrivacyLedger
from emulation.errors import InputError

TRAINING = PrivacyEvent(mechanism="training", noise_multiplier=1.1, sample_rate=0.05)
ANALYSIS = PrivacyEvent(mechanism="analysis", noise_multiplier=2.0, sample_rate=0.1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.jsonl"
    create_ledger(path, "run-a")
    return path


def test_what_is_appended_is_read_back(path):
    expected = PrivacyLedger()
    assert read_ledger(path, "run-a") == expected
    for event in (TRAINING, TRAINING, ANALYSIS, TRAINING):
        expected = expected.record(event)
        assert append_event(path, event) == expected
        assert read_ledger(path, "run-a") == expected
    assert len(path.read_text().splitlines()) == 4


def test_every_truncation_and_every_flipped_bit_is_refused(path):
    for event in (TRAINING, TRAINING, ANALYSIS):
        append_event(path, event)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(InputError):
            read_ledger(path)
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(InputError):
            read_ledger(path, "run-a")
    path.write_bytes(good)
    assert read_ledger(path).steps("training") == 2


def test_lines_dropped_swapped_repeated_or_edited_are_refused(path):
    for event in (TRAINING, ANALYSIS, TRAINING):
        append_event(path, event)
    head, *entries = path.read_text().splitlines(keepends=True)
    fewer = head.replace('"entries": 3', '"entries": 2')
    for lines in (
        [head, *entries[:2]],
        [fewer, *entries[:2]],
        [fewer, *entries[1:]],
        [head, *entries[::-1]],
        [head, *entries, entries[-1]],
        [head.replace("run-a", "run-b"), *entries],
        [head, entries[0].replace("1.1", "9.1"), *entries[1:]],
        [*entries],
        [],
    ):
        path.write_text("".join(lines))
        with pytest.raises(InputError) as error:
            read_ledger(path)
        assert error.value.file == path
        assert error.value.hint


def test_a_changed_entry_is_named_by_its_line(path):
    for event in (TRAINING, ANALYSIS, TRAINING):
        append_event(path, event)
    path.write_text(path.read_text().replace("2.0", "3.0"))
    with pytest.raises(InputError, match=r"ledger.jsonl:3: entry was changed"):
        read_ledger(path)


def test_a_foreign_ledger_is_refused(path):
    with pytest.raises(InputError, match="run='run-a', not 'run-b'"):
        read_ledger(path, "run-b")


def test_a_missing_ledger_is_never_started_silently(tmp_path):
    with pytest.raises(InputError, match="cannot read the ledger"):
        append_event(tmp_path / "none.jsonl", TRAINING)
    with pytest.raises(InputError, match="cannot read the ledger"):
        read_ledger(tmp_path / "none.jsonl")


def test_an_existing_ledger_is_never_started_again(path):
    append_event(path, TRAINING)
    with pytest.raises(InputError, match="exists already"):
        create_ledger(path, "run-a")
    assert read_ledger(path).steps("training") == 1


def test_a_full_disk_stops_with_an_error_and_leaves_the_old_ledger(path, monkeypatch):
    append_event(path, TRAINING)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        append_event(path, TRAINING)
    monkeypatch.undo()
    assert read_ledger(path).steps("training") == 1
    assert [p.name for p in path.parent.iterdir()] == ["ledger.jsonl"]


WRITER = """
import sys
from dpquant.ledger_file import append_event
from dpquant.privacy import PrivacyEvent
path, shown = sys.argv[1:]
events = [PrivacyEvent(mechanism=m, noise_multiplier=1.1, sample_rate=0.05) for m in ("training", "analysis")]
with open(shown, "ab", buffering=0) as out:
    while True:
        for event in events:
            append_event(path, event)
            out.write(b".")  # the noise is seen from here on
"""


def test_killed_at_random_moments_the_ledger_never_says_less_than_was_shown(path, tmp_path):
    shown = tmp_path / "shown"
    pick = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(shown)],
            cwd=Path(__file__).parents[1],
        )
        before = shown.stat().st_size if shown.exists() else 0
        while writer.poll() is None and (not shown.exists() or shown.stat().st_size == before):
            time.sleep(0.001)
        time.sleep(pick.random() * 0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        count = shown.stat().st_size
        recorded = sum(e.steps for e in read_ledger(path, "run-a").events)
        assert count > before
        assert count <= recorded
        shown.write_bytes(b"." * recorded)
