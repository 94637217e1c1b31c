"""numba kernels that pack codes densely, lowest bits first: eight codes fill `bits` whole bytes, whatever the width.

Words of 16 and 32 bits in this order are the same bytes as words of 8 on a little-endian machine.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def pack_bytes(codes, bits, out, first, end):
    """codes uint8 [8 n], out uint8 [bits n]: runs of eight codes from first to end."""
    mask = np.uint64((1 << bits) - 1)
    for i in range(first, end):
        word = np.uint64(0)
        for j in range(8):
            word |= (np.uint64(codes[8 * i + j]) & mask) << np.uint64(j * bits)
        for j in range(bits):
            out[bits * i + j] = np.uint8(word >> np.uint64(8 * j))


@njit(**_OPTIONS)
def unpack_bytes(words, bits, out, first, end):
    """The inverse of `pack_bytes`: words uint8 [bits n] -> out uint8 [8 n]."""
    mask = np.uint64((1 << bits) - 1)
    for i in range(first, end):
        word = np.uint64(0)
        for j in range(bits):
            word |= np.uint64(words[bits * i + j]) << np.uint64(8 * j)
        for j in range(8):
            out[8 * i + j] = np.uint8((word >> np.uint64(j * bits)) & mask)


@njit(**_OPTIONS)
def pack_nibbles(codes, out, first, end):
    """codes uint8 [2 n], out uint8 [n]: the even code in the low half."""
    for i in range(first, end):
        out[i] = (codes[2 * i] & np.uint8(15)) | (codes[2 * i + 1] << np.uint8(4))


@njit(**_OPTIONS)
def unpack_nibbles(words, out, first, end):
    """The inverse of `pack_nibbles`."""
    for i in range(first, end):
        out[2 * i] = words[i] & np.uint8(15)
        out[2 * i + 1] = words[i] >> np.uint8(4)
