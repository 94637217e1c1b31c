"""Bits of codes laid over each other in planes, as ggml's blocks have them: numba kernels that write one field of every block.

Of 8 / bits runs of `width` codes, the first takes the low bits of `width` bytes, the next the bits above, and so on. Sixteen bytes are made at a
time where the runs are that long, with vectors said outright (see `lanes.py`).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fewbit.math.kernels.options import OUTER

_BYTES = 16
_I8, _VECTOR = ir.IntType(8), ir.VectorType(ir.IntType(8), _BYTES)
_WORD, _WORDS = ir.IntType(16), ir.VectorType(ir.IntType(16), _BYTES // 2)


def _merger(bits: int):
    """out[to + i] = the `bits` bits from bit `first` up of (codes[at + i + plane * width] ^ flip), planes on top of each other, for i < 16."""

    @intrinsic
    def merge(typingctx, codes, at, width, first, flip, out, to):
        def codegen(context, builder, signature, args):
            codes, at, width, first, flip, out, to = args

            def pointer(kind, array, index):
                data = context.make_array(kind)(context, builder, array).data
                return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())

            def spread(scalar, vector):
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            # processors shift words, not bytes: what crosses between two bytes is masked away
            flips, shift = spread(flip, _VECTOR), spread(builder.zext(first, _WORD), _WORDS)
            mask, made = ir.Constant(_VECTOR, [(1 << bits) - 1] * _BYTES), None
            for plane in range(8 // bits):
                code = builder.load(pointer(signature.args[0], codes, at), align=1)
                words = builder.lshr(builder.bitcast(builder.xor(code, flips), _WORDS), shift)
                code = builder.and_(builder.bitcast(words, _VECTOR), mask)
                words = builder.shl(builder.bitcast(code, _WORDS), ir.Constant(_WORDS, [plane * bits] * (_BYTES // 2)))
                made = words if made is None else builder.or_(made, words)
                at = builder.add(at, width)
            builder.store(builder.bitcast(made, _VECTOR), pointer(signature.args[5], out, to), align=1)
            return context.get_dummy_value()

        return types.void(codes, types.intp, types.intp, types.uint8, types.uint8, out, types.intp), codegen

    return merge


_merge_1, _merge_2, _merge_4 = _merger(1), _merger(2), _merger(4)


# One loop for each number of bits: with the choice inside, a tenth of the speed is left.
@njit(**OUTER)
def _pack_1(codes, width, first, flip, count, out, at, stride):
    for block in range(codes.size // count):
        for run in range(count // (width * 8)):
            for i in range(0, width, 16):
                source, to = block * count + run * width * 8 + i, block * stride + at + run * width + i
                _merge_1(codes, source, width, first, flip, out, to)


@njit(**OUTER)
def _pack_2(codes, width, first, flip, count, out, at, stride):
    for block in range(codes.size // count):
        for run in range(count // (width * 4)):
            for i in range(0, width, 16):
                source, to = block * count + run * width * 4 + i, block * stride + at + run * width + i
                _merge_2(codes, source, width, first, flip, out, to)


@njit(**OUTER)
def _pack_4(codes, width, first, flip, count, out, at, stride):
    for block in range(codes.size // count):
        for run in range(count // (width * 2)):
            for i in range(0, width, 16):
                source, to = block * count + run * width * 2 + i, block * stride + at + run * width + i
                _merge_4(codes, source, width, first, flip, out, to)


@njit(**OUTER)
def _pack_short(codes, bits, width, first, flip, count, out, at, stride):
    planes, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for block in range(codes.size // count):
        for run in range(count // (width * planes)):
            to, source = block * stride + at + run * width, block * count + run * width * planes
            for i in range(width):
                value = np.uint8(0)
                for plane in range(planes):
                    code = (np.uint8(codes[source + plane * width + i] ^ flip) >> first) & mask
                    value |= np.uint8(code << np.uint8(plane * bits))
                out[to + i] = value


_PACKERS = {1: _pack_1, 2: _pack_2, 4: _pack_4}


def pack_planes(codes, bits, width, first, flip, count, out, at, stride):
    """Every block's `count` codes to out[block * stride + at:].

    codes: uint8 [blocks * count]; bits: 1, 2 or 4; width: codes in a run; first, flip: uint8, bits from bit `first` up of the codes ^ flip;
    out: uint8 [blocks * stride].
    """
    if width % _BYTES:
        _pack_short(codes, bits, width, first, flip, count, out, at, stride)
    else:
        _PACKERS[bits](codes, width, first, flip, count, out, at, stride)


@njit(**OUTER)
def pack_single_bits(words, first, flip, count, out, at, stride):
    """One bit of each of eight codes in a row to one byte, the first code's lowest; `count` bytes of every block to out[block * stride + at:].

    words: uint64 [blocks * count], eight codes each, the first lowest; first: uint64.
    """
    ones, gather = np.uint64(0x0101010101010101), np.uint64(0x0102040810204080)
    turned = np.uint64(flip) * ones
    for block in range(words.size // count):
        for i in range(count):
            bits = ((words[block * count + i] ^ turned) >> first) & ones
            out[block * stride + at + i] = np.uint8((bits * gather) >> np.uint64(56))


@njit(**OUTER)
def place(field, count, out, at, stride):
    """Every block's `count` bytes, uint8 [blocks * count], to out[block * stride + at:]."""
    if count == 2:  # one float16, the usual case
        for block in range(field.size // 2):
            out[block * stride + at] = field[2 * block]
            out[block * stride + at + 1] = field[2 * block + 1]
        return
    for block in range(field.size // count):
        for i in range(count):
            out[block * stride + at + i] = field[block * count + i]
