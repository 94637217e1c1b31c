"""Fast fit and quantise for the scalar block types of ggml: how hard each searches, and the way to the kernels.

Same meaning as `math.scales.fit` and `quantize`, which serve as the plain reference; only CPU tensors whose rows are whole (super-)blocks
are taken, and only the least-squares search: everything else goes the plain way. What is minimised is the importance-weighted squared
error of the weights as decoded, sum h (w - w_hat)^2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.math.kernels.kquants_min import quantize_minimum
from fewbit.math.kernels.kquants_sym import quantize_symmetric
from fewbit.math.scales import DEFAULT_SEARCH, Params, Search, assemble, fit_plain, snap
from fewbit.math.tiles import require_finite, spread_importance
from fewbit.num.grid import Codebook, Grid, IntGrid
from fewbit.num.qtensor import QTensor, code_dtype, native_dtype
from fewbit.num.scheme import Scheme, parse_scheme

_F = np.float32
_PLUS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
_STAR = (*_PLUS, (1, 1), (-1, -1), (1, -1), (-1, 1))
PIECE = 1 << 21  # weights cast to float32 at once
FAINT = 1e-6  # importance of what has none, relative to the mean


@dataclass(frozen=True)
class Effort:
    """How hard one family searches; chosen by `bench/gguf_error_speed.py`.

    Attributes:
        ends: levels that the largest weight of a block is put on (blocks with a shift: levels in the range of a block).
        insets: blocks with a shift: where the lower end of the range may lie, in ranges above the minimum.
        polish: least-squares passes on the best of these.
        reach: symmetric: scale codes looked at on either side; with a shift: steps around the pair of codes.
        rounds: how often scale codes and super-scales are adjusted to each other.
        unbias: share of the least-squares shrinkage that is undone (`kquants_tiles.growth`); `fit` undoes none.
        power: exponent of the importance. Below 1 the error as it is weighted grows by a few thousandths and KL falls by three hundredths: mean
            squares of a few texts say too surely which inputs are large.
        unweighted: ends tried, without insets and with one polish, where nothing is weighted: less is gained there than time is lost.
    """

    ends: tuple[float, ...]
    insets: tuple[float, ...] = (0.0,)
    polish: int = 1
    reach: int | tuple[tuple[int, int], ...] = 1
    rounds: int = 1
    unbias: float = 1.0
    power: float = 1.0
    unweighted: tuple[float, ...] = ()


_IQ4 = Effort((-127, -122, -117, -132, -137, -110, 113, 108, 118, 123, 103, 98), polish=1, reach=1, rounds=1)
_TERNARY = Effort(tuple(1 / s for s in (0.25, 0.4, 0.6, 0.85)), polish=3, unbias=0.0)
EFFORTS: dict[str, Effort] = {
    "q4_0": Effort((-9, -8.6, -8.3, -8, -7.7, -7.4, -7.1, -6.7, 7.8, 7.5, 7.2, 6.9), polish=2, unweighted=(-8.3, 7.6)),
    "q5_0": Effort((-17, -16.5, -16, -15.5, -15, -14.5, 15.5, 15), polish=2, power=0.75, unweighted=(-16.2, 15.2)),
    "q8_0": Effort((127, 126.3, 125.6, 124.9, 124.2, 123.5), polish=0, unbias=0.0),
    "q4_1": Effort((13.5, 14, 14.5, 15, 15.5, 16, 17), (0.0, 0.03), polish=2, unweighted=(15,)),
    "q5_1": Effort((29.5, 30, 30.5, 31, 31.5, 32), (0.0, 0.015), polish=2, power=0.75, unweighted=(30.2, 31.2)),
    "q2_k": Effort((2.2, 2.5, 3, 3.5, 3.8, 4.1), (0.0, 0.1), polish=2, reach=_STAR, rounds=3),
    "q3_k": Effort((-4.6, -4.1, -3.6, -3.2, -2.8), polish=1, reach=1, rounds=2, unbias=0.7),
    "q4_k": Effort((12, 13, 14, 15, 16, 17, 18), (0.0, 0.04), polish=3, reach=_STAR, rounds=2, power=0.75),
    "q5_k": Effort((29, 30, 31, 32, 33, 34), (0.0, 0.02), polish=2, reach=_STAR),
    "q6_k": Effort((-32.2, -31.3, -30.5, -29.7), polish=1, reach=1, rounds=1, unbias=0.0),
    "iq4_nl": replace(_IQ4, polish=2),
    "iq4_xs": _IQ4,
    "tq1_0": _TERNARY,
    "tq2_0": _TERNARY,
}


@functools.cache
def _efforts() -> dict[Scheme, Effort]:
    return {parse_scheme(name): effort for name, effort in EFFORTS.items()}


def fit(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> Params:
    """`math.scales.fit` for the schemes of `EFFORTS`."""
    if not _fast(scheme, w, search):
        return fit_plain(scheme, w, importance, search)
    return _run(scheme, w, importance, replace(_efforts()[scheme], unbias=0.0))[1]


def quantize(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> QTensor:
    """`math.scales.quantize` for the schemes of `EFFORTS`: codes come out of the same pass as scales."""
    if not _fast(scheme, w, search):
        params = fit_plain(scheme, w, importance, search)
        return assemble(scheme, tuple(w.shape), snap(scheme, w, params, importance), params)
    codes, params = _run(scheme, w, importance, _efforts()[scheme])
    return assemble(scheme, tuple(w.shape), codes, params)


def _fast(scheme: Scheme, w: torch.Tensor, search: Search) -> bool:
    return (
        w.device.type == "cpu"
        and search.method == "lsq"
        and w.ndim > 0
        and w.shape[-1] % scheme.span == 0
        and scheme in _efforts()
    )


def _run(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None, effort: Effort
) -> tuple[torch.Tensor, Params]:
    """Codes and parameters, computed a piece of whole rows at a time."""
    nested = scheme.scale is not None and not scheme.scale.is_leaf
    size, per_super = scheme.blocks.cols, scheme.scale.blocks.cols if nested else 1
    count, blocks = prod(w.shape[:-1]), w.shape[-1] // size
    names = [name for name, _ in scheme.parts()]
    if effort.unweighted and (importance is None or not bool(importance.any())):
        effort = replace(effort, ends=effort.unweighted, insets=(0.0,), polish=1)
    codes = torch.empty(count, w.shape[-1], dtype=code_dtype(scheme.grid))
    inner = [
        torch.empty(count, blocks if nested else 0, dtype=code_dtype(getattr(scheme, name).grid)) for name in names
    ]
    outer = [torch.empty(count, blocks // per_super, dtype=torch.float32) for _ in names]
    for part, x, h in row_pieces(scheme, w, importance, effort.power, checked=False):
        out = [array[part].view(-1).numpy() for array in (codes, *inner, *outer)]
        if _kernel(scheme, effort, size, per_super, x.view(-1).numpy(), h.view(-1).numpy(), out):
            require_finite(w)
    counts = scheme.block_counts(tuple(w.shape))
    stored = {}
    for name, inside, top in zip(names, inner, outer, strict=True):
        part = getattr(scheme, name)
        if nested:
            tops = top.to(native_dtype(part.scale.grid)).view(part.block_counts(counts))
            stored[name] = QTensor(part, counts, inside.view(counts), tops)
        else:
            stored[name] = top.to(native_dtype(part.grid)).view(counts)
    return codes.view(w.shape), Params(**stored)


def _kernel(
    scheme: Scheme, effort: Effort, size: int, per_super: int, x: np.ndarray, h: np.ndarray, out: list[np.ndarray]
) -> bool:
    """Codes and parameters to `out`; returns whether a weight may be NaN or infinite."""
    ends = np.array(effort.ends, _F)
    if scheme.value_shift is not None:
        candidates = np.array([(end, inset) for inset in effort.insets for end in effort.ends], _F)
        reach = np.array(effort.reach if isinstance(effort.reach, tuple) else (), _F).reshape(-1, 2)
        top = _F(scheme.scale.grid.high) if per_super > 1 else _F(0)
        return quantize_minimum(
            x,
            h,
            size,
            per_super,
            _F(scheme.grid.high),
            candidates,
            effort.polish,
            top,
            reach,
            effort.rounds,
            _F(effort.unbias),
            *out,
        )
    low, high, zero, lut, code_lut, resolution, offset = _levels(scheme.grid)
    k_low, k_high = (_F(scheme.scale.grid.low), _F(scheme.scale.grid.high)) if per_super > 1 else (_F(0), _F(0))
    return quantize_symmetric(
        x, h, size, per_super, low, high, zero, lut, code_lut, resolution, offset, ends, effort.polish, k_low, k_high, effort.reach, effort.rounds, _F(effort.unbias), *out
    )  # fmt: skip


@functools.cache
def _levels(grid: Grid) -> tuple:
    """A grid as the symmetric kernel wants it: (low, high, code of level 0, level table, code table, resolution, offset)."""
    none = np.empty(0, _F), np.empty(0, np.uint8), _F(0), _F(0)
    if isinstance(grid, IntGrid):
        return _F(grid.low), _F(grid.high), _F(0), *none
    if not isinstance(grid, Codebook):
        raise InputError("FB-E0601", f"no fast search for the levels of {grid.name}")
    levels = grid.levels()
    if np.array_equal(levels, np.arange(levels[0], levels[-1] + 1)):
        return _F(levels[0]), _F(levels[-1]), _F(-levels[0]), *none
    edges = (levels[1:] + levels[:-1]) / 2
    resolution = 2.0  # edges lie on multiples of 1/2
    if not np.array_equal(edges * resolution, np.rint(edges * resolution)):
        raise InputError("FB-E0601", f"the levels of {grid.name} do not lie on a fine enough lattice")
    start = np.floor(levels[0]) - 1
    count = int((np.ceil(levels[-1]) + 1 - start) * resolution)
    middles = start + (np.arange(count) + 0.5) / resolution
    codes = np.searchsorted(edges, middles).astype(np.uint8)
    return _F(0), _F(0), _F(0), levels[codes].astype(_F), codes, _F(resolution), _F(-start * resolution)


def row_pieces(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None, power: float = 1.0, checked: bool = True
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Whole rows of a tensor, a bounded number of weights at a time.

    Args:
        power: exponent of the importance.
        checked: whether weights must be held against NaN and infinity here.

    Yields:
        (which rows of [count, cols], float32 weights [n, cols], float32 importance [1 or n, cols] with mean 1 and no zero: where all
        importance of a block is zero the plain error decides).

    Raises:
        InputError: FB-E0702 for non-finite weights, FB-E0701 for unsuitable importance.
    """
    shape = tuple(w.shape)
    rows, cols = (1, 1, *shape)[-2:]
    matrices = w.reshape(prod(shape[:-2]), rows, cols)
    spread = spread_importance(importance, shape, scheme.blocks.resolve(shape))
    step = max(1, PIECE // max(1, cols))
    for batch, matrix in enumerate(matrices):
        weights = None if spread is None else spread[batch if len(spread) > 1 else 0].float() ** power
        mean = 0.0 if weights is None else float(weights.mean())
        for first in range(0, rows, step):
            x = matrix[first : first + step].float().contiguous()
            if checked and not bool(torch.isfinite(x.sum())):
                require_finite(w)
            if mean > 0:
                piece = weights if len(weights) == 1 else weights[first : first + step]
                h = (piece / mean + FAINT).contiguous()
            else:
                h = torch.ones(1, cols)
            yield slice(batch * rows + first, batch * rows + first + len(x)), x, h
