"""The sha256 of a file that is being written: goes along with the writing as far as it comes in order, so that little is left at the end."""

from __future__ import annotations

import hashlib
import threading

from fewbit.store.fileio import pread_into

_CHUNK = 4 << 20


class RunningHash:
    """Hashes a file from its first byte on, whenever the bytes that come next have been written; thread-safe.

    Pieces may be written in any order, each of them once. Whoever writes hashes what has become contiguous, unless another thread is at it.

    Args:
        fd: the file, open for reading.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._state, self._reached = hashlib.sha256(), 0
        self._written: dict[int, int] = {}  # offset -> bytes, not hashed yet
        self._twice = False
        self._noting, self._hashing = threading.Lock(), threading.Lock()

    def wrote(self, offset: int, view: memoryview) -> None:
        """Takes notice of bytes that have been written at `offset`."""
        with self._noting:
            self._twice |= offset < self._reached or offset in self._written
            self._written[offset] = len(view)
        if not self._hashing.acquire(blocking=False):
            return
        try:
            while (size := self._next()) is not None:
                if self._reached == offset:
                    self._state.update(view)
                    self._reached += size
                else:
                    self._read_on(self._reached + size)
        finally:
            self._hashing.release()

    def _next(self) -> int | None:
        with self._noting:
            return self._written.pop(self._reached, None)

    def _read_on(self, end: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(end - self._reached, 1))))
        while self._reached < end:
            part = buffer[: min(_CHUNK, end - self._reached)]
            if pread_into(self._fd, part, self._reached) < len(part):
                break
            self._state.update(part)
            self._reached += len(part)

    def finish(self, size: int) -> str:
        """sha256 of the file's `size` bytes, hex; call when nobody writes any more."""
        with self._hashing:
            if self._twice:  # something was written over what had been hashed
                self._state, self._reached = hashlib.sha256(), 0
            self._read_on(size)
            return self._state.hexdigest()
