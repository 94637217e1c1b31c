"""Fast fit and quantise for blocks of small floats under a power of two, with the signatures of `math.scales.fit` and `quantize`.

Only CPU tensors of whole blocks and the least-squares search are taken; everything else goes the plain way. A power of two cannot be rounded
further, so fit and quantise are the same three trials (`powers.py`).
"""

from __future__ import annotations

from math import floor, log2, prod

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.math.kernels.kquants import row_pieces
from fewbit.math.kernels.powers import quantize_powers
from fewbit.math.scales import DEFAULT_SEARCH, Params, Search, assemble, fit_plain, snap
from fewbit.num.grid import FloatGrid
from fewbit.num.qtensor import QTensor, code_dtype, native_dtype
from fewbit.num.scheme import Scheme

_F, _I = np.float32, np.int32


def fit(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> Params:
    """`math.scales.fit` for MX schemes."""
    if not _fast(scheme, w, search):
        return fit_plain(scheme, w, importance, search)
    return _run(scheme, w, importance)[1]


def quantize(
    scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None = None, search: Search = DEFAULT_SEARCH
) -> QTensor:
    """`math.scales.quantize` for MX schemes: codes come out of the same pass as scales."""
    if not _fast(scheme, w, search):
        params = fit_plain(scheme, w, importance, search)
        return assemble(scheme, tuple(w.shape), snap(scheme, w, params, importance), params)
    codes, params = _run(scheme, w, importance)
    return assemble(scheme, tuple(w.shape), codes, params)


def _fast(scheme: Scheme, w: torch.Tensor, search: Search) -> bool:
    return w.device.type == "cpu" and search.method == "lsq" and w.ndim > 0 and w.shape[-1] % scheme.blocks.cols == 0


def _run(scheme: Scheme, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, Params]:
    grid, size = scheme.grid, scheme.blocks.cols
    if not isinstance(grid, FloatGrid):
        raise InputError("FB-E0601", f"no fast search for the levels of {grid.name}")
    count = prod(w.shape[:-1])
    codes = torch.empty(count, w.shape[-1], dtype=code_dtype(grid))
    exponents = torch.empty(count, w.shape[-1] // size, dtype=torch.uint8)
    magic = _F(2.0 ** (24 - grid.bias - grid.mantissa))
    marks = _I((127 - grid.bias) << grid.mantissa), _I(1 << (grid.bits - 1))
    shape = _F(grid.high), _I(23 - grid.mantissa), _F(grid.smallest_normal), magic, *marks
    for part, x, h in row_pieces(scheme, w, importance):
        out = codes[part].view(-1).numpy(), exponents[part].view(-1).numpy()
        quantize_powers(x.view(-1).numpy(), h.view(-1).numpy(), size, floor(log2(grid.high)), *shape, *out)
    counts = scheme.block_counts(tuple(w.shape))
    return codes.view(w.shape), Params(exponents.view(native_dtype(scheme.scale.grid)).view(counts))
