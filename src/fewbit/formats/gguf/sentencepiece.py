"""Reads a SentencePiece model (`tokenizer.model`): a protocol-buffer message of which a few fields matter here.

    ModelProto      1 pieces*  2 trainer_spec  3 normalizer_spec          SentencePiece  1 piece  2 score  3 type
    TrainerSpec     3 model_type (1 unigram, 2 BPE)                       NormalizerSpec  3 add_dummy_prefix

Source: sentencepiece_model.proto of google/sentencepiece; encoding.md of protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewbit.base.errors import InputError

UNIGRAM, BPE = 1, 2
MAX_PIECES = 1 << 21


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in the order of their ids.

    Attributes:
        pieces: (text, score, type); types as in the message: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        model_type: UNIGRAM or BPE.
        add_dummy_prefix: whether a space is put before every text.
    """

    pieces: tuple[tuple[bytes, float, int], ...]
    model_type: int
    add_dummy_prefix: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: ints for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field longer than the file")
        yield number, data[at : at + size]
        at += size


def parse_model(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a `tokenizer.model`.

    Raises:
        InputError: FB-E0321 when it is not one.
    """
    pieces: list[tuple[bytes, float, int]] = []
    model_type, prefix = UNIGRAM, True
    try:
        for number, value in _fields(data):
            if number == 1:
                own = dict(_fields(value))
                score = struct.unpack("<f", own[2])[0] if 2 in own else 0.0
                pieces.append((bytes(own.get(1, b"")), score, int(own.get(3, 1))))
                if len(pieces) > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES:,} pieces")
            elif number == 2:
                model_type = int(dict(_fields(value)).get(3, UNIGRAM))
            elif number == 3:
                prefix = bool(dict(_fields(value)).get(3, True))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise InputError("FB-E0321", f"tokenizer.model is no SentencePiece model: {error}") from None
    if not pieces:
        raise InputError("FB-E0321", "tokenizer.model is no SentencePiece model: it holds no pieces")
    return SentencePieceModel(tuple(pieces), model_type, prefix)
