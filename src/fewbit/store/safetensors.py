"""The header of a safetensors file, read strictly, in bounded memory, without torch.

A file is eight bytes of header length (u64, little-endian), that many bytes of JSON, and the data:

    {"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

The offsets count from the end of the header and must tile the data exactly: no hole, no overlap, no byte left over. A general
JSON reader would need some thousand bytes of objects for each of the millions of values that a hostile header of 100 MB can
hold. So the header is scanned as bytes, entry by entry: an entry in the usual spelling is one match of a regular
expression, an unusual one (other key order is still usual; escapes in keys are not) goes through the strict JSON reader by itself.

Source: the format description of huggingface/safetensors, and what its Rust reader refuses.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, TensorInfo
from fewbit.store import strictjson
from fewbit.store.fileio import OpenFile, ReadableFile

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 100_000  # per file; the largest public shards hold a tenth of it
MAX_RANK = 8
MAX_DIM = 1 << 40
MAX_NAME_BYTES = 4096
MAX_METADATA_BYTES = 6 << 20
MAX_METADATA_KEYS = 1 << 16
_MAX_ENTRY_BYTES = 1 << 14
_U63 = (1 << 63) - 1

_W = rb"[ \t\n\r]*+"
_INT = rb"(?:0|[1-9][0-9]{0,17}+)"
_USUAL = rb"""W"([^"\\\x00-\x1f]{1,4096}+)"W:W\{W
"dtype"W:W"([A-Z0-9_]{1,16}+)"W,W
"shape"W:W\[W((?:INTW(?:,WINTW){0,15}+)?+)\]W,W
"data_offsets"W:W\[W(INT)W,W(INT)W\]W\}W([,}])"""
# one tensor as every writer known to us puts it, to the mark behind it: (name, dtype, dims, begin, end, mark)
_ENTRY = re.compile(_USUAL.replace(b"\n", b"").replace(b"INT", _INT).replace(b"W", _W))
_ANY_ORDER = rb"""W"([^"\\\x00-\x1f]{1,4096}+)"W:W\{W(?:(?:
"dtype"W:W"([A-Z0-9_]{1,16}+)"|
"shape"W:W\[W((?:INTW(?:,WINTW){0,15}+)?+)\]|
"data_offsets"W:W\[W(INT)W,W(INT)W\])W(?:,W(?=")|(?=\}))){3}\}W([,}])"""
# the same with the three facts in any order; one that stands twice leaves another out, and its group empty
_ENTRY_IN_ANY_ORDER = re.compile(_ANY_ORDER.replace(b"\n", b"").replace(b"INT", _INT).replace(b"W", _W))
_SPACE = re.compile(_W)
_ESCAPED = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
_STRING = re.compile(rb'"([^"\\\x00-\x1f]*+)"')
_BAD_IN_NAME = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")
_CLIMBS = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")


Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin, end as the header has them


@dataclass(frozen=True)
class Header:
    """What one file says about itself.

    Attributes:
        tensors: in the order of their data.
        metadata: strings by key.
        data_start: absolute offset of the first data byte.
        sha256: of the header bytes with their length, hex.
        warnings: things allowed but worth saying.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    sha256: str
    warnings: tuple[str, ...]


def read_header(file: ReadableFile, relative: str) -> Header:
    """Reads and checks the header of an open file.

    Args:
        file: an open safetensors file.
        relative: the path that each TensorInfo shall carry.

    Raises:
        InputError FB-E0101 .. FB-E0111.
    """
    size = file.stamp.size
    if size < 8:
        raise InputError("FB-E0101", f"the file has {size} bytes, a safetensors file has at least 8", file=file.path)
    prefix = bytearray(8)
    file.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        what = f"the first 8 bytes give a header of {length:,} bytes, 2 to {MAX_HEADER_BYTES:,} are allowed"
        raise InputError("FB-E0102", what, file=file.path)
    if 8 + length > size:
        what = f"the header should be {length:,} bytes long but the whole file has {size:,}"
        raise InputError("FB-E0102", what, file=file.path, remedy="the download is incomplete: fetch the file again")
    raw = bytearray(length)
    file.read_into(memoryview(raw), 8)
    return parse_header(raw, size, file.path, relative)


def parse_header(raw: bytes | bytearray, file_size: int, path: object, relative: str) -> Header:
    """Parses header bytes of a file of `file_size` bytes; `path` is what errors name. See `read_header`."""
    scan = _Scanner(raw, path)
    entries, metadata = scan.header()
    start = 8 + len(raw)
    tensors = _place(entries, start, file_size - start, path, relative)
    warnings = []
    if any(info.nbytes and info.offset % _alignment(info.dtype) for info in tensors.values()):
        warnings.append(f"{relative}: data is not aligned to its element size; it is copied on reading")
    digest = hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()
    return Header(tensors, metadata, start, digest, tuple(warnings))


def read_file_header(path: str | os.PathLike[str]) -> Header:
    """The header of the file at `path`; see `read_header`."""
    file = OpenFile(Path(path))
    try:
        return read_header(file, Path(path).name)
    finally:
        file.close()


def _alignment(dtype: str) -> int:
    return max(1, DTYPE_BITS[dtype] // 8)


class _Scanner:
    """A cursor over header bytes. Each method leaves `pos` behind what it read."""

    def __init__(self, raw: bytes | bytearray, path: object) -> None:
        self.raw, self.path, self.pos = raw, path, 0

    def fail(self, code: str, what: str, tensor: str | None = None) -> NoReturn:
        raise InputError(code, f"header byte {self.pos:,}: {what}", tensor=tensor, file=self.path)

    def header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """The whole header: tensors as they come, and the metadata."""
        raw = self.raw
        if raw[:1] != b"{":
            self.fail("FB-E0103", f"the header must start with '{{', it starts with {bytes(raw[:1])!r}")
        if raw.count(b'"data_offsets"') > MAX_TENSORS:
            self.fail("FB-E0110", f"the file lists more than {MAX_TENSORS:,} tensors")
        entries: dict[str, Entry] = {}
        metadata: dict[str, str] | None = None
        self.pos = 1
        ended = self.ends(b"}")
        while not ended:
            usual = _ENTRY.match(raw, self.pos) or _ENTRY_IN_ANY_ORDER.match(raw, self.pos)
            if usual and None not in usual.groups():
                self.usual(usual, entries)
                ended = usual[6] == b"}"
                continue
            name = self.key(entries)
            if name == "__metadata__":
                if metadata is not None:
                    self.fail("FB-E0104", "__metadata__ stands twice in the header")
                metadata = self.metadata()
            else:
                entries[name] = self.unusual(name)
            if len(entries) > MAX_TENSORS:
                self.fail("FB-E0110", f"the file lists more than {MAX_TENSORS:,} tensors")
            ended = self.ends(b"}")
            if not ended:
                self.expect(b",")
        self.space()
        if self.pos != len(raw):
            self.fail("FB-E0103", "something other than spaces follows the JSON object")
        return entries, metadata or {}

    def usual(self, match: re.Match[bytes], entries: dict[str, Entry]) -> None:
        """Takes over a tensor in the usual spelling; the grammar is checked already."""
        raw_name, dtype, dims, begin, end, _ = match.groups()
        name = self.decoded(raw_name)
        self.allowed(name, entries)
        entry = dtype.decode(), tuple(map(int, dims.split(b","))) if dims else (), int(begin), int(end)
        if entry[0] not in DTYPE_BITS or len(entry[1]) > MAX_RANK:
            self.check(name, {"dtype": entry[0], "shape": list(entry[1]), "data_offsets": list(entry[2:])})
        entries[name] = entry
        self.pos = match.end()

    def decoded(self, raw: bytes, tensor: str | None = None) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("FB-E0103", f"a string is not UTF-8: {error.reason}", tensor)

    def allowed(self, name: str, entries: dict[str, Entry]) -> None:
        if name in entries:
            self.fail("FB-E0104", "the tensor stands twice in the header", name)
        reason = bad_name(name)
        if reason:
            self.fail("FB-E0109", reason, ascii(name[:200]))

    def space(self) -> None:
        found = _SPACE.match(self.raw, self.pos)
        self.pos = found.end() if found else self.pos

    def ends(self, mark: bytes) -> bool:
        self.space()
        if self.raw[self.pos : self.pos + 1] != mark:
            return False
        self.pos += 1
        return True

    def expect(self, mark: bytes, tensor: str | None = None) -> None:
        self.space()
        got = bytes(self.raw[self.pos : self.pos + 1])
        if got != mark:
            self.fail(
                "FB-E0103", f"{mark.decode()!r} expected, got {got!r}" if got else "the JSON ends too early", tensor
            )
        self.pos += 1

    def string(self, limit: int, tensor: str | None = None) -> str:
        """A JSON string that takes at most `limit` bytes of the header."""
        self.space()
        plain = _STRING.match(self.raw, self.pos, self.pos + limit)
        found = plain or _ESCAPED.match(self.raw, self.pos, self.pos + limit)
        if not found:
            self.fail("FB-E0103", f"a string that closes within {limit:,} bytes is needed", tensor)
        if plain:
            text = self.decoded(plain[1], tensor)
        else:
            try:
                text = strictjson.loads(found[0], max_bytes=limit, max_values=limit)
            except ValueError as error:
                self.fail("FB-E0103", f"a string cannot be read: {error}", tensor)
        self.pos = found.end()
        return text

    def key(self, entries: dict[str, Entry]) -> str:
        name = self.string(6 * MAX_NAME_BYTES + 2)  # a character may be spelt in six bytes
        self.allowed(name, entries)
        self.expect(b":", name)
        return name

    def metadata(self) -> dict[str, str]:
        first = self.pos
        found: dict[str, str] = {}
        self.space()
        if self.raw[self.pos : self.pos + 1] != b"{":
            self.fail("FB-E0105", "__metadata__ must be an object of strings")
        self.pos += 1
        if self.ends(b"}"):
            return found
        while True:
            key = self.string(MAX_METADATA_BYTES)
            if key in found:
                self.fail("FB-E0104", f"the key {key[:80]!r} stands twice in __metadata__")
            self.expect(b":")
            self.space()
            if self.raw[self.pos : self.pos + 1] != b'"':
                self.fail("FB-E0105", f"the value of {key[:80]!r} in __metadata__ is not a string")
            found[key] = self.string(MAX_METADATA_BYTES)
            if len(found) > MAX_METADATA_KEYS or self.pos - first > MAX_METADATA_BYTES:
                what = f"__metadata__ is larger than {MAX_METADATA_KEYS:,} keys or {MAX_METADATA_BYTES:,} bytes"
                self.fail("FB-E0105", what)
            if self.ends(b"}"):
                return found
            self.expect(b",")

    def unusual(self, name: str) -> Entry:
        """An entry in another spelling, or a wrong one, through the JSON reader: at most to the next closing brace."""
        self.space()
        end = self.raw.find(b"}", self.pos, self.pos + _MAX_ENTRY_BYTES) + 1
        if not end:
            self.fail("FB-E0106", f"the entry of the tensor has no end within {_MAX_ENTRY_BYTES:,} bytes", name)
        body = bytes(self.raw[self.pos : end])
        if b"-" in body:
            self.fail("FB-E0106", "the entry of the tensor holds a minus sign", name)
        try:
            value = strictjson.loads(body, max_bytes=_MAX_ENTRY_BYTES, max_values=1000)
        except ValueError as error:
            self.fail("FB-E0106", f"the entry of the tensor cannot be read: {error}", name)
        if not isinstance(value, dict):
            self.fail("FB-E0106", "the entry of the tensor is not an object", name)
        self.check(name, value)
        self.pos = end
        return value["dtype"], tuple(value["shape"]), *value["data_offsets"]

    def check(self, name: str, value: dict[str, Any]) -> None:
        if set(value) != {"dtype", "shape", "data_offsets"}:
            what = f"an entry has exactly dtype, shape and data_offsets, this one has {sorted(value)[:8]}"
            self.fail("FB-E0106", what, name)
        if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPE_BITS:
            self.fail("FB-E0106", f"dtype {str(value['dtype'])[:40]!r} is none of {', '.join(DTYPE_BITS)}", name)
        for field in ("shape", "data_offsets"):
            items = value[field]
            if not isinstance(items, list) or any(type(n) is not int or not 0 <= n <= _U63 for n in items):
                self.fail(
                    "FB-E0106", f"{field} must be a list of whole numbers below 2^63, it is {str(items)[:60]}", name
                )
        if len(value["shape"]) > MAX_RANK:
            self.fail("FB-E0107", f"the shape has {len(value['shape'])} dimensions, at most {MAX_RANK} are read", name)
        if len(value["data_offsets"]) != 2:
            self.fail("FB-E0106", f"data_offsets must be [begin, end], it is {str(value['data_offsets'])[:60]}", name)


def bad_name(name: str) -> str | None:
    """Why a tensor may not be called so, or None."""
    if name and len(name) <= MAX_NAME_BYTES and name.isascii() and name.isprintable() and ".." not in name:
        return None
    if not name:
        return "a tensor has an empty name"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"the name of a tensor is longer than {MAX_NAME_BYTES:,} bytes"
    if _BAD_IN_NAME.search(name):
        return "the name of a tensor holds control characters or marks that turn the direction of text"
    if _CLIMBS.search(name):
        return "the name of a tensor holds '..' as a step of a path"
    return None


def _place(entries: dict[str, Entry], start: int, room: int, path: object, relative: str) -> dict[str, TensorInfo]:
    """Checks that the tensors tile the `room` bytes of data, and gives them their absolute place."""
    tensors: dict[str, TensorInfo] = {}
    reached = 0
    for name in sorted(entries, key=lambda name: entries[name][2:]):
        dtype, shape, begin, end = entries[name]
        nbytes = _checked_bytes(name, dtype, shape, path)
        if end - begin != nbytes:
            what = (
                f"data_offsets [{begin}, {end}] span {end - begin:,} bytes but {dtype} {list(shape)} takes {nbytes:,}"
            )
            raise InputError("FB-E0107", what, tensor=name, file=path)
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise InputError(
                "FB-E0108", f"data_offsets [{begin}, {end}]: {what}, which ends at {reached}", tensor=name, file=path
            )
        tensors[name] = TensorInfo(name, dtype, shape, nbytes, relative, start + begin)
        reached = end
    if reached > room:
        last = next(info.name for info in tensors.values() if info.offset + info.nbytes - start > room)
        what = f"the tensors take {reached:,} bytes but only {room:,} follow the header"
        raise InputError("FB-E0108", what, tensor=last, file=path, remedy="the file is cut off: fetch it again")
    if reached < room:
        raise InputError("FB-E0108", f"{room - reached:,} bytes follow the last tensor, none are allowed", file=path)
    return tensors


def _checked_bytes(name: str, dtype: str, shape: tuple[int, ...], path: object) -> int:
    bits, numel = DTYPE_BITS[dtype], prod(shape)
    if not 0 < numel < MAX_DIM:
        _require_small(name, bits, shape, path)
    if numel * bits % 8:
        what = f"{dtype} {list(shape)} does not fill whole bytes"
        raise InputError("FB-E0107", what, tensor=name, file=path)
    return numel * bits // 8


def _require_small(name: str, bits: int, shape: tuple[int, ...], path: object) -> None:
    """Bounds the dimensions of a very large or empty tensor, so that no product of some of them can overflow."""
    product = bits
    for dim in shape:
        product *= max(dim, 1)
        if dim >= MAX_DIM or product > _U63:
            what = f"the dimensions {list(shape)} are beyond 2^40 each or 2^63 bits together"
            raise InputError("FB-E0107", what, tensor=name, file=path)
