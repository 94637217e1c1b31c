"""Where freed memory goes: settings of glibc's heap, and that they do what they say."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fewbit.base import resident

FAULTS = """
import contextlib, resource, sys
import numpy as np
from fewbit.base.resident import freed_memory_stays, one_heap

one_heap()
with freed_memory_stays() if sys.argv[1] == "stays" else contextlib.nullcontext():
    np.ones(2 << 20)  # 16 MB: after it glibc's own rule serves blocks of this size from the heap too
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        parts = [np.ones(1 << 20) for _ in range(8)]
        del parts
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_settings_are_made_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(resident, "_mallopt", lambda *args: seen.append(args))
    resident.one_heap()
    with resident.freed_memory_stays():
        assert seen == [(1, -8), (1 << 30, -1), (resident.LARGEST,)]
    assert seen[3:] == [(2 * resident.LARGEST, -1)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_is_freed_is_there_for_the_next_use() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("stays") * 5 < faults("goes")
