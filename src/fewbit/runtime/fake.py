"""Fake quantisation: a weight that computes as if it were stored in few bits, and still learns.

    forward    w  ->  codes = snap(w; parameters as stored)  ->  w_hat = dequantize(codes)        what the file will hold, bit for bit
    backward   as if rounding were the identity ("straight through"), everything else differentiated as it stands

With  u = (w - v) / s + z  and the level L nearest to u, a weight is *inside* when L is its nearest level without clipping. Then, summed over a block,

    dw = g · inside        ds = g · (L - z - inside · (u - z))        dz = -g · s · (1 - inside)        dv = g · (1 - inside)

which is what autograd makes of  (clamp(round(u)) - z) s + v  with round' = 1, and LSQ's rule for the step size (arXiv 1902.08153; LSQ+ 2004.09576 for the
shifts). For codebooks and floats round is "to the nearest level". Leaf parameters (an f16 scale, an integer zero point) are rounded the same way; a
scale that is itself quantised is a `FakeQuantise` over the array of scales: the recursion of `num.scheme`.

What is learned of a parameter is `delta`, in units of its own size, so that one learning rate suits every tensor:

    scale = start · (1 + delta)        code_shift = start + delta        value_shift = start + |scale| · delta
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.math.rounding import pack_leaf, store, store_scale
from fewbit.math.scales import Params, assemble, snap
from fewbit.num.blocks import EACH
from fewbit.num.grid import FloatGrid, Grid, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor, decode_codes, expand, values_of
from fewbit.num.scheme import Scheme

PARTS = ("scale", "code_shift", "value_shift")
MARGIN = 0.5  # how far from the border of its cell every weight starts, as a share of the way there: what one noisy update can flip, a consistent gradient need not
LEAST_SCALE = 2.0**-10  # a scale may shrink to this share of its start, never through zero


@functools.lru_cache(maxsize=128)
def edges(grid: Grid) -> tuple[float, float]:
    """The open interval of u that rounds to a level of the grid without being clipped: half a step beyond its ends.

    Unlimited for floats of 16 bits and more; vector grids count each value on its own.
    """
    if isinstance(grid, IntGrid):
        return grid.low - 0.5, grid.high + 0.5
    if isinstance(grid, FloatGrid) and grid.bits > 8:
        return float("-inf"), float("inf")
    levels = grid.magnitudes().reshape(-1) if isinstance(grid, VectorGrid) else grid.levels()
    levels = np.unique(levels[np.isfinite(levels)])
    above = float(levels[-1] + (levels[-1] - levels[-2]) / 2)
    if isinstance(grid, VectorGrid):
        return -above, above
    return float(levels[0] - (levels[1] - levels[0]) / 2), above


class _Context(Protocol):
    """What autograd hands to `_Straight`; torch's own declaration leaves out most of it."""

    q: QTensor
    fixed: bool
    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...


class _Straight(torch.autograd.Function):
    """w_hat of a quantised tensor, with the gradients of the module's text."""

    @staticmethod
    def forward(
        ctx: _Context,
        w: torch.Tensor,
        scale: torch.Tensor | None,
        code_shift: torch.Tensor | None,
        value_shift: torch.Tensor | None,
        q: QTensor,
        fixed: bool,
    ) -> torch.Tensor:
        ctx.q, ctx.fixed = q, fixed
        ctx.save_for_backward(w, scale, code_shift, value_shift)
        return q.dequantize(w.dtype if w.dtype.is_floating_point else torch.float32)

    @staticmethod
    def backward(ctx: _Context, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, *parts = ctx.saved_tensors
        if ctx.q.scheme.is_leaf:
            return _through_mean(g, ctx.q), None, None, None, None, None
        return (*_backward(g, w, parts, ctx.q, ctx.fixed, ctx.needs_input_grad), None, None)


def _through_mean(g: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Gradient of levels stored directly: the identity, or the mean of the block that shares a level."""
    if q.scheme.blocks == EACH:
        return g
    counts = q.scheme.block_counts(q.shape)
    sums = sum_blocks(torch.ones_like(g), q.scheme, q.shape)
    return expand((sum_blocks(g, q.scheme, q.shape) / sums).reshape(counts), q.scheme, q.shape).reshape(q.shape)


def _backward(
    g: torch.Tensor,
    w: torch.Tensor,
    parts: Sequence[torch.Tensor | None],
    q: QTensor,
    fixed: bool,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (w, scale, code_shift, value_shift); with fixed codes no weight is inside and w gets none."""
    scheme, shape, kind = q.scheme, q.shape, g.dtype if g.dtype == torch.float64 else torch.float32
    tiling = scheme.blocks.resolve(shape)
    lay = tiling.blocked if tiling.even else tiling.view
    s, z, v = (None if p is None else _spread(p.to(kind), scheme, shape) for p in parts)
    g = g.to(kind).reshape(lay)
    centred = decode_codes(scheme.grid, q.codes).to(kind).reshape(lay)
    centred = centred if z is None else centred - z
    inside = None
    if not fixed:
        t = w.to(kind).reshape(lay)
        t = t if v is None else t - v
        t = t.clone() if s is None else t / s.masked_fill(s == 0, 1)  # the one array of this size that is written over
        low, high = edges(scheme.grid)
        inside = (t > low) & (t < high) if z is None else (t > low - z) & (t < high - z)
        inside = inside if s is None or bool(s.all()) else inside & (s != 0)
        centred = torch.sub(centred, t.mul_(inside), out=t)
    shifted = None if z is None and v is None else g if inside is None else g * ~inside
    found: list[torch.Tensor | None] = [None] * 4
    if needs[0] and inside is not None:
        found[0] = (g * inside).reshape(shape).to(w.dtype)
    if s is not None and needs[1]:
        found[1] = sum_blocks(g * centred, scheme, shape)
    if shifted is not None and z is not None and s is not None and needs[2]:
        found[2] = sum_blocks(shifted * -s, scheme, shape)
    if shifted is not None and v is not None and needs[3]:
        found[3] = sum_blocks(shifted, scheme, shape)
    like = (p if p is None or f is None else f.reshape(p.shape).to(p.dtype) for p, f in zip(parts, found[1:]))
    return found[0], *like


def _spread(values: torch.Tensor, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """Entries per block as something that broadcasts over the weights: over blocks where the tiling is even, else one entry per weight."""
    tiling = scheme.blocks.resolve(shape)
    return values.reshape(*tiling.grid[:-1], 1, tiling.grid[-1], 1) if tiling.even else expand(values, scheme, shape)


def sum_blocks(values: torch.Tensor, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """Sums over the blocks of a tensor of `shape`: the adjoint of `num.qtensor.expand`. -> [*batch, block rows, block columns]."""
    tiling = scheme.blocks.resolve(shape)
    if tiling.even:
        return values.reshape(tiling.blocked).sum((-3, -1))
    below = tiling.grid[-2] * tiling.block_rows - tiling.rows
    right = tiling.grid[-1] * tiling.block_cols - tiling.cols
    values = nn.functional.pad(values.reshape(tiling.view), (0, right, 0, below))
    return values.reshape(tiling.blocked).sum((-3, -1))


class _Leaf(nn.Module):
    """A parameter that is stored directly, one entry per block (or per block of blocks), learning.

    Args:
        part: its scheme.
        start: its entries as stored.
        unit: float32, what a `delta` of 1 stands for; None for a scale, whose unit is itself.
    """

    start: torch.Tensor
    unit: torch.Tensor

    def __init__(self, part: Scheme, start: torch.Tensor, unit: torch.Tensor | None) -> None:
        super().__init__()
        self.part, self.is_scale = part, unit is None
        self.register_buffer("start", start.detach().float().clone())
        self.register_buffer("unit", self.start if unit is None else unit.expand(start.shape).clone())
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(float32 values, straight-through; the same as stored)."""
        if self.is_scale:
            raw = self.start * (1 + self.delta).clamp_min(LEAST_SCALE)
        else:
            raw = self.start + self.unit * self.delta
        with torch.no_grad():
            kept = (store_scale if self.is_scale else store)(self.part.grid, raw.detach())
        return raw + (kept - raw).detach(), pack_leaf(self.part.grid, kept)


class _Nested(nn.Module):
    """A parameter that is itself quantised: fake quantisation of the array of scales."""

    start: torch.Tensor
    unit: torch.Tensor

    def __init__(self, stored: QTensor, counts: tuple[int, ...], unit: torch.Tensor | None) -> None:
        super().__init__()
        whole = QTensor(stored.scheme, counts, stored.codes, stored.scale, stored.code_shift, stored.value_shift)
        self.inner = FakeQuantise(whole)
        self.register_buffer("start", whole.dequantize())
        self.register_buffer("unit", self.start.abs() if unit is None else unit.reshape(counts).clone())
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> tuple[torch.Tensor, QTensor]:
        return self.inner.quantise(self.start + self.unit * self.delta)


class FakeQuantise(nn.Module):
    """Fake quantisation of one tensor, starting from a quantised one.

    Used as a parametrisation (`torch.nn.utils.parametrize`) or by itself: `fake(w)` is w_hat. The learnable `delta`s are its parameters.

    Args:
        q: where scales and shifts start. A leaf scheme (`bf16`) has none: its levels are stored directly.
        transposed: whether the tensor that is passed lies [.., in, out], the other way round than schemes count.
        keep_codes: codes stay as they are and only parameters learn; of the tensor passed only the dtype counts (`parametrize` keeps it empty).

    Raises:
        InputError: FB-E0910 for a quantised tensor with sides (permutation, outliers): they are not fixed values.
    """

    codes: torch.Tensor | None
    held: torch.Tensor | None

    def __init__(self, q: QTensor, *, transposed: bool = False, keep_codes: bool = False) -> None:
        super().__init__()
        sides = [name for name in q.sides if name != "input_scale"]
        if sides:
            raise InputError("FB-E0910", f"cannot train a weight that carries {', '.join(sides)}")
        self.scheme, self.shape, self.transposed = q.scheme.weights_only, tuple(q.shape), transposed
        self.scope: dict[bool, torch.Tensor] | None = (
            None  # values within one forward pass, where a module asks for them often
        )
        self.register_buffer("codes", q.codes.clone() if keep_codes else None)
        self.register_buffer("held", None, persistent=False)
        counts = self.scheme.block_counts(self.shape)
        scale = None if q.scale is None else values_of(q.scale).abs()
        self.parts = nn.ModuleDict()
        for name, part in self.scheme.parts():
            stored = getattr(q, name)
            unit = None if name == "scale" else torch.ones(()) if name == "code_shift" else scale
            if isinstance(stored, QTensor):
                whole = unit if unit is None or not unit.ndim else _as_counts(unit, self.scheme, counts)
                self.parts[name] = _Nested(stored, counts, whole if whole is None else whole.expand(counts))
            else:
                if unit is not None and unit.ndim and unit.shape != stored.shape:
                    unit = unit.mean()  # one shift for many blocks
                self.parts[name] = _Leaf(part, stored, unit)

    @property
    def frozen(self) -> bool:
        return self.held is not None

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """w (any float dtype, the shape of q) -> w_hat of the same dtype."""
        if self.held is not None:
            return self.held
        if self.scope is None:
            return self._turned(self.quantise(self._turned(w))[0])
        if torch.is_grad_enabled() not in self.scope:
            self.scope[torch.is_grad_enabled()] = self._turned(self.quantise(self._turned(w))[0])
        return self.scope[torch.is_grad_enabled()]

    def quantise(self, w: torch.Tensor) -> tuple[torch.Tensor, QTensor]:
        """w [.., out, in] -> (w_hat with straight-through gradients, the same as a quantised tensor)."""
        shape = self.shape if self.codes is not None else tuple(w.shape)
        counts = self.scheme.block_counts(shape)
        values, stored = {}, {}
        for name, part in self.parts.items():
            value, stored[name] = part()
            leaf = getattr(self.scheme, name)
            values[name] = (expand(value, leaf, counts) if leaf.is_leaf else value).reshape(counts)
        params = Params(**stored)
        with torch.no_grad():
            codes = self.codes if self.codes is not None else snap(self.scheme, w.detach(), params)
        q = assemble(self.scheme, shape, codes, params)
        out = _Straight.apply(w, *(values.get(name) for name in PARTS), q, self.codes is not None)
        return out, q

    @torch.no_grad()
    def qtensor(self, w: torch.Tensor) -> QTensor:
        """What `forward(w)` is the value of, [.., out, in]."""
        return self.quantise(self._turned(w))[1]

    @torch.no_grad()
    def freeze(self, w: torch.Tensor) -> None:
        """From now on `forward` returns today's value, without computing it again."""
        if self.held is None:
            self.held = self.forward(w).clone()
            self.requires_grad_(False)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        """What `parametrize` keeps of the weight: itself, or nothing where the codes are kept instead."""
        return w if self.codes is None else w.new_empty(0)

    def _turned(self, w: torch.Tensor) -> torch.Tensor:
        return w.transpose(-1, -2).contiguous() if self.transposed and w.ndim > 1 else w

    def extra_repr(self) -> str:
        state = "frozen" if self.frozen else "fixed codes" if self.codes is not None else "learning"
        return f"{self.scheme}, {'x'.join(map(str, self.shape))}, {state}"


def _as_counts(values: torch.Tensor, scheme: Scheme, counts: tuple[int, ...]) -> torch.Tensor:
    """A scale array with one entry per block, whether or not its leaf shares entries."""
    part = scheme.part("scale")
    return (expand(values, part, counts) if part.is_leaf else values).reshape(counts)


@torch.no_grad()
def inside_cells(q: QTensor, w: torch.Tensor, steps: int = 12) -> torch.Tensor:
    """The tensor nearest to w, on the way to it from q's values, that rounds to q's codes with some way to go to any other.

    Training that starts here starts exactly at q, which a solver chose, with every weight leaning to its float value. Weights at the border of their cell would be
    flipped by the noise of the first updates, all at once (on the sample at 2 bits that took KL from .23 to 2 where those stood there that a solver had pushed across;
    where the rest did, from .17 to .20 at 1e-2 of a step); from inside, only a gradient that keeps its sign gets them there.

    Args:
        q: quantised, [.., out, in]. w: floating, the same shape.
        steps: halvings of the way.
    """
    centre, params = q.dequantize(), Params(q.scale, q.code_shift, q.value_shift)
    w, dim = w.float(), q.scheme.grid.dim
    codes = q.codes.reshape(*q.shape[:-1], -1)

    def keeps(share: torch.Tensor) -> torch.Tensor:
        moved = centre + (share.repeat_interleave(dim, -1) if dim > 1 else share) * (w - centre)
        return snap(q.scheme, moved, params).reshape(codes.shape) == codes

    far = torch.full(
        codes.shape, 1 / (1 - MARGIN), device=w.device
    )  # who keeps the code from here is far from a border
    whole = keeps(far)
    if bool(whole.all()):
        return w
    near = torch.zeros_like(far)
    for _ in range(steps):
        middle = (near + far) / 2
        good = keeps(middle)
        near, far = torch.where(good, middle, near), torch.where(good, far, middle)
    share = torch.where(whole, 1, (near * (1 - MARGIN)).clamp_max(1))
    share = share.repeat_interleave(dim, -1) if dim > 1 else share
    return torch.where(share == 1, w, centre + share * (w - centre))
