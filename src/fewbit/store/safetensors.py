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
from pathlib import Path
from typing import Any, NoReturn

from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, TensorInfo
from fewbit.store import strictjson
from fewbit.store.fileio import OpenFile

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 1 << 17  # per file; the largest public shards hold a tenth of it
MAX_RANK = 8
MAX_DIM = 1 << 40
MAX_NAME_BYTES = 4096
MAX_METADATA_BYTES = 16 << 20
MAX_METADATA_KEYS = 1 << 16
_MAX_ENTRY_BYTES = 1 << 14
_U63 = (1 << 63) - 1

_W = rb"[ \t\n\r]*+"
_DIMS = rb"\[([0-9, \t\n\r]*+)\]"
_SPACE = re.compile(_W)
_STRING = re.compile(rb'"([^"\\\x00-\x1f]*+)"')
_FIELD = rb'"dtype"W:W"([A-Z0-9_]*+)"', rb'"shape"W:WDIMS', rb'"data_offsets"W:WDIMS'


def _usual_entry() -> re.Pattern[bytes]:
    """dtype, shape, data_offsets in that order, as every writer known to us puts them."""
    text = rb"W\{W" + rb"W,W".join(_FIELD) + rb"W\}"
    return re.compile(text.replace(b"DIMS", _DIMS).replace(b"W", _W))


_ENTRY = _usual_entry()
_NUMBER = re.compile(rb"(?:0|[1-9][0-9]{0,18})\Z")
_BAD_IN_NAME = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")
_CLIMBS = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")


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


def read_header(file: OpenFile, relative: str) -> Header:
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

    def header(self) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str]]:
        raw = self.raw
        if raw[:1] != b"{":
            self.fail("FB-E0103", f"the header must start with '{{', it starts with {bytes(raw[:1])!r}")
        if raw.count(b'"data_offsets"') > MAX_TENSORS:
            self.fail("FB-E0110", f"the file lists more than {MAX_TENSORS:,} tensors")
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        metadata: dict[str, str] | None = None
        self.pos = 1
        if not self.ends(b"}"):
            while True:
                name = self.key(entries)
                if name == "__metadata__":
                    if metadata is not None:
                        self.fail("FB-E0104", "__metadata__ stands twice in the header")
                    metadata = self.metadata()
                else:
                    entries[name] = self.entry(name)
                if len(entries) > MAX_TENSORS:
                    self.fail("FB-E0110", f"the file lists more than {MAX_TENSORS:,} tensors")
                if self.ends(b"}"):
                    break
                self.expect(b",")
        self.space()
        if self.pos != len(raw):
            self.fail("FB-E0103", "something other than spaces follows the JSON object")
        return entries, metadata or {}

    def space(self) -> None:
        self.pos = _SPACE.match(self.raw, self.pos).end()

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
        """A JSON string of at most `limit` bytes."""
        self.space()
        plain = _STRING.match(self.raw, self.pos)
        if plain:
            if plain.end() - plain.start() - 2 > limit:
                self.fail(
                    "FB-E0109",
                    f"a string of {plain.end() - plain.start() - 2:,} bytes, at most {limit:,} allowed",
                    tensor,
                )
            try:
                text = plain.group(1).decode("utf-8")
            except UnicodeDecodeError as error:
                self.fail("FB-E0103", f"not UTF-8: {error.reason}", tensor)
            self.pos = plain.end()
            return text
        self.expect(b'"', tensor)
        end = self.closing_quote(limit, tensor)
        try:
            text = strictjson.loads(
                bytes(self.raw[self.pos - 1 : end + 1]), max_bytes=6 * limit + 2, max_values=6 * limit
            )
        except ValueError as error:
            self.fail("FB-E0103", f"a string cannot be read: {error}", tensor)
        self.pos = end + 1
        return text

    def closing_quote(self, limit: int, tensor: str | None) -> int:
        at = self.pos
        while True:
            at = self.raw.find(b'"', at, self.pos + 6 * limit + 1)
            if at < 0:
                self.fail("FB-E0103", f"a string has no end within {6 * limit:,} bytes", tensor)
            slashes = at
            while self.raw[slashes - 1] == 0x5C:
                slashes -= 1
            if (at - slashes) % 2 == 0:
                return at
            at += 1

    def key(self, entries: dict[str, Any]) -> str:
        name = self.string(MAX_NAME_BYTES)
        if name in entries:
            self.fail("FB-E0104", "the tensor stands twice in the header", name)
        reason = bad_name(name)
        if reason:
            self.fail("FB-E0109", reason, repr(name[:200]))
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

    def entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor as (dtype, shape, begin, end)."""
        usual = _ENTRY.match(self.raw, self.pos)
        if usual:
            dtype, shape, offsets = usual.groups()
            dims, span = self.numbers(shape, "shape", name), self.numbers(offsets, "data_offsets", name)
            value: dict[str, Any] = {"dtype": dtype.decode(), "shape": dims, "data_offsets": span}
            after = usual.end()
        else:
            value, after = self.unusual(name)
        self.check(name, value)
        self.pos = after
        return value["dtype"], tuple(value["shape"]), *value["data_offsets"]

    def numbers(self, text: bytes, field: str, name: str) -> list[int]:
        parts = [part.strip() for part in text.split(b",")] if text.strip() else []
        if not all(map(_NUMBER.match, parts)):
            self.fail("FB-E0106", f"{field} holds {text[:60].decode()!r}, whole numbers below 2^63 are needed", name)
        return [int(part) for part in parts]

    def unusual(self, name: str) -> tuple[dict[str, Any], int]:
        """An entry in another spelling, or a wrong one, through the JSON reader: at most to the next closing brace."""
        self.space()
        end = self.raw.find(b"}", self.pos, self.pos + _MAX_ENTRY_BYTES) + 1
        if not end:
            self.fail("FB-E0106", f"the entry of the tensor has no end within {_MAX_ENTRY_BYTES:,} bytes", name)
        if b"-" in self.raw[self.pos : end]:
            self.fail("FB-E0106", "the entry of the tensor holds a minus sign", name)
        try:
            value = strictjson.loads(bytes(self.raw[self.pos : end]), max_bytes=_MAX_ENTRY_BYTES, max_values=1000)
        except ValueError as error:
            self.fail("FB-E0106", f"the entry of the tensor cannot be read: {error}", name)
        if not isinstance(value, dict):
            self.fail("FB-E0106", "the entry of the tensor is not an object", name)
        return value, end

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
    if not name:
        return "a tensor has an empty name"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"the name of a tensor is longer than {MAX_NAME_BYTES:,} bytes"
    if _BAD_IN_NAME.search(name):
        return "the name of a tensor holds control characters or marks that turn the direction of text"
    if _CLIMBS.search(name):
        return "the name of a tensor holds '..' as a step of a path"
    return None


def _place(
    entries: dict[str, tuple[str, tuple[int, ...], int, int]], start: int, room: int, path: object, relative: str
) -> dict[str, TensorInfo]:
    """Checks that the tensors tile the `room` bytes of data, and gives them their absolute place."""
    tensors: dict[str, TensorInfo] = {}
    reached = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
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
    bits = DTYPE_BITS[dtype]
    numel, nonzero = bits, bits
    for dim in shape:
        numel, nonzero = numel * dim, nonzero * max(dim, 1)
        if dim >= MAX_DIM or nonzero > _U63:
            what = f"the dimensions {list(shape)} are beyond 2^40 each or 2^63 bits together"
            raise InputError("FB-E0107", what, tensor=name, file=path)
    if numel % 8:
        what = f"{dtype} {list(shape)} does not fill whole bytes"
        raise InputError("FB-E0107", what, tensor=name, file=path)
    return numel // 8
