"""Schemes: which values a tensor can store, with every bit accounted for.

    w  =  (level[code] - code_shift) * scale + value_shift

A `Scheme` names the grid of the codes, the blocks that share a scale, and how scale and shifts are themselves stored: each is
again a `Scheme`, over the array that has one entry per block. That recursion is all there is to double quantisation and to
the super-blocks of the k-quants. A scheme with neither scale nor shift is a leaf: it stores its levels directly (f16, e8m0,
uint4 …), one per block of the array, by default one per entry.

Spelling, printed by `str(scheme)` and parsed by `parse_scheme`:

    GRID [-BLOCKS] [-SCALE] [-asym | -asym{SHIFT}] [-min | -min{SHIFT}] [-dq] [+ACTIVATION [-static]]

    int4-g128            signed 4-bit, groups of 128, f16 scales
    int4-g128-asym       unsigned 4-bit codes with an integer zero point of the same grid
    uint4-g32-min        unsigned codes and a float minimum per group (value_shift), as Q4_1 or MLX
    uint4-g64-asym{f16}  float zero point (HQQ)
    nf4-g64-dq           scales quantised to 8 bits in blocks of 256 with a tensor-wide offset (QLoRA)
    fp8-e4m3-block128    tiles of 128 x 128, f32 scales
    uint4-g32-{uint6-g8-f16}-min{uint6-g8-f16}        written out: Q4_K
    int8-channel+int8-token                           weights and dynamic activations: `w8a8`
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources
from math import ceil, gcd, prod

from fewbit.base.errors import InputError
from fewbit.num.blocks import EACH, TENSOR, Blocks, flat, parse_blocks
from fewbit.num.grid import BNB_DYNAMIC8, F16, F32, FloatGrid, Grid, IntGrid, VectorGrid, grid_named
from fewbit.num.vectors import VECTOR_GRIDS


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a tensor are stored.

    Attributes:
        grid: the values that a code stands for.
        blocks: which weights share one entry of `scale` and of the shifts.
        scale: scheme of the scale array, or None for a leaf whose levels are the values.
        code_shift: scheme of the zero points, in units of codes, or None.
        value_shift: scheme of the offsets, in units of weights, or None.
        activation: scheme of the input activations, or None when they stay in floating point.
        static: whether activation scales are fixed beforehand instead of found per token at run time.
    """

    grid: Grid
    blocks: Blocks = EACH
    scale: Scheme | None = None
    code_shift: Scheme | None = None
    value_shift: Scheme | None = None
    activation: Scheme | None = None
    static: bool = False

    @property
    def is_leaf(self) -> bool:
        """Whether the codes are the values, with no scale and no shift."""
        return self.scale is None and self.code_shift is None and self.value_shift is None

    @property
    def symmetric(self) -> bool:
        return self.code_shift is None and self.value_shift is None

    @property
    def group_size(self) -> int:
        """Columns that share one scale; 0 for whole rows."""
        return self.blocks.cols

    @property
    def span(self) -> int:
        """Columns that a solver must fit at once: the outermost super-block, or 0 for whole rows (or flat blocks)."""
        if self.is_leaf:
            return self.grid.dim if self.blocks == EACH else 0
        if self.blocks.cols == 0 or self.blocks.flat:
            return 0
        spans = [self.blocks.cols]
        for part in (self.scale, self.code_shift, self.value_shift):
            if part is not None and not part.is_leaf:
                inner = part.span
                if part.blocks.rows == 1 and inner == 0:
                    return 0
                spans.append(self.blocks.cols * max(inner, 1))
        return _lcm(spans)

    def parts(self) -> Iterator[tuple[str, Scheme]]:
        """The sub-schemes that are stored per block: (name, scheme)."""
        for name in ("scale", "code_shift", "value_shift"):
            part = getattr(self, name)
            if part is not None:
                yield name, part

    def part(self, name: str) -> Scheme:
        """The sub-scheme `scale`, `code_shift` or `value_shift` of a scheme that has it.

        Raises:
            InputError: FB-E0603 when it has not.
        """
        for found, part in self.parts():
            if found == name:
                return part
        raise InputError("FB-E0603", f"{self} has no {name}")

    def block_counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale array of a tensor of this shape."""
        return self.blocks.resolve(shape).grid

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Exact bits that a tensor of this shape takes, metadata included, before any padding of a file format."""
        if self.is_leaf:
            shape = self.block_counts(shape)
        codes = ceil(Fraction(prod(shape)) * Fraction(self.grid.bits) / self.grid.dim)
        return codes + sum(part.storage_bits(self.block_counts(shape)) for _, part in self.parts())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """`storage_bits` per weight of a tensor of this shape."""
        return self.storage_bits(shape) / max(1, prod(shape))

    @property
    def weights_only(self) -> Scheme:
        """The same scheme without its activation part."""
        return replace(self, activation=None, static=False)

    def with_scale_leaf(self, leaf: Grid) -> Scheme:
        """The same scheme with its directly stored scale (and float shifts) in another leaf grid, e.g. BF16 for F16."""

        def stored(part: Scheme | None) -> Scheme | None:
            direct = part is not None and part.is_leaf and isinstance(part.grid, FloatGrid)
            return replace(part, grid=leaf) if part is not None and direct else part

        return replace(
            self, scale=stored(self.scale), code_shift=stored(self.code_shift), value_shift=stored(self.value_shift)
        )

    def __str__(self) -> str:
        return spell(self)


def leaf(grid: Grid) -> Scheme:
    """A scheme that stores levels of `grid` directly."""
    return Scheme(grid)


def _lcm(values: list[int]) -> int:
    result = 1
    for value in values:
        result = result * value // gcd(result, value)
    return result


def default_scale(grid: Grid) -> Grid:
    """Scale dtype when a spelling names none: f32 for float and codebook grids (as the field does), f16 for the rest."""
    return F16 if isinstance(grid, (IntGrid, VectorGrid)) else F32


def double_quantised(blocks: int = 256) -> Scheme:
    """QLoRA's second quantisation: 8-bit dynamic codes in flat blocks with f32 scales, around one f32 mean."""
    return Scheme(BNB_DYNAMIC8, flat(blocks), scale=leaf(F32), value_shift=Scheme(F32, TENSOR))


@functools.lru_cache(maxsize=1024)
def parse_scheme(text: str) -> Scheme:
    """The scheme that a spelling or a preset names.

    Raises:
        InputError: FB-E0601 with the word that was not understood.
    """
    return _parse(text.strip().lower(), presets())


def _parse(text: str, named: dict[str, Scheme]) -> Scheme:
    """Parse with the presets known so far (presets may build on the rows above them)."""
    if text in named:
        return named[text]
    weights, plus, activation = text.partition("+")
    scheme = named.get(weights) or _parse_weights(weights, named)
    if not plus:
        return scheme
    static = activation.endswith("-static")
    return replace(scheme, activation=_parse(activation.removesuffix("-static"), named), static=static)


def _words(text: str) -> list[str]:
    """Split at dashes outside braces."""
    words, depth, word = [], 0, ""
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "-" and depth == 0:
            words.append(word)
            word = ""
        else:
            word += char
    return [*words, word]


def _take_grid(words: list[str], text: str) -> Grid:
    """Remove the one or two words that name the grid."""
    for count in (2, 1):
        name = "-".join(words[:count])
        found = grid_named(name) or VECTOR_GRIDS.get(name)
        if found is not None and len(words) >= count:
            del words[:count]
            return found
    raise InputError("FB-E0601", f"no grid is called {words[0]!r} (in {text!r})")


def _braced(word: str, prefix: str) -> str | None:
    return word[len(prefix) + 1 : -1] if word.startswith(prefix + "{") and word.endswith("}") else None


def _parse_weights(text: str, named: dict[str, Scheme]) -> Scheme:
    words = _words(text)
    grid = _take_grid(words, text)
    if not words:
        if isinstance(grid, FloatGrid) and (grid.bits > 8 or not grid.signed):
            return leaf(grid)
        words = ["leaf"] if isinstance(grid, IntGrid) and text.startswith("u") else ["channel"]
    blocks, scale, code_shift, value_shift = None, None, None, None
    for word in words:
        if word == "leaf":
            return Scheme(grid, parse_blocks(words[-1]) or EACH)
        elif (found := parse_blocks(word)) is not None and blocks is None:
            blocks = found
        elif word == "asym" and isinstance(grid, IntGrid):
            grid = IntGrid(grid.bits, signed=False)
            code_shift = leaf(grid)
        elif (inner := _braced(word, "asym")) is not None:
            grid = IntGrid(grid.bits, signed=False) if isinstance(grid, IntGrid) else grid
            code_shift = _parse(inner, named)
        elif word == "sym":
            code_shift = None
        elif word == "min":
            value_shift = leaf(F16)
        elif (inner := _braced(word, "min")) is not None:
            value_shift = _parse(inner, named)
        elif (inner := _braced(word, "")) is not None:
            scale = _parse(inner, named)
        elif word == "dq":
            scale = double_quantised()
        elif isinstance(stored := grid_named(word), FloatGrid):
            scale = leaf(stored)
        else:
            raise InputError("FB-E0601", f"{word!r} is not a word of a scheme (in {text!r})")
    return Scheme(grid, blocks or Blocks(1, 0), scale or leaf(default_scale(grid)), code_shift, value_shift)


def spell(scheme: Scheme) -> str:
    """The shortest spelling of a scheme; `parse_scheme(spell(s)) == s`."""
    return _preset_names().get(scheme) or long_spelling(scheme)


def long_spelling(scheme: Scheme) -> str:
    """The spelling of a scheme without the name of a preset for the whole of it."""
    if scheme.activation is not None:
        weights = spell(scheme.weights_only)
        inner = spell(scheme.activation).replace("-channel", "-token")
        return f"{weights}+{inner}{'-static' if scheme.static else ''}"
    if scheme.is_leaf:
        bare = isinstance(scheme.grid, FloatGrid) and (scheme.grid.bits > 8 or not scheme.grid.signed)
        if scheme.blocks != EACH:
            return f"{scheme.grid.name}-leaf-{scheme.blocks.spelling}"
        return scheme.grid.name if bare or scheme.grid.name.startswith("uint") else f"{scheme.grid.name}-leaf"
    grid, asym = scheme.grid, ""
    if scheme.code_shift is not None:
        asym = f"-asym{{{spell(scheme.code_shift)}}}"
        if isinstance(grid, IntGrid) and scheme.code_shift == leaf(grid):
            grid, asym = IntGrid(grid.bits, signed=True), "-asym"
    words = f"{grid.name}-{scheme.blocks.spelling}"
    if scheme.scale == double_quantised():
        words += "-dq"
    elif scheme.scale is not None and scheme.scale.is_leaf and isinstance(scheme.scale.grid, FloatGrid):
        words += "" if scheme.scale.grid == default_scale(grid) else f"-{scheme.scale.grid.name}"
    elif scheme.scale is not None:
        words += f"-{{{spell(scheme.scale)}}}"
    words += asym
    if scheme.value_shift is not None:
        words += "-min" if scheme.value_shift == leaf(F16) else f"-min{{{spell(scheme.value_shift)}}}"
    return words


@functools.cache
def presets() -> dict[str, Scheme]:
    """All named schemes of `presets.toml`: name -> scheme."""
    table = tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text(encoding="utf-8"))
    found: dict[str, Scheme] = {}
    for name, spelling in table["schemes"].items():
        found[name] = _parse(spelling, found)
    return found


@functools.cache
def _preset_names() -> dict[Scheme, str]:
    """Scheme -> preset name, for presets that carry a name of their own (aliases of a plain spelling are left out)."""
    table = tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text(encoding="utf-8"))
    aliases = set(table.get("aliases", {}).get("names", ()))
    return {scheme: name for name, scheme in reversed(presets().items()) if name not in aliases}
