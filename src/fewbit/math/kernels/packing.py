"""numba kernels that pack codes densely, lowest bits first: eight codes fill `bits` whole bytes, whatever the width.

Words of 16 and 32 bits in this order are the same bytes as words of 8 on a little-endian machine.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fewbit.math.kernels.options import OUTER


@njit(**OUTER)
def pack_bytes(codes, bits, out, first, end):
    """codes uint8 [8 n], out uint8 [bits n]: runs of eight codes from first to end."""
    mask = np.uint64((1 << bits) - 1)
    for i in range(first, end):
        word = np.uint64(0)
        for j in range(8):
            word |= (np.uint64(codes[8 * i + j]) & mask) << np.uint64(j * bits)
        for j in range(bits):
            out[bits * i + j] = np.uint8(word >> np.uint64(8 * j))


@njit(**OUTER)
def unpack_bytes(words, bits, out, first, end):
    """The inverse of `pack_bytes`: words uint8 [bits n] -> out uint8 [8 n]."""
    mask = np.uint64((1 << bits) - 1)
    for i in range(first, end):
        word = np.uint64(0)
        for j in range(bits):
            word |= np.uint64(words[bits * i + j]) << np.uint64(8 * j)
        for j in range(8):
            out[8 * i + j] = np.uint8((word >> np.uint64(j * bits)) & mask)


@njit(**OUTER)
def pack_nibbles(codes, out, first, end):
    """codes uint64 [n] (eight codes of a byte each), out uint32 [n]: eight codes of four bits, the first one lowest.

    The halves of ever wider fields move together, so that the compiler can do many words at once.
    """
    for i in range(first, end):
        x = codes[i] & np.uint64(0x0F0F0F0F0F0F0F0F)
        x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
        x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        out[i] = np.uint32(x | (x >> np.uint64(16)))


@njit(**OUTER)
def unpack_nibbles(words, out, first, end):
    """The inverse of `pack_nibbles`: words uint32 [n] -> out uint64 [n]."""
    for i in range(first, end):
        x = np.uint64(words[i])
        x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
        x = (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        out[i] = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
