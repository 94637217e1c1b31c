"""Where every output byte will lie, from names, dtypes and shapes alone.

Sizes are known before the run, so shards are laid out first and each tensor is written at its final place: no second copy, writers in
parallel, and a resumed run finds what the stopped one wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, TensorInfo, data_bytes
from fewbit.base.record import digest, readable_json
from fewbit.store.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, bad_name

DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its first bytes, its size and its tensors in the order of their data."""

    name: str
    head: bytes
    size: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Layout:
    """All output files of safetensors; `tensors` gives each tensor's file and absolute offset."""

    shards: tuple[Shard, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(shard.size for shard in self.shards)

    def index(self) -> bytes | None:
        """The index json, or None for a single file."""
        if len(self.shards) == 1:
            return None
        total = sum(info.nbytes for info in self.tensors.values())
        weight_map = {name: self.tensors[name].file for name in sorted(self.tensors)}
        return readable_json({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()

    def digest(self) -> str:
        """sha256 of everything that decides where a byte lies, hex."""
        return digest([[shard.name, shard.size, shard.head.decode("latin-1")] for shard in self.shards])


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> Layout:
    """Distributes tensors over shards, in the order given; the same arguments always give the same bytes.

    Tensors follow one another as given, so that a shard fills from its beginning and can be hashed while it is written. Where one would not be
    aligned to its element size so, the wider dtypes of that shard come first.

    Args:
        tensors: (name, safetensors dtype, shape).
        max_shard_bytes: data bytes per file; a larger tensor gets a file of its own.
        metadata: strings for every header; transformers asks for {"format": "pt"}, the default.
        stem: first part of the file names.

    Raises:
        InputError FB-E0143: two tensors of one name, a name or dtype that no reader would take.
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        if name in seen or dtype not in DTYPE_BITS or bad_name(name) or name == "__metadata__":
            reason = (
                "it is listed twice" if name in seen else bad_name(name) or f"dtype {dtype!r} is not of safetensors"
            )
            raise InputError("FB-E0143", f"the tensor cannot be laid out: {reason}", tensor=name)
        seen.add(name)
        nbytes = data_bytes(dtype, shape)
        if groups[-1] and (filled + nbytes > max_shard_bytes or len(groups[-1]) == MAX_TENSORS):
            groups.append([])
            filled = 0
        groups[-1].append(TensorInfo(name, dtype, tuple(shape), nbytes))
        filled += nbytes
    count = len(groups)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    given = {"format": "pt"} if metadata is None else dict(metadata)
    shards = tuple(_shard(name, group, given) for name, group in zip(names, groups, strict=True))
    return Layout(shards, {info.name: info for shard in shards for info in shard.tensors})


def _aligned(group: list[TensorInfo]) -> bool:
    """Whether every tensor begins at a multiple of its element size when they follow one another as given."""
    starts = accumulate((info.nbytes for info in group), initial=0)
    return all(start * 8 % max(8, DTYPE_BITS[info.dtype]) == 0 for start, info in zip(starts, group, strict=False))


def _shard(file: str, group: list[TensorInfo], metadata: dict[str, str]) -> Shard:
    ordered = group if _aligned(group) else sorted(group, key=lambda info: -DTYPE_BITS[info.dtype])  # stable
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for info in ordered:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InputError(
            "FB-E0143", f"the header of {file} would take {len(text):,} bytes", remedy="use smaller shards"
        )
    head = len(text).to_bytes(8, "little") + text
    placed, at = [], len(head)
    for info in ordered:
        placed.append(TensorInfo(info.name, info.dtype, info.shape, info.nbytes, file, at))
        at += info.nbytes
    return Shard(file, head, at, tuple(placed))
