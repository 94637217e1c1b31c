"""Packing codes of 1 to 8 bits into words, in a stated order.

    order   "lsb": the first code lies in the lowest bits of a word; "msb": in the highest
    dense   True: codes follow each other bit by bit, across word borders (3-bit codes: 32 in three int32 words)
            False: each word holds floor(word bits / bits) codes and the rest of its bits are zero (3-bit codes: 10 in an int32)

Codes are the low `bits` bits of the given integers: for negative codes the two's complement. The last word is filled with zeros.
"""

from __future__ import annotations

import sys
from math import ceil

import numpy as np
import torch

from fewbit.base.errors import InputError

_MIN_CODES = 1 << 13
_WORD_BITS = {torch.uint8: 8, torch.int16: 16, torch.int32: 32}


def packed_length(count: int, bits: int, *, word: torch.dtype = torch.uint8, dense: bool = True) -> int:
    """Words that `count` codes take."""
    size = _word_bits(word, bits)
    return ceil(count * bits / size) if dense else ceil(count / (size // bits))


def pack_offset(codes: torch.Tensor, bits: int, *, word: torch.dtype = torch.uint8) -> torch.Tensor:
    """`pack` of signed codes counted from their lowest level: codes + 2^(bits-1), densely, lowest bits first.

    Adding that is turning over the highest bit of each code, which is cheaper done to the words.

    Args:
        codes: int8 [..., n].
    """
    size, count = _word_bits(word, bits), codes.shape[-1]
    whole = bits < size and count * bits % size == 0
    if whole and size % bits == 0 and _kernels_serve(codes, True, count, "lsb", True):
        pattern = sum(1 << (at + bits - 1) for at in range(0, size, bits))
        return pack(codes, bits, word=word).bitwise_xor_(pattern - (1 << size) * (word != torch.uint8))
    return pack(codes.view(torch.uint8) + (1 << (bits - 1)), bits, word=word)  # modulo 256, which is what is wanted


def pack(
    codes: torch.Tensor, bits: int, *, order: str = "lsb", word: torch.dtype = torch.uint8, dense: bool = True
) -> torch.Tensor:
    """Pack along the last axis: integers [..., n] -> words [..., packed_length(n)].

    Raises:
        InputError: FB-E0606 for a width, word or order that cannot be packed.
    """
    size = _word_bits(word, bits)
    _check_order(order)
    count = codes.shape[-1]
    words = packed_length(count, bits, word=word, dense=dense)
    if bits == size:
        same = codes.element_size() == 1 == word.itemsize
        words_of = codes.view(word) if same else codes.to(torch.int64).to(word)
        return words_of.clone(
            memory_format=torch.contiguous_format
        )  # whole rows of words, whatever the strides of the codes
    if _by_bytes(bits, size, order):
        missing = words * (size // bits) - count
        whole = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
        return pack(whole, bits).view(word)
    if _kernels_serve(codes, count * bits % size == 0, count, order, dense):
        return _pack_fast(codes, bits, word)
    if size % bits == 0 or not dense:
        return _pack_aligned(codes, bits, size // bits, words, order, word)
    return _pack_dense(codes, bits, words, order, word)


def unpack(
    words: torch.Tensor, bits: int, count: int, *, order: str = "lsb", dense: bool = True, signed: bool = False
) -> torch.Tensor:
    """The inverse of `pack`: words [..., m] -> `count` codes along the last axis, int8 if `signed` (two's complement) else uint8.

    Raises:
        InputError: FB-E0606 when the words are too few for `count` codes.
    """
    size = _word_bits(words.dtype, bits)
    _check_order(order)
    if words.shape[-1] < packed_length(count, bits, word=words.dtype, dense=dense):
        raise InputError("FB-E0606", f"{words.shape[-1]} words of {size} bits cannot hold {count} codes of {bits} bits")
    if bits == size:
        codes = words[..., :count].to(torch.uint8)
    elif _by_bytes(bits, size, order):
        codes = unpack(words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1), bits, count)
    elif _kernels_serve(words, words.shape[-1] * size == count * bits, count, order, dense):
        codes = _unpack_fast(words, bits, count)
    elif size % bits == 0 or not dense:
        codes = _unpack_aligned(words, bits, size // bits, count, order)
    else:
        codes = _unpack_dense(words, bits, count, order)
    if not signed:
        return codes
    return codes.view(torch.int8) if bits == 8 else ((codes ^ (1 << (bits - 1))).to(torch.int8) - (1 << (bits - 1)))


def _by_bytes(bits: int, size: int, order: str) -> bool:
    """Whether wide words are nothing but bytes in a row: then codes are packed into bytes, several times faster."""
    return size > 8 and 8 % bits == 0 and order == "lsb" and sys.byteorder == "little"


def _kernels_serve(data: torch.Tensor, whole: bool, count: int, order: str, dense: bool) -> bool:
    """Whether all rows together are one run of whole bytes, and long enough to be worth a kernel."""
    large = data.device.type == "cpu" and data.numel() >= _MIN_CODES and sys.byteorder == "little"
    return large and whole and count % 8 == 0 and order == "lsb" and dense and data.dtype in (torch.int8, *_WORD_BITS)


def _pack_fast(codes: torch.Tensor, bits: int, word: torch.dtype) -> torch.Tensor:
    from fewbit.math.kernels import packing

    row = codes.contiguous().view(-1)
    flat = (row.view(torch.uint8) if row.element_size() == 1 else row.to(torch.uint8)).numpy()
    out = torch.empty((*codes.shape[:-1], codes.shape[-1] * bits // 8), dtype=torch.uint8)
    if bits == 4:
        packing.pack_nibbles(flat.view(np.uint64), out.view(-1).numpy().view(np.uint32), 0, flat.size // 8)
    else:
        packing.pack_bytes(flat, bits, out.view(-1).numpy(), 0, flat.size // 8)
    return out.view(word)


def _unpack_fast(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    from fewbit.math.kernels import packing

    flat = words.contiguous().view(-1).view(torch.uint8).numpy()
    out = torch.empty((*words.shape[:-1], count), dtype=torch.uint8)
    if bits == 4:
        packing.unpack_nibbles(flat.view(np.uint32), out.view(-1).numpy().view(np.uint64), 0, flat.size // 4)
    else:
        packing.unpack_bytes(flat, bits, out.view(-1).numpy(), 0, flat.size // bits)
    return out


def _word_bits(word: torch.dtype, bits: int) -> int:
    if word not in _WORD_BITS or not 1 <= bits <= 8:
        raise InputError(
            "FB-E0606", f"cannot pack {bits}-bit codes into {word}: 1 to 8 bits into uint8, int16 or int32"
        )
    return _WORD_BITS[word]


def _check_order(order: str) -> None:
    if order not in ("lsb", "msb"):
        raise InputError("FB-E0606", f"bit order is 'lsb' or 'msb', got {order!r}")


def _accumulator(word: torch.dtype) -> torch.dtype:
    """A dtype in which shifts of a whole word neither overflow nor drag the sign bit along."""
    return {torch.uint8: torch.uint8, torch.int16: torch.int32, torch.int32: torch.int64}[word]


def _wrap(values: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """Non-negative accumulators as words of the same bits."""
    if word == torch.uint8:
        return values
    half = 1 << (_WORD_BITS[word] - 1)
    return ((values ^ half) - half).to(word)


def _pack_aligned(codes: torch.Tensor, bits: int, per: int, words: int, order: str, word: torch.dtype) -> torch.Tensor:
    """`per` codes to a word; accumulates one strided slice after the other."""
    kind = _accumulator(word)
    lead, count = codes.shape[:-1], codes.shape[-1]
    out = torch.zeros((*lead, words), dtype=kind, device=codes.device)
    size = _WORD_BITS[word]
    for i in range(min(per, count)):
        part = codes[..., i::per].to(kind) & ((1 << bits) - 1)  # cast first: an int8 cannot hold the mask 255
        shift = i * bits if order == "lsb" else size - (i + 1) * bits
        out[..., : part.shape[-1]] |= part << shift
    return _wrap(out, word)


def _unpack_aligned(words: torch.Tensor, bits: int, per: int, count: int, order: str) -> torch.Tensor:
    size = _WORD_BITS[words.dtype]
    out = torch.empty((*words.shape[:-1], words.shape[-1], per), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(per):
        shift = i * bits if order == "lsb" else size - (i + 1) * bits
        out[..., i] = ((words >> shift) & mask).to(torch.uint8)
    return out.flatten(-2)[..., :count]


def _pack_dense(codes: torch.Tensor, bits: int, words: int, order: str, word: torch.dtype) -> torch.Tensor:
    """Codes that straddle words. Every `size` codes fill `bits` words exactly, so the pattern repeats."""
    size, kind = _WORD_BITS[word], torch.int64
    lead, count = codes.shape[:-1], codes.shape[-1]
    runs = ceil(count / size)
    out = torch.zeros((*lead, runs, bits), dtype=kind, device=codes.device)
    mask = (1 << size) - 1
    for i in range(min(size, count)):
        part = codes[..., i::size].to(kind) & ((1 << bits) - 1)
        runs_here = part.shape[-1]
        first, offset = divmod(i * bits, size)
        low = part << offset if order == "lsb" else (part << (2 * size - bits - offset)) >> size
        out[..., :runs_here, first] |= low & mask
        if offset + bits > size:
            high = part >> (size - offset) if order == "lsb" else (part << (2 * size - bits - offset)) & mask
            out[..., :runs_here, first + 1] |= high
    return _wrap(out, word).to(word).flatten(-2)[..., :words].contiguous()


def _unpack_dense(words: torch.Tensor, bits: int, count: int, order: str) -> torch.Tensor:
    size = _WORD_BITS[words.dtype]
    mask = (1 << size) - 1
    runs = ceil(count / size)
    short = runs * bits - words.shape[-1]
    padded = torch.nn.functional.pad(words, (0, max(0, short)))[..., : runs * bits]
    wide = (padded.to(torch.int64) & mask).unflatten(-1, (runs, bits))
    out = torch.empty((*words.shape[:-1], runs, size), dtype=torch.uint8, device=words.device)
    for i in range(size):
        first, offset = divmod(i * bits, size)
        after = wide[..., first + 1] if offset + bits > size else None
        if order == "lsb":
            pair = wide[..., first] if after is None else wide[..., first] | (after << size)
            code = pair >> offset
        else:
            pair = (wide[..., first] << size) | (0 if after is None else after)
            code = pair >> (2 * size - bits - offset)
        out[..., i] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return out.flatten(-2)[..., :count]
