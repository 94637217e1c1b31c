"""Safetensors files built byte by byte, sound and malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header (data for JSON, or text, or bytes) and data; `length` lies about the header's."""
    if isinstance(header, bytes):
        raw = header
    else:
        raw = (
            header if isinstance(header, str) else json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        ).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(name: str = "w", data: bytes = bytes(8), **changes: Any) -> bytes:
    """A file of one tensor F32 [2], with changes."""
    return file_of({name: {**entry(), **changes}}, data)


def without(key: str) -> bytes:
    return file_of({"w": {k: v for k, v in entry().items() if k != key}}, bytes(8))


@dataclass(frozen=True)
class Case:
    """A file that must be refused.

    Attributes:
        number: of the catalogue.
        id: what is wrong with it.
        build: its bytes.
        code: of the error.
        says: what the message must hold.
        tensor: the name that the error must carry, None for none.
    """

    number: int
    id: str
    build: Callable[[], bytes]
    code: str
    says: str
    tensor: str | None = None


def many_tensors(count: int) -> bytes:
    parts = [f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count)]
    return file_of("{" + ",".join(parts) + "}", bytes(count))


_TWO = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
_OTHER_ORDER = '"w":{"shape":[2],"dtype":"F32","data_offsets":[0,8]}'


def _text(number: int, id: str, body: str | bytes, code: str, says: str, tensor: str | None = None) -> Case:
    return Case(number, id, lambda: file_of(body, bytes(8)), code, says, tensor)


def _field(number: int, id: str, code: str, says: str, data: bytes = bytes(8), **changes: Any) -> Case:
    return Case(number, id, lambda: one(data=data, **changes), code, says, "w")


def _name(id: str, name: str) -> Case:
    return Case(27, id, lambda: one(name), "FB-E0109", "name of a tensor", ascii(name[:200]))


CASES: list[Case] = [
    Case(1, "empty", lambda: b"", "FB-E0101", "0 bytes"),
    *(Case(2, f"{n} bytes", lambda n=n: b"\x08" * n, "FB-E0101", f"{n} bytes") for n in range(1, 8)),
    Case(3, "length 0", lambda: file_of(b"", bytes(8)), "FB-E0102", "header of 0 bytes"),
    Case(4, "length 2^63", lambda: file_of({}, length=1 << 63), "FB-E0102", "9,223,372,036,854,775,808"),
    Case(4, "length 2^64-1", lambda: file_of({}, length=(1 << 64) - 1), "FB-E0102", "18,446,744,073,709,551,615"),
    Case(5, "length beyond the file", lambda: file_of({}, bytes(4), length=7), "FB-E0102", "whole file has 14"),
    Case(6, "length above 100 MB", lambda: file_of({}, length=100_000_001), "FB-E0102", "100,000,001"),
    _text(7, "name not UTF-8", b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "FB-E0103", "UTF-8"),
    _text(7, "metadata not UTF-8", b'{"__metadata__":{"a":"\xc3\x28"}}', "FB-E0103", "UTF-8"),
    _text(7, "half a surrogate pair", r'{"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "FB-E0103", "surrogate"),
    _text(8, "not JSON", "{nonsense}", "FB-E0103", "closes within"),
    _text(8, "JSON cut off in a key", '{"w', "FB-E0103", "closes within"),
    _text(8, "JSON cut off in an entry", '{"w":{"dtype":"F32"', "FB-E0106", "no end", "w"),
    _text(8, "JSON cut off after an entry", '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', "FB-E0103", "too early"),
    _text(8, "JSON cut off after a comma", "{" + _OTHER_ORDER + ",", "FB-E0103", "closes within"),
    _text(8, "comma before the end", "{" + _OTHER_ORDER + ",}", "FB-E0103", "closes within"),
    _text(8, "something after the object", "{" + _OTHER_ORDER + "} x", "FB-E0103", "follows"),
    _text(8, "NUL padding", b"{" + _OTHER_ORDER.encode() + b"}\0\0", "FB-E0103", "follows"),
    _text(8, "line break in a name", '{"a\nb":1}', "FB-E0103", "closes within"),
    _text(9, "list on top", "[]", "FB-E0103", "must start with"),
    _text(9, "number on top", "12", "FB-E0103", "must start with"),
    _text(9, "entry is a list", '{"w":[]}', "FB-E0106", "cannot be read", "w"),
    _text(9, "entry is a number", '{"w":5}', "FB-E0106", "cannot be read", "w"),
    _text(10, "lists 10^5 deep", '{"w":' + "[" * 100_000 + "]" * 100_000 + "}", "FB-E0106", "no end", "w"),
    _text(10, "objects 10^5 deep", '{"w":' * 100_000 + "1" + "}" * 100_000, "FB-E0106", "", "w"),
    _text(10, "lists 900 deep", '{"w":{"dtype":' + "[" * 900 + "]" * 900 + "}}", "FB-E0106", "", "w"),
    _text(10, "lists 5000 deep", '{"w":{"dtype":' + "[" * 5000 + "]" * 5000 + "}}", "FB-E0106", "", "w"),
    _text(11, "space first", ' {"w":1}', "FB-E0103", "must start with"),
    _text(11, "byte-order mark", b"\xef\xbb\xbf{}", "FB-E0103", "must start with"),
    _text(12, "tensor twice", _TWO, "FB-E0104", "twice", "w"),
    _text(12, "tensor twice, once escaped", _TWO.replace(',"w"', r',"\u0077"'), "FB-E0104", "twice", "w"),
    _text(12, "field twice", '{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "FB-E0106", "twice", "w"),
    _text(13, "metadata twice", '{"__metadata__":{},"__metadata__":{}}', "FB-E0104", "twice"),
    _text(13, "key of metadata twice", '{"__metadata__":{"a":"1","a":"2"}}', "FB-E0104", "'a'"),
    *(
        _text(13, f"metadata value {value}", f'{{"__metadata__":{{"a":{value}}}}}', "FB-E0105", "not a string")
        for value in ("1", "null", "{}", '["x"]')
    ),
    *(
        _text(13, f"metadata is {value}", f'{{"__metadata__":{value}}}', "FB-E0105", "must be an object")
        for value in ("[]", '"x"', "null")
    ),
    Case(13, "metadata of 7 MiB", lambda: file_of({"__metadata__": {"a": "x" * (7 << 20)}}), "FB-E0103", "closes within"),
    Case(13, "metadata of 70000 keys", lambda: file_of({"__metadata__": {str(i): "" for i in range(70_000)}}), "FB-E0105", "larger"),
    _field(14, "unknown dtype", "FB-E0106", "'Q9'", dtype="Q9"),
    _field(14, "dtype in small letters", "FB-E0106", "'f32'", dtype="f32"),
    _field(14, "dtype a number", "FB-E0106", "dtype", dtype=32),
    _field(14, "dtype null", "FB-E0106", "dtype", dtype=None),
    Case(14, "no dtype", lambda: without("dtype"), "FB-E0106", "exactly", "w"),
    Case(14, "no shape", lambda: without("shape"), "FB-E0106", "exactly", "w"),
    _field(14, "a field too many", "FB-E0106", "exactly", strides=[1]),
    Case(15, "no offsets", lambda: without("data_offsets"), "FB-E0106", "exactly", "w"),
    *(
        _field(15, f"{len(offsets)} offsets", "FB-E0106", "begin, end", data_offsets=offsets)
        for offsets in ([], [0], [0, 8, 8])
    ),
    _field(15, "offsets an object", "FB-E0106", "cannot be read", data_offsets={"0": 8}),
    _field(16, "begin after end", "FB-E0107", "span -8", data_offsets=[8, 0]),
    *(
        _field(17, f"{field} with {value!r}", "FB-E0106", "", **{field: [0, value] if field == "data_offsets" else [value]})
        for field in ("shape", "data_offsets")
        for value in (-1, 2.0, 8.0, True, 1 << 63, 1 << 64, 10**30, "8", None, [8])
    ),
    _text(17, "minus zero", '{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', "FB-E0106", "minus", "w"),
    _text(17, "leading zero", '{"w":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', "FB-E0106", "", "w"),
    _text(17, "exponent", '{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', "FB-E0106", "", "w"),
    _text(17, "5000 digits", '{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', "FB-E0106", "", "w"),
    _field(18, "product wraps to 8 bytes", "FB-E0107", "beyond", shape=[1 << 32, 1 << 31, 2]),
    _field(18, "product 2^66", "FB-E0107", "beyond", shape=[1 << 33, 1 << 33]),
    _field(18, "eight large dimensions", "FB-E0107", "beyond", shape=[1 << 39] * 8),
    _field(19, "too many bytes for the shape", "FB-E0107", "takes 4", shape=[1]),
    _field(19, "too few bytes for the shape", "FB-E0107", "takes 12", shape=[3]),
    _field(19, "scalar of 8 bytes", "FB-E0107", "takes 4", shape=[]),
    Case(
        20, "overlap", lambda: file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "FB-E0108", "overlaps", "b"
    ),
    Case(20, "same place", lambda: file_of({"a": entry(), "b": entry()}, bytes(8)), "FB-E0108", "overlaps", "b"),
    Case(21, "hole", lambda: file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "FB-E0108", "hole", "b"),
    Case(21, "hole at the start", lambda: file_of({"a": entry(offsets=(8, 16))}, bytes(16)), "FB-E0108", "hole", "a"),
    Case(22, "trailing byte", lambda: one() + b"x", "FB-E0108", "1 bytes follow"),
    Case(22, "trailing zip", lambda: one() + b"PK\x03\x04" + bytes(60), "FB-E0108", "64 bytes follow"),
    Case(22, "data without tensors", lambda: file_of({}, bytes(8)), "FB-E0108", "8 bytes follow"),
    Case(23, "one byte short", lambda: one()[:-1], "FB-E0108", "only 7", "w"),
    Case(23, "data gone", lambda: one()[:-8], "FB-E0108", "only 0", "w"),
    _field(24, "F4 [3]", "FB-E0107", "whole bytes", data=bytes(2), dtype="F4", shape=[3], data_offsets=[0, 2]),
    _field(24, "F6 [3]", "FB-E0107", "whole bytes", data=bytes(3), dtype="F6_E2M3", shape=[3], data_offsets=[0, 3]),
    _field(25, "empty beside 2^40", "FB-E0107", "2^40", data=b"", shape=[0, 1 << 40], data_offsets=[0, 0]),
    _field(25, "empty beside 2^62", "FB-E0107", "2^40", data=b"", shape=[1 << 62, 0], data_offsets=[0, 0]),
    _field(26, "nine dimensions", "FB-E0107", "9 dimensions", shape=[1] * 8 + [2]),
    Case(27, "empty", lambda: one(""), "FB-E0109", "empty name", "''"),
    Case(27, "5000 bytes", lambda: one("x" * 5000), "FB-E0109", "4,096", repr("x" * 200)),
    Case(27, "4096 characters of 2 bytes", lambda: file_of({"é" * 4096: entry()}, bytes(8)), "FB-E0109", "4,096", ascii("é" * 200)),
    _name("NUL", "a\0b"),
    _name("escape", "a\x1b[31mb"),
    _name("C1 control", "a\x9bb"),
    _name("climbs", "a/../../b"),
    _name("climbs first", "../b"),
    _name("climbs by backslash", "a\\..\\b"),
    _name("right-to-left override", "a\u202eb"),
    _name("isolate", "a\u2066b"),
    Case(29, "10^6 tensors", lambda: many_tensors(1_000_000), "FB-E0110", "100,000"),
    Case(29, "100001 tensors", lambda: many_tensors(100_001), "FB-E0110", "100,000"),
]  # fmt: skip


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
