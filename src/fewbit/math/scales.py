"""Fit and snap: the two functions that every solver is written against.

`fit` chooses the parameters (scale and shifts, in stored form) of every block of a tensor under any scheme; `snap` finds the
nearest codes given parameters. Schemes whose scale is itself quantised are fitted from the outside in: ideal scales first, then the
scales' own scheme by the same two functions, then the inner codes once more, now that the outer scale is fixed. Codes are always chosen
against the parameters as they are stored, never against the ideal ones.

Families with a better or faster fit bring their own: one file and one row in `FITTERS`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import torch

from fewbit.base.errors import InputError
from fewbit.math import fast
from fewbit.math.metrics import weighted_error
from fewbit.math.nested import fit_nested
from fewbit.math.rounding import nearest, pack_leaf, store
from fewbit.math.search import Params, Search, Target, Triple, choose, error_of, units
from fewbit.math.tiles import Chunk, chunks, require_finite
from fewbit.num.blocks import EACH
from fewbit.num.grid import FloatGrid, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor, code_dtype, expand, values_of
from fewbit.num.scheme import Scheme, parse_scheme

__all__ = ["FITTERS", "Params", "Search", "assemble", "effective", "fit", "quantize", "quantize_scored", "snap"]


DEFAULT_SEARCH = Search()
Chooser = Callable[[Target, Chunk, Search], Triple]


@functools.cache
def _named(names: str) -> frozenset[Scheme]:
    return frozenset(map(parse_scheme, names.split()))


# (accepts(scheme) -> bool, module with a `fit` and a `quantize` of the signatures below); the first row that accepts is used
FITTERS: list[tuple[Callable[[Scheme], bool], str]] = [
    (
        lambda scheme: scheme in _named("q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs tq1_0 tq2_0"),
        "fewbit.math.kernels.kquants",
    ),
    (
        lambda scheme: scheme in _named("iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s"),
        "fewbit.math.lattice",
    ),
    (
        lambda scheme: scheme in _named("mxfp4 mxfp6-e3m2 mxfp6-e2m3 mxfp8"),
        "fewbit.math.kernels.mx",
    ),
]


def _special(scheme: Scheme) -> ModuleType | None:
    """The module that has its own fit for a scheme, or None."""
    return next((importlib.import_module(where) for accepts, where in FITTERS if accepts(scheme)), None)


def fit(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> Params:
    """Choose the parameters of every block.

    Args:
        scheme: any scheme with scalar codes, or one that a row of `FITTERS` accepts.
        w: floating [*batch, rows, cols], finite; any range of columns that is a whole number of spans.
        importance: float32 [cols], [rows, cols] or [*batch, rows, cols], >= 0: weight of each squared error.
        search: how hard to look.

    Returns:
        Parameters that storage can represent.

    Raises:
        InputError: FB-E0702 for non-finite weights, FB-E0701 for unsuitable importance, FB-E0601 for vector codes without a fitter.
    """
    special = _special(scheme)
    if special is not None:
        return special.fit(scheme, w, importance, search)
    return fit_plain(scheme, w, importance, search)


def fit_plain(
    scheme: Scheme,
    w: torch.Tensor,
    importance: torch.Tensor | None = None,
    search: Search = DEFAULT_SEARCH,
    chooser: Chooser = choose,
) -> Params:
    """`fit` without the special families, for every scalar scheme; `chooser` decides for blocks whose parameters are stored directly."""
    if scheme.is_leaf:
        return Params()
    if isinstance(scheme.grid, VectorGrid):
        raise InputError("FB-E0601", f"no fitter knows how to choose scales for the vector codes of {scheme}")
    if any(part.blocks != EACH for _, part in scheme.parts() if part.is_leaf):
        return _fit_shared(scheme, w, importance, search, chooser)
    if all(part.is_leaf for _, part in scheme.parts()):
        return _fit_direct(scheme, w, importance, search, chooser)
    return fit_nested(scheme, w, importance, search, quantize=quantize, chooser=chooser)


def snap(scheme: Scheme, w: torch.Tensor, params: Params, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The nearest codes under given parameters.

    Args:
        scheme, w: as for `fit`.
        params: parameters as `fit` returns them.
        importance: only vector codes use it.

    Returns:
        Codes [*batch, rows, cols / grid.dim] of `code_dtype(scheme.grid)`.
    """
    return _snap_leaf(scheme, w) if scheme.is_leaf else _snap(scheme, w, params, importance)


def _snap(
    scheme: Scheme, w: torch.Tensor, params: Params, importance: torch.Tensor | None, scores: list[float] | None = None
) -> torch.Tensor:
    """`snap` for a scheme with parameters; appends the weighted squared error of each chunk to `scores`."""
    grid, shape = scheme.grid, tuple(w.shape)
    tiling = scheme.blocks.resolve(shape)
    arrays = [_block_array(scheme, params, name, shape) for name in ("scale", "code_shift", "value_shift")]
    codes = torch.empty(_codes_view(scheme, shape), dtype=code_dtype(grid), device=w.device)
    rows = codes.view(-1, tiling.rows, codes.shape[-1])
    for chunk in chunks(w, importance, scheme.blocks):
        scale, z, v = (None if a is None else chunk.take(a) for a in arrays)
        triple = (torch.ones((1, 1, 1, 1), device=w.device) if scale is None else scale, z, v)
        b, r, _, c, _ = chunk.index
        r, c = r * tiling.block_rows, c * tiling.block_cols // grid.dim
        found: Iterator[torch.Tensor]
        errors: torch.Tensor | None = None
        if scores is not None and chunk.view is not None and isinstance(grid, IntGrid):
            codes_found, errors = fast.snap_scored(chunk.view, grid, triple)
            found = iter([codes_found])
        elif chunk.view is not None and fast.serves(grid):
            found = iter([fast.snap(chunk.view, grid, triple)])
        else:  # several pieces only where one row of blocks is larger than a chunk
            found = (nearest(grid, units(x, triple), h if grid.dim > 1 else None) for x, h in chunk.pieces())
        for piece in found:
            part = piece.reshape(piece.shape[0] * piece.shape[1], -1)[:, : chunk.extent[1] // grid.dim]
            part = part[: chunk.extent[0] + chunk.index[1] * tiling.block_rows - r]
            rows[b, r : r + part.shape[0], c : c + part.shape[1]] = part
            r += part.shape[0]
        if scores is not None:
            errors = error_of(Target(grid, None), chunk, triple) if errors is None else errors
            scores.append(float(errors.sum(dtype=torch.float64)))
    return codes.view(*shape[:-1], shape[-1] // grid.dim) if shape else codes.view(())


def assemble(scheme: Scheme, shape: tuple[int, ...], codes: torch.Tensor, params: Params) -> QTensor:
    """The quantised tensor made of codes and parameters."""
    return QTensor(scheme, tuple(shape), codes, params.scale, params.code_shift, params.value_shift)


def quantize(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> QTensor:
    """`fit`, then `snap`; same arguments and errors as `fit`."""
    special = _special(scheme)
    if special is not None:
        return special.quantize(scheme, w, importance, search)
    params = fit(scheme, w, importance, search)
    return assemble(scheme, tuple(w.shape), snap(scheme, w, params, importance), params)


def quantize_scored(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> tuple[QTensor, float]:
    """`quantize`, and the sum of importance * (w - dequantised)^2 without decoding anything where no special family serves."""
    if scheme.is_leaf or _special(scheme) is not None or isinstance(scheme.grid, VectorGrid):
        q = quantize(scheme, w, importance, search)
        return q, weighted_error(w, q.dequantize(), importance)
    params, scores = fit(scheme, w, importance, search), list[float]()
    q = assemble(scheme, tuple(w.shape), _snap(scheme, w, params, importance, scores), params)
    return q, sum(scores)


def effective(scheme: Scheme, params: Params, shape: tuple[int, ...]) -> tuple[torch.Tensor | None, ...]:
    """(scale, code_shift, value_shift) as float32, broadcast to the weights; None for what the scheme has not."""
    found = []
    for name in ("scale", "code_shift", "value_shift"):
        array = _block_array(scheme, params, name, shape)
        found.append(None if array is None else expand(array, scheme, shape).reshape(shape))
    return tuple(found)


def _fit_direct(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None, search: Search, chooser: Chooser
) -> Params:
    """All parts are stored directly, one entry per block."""
    target = direct_target(scheme)
    counts = scheme.block_counts(tuple(w.shape))
    arrays = {name: torch.empty(counts, dtype=torch.float32, device=w.device) for name, _ in scheme.parts()}
    views = {name: array.view(-1, *counts[-2:]) for name, array in arrays.items()}
    for chunk in chunks(w, importance, scheme.blocks):
        for name, values in zip(("scale", "code_shift", "value_shift"), chooser(target, chunk, search), strict=True):
            if name in views and values is not None:
                chunk.put(views[name], values)
    return Params(**{name: pack_leaf(part.grid, arrays[name]) for name, part in scheme.parts()})


def direct_target(scheme: Scheme) -> Target:
    """What the parameters may be when all are stored directly."""
    grids = {name: part.grid for name, part in scheme.parts()}
    scale = grids.get("scale")
    return Target(
        scheme.grid,
        scale,
        grids.get("code_shift"),
        grids.get("value_shift"),
        isinstance(scale, FloatGrid) and scale.signed and scale.exponent >= 5,
    )


def _fit_shared(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None, search: Search, chooser: Chooser
) -> Params:
    """Some leaf has fewer entries than blocks (one mean for all blocks): shifts first, by their mean, then the rest around them."""
    part = scheme.value_shift
    if part is None or part.blocks == EACH:
        raise InputError("FB-E0601", f"only a value shift can be shared by several blocks, not as in {scheme}")
    counts = scheme.block_counts(tuple(w.shape))
    shared = part.blocks.resolve(counts)
    means = w.float().mean().expand(shared.grid) if shared.grid == (1,) * len(shared.grid) else None
    if means is None:
        raise InputError("FB-E0601", f"a shared value shift has one entry for the whole tensor, not as in {scheme}")
    shift = store(part.grid, means.contiguous())
    require_finite(w)
    rest = fit_plain(replace(scheme, value_shift=None), w.float() - shift.reshape(()), importance, search, chooser)
    return replace(rest, value_shift=pack_leaf(part.grid, shift))


def _block_array(scheme: Scheme, params: Params, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A part as float32 with one entry per block, [batch, block rows, block cols]."""
    part, stored = getattr(scheme, name), getattr(params, name)
    if part is None or stored is None:
        return None
    counts = scheme.block_counts(shape)
    values = values_of(stored)
    if part.is_leaf:
        values = expand(values, part, counts)
    return values.reshape(-1, *counts[-2:])


def _codes_view(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    view = scheme.blocks.resolve(shape).view
    if view[-1] % scheme.grid.dim:
        raise InputError(
            "FB-E0602", f"{scheme.grid.name} codes {scheme.grid.dim} weights at once, got rows of {view[-1]}"
        )
    return (*view[:-1], view[-1] // scheme.grid.dim)


def _snap_leaf(scheme: Scheme, w: torch.Tensor) -> torch.Tensor:
    """Levels stored directly: per entry, or the mean of each block."""
    require_finite(w)
    if scheme.blocks == EACH:
        return nearest(scheme.grid, w.float())
    sums = torch.empty(scheme.block_counts(tuple(w.shape)), dtype=torch.float32, device=w.device)
    for chunk in chunks(w, torch.ones(w.shape[-1], device=w.device) if w.ndim else None, scheme.blocks):
        weight = chunk.total(lambda x, h: torch.ones_like(x) if h is None else h.expand(x.shape))
        total = chunk.total(lambda x, h: x if h is None else h * x)
        chunk.put(sums.view(-1, *sums.shape[-2:]), total / weight)
    return nearest(scheme.grid, sums)
