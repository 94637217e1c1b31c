"""This process's resident memory: its peak, and giving back what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def peak_resident() -> int:
    """Bytes of main memory that this process held at its most.

    Linux's own mark (VmHWM) begins with the program. What `getrusage` tells begins with the parent that started it: a small program
    started by a large one would be charged with the parent's memory. It serves where there is no /proc.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc): else it counts as resident until it is used again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


LARGEST = 32 << 20  # glibc's own upper end for the size from which memory comes straight from the system
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of <malloc.h>
_USUAL_TRIM = 2 * LARGEST  # where glibc's own rule ends


def one_heap() -> None:
    """From now on all threads take memory from one heap, where the C library is glibc. To be called before there are threads.

    With a heap for each, what one has freed is of no use to the others: a calibrated run of the sample holds 1,015 MB with one heap, 1,150 with several.
    """
    _mallopt(1, _ARENA_MAX)


@contextlib.contextmanager
def freed_memory_stays() -> Iterator[None]:
    """Meanwhile what is freed waits for its next use, where the C library is glibc, unless `trim` is called; blocks of more than 32 MB do not.

    For work that asks for the same few megabytes thousands of times: left alone, glibc gives the top of its heap back and fetches it anew, page by page, each
    wiped by the system. That was an eighth of the CPU time of a calibrated run of the sample.
    """
    _mallopt(1 << 30, _TRIM_THRESHOLD)
    _mallopt(LARGEST)
    try:
        yield
    finally:
        _mallopt(_USUAL_TRIM, _TRIM_THRESHOLD)
        trim()


@contextlib.contextmanager
def straight_from_the_system(size: int = 1 << 20) -> Iterator[None]:
    """Meanwhile blocks of `size` bytes and more go back to the system the moment they are freed, where the C library is glibc.

    Left alone it raises that size to the largest block ever freed, up to 32 MB. Loading a model in few bits frees blocks of up to that size around small ones that stay, and
    the heap keeps most of them: a model of 123 MiB then held 597 MiB of private memory, and `malloc_trim` gave back 93 of them. Afterwards the size is 32 MB.
    """
    _mallopt(size)
    try:
        yield
    finally:
        _mallopt(LARGEST)


def _mallopt(value: int, option: int = _MMAP_THRESHOLD) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)
