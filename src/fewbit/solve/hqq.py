"""HQQ: half-quadratic quantisation, without calibration (Badri and Shaji, 2023).

Instead of squared errors it lessens sum |w - w_hat|^p with p < 1, which lets a few outliers go for the sake of the rest. The
problem is split in two that have closed forms, taken in turn:

    e     = shrink(w - w_hat)                       what is given up as outlier, by the proximal step of |.|^p
    s, v  = least squares of w - e on the codes     the original fits the shift alone; here the scale moves too

The steps start from the least-squares search. Residuals are measured in units of the block's scale, so that the strength of the shrinkage does not
depend on the size of the weights. Each block keeps the best stored parameters that it met, the plain range among them: by its own
measure HQQ is never worse than rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.rounding import round_levels, store_shift
from fewbit.math.scales import Params, assemble, fit_plain, snap
from fewbit.math.search import Search, Target, Triple, choose, decode, from_range, least_squares, merged, units
from fewbit.math.stats import Stats
from fewbit.math.tiles import Chunk, chunks
from fewbit.num.blocks import CHANNEL
from fewbit.num.grid import F32, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.solve.table import Solved, Solver

_PLAIN, _START = Search("minmax"), Search("lsq")


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Quantise `w` [*batch, rows, cols]; `seed` is not used.

    Raises:
        InputError: FB-E0704 for vector codes.
    """
    scheme = scheme.weights_only
    if isinstance(scheme.grid, VectorGrid):
        raise InputError(
            "FB-E0704", f"hqq needs one code for one weight, {scheme} codes {scheme.grid.dim} weights at once"
        )
    importance = stats.importance if stats is not None else None
    chooser = partial(
        _choose, power=options["p"], beta=options["beta"], growth=options["growth"], rounds=options["rounds"]
    )
    q = _quantize(scheme, w, fit_plain(scheme, w, importance, _PLAIN, chooser), importance)
    plain = _quantize(scheme, w, fit_plain(scheme, w, importance, _PLAIN), importance)
    loss, before = (lp_error(w, each, importance, options["p"]) for each in (q, plain))
    if loss <= before:
        return Solved(q, loss)
    return Solved(plain, before, ("rounding the nested scales undid the gain: kept the plain range",))


def lp_error(w: torch.Tensor, q: QTensor, importance: torch.Tensor | None, power: float) -> float:
    """Sum of importance * |w - w_hat|^power."""
    w_hat, total = q.dequantize(), 0.0
    for ours, theirs in zip(chunks(w, importance, CHANNEL), chunks(w_hat, None, CHANNEL), strict=True):
        miss = (ours.x - theirs.x).abs().double().pow(power)
        total += float((miss if ours.h is None else miss * ours.h).sum())
    return total


def _quantize(scheme: Scheme, w: torch.Tensor, params: Params, importance: torch.Tensor | None) -> QTensor:
    return assemble(scheme, tuple(w.shape), snap(scheme, w, params, importance), params)


def _choose(
    target: Target, chunk: Chunk, search: Search, *, power: float, beta: float, growth: float, rounds: int
) -> Triple:
    """Stored parameters for every block of a chunk: `search.choose`, then half-quadratic steps from there."""
    best = from_range(target, *chunk.extremes())
    error = _lp(target, chunk, best, power)
    current = choose(target, chunk, _START)
    for step in range(rounds + 1):
        new = _lp(target, chunk, current, power)
        better = new < error
        best = merged(better, current, best)
        if step == rounds or (step and not bool(better.any())):
            break
        error = torch.where(better, new, error)
        current = _refit(target, chunk, current, partial(_outliers, target, current, power=power, beta=beta))
        beta *= growth
    return best


def _lp(target: Target, chunk: Chunk, triple: Triple, power: float) -> torch.Tensor:
    def miss(x: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        out = (decode(round_levels(target.grid, units(x, triple)), triple) - x).abs_().pow_(power)
        return out if h is None else out.mul_(h)

    return chunk.total(miss)


def _outliers(target: Target, triple: Triple, x: torch.Tensor, *, power: float, beta: float) -> torch.Tensor:
    """Proximal step of |.|^power on the residuals: small ones vanish, large ones stay nearly whole."""
    size = triple[0].abs()
    residual = (x - decode(round_levels(target.grid, units(x, triple)), triple)) / torch.where(size == 0, 1, size)
    length = residual.abs()
    kept = (length - length.clamp(min=1e-12).pow(power - 1) / beta).clamp(min=0)
    return torch.sign(residual) * kept * size


def _refit(target: Target, chunk: Chunk, triple: Triple, given_up: Callable[[torch.Tensor], torch.Tensor]) -> Triple:
    """Least-squares scale and shift for the weights less what was given up. A float zero point z is the value shift -z s."""
    rest = replace(chunk, raw=chunk.x - given_up(chunk.x))
    scale, z, _ = triple
    if z is None or isinstance(target.code_shift, IntGrid):
        return least_squares(target, rest, triple)
    shifted = replace(target, code_shift=None, value_shift=F32)
    scale, _, v = least_squares(shifted, rest, (scale, None, -z * scale))
    if v is None:
        return triple
    zero = torch.where(scale == 0, z, -v / torch.where(scale == 0, 1, scale))
    return scale, store_shift(target.code_shift, zero), None


SOLVER = Solver(
    name="hqq",
    needs=frozenset(),
    solve=solve,
    options={"p": 0.7, "beta": 10.0, "growth": 1.01, "rounds": 10},
    summary="half-quadratic search for the least |error|^0.7, robust to outliers; no calibration needed",
)
