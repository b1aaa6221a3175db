"""The allocator's setting, seen where it matters: in the pages that the kernel has to clear."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from dpquant import allocator
from dpquant.config import load_config
from dpquant.train import prepare

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

# prints how many pages were new to the process while the same 40 MB were taken and given back ten times; before that,
# glibc's aligned allocations of one size need some rounds until what was freed holds them
FAULTS = """
import resource, torch
{setting}
for _ in range(30):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 40_000_000 // 4096


def faults(setting: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(setting=setting)], capture_output=True, check=True)
    return int(done.stdout)


@glibc
def test_freed_memory_is_used_again() -> None:
    kept = faults("from dpquant.allocator import keep_freed_memory; assert keep_freed_memory()")
    assert kept < PAGES / 10
    assert faults("") > PAGES  # or this test shows nothing


@pytest.mark.parametrize("wanted", [True, False])
def test_training_sets_it_unless_told_not_to(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(1))
    prepare(load_config("digits", {("training", "keep_freed_memory"): wanted}))
    assert len(calls) == wanted


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()


def test_a_run_may_go_on_with_another_allocator() -> None:
    other = load_config("digits", {("training", "keep_freed_memory"): False})
    assert other.digest == load_config("digits").digest
