"""GGUF metadata: typed values by key, to and from bytes. Needs neither torch nor the gguf package.

A file says of every value which of thirteen kinds it is, and llama.cpp refuses a value of another kind than it expects: `u32` where
`u64` stands is an error there. So a value carries its kind:

    u32(32000)   f32(1e-5)   text("llama")   texts(["a", "b"])   array("i32", [1, 1, 3])

Strings are UTF-8; one that is not is kept as bytes, so that copying a file loses nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its final zero
MAX_DIMS = 4

KINDS: tuple[str, ...] = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")
KIND_NUMBERS: dict[str, int] = {kind: number for number, kind in enumerate(KINDS)}
# kind -> numpy dtype of its bytes; `str` and `arr` have no fixed size
KIND_DTYPES: dict[str, np.dtype] = {
    kind: np.dtype(name)
    for kind, name in {
        "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "f32": "<f4",
        "bool": "<u1", "u64": "<u8", "i64": "<i8", "f64": "<f8",
    }.items()
}  # fmt: skip


class Strings(Sequence):
    """Many strings in the bytes they were read from, decoded one by one when asked for.

    Args:
        raw: u64 length, bytes, u64 length, bytes, …
        starts: int64 [n]: where each string's length stands in `raw`.
    """

    __slots__ = ("raw", "starts")

    def __init__(self, raw: bytes, starts: np.ndarray) -> None:
        self.raw, self.starts = raw, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        start = int(self.starts[index])
        (length,) = struct.unpack_from("<Q", self.raw, start)
        return decoded(self.raw[start + 8 : start + 8 + length])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({len(self)})"


@dataclass(frozen=True)
class Value:
    """One metadata value.

    Attributes:
        kind: a name of `KINDS`, never `arr`: for an array, the kind of its elements.
        data: int, float, bool, str (bytes when not UTF-8); for an array, a numpy array or a sequence of strings.
        is_array: whether it is an array.
    """

    kind: str
    data: Any
    is_array: bool = False

    @property
    def spelling(self) -> str:
        """The kind as people write it: `u32`, `[str]`."""
        return f"[{self.kind}]" if self.is_array else self.kind

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value) or (self.kind, self.is_array) != (other.kind, other.is_array):
            return False
        if self.is_array and self.kind != "str":
            return np.array_equal(self.data, other.data)
        return self.data == other.data if not self.is_array else list(self.data) == list(other.data)

    __hash__ = None  # type: ignore[assignment]


Metadata = dict[str, Value]


@dataclass(frozen=True)
class GgufManifest(Manifest):
    """The manifest of a GGUF model, with its metadata typed as the file has it.

    Attributes:
        typed: values by key, the keys of a split left out.
    """

    typed: Metadata = field(default_factory=dict)


def text(value: str | bytes) -> Value:
    return Value("str", value)


def texts(values: Sequence[str | bytes]) -> Value:
    return Value("str", values, True)


def u32(value: int) -> Value:
    return Value("u32", int(value))


def f32(value: float) -> Value:
    return Value("f32", float(np.float32(value)))


def boolean(value: bool) -> Value:
    return Value("bool", bool(value))


def array(kind: str, values: Iterable[float]) -> Value:
    return Value(kind, np.array(list(values), dtype=KIND_DTYPES[kind]), True)


def decoded(raw: bytes) -> str | bytes:
    """Text, or the bytes themselves where they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _string_bytes(value: str | bytes) -> bytes:
    data = value.encode("utf-8") if isinstance(value, str) else bytes(value)
    return struct.pack("<Q", len(data)) + data


def _scalar_bytes(kind: str, value: Any) -> bytes:
    if kind == "str":
        return _string_bytes(value)
    dtype = KIND_DTYPES[kind]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype) if kind != "bool" else None
        if limits and not limits.min <= int(value) <= limits.max:
            raise InputError("FB-E0306", f"{value} does not fit into {kind}")
    return np.array(value, dtype=dtype).tobytes()


def _value_bytes(value: Value) -> bytes:
    if not value.is_array:
        return struct.pack("<I", KIND_NUMBERS[value.kind]) + _scalar_bytes(value.kind, value.data)
    head = struct.pack("<IIQ", KIND_NUMBERS["arr"], KIND_NUMBERS[value.kind], len(value.data))
    if value.kind != "str":
        return head + np.ascontiguousarray(value.data, dtype=KIND_DTYPES[value.kind]).tobytes()
    if isinstance(value.data, Strings):
        return head + value.data.raw
    return head + b"".join(map(_string_bytes, value.data))


def metadata_bytes(metadata: Mapping[str, Value]) -> bytes:
    """All key-value pairs as they stand in a file, in the order given.

    Raises:
        InputError: FB-E0305 for a key that no reader takes, FB-E0306 for a number that its kind cannot hold.
    """
    parts = []
    for key, value in metadata.items():
        reason = bad_key(key)
        if reason:
            raise InputError("FB-E0305", f"the metadata key {key[:80]!r} {reason}")
        parts += [_string_bytes(key), _value_bytes(value)]
    return b"".join(parts)


def bad_key(key: str) -> str | None:
    """None, or what is wrong with a metadata key."""
    if not key:
        return "is empty"
    if len(key) > MAX_KEY_BYTES:
        return f"has {len(key):,} bytes, at most {MAX_KEY_BYTES:,} are allowed"
    if not key.isascii() or not key.isprintable():
        return "holds characters other than printable ASCII"
    return None


def bad_name(name: str) -> str | None:
    """None, or what is wrong with a tensor name."""
    if not name:
        return "is empty"
    size = len(name.encode("utf-8"))
    if size > MAX_NAME_BYTES:
        return f"has {size:,} bytes, at most {MAX_NAME_BYTES} are allowed"
    if not name.isprintable():
        return "holds control characters"
    return None
