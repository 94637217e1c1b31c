"""Coordinate descent after the feedback loop: every code and every stored parameter once more, against the true quadratic.

The loop settles each weight knowing only the earlier ones. Here all are known: with everything else held, the loss tr(G E H E^T) is a
parabola in one weight (or in one group's scale and shift), so its best representable place is exact and each step can only lower the loss.
Blocks of columns take turns; the slopes of a block come from all the errors there are by one matrix product when its turn comes.

Of the whole weight only its wanted values, its errors and its codes are held; what else a block needs is made when its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fewbit.math.search import Params
from fewbit.num.qtensor import decode_codes
from fewbit.num.scheme import Scheme
from fewbit.solve.candidates import FINE, NAMES, Candidates, groups_of, neighbours, only
from fewbit.solve.gptq_loop import TILE, WIDTH, Parameters, Rounder

WIDEST = 1024  # columns of the largest group whose parameters are tuned
PART = 1024  # columns whose losses are summed at once
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
        return self.loss_of(values - self.w)

    def loss_of(self, missing: torch.Tensor) -> float:
        """The loss of the errors E = `missing` [rows, cols]; block by block, so that no second tensor of that size is made."""
        cuts = [slice(a, a + PART) for a in range(0, missing.shape[1], PART)]
        return self.unit * sum(float((self.slope(missing, cut) * missing[:, cut]).double().sum()) for cut in cuts)


@dataclass
class State:
    """What sweeps improve.

    Attributes:
        index: level indices (see `Rounder`) [rows, cols], of the smallest dtype that holds them.
        missing: float32 [rows, cols], values minus wanted weights.
        params: as stored.
    """

    index: torch.Tensor
    missing: torch.Tensor
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
    state = _start(scheme, rounder, codes, params, problem.w)
    for _ in range(sweeps):
        if _pass(scheme, rounder, state, problem, tune) <= ENOUGH * codes.numel():
            break
    return rounder.final_codes(state.index), state.params, problem.loss_of(state.missing)


def _moved(params: Params, device: torch.device | str) -> Params:
    parts = {name: getattr(params, name) for name in NAMES}
    return Params(**{name: None if part is None else part.to(device) for name, part in parts.items()})


def _start(scheme: Scheme, rounder: Rounder, codes: torch.Tensor, params: Params, wanted: torch.Tensor) -> State:
    shape, small = tuple(codes.shape), torch.uint8 if len(rounder.levels) <= 256 else torch.int32
    index = codes.clone() if rounder.uniform else torch.empty(shape, dtype=small)
    missing = torch.empty_like(wanted)
    make = only(scheme, params, shape)
    for start, end in _ranges(scheme, shape):
        cut = slice(start, end)
        level = decode_codes(scheme.grid, codes[:, cut].contiguous())
        if not rounder.uniform:
            index[:, cut] = torch.searchsorted(rounder.levels, level).to(index.dtype)
        missing[:, cut] = _values(level, make.numbers(start, end)) - wanted[:, cut]
    return State(index, missing, params)


def _values(level: torch.Tensor, p: Parameters) -> torch.Tensor:
    """What levels [rows, cols] stand for under the first of the candidates."""
    s, z, v = (part[:, p.gid.long(), 0] for part in (p.scale, p.zero, p.shift))
    return (level - z) * s + v


def _pass(scheme: Scheme, rounder: Rounder, state: State, problem: Quadratic, tune: bool) -> int:
    """One pass over all columns, each block with slopes computed afresh; -> codes changed."""
    shape = tuple(state.missing.shape)
    make = neighbours(scheme, state.params, shape, FINE) if tune else only(scheme, state.params, shape)
    choices: list[torch.Tensor] = []
    changed = 0
    for start, end in _ranges(scheme, shape):
        cut, p = slice(start, end), make.numbers(start, end)
        index = state.index[:, cut].to(torch.int32, memory_format=torch.contiguous_format)
        level = index.float() if rounder.uniform else rounder.levels[index.long()]
        held = [_values(level, p), problem.slope(state.missing, cut), level, index]
        picked = torch.zeros(p.scale.shape[:2], dtype=torch.int32)
        changed += _block(rounder, held, problem.metric(cut), problem.outer, [p.scale, p.zero, p.shift], p.gid, picked)
        state.index[:, cut] = index.to(state.index.dtype)
        torch.sub(held[0], problem.w[:, cut], out=state.missing[:, cut])
        choices.append(picked)
    if tune:
        state.params = make.pick(torch.cat(choices, dim=1))
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
