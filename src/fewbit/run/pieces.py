"""Weights as the engine handles them: read with their transforms applied, solved in tiles of rows, joined again."""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.formats.gguf import ops
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.plan.jobs import Job
from fewbit.run.source import Source
from fewbit.solve.table import Solved


def read_weight(source: Source, job: Job) -> torch.Tensor:
    """The float tensor of a job, its transforms applied: [..., out, in]."""
    return ops.apply(job.ops, [source.read(name) for name in job.reads])


def join_rows(scheme: Scheme, shape: tuple[int, ...], tiles: list[Solved]) -> Solved:
    """One answer from the answers for tiles of rows."""
    q = cat_rows(scheme, shape, [tile.q for tile in tiles])
    loss = sum(tile.loss for tile in tiles)
    notes = tuple(dict.fromkeys(note for tile in tiles for note in tile.notes))
    return replace(tiles[0], q=q, loss=loss, notes=notes)


def cat_rows(scheme: Scheme, shape: tuple[int, ...], parts: list[QTensor]) -> QTensor:
    """Stacks quantised row tiles: codes, scales and shifts along the row dimension."""

    def joined(name: str, inner: Scheme | None) -> torch.Tensor | QTensor | None:
        stored = [getattr(part, name) for part in parts]
        if stored[0] is None or inner is None:
            return None
        if isinstance(stored[0], QTensor):
            return cat_rows(inner, scheme.block_counts(shape), stored)
        return torch.cat(stored, dim=-2)

    return QTensor(
        scheme,
        tuple(shape),
        torch.cat([part.codes for part in parts], dim=-2),
        joined("scale", scheme.scale),
        joined("code_shift", scheme.code_shift),
        joined("value_shift", scheme.value_shift),
    )
