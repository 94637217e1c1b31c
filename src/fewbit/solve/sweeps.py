"""Coordinate descent after the feedback loop: every code and every stored parameter once more, against the true quadratic.

The loop settles each weight knowing only the earlier ones. Here all are known: with everything else held, the loss tr(G E H E^T) is a
parabola in one weight (or in one group's scale and shift), so its best representable place is exact and each step can only lower the loss.
Blocks of columns take turns; what a block's moves do to the slopes elsewhere arrives by one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fewbit.math.search import Params
from fewbit.num.qtensor import decode_codes
from fewbit.num.scheme import Scheme
from fewbit.solve.candidates import FINE, Candidates, groups_of, neighbours, only
from fewbit.solve.gptq_loop import TILE, WIDTH, Rounder

WIDEST = 1024  # columns of the largest group whose parameters are tuned
ENOUGH = 2e-3  # stop when a sweep lowers the loss by less than this share


@dataclass(frozen=True)
class Quadratic:
    """tr(G E H E^T), E = values - w.

    Attributes:
        w: float32 [rows, cols], the wanted weights.
        gram: float32 [cols, cols], damped; outer: float32 [rows, rows], damped, or None for the identity; both of mean diagonal about one.
        unit: what a loss of one stands for in the units of the statistics.
    """

    w: torch.Tensor
    gram: torch.Tensor
    outer: torch.Tensor | None = None
    unit: float = 1.0

    def slope(self, values: torch.Tensor) -> torch.Tensor:
        """Half the gradient over `unit`: G E H, float32 [rows, cols]."""
        moved = (values - self.w) @ self.gram
        return moved if self.outer is None else self.outer @ moved

    def loss(self, values: torch.Tensor, slope: torch.Tensor | None = None) -> float:
        slope = self.slope(values) if slope is None else slope
        return self.unit * float(((values - self.w).double() * slope).sum())


@dataclass
class State:
    """What sweeps improve: level indices (see `Rounder`), their levels and values [rows, cols], the parameters and the loss."""

    index: torch.Tensor
    level: torch.Tensor
    value: torch.Tensor
    params: Params
    loss: float


def sweep(
    scheme: Scheme, codes: torch.Tensor, params: Params, problem: Quadratic, *, sweeps: int, tune: bool
) -> tuple[torch.Tensor, Params, float]:
    """Improve codes and parameters by up to `sweeps` passes.

    Args:
        scheme: scalar grid, a scale, groups within rows.
        codes: [rows, cols] in the order of the tensor; params: as stored.
        tune: whether scales and shifts may move as well as codes (needs `candidates.by_row`).

    Returns:
        (codes, params, loss), the loss that of `problem`.
    """
    rounder = Rounder.of(scheme.grid)
    tune = tune and _group_size(scheme, tuple(codes.shape)) <= WIDEST
    state = _start(scheme, rounder, codes, params)
    slope = problem.slope(state.value)
    state.loss = problem.loss(state.value, slope)
    for _ in range(sweeps):
        before = state.loss
        slope = _pass(scheme, rounder, state, slope, problem, tune)
        state.loss = problem.loss(state.value, slope)
        if before - state.loss <= ENOUGH * abs(before):
            break
    return rounder.final_codes(state.index), state.params, state.loss


def _start(scheme: Scheme, rounder: Rounder, codes: torch.Tensor, params: Params) -> State:
    level = decode_codes(scheme.grid, codes).contiguous()
    if rounder.uniform:
        index = codes.to(torch.int32)
    else:
        index = torch.searchsorted(rounder.levels, level).to(torch.int32)
    shape = tuple(codes.shape)
    p = only(scheme, params, shape).numbers()
    s, z, v = (part[:, p.gid.long(), 0] for part in (p.scale, p.zero, p.shift))
    return State(index.contiguous(), level, ((level - z) * s + v).contiguous(), params, 0.0)


def _pass(
    scheme: Scheme, rounder: Rounder, state: State, slope: torch.Tensor, problem: Quadratic, tune: bool
) -> torch.Tensor:
    """One pass over all columns; -> the slope afterwards, computed afresh so that rounding does not add up."""
    shape = tuple(state.value.shape)
    make = neighbours(scheme, state.params, shape, FINE) if tune else only(scheme, state.params, shape)
    numbers = make.numbers()
    choice = torch.zeros(numbers.scale.shape[:2], dtype=torch.int32)
    for start, end in _ranges(scheme, shape):
        before = state.value[:, start:end].clone()
        groups = numbers.gid[start:end]
        g0, g1 = int(groups[0]), int(groups[-1]) + 1
        parts = [part[:, g0:g1].contiguous() for part in (numbers.scale, numbers.zero, numbers.shift)]
        cut = slice(start, end)
        held = [t[:, cut].contiguous() for t in (state.value, slope, state.level, state.index)]
        picked = choice[:, g0:g1].contiguous()
        _block(
            rounder, held, problem.gram[cut, cut].contiguous(), problem.outer, parts, (groups - g0).contiguous(), picked
        )
        for whole, part in zip((state.value, state.level, state.index), (held[0], held[2], held[3]), strict=True):
            whole[:, cut] = part
        choice[:, g0:g1] = picked
        moved = (state.value[:, cut] - before) @ problem.gram[cut]
        slope = slope + (moved if problem.outer is None else problem.outer @ moved)
    if tune:
        state.params = make.pick(choice)
    return problem.slope(state.value)


def _block(
    rounder: Rounder,
    held: list[torch.Tensor],
    gram: torch.Tensor,
    outer: torch.Tensor | None,
    parts: list[torch.Tensor],
    gid: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    """Coordinate descent over one block; held = value, slope, level, index [rows, cols], written in place."""
    from fewbit.math.kernels import gptq_sweeps

    rows = held[0].shape[0]
    grid = (
        rounder.uniform,
        np.float32(rounder.low),
        np.float32(rounder.high),
        rounder.levels.numpy(),
        rounder.edges.numpy(),
    )
    changed = np.zeros(rows, np.int64)
    if outer is None:
        gptq_sweeps.sweep_rows(
            *(t.numpy() for t in held),
            gram.numpy(),
            *(p.numpy() for p in parts),
            gid.numpy(),
            choice.numpy(),
            *grid,
            changed,
        )
        return
    for a in range(0, rows, TILE):
        b = min(a + TILE, rows)
        tile = [t[a:b] for t in held]
        before = tile[0].clone()
        inner = outer[a:b, a:b].contiguous().numpy()
        gptq_sweeps.sweep_tile(
            *(t.numpy() for t in tile),
            gram.numpy(),
            inner,
            *(p[a:b].numpy() for p in parts),
            gid.numpy(),
            choice[a:b].numpy(),
            *grid,
            changed[a:b],
        )
        moved = (tile[0] - before) @ gram
        for c, d in ((0, a), (b, rows)):
            held[1][c:d] += outer[c:d, a:b] @ moved


def _ranges(scheme: Scheme, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Column ranges of about `WIDTH` that hold whole groups."""
    size = _group_size(scheme, shape)
    size = 1 if size > WIDEST else size
    width = min(shape[1], size * max(1, WIDTH // size))
    return [(a, min(a + width, shape[1])) for a in range(0, shape[1], width)]


def _group_size(scheme: Scheme, shape: tuple[int, ...]) -> int:
    gid = groups_of(scheme, shape)[1]
    return int((gid == gid[0]).sum())


__all__ = ["Candidates", "Quadratic", "sweep"]
