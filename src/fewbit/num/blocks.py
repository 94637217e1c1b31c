"""Blocks: which weights share one scale.

One vocabulary for all granularities. A `Blocks` value is two numbers, where 0 means "all of them":

    tensor      (0, 0)    one block for the matrix
    channel     (1, 0)    one block per output row              (for activations: per token)
    column      (0, 1)    one block per input column
    each        (1, 1)    every weight on its own
    group n     (1, n)    n consecutive weights of a row
    block r x c (r, c)    a tile
    flat n                n consecutive weights of the flattened tensor, rows ignored (bitsandbytes)

`resolve(shape)` turns it, once, into a concrete tiling of the last two dimensions; leading dimensions (stacked experts) are
always separate. Super-blocks need no word of their own: they are the blocks of the scale array.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Tiling:
    """A granularity resolved for one shape.

    Attributes:
        batch: leading dimensions.
        rows, cols: the matrix that is tiled (a flat tiling sees one row).
        block_rows, block_cols: size of a block; blocks at the far edges may be smaller.
    """

    batch: tuple[int, ...]
    rows: int
    cols: int
    block_rows: int
    block_cols: int

    @property
    def view(self) -> tuple[int, ...]:
        """Shape in which the tensor is tiled."""
        return (*self.batch, self.rows, self.cols)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the array that holds one entry per block: (*batch, block rows, block columns)."""
        return (*self.batch, -(-self.rows // self.block_rows), -(-self.cols // self.block_cols))

    @property
    def blocked(self) -> tuple[int, ...]:
        """Shape in which an even tiling's blocks are dimensions of their own: (*batch, block rows, rows, block columns, columns)."""
        return (*self.grid[:-1], self.block_rows, self.grid[-1], self.block_cols)

    @property
    def even(self) -> bool:
        """Whether the blocks cut the matrix without remainder."""
        return self.rows % self.block_rows == 0 and self.cols % self.block_cols == 0


@dataclass(frozen=True)
class Blocks:
    """Granularity as a value; see the module's text for the vocabulary."""

    rows: int = 0
    cols: int = 0
    flat: bool = False

    def resolve(self, shape: tuple[int, ...]) -> Tiling:
        """Tiling of a tensor of this shape; a vector counts as one row, a scalar as one weight."""
        if self.flat:
            numel = prod(shape)
            return Tiling((), 1, numel, 1, min(self.cols or numel, numel) or 1)
        rows, cols = (1, 1, *shape)[-2:]
        return Tiling(
            tuple(shape[:-2]), rows, cols, min(self.rows or rows, rows) or 1, min(self.cols or cols, cols) or 1
        )

    @property
    def spelling(self) -> str:
        """The word used in scheme spellings, e.g. `g128`, `channel`, `block128`."""
        if self.flat:
            return f"flat{self.cols}"
        named = {(0, 0): "tensor", (1, 0): "channel", (0, 1): "column", (1, 1): "each"}.get((self.rows, self.cols))
        if named:
            return named
        if self.rows == 1:
            return f"g{self.cols}"
        return f"block{self.rows}" if self.rows == self.cols else f"block{self.rows}x{self.cols}"


TENSOR = Blocks(0, 0)
CHANNEL = Blocks(1, 0)
EACH = Blocks(1, 1)
COLUMN = Blocks(0, 1)


def group(size: int) -> Blocks:
    """Groups of `size` consecutive weights of a row."""
    return Blocks(1, size)


def flat(size: int) -> Blocks:
    """Blocks of `size` consecutive weights of the flattened tensor."""
    return Blocks(0, size, flat=True)


def parse_blocks(word: str) -> Blocks | None:
    """The granularity that a word of a scheme spelling names, or None when it names none."""
    fixed = {"tensor": TENSOR, "channel": CHANNEL, "token": CHANNEL, "column": COLUMN, "each": EACH}
    if word in fixed:
        return fixed[word]
    for prefix, make in (("block", None), ("flat", flat), ("g", group)):
        digits = word.removeprefix(prefix)
        if digits == word:
            continue
        if make is not None:
            return make(int(digits)) if digits.isdigit() and int(digits) > 0 else None
        rows, _, cols = digits.partition("x")
        if rows.isdigit() and (cols.isdigit() or not cols) and int(rows) > 0 and int(cols or rows) > 0:
            return Blocks(int(rows), int(cols or rows))
    return None
