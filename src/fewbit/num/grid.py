"""Grids: the sets of values that a code can stand for.

A grid is a frozen value and knows nothing of tensors, blocks or files. `level(code)` is its table; for integers the table is
the identity, for floats a code is the bit pattern, for codebooks an index. Vector grids give `dim` values for one code.

    IntGrid(4, signed=True)      codes -8..7                       level = code
    FloatGrid("e4m3", 4, 3, …)   codes 0..255 (bit patterns)       level by IEEE-like decoding
    Codebook("nf4", levels)      codes 0..15                       level = levels[code]
    VectorGrid("iq2_xxs", …)     codes = magnitude index | signs   level = signs * magnitudes[index], 8 values a code

Sources: OCP 8-bit floating point (E4M3, E5M2) and OCP microscaling v1.0 (E2M1, E8M0); QLoRA, arXiv 2305.14314 (NF4);
bitsandbytes (its FP4 and its 8-bit dynamic map); ggml (IQ4_NL).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from fewbit.base.errors import InputError


@dataclass(frozen=True)
class IntGrid:
    """Integers of `bits` bits, -2^(bits-1) … 2^(bits-1)-1 signed or 0 … 2^bits-1 unsigned."""

    bits: int
    signed: bool = True
    dim: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.dim != 1:
            raise InputError("FB-E0601", f"integer grids have 1 to 8 bits, got {self.bits}")

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def first_code(self) -> int:
        return self.low

    def levels(self) -> np.ndarray:
        """float64 [2^bits]: the level of each code, from the lowest code up."""
        return np.arange(self.low, self.high + 1, dtype=np.float64)


@dataclass(frozen=True)
class FloatGrid:
    """Floating-point numbers of one sign bit (if `signed`), `exponent` and `mantissa` bits; a code is the bit pattern.

    Attributes:
        special: which bit patterns are not numbers: "ieee" (top exponent is infinity and NaN), "fn" (only all ones is NaN),
            "none" (every pattern is a number).
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    special: Literal["ieee", "fn", "none"] = "ieee"
    signed: bool = True
    dim: int = 1

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent + self.mantissa

    @property
    def high(self) -> float:
        """The largest finite level."""
        if self.bits <= 16:
            return _highest(self)
        return float(np.ldexp(2.0 - 2.0**-self.mantissa, (1 << self.exponent) - 2 - self.bias))

    @property
    def low(self) -> float:
        """The lowest finite level: -high if signed, else the smallest level."""
        return -self.high if self.signed else float(np.nanmin(self.levels()))

    @property
    def smallest_normal(self) -> float:
        return float(np.ldexp(1.0, 1 - self.bias)) if self.mantissa else float(np.ldexp(1.0, -self.bias))

    @property
    def smallest(self) -> float:
        """The smallest positive level, subnormals included."""
        return float(np.ldexp(1.0, 1 - self.bias - self.mantissa)) if self.mantissa else self.smallest_normal

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next level."""
        return float(2.0**-self.mantissa)

    @property
    def first_code(self) -> int:
        return 0

    def levels(self) -> np.ndarray:
        """float64 [2^bits]: the level of each bit pattern, NaN and infinities where the format has them (16 bits at most)."""
        return _float_levels(self)


@dataclass(frozen=True)
class Codebook:
    """A table of `2^bits` (or fewer) scalar levels; a code is an index into it."""

    name: str
    table: tuple[float, ...]
    width: Fraction | None = None
    dim: int = 1

    @property
    def bits(self) -> Fraction | int:
        """Stored bits per code; `width` where a format packs closer or wider than whole bits."""
        return self.width if self.width is not None else max(1, (len(self.table) - 1).bit_length())

    @property
    def high(self) -> float:
        return max(self.table)

    @property
    def low(self) -> float:
        return min(self.table)

    @property
    def first_code(self) -> int:
        return 0

    def levels(self) -> np.ndarray:
        """float64 [n]: the level of each code."""
        return np.array(self.table, dtype=np.float64)


@dataclass(frozen=True)
class VectorGrid:
    """A codebook of vectors built as a product: `parts` magnitude vectors side by side, then signs.

    A code is, from the low bits up: `parts` indices of `index_bits` each into the magnitude table [2^index_bits, dim/parts],
    then `sign_bits` sign bits. With sign_bits == dim each value has its own sign (bit set = negative); with dim - 1 the last sign makes
    the number of negative values even; with 0 the magnitude table carries its own signs.

    Attributes:
        table: name of the magnitude table in `tables.npz` of this package (float64 [2^index_bits, dim // parts]).
    """

    name: str
    dim: int
    index_bits: int
    sign_bits: int
    parts: int = 1
    table: str = ""

    @property
    def bits(self) -> int:
        """Stored bits per code, that is per `dim` values."""
        return self.parts * self.index_bits + self.sign_bits

    @property
    def high(self) -> float:
        return float(np.abs(self.magnitudes()).max())

    @property
    def low(self) -> float:
        return -self.high

    @property
    def first_code(self) -> int:
        return 0

    def magnitudes(self) -> np.ndarray:
        """float64 [2^index_bits, dim / parts]."""
        return vector_table(self.table or self.name)

    def levels(self) -> np.ndarray:
        """float64 [2^bits, dim]; for grids of 18 bits at most."""
        if self.bits > 18:
            raise InputError("FB-E0601", f"{self.name} has 2^{self.bits} vectors, too many to list")
        codes = np.arange(1 << self.bits)
        return decode_vectors(self, codes)


Grid = IntGrid | FloatGrid | Codebook | VectorGrid


def decode_vectors(grid: VectorGrid, codes: np.ndarray) -> np.ndarray:
    """Levels of vector codes, the slow obvious way: int [...] -> float64 [..., dim]."""
    mask = (1 << grid.index_bits) - 1
    magnitudes = grid.magnitudes()
    parts = [magnitudes[(codes >> (part * grid.index_bits)) & mask] for part in range(grid.parts)]
    values = np.concatenate(parts, axis=-1)
    if not grid.sign_bits:
        return values
    signs = (codes >> (grid.parts * grid.index_bits))[..., None] >> np.arange(grid.sign_bits) & 1
    if grid.sign_bits == grid.dim - 1:
        signs = np.concatenate([signs, signs.sum(-1, keepdims=True) & 1], axis=-1)
    return np.where(signs == 1, -values, values)


@functools.lru_cache(maxsize=64)
def _highest(grid: FloatGrid) -> float:
    levels = _float_levels(grid)
    return float(np.nanmax(np.where(np.isfinite(levels), levels, np.nan)))


@functools.cache
def _float_levels(grid: FloatGrid) -> np.ndarray:
    if grid.bits > 16:
        raise InputError("FB-E0601", f"{grid.name} has too many levels to list")
    codes = np.arange(1 << grid.bits)
    fraction = codes & ((1 << grid.mantissa) - 1)
    exponent = (codes >> grid.mantissa) & ((1 << grid.exponent) - 1)
    if grid.mantissa == 0:  # E8M0: a bare exponent, no zero and no subnormals
        values = np.ldexp(1.0, exponent - grid.bias)
    else:
        normal = np.ldexp(1.0 + fraction / (1 << grid.mantissa), exponent - grid.bias)
        values = np.where(exponent == 0, np.ldexp(fraction / (1 << grid.mantissa), 1 - grid.bias), normal)
    top = exponent == (1 << grid.exponent) - 1
    if grid.special == "ieee":
        values = np.where(top, np.where(fraction == 0, np.inf, np.nan), values)
    elif grid.special == "fn":
        values = np.where(top & (fraction == (1 << grid.mantissa) - 1), np.nan, values)
    if grid.signed:
        values = np.where(codes >> (grid.bits - 1) == 1, -values, values)
    values.setflags(write=False)
    return values


@functools.cache
def vector_table(name: str) -> np.ndarray:
    """A magnitude table of a vector grid by name, float64 [entries, width]; see `tables.py` for where each comes from."""
    from fewbit.num.tables import magnitude_table

    return magnitude_table(name)


F32 = FloatGrid("f32", 8, 23, 127)
F16 = FloatGrid("f16", 5, 10, 15)
BF16 = FloatGrid("bf16", 8, 7, 127)
E4M3 = FloatGrid("fp8-e4m3", 4, 3, 7, "fn")
E5M2 = FloatGrid("fp8-e5m2", 5, 2, 15)
E2M1 = FloatGrid("fp4", 2, 1, 1, "none")
E3M2 = FloatGrid("fp6-e3m2", 3, 2, 3, "none")
E2M3 = FloatGrid("fp6-e2m3", 2, 3, 1, "none")
E8M0 = FloatGrid("e8m0", 8, 0, 127, "fn", signed=False)
UE4M3 = FloatGrid("ue4m3", 4, 3, 7, "fn", signed=False)

# Quantiles of a standard normal with an exact zero, arXiv 2305.14314 appendix E; the float32 values that bitsandbytes ships.
NF4 = Codebook(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip
# bitsandbytes' FP4: sign, two exponent bits, one mantissa bit, scaled so that the largest is 1.
BNB_FP4 = Codebook(
    "bnbfp4",
    tuple(
        sign * value / 12.0
        for sign in (1.0, -1.0)
        for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
)  # fmt: skip
IQ4 = Codebook(
    "iq4", (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
)
TERNARY = Codebook("ternary", (-1.0, 0.0, 1.0))
TERNARY_DENSE = Codebook("ternary-dense", (-1.0, 0.0, 1.0), Fraction(13, 8))  # TQ1_0: 256 trits in 52 bytes
TERNARY_WIDE = Codebook(
    "ternary-wide", (-1.0, 0.0, 1.0, 2.0)
)  # what ggml reads from TQ2_0 when a foreign file holds the fourth pattern
ODD3 = Codebook("odd3", tuple(2.0 * code + 1 for code in range(8)))  # block scales of ggml's i-quants
ODD4 = Codebook("odd4", tuple(2.0 * code + 1 for code in range(16)))
IQ1_SHIFT = Codebook("iq1shift", (-0.125, 0.125))  # IQ1_S: one bit per block moves its levels up or down


def bnb_dynamic_levels() -> tuple[float, ...]:
    """The signed 8-bit dynamic map of bitsandbytes (arXiv 1511.04561, 2110.02861): 7 exponent decades, linear fractions."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        # float32 edges from both ends inwards with one rounding each, as the linspace that made the original
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(count))
        index = np.arange(count + 1)
        rising, falling = float(np.float32(0.1)) + step * index, 1.0 - step * (count - index)
        edges = np.where(index < (count + 1) // 2, rising, falling).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        for value in np.float32(10.0 ** (exponent - 6)) * means:
            values += [float(value), -float(value)]
    return tuple(sorted(values))


BNB_DYNAMIC8 = Codebook("dynamic8", bnb_dynamic_levels())

NAMED_GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        F32, F16, BF16, E4M3, E5M2, E2M1, E3M2, E2M3, E8M0, UE4M3,
        NF4, BNB_FP4, BNB_DYNAMIC8, IQ4, TERNARY, TERNARY_DENSE, TERNARY_WIDE, ODD3, ODD4, IQ1_SHIFT,
    )
}  # fmt: skip
NAMED_GRIDS |= {grid.name: grid for bits in range(1, 9) for grid in (IntGrid(bits, True), IntGrid(bits, False))}
GRID_ALIASES = {
    "e4m3": "fp8-e4m3",
    "e5m2": "fp8-e5m2",
    "fp8": "fp8-e4m3",
    "fp4-e2m1": "fp4",
    "e2m1": "fp4",
    "fp16": "f16",
    "fp32": "f32",
}


def grid_named(name: str) -> Grid | None:
    """A grid by its name or alias, or None."""
    return NAMED_GRIDS.get(GRID_ALIASES.get(name, name))
