"""Positional file access: whole reads and writes at an offset, from any thread, with no shared file position."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fewbit.base.errors import InputError

_CHUNK = 1 << 30  # one system call moves at most 2 GiB on Linux
_seek_lock = threading.Lock()  # only for platforms without pread


def require_regular(path: Path) -> None:
    """Raises InputError FB-E0128 unless the path is an ordinary file: opening a pipe or a device may block for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError("FB-E0120", f"{path.name} cannot be opened: {error.strerror}", file=path) from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError("FB-E0128", f"{path.name} is {kind}, an ordinary file is needed", file=path)


def pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Fills `view` from `offset` of the file; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view):
        count = _read_some(fd, view[done : done + _CHUNK], offset + done)
        if count == 0:
            break
        done += count
    return done


def pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    """Writes all of `view` at `offset` of the file; OSError as the system raises it."""
    done = 0
    while done < len(view):
        done += _write_some(fd, view[done : done + _CHUNK], offset + done)


def _read_some(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def _write_some(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file looked like when it was opened: enough to notice that it was replaced, truncated or rewritten."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class OpenFile:
    """A file open for reading by position, that knows when it is no longer the file it was.

    Raises:
        InputError FB-E0111: when the file changed between opening and the end of a read.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path)
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self.stamp = Stamp.of(os.fstat(self.fd))

    @property
    def identity(self) -> list[int | str]:
        """What tells this content from another under the same name, without reading it."""
        return [self.stamp.size, self.stamp.mtime_ns]

    def read_into(self, view: memoryview, offset: int, tensor: str | None = None) -> None:
        """Fills `view` (bytes) from `offset`, then checks that the file is still the one that was opened."""
        count = pread_into(self.fd, view, offset)
        if count < len(view):
            self._changed(f"{count:,} of {len(view):,} bytes could be read at offset {offset:,}", tensor)
        self.check(tensor)

    def check(self, tensor: str | None = None) -> None:
        """Raises when the open file or the path it was opened by differs from what was seen at opening."""
        if Stamp.of(os.fstat(self.fd)) != self.stamp:
            self._changed("its size or time of change is no longer what it was when it was opened", tensor)
        try:
            now = Stamp.of(os.stat(self.path))
        except OSError:
            self._changed("it is no longer at its path", tensor)
        if now.inode != self.stamp.inode:
            self._changed("another file has taken its place", tensor)

    def _changed(self, how: str, tensor: str | None) -> None:
        raise InputError("FB-E0111", f"the file changed while it was being read: {how}", tensor=tensor, file=self.path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ReadableFile(Protocol):
    """A file open for reading by position: on this machine (`OpenFile`) or elsewhere."""

    path: Path
    stamp: Stamp

    @property
    def identity(self) -> list[int | str]: ...

    def read_into(self, view: memoryview, offset: int, tensor: str | None = None) -> None: ...

    def check(self, tensor: str | None = None) -> None: ...

    def close(self) -> None: ...


def hash_file(file: ReadableFile, chunk: int = 8 << 20) -> str:
    """sha256 of a whole open file, hex."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(chunk))
    for at in range(0, file.stamp.size, chunk):
        part = buffer[: min(chunk, file.stamp.size - at)]
        file.read_into(part, at)
        state.update(part)
    return state.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is, or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
