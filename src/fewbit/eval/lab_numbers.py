"""The number lab: what a format is, and what becomes of a number in it. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite, log2, log10

import numpy as np

from fewbit.base.errors import InputError
from fewbit.num.grid import GRID_ALIASES, NAMED_GRIDS, Codebook, FloatGrid, Grid, IntGrid, VectorGrid, grid_named
from fewbit.num.vectors import VECTOR_GRIDS

USUAL = ("f32", "f16", "bf16", "fp8-e4m3", "fp8-e5m2", "fp6-e2m3", "fp4", "nf4", "int8", "int4")


def grid_of(name: str) -> Grid:
    """A grid by name.

    Raises:
        InputError: FB-E0605 with the names that exist.
    """
    found = grid_named(name.lower()) or VECTOR_GRIDS.get(name.lower())
    if found is None:
        raise InputError(
            "FB-E0605",
            f"no number format is called {name!r}; there are {', '.join([*NAMED_GRIDS, *VECTOR_GRIDS, *GRID_ALIASES])}",
        )
    return found


@dataclass(frozen=True)
class FormatFacts:
    """What can be said of a grid.

    Attributes:
        kind: float, integer, codebook or vectors.
        bits: stored bits a value.
        fields: name -> bits, from the highest bit down (floats).
        low, high: least and greatest finite value.
        smallest, smallest_normal: least magnitudes above zero, subnormals in and out (floats only).
        epsilon: distance from 1 to the next value above it; None where 1 is no value of the grid.
        count: finite values, zero once.
        digits: decimal digits that survive.
        values: all finite values in order, where there are 256 at most.
        special: what the other bit patterns mean.
    """

    name: str
    kind: str
    bits: float
    fields: dict[str, int]
    bias: int | None
    low: float
    high: float
    smallest: float
    smallest_normal: float | None
    epsilon: float | None
    count: int
    digits: float | None
    values: tuple[float, ...]
    special: str


_SPECIAL = {
    "ieee": "top exponent: infinities and NaNs",
    "fn": "no infinities; all ones is NaN",
    "none": "every bit pattern is a number",
}


def format_facts(name: str) -> FormatFacts:
    """Everything about one number format."""
    grid = grid_of(name)
    if isinstance(grid, FloatGrid):
        return _float_facts(grid)
    if isinstance(grid, VectorGrid):
        return _vector_facts(grid)
    values = tuple(float(value) for value in np.unique(grid.levels()) + 0.0)
    smallest = min(abs(value) for value in values if value)
    above = [value for value in values if value > 1]
    epsilon = above[0] - 1 if 1.0 in values and above else None
    kind = "integer" if isinstance(grid, IntGrid) else "codebook"
    special = (
        "needs a scale to reach other ranges" if kind == "integer" else "levels from a table; a scale stretches them"
    )
    return FormatFacts(
        grid.name,
        kind,
        float(Fraction(grid.bits)),
        {},
        None,
        values[0],
        values[-1],
        smallest,
        None,
        epsilon,
        len(values),
        None,
        values,
        special,
    )


def _float_facts(grid: FloatGrid) -> FormatFacts:
    fields = {"sign": int(grid.signed), "exponent": grid.exponent, "mantissa": grid.mantissa}
    values: tuple[float, ...] = ()
    if grid.bits <= 16:
        levels = grid.levels()
        finite = np.unique(levels[np.isfinite(levels)]) + 0.0  # no -0
        count = len(finite)
        values = tuple(float(value) for value in finite) if grid.bits <= 8 else ()
    else:
        count = 2 * ((1 << grid.exponent) - 1) * (1 << grid.mantissa) - 1
    low = -grid.high if grid.signed else float(min(values or (0.0,)))
    return FormatFacts(
        grid.name, "float", grid.bits, {name: bits for name, bits in fields.items() if bits}, grid.bias, low, grid.high, grid.smallest,
        grid.smallest_normal, grid.epsilon, count, (grid.mantissa + 1) * log10(2), values, _SPECIAL[grid.special],
    )  # fmt: skip


def _vector_facts(grid: VectorGrid) -> FormatFacts:
    table = np.unique(np.abs(grid.magnitudes()))
    values = tuple(sorted({float(value) for value in table} | {-float(value) for value in table}))
    words = f"{1 << grid.bits:,} vectors of {grid.dim} values; the list shows what one coordinate can be"
    return FormatFacts(
        grid.name,
        "vectors",
        grid.bits / grid.dim,
        {},
        None,
        values[0],
        values[-1],
        float(table[table > 0][0]),
        None,
        None,
        1 << grid.bits,
        None,
        values,
        words,
    )


def spacing(name: str, at: float) -> float:
    """Distance between the two neighbouring values of a format around `at`; 0 outside its range."""
    grid = grid_of(name)
    if isinstance(grid, IntGrid):
        return 1.0 if grid.low <= at <= grid.high else 0.0
    if isinstance(grid, FloatGrid) and grid.mantissa:
        if abs(at) > grid.high:
            return 0.0
        exponent = floor(log2(abs(at))) if abs(at) >= grid.smallest_normal else round(log2(grid.smallest_normal))
        return 2.0 ** (exponent - grid.mantissa)
    values = np.array(format_facts(name).values)
    above = int(np.searchsorted(values, at, side="right"))
    return float(values[above] - values[above - 1]) if 0 < above < len(values) else 0.0


@dataclass(frozen=True)
class NumberIn:
    """One number in one format.

    Attributes:
        value: the nearest value of the format.
        pattern: bits of its code by field, e.g. "0 10000 1001001000".
        words: how the pattern makes the value.
        error: value - number; relative: its share of the number.
        spacing: distance between neighbours there.
        note: saturation, underflow, NaN.
    """

    format: str
    bits: float
    value: float
    pattern: str
    words: str
    error: float
    relative: float
    spacing: float
    note: str


def number_in(number: float, name: str) -> NumberIn:
    """What becomes of a number in a format.

    Raises:
        InputError: FB-E0605 for an unknown format or a vector codebook, FB-E0607 for a number that is not finite.
    """
    if not isfinite(number):
        raise InputError("FB-E0607", f"{number} is not a finite number")
    grid = grid_of(name)
    if isinstance(grid, VectorGrid):
        raise InputError(
            "FB-E0605", f"{grid.name} stores vectors of {grid.dim} values: a single number has no code in it"
        )
    if isinstance(grid, FloatGrid):
        code, value, note = _nearest_float(grid, number)
        pattern, words = _float_pattern(grid, code, value)
    else:
        code, value, note = _nearest_level(grid, number)
        width = int(np.ceil(float(Fraction(grid.bits))))
        pattern = format(code & ((1 << width) - 1), f"0{width}b")
        words = f"level {code}" if isinstance(grid, Codebook) else f"integer {code}"
    error = value - number
    return NumberIn(
        grid.name,
        float(Fraction(grid.bits)),
        value,
        pattern,
        words,
        error,
        error / number if number else 0.0,
        spacing(name, value) if isfinite(value) else 0.0,
        note,
    )


def _nearest_level(grid: IntGrid | Codebook, number: float) -> tuple[int, float, str]:
    levels = grid.levels()
    distance = np.abs(levels - number)
    index = int(np.argmin(distance))
    if (
        isinstance(grid, IntGrid)
        and index + 1 < len(levels)
        and distance[index] == distance[index + 1]
        and int(levels[index]) % 2
    ):
        index += 1  # ties to even
    note = "out of range: needs a scale" if not grid.low <= number <= grid.high else ""
    return index + grid.first_code, float(levels[index]), note


def _nearest_float(grid: FloatGrid, number: float) -> tuple[int, float, str]:
    """(bit pattern, value, note), ties to the even pattern; beyond the range, infinity where the format has one, else its end."""
    if grid.bits > 16:
        with np.errstate(over="ignore"):
            single = np.float32(number)
        code = int(single.view(np.uint32))
        note = "overflows to infinity" if np.isinf(single) else "too small: becomes 0" if number and single == 0 else ""
        return code, float(single), note
    levels = grid.levels()
    if not grid.signed and number < 0:
        return int(np.nanargmin(levels)), float(np.nanmin(levels)), "no negative values: held at the least"
    half = grid.high * 2.0 ** -(grid.mantissa + 2)
    if abs(number) >= grid.high + half and grid.special == "ieee":
        code = ((1 << grid.exponent) - 1) << grid.mantissa | (int(number < 0) << (grid.bits - 1))
        return code, float(np.copysign(np.inf, number)), "overflows to infinity"
    distance = np.where(np.isfinite(levels), np.abs(levels - number), np.inf)
    sign = 1 << (grid.bits - 1) if grid.signed else 0
    near = [
        code
        for code in np.flatnonzero(distance == distance.min()).tolist()
        if not sign or bool(code & sign) == bool(np.signbit(number))
    ]
    near = near or np.flatnonzero(distance == distance.min()).tolist()
    code = min(near, key=lambda candidate: candidate & 1)
    value = float(levels[code])
    note = (
        "out of range: held at its end"
        if abs(number) > grid.high
        else "too small: becomes 0"
        if number and value == 0
        else ""
    )
    return code, value, note


def _float_pattern(grid: FloatGrid, code: int, value: float) -> tuple[str, str]:
    """The bits by field, and the arithmetic that makes the value."""
    exponent = (code >> grid.mantissa) & ((1 << grid.exponent) - 1)
    mantissa = code & ((1 << grid.mantissa) - 1)
    fields = [str(code >> (grid.bits - 1) & 1)] if grid.signed else []
    fields.append(format(exponent, f"0{grid.exponent}b"))
    fields += [format(mantissa, f"0{grid.mantissa}b")] if grid.mantissa else []
    if not isfinite(value):
        return " ".join(fields), "infinity"
    sign = "-" if grid.signed and code >> (grid.bits - 1) & 1 else ""
    if not grid.mantissa:
        return " ".join(fields), f"2^{exponent - grid.bias}"
    fraction = mantissa / (1 << grid.mantissa)
    if exponent == 0:
        return " ".join(fields), f"{sign}2^{1 - grid.bias} x {fraction:.8g}, subnormal" if fraction else f"{sign}0"
    return " ".join(fields), f"{sign}2^{exponent - grid.bias} x {1 + fraction:.8g}"


def neighbours(name: str, at: float, count: int = 9) -> list[float]:
    """Some values of a format on either side of a number, in order."""
    grid = grid_of(name)
    if isinstance(grid, FloatGrid) and grid.bits > 16:
        step = spacing(name, at) or grid.smallest
        middle = number_in(at, name).value
        return [middle + step * offset for offset in range(-count, count + 1)]
    levels = grid.levels()
    values = np.unique(levels[np.isfinite(levels)])
    place = int(np.searchsorted(values, at))
    return [float(value) for value in values[max(0, place - count) : place + count]]
