"""A checkpoint in a folder of safetensors files: which files belong to it, and do they agree with the index."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.base.record import digest
from fewbit.store import config as configs
from fewbit.store import sniff, strictjson
from fewbit.store.fileio import OpenFile, ReadableFile, hash_file
from fewbit.store.safetensors import Header, read_header

if TYPE_CHECKING:
    import torch

    from fewbit.store.tensors import Files

INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(.*?)-?(\d{5,6})-of-(\d{5,6})\.safetensors\Z")
# beside the weights, these belong to the model: tokenizer, processor, generation, template, licence and card
AUX_NAMES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
_AUX_SUFFIXES = (".tiktoken", ".jinja")


@dataclass(frozen=True)
class Weights:
    """The files of a checkpoint before their headers are read.

    Attributes:
        files: relative paths of safetensors files, in order.
        weight_map: tensor -> relative path, from the index; None without index.
        total_size: what the index claims, if it does.
        warnings: sentences.
    """

    files: tuple[str, ...]
    weight_map: dict[str, str] | None
    total_size: int | None
    warnings: tuple[str, ...]


class Folder(Protocol):
    """A folder of files: their names now, a file itself when asked."""

    root: Path
    names: tuple[str, ...]

    def has(self, name: str) -> bool: ...

    def fetch(self, name: str) -> Path:
        """A path on this machine that holds the file."""


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = tuple(sorted(child.name for child in root.iterdir()))

    def has(self, name: str) -> bool:
        return os.path.lexists(self.root / name)

    def fetch(self, name: str) -> Path:
        return self.root / name


def find_weights(folder: Folder) -> Weights:
    """Decides which files of a folder are its weights."""
    root, names = folder.root, folder.names
    found = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        what = f"the folder has {len(indexes)} indexes ({', '.join(indexes[:4])})"
        raise InputError("FB-E0126", what, file=root, remedy="give the path of the index that is meant")
    if indexes:
        single = indexes[0].removesuffix(".index.json")
        if single in found:
            weights = read_index(folder, indexes[0])
            if weights.files != (single,):
                what = f"both {single} and {indexes[0]}, which lists other files, lie in the folder"
                raise InputError("FB-E0126", what, file=root)
            return weights
        return read_index(folder, indexes[0])
    if "model.safetensors" in found:
        others = tuple(f"{name} is not part of the checkpoint" for name in found if name != "model.safetensors")
        return Weights(("model.safetensors",), None, None, others)
    if len(found) == 1 and not _NUMBERED.match(found[0]):
        return Weights((found[0],), None, None, ())
    if found:
        return _numbered(root, found)
    pickles = [name for name in names if name.endswith(sniff.PICKLE_NAMES)]
    if pickles:
        sniff.refuse_pickle(root / pickles[0])
    raise InputError("FB-E0120", "the folder holds no safetensors or GGUF file", file=root)


def _numbered(root: Path, found: list[str]) -> Weights:
    """Shards without an index: taken when the numbering proves that all are there."""
    parts = [part for name in found if (part := _NUMBERED.match(name))]
    if len(parts) == len(found) and len({(part[1], part[3]) for part in parts}) == 1:
        total = int(parts[0][3])
        missing = set(range(1, total + 1)) - {int(part[2]) for part in parts}
        if missing:
            name = f"{parts[0][1]}-{min(missing):05d}-of-{total:05d}.safetensors"
            raise InputError(
                "FB-E0123", f"{len(missing)} of {total} shards are missing, {name} first", file=root / name
            )
        if len(found) == total:
            return Weights(tuple(found), None, None, ("the shards have no index; their own headers were used",))
    what = f"{len(found)} safetensors files and no index: which of them belong together? ({', '.join(found[:4])})"
    raise InputError("FB-E0126", what, file=root, remedy="give the path of one file, or add the index json")


def read_index(folder: Folder, name: str) -> Weights:
    """Reads and checks a sharded index of a folder; see the index codes FB-E0121 .. FB-E0124."""
    path = folder.fetch(name)
    sniff_text(path)
    index = strictjson.load_object(path, "FB-E0121", max_values=4_000_000)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("FB-E0121", "weight_map must be an object of tensor names and file names", file=path)
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            what = f"weight_map gives a {type(file).__name__} instead of a file name"
            raise InputError("FB-E0121", what, tensor=tensor, file=path)
    files = tuple(sorted(set(weight_map.values())))
    for file in files:
        check_inside(path, file)
        if not folder.has(file):
            inside = [tensor for tensor, where in weight_map.items() if where == file]
            what = f"the shard {file}, with {len(inside)} tensors of the index, is missing"
            raise InputError("FB-E0123", what, tensor=inside[0], file=path.parent / file)
    warnings = _unlisted(folder, files)
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Weights(files, weight_map, size if type(size) in (int, float) else None, warnings)


def _unlisted(folder: Folder, files: tuple[str, ...]) -> tuple[str, ...]:
    """An unlisted shard of the same series is an error; any other safetensors file is worth a sentence."""
    series = {(part[1], part[3]) for part in map(_NUMBERED.match, files) if part}
    warnings = []
    for name in folder.names:
        if not name.endswith(".safetensors") or name in files:
            continue
        part = _NUMBERED.match(name)
        if part and (part[1], part[3]) in series:
            what = f"the shard {name} lies in the folder but the index does not list it"
            raise InputError("FB-E0124", what, file=folder.root / name)
        warnings.append(f"{name} is not part of the checkpoint")
    return tuple(warnings)


def check_inside(index: Path, file: str) -> None:
    """Refuses a file name of the index that could lead out of the folder, by its spelling or by a link."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    if (
        not file.endswith(".safetensors")
        or posix.is_absolute()
        or windows.drive
        or windows.root
        or "\\" in file
        or ".." in posix.parts
        or any(ord(char) < 32 for char in file)
    ):
        raise InputError(
            "FB-E0122", f"the index names the file {file[:200]!r}, a plain name in its folder is needed", file=index
        )
    target, root = (index.parent / file), index.parent.resolve()
    if os.path.lexists(target) and not any(target.resolve().is_relative_to(base) for base in allowed_roots(root)):
        raise InputError("FB-E0122", f"{file} is a link to {target.resolve()}, outside the checkpoint", file=target)


def allowed_roots(root: Path) -> tuple[Path, ...]:
    """Where links of a folder may lead: itself and, in a hub cache (…/snapshots/<commit>), the blobs beside."""
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        return root, (root.parent.parent / "blobs").resolve()
    return (root,)


def sniff_text(path: Path) -> None:
    """Refuses pointers and web pages in place of a JSON file."""
    kind = sniff.kind_of(path)
    if kind not in ("safetensors", "unknown", "gguf"):
        sniff.refuse(path, kind)


class LocalSource:
    """A checkpoint of safetensors files; see `checkpoint.Source`.

    Args:
        root: the folder.
        weights: its files.
        config, warnings: from `read_config`.
        opened: files already open, by relative path; the others are opened under `root`.
    """

    def __init__(
        self, root: Path, weights: Weights, config: dict[str, Any], warnings: tuple[str, ...],
        opened: dict[str, ReadableFile] | None = None,
    ) -> None:  # fmt: skip
        self.root, self.config = root, config
        self._open = dict(opened or {})
        self._reader: Files | None = None
        try:
            headers = {name: self._header(name) for name in weights.files}
            self.manifest, found = merge(headers, weights, self)
        except BaseException:
            self.close()
            raise
        self._hashes = {name: header.sha256 for name, header in headers.items()}
        self.aux_files = aux_files(root)
        noted = tuple(warning for header in headers.values() for warning in header.warnings)
        self.warnings = weights.warnings + noted + found + warnings + code_warnings(self.aux_files)

    def _header(self, name: str) -> Header:
        if name not in self._open:
            sniff.require_safetensors(self.root / name)
            self._open[name] = OpenFile(self.root / name)
        return read_header(self._open[name], name)

    def _files(self) -> Files:
        if self._reader is None:
            from fewbit.store.tensors import Files

            self._reader = Files(self.root, self._open)
        return self._reader

    def read(self, info: TensorInfo) -> torch.Tensor:
        return self._files().read(info)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self._files().read_rows(info, start, stop)

    def same_bytes(self, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether two tensors of equal size hold the same bytes."""
        chunk = 4 << 20
        for at in range(0, a.nbytes, chunk):
            count = min(chunk, a.nbytes - at)
            left, right = bytearray(count), bytearray(count)
            self._open[a.file].read_into(memoryview(left), a.offset + at, a.name)
            self._open[b.file].read_into(memoryview(right), b.offset + at, b.name)
            if left != right:
                return False
        return True

    def fingerprint(self, full: bool = False) -> str:
        facts = []
        for name, file in self._open.items():
            file.check()
            data = hash_file(file) if full else file.identity
            facts.append([name, self._hashes[name], data])
        return digest({"files": facts, "config": self.config})

    def close(self) -> None:
        if self._reader is not None:
            self._reader.pool.clear()
        for file in self._open.values():
            file.close()


def merge(headers: dict[str, Header], weights: Weights, source: LocalSource) -> tuple[Manifest, tuple[str, ...]]:
    """One manifest of all files, checked against the index; returns it and warnings."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    warnings: list[str] = []
    wanted = weights.weight_map
    for file, header in headers.items():
        metadata.update(header.metadata)
        for name, info in header.tensors.items():
            if wanted is not None and name not in wanted:
                what = f"the tensor is in {file} but not in the weight_map of the index"
                raise InputError("FB-E0124", what, tensor=name, file=source.root / file)
            if name in tensors:
                warnings.append(_twice(tensors[name], info, source))
            if name not in tensors or (wanted is not None and wanted[name] == file):
                tensors[name] = info
    for name, file in (wanted or {}).items():
        if name not in headers[file].tensors:
            what = f"the index places the tensor in {file}, which does not hold it"
            raise InputError("FB-E0124", what, tensor=name, file=source.root / file)
    manifest = Manifest(tensors, metadata)
    if weights.total_size is not None and weights.total_size != manifest.nbytes:
        warnings.append(f"the index says {weights.total_size:,} bytes in total, the tensors take {manifest.nbytes:,}")
    return manifest, tuple(warnings)


def _twice(first: TensorInfo, second: TensorInfo, source: LocalSource) -> str:
    same = (first.dtype, first.shape) == (second.dtype, second.shape) and source.same_bytes(first, second)
    if not same:
        what = f"the tensor is in both {first.file} and {second.file}, with different content"
        raise InputError("FB-E0125", what, tensor=first.name, file=source.root / second.file)
    return f"{first.name} is stored twice, alike, in {first.file} and {second.file}"


def aux_files(root: Path) -> tuple[Path, ...]:
    """The files of a folder that belong to the model beside weights and config, ordinary files only."""
    named = [root / name for name in AUX_NAMES]
    suffixed = sorted(child for child in root.iterdir() if child.name.endswith(_AUX_SUFFIXES) and child not in named)
    extra = sorted((root / "additional_chat_templates").glob("*.jinja"))
    roots = allowed_roots(root.resolve())
    return tuple(
        path
        for path in (*named, *suffixed, *extra)
        if path.is_file() and any(path.resolve().is_relative_to(base) for base in roots)
    )


def code_warnings(files: tuple[Path, ...]) -> tuple[str, ...]:
    """A sentence for each file to be copied along that asks programs to run code of the repository."""
    small = (path for path in files if path.suffix == ".json" and path.stat().st_size < 1 << 20)
    asking = (path.name for path in small if b'"auto_map"' in path.read_bytes())
    return tuple(f"{name} has an auto_map: it asks other programs to run code of the repository" for name in asking)


def open_local(path: Path, revision: str | None = None) -> LocalSource:
    """Opens a folder, an index or one .safetensors file."""
    if revision is not None:
        raise InputError("FB-E0120", "a revision is for a hub id, this is a path on disk", file=path)
    if path.is_dir():
        root, weights = path, find_weights(LocalFolder(path))
    elif path.name.endswith(".json"):
        root, weights = path.parent, read_index(LocalFolder(path.parent), path.name)
    else:
        root, weights = path.parent, Weights((path.name,), None, None, ())
    config, warnings = configs.read_config(root, required=path.is_dir())
    return checked(LocalSource(root, weights, config, warnings))


def checked(source: LocalSource) -> LocalSource:
    """The source, its config found to agree with its tensors; closed if not."""
    try:
        source.warnings += configs.check_config(source.config, source.manifest, source.root, source.same_bytes)
    except BaseException:
        source.close()
        raise
    return source
