"""LLM.int8(): input channels with outlying activations stay in high precision, the rest goes to 8 bits (arXiv 2208.07339).

    w  =  base + outliers        base: the scheme, with zeros in the outlying columns;  outliers: those columns, f16

A column is outlying when its inputs ever reached `threshold`. With activations quantised too (`int8-channel+int8-token`) the engine keeps
those inputs in floating point; for weights alone the split only saves what rounding these columns would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.metrics import weighted_error
from fewbit.math.scales import quantize
from fewbit.math.search import Search
from fewbit.math.stats import Stats
from fewbit.math.tiles import require_finite
from fewbit.num.scheme import Scheme
from fewbit.solve.table import Solved, Solver, collected


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Quantise `w` [*batch, rows, cols]; columns of outlying inputs go to `sides["outliers"]`.

    Raises:
        InputError: FB-E0702 for non-finite weights, FB-E0703 when the statistics are of other channels, FB-E0704 for a bad threshold.
    """
    threshold = options["threshold"]
    if not threshold > 0:
        raise InputError("FB-E0704", f"the threshold of outlying inputs must be positive, got {threshold}")
    require_finite(w)
    stats = collected(stats)
    if w.ndim < 2 or stats.channels != w.shape[-1]:
        raise InputError(
            "FB-E0703", f"statistics of {stats.channels} channels do not suit a weight of shape {tuple(w.shape)}"
        )
    w = w.float()
    columns = outlying(stats.held("absmax").to(w.device), threshold, options["most"])
    values = torch.where(columns, w, 0).half().float()
    base = torch.where(columns, 0, w)
    importance = stats.importance
    q = quantize(scheme.weights_only, base, importance, Search(options["search"], options["steps"]))
    notes: tuple[str, ...] = ()
    if count := int(columns.sum()):
        values = (
            torch.where(columns, w - q.dequantize(), 0).half().float()
        )  # zero rounds to zero wherever the grid has one
        q = replace(q, sides={**q.sides, "outliers": values.to_sparse_coo()})
        bits = q.storage_bits / max(1, w.numel())
        notes = (f"{count} of {columns.numel()} input channels kept apart, {bits:.3f} bits per weight with them",)
    return Solved(q, weighted_error(w, q.dequantize(), importance), notes)


def outlying(absmax: torch.Tensor, threshold: float, most: float) -> torch.Tensor:
    """bool [cols]: inputs that reached `threshold`, the largest ones only where they would be more than the share `most`."""
    found = absmax >= threshold
    limit = int(most * absmax.numel())
    if int(found.sum()) > limit:
        found = torch.zeros_like(found)
        found[absmax.topk(limit).indices] = True
    return found


SOLVER = Solver(
    name="int8-split",
    needs=frozenset({"importance", "absmax"}),
    outliers=True,
    solve=solve,
    options={"threshold": 6.0, "most": 0.1, "search": "absmax", "steps": Search.steps},
    summary="LLM.int8(): columns with outlying inputs kept in f16, the rest rounded to nearest",
)
