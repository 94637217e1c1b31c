"""Opens GGUF files, whole or split, as a checkpoint source.

Tensors of plain numbers (F32, F16, BF16 …) are read as such; block types come as the raw bytes of their rows, uint8
[*shape[:-1], bytes per row], for `fewbit.formats.gguf` to decode. Shapes are row-major: the reversed order of the file is turned round.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbit.base.errors import InputError
from fewbit.base.manifest import TensorInfo
from fewbit.base.record import digest
from fewbit.formats.gguf.metadata import GgufManifest, Metadata
from fewbit.store import sniff
from fewbit.store.fileio import OpenFile
from fewbit.store.gguf_check import check_metadata
from fewbit.store.gguf_header import Header, read_header

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf\Z")
MAX_PARTS = 4096


class GgufSource:
    """A model in one GGUF file or in the parts of a split one; see `checkpoint.Source`.

    Attributes:
        metadata: typed metadata of the model (of the first part, without the keys of the split).
        headers: what each file says, by name.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.root = paths[0].parent
        self._files: dict[str, OpenFile] = {}
        self.headers: dict[str, Header] = {}
        self._lock = threading.Lock()
        try:
            for path in paths:
                self._files[path.name] = OpenFile(path)
                self.headers[path.name] = read_header(self._files[path.name], path.name)
            tensors = self._merged(paths)
        except BaseException:
            self.close()
            raise
        first = self.headers[paths[0].name]
        self.metadata: Metadata = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
        self.manifest = GgufManifest(tensors, _as_strings(self.metadata), self.metadata)
        self.alignment = first.alignment
        self.config: dict[str, Any] = {}
        self.aux_files: tuple[Path, ...] = ()
        self.warnings = tuple(warning for header in self.headers.values() for warning in header.warnings)

    def _merged(self, paths: list[Path]) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for number, path in enumerate(paths):
            header = self.headers[path.name]
            _check_part(header, number, len(paths), path)
            for name, info in header.tensors.items():
                if name in tensors:
                    what = f"the tensor stands in {tensors[name].file} and in {info.file}"
                    raise InputError("FB-E0313", what, tensor=name, file=path)
                tensors[name] = info
        first = self.headers[paths[0].name].metadata
        promised = first["split.tensors.count"].data if "split.tensors.count" in first else len(tensors)
        if promised != len(tensors):
            what = f"split.tensors.count promises {promised:,} tensors, the parts hold {len(tensors):,}"
            raise InputError("FB-E0313", what, file=paths[0])
        check_metadata(first, tensors, paths[0])
        return tensors

    def read(self, info: TensorInfo) -> torch.Tensor:
        return self._read(info, info.offset, info.nbytes, info.shape)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        rows = info.shape[0]
        if not 0 <= start <= stop <= rows or (len(info.shape) == 1 and info.dtype.startswith("GGML:")):
            what = f"rows {start} to {stop} of a {info.dtype} tensor of shape {list(info.shape)}"
            raise InputError("FB-E0112", what, tensor=info.name, file=self.root / info.file)
        row = info.nbytes // rows
        return self._read(info, info.offset + start * row, (stop - start) * row, (stop - start, *info.shape[1:]))

    def _read(self, info: TensorInfo, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        from fewbit.store.tensors import from_buffer

        buffer = np.empty(nbytes, np.uint8)
        self._files[info.file].read_into(buffer.data, offset, info.name)
        if not info.dtype.startswith("GGML:"):
            return from_buffer(buffer, info.dtype, shape)
        rows = info.numel // info.shape[-1]
        return torch.from_numpy(buffer).reshape(*shape[:-1], info.nbytes // rows)

    def fingerprint(self, full: bool = False) -> str:
        from fewbit.store.fileio import hash_file

        facts = []
        for name, file in self._files.items():
            file.check()
            facts.append(
                [name, self.headers[name].sha256, hash_file(file) if full else [file.stamp.size, file.stamp.mtime_ns]]
            )
        return digest({"files": facts})

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()


def open_gguf(path: Path, revision: str | None = None) -> GgufSource:
    """Opens a GGUF file, any part of a split one, or a folder that holds just one model.

    Raises:
        InputError FB-E0301 .. FB-E0313: what is malformed, at which byte, and what is allowed.
    """
    path = _the_file(path) if path.is_dir() else path
    file = OpenFile(path)
    try:
        kind = sniff.kind_of(path)
        if kind not in ("gguf", "unknown", "safetensors"):
            sniff.refuse(path, kind)
        header = read_header(file, path.name)
    finally:
        file.close()
    return GgufSource(_parts(path, header))


def _the_file(folder: Path) -> Path:
    names = sorted(child.name for child in folder.iterdir() if child.name.endswith(".gguf"))
    firsts = [name for name in names if not (found := _PART.match(name)) or int(found[2]) == 1]
    if len(firsts) != 1:
        what = (
            f"the folder holds {len(firsts)} GGUF models: {', '.join(firsts[:8]) or 'only later parts of a split one'}"
        )
        raise InputError("FB-E0313", what, file=folder, remedy="name the file itself")
    return folder / firsts[0]


def _parts(path: Path, header: Header) -> list[Path]:
    """All files of the model that a file belongs to, in order."""
    value = header.metadata.get("split.count")
    count = value.data if value is not None and value.spelling == "u16" else 1
    if count <= 1:
        return [path]
    found = _PART.match(path.name)
    if not found or int(found[3]) != count or count > MAX_PARTS:
        what = f"the file says it is one of {count:,} parts, its name must then end in -NNNNN-of-{count:05d}.gguf"
        raise InputError("FB-E0313", what, file=path)
    paths = [path.with_name(f"{found[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        what = f"{len(missing)} of {count} parts are missing: {', '.join(missing[:5])}"
        raise InputError("FB-E0313", what, file=path, remedy="put all parts into one folder")
    return paths


def _check_part(header: Header, number: int, count: int, path: Path) -> None:
    """That a part is the one its name says it is."""
    if count == 1:
        return
    said = {key: header.metadata.get(f"split.{key}") for key in ("no", "count")}
    for key, expected in (("no", number), ("count", count)):
        value = said[key]
        if value is None or value.spelling != "u16" or value.data != expected:
            got = "missing" if value is None else f"{value.spelling} {value.data}"
            raise InputError("FB-E0313", f"split.{key} is {got}; it must be u16 {expected} in this part", file=path)


def _as_strings(metadata: Metadata) -> dict[str, str]:
    """Short values as text, for the manifest."""
    return {
        key: f"[{len(value.data)} x {value.kind}]" if value.is_array else str(value.data)
        for key, value in metadata.items()
    }
