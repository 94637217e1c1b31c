"""Coordinate descent after the feedback loop: every code and every stored parameter once more, against the true quadratic.

The loop settles each weight knowing only the earlier ones. Here all are known: with everything else held, the loss tr(G E H E^T) is a
parabola in one weight (or in one group's scale and shift), so its best representable place is exact and each step can only lower the loss.
Blocks of columns take turns; the slopes of a block come from all the errors there are by one matrix product when its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fewbit.math.search import Params
from fewbit.num.qtensor import decode_codes
from fewbit.num.scheme import Scheme
from fewbit.solve.candidates import FINE, NAMES, Candidates, groups_of, neighbours, only
from fewbit.solve.gptq_loop import TILE, WIDTH, Rounder

WIDEST = 1024  # columns of the largest group whose parameters are tuned
ENOUGH = 5e-4  # stop when a sweep changes no more than this share of the codes


@dataclass(frozen=True)
class Quadratic:
    """tr(G E H E^T), E = values - w, with H = share * gram + ridge * identity.

    Attributes:
        w: float32 [rows, cols], the wanted weights.
        gram: floating [cols, cols], as it was collected: a large one is not copied.
        outer: float32 [rows, rows], damped, or None for the identity. H and it have a mean diagonal of about one.
        unit: what a loss of one stands for in the units of the statistics.
        share, ridge: of H.
    """

    w: torch.Tensor
    gram: torch.Tensor
    outer: torch.Tensor | None = None
    unit: float = 1.0
    share: float = 1.0
    ridge: float = 0.0

    def metric(self, cut: slice) -> torch.Tensor:
        """H of some columns, float32 [n, n]."""
        found = self.gram[cut, cut].float() * self.share
        found.diagonal().add_(self.ridge)
        return found

    def slope(self, missing: torch.Tensor, cut: slice = slice(None)) -> torch.Tensor:
        """Half the gradient over `unit`, of some columns: G E H for E = `missing` [rows, cols], float32 [rows, n]."""
        moved = (missing @ self.gram[:, cut].float()).mul_(self.share).add_(missing[:, cut], alpha=self.ridge)
        return moved if self.outer is None else self.outer @ moved

    def loss(self, values: torch.Tensor) -> float:
        missing = values - self.w
        return self.unit * float(self.slope(missing).mul_(missing).sum(dtype=torch.float64))


@dataclass
class State:
    """What sweeps improve: level indices (see `Rounder`), their levels and values [rows, cols], and the parameters."""

    index: torch.Tensor
    level: torch.Tensor
    value: torch.Tensor
    params: Params


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
    device = codes.device
    if device.type != "cpu":  # the kernels are the CPU's
        outer = None if problem.outer is None else problem.outer.cpu()
        home = replace(problem, w=problem.w.cpu(), gram=problem.gram.cpu(), outer=outer)
        found, kept, loss = sweep(scheme, codes.cpu(), _moved(params, "cpu"), home, sweeps=sweeps, tune=tune)
        return found.to(device), _moved(kept, device), loss
    rounder = Rounder.of(scheme.grid)
    tune = tune and _group_size(scheme, tuple(codes.shape)) <= WIDEST
    state = _start(scheme, rounder, codes, params)
    for _ in range(sweeps):
        if _pass(scheme, rounder, state, problem, tune) <= ENOUGH * codes.numel():
            break
    return rounder.final_codes(state.index), state.params, problem.loss(state.value)


def _moved(params: Params, device: torch.device | str) -> Params:
    parts = {name: getattr(params, name) for name in NAMES}
    return Params(**{name: None if part is None else part.to(device) for name, part in parts.items()})


def _start(scheme: Scheme, rounder: Rounder, codes: torch.Tensor, params: Params) -> State:
    level = decode_codes(scheme.grid, codes).contiguous()
    if rounder.uniform:
        index = codes.to(torch.int32)
    else:
        index = torch.searchsorted(rounder.levels, level).to(torch.int32)
    shape = tuple(codes.shape)
    p = only(scheme, params, shape).numbers()
    s, z, v = (part[:, p.gid.long(), 0] for part in (p.scale, p.zero, p.shift))
    return State(index.contiguous(), level, ((level - z) * s + v).contiguous(), params)


def _pass(scheme: Scheme, rounder: Rounder, state: State, problem: Quadratic, tune: bool) -> int:
    """One pass over all columns, each block with slopes computed afresh; -> codes changed."""
    shape = tuple(state.value.shape)
    make = neighbours(scheme, state.params, shape, FINE) if tune else only(scheme, state.params, shape)
    numbers = make.numbers()
    choice = torch.zeros(numbers.scale.shape[:2], dtype=torch.int32)
    missing, changed = state.value - problem.w, 0
    for start, end in _ranges(scheme, shape):
        groups, cut = numbers.gid[start:end], slice(start, end)
        g0, g1 = int(groups[0]), int(groups[-1]) + 1
        parts = [part[:, g0:g1].contiguous() for part in (numbers.scale, numbers.zero, numbers.shift)]
        slope = problem.slope(missing, cut)
        held = [state.value[:, cut].contiguous(), slope, *(t[:, cut].contiguous() for t in (state.level, state.index))]
        picked = choice[:, g0:g1].contiguous()
        gram, gid = problem.metric(cut), (groups - g0).contiguous()
        changed += _block(rounder, held, gram, problem.outer, parts, gid, picked)
        for whole, part in zip((state.value, state.level, state.index), (held[0], *held[2:]), strict=True):
            whole[:, cut] = part
        choice[:, g0:g1] = picked
        torch.sub(held[0], problem.w[:, cut], out=missing[:, cut])
    if tune:
        state.params = make.pick(choice)
    return changed


def _block(
    rounder: Rounder,
    held: list[torch.Tensor],
    gram: torch.Tensor,
    outer: torch.Tensor | None,
    parts: list[torch.Tensor],
    gid: torch.Tensor,
    choice: torch.Tensor,
) -> int:
    """Coordinate descent over one block; held = value, slope, level, index [rows, cols], written in place; -> codes changed."""
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
        return int(changed.sum())
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
        held[1][b:] += outer[b:, a:b] @ moved
    return int(changed.sum())


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
