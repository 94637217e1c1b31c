"""The feedback loop: round columns one after the other, each taking over the errors of those before it (LDLQ, GPTQ).

    objective   tr(G E H E^T),  E = w - w_hat        H: gram of the inputs;  G: gram of the loss gradients at the outputs, or identity
    factors     H = U U^T, G = V V^T, both upper     =>  |V^T E U|^2, a sum of one square per weight, settled in order

Column blocks are visited in order; inside one, with G, tiles of rows. What earlier blocks and tiles feed to a tile arrives by matrix
products; inside a tile a kernel goes weight by weight (`math.kernels.gptq`). The plain torch versions beside it (`round_block`,
`round_tile`) do the same and serve as reference and on other devices; on CUDA a Triton kernel takes the place of the first, and tiles, whose
rows wait for each other, go to the CPU.

Vector grids round `dim` columns at once: the factor is taken blockwise, so that inside a vector the nearest-vector search itself does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fewbit.math.kernels import has_triton
from fewbit.math.linalg import Feedback
from fewbit.math.rounding import nearest
from fewbit.num.grid import FloatGrid, Grid, IntGrid, VectorGrid
from fewbit.num.qtensor import code_dtype, decode_codes

WIDTH = 128  # columns of a block where groups do not ask for more
TILE = 64  # rows of a tile of the two-sided loop


@dataclass(frozen=True)
class Rounder:
    """A scalar grid as the kernels want it.

    Attributes:
        uniform: whether levels are the integers low … high and a code is its level.
        levels: float32 [n] sorted; edges: float32 [n - 1] between them; codes: int64 [n] of each level. One entry if uniform.
    """

    grid: Grid
    uniform: bool
    low: float
    high: float
    levels: torch.Tensor
    edges: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, grid: Grid) -> Rounder:
        """The rounder of a scalar grid of at most 16 bits."""
        if isinstance(grid, IntGrid):
            one = torch.zeros(1)
            return cls(grid, True, float(grid.low), float(grid.high), one, one, one.long())
        levels = grid.levels()
        finite = np.flatnonzero(np.isfinite(levels))
        values, first = np.unique(levels[finite], return_index=True)
        edges = ((values[1:] + values[:-1]) / 2).astype(np.float32)
        codes = finite[first]
        if isinstance(grid, FloatGrid) and grid.bits == 16:
            codes = codes.astype(np.uint16).astype(np.int16).astype(np.int64)
        low, high = float(values[0]), float(values[-1])
        return cls(
            grid,
            False,
            low,
            high,
            torch.from_numpy(values.astype(np.float32)),
            torch.from_numpy(edges),
            torch.from_numpy(codes),
        )

    def final_codes(self, index: torch.Tensor) -> torch.Tensor:
        """Level indices (codes already, if uniform) to codes as stored."""
        return (index if self.uniform else self.codes.to(index.device)[index.long()]).to(code_dtype(self.grid))


@dataclass(frozen=True)
class Parameters:
    """Candidate parameters of the groups of some columns, as numbers.

    Attributes:
        scale, zero, shift: float32 [rows, groups, candidates]: value = (level - zero) * scale + shift.
        gid: int32 [cols]: the group of each column.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    shift: torch.Tensor
    gid: torch.Tensor

    def cpu(self) -> Parameters:
        return Parameters(self.scale.cpu(), self.zero.cpu(), self.shift.cpu(), self.gid.cpu())

    def filled(self, count: int) -> Parameters:
        """The same with the first candidate repeated up to `count`, if there is any choice at all."""
        missing = count - self.scale.shape[2]
        if self.scale.shape[2] == 1 or missing <= 0:
            return self
        scale, zero, shift = (
            torch.cat([part, part[..., :1].expand(-1, -1, missing)], -1) for part in (self.scale, self.zero, self.shift)
        )
        return Parameters(scale, zero, shift, self.gid)


@dataclass
class Block:
    """The part of the loop's state that rounding one block reads and writes; rows may be a tile.

    Attributes:
        w: float32 [rows, cols], wanted weights; x: the same with feedback so far, used up.
        upper: float32 [cols, cols]; weight: float32 [cols].
        codes: int32 [rows, cols]; out: float32 [rows, cols]; choice: int32 [rows, groups]; loss: float64 [rows].
    """

    w: torch.Tensor
    x: torch.Tensor
    upper: torch.Tensor
    weight: torch.Tensor
    params: Parameters
    codes: torch.Tensor
    out: torch.Tensor
    choice: torch.Tensor
    loss: torch.Tensor

    def rows(self, a: int, b: int) -> Block:
        p = self.params
        params = Parameters(p.scale[a:b], p.zero[a:b], p.shift[a:b], p.gid)
        mine = (self.codes[a:b], self.out[a:b], self.choice[a:b], self.loss[a:b])
        return Block(self.w[a:b], self.x[a:b], self.upper, self.weight, params, *mine)


def round_block(rounder: Rounder, block: Block) -> None:
    """Round a block in plain torch, all rows at once: the reference for `kernels.gptq.round_rows`."""
    cols, gid = block.x.shape[1], block.params.gid.tolist()
    for j in range(cols):
        if block.params.scale.shape[2] > 1 and (j == 0 or gid[j] != gid[j - 1]):
            end = next((k for k in range(j, cols) if gid[k] != gid[j]), cols)
            block.choice[:, gid[j]] = _best_candidate(rounder, block, j, end)
        pick = block.choice[:, gid[j], None].long()
        p = [
            part[:, gid[j]].gather(1, pick)[:, 0]
            for part in (block.params.scale, block.params.zero, block.params.shift)
        ]
        index, value = _decode(rounder, block.x[:, j], *p)
        block.codes[:, j], block.out[:, j] = index, value
        block.loss += block.weight[j] * (block.x[:, j] - value).double().square()
        block.x[:, j + 1 :] += (block.w[:, j] - value)[:, None] * block.upper[j, j + 1 :]


def _best_candidate(rounder: Rounder, block: Block, start: int, end: int) -> torch.Tensor:
    """int32 [rows]: the candidate with which columns start … end of one group lose least."""
    g = int(block.params.gid[start])
    parts = [part[:, g] for part in (block.params.scale, block.params.zero, block.params.shift)]  # [rows, candidates]
    x = block.x[:, None, start:end].repeat(1, parts[0].shape[1], 1)
    loss = torch.zeros_like(parts[0])
    for j in range(end - start):
        _, value = _decode(rounder, x[:, :, j], *parts)
        loss += block.weight[start + j] * (x[:, :, j] - value).square()
        error = block.w[:, start + j, None] - value
        x[:, :, j + 1 :] += error[..., None] * block.upper[start + j, start + j + 1 : end]
    return loss.argmin(1).to(torch.int32)


def _decode(
    rounder: Rounder, x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(level index, value) nearest to x, elementwise."""
    u = torch.where(s == 0, z, (x - v) / torch.where(s == 0, 1, s) + z)
    if rounder.uniform:
        level = index = u.round().clamp(rounder.low, rounder.high)
    else:
        index = torch.bucketize(u, rounder.edges.to(u.device))
        level = rounder.levels.to(u.device)[index]
    return index.to(torch.int32), (level - z) * s + v


def round_tile(rounder: Rounder, block: Block, across: torch.Tensor, rows: Feedback) -> None:
    """Round a tile row by row in plain torch, with feedback between rows: the reference for `kernels.gptq.round_tile`."""
    for i in range(block.x.shape[0]):
        one = block.rows(i, i + 1)
        one.x += rows.upper[:i, i] @ across[:i]
        fed = one.x[0] - across[i]
        round_block(rounder, one)
        across[i] = one.x[0] - fed + one.w[0] - one.out[0]
        one.loss *= float(rows.pivot[i]) ** 2


def _kernel_block(
    rounder: Rounder, block: Block, across: torch.Tensor | None = None, rows: Feedback | None = None
) -> None:
    """`round_block`, or with `rows` `round_tile`, by the compiled kernel (CPU)."""
    from fewbit.math.kernels import gptq

    p = block.params.filled(gptq.LANES)
    arrays = [t.contiguous().numpy() for t in (block.upper, block.weight, p.scale, p.zero, p.shift, p.gid)]
    grid = (
        rounder.uniform,
        np.float32(rounder.low),
        np.float32(rounder.high),
        rounder.levels.numpy(),
        rounder.edges.numpy(),
    )
    written = [t.numpy() for t in (block.codes, block.out, block.choice, block.loss)]
    wx = (block.w.numpy(), block.x.numpy())
    if rows is None or across is None:
        gptq.round_rows(*wx, *arrays, *grid, *written)
    else:
        across_rows = (across.numpy(), rows.upper.contiguous().numpy(), rows.pivot.square().numpy())
        gptq.round_tile(*wx, *across_rows, *arrays, *grid, *written)


def _triton_block(rounder: Rounder, block: Block) -> None:
    """`round_block` by the Triton kernel (CUDA)."""
    from fewbit.math.kernels import gptq_triton

    p = block.params
    grid = (rounder.uniform, rounder.low, rounder.high, rounder.levels, rounder.edges)
    written = (block.codes, block.out, block.choice, block.loss)
    gptq_triton.round_rows(
        block.w, block.x, block.upper, block.weight, p.scale, p.zero, p.shift, p.gid, *grid, *written
    )


@dataclass
class Outcome:
    """What the loop found, in visiting order.

    Attributes:
        codes: of the grid's code dtype [rows, cols / dim].
        w, error: float32 [rows, cols], the wanted weights and how much they are above the values that the codes stand for.
        loss: the objective, damping included.
    """

    codes: torch.Tensor
    w: torch.Tensor
    error: torch.Tensor
    loss: float

    @property
    def out(self) -> torch.Tensor:
        """The values that the codes stand for."""
        return self.w - self.error


# (first column, end, x = wanted weights with the feedback of all earlier columns [rows, cols], weight [cols]) -> candidates
Provide = Callable[[int, int, torch.Tensor, torch.Tensor], Parameters]
# (first column, end, choice [rows, groups] of the candidates provided) -> None
Chosen = Callable[[int, int, torch.Tensor], None]


def run_loop(
    grid: Grid,
    w: torch.Tensor,
    columns: Feedback,
    provide: Provide,
    chosen: Chosen,
    *,
    width: int = WIDTH,
    rows: Feedback | None = None,
    plain: bool = False,
) -> Outcome:
    """Round all columns of `w` in order.

    Args:
        grid: any grid; vector grids round `dim` columns at once (and take no `rows`).
        w: float32 [rows, cols], the wanted weights, columns in visiting order.
        columns: factor of the inputs' gram in the same order.
        provide, chosen: where parameters come from, and who is told which candidates were taken.
        width: columns of a block.
        rows: factor of the outputs' gram, for two-sided feedback.
        plain: use plain torch instead of the compiled kernel.
    """
    fused = w.device.type == "cuda" and has_triton() and rows is None
    apart = w.device.type != "cpu" and not plain and not fused  # by the CPU's kernel, for want of one for the device
    if apart and rows is not None:
        rows = replace(rows, upper=rows.upper.cpu(), pivot=rows.pivot.cpu(), dead=rows.dead.cpu())
    dim = grid.dim
    codes = torch.empty(w.shape[0], w.shape[1] // dim, dtype=code_dtype(grid), device=w.device)
    error, loss = torch.zeros_like(w), 0.0
    rounder: Rounder | None = None
    if isinstance(grid, VectorGrid):
        columns = columns.blockwise(dim)
    for start in range(0, w.shape[1], width):
        end = min(start + width, w.shape[1])
        wanted = w[:, start:end].contiguous()
        fed = error[:, :start] @ columns.upper[:start, start:end]  # [rows, width]
        weight = columns.pivot[start:end].square()
        upper = columns.upper[start:end, start:end]
        params = provide(start, end, wanted + fed, weight)
        if isinstance(grid, VectorGrid):
            found, out, part = _round_vectors(grid, wanted, wanted + fed, upper, weight, params)
        else:
            rounder = Rounder.of(grid) if rounder is None else rounder
            w_in, fed, upper, weight = (t.cpu() if apart else t for t in (wanted, fed, upper, weight))
            params = params.cpu() if apart else params
            found, out, part, choice = _round_scalars(rounder, w_in, fed, upper, weight, params, rows, plain)
            found, out, choice = (t.to(w.device) for t in (found, out, choice))
            chosen(start, end, choice)
        codes[:, start // dim : end // dim] = found
        error[:, start:end] = wanted - out
        loss += part
    return Outcome(codes, w, error, loss)


def _round_scalars(
    rounder: Rounder,
    w: torch.Tensor,
    fed: torch.Tensor,
    upper: torch.Tensor,
    weight: torch.Tensor,
    params: Parameters,
    rows: Feedback | None,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """One block of columns -> (codes, values, loss, choice)."""
    count, device = w.shape[0], w.device
    index = torch.empty(w.shape, dtype=torch.int32, device=device)
    choice = torch.zeros(params.scale.shape[:2], dtype=torch.int32, device=device)
    loss = torch.zeros(count, dtype=torch.float64, device=device)
    block = Block(w, w + fed, upper, weight, params, index, torch.empty_like(w), choice, loss)
    if rows is None:
        (round_block if plain else _triton_block if device.type == "cuda" else _kernel_block)(rounder, block)
    else:
        for a in range(0, count, TILE):
            b = min(a + TILE, count)
            block.x[a:b] += rows.upper[:a, a:b].T @ fed[:a]
            tile = Feedback(rows.upper[a:b, a:b], rows.pivot[a:b], rows.dead[a:b], rows.damping)
            (round_tile if plain else _kernel_block)(rounder, block.rows(a, b), fed[a:b], tile)
    return rounder.final_codes(index), block.out, float(loss.sum()), choice


def _round_vectors(
    grid: VectorGrid, w: torch.Tensor, x: torch.Tensor, upper: torch.Tensor, weight: torch.Tensor, params: Parameters
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One block of columns, `dim` at once -> (codes, values, loss)."""
    dim = grid.dim
    codes = torch.empty(x.shape[0], x.shape[1] // dim, dtype=code_dtype(grid), device=x.device)
    out, loss = torch.empty_like(x), 0.0
    gid = params.gid.long()
    for j in range(0, x.shape[1], dim):
        cut = slice(j, j + dim)
        s, z, v = (part[:, gid[cut], 0] for part in (params.scale, params.zero, params.shift))
        u = torch.where(s == 0, z, (x[:, cut] - v) / torch.where(s == 0, 1, s) + z)
        code = nearest(grid, u, weight[cut] * s.square())
        value = (decode_codes(grid, code) - z) * s + v
        codes[:, j // dim : j // dim + 1], out[:, cut] = code, value
        loss += float(((x[:, cut] - value).square() * weight[cut]).double().sum())
        x[:, j + dim :] += (w[:, cut] - value) @ upper[cut, j + dim :]
    return codes, out, loss
