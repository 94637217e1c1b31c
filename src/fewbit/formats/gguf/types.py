"""The block types of GGUF as schemes: one row each, needing neither torch nor the gguf package.

A row of a tensor is cut into blocks of `block` weights that take `nbytes` bytes each, and a type is nothing but the scheme of such a
block in a fixed bit order (see `codecs.py`). The byte counts follow from the schemes; `nbytes` repeats them as ggml states them and
a test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fewbit.base.errors import InputError
from fewbit.num.scheme import Scheme, parse_scheme


@dataclass(frozen=True)
class BlockType:
    """One GGML tensor type.

    Attributes:
        name: ggml's name in capitals, e.g. `Q4_K`.
        number: its id in the file (enum ggml_type).
        block: weights per block.
        nbytes: bytes per block.
        spelling: its scheme.
    """

    name: str
    number: int
    block: int
    nbytes: int
    spelling: str

    @cached_property
    def scheme(self) -> Scheme:
        return parse_scheme(self.spelling)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.block

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row.

        Raises:
            InputError: FB-E0602 when the row is not a whole number of blocks.
        """
        reason = self.accepts((cols,))
        if reason:
            raise InputError("FB-E0602", reason)
        return cols // self.block * self.nbytes

    def accepts(self, shape: tuple[int, ...]) -> str | None:
        """None, or the sentence that says why a tensor of this shape cannot be stored so."""
        cols = shape[-1] if shape else 1
        if cols % self.block:
            return f"{self.name} needs rows of a multiple of {self.block} weights, got {cols}"
        return None


TYPES: dict[str, BlockType] = {
    row.name: row
    for row in (
        BlockType("F32", 0, 1, 4, "f32"),
        BlockType("F16", 1, 1, 2, "f16"),
        BlockType("BF16", 30, 1, 2, "bf16"),
        BlockType("Q4_0", 2, 32, 18, "q4_0"),
        BlockType("Q4_1", 3, 32, 20, "q4_1"),
        BlockType("Q5_0", 6, 32, 22, "q5_0"),
        BlockType("Q5_1", 7, 32, 24, "q5_1"),
        BlockType("Q8_0", 8, 32, 34, "q8_0"),
        BlockType("Q2_K", 10, 256, 84, "q2_k"),
        BlockType("Q3_K", 11, 256, 110, "q3_k"),
        BlockType("Q4_K", 12, 256, 144, "q4_k"),
        BlockType("Q5_K", 13, 256, 176, "q5_k"),
        BlockType("Q6_K", 14, 256, 210, "q6_k"),
        BlockType("IQ2_XXS", 16, 256, 66, "iq2_xxs"),
        BlockType("IQ2_XS", 17, 256, 74, "iq2_xs"),
        BlockType("IQ3_XXS", 18, 256, 98, "iq3_xxs"),
        BlockType("IQ1_S", 19, 256, 50, "iq1_s"),
        BlockType("IQ4_NL", 20, 32, 18, "iq4_nl"),
        BlockType("IQ3_S", 21, 256, 110, "iq3_s"),
        BlockType("IQ2_S", 22, 256, 82, "iq2_s"),
        BlockType("IQ4_XS", 23, 256, 136, "iq4_xs"),
        BlockType("IQ1_M", 29, 256, 56, "iq1_m"),
        BlockType("TQ1_0", 34, 256, 54, "tq1_0"),
        BlockType("TQ2_0", 35, 256, 66, "tq2_0"),
        BlockType("MXFP4", 39, 32, 17, "mxfp4"),
        BlockType("NVFP4", 40, 64, 36, "fp4-g16-fp8-e4m3"),
    )
}
_BY_NUMBER: dict[int, BlockType] = {row.number: row for row in TYPES.values()}
FLOATS: tuple[str, ...] = ("F32", "F16", "BF16")


def block_type(name: str | int) -> BlockType:
    """A type by ggml's name (any case) or by its number in a file.

    Raises:
        InputError: FB-E0330 when there is none.
    """
    found = _BY_NUMBER.get(name) if isinstance(name, int) else TYPES.get(name.upper())
    if found is None:
        raise InputError("FB-E0330", f"no GGUF tensor type {name!r} is known here; there are {', '.join(TYPES)}")
    return found


def type_of(scheme: Scheme) -> BlockType | None:
    """The type that stores a scheme, or None when GGUF has none for it."""
    return next((row for row in TYPES.values() if row.scheme == scheme.weights_only), None)
