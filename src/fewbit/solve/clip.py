"""Rounding to nearest under ranges that are searched for the least output error: the clips of AWQ (Lin et al., 2024), without its sampling.

Every span of a row (a group, or a super-block of the k-quants) tries a ladder of ranges, from the largest weight down to `tightest` of it. The
error that counts is that of the outputs over the calibration tokens: with e the rounding errors of a row and G the gram of the inputs,

    e G e^T  =  e_s G_ss e_s^T  +  2 e_s . c_s  +  rest          s: the columns of the span;  c_s = sum over the others of e_o G_os

A first pass takes each span by itself (c = 0, which is AWQ's rule). Each sweep after it goes over the spans once more with the errors of all others
as they now stand, so the error of the layer's outputs can only fall. The unclipped range and the one of least weighted squares are among the
choices.
Together with `--rewrites awq`, which finds the scales, this is the whole of AWQ, in any scheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import assemble, fit, quantize, snap
from fewbit.math.search import Params, Search
from fewbit.math.stats import Stats
from fewbit.math.tiles import require_finite
from fewbit.num.blocks import EACH
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.solve.candidates import join, separable
from fewbit.solve.gptq import stack
from fewbit.solve.table import Solved, Solver, collected


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Quantise `w` [*batch, rows, cols] (a stack shares the statistics); nothing is random, so `seed` is not used.

    Raises:
        InputError: FB-E0702 for non-finite weights, FB-E0703 when the statistics are of other channels, FB-E0704 for unsuitable options.
    """
    require_finite(w)
    stats, scheme = collected(stats), scheme.weights_only
    if options["steps"] < 1 or not 0 < options["tightest"] <= 1 or options["sweeps"] < 0:
        raise InputError("FB-E0704", f"clip wants steps >= 1, 0 < tightest <= 1 and sweeps >= 0, got {dict(options)}")
    if w.ndim < 2 or stats.channels != w.shape[-1]:
        raise InputError(
            "FB-E0703", f"statistics of {stats.channels} channels do not suit a weight of shape {tuple(w.shape)}"
        )
    gram, notes = _usable(stats.held("gram").to(w.device).float())
    parts = [_matrix(part.float(), gram, stats, scheme, options) for part in w.reshape(-1, *w.shape[-2:])]
    q = parts[0][0] if w.ndim == 2 else stack([one for one, _ in parts], tuple(w.shape))
    return Solved(q, sum(loss for _, loss in parts), notes)


def _usable(gram: torch.Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The gram, or the identity where it holds NaN or infinity."""
    if bool(torch.isfinite(gram).all()):
        return gram, ()
    why = "fallback to plain squared error: the gram of the inputs is not finite"
    return torch.eye(len(gram), device=gram.device), (why,)


def _matrix(
    w: torch.Tensor, gram: torch.Tensor, stats: Stats, scheme: Scheme, options: Mapping[str, Any]
) -> tuple[QTensor, float]:
    """(answer, output error per token) of one matrix [rows, cols]."""
    ladder = torch.linspace(1.0, options["tightest"], options["steps"]).tolist()
    importance = gram.diagonal().clamp_min(0)
    span, cols = scheme.span, w.shape[1]
    if scheme.is_leaf:
        q = quantize(scheme, w)
    elif separable(scheme) and span and cols % span == 0:
        q = _by_span(w, gram, importance, scheme, ladder, span, options["sweeps"])
    elif _rows_apart(scheme):
        q = _by_span(w, gram, importance, scheme, ladder, cols, 0)
    else:  # parameters that rows share: one ratio for all
        tried = [quantize(scheme, clamped(w, scheme, ratio), None, Search("absmax")) for ratio in ladder]
        tried.append(quantize(scheme, w, importance))
        scores = [float(output_error(one.dequantize() - w, gram).sum()) for one in tried]
        q = tried[scores.index(min(scores))]
    return q, float(output_error(q.dequantize() - w, gram).sum()) / max(1, stats.count)


def output_error(e: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: e G e^T of errors [rows, cols], not below zero."""
    return ((e @ gram) * e).sum(-1, dtype=torch.float64).clamp_min(0)


def clamped(w: torch.Tensor, scheme: Scheme, ratio: float) -> torch.Tensor:
    """Weights [rows, cols] with both ends of every block's range drawn in by a ratio."""
    if ratio >= 1:
        return w
    rows, cols = w.shape
    if scheme.blocks.flat:
        low, high = w.amin() * ratio, w.amax() * ratio
        return w.clamp(low, high)
    tiling = scheme.blocks.resolve((rows, cols))
    height, width = tiling.block_rows, tiling.block_cols
    padded = torch.nn.functional.pad(w, (0, -cols % width, 0, -rows % height))
    blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    low, high = blocks.amin((1, 3), keepdim=True) * ratio, blocks.amax((1, 3), keepdim=True) * ratio
    return blocks.clamp(low, high).reshape(padded.shape)[:rows, :cols]


def _rows_apart(scheme: Scheme) -> bool:
    """Whether every row has parameters of its own, though not by ranges of columns."""
    parts_apart = all(part.is_leaf and part.blocks == EACH for _, part in scheme.parts())
    return scheme.blocks.rows == 1 and not scheme.blocks.flat and parts_apart


@dataclass
class _Span:
    """The answer for some columns: parameters, codes [rows, span / dim] and errors [rows, span]."""

    params: Params
    codes: torch.Tensor
    error: torch.Tensor


def _by_span(
    w: torch.Tensor,
    gram: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    ladder: list[float],
    span: int,
    sweeps: int,
) -> QTensor:
    """One choice per row and span; `sweeps` passes that see what the other spans leave."""
    found: list[_Span] = []
    cuts = [slice(start, start + span) for start in range(0, w.shape[1], span)]
    for cut in cuts:
        none = torch.zeros(w.shape[0], span, device=w.device)
        found.append(_best(w[:, cut].contiguous(), gram[cut, cut], none, importance[cut], scheme, ladder))
    error = torch.cat([one.error for one in found], -1)
    for _ in range(sweeps if len(cuts) > 1 else 0):
        for k, cut in enumerate(cuts):
            others = error @ gram[:, cut] - error[:, cut] @ gram[cut, cut]
            found[k] = _best(w[:, cut].contiguous(), gram[cut, cut], others, importance[cut], scheme, ladder)
            error[:, cut] = found[k].error
    shape, pieces = tuple(w.shape), [one.params for one in found]
    params = pieces[0] if len(pieces) == 1 else join(scheme, pieces, shape)
    return assemble(scheme, shape, torch.cat([one.codes for one in found], -1), params)


def _best(
    w: torch.Tensor,
    gram: torch.Tensor,
    others: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    ladder: list[float],
) -> _Span:
    """The choice of one span [rows, span] for every row, the errors of the rest of the row given as `others`."""
    found: _Span | None = None
    least = torch.empty(0)
    fits: list[Params] = [
        fit(scheme, clamped(w, scheme, ratio).contiguous(), None, Search("absmax")) for ratio in ladder
    ]
    for params in (*fits, fit(scheme, w, importance)):
        codes = snap(scheme, w, params)
        miss = assemble(scheme, tuple(w.shape), codes, params).dequantize() - w
        loss = (miss @ gram + 2 * others).mul_(miss).sum(-1, dtype=torch.float64)
        if found is None:
            found, least = _Span(params, codes, miss), loss
            continue
        better = loss < least
        least = torch.minimum(least, loss)
        merged = {name: _rows(better, getattr(params, name), getattr(found.params, name)) for name, _ in scheme.parts()}
        found = _Span(Params(**merged), _rows(better, codes, found.codes), _rows(better, miss, found.error))
    assert found is not None, "steps >= 1"
    return found


def _rows(better: torch.Tensor, new: Any, old: Any) -> Any:
    """Row by row the new or the old: tensors [rows, n], or quantised ones whose every part is so."""
    if isinstance(new, QTensor):
        parts = {name: _rows(better, getattr(new, name), getattr(old, name)) for name, _ in new.scheme.parts()}
        return replace(new, codes=_rows(better, new.codes, old.codes), **parts)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[new.element_size()]
    mask = better.reshape(-1, *(1,) * (new.ndim - 1))
    return torch.where(mask, new.contiguous().view(bits), old.contiguous().view(bits)).view(new.dtype)


SOLVER = Solver(
    name="clip",
    needs=frozenset({"gram"}),
    solve=solve,
    options={"steps": 20, "tightest": 0.5, "sweeps": 1},
    summary="round to nearest under ranges searched group by group for the least output error (AWQ's clips)",
)
