"""What codecs are made of: the parts of a block, and planes of bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from fewbit.math.kernels import planes
from fewbit.math.kernels.options import OUTER

Parts = dict[str, np.ndarray]
"""Name as in `QTensor.named_parts` -> entries [blocks, entries per block]: codes, scale.codes, scale.scale …"""


@dataclass(frozen=True)
class Codec:
    """pack: parts -> uint8 [blocks, bytes]; unpack: uint8 [blocks, bytes] -> parts."""

    pack: Callable[[Parts], np.ndarray]
    unpack: Callable[[np.ndarray], Parts]


@dataclass(frozen=True)
class Planes:
    """Codes laid over each other: of 8 / bits runs of `width` codes, the first takes the low bits of `width` bytes, and so on.

    Attributes:
        codes: uint8 or int8 [blocks, n], n a multiple of width * 8 / bits.
        bits, first: of each code, the `bits` bits from bit `first` up.
        flip: bits turned over before that: signed codes of b bits plus 2^(b - 1) are the same codes with their highest bit turned over.
    """

    codes: np.ndarray
    bits: int
    width: int
    first: int = 0
    flip: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return self.codes.shape[1] * self.bits // 8


def pack_planes(codes: np.ndarray, bits: int, width: int, first: int = 0, offset: int = 0) -> Planes:
    """`Planes` of codes plus `offset`, which is 0 or half of what the codes reach over."""
    return Planes(np.ascontiguousarray(codes).view(np.uint8), bits, width, first, offset)


def unpack_planes(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Inverse of `pack_planes`: uint8 [blocks, m] -> uint8 [blocks, m * 8 / bits]."""
    codes = np.empty((len(packed), packed.shape[1] * 8 // bits), np.uint8)
    _unpack(np.ascontiguousarray(packed).reshape(-1), bits, width, codes.reshape(-1))
    return codes


@njit(**OUTER)
def _unpack(packed: np.ndarray, bits: int, width: int, codes: np.ndarray) -> None:
    planes, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for run in range(packed.size // width):
        source, to = run * width, run * width * planes
        for plane in range(planes):
            shift, start = np.uint8(plane * bits), to + plane * width
            for i in range(width):
                codes[start + i] = (packed[source + i] >> shift) & mask


@njit(**OUTER)
def pack_trits(codes: np.ndarray, runs: np.ndarray, packed: np.ndarray) -> None:
    """Trits (0, 1, 2) as fractions of 256 in base 3, several to a byte.

    codes: uint8 [n * codes of a block]; runs: int [r, 3], each (codes, bytes, trits to a byte); trit t of byte i is code t * bytes + i
    of its run; packed: out, uint8 [n * bytes of a block].
    """
    source, to = 0, 0
    while source < codes.size:
        for run in range(runs.shape[0]):
            width, trits = runs[run, 1], runs[run, 2]
            for i in range(width):
                number = np.int32(0)
                for trit in range(trits):
                    number = number * np.int32(3) + np.int32(codes[source + trit * width + i])
                for _ in range(5 - trits):
                    number *= np.int32(3)
                packed[to + i] = np.uint8((number * np.int32(256) + np.int32(242)) // np.int32(243))
            source += runs[run, 0]
            to += width


def as_bytes(entries: np.ndarray) -> np.ndarray:
    """[blocks, n] of any dtype -> uint8 [blocks, n * itemsize], little-endian."""
    return np.ascontiguousarray(entries).view(np.uint8).reshape(len(entries), entries.shape[1] * entries.dtype.itemsize)


def as_dtype(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes uint8 [blocks, n] -> [blocks, n / itemsize] of a little-endian dtype."""
    return np.ascontiguousarray(data).view(dtype).reshape(len(data), data.shape[1] // np.dtype(dtype).itemsize)


def join(*fields: np.ndarray | Planes) -> np.ndarray:
    """The fields of a block one after another, uint8 [blocks, bytes]."""
    ready = [field if isinstance(field, Planes) else as_bytes(field) for field in fields]
    sizes = [field.nbytes if isinstance(field, Planes) else field.shape[1] for field in ready]
    stride = sum(sizes)
    head = ready[0].codes if isinstance(ready[0], Planes) else ready[0]
    blocks = np.empty((len(head), stride), np.uint8)
    out, at = blocks.reshape(-1), 0
    for field, size in zip(ready, sizes, strict=True):
        if not isinstance(field, Planes):
            planes.place(field.reshape(-1), size, out, at, stride)
        elif (field.bits, field.width) == (1, 1):
            words = field.codes.reshape(-1).view(np.uint64)
            planes.pack_single_bits(words, np.uint64(field.first), np.uint64(field.flip), size, out, at, stride)
        else:
            codes, first, flip = field.codes, np.uint8(field.first), np.uint8(field.flip)
            planes.pack_planes(codes.reshape(-1), field.bits, field.width, first, flip, codes.shape[1], out, at, stride)
        at += size
    return blocks


def split(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The inverse of `join`: fields of these sizes in bytes."""
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=1)
