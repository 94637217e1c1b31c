"""Cutting a tensor into its blocks, a bounded piece at a time.

Every blockwise computation sees the same five-dimensional picture: x [n, block rows, m, block cols] with one parameter per
(n, m), shaped [n, 1, m, 1] so that it broadcasts. Tiles that do not cut evenly are padded by repeating their edge, with weight 0, so
that extremes stay true and sums do not count the padding.

        weights [rows, cols]                    x [n, br, m, bc]
        +----+----+--+                          n = block rows in this chunk
        |    |    |  |  2 x 3 blocks of         m = block columns
        +----+----+--+  br x bc, the last
        |    |    |  |  column ragged
        +----+----+--+
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from fewbit.base.errors import InputError
from fewbit.math import fast
from fewbit.num.blocks import Blocks, Tiling

CHUNK = 1 << 22  # weights in one chunk: 16 MB per float32 temporary


@dataclass(frozen=True)
class Chunk:
    """Some whole blocks of a tensor.

    Attributes:
        raw: floating [n, block rows, m, block cols], in the dtype of the weights; `x` is the same in float32.
        h: float32 of the same shape or broadcastable to it: weight of each squared error (0 in padding); None means 1.
        index: where the chunk's parameters lie in the array [batch, block rows, block cols]: (batch, first row, end row, first col, end col).
        extent: (rows, cols) of the chunk without padding.
        source: the whole tensor.
    """

    raw: torch.Tensor
    h: torch.Tensor | None
    index: tuple[int, int, int, int, int]
    extent: tuple[int, int]
    source: torch.Tensor

    @functools.cached_property
    def x(self) -> torch.Tensor:
        """float32 [n, block rows, m, block cols]."""
        return self.raw.float()

    @functools.cached_property
    def view(self) -> fast.View | None:
        """The chunk as the fast kernels take it, or None."""
        return fast.view_of(self.raw, self.h)

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """(x, h) cut along the rows of a block, for blocks too large for one temporary."""
        step = max(1, CHUNK // max(1, self.raw[:, :1].numel()))
        if step >= self.raw.shape[1]:
            yield self.x, self.h
            return
        for i in range(0, self.raw.shape[1], step):
            h = self.h if self.h is None or self.h.shape[1] == 1 else self.h[:, i : i + step]
            yield self.raw[:, i : i + step].float(), h

    def total(self, function: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> torch.Tensor:
        """Sum over each block of an elementwise function of (x, h): -> [n, 1, m, 1]."""
        sums = [function(x, h).sum(dim=(1, 3), keepdim=True) for x, h in self.pieces()]
        return sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(0).float()

    def extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest x of each block, float32 [n, 1, m, 1] each.

        Raises:
            InputError: FB-E0702 for non-finite weights.
        """
        if self.view is not None:
            low, high, finite = fast.extremes(self.view)
        else:  # both propagate NaN
            low = self.raw.amin(dim=(1, 3), keepdim=True).float()
            high = self.raw.amax(dim=(1, 3), keepdim=True).float()
            finite = bool((torch.isfinite(low) & torch.isfinite(high)).all())
        if not finite:
            require_finite(self.source)
        return low, high

    def take(self, array: torch.Tensor) -> torch.Tensor:
        """This chunk's part of an array with one entry per block, as [n, 1, m, 1]."""
        b, r0, r1, c0, c1 = self.index
        return array[b, r0:r1, c0:c1][:, None, :, None]

    def put(self, array: torch.Tensor, values: torch.Tensor) -> None:
        """Write [n, 1, m, 1] values to this chunk's part of an array with one entry per block."""
        b, r0, r1, c0, c1 = self.index
        array[b, r0:r1, c0:c1] = values[:, 0, :, 0]

    def unblock(self, values: torch.Tensor) -> torch.Tensor:
        """[n, block rows, m, k] back to the chunk's own [rows, cols], padding cut off."""
        n, br, m, k = values.shape
        return values.reshape(n * br, m * k)[: self.extent[0], : self.extent[1]]


def chunks(w: torch.Tensor, importance: torch.Tensor | None, blocks: Blocks) -> Iterator[Chunk]:
    """All blocks of a tensor, in order, in chunks of about `CHUNK` weights (more only where one block is larger).

    Args:
        w: floating [*batch, rows, cols]; a chunk is cast to float32 when it is looked at.
        importance: float32 [cols], [rows, cols] or [*batch, rows, cols], or None.
        blocks: the granularity.
    """
    tiling = blocks.resolve(tuple(w.shape))
    x = w.reshape(-1, tiling.rows, tiling.cols)
    h = spread_importance(importance, tuple(w.shape), tiling)
    br, bc = tiling.block_rows, tiling.block_cols
    rows = max(1, CHUNK // max(1, br * tiling.cols)) * br
    cols = tiling.cols if br * tiling.cols <= CHUNK else max(1, CHUNK // (br * bc)) * bc
    for b in range(x.shape[0]):
        for r in range(0, tiling.rows, rows):
            for c in range(0, tiling.cols, cols):
                weight = None if h is None else h[b if h.shape[0] > 1 else 0]
                yield _chunk(x[b], weight, (b, r, c), (rows, cols), tiling, w)


def _chunk(
    x: torch.Tensor,
    h: torch.Tensor | None,
    at: tuple[int, int, int],
    size: tuple[int, int],
    tiling: Tiling,
    source: torch.Tensor,
) -> Chunk:
    b, r, c = at
    br, bc = tiling.block_rows, tiling.block_cols
    piece = x[r : r + size[0], c : c + size[1]]
    extent = (piece.shape[0], piece.shape[1])
    n, m = -(-extent[0] // br), -(-extent[1] // bc)
    right, below = m * bc - extent[1], n * br - extent[0]
    if h is not None:
        h = h[0 if h.shape[0] == 1 else slice(r, r + size[0]), c : c + size[1]].float().reshape(-1, extent[1])
    if right or below:
        h = torch.ones(extent, device=x.device) if h is None else h.expand(extent)
        h = pad(h, (0, right, 0, below))
        piece = pad(piece[None], (0, right, 0, below), mode="replicate")[0]
    if h is not None:
        h = h.reshape(1, 1, m, bc) if h.shape[0] == 1 and n * br > 1 else h.reshape(n, br, m, bc)
    index = (b, r // br, r // br + n, c // bc, c // bc + m)
    return Chunk(piece.reshape(n, br, m, bc), h, index, extent, source)


def spread_importance(importance: torch.Tensor | None, shape: tuple[int, ...], tiling: Tiling) -> torch.Tensor | None:
    """Importance as [1 or batch, 1 or rows, cols] of the tiling's view.

    Raises:
        InputError: FB-E0701 when its shape does not suit the weights, or an entry is negative or not finite.
    """
    if importance is None:
        return None
    cols = shape[-1] if shape else 1
    fits = importance.shape in {(cols,), tuple(shape[-2:]), tuple(shape)}
    if not fits:
        raise InputError(
            "FB-E0701", f"importance of shape {tuple(importance.shape)} does not suit weights of shape {shape}"
        )
    if importance.numel() and not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise InputError("FB-E0701", "importance holds negative or non-finite entries")
    if tiling.view != (1, 1, *shape)[-len(tiling.view) :] or importance.ndim > 2:  # flat tilings see one long row
        return importance.expand(shape).reshape(-1, tiling.rows, tiling.cols)
    return importance.reshape(1, -1, cols)


def require_finite(w: torch.Tensor, tensor: str | None = None) -> None:
    """Raise FB-E0702, naming how many and the first index, unless all weights are finite."""
    bad, first = 0, None
    flat = w.reshape(-1)
    for i in range(0, flat.numel(), CHUNK):
        piece = flat[i : i + CHUNK]
        if bool(torch.isfinite(piece).all()):
            continue
        where = torch.nonzero(~torch.isfinite(piece))[:, 0]
        first = i + int(where[0]) if first is None else first
        bad += where.numel()
    if first is not None:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), w.shape))
        raise InputError(
            "FB-E0702", f"{bad} of {w.numel()} weights are NaN or infinite, the first at {index}", tensor=tensor
        )
