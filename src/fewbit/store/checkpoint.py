"""Checkpoints: facts about tensors now, their data when asked.

`open_checkpoint` finds out what a path or a hub id is, by the bytes and not by the name, and hands it to the opener of that
container. An opener returns a `Source`; adding a container is one file and one row of `OPENERS`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.store import sniff

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}\Z")

# container -> "module:function"; the function takes (path, revision=…) and returns a Source
OPENERS: dict[str, str] = {
    "safetensors": "fewbit.store.directory:open_local",
    "gguf": "fewbit.store.gguf:open_gguf",
    "hub": "fewbit.store.hub:open_hub",
}


class Source(Protocol):
    """What an opener hands back: everything a container knows about one checkpoint.

    Attributes:
        root: folder of the checkpoint (for a hub id, of its snapshot).
        manifest: all tensors; each `file` is relative to `root`.
        config: the configuration as plain JSON data, dangerous keys removed.
        aux_files: files to copy along with the weights, under `root`.
        warnings: what was noticed and let pass, a sentence each.
    """

    root: Path
    manifest: Manifest
    config: dict[str, Any]
    aux_files: tuple[Path, ...]
    warnings: tuple[str, ...]

    def read(self, info: TensorInfo) -> torch.Tensor: ...

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor: ...

    def fingerprint(self, full: bool = False) -> str: ...

    def close(self) -> None: ...


class Checkpoint:
    """A checkpoint open for reading, from any thread; a context manager.

    Attributes are those of `Source`.
    """

    __slots__ = ("_source", "aux_files", "config", "manifest", "root", "warnings")

    def __init__(self, source: Source) -> None:
        self._source = source
        self.root, self.manifest, self.config = source.root, source.manifest, source.config
        self.aux_files, self.warnings = source.aux_files, source.warnings

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in CPU memory of its own, as stored (sub-byte dtypes as raw uint8)."""
        return self._source.read(self._info(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension."""
        return self._source.read_rows(self._info(name), start, stop)

    def fingerprint(self, full: bool = False) -> str:
        """sha256 that changes when the checkpoint does, hex.

        Args:
            full: hash every byte of data. Otherwise headers, sizes and times of change stand for it.
        """
        return self._source.fingerprint(full)

    def close(self) -> None:
        self._source.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.manifest:
            raise InputError("FB-E0112", f"the checkpoint has no tensor {name!r}", tensor=name, file=self.root)
        return self.manifest[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.root)!r}, {len(self.manifest)} tensors)"


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint: headers only, no tensor is read.

    Args:
        source: a folder, a .safetensors file, an index.json, a .gguf file, or a hub id like `org/name`.
        revision: branch, tag or commit, for a hub id only.

    Raises:
        InputError: in the FB-E01xx and FB-E02xx range; what is malformed, where, and what to do.
    """
    path = Path(source).expanduser()
    container = container_of(path, str(source))
    module, _, function = OPENERS[container].partition(":")
    opener = getattr(importlib.import_module(module), function)
    return Checkpoint(opener(str(source) if container == "hub" else path, revision=revision))


def container_of(path: Path, spelling: str) -> str:
    """The key of OPENERS that a path or hub id belongs to."""
    if path.is_dir():
        names = [child.name for child in path.iterdir()]
        only_gguf = any(name.endswith(".gguf") for name in names) and not any(".safetensors" in name for name in names)
        return "gguf" if only_gguf else "safetensors"
    if path.exists():
        if path.name.endswith(".json"):
            return "safetensors"
        kind = sniff.kind_of(path)
        if kind == "gguf":
            return "gguf"
        if kind == "unknown" and path.name.endswith(sniff.PICKLE_NAMES):
            sniff.refuse_pickle(path)
        sniff.require_safetensors(path)
        return "safetensors"
    if _HUB_ID.match(spelling) and not path.is_absolute():
        return "hub"
    raise InputError("FB-E0120", f"there is no file, folder or hub id {spelling!r}", file=path)
