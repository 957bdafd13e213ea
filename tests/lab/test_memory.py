"""Memory that a step frees stays with the process: in a process of its own, as it cannot be undone."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from resect.cli import main
from resect.lab import jobs, memory

PAGES = """
import resource, sys, torch
from resect.lab.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # until the pieces between them have joined
    torch.ones(16 * 2**20)
before = pages()
for _ in range(4):
    torch.ones(16 * 2**20)
print(pages() - before)
"""
glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc"
)


def _pages(way: str) -> int:
    told = subprocess.run([sys.executable, "-c", PAGES, way], check=True, capture_output=True, text=True)
    return int(told.stdout)


@glibc
def test_what_is_freed_is_used_again():
    assert _pages("default") > 4 * 64  # of 2 MB at most, of 4 kB 65,536: the test of the test
    assert _pages("kept") < 16


def test_other_systems_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


def test_trainings_of_our_own_processes_ask_for_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append("command"))
    monkeypatch.setattr(jobs, "keep_freed_memory", lambda: asked.append("worker"))
    monkeypatch.setattr(jobs.signal, "signal", lambda *_: None)
    monkeypatch.setattr(jobs, "_queue", None)
    monkeypatch.setattr(sys, "argv", ["resect", "train", "no-such-recipe", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main()
    jobs._begin(None)
    assert asked == ["command", "worker"]
