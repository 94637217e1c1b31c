"""SpQR: the few weights that hurt most are kept apart in high precision, the rest go through the feedback loop (arXiv 2306.03078).

    w  =  base + outliers        base: any scheme, best with small groups whose scales are quantised too;  outliers: sparse f16

A weight is an outlier when rounding it to nearest costs most: pivot_j^2 (w - w_hat)^2, the share of the loss that feedback cannot take over.
The base is solved with zeros in their place, which tightens the ranges of their groups; then every outlier takes the value at which the
whole quadratic is least with everything else held, a few rounds in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import fit, quantize, snap
from fewbit.math.search import Search
from fewbit.math.stats import Stats
from fewbit.math.tiles import require_finite
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.solve import gptq
from fewbit.solve.sweeps import Quadratic
from fewbit.solve.table import Solved, Solver, collected

ROUNDS = 3


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Quantise `w` [rows, cols] with `options["outliers"]` of its weights kept apart.

    Raises:
        InputError: FB-E0602 for anything but a matrix, FB-E0704 for a share outside 0 … 0.5; else as `gptq.solve`.
    """
    stats, share = collected(stats), options["outliers"]
    if not 0 <= share <= 0.5:
        raise InputError("FB-E0704", f"the share of outliers lies between 0 and 0.5, got {share}")
    if w.ndim != 2:
        raise InputError("FB-E0602", f"outliers are kept apart for one matrix at a time, got shape {tuple(w.shape)}")
    require_finite(w)
    scheme, w = scheme.weights_only, w.float()
    inner = {name: options[name] for name in gptq.SOLVER.options}
    try:
        problem = gptq.Problem.of(w, stats, inner)
    except InputError as error:
        if error.code != "FB-E0705":
            raise
        return gptq.solve(w, stats, scheme, seed=seed, options=inner)
    wanted, quadratic = problem.wanted, problem.quadratic
    weight = problem.columns.pivot.square()
    if problem.order is not None:
        weight = torch.empty_like(weight).index_copy_(0, problem.order, weight)
    mask = outlier_mask(scheme, wanted, weight, share, Search(options["search"], options["steps"]))
    base = gptq.solve_wanted(replace(problem, wanted=torch.where(mask, 0, wanted)), stats, scheme, inner)
    values = _settled(base.q.dequantize(), mask, quadratic)
    q = replace(base.q, sides={**base.q.sides, "outliers": values.to_sparse_coo()})
    bits = q.storage_bits / max(1, w.numel())
    note = f"{int(mask.sum())} of {w.numel()} weights kept apart, {bits:.3f} bits per weight with them"
    return Solved(q, quadratic.loss(q.dequantize()), (*base.notes, note))


def outlier_mask(scheme: Scheme, w: torch.Tensor, weight: torch.Tensor, share: float, search: Search) -> torch.Tensor:
    """bool [rows, cols]: the `share` of the weights that cost most when rounded to nearest; weight float32 [cols]."""
    count = round(share * w.numel())
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    if not count:
        return mask
    params = fit(scheme, w, weight, search)
    rounded = QTensor(
        scheme, tuple(w.shape), snap(scheme, w, params, weight), params.scale, params.code_shift, params.value_shift
    )
    cost = (w - rounded.dequantize()).square() * weight
    # what clipping hides: a large weight stretches its group, so its own magnitude counts even where it was met exactly
    cost = cost + w.square() * weight * (w.abs() >= w.abs().flatten().kthvalue(max(1, w.numel() - count)).values)
    mask.view(-1)[cost.flatten().topk(count).indices] = True
    return mask


def _settled(base: torch.Tensor, mask: torch.Tensor, quadratic: Quadratic) -> torch.Tensor:
    """f16-representable outlier values [rows, cols], zero elsewhere, by coordinate descent column after column."""
    values = torch.where(mask, quadratic.w - base, 0).half().float()
    gram = quadratic.metric(slice(None))
    diagonal = gram.diagonal()
    for _ in range(ROUNDS):
        slope = quadratic.slope(base + values - quadratic.w)
        if quadratic.outer is not None:  # rows are coupled: a cautious common step for all rows
            slope = slope / quadratic.outer.sum(1).abs().clamp(min=float(quadratic.outer.diagonal().mean()))[:, None]
        for j in torch.nonzero(mask.any(0))[:, 0].tolist():
            moved = torch.where(mask[:, j], values[:, j] - slope[:, j] / diagonal[j], 0).half().float()
            step, values[:, j] = moved - values[:, j], moved
            slope += step[:, None] * gram[j]
    plain = torch.where(mask, quadratic.w - base, 0).half().float()
    return values if quadratic.loss(base + values) <= quadratic.loss(base + plain) else plain


SOLVER = Solver(
    name="spqr",
    needs=gptq.SOLVER.needs,
    outliers=True,
    solve=solve,
    options={**gptq.SOLVER.options, "outliers": 0.01},
    summary="SpQR: a share of outliers kept sparse in f16, the rest by error feedback",
)

__all__ = ["SOLVER", "outlier_mask", "quantize", "solve"]
