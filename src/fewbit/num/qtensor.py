"""QTensor: a tensor as codes, scales and shifts, and the one function that turns it back into numbers.

Codes are plain grid indices, one per weight (or per `dim` weights): never bit-packed, offset or interleaved. Packing belongs
to formats and to kernel layouts.

Storage dtypes. Codes: int8 for signed integer grids, uint8 for unsigned ones, for bit patterns and for codebooks of at most 256
levels, int32 for vector grids. A leaf scheme (scale or shift stored directly) is a plain tensor of the dtype that natively holds its
levels: float32, float16, bfloat16, float8_e4m3fn, float8_e8m0fnu, int8, uint8; its values are the levels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.num.blocks import Tiling
from fewbit.num.grid import BF16, E4M3, E5M2, E8M0, F16, F32, UE4M3, Codebook, FloatGrid, Grid, IntGrid, VectorGrid
from fewbit.num.scheme import Scheme

NATIVE: dict[str, torch.dtype] = {
    F32.name: torch.float32,
    F16.name: torch.float16,
    BF16.name: torch.bfloat16,
    E4M3.name: torch.float8_e4m3fn,
    E5M2.name: torch.float8_e5m2,
    E8M0.name: torch.float8_e8m0fnu,
    UE4M3.name: torch.float8_e4m3fn,
}
_BITS_DTYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def native_dtype(grid: Grid) -> torch.dtype | None:
    """The torch dtype whose values are the levels of a grid, or None when there is none."""
    if isinstance(grid, IntGrid):
        return torch.int8 if grid.signed else torch.uint8
    return NATIVE.get(grid.name)


def code_dtype(grid: Grid) -> torch.dtype:
    """The torch dtype that holds codes of a grid."""
    if isinstance(grid, IntGrid):
        return torch.int8 if grid.signed else torch.uint8
    if isinstance(grid, VectorGrid):
        return torch.int32
    if isinstance(grid, FloatGrid) and grid.bits > 8:
        return _BITS_DTYPE[grid.bits // 8]
    return torch.uint8


@functools.lru_cache(maxsize=128)
def level_table(grid: Grid, device: torch.device) -> torch.Tensor:
    """float32 [levels] (vector grids: magnitudes, [2^index_bits, dim / parts]) on a device; do not write to it."""
    levels = grid.magnitudes() if isinstance(grid, VectorGrid) else grid.levels()
    return torch.tensor(levels, dtype=torch.float32, device=device)


def decode_codes(grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Levels of codes: [..., n] -> float32 [..., n * dim]."""
    if isinstance(grid, IntGrid):
        return codes.float()
    if isinstance(grid, VectorGrid):
        return _decode_vectors(grid, codes)
    native = NATIVE.get(grid.name)
    if native is not None:
        return codes.view(native).float()
    return level_table(grid, codes.device)[codes.long()]


def _decode_vectors(grid: VectorGrid, codes: torch.Tensor) -> torch.Tensor:
    table = level_table(grid, codes.device)
    mask = (1 << grid.index_bits) - 1
    parts = [table[((codes >> (part * grid.index_bits)) & mask).long()] for part in range(grid.parts)]
    values = torch.cat(parts, dim=-1)  # [..., n, dim]
    if grid.sign_bits:
        shifts = torch.arange(grid.sign_bits, device=codes.device, dtype=codes.dtype)
        signs = (codes.unsqueeze(-1) >> (grid.parts * grid.index_bits) >> shifts) & 1
        if grid.sign_bits == grid.dim - 1:
            signs = torch.cat([signs, signs.sum(-1, keepdim=True, dtype=codes.dtype) & 1], dim=-1)
        values = torch.where(signs == 1, -values, values)
    return values.flatten(-2)


def values_of(stored: torch.Tensor | QTensor) -> torch.Tensor:
    """A stored scale or shift as float32 numbers."""
    return stored.dequantize() if isinstance(stored, QTensor) else stored.float()


def expand(values: torch.Tensor, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """Entries per block, [*batch, block rows, block cols], repeated over the weights of a tensor of `shape`.

    Returns a tensor of the tiling's view shape (see `Tiling.view`); broadcast dimensions stay broadcast where possible.
    """
    tiling = scheme.blocks.resolve(shape)
    out = values.reshape(tiling.grid)
    if tiling.grid[-2] > 1 and tiling.block_rows > 1:
        out = out.repeat_interleave(tiling.block_rows, dim=-2)[..., : tiling.rows, :]
    if tiling.grid[-1] > 1 and tiling.block_cols > 1:
        out = out.repeat_interleave(tiling.block_cols, dim=-1)[..., : tiling.cols]
    return out.expand(tiling.view)


@dataclass(frozen=True)
class QTensor:
    """A quantised tensor.

    Attributes:
        scheme: how it is stored.
        shape: shape of the tensor that it stands for.
        codes: grid indices, `shape` with the last dimension divided by `grid.dim`.
        scale, code_shift, value_shift: stored per block, plain tensors for leaf schemes, QTensors otherwise; None where the scheme has none.
            Leaves with blocks of their own (one offset for all) hold one entry per such block.
        sides: what to undo after decoding, named: {"permutation": int64 [cols]} (column j of the codes is input column permutation[j]),
            {"outliers": sparse}, {"column_scale": float [cols]} (what inputs are multiplied by at run time) and the like; empty for nearly all.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    codes: torch.Tensor
    scale: torch.Tensor | QTensor | None = None
    code_shift: torch.Tensor | QTensor | None = None
    value_shift: torch.Tensor | QTensor | None = None
    sides: dict[str, Any] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, `shape`, computed in float32 by the equation of `num.scheme` and cast once to `dtype`."""
        values = decode_codes(self.scheme.grid, self.codes).reshape(self._code_shape())
        if self.scheme.is_leaf:
            return expand(values, self.scheme, self.shape).reshape(self.shape).to(dtype)
        tiling = self.scheme.blocks.resolve(self.shape)
        values = values.reshape(tiling.blocked if tiling.even else tiling.view)
        if values.data_ptr() == self.codes.data_ptr():
            values = values.clone()
        if self.code_shift is not None:
            values -= self._broadcast("code_shift", tiling)
        if self.scale is not None:
            values *= self._broadcast("scale", tiling)
        if self.value_shift is not None:
            values += self._broadcast("value_shift", tiling)
        values = values.reshape(self.shape)
        permutation = self.sides.get("permutation")
        if permutation is not None:
            values = values[..., torch.argsort(permutation)]
        column_scale = self.sides.get("column_scale")
        if column_scale is not None:
            values = values * column_scale.float()
        outliers = self.sides.get("outliers")
        if outliers is not None:
            values = values + outliers.to_dense().reshape(self.shape)
        return values.to(dtype)

    def _code_shape(self) -> tuple[int, ...]:
        if self.scheme.is_leaf:
            return self.scheme.block_counts(self.shape)
        return self.shape

    def _broadcast(self, name: str, tiling: Tiling) -> torch.Tensor:
        """A part as float32 that broadcasts over the weights: one entry per block of an even tiling, else one per weight."""
        part, stored = getattr(self.scheme, name), getattr(self, name)
        values = values_of(stored)
        counts = self.scheme.block_counts(self.shape)
        if part.is_leaf:  # a leaf may hold fewer entries than blocks: one per block of the block array
            values = expand(values, part, counts)
        if tiling.even:
            return values.reshape(*counts[:-1], 1, counts[-1], 1)
        return expand(values.reshape(counts), self.scheme, self.shape)

    def leaf(self, part: str) -> torch.Tensor:
        """`scale`, `code_shift` or `value_shift` of a tensor whose scheme stores it directly.

        Raises:
            InputError: FB-E0603 when there is none, or when it is quantised itself.
        """
        stored = getattr(self, part)
        if isinstance(stored, torch.Tensor):
            return stored
        raise InputError("FB-E0603", f"a {part} stored directly is wanted, {self.scheme} has it {_how(stored)}")

    def nested(self, part: str) -> QTensor:
        """`scale`, `code_shift` or `value_shift` of a tensor whose scheme quantises it.

        Raises:
            InputError: FB-E0603 when there is none, or when it is stored directly.
        """
        stored = getattr(self, part)
        if isinstance(stored, QTensor):
            return stored
        raise InputError("FB-E0603", f"a quantised {part} is wanted, {self.scheme} has it {_how(stored)}")

    @property
    def storage_bits(self) -> int:
        """Exact bits of codes and metadata; `sides` that are stored count too."""
        bits = self.scheme.storage_bits(self.shape)
        outliers = self.sides.get("outliers")
        if outliers is not None:
            bits += 48 * outliers._nnz()  # f16 value, int32 position
        permutation = self.sides.get("permutation")
        return bits + (32 * permutation.numel() if permutation is not None else 0)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor with all its parts on a device."""
        parts = {name: getattr(self, name) for name in ("codes", "scale", "code_shift", "value_shift")}
        moved = {name: part.to(device) for name, part in parts.items() if part is not None}
        return replace(self, **moved, sides={name: side.to(device) for name, side in self.sides.items()})

    def named_parts(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All tensors of this one, flat: `codes`, `scale` or `scale.codes`, … In a fixed order."""
        parts = {f"{prefix}codes": self.codes}
        for name in ("scale", "code_shift", "value_shift"):
            stored = getattr(self, name)
            if isinstance(stored, QTensor):
                parts |= stored.named_parts(f"{prefix}{name}.")
            elif stored is not None:
                parts[f"{prefix}{name}"] = stored
        return parts | {f"{prefix}sides.{name}": side for name, side in self.sides.items()}

    def check(self, tensor: str | None = None) -> None:
        """Raise FB-E0603 unless dtypes, shapes and code ranges are what the scheme says."""
        problem = self._problem()
        if problem:
            raise InputError("FB-E0603", problem, tensor=tensor)

    def _problem(self) -> str | None:
        grid = self.scheme.grid
        wanted = (*self._code_shape()[:-1], -(-self._code_shape()[-1] // grid.dim)) if self.shape else ()
        if self.codes.numel() != _numel(wanted) or self.codes.dtype != code_dtype(grid):
            return f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, {self.scheme} of {self.shape} needs {code_dtype(grid)} {wanted}"
        low, high = _code_range(grid)
        if self.codes.numel():
            least, most = (int(end) for end in self.codes.aminmax())
            if least < low or most > high:
                return f"codes reach from {least} to {most}, {grid.name} has {low} to {high}"
        for name, part in (
            ("scale", self.scheme.scale),
            ("code_shift", self.scheme.code_shift),
            ("value_shift", self.scheme.value_shift),
        ):
            stored = getattr(self, name)
            if (part is None) != (stored is None):
                return f"{name} is {'missing' if stored is None else 'there'} although {self.scheme} says otherwise"
            if isinstance(stored, QTensor):
                if inner := stored._problem():
                    return f"{name}: {inner}"
            elif part is not None:
                counts = part.block_counts(self.scheme.block_counts(self.shape))
                if stored.numel() != _numel(counts):
                    return f"{name} has {stored.numel()} entries, {self.scheme} of {self.shape} needs {counts}"
                if stored.dtype.is_floating_point and not all_finite(stored):
                    return f"{name} holds NaN or infinity"
        return None


def all_finite(values: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite; their sum, which is quicker, tells unless it leaves float32 itself."""
    values = values.float() if values.dtype.itemsize == 1 else values  # eight bits have no sums
    kind = torch.float32 if values.dtype.is_floating_point else None
    return bool(values.sum(dtype=kind).isfinite()) or bool(values.isfinite().all())


def _how(stored: torch.Tensor | QTensor | None) -> str:
    return "not at all" if stored is None else "quantised" if isinstance(stored, QTensor) else "directly"


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _code_range(grid: Grid) -> tuple[int, int]:
    if isinstance(grid, IntGrid):
        return grid.low, grid.high
    if isinstance(grid, Codebook):
        return 0, len(grid.table) - 1
    if isinstance(grid, FloatGrid) and grid.bits > 8:
        return -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
    return 0, (1 << int(grid.bits)) - 1
