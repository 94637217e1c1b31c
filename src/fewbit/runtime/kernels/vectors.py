"""Sixteen codes at a time as float32 lanes: intrinsics that `direct_loops` is made of, beside those of `math.kernels.lanes`.

    low, high = nibbles(codes, at)       32 codes of 4 bits from 16 bytes: even columns in `low`, odd ones in `high`
    w = look(table, low)                 levels of a table of 16 float32; one instruction where the processor has AVX-512

numba does not notice that a cached kernel of another file is stale when this file changes: touch the loops too.
"""

from __future__ import annotations

import llvmlite.binding as binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fewbit.math.kernels.lanes import _I8, _I16, _I32, _VF, _VI, WIDTH, Lanes, _integers, _pointer, _spread

_WIDE = binding.get_host_cpu_features().get("avx512f", False)
_CONTRACT = ("contract",)


class _IndicesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Indices")


Indices = _IndicesType()


@register_model(_IndicesType)
class _IndicesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _VI)


def _bytes(context, builder, signature, args):
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _I8)
    return builder.load(pointer, align=1)


@intrinsic
def indices(typingctx, array, at):
    """Bytes at..at+15 of a flat uint8 array as integers."""

    def codegen(context, builder, signature, args):
        return builder.zext(_bytes(context, builder, signature, args), _VI)

    return Indices(array, types.intp), codegen


@intrinsic
def upper(typingctx, index):
    """Each integer without its lowest four bits."""

    def codegen(context, builder, signature, args):
        return builder.lshr(args[0], _integers(4))

    return Indices(Indices), codegen


@intrinsic
def look(typingctx, table, index):
    """Lane i is lane `index[i] & 15` of the table."""

    def codegen(context, builder, signature, args):
        table, index = args
        if _WIDE:
            kind = ir.FunctionType(_VF, [_VF, _VI])
            permute = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.sf.512", fnty=kind)
            return builder.call(permute, [table, index])
        index = builder.and_(index, _integers(15))
        out = ir.Constant(_VF, ir.Undefined)
        for lane in range(WIDTH):
            at = ir.Constant(_I32, lane)
            out = builder.insert_element(out, builder.extract_element(table, builder.extract_element(index, at)), at)
        return out

    return Lanes(Lanes, Indices), codegen


@intrinsic
def whole(typingctx, array, at):
    """Bytes at..at+15 of a flat int8 or uint8 array as whole numbers."""
    signed = array.dtype == types.int8

    def codegen(context, builder, signature, args):
        found = _bytes(context, builder, signature, args)
        return builder.sitofp(builder.sext(found, _VI) if signed else builder.zext(found, _VI), _VF)

    return Lanes(array, types.intp), codegen


def _small_floats(shift: int):
    @intrinsic
    def floats(typingctx, array, at):
        """Bytes at..at+15 as 8-bit floats, read as halves: the sign and the rest moved into place."""

        def codegen(context, builder, signature, args):
            half = ir.VectorType(_I16, WIDTH)
            raw = builder.sext(_bytes(context, builder, signature, args), half)
            sixteen = lambda value: ir.Constant(half, [value] * WIDTH)  # noqa: E731
            sign = builder.and_(raw, sixteen(-32768))
            rest = builder.shl(builder.and_(raw, sixteen(127)), sixteen(shift))
            halves = builder.bitcast(builder.or_(sign, rest), ir.VectorType(ir.HalfType(), WIDTH))
            return builder.fpext(halves, _VF)

        return Lanes(array, types.intp), codegen

    return floats


e4m3 = _small_floats(
    7
)  # 2^-8 of the level: the exponent's bias is 7, a half's 15; codes that are no number come out as 480 * 2^-8
e5m2 = _small_floats(8)  # the level: the upper byte of a half


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, in one rounding where the processor can."""

    def codegen(context, builder, signature, args):
        a, b, c = args
        return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    return Lanes(Lanes, Lanes, Lanes), codegen


@intrinsic
def halves(typingctx, a, b):
    """Lanes 0-7 from a, 8-15 from b."""

    def codegen(context, builder, signature, args):
        mask = ir.Constant(_VI, [0] * 8 + [16] * 8)
        return builder.shuffle_vector(_spread(builder, args[0], _VF), _spread(builder, args[1], _VF), mask)

    return Lanes(types.float32, types.float32), codegen


@intrinsic
def total(typingctx, x):
    """The sum of the lanes, by halves."""

    def codegen(context, builder, signature, args):
        value = args[0]
        for width in (8, 4, 2, 1):
            mask = ir.Constant(_VI, [(lane + width) % (2 * width) for lane in range(WIDTH)])
            value = builder.fadd(value, builder.shuffle_vector(value, value, mask))
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(Lanes), codegen


__all__ = ["Indices", "e4m3", "e5m2", "fma", "halves", "indices", "look", "total", "upper", "whole"]
