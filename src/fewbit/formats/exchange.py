"""From one scheme to another without going through rounding: which schemes hold the very same numbers, decided from shapes alone.

A weight stored as w = (code - zero) * scale + offset can change its clothes without changing a value:

    codes        signed to unsigned with a zero point in the middle; more bits than it needs
    blocks       finer ones, each with a copy of its old scale
    zero point   integer to float; to an offset of -zero * scale, if the offset's dtype holds the product
    scales       a dtype that holds them; double quantisation undone into float32

    conversion(scheme, shape, "awq", "BF16")  ->  Conversion("exact", T, "zero point 8 written out")

Kinds: **exact**, every value is the same float32; **re-gridded**, the values move by what is predicted, on a grid as fine; **lossy**, the target has fewer
bits; **impossible**, with the reason. `regrid.py` carries it out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fewbit.formats.kinds import Affine, direct_float, mx_element
from fewbit.formats.table import Format, format_named
from fewbit.num.blocks import CHANNEL, TENSOR, Blocks, flat
from fewbit.num.grid import BF16, E4M3, F16, F32, Codebook, FloatGrid, IntGrid, VectorGrid
from fewbit.num.scheme import Scheme, leaf, parse_scheme

Kind = Literal["exact", "re-gridded", "lossy", "impossible"]
KINDS: dict[Kind, int] = {"exact": 0, "re-gridded": 1, "lossy": 2, "impossible": 3}
_ACTIVATIONS = tuple(
    parse_scheme(word)
    for word in ("int8-token", "fp8-e4m3-token", "fp8-e4m3-g128", "fp8-e4m3-tensor", "mxfp8", "mxfp4")
)


@dataclass(frozen=True)
class Conversion:
    """What becomes of one weight in another format.

    Attributes:
        kind: exact, re-gridded, lossy or impossible.
        scheme: how the target stores it; None when impossible.
        how: what happens, or why it cannot.
        error: predicted relative error ||w - w'|| / ||w|| of what moves, 0 when exact.
        by_codes: whether the codes are kept; else the values are rounded anew.
    """

    kind: Kind
    scheme: Scheme | None
    how: str
    error: float = 0.0
    by_codes: bool = False


@functools.lru_cache(maxsize=4096)
def conversion(
    scheme: Scheme, shape: tuple[int, ...], target: str, dtype: str = "BF16", wanted: Scheme | None = None
) -> Conversion:
    """What becomes of a weight of this scheme and shape in a format, for a model of a dtype (F32, F16, BF16).

    Args:
        wanted: the scheme that the user asks for; None takes the best that the format has: the same values if it can, in the fewest bits.

    Raises:
        InputError: FB-E0604 for an unknown format.
    """
    form = format_named(target)
    if form.name.startswith("dense"):
        return _to_dense(scheme, form)
    if wanted is not None:
        asked = form.conform(wanted, dtype)
        reason = form.accepts(asked, shape)
        return Conversion("impossible", None, reason) if reason else to_scheme(scheme, asked, shape)
    offered = (one for dressing in _dressings(scheme, shape) for one in (dressing, form.conform(dressing, dtype)))
    accepted = [one for one in dict.fromkeys(offered) if form.accepts(one, shape) is None]
    results = [to_scheme(scheme, one, shape) for one in accepted]
    carried = [result for result in results if result.by_codes]
    if carried:
        return min(carried, key=lambda result: (KINDS[result.kind], result.error, _bits(result.scheme, shape)))
    alike = [result for result in results if _weight_bits(result.scheme) == _weight_bits(scheme)]
    if alike:  # the same width, in blocks as fine: rounded anew
        return min(alike, key=lambda result: (_nearness(scheme, result.scheme, shape), _bits(result.scheme, shape)))
    default = form.conform(parse_scheme(form.default_scheme), dtype)
    blocks = [
        default.blocks,
        *(Blocks(1, size) for size in (64, 32, 16) if default.blocks.rows == 1 and size < default.blocks.cols),
    ]
    fitting = [one for size in blocks if form.accepts(one := replace(default, blocks=size), shape) is None]
    if not fitting:
        return Conversion("impossible", None, f"{form.accepts(default, shape)}; {form.accepts(scheme, shape)}")
    return to_scheme(scheme, fitting[0], shape)


def out_of_order(one: Conversion, target: str) -> Conversion:
    """The same conversion of a weight whose columns lie in an order that the target cannot store: groups of neighbours are formed anew."""
    if one.scheme is None or one.scheme.is_leaf or not one.by_codes or not one.scheme.blocks.cols:
        return one  # values in any order, or one scale a row
    how = f"columns are in an order of their own, which {target} cannot store: values rounded anew to {one.scheme}"
    return Conversion("re-gridded", one.scheme, how, predicted_error(one.scheme.weights_only))


def _bits(scheme: Scheme | None, shape: tuple[int, ...]) -> int:
    return scheme.storage_bits(shape) if scheme is not None else 0


def _nearness(scheme: Scheme, other: Scheme | None, shape: tuple[int, ...]) -> float:
    """How far another scheme is from this one, for choosing among those that must round anew: block size first, then shifts."""
    mine, theirs = tiles(scheme.blocks, shape), tiles(other.blocks, shape) if other is not None else None
    if mine is None or theirs is None or other is None:
        return math.inf
    ratio = abs(math.log2((mine[0] * mine[1]) / (theirs[0] * theirs[1])))
    return ratio + 0.5 * (scheme.symmetric != other.symmetric)


def _to_dense(scheme: Scheme, form: Format) -> Conversion:
    grid = {"dense": BF16, "dense-f16": F16, "dense-f32": F32}[form.name]
    wanted = leaf(grid)
    if grid == F32:
        return Conversion("exact", wanted, "values as float32")
    return Conversion("re-gridded", wanted, f"values rounded to {grid.name}", rounding_error(grid))


def to_scheme(scheme: Scheme, target: Scheme, shape: tuple[int, ...]) -> Conversion:
    """What becomes of a weight of one scheme in another, whatever the format."""
    moved = image(scheme, target, shape)
    if moved is not None:
        how, error = moved
        return Conversion("exact" if error == 0 else "re-gridded", target, how, error, by_codes=True)
    ours, theirs = _weight_bits(scheme), _weight_bits(target)
    error = predicted_error(target.weights_only)
    kind: Kind = "re-gridded" if theirs >= ours else "lossy"
    return Conversion(kind, target, f"values rounded anew to {target}", error)


def _weight_bits(scheme: Scheme | None) -> float:
    if scheme is None:
        return 0.0
    return float(scheme.grid.bits) / scheme.grid.dim


def image(scheme: Scheme, target: Scheme, shape: tuple[int, ...]) -> tuple[str, float] | None:
    """(what happens, relative error) when the target holds the same codes, possibly with rounded scales; None when codes must be chosen anew."""
    if scheme.weights_only == target.weights_only:
        return ("as it is" if scheme == target else "the same weights, other activations"), 0.0
    if scheme.is_leaf or target.is_leaf or not refines(scheme.blocks, target.blocks, shape):
        return None
    steps, errors = [], [0.0]
    if tiles(scheme.blocks, shape) != tiles(target.blocks, shape):
        steps.append(f"scales repeated for {target.blocks.spelling} blocks")
    grids = _grids(scheme, target)
    if grids is None:
        return None
    steps += grids
    held = _scale_error(scheme, target)
    if held is None:
        return None
    if held[0]:
        steps.append(held[0])
    errors.append(held[1])
    shifted = _shift_error(scheme, target)
    if shifted is None:
        return None
    if shifted[0]:
        steps.append(shifted[0])
    errors.append(shifted[1])
    return "; ".join(steps) or "the same numbers in other words", max(errors)


def tiles(blocks: Blocks, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) of a block in a weight of this shape; flat blocks that keep within rows are groups; None for those that do not."""
    if not blocks.flat:
        tiling = blocks.resolve(shape)
        return tiling.block_rows, tiling.block_cols
    return (1, blocks.cols) if blocks.cols and shape[-1] % blocks.cols == 0 else None


def refines(coarse: Blocks, fine: Blocks, shape: tuple[int, ...]) -> bool:
    """Whether every block of `fine` lies within one block of `coarse`."""
    if coarse == fine:
        return True
    big, small = tiles(coarse, shape), tiles(fine, shape)
    if big is None or small is None:
        return False
    return all(b % s == 0 or b >= size for b, s, size in zip(big, small, shape[-2:]))


def _grids(scheme: Scheme, target: Scheme) -> list[str] | None:
    """What happens to the codes, or None when the target's grid lacks levels of the source's."""
    ours, theirs = scheme.grid, target.grid
    if ours == theirs:
        return []
    if not isinstance(ours, IntGrid) or not isinstance(theirs, IntGrid):
        return None
    if theirs.bits < ours.bits or (theirs.signed and not ours.signed and not _can_sign(scheme, target)):
        return None
    return [f"codes of {ours.bits} in {theirs.bits} bits"] if theirs.bits > ours.bits else []


def _can_sign(scheme: Scheme, target: Scheme) -> bool:
    """Whether unsigned codes with an integer zero point fit a signed grid whatever the zero point: code - zero has one bit more."""
    return (
        scheme.code_shift is not None
        and isinstance(scheme.code_shift.grid, IntGrid)
        and target.grid.bits > scheme.grid.bits
    )


_MANTISSA = {F32.name: 24, F16.name: 11, BF16.name: 8, E4M3.name: 4, "ue4m3": 4, "e8m0": 1}


def rounding_error(grid: FloatGrid) -> float:
    """Root-mean-square relative error of rounding a number to a float grid, uniform mantissas."""
    return 2.0**-grid.mantissa / (2 * math.sqrt(3)) / 1.44


def _scale_error(scheme: Scheme, target: Scheme) -> tuple[str, float] | None:
    """What happens to the scales: (words, relative error); None when the target computes its scales in a way of its own."""
    if scheme.scale == target.scale:
        return "", 0.0
    mine, theirs = direct_float(scheme.scale), direct_float(target.scale)
    if theirs is None or theirs.name not in (F32.name, F16.name, BF16.name):
        only_global = (
            target.scale is not None and target.scale.grid == E4M3 and mine == E4M3 and not target.scale.is_leaf
        )
        return ("global scale of 1", 0.0) if only_global else None
    if mine is None:  # nested scales, written out
        error = 0.0 if theirs == F32 else rounding_error(theirs)
        return f"nested scales written out in {theirs.name}", error
    wider = _MANTISSA[theirs.name] >= _MANTISSA[mine.name] and theirs.exponent >= min(mine.exponent, 8)
    if wider:
        return "", 0.0
    if theirs == F16 and mine == BF16:
        return "scales in f16, exact above 6e-5", 0.0
    return f"scales rounded to {theirs.name}", rounding_error(theirs)


def _shift_error(scheme: Scheme, target: Scheme) -> tuple[str, float] | None:
    """What happens to zero points and offsets: (words, relative error); None when the target has no place for them."""
    if (scheme.code_shift, scheme.value_shift) == (target.code_shift, target.value_shift) and (
        scheme.grid == target.grid or scheme.code_shift is None
    ):
        return _same_signs(scheme, target)
    if not isinstance(scheme.grid, IntGrid) or not isinstance(target.grid, IntGrid):
        return None
    if target.value_shift is not None:
        grid = direct_float(target.value_shift)
        if grid is None:
            return None
        if scheme.value_shift is not None and scheme.code_shift is None:
            mine = direct_float(scheme.value_shift)
            fits = mine is not None and _MANTISSA[mine.name] <= _MANTISSA[grid.name]
            return ("", 0.0) if fits or grid == F32 else (f"offsets rounded to {grid.name}", rounding_error(grid) * 4)
        # -zero * scale has the bits of both; with symmetric codes the zero is a power of two and costs none
        mantissa = _MANTISSA[(direct_float(scheme.scale) or F32).name]
        product = mantissa + (0 if scheme.code_shift is None else int(scheme.grid.bits))
        if mantissa + scheme.grid.bits > _MANTISSA[F32.name]:  # code * scale is itself rounded
            return "zero points became offsets", max(1e-7, rounding_error(grid) * 4)
        exact = product <= _MANTISSA[grid.name]
        return "zero points became offsets" + (
            "" if exact else f", rounded to {grid.name}"
        ), 0.0 if exact else rounding_error(grid) * 4
    if scheme.value_shift is not None:
        return None
    if target.code_shift is None:
        return ("zero points subtracted from the codes", 0.0) if _can_sign(scheme, target) else None
    if direct_float(target.code_shift) is not None:
        integral = scheme.code_shift is None or isinstance(scheme.code_shift.grid, IntGrid)
        return ("zero points as floats", 0.0) if integral or scheme.code_shift == target.code_shift else None
    if scheme.code_shift is None or isinstance(scheme.code_shift.grid, IntGrid):
        return "zero points written out" if scheme.code_shift is None else "", 0.0
    return None


def _same_signs(scheme: Scheme, target: Scheme) -> tuple[str, float] | None:
    """Without shifts, unsigned codes cannot become signed ones or the reverse."""
    if (
        isinstance(scheme.grid, IntGrid)
        and isinstance(target.grid, IntGrid)
        and scheme.grid.signed != target.grid.signed
    ):
        return None
    return "", 0.0


def _dressings(scheme: Scheme, shape: tuple[int, ...]) -> Iterator[Scheme]:
    """Schemes that might hold the same values, for a format to choose from."""
    yield scheme
    yield scheme.weights_only
    blocks = [
        scheme.blocks,
        CHANNEL,
        *(Blocks(1, size) for size in (128, 64, 32, 16)),
        Blocks(128, 128),
        TENSOR,
        *(flat(size) for size in (128, 64)),
    ]
    fine = [one for one in dict.fromkeys(blocks) if refines(scheme.blocks, one, shape)]
    scales = [F16, BF16, F32]
    if isinstance(scheme.grid, IntGrid):
        for one in fine:
            for bits in sorted({scheme.grid.bits, *(bits for bits in (3, 4, 5, 6, 8) if bits > scheme.grid.bits)}):
                for zero in ("none", "code", "float", "value"):
                    for grid in scales:
                        for inputs in (scheme.activation, None):
                            yield replace(
                                Affine(bits, one, zero, grid, grid if zero in ("float", "value") else None).scheme,
                                activation=inputs,
                            )
        return
    if isinstance(scheme.grid, VectorGrid) or scheme.is_leaf:
        return
    parts = [leaf(grid) for grid in scales] + ([scheme.scale] if scheme.scale is not None else [])
    if direct_float(scheme.scale) == E4M3:
        parts.append(Scheme(E4M3, TENSOR, leaf(F32)))
    for one in fine:
        for part in parts:
            for inputs in (None, *_ACTIVATIONS):
                yield Scheme(scheme.grid, one, part, activation=inputs)


@functools.lru_cache(maxsize=256)
def predicted_error(scheme: Scheme) -> float:
    """Relative error of rounding a normal weight to a scheme: a table for common widths, six decibels a bit between."""
    grid = scheme.grid
    if isinstance(grid, FloatGrid) and grid.bits > 8:
        return rounding_error(grid)
    if mx_element(scheme) is not None and grid.bits == 4:
        return 0.117
    bits = _weight_bits(scheme)
    gain = 1.25 if isinstance(grid, IntGrid) and scheme.blocks.cols == 0 and not scheme.blocks.flat else 1.0
    base = {1: 0.6, 2: 0.35, 3: 0.17, 4: 0.085, 5: 0.041, 6: 0.02, 7: 0.01, 8: 0.0055}.get(
        round(bits), 0.6 * 2.0 ** (-bits + 1)
    )
    if isinstance(grid, FloatGrid) and grid.bits == 8:
        base = 0.026
    if isinstance(grid, Codebook) and bits >= 4:
        base = 0.078
    return base * gain
