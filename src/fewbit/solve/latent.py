"""A quantised weight as something that gradients can move: float numbers beneath its codes, scales and shifts.

    values  =  (level(u) - z) s + v        u = (theta - v) / s + z        level(u) the grid's level nearest to u

`theta` are master weights; s, z and v are the stored parts, each with a float number beneath it. Gradients go through rounding as if it were
not there (straight-through); where u lies beyond the grid's ends, the weight gets none and the range all of it (arXiv 1902.08153). At the
start every master weight is the wanted weight, moved no further than into the cell of the code that it has: most lie where rounding to
nearest would take them, those that a solver pushed elsewhere lie just across the border. Nothing changes until a gradient says so.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from fewbit.math.rounding import nearest, pack_leaf, store, store_scale
from fewbit.math.scales import snap
from fewbit.math.search import Params
from fewbit.num.blocks import EACH
from fewbit.num.grid import Grid, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor, code_dtype, decode_codes, expand, values_of
from fewbit.num.scheme import Scheme

INSIDE = (
    0.25  # how far inside its cell a weight starts, in levels: nearer, the first noisy steps undo what a solver settled
)
FAR = 1e30
Gradients = dict[str, torch.Tensor]
"""Of `weights` and of each part, in units in which a step of one is a level (or the whole of a scale)."""


def learns(q: QTensor) -> bool:
    """Whether a weight can be learned: scalar codes of at most 8 bits with a scale, and nothing stored beside them that takes part."""
    grid = q.scheme.grid
    small = not isinstance(grid, VectorGrid) and grid.bits <= 8
    return small and not q.scheme.is_leaf and not set(q.sides) - {"input_scale"}


class Cells:
    """The levels of a grid, and the distance between them, as tensors."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.grid = grid
        if isinstance(grid, IntGrid):
            self.low, self.high = float(grid.low), float(grid.high)
            return
        levels = torch.tensor(grid.levels(), dtype=torch.float32, device=device)
        self.levels = levels[levels.isfinite()].unique()
        steps = self.levels.diff()
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.gaps = torch.cat([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
        self.low, self.high = float(self.levels[0]), float(self.levels[-1])

    @property
    def uniform(self) -> bool:
        return isinstance(self.grid, IntGrid)

    @property
    def reach(self) -> float:
        """Half the distance between the ends, in levels: what a zero point moves when one end of the range moves by its whole length."""
        return 2.0 ** (float(self.grid.bits) - 1)

    def nearest(self, u: torch.Tensor) -> torch.Tensor:
        return u.round().clamp_(self.low, self.high) if self.uniform else self.levels[torch.bucketize(u, self.middles)]

    def gap(self, u: torch.Tensor) -> torch.Tensor | float:
        """Distance of the levels around u."""
        return 1.0 if self.uniform else self.gaps[torch.bucketize(u, self.middles)]

    def ends(self) -> tuple[float, float]:
        """Beyond these, a number is clipped."""
        if self.uniform:
            return self.low - 0.5, self.high + 0.5
        return self.low - float(self.gaps[0]) / 2, self.high + float(self.gaps[-1]) / 2

    def into(self, u: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """u moved into the cells of the given levels; the outermost cells have no outer border."""
        if self.uniform:
            low, high = level - (0.5 - INSIDE), level + (0.5 - INSIDE)
        else:
            index = torch.bucketize(level, self.middles)
            borders = torch.cat([self.middles.new_tensor([-FAR]), self.middles, self.middles.new_tensor([FAR])])
            margin = INSIDE * self.gaps[index]
            low, high = borders[index] + margin, borders[index + 1] - margin
        low = torch.where(level <= self.low, -FAR, low)
        high = torch.where(level >= self.high, FAR, high)
        return torch.minimum(torch.maximum(u, low), high)

    def codes(self, level: torch.Tensor) -> torch.Tensor:
        return level.to(code_dtype(self.grid)) if self.uniform else nearest(self.grid, level)


class Part:
    """A stored scale or shift and the float numbers beneath it, one per block; what it is a part of sees only what can be stored."""

    def __init__(self, name: str, scheme: Scheme, stored: torch.Tensor | QTensor, counts: tuple[int, ...]) -> None:
        self.name, self.scheme, self.stored, self.counts = name, scheme, stored, counts
        values = values_of(stored)
        self.value = (expand(values, scheme, counts) if scheme.is_leaf else values).reshape(counts).float().contiguous()
        self.beneath = self.value.clone()
        self.fixed = scheme.is_leaf and scheme.blocks != EACH  # shared by blocks: stays as it is

    def move(self, step: torch.Tensor) -> None:
        if self.fixed:
            return
        self.beneath += step
        if isinstance(self.stored, QTensor):  # the outer scale stays, its codes follow
            outer = Params(self.stored.scale, self.stored.code_shift, self.stored.value_shift)
            codes = snap(self.scheme, self.beneath.reshape(self.stored.shape), outer)
            self.stored = replace(self.stored, codes=codes)
            self.value = self.stored.dequantize().reshape(self.counts)
            return
        keep = store_scale if self.name == "scale" else store
        self.value = keep(self.scheme.grid, self.beneath)
        self.stored = pack_leaf(self.scheme.grid, self.value).reshape(self.stored.shape)


class Latent:
    """One weight being learned.

    Args:
        q: where to start, of which `learns` holds. wanted: float [..., out, in], the weight that it stands for.
    """

    def __init__(self, q: QTensor, wanted: torch.Tensor) -> None:
        self.q, self.cells = q, Cells(q.scheme.grid, q.codes.device)
        self.tiling = q.scheme.blocks.resolve(q.shape)
        counts = q.scheme.block_counts(q.shape)
        self.parts = {name: Part(name, part, getattr(q, name), counts) for name, part in q.scheme.parts()}
        self.level = self._blocked(decode_codes(q.scheme.grid, q.codes))
        w = self._blocked(wanted.float())
        s, z, v = self.numbers()
        self.u = self.cells.into(torch.where(s != 0, (w - v) / s + z, self.level), self.level)
        self.theta = (self.u - z) * s + v

    def _blocked(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out, in] as [*batch, block rows, rows, block columns, columns], edges filled with zeros."""
        t = self.tiling
        x = x.reshape(t.view)
        if not t.even:
            x = torch.nn.functional.pad(x, (0, -t.cols % t.block_cols, 0, -t.rows % t.block_rows))
        return x.reshape(t.blocked)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_blocked`."""
        t = self.tiling
        if not t.even:
            x = x.reshape(*t.batch, t.grid[-2] * t.block_rows, t.grid[-1] * t.block_cols)[..., : t.rows, : t.cols]
        return x.reshape(self.q.shape)

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(s, z, v), broadcast over the blocked weights."""
        shape = (*self.tiling.grid[:-1], 1, self.tiling.grid[-1], 1)
        plain = {"scale": 1.0, "code_shift": 0.0, "value_shift": 0.0}
        scale, code_shift, value_shift = (
            self.parts[name].value.reshape(shape) if name in self.parts else self.q.codes.new_full((), x, dtype=torch.float32)
            for name, x in plain.items()
        )  # fmt: skip
        return scale, code_shift, value_shift

    def values(self) -> torch.Tensor:
        """float32 [..., out, in], exactly what `finish().dequantize()` gives."""
        s, z, v = self.numbers()
        self.u = torch.where(s != 0, (self.theta - v) / s + z, self.level)
        self.level = self.cells.nearest(self.u)
        return self._whole((self.level - z) * s + v)

    def gradients(self, slope: torch.Tensor) -> Gradients:
        """From the loss's gradient at `values()`, which must have been called since the last move."""
        g = self._blocked(slope.float())
        s, z, _ = self.numbers()
        low, high = self.cells.ends()
        inside = (self.u >= low) & (self.u <= high)
        beyond = torch.where(inside, 0.0, g)
        found = {"weights": (g - beyond) * s}
        total = functools.partial(torch.sum, dim=(-3, -1))
        if "scale" in self.parts:
            moved = self.level - torch.where(inside, self.u, z)
            found["scale"] = total(g * moved).reshape(self.tiling.grid) * self.parts["scale"].value
        if "code_shift" in self.parts:
            found["code_shift"] = -total(beyond * s).reshape(self.tiling.grid)
        if "value_shift" in self.parts:
            found["value_shift"] = total(beyond * s).reshape(self.tiling.grid)
        return found

    def move(self, direction: Gradients, step: float, ranges: float) -> None:
        """One step against the directions (signs, or gradients over their usual size): `step` levels, ranges by `step * ranges` of themselves."""
        s, _, _ = self.numbers()
        self.theta -= step * self.cells.gap(self.u) * s * direction["weights"]
        if not ranges:
            return
        size = step * ranges
        for name, part in self.parts.items():
            if name == "scale":
                part.move(-size * part.beneath * direction[name])
            else:
                unit = 1.0 if name == "code_shift" else self._unit()
                part.move(-size * self.cells.reach * unit * direction[name])

    def _unit(self) -> torch.Tensor:
        return self.parts["scale"].value if "scale" in self.parts else torch.ones(self.tiling.grid)

    def finish(self) -> QTensor:
        """The weight as its codes and parts are now."""
        self.values()
        q, stored = self.q, {name: part.stored for name, part in self.parts.items()}
        return replace(
            q,
            codes=self.cells.codes(self._whole(self.level)).reshape(q.codes.shape),
            scale=stored.get("scale", q.scale),
            code_shift=stored.get("code_shift", q.code_shift),
            value_shift=stored.get("value_shift", q.value_shift),
        )
