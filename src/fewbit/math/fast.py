"""The numba kernels of `kernels/blockwise.py` behind the same words as the plain torch functions.

`view_of` and `serves` say what suits them: weights on the CPU in bfloat16, float16 or float32, and a scalar grid of integers, small floats or
at most 16 table levels. numba is imported when the first kernel is called, never before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fewbit.math.rounding import level_intervals
from fewbit.num.grid import Codebook, FloatGrid, Grid, IntGrid
from fewbit.num.qtensor import code_dtype

MIN_BLOCK = 16  # one vector; smaller blocks are left to torch
_LANES = 16
_MAX_BLOCK = 1 << 16  # above this the lanes of a search no longer fit a cache


@functools.cache
def _kernels() -> ModuleType:
    from fewbit.math.kernels import blockwise

    return blockwise


@dataclass(frozen=True)
class View:
    """A chunk as the kernels see it.

    Attributes:
        x: flat blocks of uint16 (bfloat16 bits), int16 (float16 bits) or float32.
        h: flat float32 blocks repeating over those of x; one block of ones where nothing is weighted.
        shape: (n, block rows, m, block cols); parameters are [n, 1, m, 1].
    """

    x: np.ndarray
    h: np.ndarray
    shape: tuple[int, int, int, int]

    @functools.cached_property
    def wide(self) -> np.ndarray:
        """x as float32."""
        if self.x.dtype == np.float32:
            return self.x
        kind = torch.bfloat16 if self.x.dtype == np.uint16 else torch.float16
        return torch.from_numpy(self.x.view(np.int16)).view(kind).float().numpy()

    @property
    def blocks(self) -> int:
        return self.shape[0] * self.shape[2]

    @property
    def size(self) -> int:
        return self.shape[1] * self.shape[3]

    @property
    def padded(self) -> int:
        """Blocks, rounded up so that lanes may run over the end."""
        return -(-self.blocks // _LANES) * _LANES

    def params(self, values: torch.Tensor | None) -> np.ndarray:
        """[n, 1, m, 1] or broadcastable to it, or None for zeros -> float32 [padded]."""
        n, _, m, _ = self.shape
        out = np.zeros(self.padded, np.float32)
        if values is not None:
            out[: self.blocks] = values.float().expand(n, 1, m, 1).reshape(-1).numpy()
        return out

    def back(self, values: np.ndarray) -> torch.Tensor:
        """float32 [padded] -> [n, 1, m, 1]."""
        n, _, m, _ = self.shape
        return torch.from_numpy(values[: self.blocks]).reshape(n, 1, m, 1)

    def spread(self, work: Callable[[int, int], Any]) -> list[Any]:
        """Run work(b0, b1) over all blocks on torch's number of threads; the split does not change any result."""
        threads = max(1, min(torch.get_num_threads(), self.x.size >> 16, self.blocks // _LANES))
        if threads == 1:
            return [work(0, self.blocks)]
        step = -(-self.padded // _LANES // threads) * _LANES
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda b: work(b, min(b + step, self.blocks)), range(0, self.blocks, step)))


def view_of(raw: torch.Tensor, h: torch.Tensor | None) -> View | None:
    """The view of blocks raw [n, block rows, m, block cols] and weights h, or None when the kernels do not serve them.

    Tiles are copied so that each lies in one piece; whole rows and groups are not.
    """
    n, br, m, bc = raw.shape
    if raw.device.type != "cpu" or raw.numel() == 0 or not MIN_BLOCK <= br * bc <= _MAX_BLOCK:
        return None
    if raw.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    flat = raw.detach().permute(0, 2, 1, 3).reshape(-1).contiguous()
    if flat.dtype == torch.bfloat16:
        x = flat.view(torch.int16).numpy().view(np.uint16)
    else:
        x = flat.view(torch.int16).numpy() if flat.dtype == torch.float16 else flat.numpy()
    if h is None:
        return View(x, np.ones(br * bc, np.float32), (n, br, m, bc))
    if br > 1:
        h = h.expand(raw.shape).permute(0, 2, 1, 3)
    return View(x, h.reshape(-1).float().contiguous().numpy(), (n, br, m, bc))


def serves(grid: Grid) -> bool:
    """Whether the kernels know a grid."""
    if isinstance(grid, FloatGrid):
        return grid.signed and grid.mantissa >= 1 and grid.bits <= 8
    return isinstance(grid, IntGrid) or (isinstance(grid, Codebook) and len(grid.table) <= 16)


@functools.lru_cache(maxsize=64)
def _grid_arguments(grid: Grid) -> tuple[Any, ...]:
    """(low, high, kind, ends, levels) as the kernels take them."""
    if isinstance(grid, Codebook):
        ends, levels, _ = level_intervals(grid)
        return np.float32(levels[0]), np.float32(levels[-1]), None, ends, levels
    kind = None
    if isinstance(grid, FloatGrid):
        magic = np.float32(2.0 ** (23 + 1 - grid.bias - grid.mantissa))
        kind = (np.int32(23 - grid.mantissa), np.float32(grid.smallest_normal), magic)
    return np.float32(grid.low), np.float32(grid.high), kind, None, None


def extremes(view: View) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Lowest and highest weight of each block, [n, 1, m, 1] each, and whether all weights are finite."""
    low, high, run = np.empty(view.padded, np.float32), np.empty(view.padded, np.float32), _kernels().extremes
    bad = view.spread(lambda a, b: run(view.x, view.size, low, high, a, b))
    return view.back(low), view.back(high), not any(bad)


def errors(view: View, grid: Grid, triple: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Weighted squared error of each block under (scale, code_shift, value_shift), [n, 1, m, 1]."""
    scale, zero, shift = (view.params(p) for p in triple)
    out, run, arguments = np.empty(view.padded, np.float32), _kernels().errors, _grid_arguments(grid)
    view.spread(lambda a, b: run(view.x, view.size, view.h, scale, zero, shift, None, out, a, b, *arguments))
    return view.back(out)


def curvatures(view: View, grid: Grid, triple: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of (level - z)^2 and of 1 over each block, [n, 1, m, 1] each."""
    scale, zero, shift = (view.params(p) for p in triple)
    out, weight = np.empty(view.padded, np.float32), np.empty(view.padded, np.float32)
    run, arguments = _kernels().curvatures, _grid_arguments(grid)
    view.spread(lambda a, b: run(view.wide, view.size, view.h, scale, zero, shift, out, weight, a, b, *arguments))
    return view.back(out), view.back(weight)


def snap(view: View, grid: Grid, triple: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """The nearest codes, [n, block rows, m, block cols]."""
    params, run = tuple(view.params(p) for p in triple), _kernels().snap
    low, high, kind, ends, levels = _grid_arguments(grid)
    codes = torch.empty(view.x.size, dtype=code_dtype(grid))
    out = codes.numpy()
    marks: tuple[np.int32, np.int32] | np.ndarray | None = None
    if isinstance(grid, FloatGrid):
        marks = (np.int32((127 - grid.bias) << grid.mantissa), np.int32(1 << (grid.bits - 1)))
    elif levels is not None:
        marks = np.arange(len(levels), dtype=np.float32)
    view.spread(lambda a, b: run(view.x, view.size, *params, out, a, b, low, high, kind, ends, marks))
    if isinstance(grid, Codebook) and not np.array_equal(order := level_intervals(grid)[2], np.arange(len(levels))):
        view.spread(lambda a, b: _kernels().relabel(out, order, a * view.size, b * view.size))
    n, br, m, bc = view.shape
    return codes.reshape(n, m, br, bc).permute(0, 2, 1, 3)


def snap_scored(
    view: View, grid: IntGrid, triple: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`snap` and `errors` in one pass: codes [n, block rows, m, block cols] and errors [n, 1, m, 1]."""
    params, run, arguments = tuple(view.params(p) for p in triple), _kernels().errors, _grid_arguments(grid)
    codes, out = torch.empty(view.x.size, dtype=code_dtype(grid)), np.empty(view.padded, np.float32)
    made = codes.numpy()
    view.spread(lambda a, b: run(view.x, view.size, view.h, *params, made, out, a, b, *arguments))
    n, br, m, bc = view.shape
    return codes.reshape(n, m, br, bc).permute(0, 2, 1, 3), view.back(out)


def search_scale(view: View, grid: Grid, bases: torch.Tensor, ratios: list[float], rounds: int) -> torch.Tensor:
    """Least-squares scales, [n, 1, m, 1], from starting scales `bases` [count, n, 1, m, 1] times each ratio."""
    base = np.stack([view.params(b) for b in bases])
    tries, out = np.array(ratios, np.float32), np.empty(view.padded, np.float32)
    run, arguments = _kernels().search_scale, _grid_arguments(grid)
    view.spread(lambda a, b: run(view.wide, view.size, view.h, base, tries, rounds, out, a, b, *arguments))
    return view.back(out)


def search_zero(
    view: View, grid: IntGrid, low: torch.Tensor, high: torch.Tensor, ratios: list[float], near: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scales and integer zero points for ranges low..high [n, 1, m, 1] times each ratio."""
    least, most, tries = view.params(low), view.params(high), np.array(ratios, np.float32)
    scale, zero, run = np.empty(view.padded, np.float32), np.empty(view.padded, np.float32), _kernels().search_zero
    ends = np.float32(grid.low), np.float32(grid.high)
    view.spread(
        lambda a, b: run(view.wide, view.size, view.h, least, most, tries, near, rounds, scale, zero, a, b, *ends)
    )
    return view.back(scale), view.back(zero)


def search_shift(
    view: View, grid: IntGrid, low: torch.Tensor, high: torch.Tensor, ratios: list[float], rounds: int, down: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scales and value shifts (<= 0 if `down`) for ranges low..high [n, 1, m, 1] times each ratio."""
    least, most, tries = view.params(low), view.params(high), np.array(ratios, np.float32)
    scale, shift, run = np.empty(view.padded, np.float32), np.empty(view.padded, np.float32), _kernels().search_shift
    ends = np.float32(grid.low), np.float32(grid.high)
    view.spread(
        lambda a, b: run(view.wide, view.size, view.h, least, most, tries, rounds, down, scale, shift, a, b, *ends)
    )
    return view.back(scale), view.back(shift)
