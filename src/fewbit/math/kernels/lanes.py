"""Sixteen float32 numbers as one value in numba code.

Left to itself LLVM turns a loop into vector code only if it can prove that no two arrays overlap, which it rarely can. Here the vectors are
said outright: `Lanes` is a numba type held in registers (one of 512 bits, two of 256, four of 128, as the processor has them), with + - * / and the few
functions below, each of them one intrinsic. Every operation rounds as the scalar one does and nothing is reordered, so results
are the same on every machine.

    x = load(array, at)        16 numbers from a flat float32, uint16 (bfloat16 bits) or int16 (float16 bits) array
    y = rint(x * splat(2.0))   ties to even, for |x| < 2^22
    store(out, at, y)

numba does not notice that a cached kernel of another file is stale when this file changes: touch the kernels too.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 16
_F32, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_VF, _VI = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)
_MAGIC = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


Lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _VF)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * WIDTH)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * WIDTH)


def _spread(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """A scalar in all lanes."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(_VI, [0] * WIDTH))


def _pointer(context, builder, kind, array, at, element):
    """Pointer to 16 elements of a flat C array from index `at` on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, WIDTH).as_pointer())


def _arithmetic(function, emit: str) -> None:
    @intrinsic
    def op(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, emit)(*args)

        return Lanes(Lanes, Lanes), codegen

    @overload(function)
    def typed(a, b):
        if a == Lanes and b == Lanes:
            return lambda a, b: op(a, b)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def splat(typingctx, x):
    """A float32 in all lanes."""

    def codegen(context, builder, signature, args):
        return _spread(builder, args[0], _VF)

    return Lanes(types.float32), codegen


@intrinsic
def load(typingctx, array, at):
    """Elements at..at+15 of a flat array of float32, uint16 (bfloat16 bits) or int16 (float16 bits)."""
    element = {types.float32: _F32, types.uint16: _I16, types.int16: _I16}.get(array.dtype)
    if element is None:
        return None

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], element)
        value = builder.load(pointer, align=4 if element is _F32 else 2)
        if signature.args[0].dtype == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _VI), _integers(16)), _VF)
        if signature.args[0].dtype == types.int16:
            return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), WIDTH)), _VF)
        return value

    return Lanes(array, types.intp), codegen


@intrinsic
def store(typingctx, array, at, x):
    """Write the lanes to elements at..at+15 of a flat array of float32, int8 or uint8 (whole numbers, the low eight bits)."""
    small = array.dtype in (types.int8, types.uint8)

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _I8 if small else _F32)
        value = args[2]
        if small:
            value = builder.trunc(builder.fptosi(value, _VI), ir.VectorType(_I8, WIDTH))
        builder.store(value, pointer, align=1 if small else 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), codegen


@intrinsic
def store_nearest(typingctx, array, at, x):
    """Write the nearest whole numbers of the lanes, ties to even, to elements at..at+15 of a flat int8 or uint8 array; |x| < 2^22."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], _I8)
        shifted = builder.bitcast(builder.fadd(args[2], _constant(_MAGIC)), _VI)  # the number stands in the lowest bits
        builder.store(builder.trunc(shifted, ir.VectorType(_I8, WIDTH)), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), codegen


def _emit_less(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fcmp_ordered("<", a, b)


@intrinsic
def lower(typingctx, a, b):
    """The smaller of two, lane by lane; b where either is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(_emit_less(builder, *args), *args)

    return Lanes(Lanes, Lanes), codegen


@intrinsic
def higher(typingctx, a, b):
    """The larger of two, lane by lane; b where either is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(_emit_less(builder, args[1], args[0]), *args)

    return Lanes(Lanes, Lanes), codegen


@intrinsic
def where_greater(typingctx, a, b, x, y):
    """x where a > b, else y."""

    def codegen(context, builder, signature, args):
        a, b, x, y = args
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)

    return Lanes(Lanes, Lanes, Lanes, Lanes), codegen


@intrinsic
def rint(typingctx, x):
    """The nearest whole number, ties to even, for |x| < 2^22."""

    def codegen(context, builder, signature, args):
        return builder.fsub(builder.fadd(args[0], _constant(_MAGIC)), _constant(_MAGIC))

    return Lanes(Lanes), codegen


@intrinsic
def root(typingctx, x):
    """The square root, correctly rounded."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_VF, [_VF])
        return builder.call(builder.module.declare_intrinsic(f"llvm.sqrt.v{WIDTH}f32", fnty=kind), args)

    return Lanes(Lanes), codegen


@intrinsic
def half(typingctx, x):
    """The nearest float16, ties to even; beyond the largest it stays there."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], _VI)
        sign = builder.and_(bits, _integers(-(1 << 31)))
        size = builder.bitcast(builder.and_(bits, _integers(0x7FFFFFFF)), _VF)
        top = _constant(65504.0)
        size = builder.select(_emit_less(builder, top, size), top, size)
        raw = builder.bitcast(size, _VI)
        even = builder.and_(builder.lshr(raw, _integers(13)), _integers(1))
        rounded = builder.add(raw, builder.add(_integers(0xFFF), even))
        normal = builder.bitcast(builder.and_(rounded, _integers(-8192)), _VF)
        magic = _constant(0.75)  # 1.5 * 2^23 times the least subnormal, 2^-24
        small = builder.fsub(builder.fadd(size, magic), magic)
        level = builder.select(_emit_less(builder, size, _constant(2.0**-14)), small, normal)
        return builder.bitcast(builder.or_(sign, builder.bitcast(level, _VI)), _VF)

    return Lanes(Lanes), codegen


@intrinsic
def not_finite(typingctx, x):
    """1 where a lane is NaN or infinite, else 0."""

    def codegen(context, builder, signature, args):
        bits = builder.and_(builder.bitcast(args[0], _VI), _integers(0x7F800000))
        return builder.select(builder.icmp_signed("==", bits, _integers(0x7F800000)), _constant(1.0), _constant(0.0))

    return Lanes(Lanes), codegen


@intrinsic
def lane(typingctx, x, n):
    """One lane as a float32."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], builder.trunc(args[1], _I32))

    return types.float32(Lanes, types.intp), codegen


@intrinsic
def neighbour(typingctx, x):
    """Lanes 0 and 1 exchanged, 2 and 3, and so on."""

    def codegen(context, builder, signature, args):
        mask = ir.Constant(_VI, [n ^ 1 for n in range(WIDTH)])
        return builder.shuffle_vector(args[0], ir.Constant(_VF, ir.Undefined), mask)

    return Lanes(Lanes), codegen


@intrinsic
def total(typingctx, x):
    """The sum of all lanes, halves first: lane n + lane n + 8, then n + 4, n + 2, n + 1."""

    def codegen(context, builder, signature, args):
        value = args[0]
        for step in (8, 4, 2, 1):
            mask = ir.Constant(_VI, [(n + step) % WIDTH for n in range(WIDTH)])
            value = builder.fadd(value, builder.shuffle_vector(value, ir.Constant(_VF, ir.Undefined), mask))
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(Lanes), codegen


def _emit_float(builder, x, high, shift, normal, magic):
    """(sign bit, magnitude bits rounded to the grid, rounded subnormal magnitude, whether normal)."""
    bits = builder.bitcast(x, _VI)
    sign = builder.and_(bits, _integers(-(1 << 31)))
    size = builder.bitcast(builder.and_(bits, _integers(0x7FFFFFFF)), _VF)
    top = _spread(builder, high, _VF)
    size = builder.select(_emit_less(builder, top, size), top, size)
    raw = builder.bitcast(size, _VI)
    places = _spread(builder, shift, _VI)
    half = builder.sub(builder.shl(_integers(1), builder.sub(places, _integers(1))), _integers(1))
    even = builder.and_(builder.lshr(raw, places), _integers(1))
    rounded = builder.add(raw, builder.add(half, even))
    lifted = builder.fadd(size, _spread(builder, magic, _VF))
    is_normal = builder.fcmp_ordered(">=", size, _spread(builder, normal, _VF))
    return sign, rounded, lifted, is_normal


@intrinsic
def float_level(typingctx, x, high, shift, normal, magic):
    """The nearest level of a signed float grid, ties to even.

    high: largest level; shift: 23 - mantissa bits; normal: least normal level; magic: 2^23 times the least subnormal level, which rounds
    subnormals when added and taken off.
    """

    def codegen(context, builder, signature, args):
        sign, rounded, lifted, is_normal = _emit_float(builder, *args)
        places = _spread(builder, args[2], _VI)
        level = builder.shl(builder.lshr(rounded, places), places)
        small = builder.bitcast(builder.fsub(lifted, _spread(builder, args[4], _VF)), _VI)
        return builder.bitcast(builder.or_(sign, builder.select(is_normal, level, small)), _VF)

    return Lanes(Lanes, types.float32, types.int32, types.float32, types.float32), codegen


@intrinsic
def float_code(typingctx, x, high, shift, normal, magic, lowest, sign_bit):
    """The bit pattern of `float_level`, as a whole number; lowest: what to take off the shifted bits, sign_bit: value of the sign bit."""

    def codegen(context, builder, signature, args):
        sign, rounded, lifted, is_normal = _emit_float(builder, *args[:5])
        code = builder.sub(builder.lshr(rounded, _spread(builder, args[2], _VI)), _spread(builder, args[5], _VI))
        base = builder.bitcast(_spread(builder, args[4], _VF), _VI)
        small = builder.sub(builder.bitcast(lifted, _VI), base)
        code = builder.select(is_normal, code, small)
        negative = builder.icmp_signed("<", sign, _integers(0))
        code = builder.or_(code, builder.select(negative, _spread(builder, args[6], _VI), _integers(0)))
        return builder.sitofp(code, _VF)

    return Lanes(Lanes, types.float32, types.int32, types.float32, types.float32, types.int32, types.int32), codegen
