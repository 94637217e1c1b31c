"""Bit orders of the types whose codes stand for eight weights: IQ1, IQ2 and IQ3.

A code holds magnitude indices in its low bits and signs above them (see `num.grid.VectorGrid`); ggml spreads both over several fields.
"""

from __future__ import annotations

import numpy as np

from fewbit.formats.gguf.parts import Codec, Parts, as_dtype, join, pack_planes, split, unpack_planes

_U8, _U16, _U32 = np.uint8, np.uint16, np.uint32


def _codes(index: np.ndarray, signs: np.ndarray, index_bits: int) -> np.ndarray:
    return (index.astype(np.int32) | signs.astype(np.int32) << index_bits).astype(np.int32)


def _bits(codes: np.ndarray, first: int, count: int) -> np.ndarray:
    """uint32: `count` bits of each code from bit `first` up."""
    return (codes.view(_U32) >> _U32(first)) & _U32((1 << count) - 1)


def _parts(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Parts:
    return {"codes": codes, "scale.codes": scales, "scale.scale": as_dtype(d, "<f2")}


def _signs_and_scales(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Four 7-bit sign fields and a 4-bit scale in each little-endian word: uint32 [n, 8]."""
    words = scales.astype(_U32) << _U32(28)
    for position in range(4):
        words |= signs[:, position::4] << _U32(7 * position)
    return words


def _split_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [n, 8] -> signs uint32 [n, 32], scales uint8 [n, 8]."""
    signs = (words[:, :, None] >> np.array([0, 7, 14, 21], _U32)) & _U32(127)
    return signs.reshape(len(words), 32), (words >> _U32(28)).astype(_U8)


# d 2 | 8 x (four index bytes, a word of signs and scale)
def _pack_iq2_xxs(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    index = _bits(codes, 0, 8).astype(_U8).reshape(-1, 8, 4)
    words = _signs_and_scales(_bits(codes, 8, 7), parts["scale.codes"]).view(_U8).reshape(-1, 8, 4)
    return join(parts["scale.scale"], np.concatenate([index, words], axis=2).reshape(len(codes), 64))


def _unpack_iq2_xxs(blocks: np.ndarray) -> Parts:
    d, data = split(blocks, 2, 64)
    pairs = data.reshape(-1, 8, 8)
    signs, scales = _split_words(as_dtype(pairs[:, :, 4:].reshape(len(blocks), 32), "<u4"))
    return _parts(_codes(pairs[:, :, :4].reshape(len(blocks), 32), signs, 8), scales, d)


# d 2 | qs 64: 16-bit codes (9 of index, 7 of signs) | scales 8: nibbles
def _pack_iq2_xs(parts: Parts) -> np.ndarray:
    return join(parts["scale.scale"], parts["codes"].astype(_U16), pack_planes(parts["scale.codes"], 4, 1))


def _unpack_iq2_xs(blocks: np.ndarray) -> Parts:
    d, codes, scales = split(blocks, 2, 64, 8)
    return _parts(as_dtype(codes, "<u2").astype(np.int32), unpack_planes(scales, 4, 1), d)


# d 2 | qs 32: low index bytes | signs 32 | qh 8: high pairs | scales 8: nibbles
def _pack_iq2_s(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    low, high, signs = (_bits(codes, first, count).astype(_U8) for first, count in ((0, 8), (8, 2), (10, 8)))
    return join(parts["scale.scale"], low, signs, pack_planes(high, 2, 1), pack_planes(parts["scale.codes"], 4, 1))


def _unpack_iq2_s(blocks: np.ndarray) -> Parts:
    d, low, signs, high, scales = split(blocks, 2, 32, 32, 8, 8)
    index = low | unpack_planes(high, 2, 1).astype(_U16) << _U16(8)
    return _parts(_codes(index, signs, 10), unpack_planes(scales, 4, 1), d)


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Entries of even and of odd position, interleaved: [n, k] and [n, k] -> [n, 2k]."""
    return np.stack([first, second], axis=2).reshape(len(first), -1)


# d 2 | qs 64: index bytes, one for four weights | 8 words of signs and scale
def _pack_iq3_xxs(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    index = _pairs(_bits(codes, 0, 8), _bits(codes, 8, 8)).astype(_U8)
    return join(parts["scale.scale"], index, _signs_and_scales(_bits(codes, 16, 7), parts["scale.codes"]))


def _unpack_iq3_xxs(blocks: np.ndarray) -> Parts:
    d, index, words = split(blocks, 2, 64, 32)
    signs, scales = _split_words(as_dtype(words, "<u4"))
    return _parts(_codes(as_dtype(index, "<u2"), signs, 16), scales, d)


# d 2 | qs 64: low index bytes | qh 8: ninth bits | signs 32 | scales 4: nibbles
def _pack_iq3_s(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    index = _pairs(_bits(codes, 0, 9), _bits(codes, 9, 9))
    low, high = index.astype(_U8), np.packbits((index >> _U32(8)).astype(_U8), axis=1, bitorder="little")
    return join(
        parts["scale.scale"], low, high, _bits(codes, 18, 8).astype(_U8), pack_planes(parts["scale.codes"], 4, 1)
    )


def _unpack_iq3_s(blocks: np.ndarray) -> Parts:
    d, low, high, signs, scales = split(blocks, 2, 64, 8, 32, 4)
    index = low | np.unpackbits(high, axis=1, bitorder="little").astype(np.int32) << 8
    pair = index[:, 0::2] | index[:, 1::2] << 9
    return _parts(_codes(pair, signs, 18), unpack_planes(scales, 4, 1), d)


# d 2 | qs 32: low index bytes | qh 16: 8 words of four high index triples, scale 3 bits, shift 1 bit
def _pack_iq1_s(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    words = parts["scale.codes"].astype(_U16) << _U16(12) | parts["code_shift.codes"].astype(_U16) << _U16(15)
    high = _bits(codes, 8, 3).astype(_U16)
    for position in range(4):
        words |= high[:, position::4] << _U16(3 * position)
    return join(parts["scale.scale"], _bits(codes, 0, 8).astype(_U8), words)


def _unpack_iq1_s(blocks: np.ndarray) -> Parts:
    d, low, words = split(blocks, 2, 32, 16)
    words = as_dtype(words, "<u2")
    high = ((words[:, :, None] >> np.array([0, 3, 6, 9], _U16)) & _U16(7)).reshape(len(blocks), 32)
    parts = _parts(_codes(low, high, 8), ((words >> _U16(12)) & _U16(7)).astype(_U8), d)
    return parts | {"code_shift.codes": (words >> _U16(15)).astype(_U8)}


# qs 32: low index bytes | qh 16: nibbles (high index triple, shift bit) | scales 8: 4 words of four scale triples and a nibble of d
def _pack_iq1_m(parts: Parts) -> np.ndarray:
    codes, scales = parts["codes"], parts["scale.codes"].astype(_U16)
    d = as_dtype(parts["scale.scale"].view(_U8).reshape(len(codes), 2), "<u2")
    words = ((d >> np.array([0, 4, 8, 12], _U16)) & _U16(15)) << _U16(12)
    for position in range(4):
        words |= scales[:, position::4] << _U16(3 * position)
    return join(_bits(codes, 0, 8).astype(_U8), pack_planes(_bits(codes, 8, 4).astype(_U8), 4, 1), words)


def _unpack_iq1_m(blocks: np.ndarray) -> Parts:
    low, high, words = split(blocks, 32, 16, 8)
    words = as_dtype(words, "<u2")
    d = ((words >> _U16(12)) << np.array([0, 4, 8, 12], _U16)).sum(axis=1, keepdims=True, dtype=_U16)
    scales = ((words[:, :, None] >> np.array([0, 3, 6, 9], _U16)) & _U16(7)).reshape(len(blocks), 16).astype(_U8)
    return {
        "codes": _codes(low, unpack_planes(high, 4, 1), 8),
        "scale.codes": scales,
        "scale.scale": d.view("<f2"),
    }


VECTOR_CODECS: dict[str, Codec] = {
    "IQ2_XXS": Codec(_pack_iq2_xxs, _unpack_iq2_xxs),
    "IQ2_XS": Codec(_pack_iq2_xs, _unpack_iq2_xs),
    "IQ2_S": Codec(_pack_iq2_s, _unpack_iq2_s),
    "IQ3_XXS": Codec(_pack_iq3_xxs, _unpack_iq3_xxs),
    "IQ3_S": Codec(_pack_iq3_s, _unpack_iq3_s),
    "IQ1_S": Codec(_pack_iq1_s, _unpack_iq1_s),
    "IQ1_M": Codec(_pack_iq1_m, _unpack_iq1_m),
}
