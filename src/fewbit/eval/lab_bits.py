"""The number lab: where the bits of a scheme go, entry by entry. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod

from fewbit.num.scheme import Scheme


@dataclass(frozen=True)
class BitsLine:
    """One stored array of a scheme.

    Attributes:
        path: codes, scale, scale of scale, …
        grid: what its entries are.
        entries: how many; per: weights that share one.
        bits: of all entries; per_weight: their share.
    """

    path: str
    grid: str
    entries: int
    per: Fraction
    bits_each: Fraction
    bits: int
    per_weight: float


def bits_lines(scheme: Scheme, shape: tuple[int, ...]) -> tuple[BitsLine, ...]:
    """Every stored array of a tensor of this shape; their bits add up to `scheme.storage_bits(shape)`."""
    return tuple(_lines(scheme, shape, "codes", prod(shape)))


def _lines(scheme: Scheme, shape: tuple[int, ...], path: str, weights: int) -> list[BitsLine]:
    stored = scheme.block_counts(shape) if scheme.is_leaf else shape
    entries = -(-prod(stored) // scheme.grid.dim)
    bits_each = Fraction(scheme.grid.bits)
    own = scheme.storage_bits(shape) - sum(part.storage_bits(scheme.block_counts(shape)) for _, part in scheme.parts())
    found = [
        BitsLine(
            path, scheme.grid.name, entries, Fraction(weights, max(1, entries)), bits_each, own, own / max(1, weights)
        )
    ]
    words = {"scale": "scale", "code_shift": "zero point", "value_shift": "minimum"}
    for name, part in scheme.parts():
        inner = words[name] if path == "codes" else f"{words[name]} of {path}"
        found += _lines(part, scheme.block_counts(shape), inner, weights)
    return found


def bits_sentence(scheme: Scheme, shape: tuple[int, ...]) -> str:
    """The sum as people write it: 4 + 16/128 = 4.125 bits a weight."""
    terms = []
    for line in bits_lines(scheme, shape):
        each = f"{float(line.bits_each):g}"
        if line.per < 1000:
            terms.append(each if line.per == 1 else f"{each}/{float(line.per):g}")
    return f"{' + '.join(terms)} = {scheme.bits_per_weight(shape):.6g} bits a weight"
