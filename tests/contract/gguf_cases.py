"""GGUF files built byte by byte, whole and broken: one row for every way a file can lie (cases 54 to 65 of facts.md)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

KINDS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "arr": 9,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
CODES = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "B",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}


def string(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(kind: str, value: object) -> bytes:
    return string(value) if kind == "str" else struct.pack("<" + CODES[kind], value)


def pair(key: str | bytes, kind: str, value: object) -> bytes:
    return string(key) + struct.pack("<I", KINDS[kind]) + scalar(kind, value)


def list_pair(key: str, kind: str, values: Iterable[object], count: int | None = None) -> bytes:
    items = [scalar(kind, value) for value in values]
    return (
        string(key)
        + struct.pack("<IIQ", KINDS["arr"], KINDS[kind], len(items) if count is None else count)
        + b"".join(items)
    )


def tensor(name: str | bytes, dims: tuple[int, ...], number: int, offset: int, n_dims: int | None = None) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims) if n_dims is None else n_dims, *dims)
    return string(name) + packed + struct.pack("<IQ", number, offset)


@dataclass
class File:
    """A small honest file; a case changes what it wants to lie about."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(
        default_factory=lambda: [
            pair("general.architecture", "str", "llama"),
            pair("llama.block_count", "u32", 2),
            pair("llama.attention.head_count", "u32", 4),
            list_pair("tokenizer.ggml.tokens", "str", ["a", "b"]),
            list_pair("tokenizer.ggml.scores", "f32", [0.0, -1.0]),
            pair("general.flag", "bool", 1),
        ]
    )
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor("token_embd.weight", (64, 2), 0, 0), tensor("w", (32, 3), 8, 512)]  # F32, Q8_0
    )
    n_pairs: int | None = None
    n_tensors: int | None = None
    data: bytes = bytes(512 + 102 + 26)
    alignment: int = 32

    def bytes(self) -> bytes:
        counts = [
            len(own) if said is None else said
            for own, said in ((self.tensors, self.n_tensors), (self.pairs, self.n_pairs))
        ]
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.pairs + self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


def _with(**changes: object) -> Callable[[], bytes]:
    return lambda: File(**changes).bytes()


def _pairs(*extra: bytes) -> Callable[[], bytes]:
    return lambda: File(pairs=File().pairs + list(extra)).bytes()


def _tensors(*rows: bytes, data: bytes | None = None) -> Callable[[], bytes]:
    return lambda: File(tensors=list(rows), data=File().data if data is None else data).bytes()


def _replaced(key: str, new: bytes) -> Callable[[], bytes]:
    return lambda: File(pairs=[new if own[8:].startswith(key.encode()) else own for own in File().pairs]).bytes()


FIRST = tensor("token_embd.weight", (64, 2), 0, 0)
# name -> (bytes, code expected)
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "FB-E0301"),
    "only the magic": (lambda: b"GGUF", "FB-E0301"),
    "other magic": (_with(magic=b"GGML"), "FB-E0301"),
    "big-endian magic": (_with(magic=b"FUGG"), "FB-E0301"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "FB-E0127"),
    "version 0": (_with(version=0), "FB-E0302"),
    "version 1": (_with(version=1), "FB-E0302"),
    "version 4": (_with(version=4), "FB-E0302"),
    "big-endian version": (_with(version=0x03000000), "FB-E0302"),
    "2^63 tensors": (_with(n_tensors=1 << 63), "FB-E0303"),
    "2^63 pairs": (_with(n_pairs=1 << 63), "FB-E0303"),
    "2^20 tensors": (_with(n_tensors=1 << 20), "FB-E0303"),
    "one pair too many": (_with(n_pairs=7), None),
    "one pair too few": (_with(n_pairs=5), None),
    "one tensor too many": (_with(n_tensors=3), None),
    "string of 2^62": (_pairs(string("k") + struct.pack("<IQ", KINDS["str"], 1 << 62)), "FB-E0304"),
    "key of 2^62": (lambda: File(pairs=[struct.pack("<Q", 1 << 62) + bytes(40)]).bytes(), "FB-E0305"),
    "key of 65536": (_pairs(pair("k" * 65536, "u32", 1)), "FB-E0305"),
    "empty key": (_pairs(pair("", "u32", 1)), "FB-E0305"),
    "key twice": (_pairs(pair("llama.block_count", "u32", 2)), "FB-E0305"),
    "key not ASCII": (_pairs(pair("schlüssel", "u32", 2)), "FB-E0305"),
    "key with NUL": (_pairs(pair("a\0b", "u32", 2)), "FB-E0305"),
    "array of 2^30": (_pairs(list_pair("k", "u32", [], 1 << 30)), "FB-E0304"),
    "array of 2^62": (_pairs(list_pair("k", "u64", [], 1 << 62)), "FB-E0304"),
    "2^30 strings": (_pairs(list_pair("k", "str", [], 1 << 30)), "FB-E0304"),
    "strings past the end": (_pairs(list_pair("k", "str", ["x"] * 3, 300)), None),
    "array of arrays": (_pairs(string("k") + struct.pack("<IIQ", 9, 9, 1)), "FB-E0306"),
    "kind 13": (_pairs(string("k") + struct.pack("<II", 13, 1)), "FB-E0306"),
    "array of kind 99": (_pairs(string("k") + struct.pack("<IIQ", 9, 99, 1)), "FB-E0306"),
    "boolean 2": (_pairs(pair("k", "bool", 2)), "FB-E0306"),
    "booleans 0 and 7": (_pairs(list_pair("k", "bool", [0, 7])), "FB-E0306"),
    "alignment 0": (_pairs(pair("general.alignment", "u32", 0)), "FB-E0307"),
    "alignment 3": (_pairs(pair("general.alignment", "u32", 3)), "FB-E0307"),
    "alignment 48": (_pairs(pair("general.alignment", "u32", 48)), "FB-E0307"),
    "alignment 2^31": (_pairs(pair("general.alignment", "u32", 1 << 31)), "FB-E0307"),
    "alignment as u64": (_pairs(pair("general.alignment", "u64", 32)), "FB-E0307"),
    "alignment as list": (_pairs(list_pair("general.alignment", "u32", [32])), "FB-E0307"),
    "name of 64": (_tensors(FIRST, tensor("n" * 64, (32, 3), 8, 512)), "FB-E0308"),
    "name of 2^61": (_tensors(FIRST, struct.pack("<Q", 1 << 61) + bytes(40)), "FB-E0308"),
    "name empty": (_tensors(FIRST, tensor("", (32, 3), 8, 512)), "FB-E0308"),
    "name twice": (_tensors(FIRST, tensor("token_embd.weight", (32, 3), 8, 512)), "FB-E0308"),
    "name with NUL": (_tensors(FIRST, tensor("w\0x", (32, 3), 8, 512)), "FB-E0308"),
    "name not UTF-8": (_tensors(FIRST, tensor(b"w\xff", (32, 3), 8, 512)), "FB-E0308"),
    "0 dimensions": (_tensors(FIRST, tensor("w", (), 0, 512)), "FB-E0309"),
    "5 dimensions": (_tensors(FIRST, tensor("w", (32, 1, 1, 1, 3), 8, 512)), "FB-E0309"),
    "2^32-1 dimensions": (_tensors(FIRST, tensor("w", (32, 3), 8, 512, n_dims=2**32 - 1)), "FB-E0309"),
    "a dimension of 0": (_tensors(FIRST, tensor("w", (32, 0), 8, 512)), "FB-E0309"),
    "a negative dimension": (_tensors(FIRST, tensor("w", (32, 2**64 - 3), 8, 512)), "FB-E0309"),
    "2^66 weights": (_tensors(FIRST, tensor("w", (1 << 33, 1 << 33), 8, 512)), "FB-E0309"),
    "bytes past 2^64": (_tensors(FIRST, tensor("w", (1 << 31, 1 << 31), 0, 512)), "FB-E0311"),
    "half a block": (_tensors(FIRST, tensor("w", (48, 2), 8, 512)), "FB-E0309"),
    **{f"type {n}": (_tensors(FIRST, tensor("w", (32, 3), n, 512)), "FB-E0310") for n in (4, 5, 31, 32, 33, 36, 37, 38, 43, 2**32 - 1)},
    "offset misaligned": (_tensors(FIRST, tensor("w", (32, 3), 8, 513)), "FB-E0311"),
    "overlap": (_tensors(FIRST, tensor("w", (32, 3), 8, 480)), "FB-E0311"),
    "hole": (_tensors(FIRST, tensor("w", (32, 3), 8, 544)), "FB-E0311"),
    "out of order": (_tensors(tensor("w", (32, 3), 8, 512), FIRST), "FB-E0311"),
    "offset wraps": (_tensors(FIRST, tensor("w", (32, 3), 8, 2**64 - 64)), "FB-E0311"),
    "beyond the end": (_with(data=bytes(512 + 101)), "FB-E0311"),
    "nothing but the header": (_with(data=b""), "FB-E0311"),
    "trailing bytes": (_with(data=bytes(512 + 128 + 1)), "FB-E0311"),
    "scores as u8": (_replaced("tokenizer.ggml.scores", list_pair("tokenizer.ggml.scores", "u8", [0, 1])), "FB-E0312"),
    "tokens as numbers": (_replaced("tokenizer.ggml.tokens", list_pair("tokenizer.ggml.tokens", "u32", [0, 1])), "FB-E0312"),
    "three scores for two tokens": (_replaced("tokenizer.ggml.scores", list_pair("tokenizer.ggml.scores", "f32", [0, 1, 2])), "FB-E0312"),
    "token array too short": (
        lambda: File(pairs=File().pairs[:3] + [list_pair("tokenizer.ggml.tokens", "str", ["a"])]).bytes(),
        "FB-E0312",
    ),
    "bos out of range": (_pairs(pair("tokenizer.ggml.bos_token_id", "u32", 2)), "FB-E0312"),
    "0 blocks": (_replaced("llama.block_count", pair("llama.block_count", "u32", 0)), "FB-E0312"),
    "513 blocks": (_replaced("llama.block_count", pair("llama.block_count", "u32", 513)), "FB-E0312"),
    "blocks as text": (_replaced("llama.block_count", pair("llama.block_count", "str", "2")), "FB-E0312"),
    "0 heads": (_replaced("llama.attention.head_count", pair("llama.attention.head_count", "u32", 0)), "FB-E0312"),
    "architecture as number": (_replaced("general.architecture", pair("general.architecture", "u32", 1)), "FB-E0312"),
    "one part of two, misnamed": (_pairs(pair("split.no", "u16", 0), pair("split.count", "u16", 2)), "FB-E0313"),
    "split count as u32": (_pairs(pair("split.count", "u32", 2)), "FB-E0312"),
}  # fmt: skip
