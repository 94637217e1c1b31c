"""Encoders and embedding models: do quantised embeddings point the same way, and do they rank passages in the same order?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fewbit.eval.measures import Estimate, clustered
from fewbit.eval.stream import Runner, States
from fewbit.eval.windows import Windows

TOP = 10


@dataclass(frozen=True)
class EmbeddingScore:
    """Agreement of embeddings; each measure is (value, standard error over passages).

    Attributes:
        cosine: between the base's and the candidate's embedding of a passage.
        overlap: share of the base's nearest passages that are among the candidate's; order: Spearman's correlation of all similarities.
        first: share of passages whose nearest neighbour is the same. nearest: how many neighbours `overlap` counts.
    """

    passages: int
    cosine: Estimate
    overlap: Estimate
    order: Estimate
    first: Estimate
    nearest: int


def embeddings(runner: Runner, chosen: Windows, pool: str = "mean") -> torch.Tensor:
    """Unit vectors float64 [windows, width]: hidden states after the last block, averaged, or those of the first or last token."""
    hidden = runner.hidden(chosen.tokens)
    states, rows = States(hidden), []
    for window in range(chosen.tokens.shape[0]):
        used = torch.cat([chosen.scored[window], chosen.scored[window, -1:]]).nonzero()[:, 0]
        vectors = states(window, used).double()
        rows.append(vectors.mean(0) if pool == "mean" else vectors[0 if pool == "first" else -1])
    hidden.close()
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def compare_embeddings(base: torch.Tensor, candidate: torch.Tensor, clusters: torch.Tensor) -> EmbeddingScore:
    """Agreement of two sets of unit vectors [passages, width]; each passage is a query against all others."""
    count = base.shape[0]
    near = min(TOP, max(1, (count - 1) // 3))
    others = ~torch.eye(count, dtype=torch.bool)
    wanted = (base @ base.T)[others].view(count, count - 1)
    found = (candidate @ candidate.T)[others].view(count, count - 1)
    best, chosen = wanted.topk(near, -1).indices, found.topk(near, -1).indices

    def mean(values: torch.Tensor) -> Estimate:
        return clustered(values.double(), clusters)

    return EmbeddingScore(
        passages=count,
        cosine=mean((base * candidate).sum(-1)),
        overlap=mean((best.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1).double().mean(-1)),
        order=mean(spearman(wanted, found)),
        first=mean(best[:, 0] == chosen[:, 0]),
        nearest=near,
    )


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rank correlation along the last axis; no ties are expected."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (a, b)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(-1) / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()


def embedding_table(names: list[str], found: list[EmbeddingScore]) -> dict[str, Any]:
    """The table of the report: plain data."""

    def cell(value: Estimate, scale: float = 1.0) -> dict[str, float]:
        return {"value": value[0] * scale, "stderr": value[1] * scale}

    heads = ["candidate", "cosine", f"nearest {found[0].nearest} kept, %", "same nearest, %", "rank correlation"]
    rows = [
        [name, cell(item.cosine), cell(item.overlap, 100), cell(item.first, 100), cell(item.order)]
        for name, item in zip(names, found, strict=True)
    ]
    return {
        "heads": heads,
        "rows": rows,
        "note": f"{found[0].passages} passages, each a query against all others, by mean-pooled hidden states.",
    }
