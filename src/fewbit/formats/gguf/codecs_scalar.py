"""Bit orders of the types whose codes are scalars: Q, K, IQ4, TQ, MXFP4 and NVFP4.

Each pair is named after ggml's struct; the comment gives the struct's fields in file order with their bytes. `planes w` means that runs of
w codes lie over each other (see `parts.pack_planes`).
"""

from __future__ import annotations

import numpy as np

from fewbit.formats.gguf.parts import (
    Codec,
    Parts,
    Planes,
    as_dtype,
    join,
    pack_planes,
    pack_trits,
    split,
    unpack_planes,
)

_U8 = np.uint8


def _signed(codes: np.ndarray, by: int) -> np.ndarray:
    return codes.view(np.int8) - np.int8(by)


# d 2 | [m 2] | [qh 4: bit j = fifth bit of code j] | qs 16: planes 16
def _legacy(bits: int, signed: bool) -> Codec:
    half = 1 << (bits - 1)

    def pack(parts: Parts) -> np.ndarray:
        codes, offset = parts["codes"], half if signed else 0
        fields: list[np.ndarray | Planes] = [parts["scale"]] if signed else [parts["scale"], parts["value_shift"]]
        if bits == 5:
            fields.append(pack_planes(codes, 1, 1, first=4, offset=offset))
        return join(*fields, pack_planes(codes, 4, 16, offset=offset))

    def unpack(blocks: np.ndarray) -> Parts:
        head = 2 if signed else 4
        scales, high, low = split(blocks, head, 4 if bits == 5 else 0, 16)
        codes = unpack_planes(low, 4, 16)
        if bits == 5:
            codes |= np.unpackbits(high, axis=1, bitorder="little") << _U8(4)
        values = as_dtype(scales, "<f2")
        if signed:
            return {"codes": _signed(codes, half), "scale": values}
        return {"codes": codes, "scale": values[:, :1], "value_shift": values[:, 1:]}

    return Codec(pack, unpack)


# d 2 | qs 32
def _pack_q8_0(parts: Parts) -> np.ndarray:
    return join(parts["scale"], parts["codes"])


def _unpack_q8_0(blocks: np.ndarray) -> Parts:
    scale, codes = split(blocks, 2, 32)
    return {"codes": as_dtype(codes, "i1"), "scale": as_dtype(scale, "<f2")}


# scales 16: low nibble scale, high nibble minimum | qs 64: planes 32 | d 2 | dmin 2
def _pack_q2_k(parts: Parts) -> np.ndarray:
    scales = parts["scale.codes"] | parts["value_shift.codes"] << _U8(4)
    return join(scales, pack_planes(parts["codes"], 2, 32), parts["scale.scale"], -parts["value_shift.scale"])


def _unpack_q2_k(blocks: np.ndarray) -> Parts:
    scales, codes, d, dmin = split(blocks, 16, 64, 2, 2)
    return {
        "codes": unpack_planes(codes, 2, 32),
        "scale.codes": scales & _U8(15),
        "scale.scale": as_dtype(d, "<f2"),
        "value_shift.codes": scales >> _U8(4),
        "value_shift.scale": -as_dtype(dmin, "<f2"),
    }


# hmask 32: planes 32 of the third bit | qs 64: planes 32 | scales 12: low nibbles planes 8, high pairs planes 4 | d 2
def _pack_q3_k(parts: Parts) -> np.ndarray:
    codes, scales = parts["codes"], parts["scale.codes"]
    return join(
        pack_planes(codes, 1, 32, first=2, offset=4),
        pack_planes(codes, 2, 32, offset=4),
        pack_planes(scales, 4, 8, offset=32),
        pack_planes(scales, 2, 4, first=4, offset=32),
        parts["scale.scale"],
    )


def _unpack_q3_k(blocks: np.ndarray) -> Parts:
    high, low, scales_low, scales_high, d = split(blocks, 32, 64, 8, 4, 2)
    codes = unpack_planes(low, 2, 32) | unpack_planes(high, 1, 32) << _U8(2)
    scales = unpack_planes(scales_low, 4, 8) | unpack_planes(scales_high, 2, 4) << _U8(4)
    return {"codes": _signed(codes, 4), "scale.codes": _signed(scales, 32), "scale.scale": as_dtype(d, "<f2")}


def _pack_scales_mins(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and minima in 12 bytes: the first four whole, the others' high pairs above them, their nibbles last."""
    return np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> _U8(4)) << _U8(6),
            mins[:, :4] | (mins[:, 4:] >> _U8(4)) << _U8(6),
            (scales[:, 4:] & _U8(15)) | (mins[:, 4:] & _U8(15)) << _U8(4),
        ],
        axis=1,
    )


def _unpack_scales_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second, nibbles = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & _U8(63), (nibbles & _U8(15)) | (first >> _U8(6)) << _U8(4)], axis=1)
    mins = np.concatenate([second & _U8(63), (nibbles >> _U8(4)) | (second >> _U8(6)) << _U8(4)], axis=1)
    return scales, mins


# d 2 | dmin 2 | scales 12 | [qh 32: planes 32 of the fifth bit] | qs 128: planes 32
def _kay(bits: int) -> Codec:
    def pack(parts: Parts) -> np.ndarray:
        codes = parts["codes"]
        fields: list[np.ndarray | Planes] = [parts["scale.scale"], -parts["value_shift.scale"]]
        fields.append(_pack_scales_mins(parts["scale.codes"], parts["value_shift.codes"]))
        if bits == 5:
            fields.append(pack_planes(codes, 1, 32, first=4))
        return join(*fields, pack_planes(codes, 4, 32))

    def unpack(blocks: np.ndarray) -> Parts:
        d, dmin, packed, high, low = split(blocks, 2, 2, 12, 32 if bits == 5 else 0, 128)
        codes = unpack_planes(low, 4, 32)
        if bits == 5:
            codes |= unpack_planes(high, 1, 32) << _U8(4)
        scales, mins = _unpack_scales_mins(packed)
        return {
            "codes": codes,
            "scale.codes": scales,
            "scale.scale": as_dtype(d, "<f2"),
            "value_shift.codes": mins,
            "value_shift.scale": -as_dtype(dmin, "<f2"),
        }

    return Codec(pack, unpack)


# ql 128: planes 64 | qh 64: planes 32 | scales 16 | d 2
def _pack_q6_k(parts: Parts) -> np.ndarray:
    codes = parts["codes"]
    low, high = pack_planes(codes, 4, 64, offset=32), pack_planes(codes, 2, 32, first=4, offset=32)
    return join(low, high, parts["scale.codes"], parts["scale.scale"])


def _unpack_q6_k(blocks: np.ndarray) -> Parts:
    low, high, scales, d = split(blocks, 128, 64, 16, 2)
    codes = unpack_planes(low, 4, 64) | unpack_planes(high, 2, 32) << _U8(4)
    return {"codes": _signed(codes, 32), "scale.codes": as_dtype(scales, "i1"), "scale.scale": as_dtype(d, "<f2")}


# d 2 | qs 16: planes 16
def _pack_iq4_nl(parts: Parts) -> np.ndarray:
    return join(parts["scale"], pack_planes(parts["codes"], 4, 16))


def _unpack_iq4_nl(blocks: np.ndarray) -> Parts:
    d, codes = split(blocks, 2, 16)
    return {"codes": unpack_planes(codes, 4, 16), "scale": as_dtype(d, "<f2")}


# d 2 | scales_h 2: eight pairs | scales_l 4: eight nibbles | qs 128: planes 16
def _pack_iq4_xs(parts: Parts) -> np.ndarray:
    scales = parts["scale.codes"]
    high, low = pack_planes(scales, 2, 1, first=4, offset=32), pack_planes(scales, 4, 1, offset=32)
    return join(parts["scale.scale"], high, low, pack_planes(parts["codes"], 4, 16))


def _unpack_iq4_xs(blocks: np.ndarray) -> Parts:
    d, high, low, codes = split(blocks, 2, 2, 4, 128)
    scales = unpack_planes(low, 4, 1) | unpack_planes(high, 2, 1) << _U8(4)
    return {"codes": unpack_planes(codes, 4, 16), "scale.codes": _signed(scales, 32), "scale.scale": as_dtype(d, "<f2")}


# qs 48 and qh 4: trits, five (in qh four) to a byte as the fraction byte / 256 written in base 3 | d 2
_TRIT_RUNS = ((160, 32, 5), (80, 16, 5), (16, 4, 4))  # codes, run length, trits per byte


def _pack_tq1_0(parts: Parts) -> np.ndarray:
    codes = np.ascontiguousarray(parts["codes"])
    packed = np.empty((len(codes), 52), _U8)
    pack_trits(codes.reshape(-1), np.array(_TRIT_RUNS), packed.reshape(-1))
    return join(packed, parts["scale"])


def _unpack_tq1_0(blocks: np.ndarray) -> Parts:
    *packed, d = split(blocks, 32, 16, 4, 2)
    codes = []
    for data, (count, width, trits) in zip(packed, _TRIT_RUNS, strict=True):
        powers = (3 ** np.arange(trits)).astype(_U8).reshape(1, -1, 1)
        shifted = data.reshape(-1, 1, width) * powers  # modulo 256: drops the leading trits
        codes.append(((shifted.astype(np.uint16) * 3) >> 8).astype(_U8).reshape(-1, count))
    return {"codes": np.concatenate(codes, axis=1), "scale": as_dtype(d, "<f2")}


# qs 64: planes 32 | d 2
def _pack_tq2_0(parts: Parts) -> np.ndarray:
    return join(pack_planes(parts["codes"], 2, 32), parts["scale"])


def _unpack_tq2_0(blocks: np.ndarray) -> Parts:
    codes, d = split(blocks, 64, 2)
    return {"codes": unpack_planes(codes, 2, 32), "scale": as_dtype(d, "<f2")}


def _unsigned_zero(codes: np.ndarray) -> np.ndarray:
    """FP4 codes with the pattern of -0 (8) made +0: ggml's table has zero there."""
    return np.where(codes == 8, _U8(0), codes)


# e 1 | qs 16: planes 16
def _pack_mxfp4(parts: Parts) -> np.ndarray:
    return join(parts["scale"], pack_planes(_unsigned_zero(parts["codes"]), 4, 16))


def _unpack_mxfp4(blocks: np.ndarray) -> Parts:
    scale, codes = split(blocks, 1, 16)
    return {"codes": _unsigned_zero(unpack_planes(codes, 4, 16)), "scale": scale}


# d 4 | qs 32: planes 8
def _pack_nvfp4(parts: Parts) -> np.ndarray:
    return join(parts["scale"], pack_planes(_unsigned_zero(parts["codes"]), 4, 8))


def _unpack_nvfp4(blocks: np.ndarray) -> Parts:
    scale, codes = split(blocks, 4, 32)
    known = np.where(scale == 0x7F, _U8(0), scale & _U8(0x7F))
    return {"codes": _unsigned_zero(unpack_planes(codes, 4, 8)), "scale": np.where(scale == 0xFF, _U8(0x7F), known)}


SCALAR_CODECS: dict[str, Codec] = {
    "Q4_0": _legacy(4, signed=True),
    "Q4_1": _legacy(4, signed=False),
    "Q5_0": _legacy(5, signed=True),
    "Q5_1": _legacy(5, signed=False),
    "Q8_0": Codec(_pack_q8_0, _unpack_q8_0),
    "Q2_K": Codec(_pack_q2_k, _unpack_q2_k),
    "Q3_K": Codec(_pack_q3_k, _unpack_q3_k),
    "Q4_K": _kay(4),
    "Q5_K": _kay(5),
    "Q6_K": Codec(_pack_q6_k, _unpack_q6_k),
    "IQ4_NL": Codec(_pack_iq4_nl, _unpack_iq4_nl),
    "IQ4_XS": Codec(_pack_iq4_xs, _unpack_iq4_xs),
    "TQ1_0": Codec(_pack_tq1_0, _unpack_tq1_0),
    "TQ2_0": Codec(_pack_tq2_0, _unpack_tq2_0),
    "MXFP4": Codec(_pack_mxfp4, _unpack_mxfp4),
    "NVFP4": Codec(_pack_nvfp4, _unpack_nvfp4),
}
