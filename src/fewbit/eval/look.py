"""A closer look at some candidates of a study: layers, one tensor's weights and codes, the most damaged tokens. Plain data for the report."""

from __future__ import annotations

import math
from typing import Any

import torch

from fewbit.base.record import plain
from fewbit.eval.layers import LayerReport, damaged_tokens, layer_report
from fewbit.eval.stream import FloatSource, Runner
from fewbit.eval.windows import Windows
from fewbit.run.calib import Tokens

LAYER_TOKENS = 1024
BINS = 72


def look(
    base: Runner, candidate: Runner, chosen: Windows, per_token: dict[str, torch.Tensor], tokenizer: Tokens, say: Any
) -> dict[str, Any]:
    """{"layers": …, "damaged": …, "tensor": …} of one candidate."""
    few = chosen.head(max(1, LAYER_TOKENS // chosen.tokens.shape[1]))
    found = layer_report(base, candidate, few, say=say)

    def decode(ids: list[int]) -> str:
        return tokenizer.inner.decode(ids)

    name = costliest(found)
    return {
        "layers": {**plain(found), "tokens": int(few.scored.sum())},
        "damaged": damaged_tokens(per_token, chosen, decode),
        "tensor": tensor_facts(base.source, candidate.source, name) if name else {},
    }


def costliest(found: LayerReport) -> str | None:
    """The quantised tensor with the largest share of the loss; the least SQNR where there are no shares."""
    changed = [item for item in found.tensors if item.sqnr_db is not None]
    if not changed:
        return None
    return max(changed, key=lambda item: (abs(item.share or 0.0), -(item.sqnr_db or 0.0))).name


def tensor_facts(base: FloatSource, candidate: FloatSource, name: str) -> dict[str, Any]:
    """Histograms of a tensor's weights in base and candidate, and of its codes where it has some."""
    w, w_hat = base.read(name).float().flatten(), candidate.read(name).float().flatten()
    reach = float(max(w.abs().max(), w_hat.abs().max())) or 1.0
    spread = min(reach, 6 * float(w.std()) or reach)
    found: dict[str, Any] = {
        "tensor": name,
        "low": -spread,
        "high": spread,
        "base": torch.histc(w, BINS, -spread, spread).tolist(),
        "candidate": torch.histc(w_hat, BINS, -spread, spread).tolist(),
    }
    qtensor = getattr(candidate, "qtensor", None)
    q = qtensor(name) if qtensor is not None else None
    if q is None or q.scheme.grid.dim != 1 or float(q.scheme.grid.bits) > 8:
        return found
    codes = q.codes.flatten().long()
    low, high = int(codes.min()), int(codes.max())
    counts = torch.bincount(codes - low).double()
    shares = counts[counts > 0] / counts.sum()
    bits = float(q.scheme.grid.bits)
    return {
        **found,
        "codes": counts.tolist(),
        "codes_low": low - 0.5,
        "codes_high": high + 0.5,
        "codes_used": int((counts > 0).sum()),
        "codes_possible": round(2**bits),
        "entropy": float(-(shares * shares.log()).sum() / math.log(2)),
        "bits": bits,
    }
