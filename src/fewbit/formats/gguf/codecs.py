"""Bytes of GGUF tensor data <-> QTensor, for every block type.

A codec is a pair of pure functions on one block per row: `unpack` turns bytes [n, nbytes] into the parts of a QTensor, named as
`QTensor.named_parts` names them, and `pack` is its inverse. Here stands what all share: the reading and writing of shapes, and the two
functions that callers use. The bit orders are in `codecs_scalar.py` (Q, K, TQ, MX, NV types, IQ4) and `codecs_vector.py` (IQ1 to IQ3).

Decoded in float32 by `QTensor.dequantize`, the values are bit for bit those of ggml's `dequantize_row_*`, because the products of f16
super-scale, integer sub-scale and level are formed in the same order. Where ggml stores a minimum to be subtracted (`dmin`), the QTensor
holds it with the other sign.

Byte patterns that ggml's encoders never write are read as ggml reads them, and written back in canonical form: TQ1_0 bytes that stand for no
five trits, the fourth code of TQ2_0 (level 2, scheme `ternary-wide-g256-f16`), the negative zero of MXFP4 and NVFP4 (+0), and NVFP4 scales
with the sign bit set or NaN (0). The scale byte 255 reads as NaN: `ggml_validate_row_data` rejects it in MXFP4, and in NVFP4 ggml reads
480 from it, which no E4M3 holds.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.codecs_scalar import SCALAR_CODECS
from fewbit.formats.gguf.codecs_vector import VECTOR_CODECS
from fewbit.formats.gguf.parts import Codec, Parts
from fewbit.formats.gguf.types import FLOATS, BlockType, block_type
from fewbit.num.grid import TERNARY, TERNARY_WIDE, Grid
from fewbit.num.qtensor import NATIVE, QTensor, code_dtype, native_dtype
from fewbit.num.scheme import Scheme

CODECS: dict[str, Codec] = {**SCALAR_CODECS, **VECTOR_CODECS}


def to_blocks(type_name: str | int, q: QTensor) -> torch.Tensor:
    """The bytes of a quantised tensor as a GGUF file holds them.

    Args:
        type_name: a type of `types.TYPES`, by name or number.
        q: on the CPU, of the scheme of that type, any number of dimensions; no sides.

    Returns:
        uint8 [*q.shape[:-1], bytes per row].

    Raises:
        InputError: FB-E0332 for another scheme or for sides, FB-E0602 when rows are not whole blocks, FB-E0603 for codes that do not fit.
    """
    row = block_type(type_name)
    wide = replace(row.scheme, grid=TERNARY_WIDE) if row.scheme.grid == TERNARY else row.scheme
    if q.scheme.weights_only not in (row.scheme, wide):
        raise InputError("FB-E0332", f"a tensor of scheme {q.scheme} cannot be stored as {row.name} ({row.spelling})")
    if q.sides:
        raise InputError("FB-E0332", f"GGUF has no place for {', '.join(q.sides)} of a tensor stored as {row.name}")
    q.check()
    out_shape = (*q.shape[:-1], row.row_bytes(q.shape[-1] if q.shape else 1))
    if row.name in FLOATS:
        return q.codes.contiguous().view(torch.uint8).reshape(out_shape)
    count = prod(q.shape) // row.block
    if not count:
        return torch.empty(out_shape, dtype=torch.uint8)
    parts = {name: _as_numpy(part).reshape(count, -1) for name, part in q.named_parts().items()}
    return torch.from_numpy(CODECS[row.name].pack(parts)).reshape(out_shape)


def from_blocks(type_name: str | int, data: torch.Tensor, shape: tuple[int, ...]) -> QTensor:
    """The quantised tensor that bytes of a GGUF file stand for.

    Args:
        type_name: a type of `types.TYPES`, by name or number.
        data: uint8, the bytes of a tensor in any shape.
        shape: shape of the tensor, outermost dimension first.

    Raises:
        InputError: FB-E0331 when the bytes are not those of such a tensor, FB-E0602 when rows are not whole blocks.
    """
    row = block_type(type_name)
    wanted = prod(shape[:-1]) * row.row_bytes(shape[-1] if shape else 1)
    if data.dtype != torch.uint8 or data.numel() != wanted:
        raise InputError(
            "FB-E0331", f"{row.name} of shape {tuple(shape)} takes {wanted} bytes, got {data.numel()} of {data.dtype}"
        )
    data = data.contiguous()
    if row.name in FLOATS:
        dtype = code_dtype(row.scheme.grid)
        flat = data.flatten()
        if flat.storage_offset() % dtype.itemsize:  # a slice of a file may start anywhere
            flat = flat.clone()
        return QTensor(row.scheme, tuple(shape), flat.view(dtype).reshape(shape))
    blocks = data.reshape(-1, row.nbytes).numpy() if wanted else np.zeros((1, row.nbytes), np.uint8)
    parts = CODECS[row.name].unpack(blocks)
    if not wanted:
        parts = {name: entries[:0] for name, entries in parts.items()}
    return _assemble(_scheme_read(row, parts), tuple(shape), parts)


def _scheme_read(row: BlockType, parts: Parts) -> Scheme:
    """The scheme of a type, widened where a foreign TQ2_0 holds its fourth code."""
    if row.scheme.grid == TERNARY and parts["codes"].size and int(parts["codes"].max()) == 3:
        return replace(row.scheme, grid=TERNARY_WIDE)
    return row.scheme


def _assemble(scheme: Scheme, shape: tuple[int, ...], parts: Parts, prefix: str = "") -> QTensor:
    """Parts [blocks, entries per block] -> QTensor, recursively."""
    codes = _as_torch(parts[f"{prefix}codes"], code_dtype(scheme.grid)).reshape(
        *shape[:-1], shape[-1] // scheme.grid.dim
    )
    counts = scheme.block_counts(shape)
    stored: dict[str, torch.Tensor | QTensor] = {}
    for name, part in scheme.parts():
        if f"{prefix}{name}.codes" in parts:
            stored[name] = _assemble(part, counts, parts, f"{prefix}{name}.")
        else:
            stored[name] = _leaf(part.grid, parts[f"{prefix}{name}"]).reshape(counts)
    return QTensor(scheme, shape, codes, stored.get("scale"), stored.get("code_shift"), stored.get("value_shift"))


def _leaf(grid: Grid, entries: np.ndarray) -> torch.Tensor:
    dtype = native_dtype(grid)
    if dtype is None:
        raise InputError("FB-E0332", f"{grid.name} has no stored dtype of its own")
    return _as_torch(entries, dtype)


def _as_torch(entries: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Entries as a tensor: reinterpreted for floats (they come as bit patterns or as f16), cast for integers."""
    found = torch.from_numpy(np.ascontiguousarray(entries))
    if found.dtype == dtype:
        return found
    return found.view(dtype) if dtype in NATIVE.values() else found.to(dtype)


def _as_numpy(part: torch.Tensor) -> np.ndarray:
    """A part as numpy; dtypes that numpy lacks as their bit patterns."""
    part = part.contiguous()
    return part.view(torch.uint8).numpy() if part.dtype.itemsize == 1 and part.dtype.is_floating_point else part.numpy()
