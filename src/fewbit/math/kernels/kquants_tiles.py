"""What the block-scale kernels of ggml's types share: tiles of sixteen blocks as lanes, and float16 rounding.

A search for a block's scale is a loop over candidates of a loop over weights, with a few sums per block. Written one block at a time the
sums run across the vector. Here sixteen blocks are transposed into a tile, weight j of block b at j * 16 + b, and every step of the loop over
weights is one vector operation for sixteen blocks (`lanes.py`). Tiles that lie in the same columns follow each other, so that
the importance of the columns is transposed once for all rows.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fewbit.math.kernels.lanes import higher, load, splat, store, where_greater
from fewbit.math.kernels.options import INNER, OUTER

LANES = 16
CHUNK = 32  # tiles that one thread takes at a time
F = np.float32


@njit(**INNER)
def round_f16(value):
    """The float16 nearest to a float32, as float32; beyond the largest it stays there, as ggml's scales must be finite."""
    size = abs(value)
    if size >= F(65504.0):
        return F(65504.0) if value > F(0.0) else F(-65504.0)
    if size < F(6.103515625e-05):  # subnormal: multiples of 2^-24
        return np.rint(value * F(16777216.0)) * F(5.9604644775390625e-08)
    bits = np.int32(F(value).view(np.int32))  # drop 13 of 23 mantissa bits, ties to even
    return np.int32((bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-8192)).view(
        np.float32
    )


@njit(**INNER)
def growth(energy, agreement, share):
    """What a least-squares scale is multiplied by so that `share` of its shrinkage is undone.

    Least squares leaves w_hat orthogonal to the error: sum h w w_hat = sum h w_hat^2 < sum h w^2, so every layer's answers come out smaller by the
    share of energy that is lost, all with one sign, which costs more KL than its part in the squared error. At share 1 the first sum is sum h w^2.

    Args:
        energy: sum h w^2; agreement: sum h w w_hat.
    """
    if agreement <= F(0.4) * energy:
        return F(1.0)
    return F(1.0) + share * max(energy / agreement - F(1.0), F(0.0))


@njit(**INNER, inline="always")
def growths(energy, agreement, share):
    """`growth` of lanes."""
    one, zero = splat(F(1)), splat(F(0))
    grown = one + splat(share) * higher(energy / agreement - one, zero)
    return where_greater(agreement, splat(F(0.4)) * energy, grown, one)


@njit(**INNER)
def share_sums(lanes, width):
    """Sums over groups of `width` numbers of float32 [16], in place, in all of a group."""
    for first in range(0, LANES if width > 1 else 0, width):
        whole = F(0)
        for lane in range(first, first + width):
            whole += lanes[lane]
        lanes[first : first + width] = whole


@njit(**INNER)
def inverse(scale):
    """1 / scale, and 0 for a scale of 0."""
    return F(1.0) / scale if scale != F(0.0) else F(0.0)


@njit(**INNER)
def inverses(scale):
    """`inverse` of lanes; scales below 1e-19 count as 0."""
    return where_greater(scale * scale, splat(F(1e-38)), splat(F(1.0)) / scale, splat(F(0.0)))


@njit(**INNER)
def tile_place(tile, size, count, period):
    """(first block of a tile, column tile that it lies in): tiles of the same columns are neighbours where rows are whole tiles."""
    weights = LANES * size
    if period % weights:
        return tile * LANES, tile
    rows = count * size // period
    column = tile // rows
    return (tile % rows) * (period // size) + column * LANES, column


@intrinsic
def transpose(typingctx, source, start, stride, out, to):
    """out[to + 16 j + i] = source[start + stride i + j] for i, j < 16, float32: four rounds of sixteen two-vector shuffles."""

    def codegen(context, builder, signature, args):
        vector, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)
        base = context.make_array(signature.args[0])(context, builder, args[0]).data
        target = context.make_array(signature.args[3])(context, builder, args[3]).data
        rows, at = [], args[1]
        for _ in range(LANES):
            rows.append(builder.load(builder.bitcast(builder.gep(base, [at]), vector.as_pointer()), align=4))
            at = builder.add(at, args[2])
        mask = [
            ir.Constant(ir.VectorType(word, LANES), [half + i // 2 + LANES * (i % 2) for i in range(LANES)])
            for half in (0, 8)
        ]
        for _ in range(4):  # interleaving rows i and i + 8, four times over, turns rows into columns
            rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + 8], mask[i % 2]) for i in range(LANES)]
        for j, row in enumerate(rows):
            place = builder.add(args[4], ir.Constant(args[4].type, LANES * j))
            builder.store(row, builder.bitcast(builder.gep(target, [place]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp), codegen


@njit(**INNER)
def load_tile(source, period, first, count, size, out):
    """Blocks first … first + 15 (the last one again where there are fewer) of `source`, which repeats every `period` weights, as lanes.

    size: a multiple of 16.
    """
    start = (first * size) % period
    if first + LANES <= count and start + LANES * size <= period:
        for j in range(0, size, LANES):
            transpose(source, start + j, size, out, j * LANES)
        return
    for lane in range(LANES):
        start = (min(first + lane, count - 1) * size) % period
        for j in range(size):
            out[j * LANES + lane] = source[start + j]


@njit(**OUTER)
def lanes_array(count):
    """float32 [count], beginning on a line of the cache: vectors that lie across two cost twice."""
    whole = np.empty(count + LANES - 1, np.float32)
    start = (LANES - whole.ctypes.data // 4 % LANES) % LANES
    return whole[start : start + count]


@njit(**INNER)
def write_scales(lanes, row, first, blocks, per_super, out):
    """One number of every super-block of a tile, all its lanes holding it, from lanes[row:] to out [blocks / per_super]."""
    if per_super == 1 and blocks == LANES:
        store(out, first, load(lanes, row))
        return
    for lane in range(0, blocks, per_super):
        out[(first + lane) // per_super] = lanes[row + lane]
