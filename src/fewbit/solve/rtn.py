"""Round to nearest, with scale search.

The scales come from `fit` (plain range, percentile, clip search or importance-weighted least squares), every weight takes the nearest
code. Works without calibration; where the mean squares of the inputs are known they weigh the errors. `search=native` is the plain range in
the arithmetic of the checkpoint's own dtype, the bytes that llm-compressor writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewbit.math import native
from fewbit.math.metrics import weighted_error
from fewbit.math.scales import Search, quantize_scored
from fewbit.math.stats import Stats
from fewbit.num.scheme import Scheme
from fewbit.solve.table import WORDS, Solved, Solver


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Round `w` [*batch, rows, cols] to nearest under searched scales; `seed` is not used."""
    importance = stats.importance if stats is not None else None
    if options["search"] == "native":
        q = native.quantize(scheme.weights_only, w)
        return Solved(q, weighted_error(w, q.dequantize(), importance))
    search = Search(method=options["search"], steps=options["steps"], percentile=options["percentile"])
    return Solved(*quantize_scored(scheme.weights_only, w, importance, search))


SOLVER = Solver(
    name="rtn",
    needs=frozenset(),
    solve=solve,
    options={"search": "lsq", "steps": Search.steps, "percentile": Search.percentile},
    words={"search": (*WORDS["search"], "native")},
    summary="round to nearest with scale search (absmax, minmax, percentile, mse, lsq, native); no calibration needed",
)

WEIGHTED = Solver(
    name="imatrix",
    needs=frozenset({"importance"}),
    solve=solve,
    options={"search": "lsq", "steps": Search.steps, "percentile": Search.percentile},
    summary="round to nearest, errors weighted by the mean square of each input (what llama.cpp calls an importance matrix)",
)
