"""The number lab: quantising a handful of numbers with every step shown, as a person would do it by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.math.search import Method
from fewbit.num.blocks import Blocks
from fewbit.num.grid import F16, F32, IntGrid
from fewbit.num.qtensor import QTensor, decode_codes, expand, values_of
from fewbit.num.scheme import Scheme, leaf

MOST = 4096


@dataclass(frozen=True)
class WeightStep:
    """One weight: value, value in units of levels (with the zero point added), code, level, what comes back, error."""

    index: int
    value: float
    units: float
    code: int
    level: float
    recovered: float
    error: float


@dataclass(frozen=True)
class BlockStep:
    """One block: its extremes, how its scale and shifts came about, its weights."""

    index: int
    low: float
    high: float
    scale: float
    zero: float | None
    minimum: float | None
    how: tuple[str, ...]
    weights: tuple[WeightStep, ...]


@dataclass(frozen=True)
class Quantized:
    """A vector quantised.

    Attributes:
        scheme: as it was applied here; `asked` as the user spelt it.
        exact: whether 16-bit scales were kept in float32, as a person with a pencil would.
        nested: words on how scales are themselves stored.
        bits: bits a weight of this vector.
    """

    asked: str
    scheme: str
    exact: bool
    search: str
    blocks: tuple[BlockStep, ...]
    max_error: float
    mean_error: float
    rms_error: float
    bits: float
    nested: tuple[str, ...]


def parse_numbers(text: str) -> list[float]:
    """Numbers separated by commas or spaces.

    Raises:
        InputError: FB-E0607 for words that are no finite numbers, or too many of them.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        found = [float(word) for word in words]
    except ValueError as error:
        raise InputError("FB-E0607", f"{error}".replace("could not convert string to float", "not a number")) from None
    if not found or len(found) > MOST or not all(map(isfinite, found)):
        raise InputError("FB-E0607", f"give 1 to {MOST:,} finite numbers, got {len(found)}")
    return found


def by_hand(scheme: Scheme) -> Scheme:
    """The scheme with directly stored 16-bit scales and minima in float32: rounding them is a detail of files."""
    changes: dict[str, Any] = {name: leaf(F32) for name, part in scheme.parts() if part.is_leaf and part.grid == F16}
    return replace(scheme, **changes)


def quantize_numbers(
    numbers: Sequence[float], scheme: Scheme, asked: str = "", *, exact: bool = True, search: Method = "absmax"
) -> Quantized:
    """Every step of quantising a vector.

    Args:
        numbers: the weights, one row.
        scheme: any scheme.
        exact: keep 16-bit scales in float32.
        search: absmax (by hand), mse or lsq (searched, as the quantiser does by default).
    """
    used = by_hand(scheme.weights_only) if exact else scheme.weights_only
    w = torch.tensor([list(numbers)], dtype=torch.float64).float()
    q = quantize(used, w, None, Search(method=search))
    blocks = tuple(_blocks(q, w, search)) if not used.is_leaf and used.grid.dim == 1 else (_plain_block(q, w),)
    error = (q.dequantize() - w).abs().double()
    return Quantized(
        asked or str(scheme), str(used), exact and used != scheme.weights_only, search, blocks, float(error.max()), float(error.mean()),
        sqrt(float((error**2).mean())), used.bits_per_weight((1, len(numbers))), tuple(_nested_words(q)),
    )  # fmt: skip


def _per_weight(q: QTensor, name: str) -> torch.Tensor | None:
    part, stored = getattr(q.scheme, name), getattr(q, name)
    if part is None:
        return None
    counts = q.scheme.block_counts(q.shape)
    values = values_of(stored)
    if part.is_leaf:
        values = expand(values, part, counts)
    return expand(values.reshape(counts), q.scheme, q.shape).reshape(q.shape)[0]


def _blocks(q: QTensor, w: torch.Tensor, search: str) -> list[BlockStep]:
    """One step per block of a row; the numbers are those stored, the words are checked against them."""
    scale, zero, shift = (_per_weight(q, name) for name in ("scale", "code_shift", "value_shift"))
    levels, back, codes = decode_codes(q.scheme.grid, q.codes)[0], q.dequantize()[0], q.codes[0]
    size = q.scheme.blocks.resolve(q.shape).block_cols
    found = []
    for index, start in enumerate(range(0, w.shape[-1], size)):
        part = slice(start, min(start + size, w.shape[-1]))
        x = w[0, part]
        s = float(scale[start]) if scale is not None else 1.0
        z = float(zero[start]) if zero is not None else None
        v = float(shift[start]) if shift is not None else None
        units = ((x.double() - (v or 0.0)) / s if s else torch.zeros_like(x).double()) + (z or 0.0)
        steps = tuple(
            WeightStep(
                i,
                float(w[0, i]),
                float(units[i - start]),
                int(codes[i]),
                float(levels[i]),
                float(back[i]),
                float(back[i] - w[0, i]),
            )
            for i in range(part.start, part.stop)
        )
        found.append(
            BlockStep(index, float(x.min()), float(x.max()), s, z, v, tuple(_how(q.scheme, x, s, z, v, search)), steps)
        )
    return found


def _plain_block(q: QTensor, w: torch.Tensor) -> BlockStep:
    """Schemes without scales (plain dtypes) or with vector codes: what came back, no arithmetic per weight."""
    back = q.dequantize()[0]
    codes = q.codes.flatten().tolist()
    dim = q.scheme.grid.dim
    steps = tuple(
        WeightStep(
            i,
            float(w[0, i]),
            float(w[0, i]),
            int(codes[i // dim]),
            float(back[i]),
            float(back[i]),
            float(back[i] - w[0, i]),
        )
        for i in range(w.shape[-1])
    )
    words = (
        "each value is stored as it is, rounded to the format"
        if q.scheme.is_leaf
        else f"one code stands for {dim} weights at once"
    )
    return BlockStep(0, float(w.min()), float(w.max()), 1.0, None, None, (words,), steps)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 2e-6 * max(abs(a), abs(b), 1e-30)


def _how(scheme: Scheme, x: torch.Tensor, s: float, z: float | None, v: float | None, search: str) -> list[str]:
    """The formulas a person would write, each only where it gives the number that is stored."""
    grid, low, high = scheme.grid, float(x.min()), float(x.max())
    peak = max(abs(low), abs(high))
    words = []
    if z is None and v is None:
        top = float(grid.high)
        if _close(s, peak / top):
            words.append(f"scale = largest magnitude / largest level = {peak:g} / {top:g} = {s:.6g}")
        else:
            words.append(f"scale = {s:.6g}" + _why_other(scheme, peak / top, search))
        return words
    reach = float(grid.high) - float(grid.low)
    lowest, highest = (min(low, 0.0), max(high, 0.0)) if z is not None else (low, high)
    if _close(s, (highest - lowest) / reach):
        words.append(
            f"scale = (largest - smallest) / (largest level - smallest level) = ({highest:g} - {lowest:g}) / {reach:g} = {s:.6g}"
        )
    else:
        words.append(f"scale = {s:.6g}" + _why_other(scheme, (highest - lowest) / reach, search))
    if z is not None:
        exact = -lowest / s if s else 0.0
        rounded = (
            isinstance(grid, IntGrid) and scheme.code_shift is not None and isinstance(scheme.code_shift.grid, IntGrid)
        )
        words.append(
            f"zero point = round(-smallest / scale) = round({exact:.4g}) = {z:g}"
            if rounded and z == round(exact)
            else f"zero point = {z:g}"
        )
    if v is not None:
        words.append(
            f"minimum = smallest weight = {v:.6g}" if _close(v, low) else f"minimum = {v:.6g}, as it is stored"
        )
    return words


def _why_other(scheme: Scheme, simple: float, search: str) -> str:
    if search != "absmax":
        return f" (searched: it makes the squared error least; by hand it would be {simple:.6g})"
    if scheme.scale is not None and not scheme.scale.is_leaf:
        return f" (by hand {simple:.6g}, but the scale is itself stored in few bits)"
    return (
        f" (by hand {simple:.6g}, rounded to what {scheme.scale.grid.name if scheme.scale else 'the format'} can hold)"
    )


def _nested_words(q: QTensor, name: str = "scale") -> list[str]:
    """How scales and shifts that are quantised themselves are put together."""
    found = []
    for part_name, part in q.scheme.parts():
        stored = getattr(q, part_name)
        if isinstance(stored, QTensor):
            label = {"scale": "scale", "code_shift": "zero point", "value_shift": "minimum"}[part_name]
            inner = values_of(stored.scale).flatten().tolist() if stored.scale is not None else [1.0]
            codes = stored.codes.flatten().tolist()[:8]
            values = stored.dequantize().flatten().tolist()[:8]
            shown = ", ".join(f"{code} -> {value:.6g}" for code, value in zip(codes, values, strict=True))
            found.append(
                f"{label}: {part.grid.name} codes under {', '.join(f'{value:.6g}' for value in inner[:4])}: {shown}"
            )
    return found


@dataclass(frozen=True)
class Granularity:
    """One row of the comparison: blocks, scales, errors, bits."""

    blocks: str
    scales: tuple[float, ...]
    max_error: float
    mean_error: float
    rms_error: float
    bits: float


def compare_blocks(
    numbers: Sequence[float], scheme: Scheme, sizes: Sequence[int] | None = None
) -> tuple[Granularity, ...]:
    """The same numbers with one scale for all, and with ever smaller groups, side by side."""
    if scheme.is_leaf or scheme.grid.dim > 1 or any(not part.is_leaf for _, part in scheme.parts()):
        return ()
    count = len(numbers)
    wanted = sizes or sorted({size for size in (count, count // 2, count // 4) if size >= 2}, reverse=True)
    rows = []
    for size in wanted:
        found = quantize_numbers(numbers, replace(scheme, blocks=Blocks(1, 0 if size >= count else size)))
        scales = tuple(block.scale for block in found.blocks)
        label = "one for all" if size >= count else f"groups of {size}"
        rows.append(Granularity(label, scales, found.max_error, found.mean_error, found.rms_error, found.bits))
    return tuple(rows)


def record(found: Quantized) -> dict[str, Any]:
    """Plain data with the lists that people look for first: scale, zero point, codes."""
    weights = [step for block in found.blocks for step in block.weights]
    return {
        "scales": [block.scale for block in found.blocks], "zero_points": [block.zero for block in found.blocks], "codes": [step.code for step in weights],
        "recovered": [step.recovered for step in weights], "errors": [step.error for step in weights],
    }  # fmt: skip
