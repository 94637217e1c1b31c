"""Where every byte of a GGUF output lies, from names, types, shapes and metadata alone; `ShardWriter` does the writing.

A split output follows llama.cpp's gguf-split: `<stem>-00001-of-00003.gguf`, all metadata in the first part, `split.no`,
`split.count` and `split.tensors.count` in every part.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fewbit.base.errors import InputError
from fewbit.base.manifest import TensorInfo
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.metadata import Metadata, Value
from fewbit.store.gguf_header import MAX_HEADER_BYTES, MAX_TENSORS, TENSOR_TYPES, TYPE_NUMBERS, dtype_of, tensor_bytes
from fewbit.store.layout import Layout, Shard

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class GgufLayout(Layout):
    """All files of a GGUF output; see `Layout`."""

    def index(self) -> bytes | None:
        """None: the parts of a GGUF find each other by their names."""
        return None


def lay_out_gguf(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, Value],
    stem: str = "model",
    max_bytes: int | None = None,
    alignment: int = meta.DEFAULT_ALIGNMENT,
) -> GgufLayout:
    """Places tensors in one file, or in parts; the same arguments always give the same bytes.

    Args:
        tensors: (name, GGML type name, row-major shape), in the order they shall have.
        metadata: typed values by key; split keys and `general.alignment` are set here.
        stem: the file name before `.gguf`.
        max_bytes: data bytes per part (a larger tensor gets a part of its own); None for one file.
        alignment: bytes that every tensor's offset is a multiple of.

    Raises:
        InputError FB-E0308, FB-E0309: a name or shape that no reader takes. FB-E0303: too many tensors or too large a header.
    """
    if alignment < 8 or alignment & (alignment - 1):
        raise InputError("FB-E0307", f"the alignment is {alignment}; a power of two from 8 is allowed")
    base: Metadata = {key: value for key, value in metadata.items() if key not in (*_SPLIT_KEYS, "general.alignment")}
    if alignment != meta.DEFAULT_ALIGNMENT:
        base["general.alignment"] = meta.u32(alignment)
    groups, total = _grouped(tensors, max_bytes)
    shards = []
    for number, group in enumerate(groups):
        name = f"{stem}.gguf" if len(groups) == 1 else f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        own = dict(base) if number == 0 else {key: base[key] for key in ("general.alignment",) if key in base}
        if len(groups) > 1:
            split = (Value("u16", number), Value("u16", len(groups)), Value("i32", total))
            own |= dict(zip(_SPLIT_KEYS, split, strict=True))
        shards.append(_shard(name, group, own, alignment))
    return GgufLayout(tuple(shards), {info.name: info for shard in shards for info in shard.tensors})


Listed = tuple[str, str, tuple[int, ...], int]  # name, type, shape, bytes


def _grouped(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_bytes: int | None
) -> tuple[list[list[Listed]], int]:
    groups: list[list[Listed]] = [[]]
    seen: set[str] = set()
    filled = 0
    for name, type_name, shape in tensors:
        reason = "is listed twice" if name in seen else meta.bad_name(name)
        if reason:
            raise InputError("FB-E0308", f"the tensor name {reason}", tensor=name)
        seen.add(name)
        nbytes = _checked_bytes(name, type_name, shape)
        if groups[-1] and max_bytes is not None and filled + nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, type_name, tuple(shape), nbytes))
        filled += nbytes
    if max(map(len, groups)) > MAX_TENSORS or len(groups) > 65535:
        raise InputError(
            "FB-E0303", f"{len(seen):,} tensors in {len(groups):,} parts are too many", remedy="use larger parts"
        )
    return groups, len(seen)


def _checked_bytes(name: str, type_name: str, shape: tuple[int, ...]) -> int:
    if type_name not in TYPE_NUMBERS:
        raise InputError(
            "FB-E0310", f"there is no GGML type {type_name!r}; there are {', '.join(TYPE_NUMBERS)}", tensor=name
        )
    _, block, _ = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    if not 1 <= len(shape) <= meta.MAX_DIMS or min(shape) < 1 or shape[-1] % block:
        what = f"{type_name} {list(shape)}: 1 to {meta.MAX_DIMS} dimensions above 0 are allowed, rows a multiple of {block}"
        raise InputError("FB-E0309", what, tensor=name)
    return tensor_bytes(type_name, tuple(shape))


def _shard(file: str, group: list[Listed], metadata: Metadata, alignment: int) -> Shard:
    listing, offsets, at = [], [], 0
    for name, type_name, shape, nbytes in group:
        raw = name.encode("utf-8")
        listing.append(struct.pack("<Q", len(raw)) + raw)
        listing.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPE_NUMBERS[type_name], at))
        offsets.append(at)
        at += -(-nbytes // alignment) * alignment
    head = meta.MAGIC + struct.pack("<IQQ", meta.VERSION, len(group), len(metadata))
    head += meta.metadata_bytes(metadata) + b"".join(listing)
    if len(head) > MAX_HEADER_BYTES:
        raise InputError(
            "FB-E0303", f"the header of {file} would take {len(head):,} bytes, {MAX_HEADER_BYTES:,} are allowed"
        )
    head += b"\0" * (-len(head) % alignment)
    placed = tuple(
        TensorInfo(name, dtype_of(type_name), shape, nbytes, file, len(head) + offset)
        for (name, type_name, shape, nbytes), offset in zip(group, offsets, strict=True)
    )
    return Shard(file, head, len(head) + at, placed)
