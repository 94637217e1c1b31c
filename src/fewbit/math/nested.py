"""Scales of scales: fitting schemes whose scale or shift is itself quantised.

Outside in. (1) Ideal scales and shifts, as if they were stored in float32. (2) The array of scales is quantised by its own scheme,
each entry weighted by how much the weights' error depends on it. (3) With the outer scale now fixed, every block tries the codes beside
the one it got, for scale and shift in turn, and keeps what leaves the least error of the weights themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from fewbit.math import fast
from fewbit.math.rounding import pack_leaf, round_levels
from fewbit.math.search import Params, Search, Target, Triple, choose, error_of, units
from fewbit.math.tiles import Chunk, chunks
from fewbit.num.grid import F32, Codebook, FloatGrid, Grid, IntGrid
from fewbit.num.qtensor import QTensor, values_of
from fewbit.num.scheme import Scheme

_NAMES = ("scale", "code_shift", "value_shift")
Chooser = Callable[[Target, Chunk, Search], Triple]
Quantize = Callable[[Scheme, torch.Tensor, "torch.Tensor | None", Search], QTensor]


def fit_nested(
    scheme: Scheme,
    w: torch.Tensor,
    importance: torch.Tensor | None,
    search: Search,
    quantize: Quantize,
    chooser: Chooser = choose,
) -> Params:
    """`fit` for a scheme with at least one nested part; `quantize` is `math.scales.quantize`."""
    target = ideal_target(scheme)
    counts = scheme.block_counts(tuple(w.shape))
    arrays = {name: torch.zeros(counts, dtype=torch.float32, device=w.device) for name, _ in scheme.parts()}
    curvature = {name: torch.zeros_like(array) for name, array in arrays.items()}
    alive = torch.zeros(counts, dtype=torch.float32, device=w.device)
    for chunk in chunks(w, importance, scheme.blocks):
        triple = chooser(target, chunk, search)
        low, high = chunk.extremes()
        chunk.put(_flat(alive), ((low != 0) | (high != 0)).float())
        bends = _curvatures(target, chunk, triple) if search.searches else (torch.ones_like(low),) * 3
        for name, values, weight in zip(_NAMES, triple, bends, strict=True):
            if name in arrays and values is not None:
                chunk.put(_flat(arrays[name]), values)
                chunk.put(_flat(curvature[name]), weight)
    stored: dict[str, torch.Tensor | QTensor] = {}
    for name, part in scheme.parts():
        # an all-zero block must not drag the outer scale towards its canonical scale
        values = arrays[name] * alive if name == "scale" and not part.is_leaf else arrays[name]
        stored[name] = store_part(part, values, curvature[name], search, quantize)
    if search.searches:
        for _ in range(max(1, search.rounds)):
            stored = _refine(scheme, target, w, importance, stored)
    return Params(**stored)


def ideal_target(scheme: Scheme) -> Target:
    """What the parameters may be before they are rounded: nested parts count as float32, with the signs their codes allow."""
    grids = {name: part.grid if part.is_leaf else F32 for name, part in scheme.parts()}
    scale, shift = scheme.scale, scheme.value_shift
    negative = (
        scale is not None
        and isinstance(scale.grid, (IntGrid, FloatGrid) if scale.is_leaf else IntGrid)
        and scale.grid.low < 0
    )
    down = shift is not None and not shift.is_leaf and shift.grid.low >= 0
    return Target(scheme.grid, grids.get("scale"), grids.get("code_shift"), grids.get("value_shift"), negative, down)


def store_part(
    part: Scheme, values: torch.Tensor, weight: torch.Tensor, search: Search, quantize: Quantize
) -> torch.Tensor | QTensor:
    """An array of ideal scales or shifts as its scheme stores it; float and codebook scales keep their whole range."""
    if part.is_leaf:
        return pack_leaf(part.grid, values)
    if search.searches and not isinstance(part.grid, IntGrid):
        search = replace(search, method="absmax")
    return quantize(part, values, weight, search)


def _curvatures(target: Target, chunk: Chunk, triple: Triple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second derivatives of each block's error with respect to (scale, code_shift, value_shift), halved."""
    scale, z, _ = triple
    if chunk.view is not None and fast.serves(target.grid):
        squares, weights = fast.curvatures(chunk.view, target.grid, triple)
        return squares, weights * scale.square(), weights

    def level_square(x: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        out = round_levels(target.grid, units(x, triple))
        out = (out if z is None else out - z).square_()
        return out if h is None else out.mul_(h)

    weights = chunk.total(lambda x, h: torch.ones_like(x) if h is None else h.expand(x.shape))
    return chunk.total(level_square), weights * scale.square(), weights


def _refine(
    scheme: Scheme,
    target: Target,
    w: torch.Tensor,
    importance: torch.Tensor | None,
    stored: dict[str, torch.Tensor | QTensor],
) -> dict[str, torch.Tensor | QTensor]:
    """Every block tries the codes beside its own in all nested parts at once and keeps the best."""
    counts = scheme.block_counts(tuple(w.shape))
    inner = {name: q for name, q in stored.items() if isinstance(q, QTensor) and _can_step(q.scheme.grid)}
    nested = list(inner)
    steps = {name: {d: stepped(q, d) for d in (-1, 0, 1)} for name, q in inner.items()}
    values = {name: {d: _flat(values_of(q).reshape(counts)) for d, q in moves.items()} for name, moves in steps.items()}
    fixed = {name: _flat(values_of(q).reshape(counts)) for name, q in stored.items() if name not in steps}
    chosen = {name: torch.zeros(values[name][0].shape, device=w.device) for name in nested}
    moves = list(product((0, -1, 1), repeat=len(nested)))
    for chunk in chunks(w, importance, scheme.blocks):
        best: torch.Tensor | None = None
        choice: torch.Tensor | None = None
        for i, move in enumerate(moves):
            arrays = fixed | {name: values[name][d] for name, d in zip(nested, move, strict=True)}
            scale, z, v = (chunk.take(arrays[name]) if name in arrays else None for name in _NAMES)
            error = error_of(target, chunk, (torch.ones_like(error_like(chunk)) if scale is None else scale, z, v))
            if best is None or choice is None:
                best, choice = error, torch.zeros_like(error, dtype=torch.long)
            else:
                choice = torch.where(error < best, i, choice)
                best = torch.minimum(error, best)
        table = torch.tensor(moves, dtype=torch.float32, device=w.device)
        for k, name in enumerate(nested):
            chunk.put(chosen[name], table[choice, k])
    out = dict(stored)
    for name in nested:
        down, same, up = (steps[name][d].codes for d in (-1, 0, 1))
        step = chosen[name].reshape(same.shape)
        out[name] = replace(inner[name], codes=torch.where(step < 0, down, torch.where(step > 0, up, same)))
    return out


def error_like(chunk: Chunk) -> torch.Tensor:
    """An empty parameter array of a chunk, [n, 1, m, 1]."""
    return chunk.x[:, :1, :, :1]


def _can_step(grid: Grid) -> bool:
    return grid.dim == 1 and grid.bits <= 8


def stepped(q: QTensor, by: int) -> QTensor:
    """The same tensor with every code moved to the level `by` places further in order, stopping at the ends."""
    if by == 0:
        return q
    grid = q.scheme.grid
    if isinstance(grid, IntGrid):
        codes = (q.codes.to(torch.int16) + by).clamp(grid.low, grid.high).to(q.codes.dtype)
        return replace(q, codes=codes)
    order, place = _level_order(grid)
    moved = (place.to(q.codes.device)[q.codes.long()] + by).clamp(0, len(order) - 1)
    return replace(q, codes=order.to(q.codes.device)[moved])


@functools.lru_cache(maxsize=32)
def _level_order(grid: FloatGrid | Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes in order of their levels (each level once), and for every code its place in that order."""
    levels = grid.levels()
    codes = np.flatnonzero(np.isfinite(levels))
    order = codes[np.argsort(levels[codes], kind="stable")]
    order = order[np.concatenate([[True], np.diff(levels[order]) > 0])]
    place = np.searchsorted(levels[order], np.where(np.isfinite(levels), levels, 0.0))
    return torch.from_numpy(order.astype(np.uint8)), torch.from_numpy(place)


def _flat(array: torch.Tensor) -> torch.Tensor:
    """An array with one entry per block as [batch, block rows, block cols]."""
    return array.view(-1, *array.shape[-2:])
