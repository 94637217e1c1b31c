"""Writes a checkpoint beside its final place and renames it when it is whole.

    <out>.partial/              shards at full size, filled tensor by tensor, in any order, by any thread
    <out>.partial/.fewbit/      layout.json, lock, and whatever the run keeps there (its journal)

`finish` syncs the shards, writes the small files, the manifest with every file's sha256 last, and renames the folder. A
folder without the manifest is by definition incomplete. The bytes do not depend on the order of writing, so a run that was
killed and resumed ends with the same files.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from fewbit.base.errors import InputError, ResourceError
from fewbit.base.manifest import TensorInfo
from fewbit.base.record import readable_json
from fewbit.store import strictjson
from fewbit.store.fileio import OpenFile, free_bytes, hash_file, pread_into, pwrite_all
from fewbit.store.layout import INDEX_NAME, Layout
from fewbit.store.running_hash import RunningHash

MANIFEST_NAME = "fewbit-manifest.json"
SCRATCH = ".fewbit"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(out: Path) -> Path:
    """The folder that output is written in before it is whole."""
    return out.with_name(out.name + ".partial")


def scratch_path(out: Path) -> Path:
    """The folder for a run's own records (its journal); it goes when the output is whole."""
    return partial_path(out) / SCRATCH


def check_output(out: Path, sources: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Refuses an output that would destroy something.

    Args:
        out: folder to be written.
        sources: files and folders that are read.
        overwrite: whether a non-empty `out` may be replaced.

    Raises:
        InputError FB-E0140: `out` is a source, or holds one, or lies in one. FB-E0141: it is not empty or not a folder. FB-E0144: no folder can be made there.
    """
    place = out.resolve()
    for source in sources:
        other = source.resolve()
        same = out.exists() and source.exists() and os.path.samefile(out, source)
        if same or place == other or other.is_relative_to(place) or (other.is_dir() and place.is_relative_to(other)):
            raise InputError("FB-E0140", f"the output {out} and the input {source} lie in one another", file=out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("FB-E0141", f"the output {out} exists and is not a folder", file=out)
    check_place(out.parent)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError("FB-E0141", f"the output {out} exists and is not empty", file=out)


def check_place(folder: Path) -> None:
    """Refuses a folder that cannot be made or written in.

    Raises:
        InputError: FB-E0144.
    """
    near = folder.absolute()
    while not near.exists():
        near = near.parent
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        why = "may not be written in" if near.is_dir() else "is no folder"
        raise InputError("FB-E0144", f"nothing can be written below {near}: it {why}", file=folder)


class ShardWriter:
    """Writes the tensors of a layout at their final places; thread-safe.

    Opening it again on the same layout after a crash goes on where the files are; which tensors are done is for the run to know.

    Args:
        out: final folder.
        layout: from `lay_out`.
        overwrite: whether a non-empty `out` may be replaced at the end.
        sources: files and folders being read, which the output must not touch.

    Raises:
        InputError FB-E0140, FB-E0141: see `check_output`. FB-E0142: the partial folder belongs to another layout or process.
        ResourceError FB-E0501: the disk has no room; what is written stays.
    """

    def __init__(self, out: Path, layout: Layout, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
        self.out, self.layout = Path(out).absolute(), layout
        check_output(self.out, sources, overwrite)
        self.partial, self.scratch = partial_path(self.out), scratch_path(self.out)
        self._fds: dict[str, int] = {}
        self._hashes: dict[str, RunningHash] = {}
        self._lock_fd = -1
        self._mutex = threading.Lock()
        self.resumed = self._claim()
        try:
            self._require_room()
            for shard in layout.shards:
                self._create(shard.name, shard.head, shard.size)
                self._hashes[shard.name].wrote(0, memoryview(shard.head))
        except BaseException:
            self.close()
            if not self.resumed:  # nothing is lost: no tensor was written yet
                shutil.rmtree(self.partial)
            raise

    def _claim(self) -> bool:
        """Takes the partial folder for this process; True when it holds earlier work on this layout."""
        record = self.scratch / "layout.json"
        if self.partial.exists() and not record.exists() and any(self.partial.iterdir()):
            what = f"{self.partial} holds files that are not of an unfinished run"
            raise InputError("FB-E0142", what, file=self.partial)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._lock_fd = lock(self.scratch / "lock")
        expected = {"digest": self.layout.digest(), "files": [shard.name for shard in self.layout.shards]}
        if record.exists():
            if strictjson.load_object(record, "FB-E0142") != expected:
                self.close()
                what = f"{self.partial} belongs to a run with other tensors, shapes or shards"
                raise InputError("FB-E0142", what, file=self.partial)
            return True
        _write_whole(record, readable_json(expected).encode())
        return False

    def _require_room(self) -> None:
        """Refuses before the run what would fill the disk during it."""
        held = 0
        for shard in self.layout.shards:
            path = self.partial / shard.name
            held += min(getattr(path.stat(), "st_blocks", 0) * 512, shard.size) if path.exists() else 0
        needed, free = self.layout.nbytes - held, free_bytes(self.partial)
        if needed > free:
            raise _disk_full(needed, free, self.partial)

    def _create(self, name: str, head: bytes, size: int) -> None:
        fd = os.open(self.partial / name, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        self._fds[name], self._hashes[name] = fd, RunningHash(fd)
        if os.fstat(fd).st_size == size and _reads(fd, head):
            return
        try:
            os.ftruncate(fd, size)
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(fd, 0, size)
            pwrite_all(fd, memoryview(head), 0)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without preallocation
                pwrite_all(fd, memoryview(head), 0)
                return
            raise self._failed(error, name, size) from None

    def write(self, name: str, data: Any) -> None:
        """Writes a tensor (torch, matching the layout's dtype and size) or its bytes (any buffer) at its place.

        Raises:
            InputError FB-E0143: not a tensor of the layout, or of another dtype or size.
            ResourceError FB-E0501: the disk is full; the partial folder stays.
        """
        info = self._info(name)
        view = _bytes_of(info, data)
        if len(view) != info.nbytes:
            what = f"{len(view):,} bytes for a tensor of {info.dtype} {list(info.shape)}, {info.nbytes:,} needed"
            raise InputError("FB-E0143", what, tensor=name)
        try:
            pwrite_all(self._fds[info.file], view, info.offset)
        except OSError as error:
            raise self._failed(error, info.file, info.nbytes) from None
        self._hashes[info.file].wrote(info.offset, view)

    def write_at(self, name: str, start: int, data: Any) -> None:
        """Writes bytes (any buffer) from byte `start` of a tensor on: for tensors that pass through in pieces.

        Raises:
            InputError FB-E0143: the bytes reach past the tensor's end.
            ResourceError FB-E0501: the disk is full; the partial folder stays.
        """
        info, view = self._info(name), memoryview(data).cast("B")
        if start < 0 or start + len(view) > info.nbytes:
            what = f"bytes {start:,} to {start + len(view):,} of a tensor of {info.nbytes:,}"
            raise InputError("FB-E0143", what, tensor=name)
        try:
            pwrite_all(self._fds[info.file], view, info.offset + start)
        except OSError as error:
            raise self._failed(error, info.file, len(view)) from None
        self._hashes[info.file].wrote(info.offset + start, view)

    def read_back(self, name: str) -> memoryview:
        """The bytes now at a tensor's place, for hashing what an earlier run wrote."""
        info = self._info(name)
        buffer = memoryview(bytearray(info.nbytes))
        pread_into(self._fds[info.file], buffer, info.offset)
        return buffer

    def checksum(self, name: str, chunk: int = 4 << 20) -> int:
        """crc32 of the bytes now at a tensor's place: enough to know what an interrupted run wrote whole, at three times sha256's speed."""
        info = self._info(name)
        found, buffer = 0, memoryview(bytearray(min(chunk, max(info.nbytes, 1))))
        for at in range(0, info.nbytes, chunk):
            part = buffer[: min(chunk, info.nbytes - at)]
            pread_into(self._fds[info.file], part, info.offset + at)
            found = zlib.crc32(part, found)
        return found

    def sync(self, names: Iterable[str] | None = None) -> None:
        """Returns when the tensors named (None: all) are on the disk."""
        files = self._fds if names is None else dict.fromkeys(self._info(name).file for name in names)
        for file in files:
            try:
                getattr(os, "fdatasync", os.fsync)(self._fds[file])
            except OSError as error:
                raise self._failed(error, file, 0) from None

    def finish(
        self, small_files: Mapping[str, bytes], copies: Iterable[Path] = (), manifest: Mapping[str, Any] | None = None
    ) -> Path:
        """Makes the output whole and moves it to its place.

        Args:
            small_files: relative name -> content (config.json and the like).
            copies: files to copy along under their own names; a small file of the same name wins.
            manifest: facts for `fewbit-manifest.json`; `files` (name -> bytes, sha256) is added.

        Returns:
            The final folder.
        """
        self.sync()
        index = self.layout.index()
        content = dict(small_files) | ({INDEX_NAME: index} if index else {})
        copied = {path.name: path for path in copies if path.name not in content}
        try:
            for name, data in content.items():
                _write_whole(self._inside(name), data)
            for name, path in copied.items():
                _write_whole(self._inside(name), path.read_bytes())
            self._remove_others({*content, *copied, *self._fds})
            listing = self._listing(sorted({*content, *copied, *self._fds}))
            _write_whole(self.partial / MANIFEST_NAME, readable_json({**(manifest or {}), "files": listing}).encode())
            _sync_folder(self.partial)
        except OSError as error:
            raise self._failed(error, str(self.partial), 0) from None
        self.close()
        try:
            _move_into_place(self.partial, self.out)
        except OSError as error:
            raise self._failed(error, str(self.partial), 0) from None
        shutil.rmtree(self.out / SCRATCH)
        return self.out

    def _listing(self, names: list[str]) -> dict[str, dict[str, Any]]:
        def facts(name: str) -> dict[str, Any]:
            if name in self._hashes:
                size = os.fstat(self._fds[name]).st_size
                return {"bytes": size, "sha256": self._hashes[name].finish(size)}
            file = OpenFile(self.partial / name)
            try:
                return {"bytes": file.stamp.size, "sha256": hash_file(file)}
            finally:
                file.close()

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return dict(zip(names, pool.map(facts, names), strict=True))

    def _inside(self, name: str) -> Path:
        path = self.partial / name
        if Path(name).is_absolute() or ".." in Path(name).parts or name == MANIFEST_NAME:
            raise InputError("FB-E0143", f"the output may not hold a file {name!r}", file=self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _remove_others(self, keep: set[str]) -> None:
        """What an earlier, killed finish left under other names."""
        for path in self.partial.rglob("*"):
            name = path.relative_to(self.partial).as_posix()
            if path.is_file() and name not in keep and not name.startswith(SCRATCH + "/"):
                path.unlink()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.layout.tensors:
            raise InputError("FB-E0143", "the layout has no such tensor", tensor=name, file=self.out)
        return self.layout.tensors[name]

    def _failed(self, error: OSError, file: str, needed: int) -> ResourceError:
        if error.errno not in _NO_ROOM:
            what = f"writing failed: {error.strerror}; what is written stays in {self.partial}"
            return ResourceError("FB-E0502", what, file=self.partial / file)
        return _disk_full(needed, free_bytes(self.partial), self.partial / file)

    def close(self) -> None:
        """Closes the files and frees the partial folder for another process; what is written stays."""
        with self._mutex:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _disk_full(needed: int, free: int, file: Path) -> ResourceError:
    missing = max(needed - free, 1)
    what = f"the disk is full: {needed:,} bytes to write, {free:,} free, {missing:,} missing"
    return ResourceError("FB-E0501", what, file=file)


def _bytes_of(info: TensorInfo, data: Any) -> memoryview:
    if not hasattr(data, "untyped_storage"):
        return memoryview(data).cast("B")
    from fewbit.store.tensors import TORCH_DTYPES, as_bytes, stored_shape

    if data.dtype is not TORCH_DTYPES[info.dtype] or tuple(data.shape) != stored_shape(info.dtype, info.shape):
        what = f"{data.dtype} {list(data.shape)} for a tensor laid out as {info.dtype} {list(info.shape)}"
        raise InputError("FB-E0143", what, tensor=info.name)
    return as_bytes(data)


def _reads(fd: int, head: bytes) -> bool:
    got = bytearray(len(head))
    return pread_into(fd, memoryview(got), 0) == len(head) and got == head


def _write_whole(path: Path, data: bytes) -> None:
    """Writes beside, syncs and renames."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path) -> int:
    """Holds a file locked for as long as it is open; a second writer on the same output is refused.

    Raises:
        InputError: FB-E0142.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:  # no such locks on this platform
        pass
    except OSError:
        os.close(fd)
        remedy = "wait until it ends, or choose another output"
        raise InputError("FB-E0142", "another run is writing this output now", file=path, remedy=remedy) from None
    return fd


def _move_into_place(partial: Path, out: Path) -> None:
    """Renames the finished folder; an old output steps aside first and is deleted only when the new one is in place."""
    aside = out.with_name(out.name + ".replaced")
    if out.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(out, aside)
    try:
        os.rename(partial, out)
    except OSError:
        if aside.exists():
            os.rename(aside, out)
        raise
    _sync_folder(out.parent)
    if aside.exists():
        shutil.rmtree(aside)
