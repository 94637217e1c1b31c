"""Fit and quantise for vector codebooks (ggml's i-quants), with the signatures of `math.scales.fit` and `quantize`.

A vector code stands for eight weights, so scale and codes cannot be chosen apart as for scalars: `fit` is the search of
`kernels/iquants.py`, whose codes `quantize` keeps. Given parameters, `math.scales.snap` finds the nearest codes, eight columns at a time if a
solver wants it so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.math.kernels.iquants import Layout, quantize_vectors
from fewbit.math.kernels.kquants import row_pieces
from fewbit.math.kernels.vectors import Book, book
from fewbit.math.scales import DEFAULT_SEARCH, Params, Search, assemble
from fewbit.num.grid import VectorGrid, vector_table
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.num.tables import IQ1_DELTA

_F = np.float32
SUPER = 256


@dataclass(frozen=True)
class Effort:
    """How hard one codebook is searched.

    Attributes:
        ladder: scales tried for a block, as the level that its largest weight is put on, in units of the largest level.
        trials: odd numbers that a block tries with real vectors, 1 to 3.
        refine: whether the super-scale is then made the least-squares one.
        unbias: share of the least-squares shrinkage that is undone (`kquants_tiles.growth`); beyond 1 it stretches.
        emphatic: whether errors of large weights weigh more (`vectors.load_super`).

    The last two are for `quantize`: they cost weighted error and gain KL. `fit`, for solvers that feed errors back, takes the plain least squares.
    """

    ladder: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
    trials: int = 2
    refine: bool = True
    unbias: float = 0.5
    emphatic: bool = False


EFFORTS: dict[str, Effort] = {
    "iq2xxs": Effort(trials=3, unbias=0.65, emphatic=True),
    "iq2xs": Effort(trials=3, unbias=0.8, emphatic=True),
    "iq2s": Effort((0.45, 0.58, 0.71, 0.84, 0.97, 1.1), trials=3, refine=False, unbias=0.7, emphatic=True),
    "iq3xxs": Effort(trials=3, unbias=0.6),
    "iq3s": Effort((0.55, 0.7, 0.8, 0.9, 1.0, 1.1), trials=3, refine=False, unbias=1.4, emphatic=True),
    "iq1": Effort((0.25, 0.35, 0.45, 0.55, 0.7, 0.9), trials=2, refine=False, unbias=0.55, emphatic=True),
    "iq1m": Effort((0.3, 0.42, 0.56, 0.75), trials=2, refine=False, unbias=0.6, emphatic=True),
}


def fit(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> Params:
    """`math.scales.fit` for vector codes; every method means the same search."""
    return _run(scheme, w, importance, for_kl=False)[1]


def quantize(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> QTensor:
    """`math.scales.quantize` for vector codes."""
    codes, params = _run(scheme, w, importance, for_kl=True)
    return assemble(scheme, tuple(w.shape), codes, params)


def _run(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None, *, for_kl: bool
) -> tuple[torch.Tensor, Params]:
    """int32 codes and stored parameters.

    Raises:
        InputError: FB-E0602 when rows are not whole super-blocks; FB-E0701, FB-E0702 as `fit`.
    """
    grid, cols = scheme.grid, w.shape[-1] if w.ndim else 1
    if not isinstance(grid, VectorGrid) or grid.name not in EFFORTS:
        raise InputError("FB-E0601", f"no search for the vector codes of {scheme}")
    if cols % SUPER:
        raise InputError("FB-E0602", f"{scheme} needs rows of a multiple of {SUPER} weights, got {cols}")
    if w.device.type != "cpu":
        codes, params = _run(scheme, w.cpu(), None if importance is None else importance.cpu(), for_kl=for_kl)
        moved = {name: part.to(w.device) for name, part in vars(params).items() if part is not None}
        return codes.to(w.device), Params(**moved)
    layout, codebook, ladder = _layout(scheme, grid), _book(grid.name), _ladder(grid.name)
    effort, count, blocks = EFFORTS[grid.name], prod(w.shape[:-1]), cols // scheme.blocks.cols
    codes = torch.empty(count, cols // 8, dtype=torch.int32)
    scale_codes = torch.empty(count, blocks, dtype=torch.uint8)
    shifts = torch.empty(count, cols // 8 // layout.per_shift, dtype=torch.uint8)
    tops = torch.empty(count, cols // SUPER, dtype=torch.float32)
    for part, x, h in row_pieces(scheme, w, importance):
        out = [array[part].view(-1).numpy() for array in (codes, scale_codes, shifts, tops)]
        quantize_vectors(
            x.view(-1).numpy(),
            h.view(-1).numpy(),
            codebook,
            layout,
            ladder,
            effort.trials,
            effort.refine,
            effort.emphatic and for_kl,
            _F(effort.unbias if for_kl else 0),
            *out,
        )
    counts = scheme.block_counts(tuple(w.shape))
    if scheme.code_shift is None and codebook.shifts.size > 1:
        codes |= shifts.int() << layout.index_bits
    shift = None if scheme.code_shift is None else QTensor(scheme.code_shift, counts, shifts.view(counts))
    top = tops.to(torch.float16).view(scheme.part("scale").block_counts(counts))
    scale = QTensor(scheme.part("scale"), counts, scale_codes.view(counts), top)
    return codes.view(*w.shape[:-1], cols // 8), Params(scale, shift, None)


def _layout(scheme: Scheme, grid: VectorGrid) -> Layout:
    per_block, shifted = scheme.blocks.cols // 8, grid.name.startswith("iq1")
    per_shift = 1 if shifted and scheme.code_shift is None else per_block
    index_bits = grid.index_bits - (1 if shifted and scheme.code_shift is None else 0)
    top = len(scheme.part("scale").grid.levels()) - 1
    return Layout(grid.parts, index_bits, grid.sign_bits, per_block, per_shift, top)


@functools.cache
def _book(name: str) -> Book:
    table = vector_table("iq1" if name == "iq1m" else name)
    return book(table, (IQ1_DELTA, -IQ1_DELTA) if name.startswith("iq1") else (0.0,))


@functools.cache
def _ladder(name: str) -> np.ndarray:
    return np.array(EFFORTS[name].ladder, _F) / _F(np.abs(vector_table("iq1" if name == "iq1m" else name)).max())
