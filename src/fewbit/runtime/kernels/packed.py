"""The kernel that serves everything: codes packed densely, decoded a few rows at a time and multiplied in the activations' dtype.

It never holds the whole float weight. It is the reference that the other kernels are tested against.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from math import gcd

import torch

from fewbit.num.grid import F32
from fewbit.num.qtensor import QTensor, expand, values_of
from fewbit.num.scheme import Scheme, leaf
from fewbit.runtime.parts import PARTS, codes_shape, flatten, rebuild, unpack_codes

CHUNK = 1 << 21  # weights decoded at a time: 8 MiB of float32

Held = Mapping[str, torch.Tensor]


def accepts(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Any matrix, on any device."""
    return None if len(shape) == 2 else f"needs a matrix, got a weight of shape {tuple(shape)}"


def to_layout(q: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return flatten(q)


def from_layout(scheme: Scheme, shape: tuple[int, ...], held: Held) -> QTensor:
    return rebuild(scheme, shape, held)


def row_chunks(scheme: Scheme, shape: tuple[int, ...], held: Held) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 [rows, cols]) of the weight without its sides, a few rows at a time."""
    rows, cols = shape
    tiling = scheme.blocks.resolve(shape)
    arrays = block_arrays(scheme, shape, held)
    direct = {name: leaf(F32) for name in arrays}
    plain = Scheme(scheme.grid, scheme.blocks, direct.get("scale"), direct.get("code_shift"), direct.get("value_shift"))
    step = _step(scheme, rows, cols)
    count = codes_shape(scheme, shape)[-1]
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        codes = unpack_codes(scheme.grid, held["codes"][start:stop], count)
        if scheme.blocks.flat:
            first, last = start * cols // tiling.block_cols, -(-stop * cols // tiling.block_cols)
            parts = {name: array[:, first:last] for name, array in arrays.items()}
        elif tiling.grid[-2] == 1:
            parts = arrays
        else:
            first, last = start // tiling.block_rows, -(-stop // tiling.block_rows)
            parts = {name: array[first:last] for name, array in arrays.items()}
        scale, code_shift, value_shift = (parts.get(name) for name in PARTS)
        yield start, QTensor(plain, (stop - start, cols), codes, scale, code_shift, value_shift).dequantize()


def block_arrays(scheme: Scheme, shape: tuple[int, ...], held: Held) -> dict[str, torch.Tensor]:
    """Scale and shifts as float32 with one entry per block: name -> [block rows, block cols]."""
    counts = scheme.block_counts(shape)
    arrays = {}
    for name in PARTS:
        part = getattr(scheme, name)
        if part is None:
            continue
        values = values_of(held[name] if name in held else rebuild(part, counts, held, f"{name}_"))
        values = expand(values, part, counts) if part.is_leaf else values
        arrays[name] = values.reshape(counts[-2:])
    return arrays


def _step(scheme: Scheme, rows: int, cols: int) -> int:
    """Rows per chunk: whole blocks, or whole flat blocks."""
    if scheme.blocks.flat:
        size = scheme.blocks.cols or rows * cols
        unit = size // gcd(size, cols)
    else:
        tiling = scheme.blocks.resolve((rows, cols))
        unit = tiling.block_rows if tiling.grid[-2] > 1 else 1
    return max(unit, CHUNK // max(1, cols) // unit * unit)


@functools.cache
def _native_bf16() -> bool:
    """Whether the CPU multiplies BF16 itself; else torch emulates it at a sixth of the speed of float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply activations of a dtype in: itself where the machine can."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and _native_bf16()):
        return dtype
    return dtype if dtype == torch.float64 else torch.float32


def matmul(x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype."""
    out = torch.empty((x.shape[0], shape[0]), dtype=x.dtype, device=x.device)
    inputs = x.to(compute_dtype(x.dtype, x.device))
    for start, w in row_chunks(scheme, shape, held):
        out[:, start : start + w.shape[0]] = inputs @ w.to(inputs.dtype).T
    return out


def transposed_matmul(dy: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """dy [tokens, rows] @ w -> [tokens, cols] in dy's dtype: what the gradient of the input needs."""
    compute = compute_dtype(dy.dtype, dy.device)
    out = torch.zeros((dy.shape[0], shape[1]), dtype=torch.float32, device=dy.device)
    for start, w in row_chunks(scheme, shape, held):
        part = dy[:, start : start + w.shape[0]].to(compute)
        out += (part @ w.to(compute)).float()
    return out.to(dy.dtype)
