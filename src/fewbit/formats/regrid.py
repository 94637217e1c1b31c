"""Carrying out what `exchange.py` decides: a quantised tensor in another scheme, by its codes where the grids permit."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.formats.exchange import image
from fewbit.math.metrics import relative_error
from fewbit.math.rounding import store_scale
from fewbit.math.scales import Search, quantize
from fewbit.num.grid import IntGrid
from fewbit.num.qtensor import QTensor, code_dtype, expand, native_dtype, values_of
from fewbit.num.scheme import Scheme, leaf

_KEEPABLE = ("input_scale", "divisor", "multiple", "permutation")


def regrid(q: QTensor, scheme: Scheme, *, ordered: bool = False) -> tuple[QTensor, float]:
    """The tensor in another scheme, and the relative error ||w - w'|| / ||w|| that this cost: 0.0 when every value is the same float32.

    Codes are kept where the target's grid and blocks permit (see `exchange.image`); else the values are rounded anew with a searched scale.

    Args:
        ordered: whether columns may stay in an order of their own (`sides["permutation"]`); else they go back to that of the inputs.
    """
    if not ordered and "permutation" in q.sides and not scheme.is_leaf:
        if q.scheme.blocks.cols or scheme.blocks.cols:  # groups were of scattered columns
            return _measured(q, _with_inputs(quantize(scheme.weights_only, q.dequantize(), search=Search()), q, scheme))
        q = _back_in_order(q)
    if q.scheme == scheme:
        return q, 0.0
    if scheme.is_leaf:
        out = _as_leaf(q, scheme)
    else:
        kept = None if set(q.sides) - set(_KEEPABLE) else _by_codes(q, scheme) or _whole_zeros(q, scheme)
        out = kept or _with_inputs(quantize(scheme.weights_only, q.dequantize(), search=Search()), q, scheme)
    return _measured(q, out)


def _measured(q: QTensor, out: QTensor) -> tuple[QTensor, float]:
    before, after = q.dequantize(), out.dequantize()
    return out, 0.0 if torch.equal(before, after) else relative_error(before, after)


def _back_in_order(q: QTensor) -> QTensor:
    """The same weight with its columns in the order of the inputs, for blocks that no order matters to."""
    codes = q.codes.reshape(q.shape)[..., torch.argsort(q.sides["permutation"])]
    return replace(q, codes=codes, sides={name: side for name, side in q.sides.items() if name != "permutation"})


def _as_leaf(q: QTensor, scheme: Scheme) -> QTensor:
    """Plain floats."""
    native = native_dtype(scheme.grid)
    assert native is not None
    return QTensor(scheme, q.shape, q.dequantize(native).view(code_dtype(scheme.grid)))


def _with_inputs(out: QTensor, q: QTensor, scheme: Scheme) -> QTensor:
    """The activation part of the target, with the calibrated scale if there is one."""
    sides = {name: side for name, side in q.sides.items() if name == "input_scale" and scheme.static}
    return replace(out, scheme=scheme, sides={**out.sides, **sides})


def _by_codes(q: QTensor, scheme: Scheme) -> QTensor | None:
    """The same codes under other scales and shifts, or None when they do not fit."""
    if image(q.scheme, scheme, q.shape) is None:
        return None
    if q.scheme.weights_only == scheme.weights_only:
        kept = {name: side for name, side in q.sides.items() if name != "input_scale" or scheme.static}
        return replace(q, scheme=scheme, sides=kept)
    if "permutation" in q.sides and q.scheme.blocks != scheme.blocks:
        return None
    scale = _repeated(q, "scale", scheme)
    codes, zero, offset = _codes_and_shifts(q, scheme, scale)
    if codes is None:
        return None
    part = scheme.part("scale")
    if part.is_leaf:
        stored: torch.Tensor | QTensor = _leaf(part, scale)
    else:  # a global scale of one over what is stored directly
        one = torch.ones((*scale.shape[:-2], 1, 1), dtype=torch.float32)
        stored = QTensor(part, tuple(scale.shape), scale.to(torch.float8_e4m3fn).view(torch.uint8), one)
    keep = {
        name: side
        for name, side in q.sides.items()
        if name == "permutation" or (name == "input_scale" and scheme.static)
    }
    return QTensor(scheme, q.shape, codes, stored, zero, offset, sides=keep)


def _whole_zeros(q: QTensor, scheme: Scheme) -> QTensor | None:
    """Offsets that are whole multiples of their scales, or float zero points that are whole, as integer zero points: what was an AWQ file once
    can become one again. None when they are not whole."""
    grid = q.scheme.grid
    wanted = (
        isinstance(grid, IntGrid)
        and grid == scheme.grid
        and scheme.code_shift == leaf(grid)
        and scheme.value_shift is None
    )
    stored = q.code_shift if q.value_shift is None else q.value_shift
    both = q.code_shift is not None and q.value_shift is not None
    if not wanted or set(q.sides) or both or stored is None or q.scale is None:
        return None
    middle = replace(q.scheme, code_shift=scheme.code_shift, value_shift=None, scale=scheme.scale)
    if scheme.scale is None or not scheme.scale.is_leaf or image(middle, scheme, q.shape) is None:
        return None
    counts = q.scheme.block_counts(q.shape)
    scale = values_of(q.scale).reshape(counts)
    shift = values_of(stored).reshape(counts)
    exact = -shift / scale if q.value_shift is not None else shift
    zero = exact.round()
    if bool(((zero - exact).abs() > 2**-5).any()) or float(zero.min()) < 0 or float(zero.max()) > grid.high:
        return None
    plain = QTensor(middle, q.shape, q.codes, _leaf(scheme.scale, scale), _zero(scheme.part("code_shift"), zero))
    return plain if middle == scheme else _by_codes(plain, scheme)


def _leaf(part: Scheme, values: torch.Tensor) -> torch.Tensor:
    """Numbers as a directly stored part: rounded to its dtype, scales kept away from zero."""
    native = native_dtype(part.grid)
    assert native is not None
    rounded = values.to(native)
    return store_scale(part.grid, values).to(native) if bool(((rounded == 0) & (values != 0)).any()) else rounded


def _repeated(q: QTensor, name: str, scheme: Scheme) -> torch.Tensor:
    """A part of the source, float32 [*batch, block rows, block cols] of the target's blocks."""
    part, stored = getattr(q.scheme, name), getattr(q, name)
    counts = q.scheme.block_counts(q.shape)
    values = values_of(stored)
    if part.is_leaf:
        values = expand(values, part, counts)
    each = expand(values.reshape(counts), q.scheme, q.shape).reshape(q.shape)  # one per weight
    tiling = scheme.blocks.resolve(q.shape)
    picked = each.reshape(tiling.view)[..., :: tiling.block_rows, :: tiling.block_cols]
    return picked.clone(memory_format=torch.contiguous_format)  # strides of zero would survive `contiguous`


def _codes_and_shifts(
    q: QTensor, scheme: Scheme, scale: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(codes, zero points, offsets) in the target's terms; codes None when a zero point does not fit."""
    grid, mine = scheme.grid, q.scheme.grid
    if not isinstance(grid, IntGrid) or not isinstance(mine, IntGrid):
        return q.codes, None, None
    zero = _repeated(q, "code_shift", scheme) if q.code_shift is not None else torch.zeros_like(scale)
    offset = _repeated(q, "value_shift", scheme) if q.value_shift is not None else torch.zeros_like(scale)
    lift = (1 << (mine.bits - 1)) if mine.signed and not grid.signed else 0
    codes = q.codes.to(torch.int16) + lift
    if grid.signed and not mine.signed:  # subtract the zero point from the codes
        codes = codes - expand(zero, scheme, q.shape).reshape(q.shape).to(torch.int16)
        zero = torch.zeros_like(zero)
    zero = zero + lift
    if int(codes.min()) < grid.low or int(codes.max()) > grid.high:
        return None, None, None
    codes = codes.to(code_dtype(grid))
    if scheme.value_shift is not None:
        shift = offset if scheme.code_shift is not None else offset - zero * scale
        stored = _zero(scheme.code_shift, zero) if scheme.code_shift is not None else None
        return codes, stored, shift.to(native_dtype(scheme.value_shift.grid) or torch.float32)
    if bool((offset != 0).any()):
        return None, None, None
    if scheme.code_shift is None:
        return (codes if not bool((zero != 0).any()) else None), None, None
    return codes, _zero(scheme.code_shift, zero), None


def _zero(part: Scheme, zero: torch.Tensor) -> torch.Tensor:
    native = native_dtype(part.grid)
    assert native is not None
    return zero.to(native)
