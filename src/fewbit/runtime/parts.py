"""A QTensor as a flat dictionary of small tensors, codes packed densely, and back.

Codes of grids up to 8 bits are packed along the last axis, rows starting at whole bytes; vector codes keep their integers. Names join with
underscores, so that they can be buffers of a module: `codes`, `scale`, or `scale_codes` and `scale_scale` where scales are quantised too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.base.errors import InputError
from fewbit.math.bits import pack, unpack
from fewbit.num.grid import Codebook, FloatGrid, Grid, IntGrid
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme

Tensors = dict[str, torch.Tensor]

PARTS = ("scale", "code_shift", "value_shift")
SIDES = ("permutation", "column_scale", "input_scale")


def code_width(grid: Grid) -> int | None:
    """Bits that a packed code takes; None when codes are kept as they are."""
    if isinstance(grid, Codebook):
        return max(1, (len(grid.table) - 1).bit_length())
    if isinstance(grid, IntGrid) or (isinstance(grid, FloatGrid) and grid.bits <= 8):
        return int(grid.bits)
    return None


def pack_codes(grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., n] -> bytes [..., ceil(n * width / 8)]; unchanged where a code fills its integer."""
    width = code_width(grid)
    return codes.contiguous() if width in (None, 8) else pack(codes, width)


def unpack_codes(grid: Grid, packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_codes` for rows of `count` codes."""
    width = code_width(grid)
    if width in (None, 8):
        return packed
    return unpack(packed, width, count, signed=isinstance(grid, IntGrid) and grid.signed)


def codes_shape(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a weight's codes before packing."""
    if scheme.is_leaf:
        shape = scheme.block_counts(shape)
    return (*shape[:-1], -(-shape[-1] // scheme.grid.dim))


def flatten(q: QTensor, prefix: str = "") -> Tensors:
    """All tensors of a quantised tensor, codes packed.

    Raises:
        InputError: FB-E0901 for sides that no kernel knows how to undo.
    """
    out = {f"{prefix}codes": pack_codes(q.scheme.grid, q.codes.reshape(codes_shape(q.scheme, q.shape)))}
    counts = q.scheme.block_counts(q.shape)
    for name in PARTS:
        stored = getattr(q, name)
        if isinstance(stored, QTensor):
            whole = QTensor(stored.scheme, counts, stored.codes, stored.scale, stored.code_shift, stored.value_shift)
            out |= flatten(whole, f"{prefix}{name}_")
        elif stored is not None:
            out[f"{prefix}{name}"] = stored
    for name, side in q.sides.items():
        if name == "outliers":
            out |= {f"{prefix}side_{key}": value for key, value in _flatten_sparse(side, q.shape).items()}
        elif name in SIDES:
            out[f"{prefix}side_{name}"] = side
        else:
            raise InputError("FB-E0901", f"no kernel knows the side {name!r} of a quantised weight")
    return out


def rebuild(scheme: Scheme, shape: tuple[int, ...], tensors: Mapping[str, torch.Tensor], prefix: str = "") -> QTensor:
    """The inverse of `flatten`.

    Raises:
        InputError: FB-E0902 when a part is missing.
    """
    counts = scheme.block_counts(shape)
    parts: dict[str, torch.Tensor | QTensor] = {}
    for name, part in scheme.parts():
        if f"{prefix}{name}" in tensors:
            parts[name] = tensors[f"{prefix}{name}"]
        else:
            parts[name] = rebuild(part, counts, tensors, f"{prefix}{name}_")
    sides = {name: tensors[f"{prefix}side_{name}"] for name in SIDES if f"{prefix}side_{name}" in tensors}
    if f"{prefix}side_values" in tensors:
        sides["outliers"] = sparse(tensors, shape, prefix)
    if f"{prefix}codes" not in tensors:
        raise InputError("FB-E0902", f"a weight stored as {scheme} has no part {prefix + 'codes'!r}")
    wanted = codes_shape(scheme, shape)
    codes = unpack_codes(scheme.grid, tensors[f"{prefix}codes"], wanted[-1])
    if tuple(codes.shape) != wanted:
        raise InputError("FB-E0902", f"codes are {tuple(codes.shape)}, {scheme} of {shape} needs {wanted}")
    return QTensor(scheme, shape, codes, **parts, sides=sides)


def _flatten_sparse(side: torch.Tensor, shape: tuple[int, ...]) -> Tensors:
    """Sparse outliers as positions int32 [n] and values [n] in row-major order, f16 where that loses nothing."""
    dense = side.to_sparse_coo().coalesce()
    rows, cols = dense.indices().reshape(-1, dense._nnz())[-2:]
    values = dense.values()
    half = values.half()
    return {
        "rows": rows.to(torch.int32),
        "cols": cols.to(torch.int32),
        "values": half if torch.equal(half.to(values.dtype), values) else values,
    }


def sparse(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], prefix: str = "") -> torch.Tensor:
    """The outliers of `flatten` as a sparse float32 matrix [rows, cols]."""
    index = torch.stack([tensors[f"{prefix}side_rows"].long(), tensors[f"{prefix}side_cols"].long()])
    return torch.sparse_coo_tensor(index, tensors[f"{prefix}side_values"].float(), shape, check_invariants=True)
