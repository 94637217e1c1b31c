"""The header of a GGUF file (version 2 and 3), read strictly, in bounded memory, without torch.

    "GGUF"  u32 version  u64 tensors  u64 pairs  {key, kind, value}*  {name, u32 dims, u64 dim*, u32 type, u64 offset}*  padding  data

Every length is held against the bytes that are left before anything is allocated, so a lying file costs no more than an honest
one of its size. Offsets must follow from the sizes exactly: no hole, no overlap, nothing after the last tensor but padding. What is
refused here is at least what llama.cpp's `gguf_init_from_file` refuses; a test holds the two against each other.

Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import numpy as np

from fewbit.base.errors import InputError
from fewbit.base.manifest import TensorInfo
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.metadata import KIND_DTYPES, KINDS, Metadata, Strings, Value
from fewbit.formats.gguf.types import TYPES
from fewbit.store.fileio import OpenFile

MAX_HEADER_BYTES = 1 << 26  # the largest public vocabularies take a third of it
MAX_TENSORS = 1 << 16
MAX_PAIRS = 1 << 16
MAX_STRINGS = 1 << 21  # in all arrays together
MAX_ALIGNMENT = 1 << 16
_U63 = (1 << 63) - 1
_FIRST_WINDOW = 1 << 16

PLAIN_TYPES: dict[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "I8": "I8",
    "I16": "I16",
    "I32": "I32",
    "I64": "I64",
    "F64": "F64",
}
# number -> (name, weights per block, bytes per block); those without a row in formats/gguf/types.py can be listed and copied only
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {row.number: (row.name, row.block, row.nbytes) for row in TYPES.values()} | {
    9: ("Q8_1", 32, 36), 15: ("Q8_K", 256, 292), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
TYPE_NUMBERS: dict[str, int] = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class Header:
    """What one file says about itself.

    Attributes:
        version: 2 or 3.
        metadata: typed values by key.
        tensors: in the order of their data; dtype is `F32`, `F16`, … for plain numbers and `GGML:<type>` for block types.
        alignment: bytes that every tensor's offset is a multiple of.
        data_start: absolute offset of the first data byte.
        sha256: of all bytes before the data, hex.
        warnings: things allowed but worth saying.
    """

    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int
    sha256: str
    warnings: tuple[str, ...] = ()


def dtype_of(type_name: str) -> str:
    """The dtype that a manifest gives a tensor of this GGML type."""
    return PLAIN_TYPES.get(type_name, f"GGML:{type_name}")


def type_of_dtype(dtype: str) -> str:
    """The GGML type of a manifest dtype; the inverse of `dtype_of`."""
    return dtype.removeprefix("GGML:")


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose rows are whole blocks of its type."""
    _, block, nbytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    return prod(shape) // block * nbytes


class _Cursor:
    """A position in the file. Every read is held against the bytes left before memory is taken."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self.size, self.pos = file, file.stamp.size, 0
        self.window = bytearray()
        self.strings_left = MAX_STRINGS

    def fail(self, code: str, what: str, tensor: str | None = None, at: int | None = None) -> NoReturn:
        where = self.pos if at is None else at
        raise InputError(code, f"byte {where:,}: {what}", tensor=tensor, file=self.file.path)

    def need(self, count: int, what: str) -> None:
        """Sees to it that the next `count` bytes are in the window."""
        end = self.pos + count
        if end > self.size:
            self.fail("FB-E0304", f"{what} takes {count:,} bytes, the file has {self.size - self.pos:,} left")
        if end > MAX_HEADER_BYTES:
            self.fail("FB-E0304", f"{what} takes {count:,} bytes; a header may have {MAX_HEADER_BYTES:,} in all")
        have = len(self.window)
        if end > have:
            more = memoryview(bytearray(min(max(end, 4 * have, _FIRST_WINDOW), self.size, MAX_HEADER_BYTES) - have))
            self.file.read_into(more, have)
            self.window += more

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.pos += count
        return bytes(self.window[self.pos - count : self.pos])

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> bytes:
        return self.take(self.u64(f"the length of {what}"), what)


def read_header(file: OpenFile, relative: str) -> Header:
    """Reads and checks the header of an open file.

    Args:
        file: an open GGUF file.
        relative: the path that each TensorInfo shall carry.

    Raises:
        InputError FB-E0301 .. FB-E0311: naming the byte, what was found there and what is allowed.
    """
    at = _Cursor(file)
    version = _version(at)
    tensor_count = _count(at, "tensors", MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
    pair_count = _count(at, "metadata pairs", MAX_PAIRS, 8 + 1 + 4 + 1)
    metadata: Metadata = {}
    for _ in range(pair_count):
        key = _key(at, metadata)
        metadata[key] = _value(at, key)
    alignment = _alignment(at, metadata)
    listed: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for index in range(tensor_count):
        _tensor(at, index, listed)
    data_start = -(-at.pos // alignment) * alignment
    tensors = _place(at, listed, data_start, alignment, relative)
    digest = hashlib.sha256(at.window[: at.pos]).hexdigest()
    return Header(version, metadata, tensors, alignment, data_start, digest, _warnings(metadata, relative))


def _version(at: _Cursor) -> int:
    if at.size < 24:
        at.fail("FB-E0301", f"the file has {at.size} bytes, a GGUF file has at least 24")
    magic = at.take(4, "the magic")
    if magic != meta.MAGIC:
        swapped = " (this is a big-endian file)" if magic == meta.MAGIC[::-1] else ""
        at.fail("FB-E0301", f"the file starts with {magic!r}, {meta.MAGIC!r} is needed{swapped}", at=0)
    version = at.u32("the version")
    if version not in (2, 3):
        why = "it is a big-endian file" if version & 0xFFFF == 0 and version else "versions 2 and 3 are read"
        at.fail("FB-E0302", f"the version is {version:,}: {why}", at=4)
    return version


def _count(at: _Cursor, what: str, most: int, smallest: int) -> int:
    count = at.u64(f"the number of {what}")
    room = (at.size - at.pos) // smallest
    if count > min(most, room):
        at.fail(
            "FB-E0303", f"{count:,} {what} are announced; at most {min(most, room):,} are possible here", at=at.pos - 8
        )
    return count


def _key(at: _Cursor, metadata: Metadata) -> str:
    start = at.pos
    length = at.u64("the length of a metadata key")
    if length > meta.MAX_KEY_BYTES:
        at.fail(
            "FB-E0305", f"a metadata key has {length:,} bytes, at most {meta.MAX_KEY_BYTES:,} are allowed", at=start
        )
    raw = at.take(length, "a metadata key")
    key = raw.decode("latin-1")
    reason = meta.bad_key(key) or ("stands there twice" if key in metadata else None)
    if reason:
        at.fail("FB-E0305", f"the metadata key {key[:80]!r} {reason}", at=start)
    return key


def _kind(at: _Cursor, key: str) -> str:
    number = at.u32(f"the kind of {key}")
    if number >= len(KINDS):
        at.fail("FB-E0306", f"{key} is of kind {number:,}; kinds go from 0 to {len(KINDS) - 1}", at=at.pos - 4)
    return KINDS[number]


def _value(at: _Cursor, key: str) -> Value:
    kind = _kind(at, key)
    if kind == "str":
        return Value("str", meta.decoded(at.string(key)))
    if kind != "arr":
        return Value(
            kind, _numbers(at, key, kind, 1)[0].item() if kind != "bool" else bool(_numbers(at, key, kind, 1)[0])
        )
    kind = _kind(at, key)
    if kind == "arr":
        at.fail("FB-E0306", f"{key} is an array of arrays; arrays hold numbers, booleans or strings", at=at.pos - 4)
    count = at.u64(f"the length of {key}")
    if kind == "str":
        return Value("str", _strings(at, key, count), True)
    return Value(kind, _numbers(at, key, kind, count), True)


def _numbers(at: _Cursor, key: str, kind: str, count: int) -> np.ndarray:
    dtype = KIND_DTYPES[kind]
    values = np.frombuffer(at.take(count * dtype.itemsize, f"{key} ({count:,} x {kind})"), dtype)
    if kind == "bool" and count and values.max() > 1:
        at.fail("FB-E0306", f"{key} holds {values.max()} as a boolean; 0 and 1 are allowed")
    return values


def _strings(at: _Cursor, key: str, count: int) -> Strings:
    if count > at.strings_left or count * 8 > at.size - at.pos:
        most = min(at.strings_left, (at.size - at.pos) // 8)
        at.fail("FB-E0304", f"{key} announces {count:,} strings; at most {most:,} are possible here")
    at.strings_left -= count
    start, starts, length_at = at.pos, np.empty(count, np.int64), struct.Struct("<Q").unpack_from
    for index in range(count):
        starts[index] = at.pos - start
        if at.pos + 8 > len(at.window):
            at.need(8, f"the length of a string of {key}")
        (length,) = length_at(at.window, at.pos)
        if at.pos + 8 + length > len(at.window):
            at.need(8 + length, f"string {index:,} of {key}")
        at.pos += 8 + length
    return Strings(bytes(at.window[start : at.pos]), starts)


def _alignment(at: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return meta.DEFAULT_ALIGNMENT
    good = value.spelling == "u32" and 8 <= value.data <= MAX_ALIGNMENT and value.data & (value.data - 1) == 0
    if not good:
        got = f"{value.spelling} {value.data if not value.is_array else '…'}"
        at.fail("FB-E0307", f"general.alignment is {got}; a u32 power of two from 8 to {MAX_ALIGNMENT:,} is allowed")
    return value.data


def _tensor(at: _Cursor, index: int, listed: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    start = at.pos
    length = at.u64(f"the length of the name of tensor {index:,}")
    if length > meta.MAX_NAME_BYTES:
        at.fail(
            "FB-E0308",
            f"the name of tensor {index:,} has {length:,} bytes, at most {meta.MAX_NAME_BYTES} are allowed",
            at=start,
        )
    raw = meta.decoded(at.take(length, f"the name of tensor {index:,}"))
    reason = "is not UTF-8" if isinstance(raw, bytes) else meta.bad_name(raw)
    if reason or raw in listed:
        at.fail("FB-E0308", f"the name of tensor {index:,} {reason or 'stands there twice'}: {raw!r}", at=start)
    name: Any = raw
    dims = at.u32("the number of dimensions")
    if not 1 <= dims <= meta.MAX_DIMS:
        at.fail("FB-E0309", f"the tensor has {dims:,} dimensions, 1 to {meta.MAX_DIMS} are allowed", name, at.pos - 4)
    sizes = struct.unpack(f"<{dims}Q", at.take(8 * dims, "the dimensions"))
    number = at.u32("the tensor type")
    if number not in TENSOR_TYPES:
        known = ", ".join(TYPE_NUMBERS)
        at.fail(
            "FB-E0310",
            f"the tensor is of type {number:,}, which does not exist or was removed; there are {known}",
            name,
            at.pos - 4,
        )
    type_name, block, _ = TENSOR_TYPES[number]
    if min(sizes) == 0 or prod(sizes) >= _U63:
        at.fail("FB-E0309", f"the dimensions {list(sizes)} must be above 0 and their product below 2^63", name, start)
    if sizes[0] % block:
        at.fail("FB-E0309", f"rows of {sizes[0]:,} are no whole number of {type_name} blocks of {block}", name, start)
    listed[name] = (type_name, sizes[::-1], at.u64("the tensor offset"))


def _place(
    at: _Cursor, listed: dict[str, tuple[str, tuple[int, ...], int]], start: int, alignment: int, relative: str
) -> dict[str, TensorInfo]:
    """Checks that the offsets follow from the sizes, and that the file ends where the data does."""
    tensors, reached = {}, 0
    for name, (type_name, shape, offset) in listed.items():
        if offset != reached:
            at.fail(
                "FB-E0311",
                f"the data is at offset {offset:,}; it must follow the tensor before it, at {reached:,}",
                name,
            )
        nbytes = tensor_bytes(type_name, shape)
        if start + offset + nbytes > at.size:
            missing = start + offset + nbytes - at.size
            what = f"the tensor needs {nbytes:,} bytes from byte {start + offset:,}, {missing:,} more than the file has"
            at.fail("FB-E0311", what, name)
        tensors[name] = TensorInfo(name, dtype_of(type_name), shape, nbytes, relative, start + offset)
        reached += -(-nbytes // alignment) * alignment
    end = start + reached if tensors else at.pos
    if at.size > max(end, start):
        at.fail("FB-E0311", f"{at.size - end:,} bytes follow the last tensor, only padding is allowed", at=end)
    return tensors


def _warnings(metadata: Metadata, relative: str) -> tuple[str, ...]:
    raw = [key for key, value in metadata.items() if not value.is_array and isinstance(value.data, bytes)]
    return tuple(f"{relative}: {key} is not UTF-8 and is kept as bytes" for key in raw)
