"""Rotations of the residual stream (R1) and of the values per head (R2), after QuaRot (Ashkboos et al., 2024).

Outliers of single channels are spread over all: a Hadamard matrix with random signs mixes each channel into every other with equal weight.
Folded into the weights on both sides, so nothing remains at run time. Under LayerNorm the matrix keeps the vector of ones, so that taking
off the mean still does what it did; no norm needs replacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fewbit.arch.rewrite import Steps, absorb, merge, turn
from fewbit.arch.rewrite_spaces import Spaces
from fewbit.base.errors import InputError
from fewbit.math.hadamard import order_parts, random_signs, rotate


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Q^T = diag(signs) H / sqrt(n); `signs` float [n]."""

    signs: torch.Tensor

    @property
    def size(self) -> int:
        return self.signs.numel()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x * self.signs.to(x))


@dataclass(frozen=True, eq=False)
class Dense:
    """Q given as a matrix, float64 [n, n]."""

    matrix: torch.Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T.to(x)


@dataclass(frozen=True, eq=False)
class KeepsMean:
    """Q with Q 1 = 1: the reflection that takes 1/sqrt(n) to the first axis, a rotation of the other axes, and back.

    inner: order n - 1.
    """

    inner: Hadamard | Dense

    @property
    def size(self) -> int:
        return self.inner.size + 1

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        mirrored = self._reflect(x)
        return self._reflect(torch.cat([mirrored[..., :1], self.inner.apply(mirrored[..., 1:])], dim=-1))

    def _reflect(self, x: torch.Tensor) -> torch.Tensor:
        normal = torch.full((self.size,), self.size**-0.5, dtype=torch.float64)
        normal[0] -= 1.0
        normal = (normal / normal.norm()).to(x)
        return x - 2 * (x @ normal).unsqueeze(-1) * normal


Rotation = Hadamard | Dense | KeepsMean


def random_orthogonal(n: int, seed: int) -> Dense:
    """A random orthogonal matrix of any order, float64, the same on every machine of one torch version."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Dense(q * r.diagonal().sign())


def rotation(n: int, seed: int, *, keep_mean: bool = False) -> Rotation:
    """A Hadamard matrix with random signs where the order has one, else a random orthogonal matrix."""
    if keep_mean:
        inner = rotation(n - 1, seed)
        assert not isinstance(inner, KeepsMean)
        return KeepsMean(inner)
    return Hadamard(random_signs(n, seed)) if order_parts(n) is not None else random_orthogonal(n, seed)


def rotate_residual(found: Spaces, q: Rotation, norms: dict[str, torch.Tensor]) -> Steps:
    """The residual stream turned by q, the gains of all norms that read it absorbed.

    Args:
        found: spaces of the model, its head no longer tied to the embedding.
        q: of the stream's order; must keep the mean for LayerNorm.
        norms: name -> stored weight or bias of every norm of the spaces, float64 [size].

    Raises:
        InputError: FB-E0740 when the stream cannot be rotated.
    """
    resid = found.one("resid")
    if found.off or found.no_rotation or resid is None or found.family is None:
        raise InputError("FB-E0740", found.off or found.no_rotation or "the residual stream is not described")
    if found.family.norm == "layer" and not isinstance(q, KeepsMean):
        raise InputError("FB-E0740", "under LayerNorm a rotation must keep the mean")
    offset = found.family.norm_offset
    parts = [turn(resid, q)]
    for space in found.all:
        if space.gains:
            gain = norms[space.gains[0]] + offset
            shift = norms[space.shifts[0]] if space.shifts else None
            parts.append(absorb(space, gain, q, shift, offset))
    return merge(*parts)


def value_rotations(found: Spaces, seed: int) -> dict[str, Rotation]:
    """One rotation per layer for the values of its heads, by the key of the space."""
    return {
        space.key: rotation(space.head, seed + 1 + (space.layer or 0))
        for space in found.all
        if space.kind == "attn_v" and space.writers
    }


def rotate_values(found: Spaces, rotations: Mapping[str, Rotation]) -> Steps:
    """The values of every head turned by one matrix per layer (R2)."""
    spaces = [space for space in found.all if space.kind == "attn_v" and space.key in rotations]
    return merge(*(turn(space, rotations[space.key]) for space in spaces))


def dense(q: Rotation) -> Dense:
    """A rotation as a matrix, float64; of one that keeps the mean, the part that is free (order n - 1)."""
    if isinstance(q, KeepsMean):
        return dense(q.inner)
    return q if isinstance(q, Dense) else Dense(q.apply(torch.eye(q.size, dtype=torch.float64)).T.contiguous())
