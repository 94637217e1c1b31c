"""Weight-only products on CUDA: codes of 4 or 8 bits are decoded in registers, tile by tile, and multiplied by tensor cores (Triton).

    y[m, n]  =  sum over k of  x[m, k] * (level[code[n, k]] * scale[n, k / group] + offset[n, k / group])

The offset stands for both shifts: value_shift - code_shift * scale. Beside the canonical parts, which give the weight back exactly, a table of
(scale, offset) pairs is kept in float32, so that scales which are themselves quantised (NF4 with double quantisation, Q4_K) cost nothing per product.
Packed 4-bit codes hold the even column in the low nibble: a tile of them meets the even and the odd columns of x in a product each, so
nothing is shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.math.kernels import has_triton
from fewbit.num.grid import Codebook, FloatGrid, IntGrid
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels.packed import block_arrays
from fewbit.runtime.parts import code_width, flatten, rebuild

LEAST = 32  # columns that share a scale, at least
PAIRS, LEVELS = "pairs", "levels"

Held = Mapping[str, torch.Tensor]


def accepts(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Scalar codes of 4 or 8 bits in groups of a multiple of 32 columns, float activations, on CUDA with Triton installed."""
    if device.type != "cuda":
        return f"serves CUDA, got {device.type}"
    return "needs Triton: pip install triton" if not has_triton() else misfit(scheme, shape)


def misfit(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot read a weight, wherever it lies."""
    if len(shape) != 2:
        return f"needs a matrix, got a weight of shape {tuple(shape)}"
    if scheme.activation is not None:
        return "computes with float activations"
    grid, blocks = scheme.grid, scheme.blocks
    if not isinstance(grid, (IntGrid, FloatGrid, Codebook)) or code_width(grid) not in (4, 8):
        return f"needs codes of 4 or 8 bits, got {grid.name}"
    if scheme.is_leaf or (blocks.flat and (blocks.cols == 0 or shape[1] % blocks.cols)):
        return f"needs scales per group, row, tile or tensor, got {blocks.spelling}"
    size = _group(scheme, shape[1])
    if not shape[1] or shape[1] % size or size % LEAST:
        return f"needs groups of a multiple of {LEAST} columns that divide in_features, got {size} of {shape[1]}"
    return None


def _group(scheme: Scheme, cols: int) -> int:
    """Columns of a row that share a scale."""
    return min(scheme.blocks.cols or cols, cols) or 1


def to_layout(q: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The canonical parts; `pairs` float32 [rows, groups, 2]; `levels` float32 [2^width] by code, for grids that are not integers."""
    held = flatten(q)
    rows, cols = q.shape
    groups = cols // _group(q.scheme, cols)
    arrays = {
        name: _by_row(q.scheme, array, (rows, groups)) for name, array in block_arrays(q.scheme, q.shape, held).items()
    }
    one = torch.ones(1, device=q.device)
    scale = arrays.get("scale", one)
    offset = arrays.get("value_shift", 0 * one) - arrays.get("code_shift", 0 * one) * scale
    held[PAIRS] = torch.stack([part.expand(rows, groups) for part in (scale, offset)], -1).contiguous()
    if not isinstance(q.scheme.grid, IntGrid):
        width = code_width(q.scheme.grid) or 8
        levels = torch.zeros(1 << width)
        known = torch.tensor(q.scheme.grid.levels(), dtype=torch.float32).nan_to_num(nan=0.0)
        levels[: len(known)] = known
        held[LEVELS] = levels.to(q.device)
    return held


def _by_row(scheme: Scheme, array: torch.Tensor, counts: tuple[int, int]) -> torch.Tensor:
    """An array with one entry per block as [rows, groups of a row]."""
    rows, groups = counts
    if scheme.blocks.flat:
        return array.reshape(rows, groups)
    if array.shape[0] in (1, rows):
        return array.expand(rows, groups)
    height = scheme.blocks.rows
    return array.repeat_interleave(height, dim=0)[:rows].expand(rows, groups)


def from_layout(scheme: Scheme, shape: tuple[int, ...], held: Held) -> QTensor:
    return rebuild(scheme, shape, {name: tensor for name, tensor in held.items() if name not in (PAIRS, LEVELS)})


def matmul(x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype; products in it (float64: in float32), sums in float32."""
    from fewbit.runtime.kernels import gpu_triton

    rows, cols = shape
    inner = x.float() if x.dtype == torch.float64 else x
    width = code_width(scheme.grid)
    signed = isinstance(scheme.grid, IntGrid) and scheme.grid.signed
    words = (held["codes"].view(torch.uint8), held[PAIRS], held.get(LEVELS))
    out = gpu_triton.product(inner.contiguous(), *words, rows, cols, _group(scheme, cols), width == 4, signed)
    return out.to(x.dtype)
