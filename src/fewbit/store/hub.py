"""Checkpoints on the Hugging Face hub: headers by ranged reads, a shard only when one of its tensors is read.

Planning for a model of a terabyte so costs one request per shard. What is read in full lands in the hub's own cache, where every
other program finds it. Offline, a cached snapshot serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fewbit.base.errors import InputError
from fewbit.store import config as configs
from fewbit.store import sniff
from fewbit.store.directory import AUX_NAMES, LocalSource, checked, find_weights, open_local
from fewbit.store.fileio import OpenFile, ReadableFile, Stamp

_T = TypeVar("_T")
_FIRST_READ = 1 << 18  # most headers fit in it
_REQUESTS = 8


class Hub(Protocol):
    """What is needed of a hub. Each call raises InputError FB-E0130 (unreachable) or FB-E0131 (not there)."""

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, tuple[int, str]]]:
        """The commit, and its files: name -> (bytes, content id)."""
        ...

    def fetch(self, repo: str, commit: str, name: str) -> Path:
        """Downloads a file unless it is cached; its path in the snapshot folder."""
        ...

    def read_range(self, repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        ...

    def cached(self, repo: str, revision: str | None) -> Path | None:
        """The snapshot folder as the cache has it, without any request."""
        ...


class HuggingFaceHub:
    """`Hub` by the package huggingface_hub."""

    def __init__(self) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.errors
        except ImportError:
            raise InputError("FB-E0132", "a hub id was given but huggingface_hub is not installed") from None
        self._hub = huggingface_hub
        self._files: Any = None

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, tuple[int, str]]]:
        info = self._asked(repo, lambda: self._hub.HfApi().model_info(repo, revision=revision, files_metadata=True))
        files = {file.rfilename: (file.size or 0, file.blob_id or "") for file in info.siblings}
        if "config.json" in files:  # by the revision's own name, so that the cache knows it when there is no network
            self.fetch(repo, revision or "main", "config.json")
        return info.sha, files

    def fetch(self, repo: str, commit: str, name: str) -> Path:
        return Path(self._asked(f"{repo}/{name}", lambda: self._hub.hf_hub_download(repo, name, revision=commit)))

    def read_range(self, repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
        self._files = self._files or self._hub.HfFileSystem()
        path = f"{repo}@{commit}/{name}"
        return self._asked(path, lambda: self._files.cat_file(path, start=start, end=stop))

    def cached(self, repo: str, revision: str | None) -> Path | None:
        found = self._hub.try_to_load_from_cache(repo, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None

    def _asked(self, what: str, call: Callable[[], _T]) -> _T:
        """The result of a call, its failure as one of ours; the library raises errors of many families here."""
        errors = self._hub.errors
        try:
            return call()
        except errors.LocalEntryNotFoundError as error:
            raise _unreachable(what, error) from None
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.EntryNotFoundError,
            errors.HFValidationError,
            FileNotFoundError,
        ) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError("FB-E0131", f"the hub has no {what} for you: {reason[0][:300]}", file=what) from None
        except MemoryError:
            raise
        except Exception as error:
            raise _unreachable(what, error) from None


def _unreachable(what: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[:1] or [""]
    return InputError("FB-E0130", f"the hub did not give {what}: {type(error).__name__}: {reason[0][:300]}", file=what)


class RemoteFolder:
    """A repository at one commit, as a `directory.Folder`."""

    def __init__(self, hub: Hub, repo: str, commit: str, files: dict[str, tuple[int, str]], root: Path) -> None:
        self.hub, self.repo, self.commit, self.files, self.root = hub, repo, commit, files, root
        self.names = tuple(sorted(name for name in files if "/" not in name))

    def has(self, name: str) -> bool:
        return name in self.files

    def fetch(self, name: str) -> Path:
        return self.hub.fetch(self.repo, self.commit, name)


class RemoteFile:
    """A file on the hub, open for reading: its beginning by ranges, the whole of it from the cache once a tensor is asked for."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        size, content = folder.files[name]
        self.path, self.stamp = folder.root / name, Stamp(size, 0, 0)
        self._folder, self._name, self._content = folder, name, content
        self._start = b""
        self._local: OpenFile | None = None
        self._lock = threading.Lock()

    @property
    def identity(self) -> list[int | str]:
        return [self.stamp.size, self._content]

    def read_start(self) -> None:
        """Asks for the first bytes, where the header lies."""
        self._start = self._range(0, min(_FIRST_READ, self.stamp.size))

    def read_into(self, view: memoryview, offset: int, tensor: str | None = None) -> None:
        end = offset + len(view)
        if tensor is not None or self._local:
            self._whole().read_into(view, offset, tensor)
        else:
            known = self._start[offset:end]
            view[:] = known + self._range(offset + len(known), end)

    def _range(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        data = self._folder.hub.read_range(self._folder.repo, self._folder.commit, self._name, start, stop)
        if len(data) != stop - start:
            what = f"the hub sent {len(data):,} bytes where {stop - start:,} were asked for"
            raise InputError("FB-E0130", what, file=self.path)
        return data

    def _whole(self) -> OpenFile:
        with self._lock:
            if self._local is None:
                local = OpenFile(self._folder.fetch(self._name))
                if local.stamp.size != self.stamp.size:
                    local.close()
                    what = f"the file in the cache has {local.stamp.size:,} bytes, on the hub {self.stamp.size:,}"
                    raise InputError("FB-E0111", what, file=local.path)
                self._local = local
            return self._local

    def check(self, tensor: str | None = None) -> None:
        if self._local:
            self._local.check(tensor)

    def close(self) -> None:
        if self._local:
            self._local.close()


def open_hub(repo: str, revision: str | None = None, hub: Hub | None = None) -> LocalSource:
    """Opens a hub id: small files are fetched, headers are read by ranges, weights stay where they are until read.

    Raises:
        InputError FB-E0130, FB-E0131: from the hub; else as for a folder.
    """
    hub = hub or HuggingFaceHub()
    try:
        commit, files = hub.listing(repo, revision)
    except InputError as error:
        snapshot = hub.cached(repo, revision) if error.code == "FB-E0130" else None
        if snapshot is None:
            raise
        return open_local(snapshot)
    if "config.json" not in files:
        pickles = [name for name in files if name.endswith(sniff.PICKLE_NAMES)]
        raise InputError("FB-E0201", f"{repo} has no config.json{', only pickles' if pickles else ''}", file=repo)
    root = hub.fetch(repo, commit, "config.json").parent
    folder = RemoteFolder(hub, repo, commit, files, root)
    weights = find_weights(folder)
    with ThreadPoolExecutor(max_workers=_REQUESTS) as pool:
        remote = {name: RemoteFile(folder, name) for name in weights.files}
        wait: list[Future[Any]] = [pool.submit(file.read_start) for file in remote.values()]
        wait += [pool.submit(folder.fetch, name) for name in AUX_NAMES if name in files]
        for done in wait:
            done.result()
    config, warnings = configs.read_config(root, required=True)
    opened: dict[str, ReadableFile] = {**remote}
    return checked(LocalSource(root, weights, config, warnings, opened))
