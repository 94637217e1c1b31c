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

_MIN_WEIGHTS = 1 << 14  # below this a kernel's call costs more than torch
_MAX_BLOCK = 1 << 16  # above this the lanes of a search no longer fit a cache


@functools.cache
def _kernels() -> ModuleType:
    from fewbit.math.kernels import blockwise

    return blockwise


@dataclass(frozen=True)
class View:
    """A chunk as the kernels see it.

    Attributes:
        x: [blocks, size] of uint16 (bfloat16 bits), int16 (float16 bits) or float32.
        h: float32 [any divisor of blocks, size] repeating over the blocks, or None.
        shape: (n, block rows, m, block cols); parameters are [n, 1, m, 1].
    """

    x: np.ndarray
    h: np.ndarray | None
    shape: tuple[int, int, int, int]

    def params(self, values: torch.Tensor | None) -> np.ndarray:
        """[n, 1, m, 1] or broadcastable to it, or None for zeros -> float32 [blocks]."""
        n, _, m, _ = self.shape
        if values is None:
            return np.zeros(n * m, np.float32)
        return values.float().expand(n, 1, m, 1).reshape(-1).contiguous().numpy()

    def back(self, values: np.ndarray) -> torch.Tensor:
        """float32 [blocks] -> [n, 1, m, 1]."""
        n, _, m, _ = self.shape
        return torch.from_numpy(values).reshape(n, 1, m, 1)


def view_of(raw: torch.Tensor, h: torch.Tensor | None) -> View | None:
    """The view of blocks raw [n, block rows, m, block cols] and weights h, or None when the kernels do not serve them.

    Tiles are copied so that each lies in one piece; whole rows and groups are not.
    """
    n, br, m, bc = raw.shape
    if raw.device.type != "cpu" or raw.numel() < _MIN_WEIGHTS or br * bc > _MAX_BLOCK or br * bc == 0:
        return None
    if raw.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    flat = raw.detach().permute(0, 2, 1, 3).reshape(n * m, br * bc).contiguous()
    if flat.dtype == torch.bfloat16:
        x = flat.view(torch.int16).numpy().view(np.uint16)
    else:
        x = flat.view(torch.int16).numpy() if flat.dtype == torch.float16 else flat.numpy()
    if h is None:
        return View(x, None, (n, br, m, bc))
    if br > 1:
        h = h.expand(raw.shape).permute(0, 2, 1, 3)
    return View(x, h.reshape(-1, br * bc).float().contiguous().numpy(), (n, br, m, bc))


def serves(grid: Grid) -> bool:
    """Whether the kernels know a grid."""
    if isinstance(grid, FloatGrid):
        return grid.signed and grid.mantissa >= 1 and grid.bits <= 8
    return isinstance(grid, IntGrid) or (isinstance(grid, Codebook) and len(grid.table) <= 16)


@functools.lru_cache(maxsize=64)
def _grid_arguments(grid: Grid) -> tuple[Any, ...]:
    """(low, high, kind, bounds, jumps) as the kernels take them."""
    if isinstance(grid, Codebook):
        bounds, levels, _ = level_intervals(grid)
        return np.float32(levels[0]), np.float32(levels[-1]), None, bounds, np.diff(levels).astype(np.float32)
    kind = None
    if isinstance(grid, FloatGrid):
        magic = np.float32(2.0 ** (23 + 1 - grid.bias - grid.mantissa))
        kind = (np.int32(23 - grid.mantissa), np.float32(grid.smallest_normal), magic)
    return np.float32(grid.low), np.float32(grid.high), kind, None, None


def _spread(work: Callable[[int, int], Any], blocks: int, size: int) -> list[Any]:
    """Run work(b0, b1) over all blocks on torch's number of threads; the split does not change any result."""
    threads = max(1, min(torch.get_num_threads(), blocks * size >> 16, blocks // 16))
    if threads == 1:
        return [work(0, blocks)]
    step = -(-blocks // threads + 15) // 16 * 16 if blocks >= 16 * threads else -(-blocks // threads)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda b: work(b, min(b + step, blocks)), range(0, blocks, step)))


def extremes(view: View) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Lowest and highest weight of each block, [n, 1, m, 1] each, and whether all weights are finite."""
    blocks, size = view.x.shape
    low, high = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    bad = _spread(lambda a, b: _kernels().extremes(view.x, low, high, a, b), blocks, size)
    return view.back(low), view.back(high), not any(bad)


def errors(view: View, grid: Grid, triple: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Weighted squared error of each block under (scale, code_shift, value_shift), [n, 1, m, 1]."""
    blocks, size = view.x.shape
    scale, zero, shift = (view.params(p) for p in triple)
    out = np.empty(blocks, np.float32)
    arguments = _grid_arguments(grid)
    _spread(lambda a, b: _kernels().errors(view.x, view.h, scale, zero, shift, out, a, b, *arguments), blocks, size)
    return view.back(out)


def snap(view: View, grid: Grid, triple: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """The nearest codes, [n, block rows, m, block cols]."""
    blocks, size = view.x.shape
    params = tuple(view.params(p) for p in triple)
    kernels = _kernels()
    low, high, kind, bounds, _ = _grid_arguments(grid)
    codes = torch.empty((blocks, size), dtype=code_dtype(grid))
    out = codes.numpy()
    if isinstance(grid, IntGrid):
        _spread(lambda a, b: kernels.snap_integer(view.x, *params, out, a, b, low, high), blocks, size)
    elif isinstance(grid, FloatGrid):
        lowest = np.int32((127 - grid.bias) << grid.mantissa)
        sign = np.int32(1 << (grid.bits - 1))
        _spread(lambda a, b: kernels.snap_float(view.x, *params, out, a, b, high, kind, lowest, sign), blocks, size)
    else:
        order = level_intervals(grid)[2]
        _spread(lambda a, b: kernels.snap_table(view.x, *params, out, a, b, bounds, order), blocks, size)
    n, br, m, bc = view.shape
    return codes.reshape(n, m, br, bc).permute(0, 2, 1, 3)


def search_scale(view: View, grid: Grid, bases: torch.Tensor, ratios: list[float], rounds: int) -> torch.Tensor:
    """Least-squares scales, [n, 1, m, 1], from starting scales `bases` [count, n, 1, m, 1] times each ratio."""
    blocks, size = view.x.shape
    base = np.stack([view.params(b) for b in bases])
    tries, out = np.array(ratios, np.float32), np.empty(blocks, np.float32)
    arguments = _grid_arguments(grid)
    kernel = _kernels().search_scale
    _spread(lambda a, b: kernel(view.x, view.h, base, tries, rounds, out, a, b, *arguments), blocks, size)
    return view.back(out)


def search_zero(
    view: View, grid: Grid, low: torch.Tensor, high: torch.Tensor, ratios: list[float], near: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scales and integer zero points for ranges low..high [n, 1, m, 1] times each ratio."""
    blocks, size = view.x.shape
    least, most = view.params(low), view.params(high)
    tries, scale, zero = np.array(ratios, np.float32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    ends = np.float32(grid.low), np.float32(grid.high)
    kernel = _kernels().search_zero
    _spread(
        lambda a, b: kernel(view.x, view.h, least, most, tries, near, rounds, scale, zero, a, b, *ends), blocks, size
    )
    return view.back(scale), view.back(zero)


def search_shift(
    view: View, grid: Grid, low: torch.Tensor, high: torch.Tensor, ratios: list[float], rounds: int, down: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scales and value shifts (<= 0 if `down`) for ranges low..high [n, 1, m, 1] times each ratio."""
    blocks, size = view.x.shape
    least, most = view.params(low), view.params(high)
    tries, scale, shift = np.array(ratios, np.float32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    ends = np.float32(grid.low), np.float32(grid.high)
    kernel = _kernels().search_shift
    _spread(
        lambda a, b: kernel(view.x, view.h, least, most, tries, rounds, down, scale, shift, a, b, *ends), blocks, size
    )
    return view.back(scale), view.back(shift)
