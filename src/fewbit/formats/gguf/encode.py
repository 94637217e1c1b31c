"""From planned tensors to bytes and back: the two steps between a plan and a file, and a file read as its checkpoint.

    values = source_values(tensor, read)              float32, after the tensor's ops
    data   = tensor_bytes(tensor, values or QTensor)  uint8 [*shape[:-1], bytes per row]

`decoded` is the inverse of the second, `checkpoint_tensor` of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf import ops
from fewbit.formats.gguf.codecs import from_blocks, to_blocks
from fewbit.formats.gguf.plan import PlannedTensor
from fewbit.formats.gguf.targets import Target
from fewbit.formats.gguf.types import FLOATS, block_type
from fewbit.num.qtensor import QTensor

Made = TypeVar("Made", Target, PlannedTensor)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def source_values(tensor: PlannedTensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The float values that a planned tensor shall hold, float32 `tensor.shape`.

    Args:
        read: source name -> tensor.

    Raises:
        InputError: FB-E0323 when what was read does not give the planned shape.
    """
    if tensor.values:
        return torch.tensor(tensor.values, dtype=torch.float32)
    values = ops.apply(tensor.ops, [read(name) for name in tensor.reads]).float()
    if tuple(values.shape) != tensor.shape:
        what = f"the sources give {list(values.shape)}, planned were {list(tensor.shape)}"
        raise InputError("FB-E0323", what, tensor=tensor.name)
    return values


def tensor_bytes(tensor: PlannedTensor, value: torch.Tensor | QTensor) -> torch.Tensor:
    """The bytes of a planned tensor as they stand in the file, uint8 [*shape[:-1], bytes per row].

    Args:
        value: a QTensor of the tensor's scheme; for F32, F16 and BF16 the values themselves.

    Raises:
        InputError: FB-E0314 for values that are not finite, or too large for F16.
    """
    if tensor.type not in FLOATS:
        if not isinstance(value, QTensor):
            raise InputError("FB-E0603", f"{tensor.type} is made from a quantised tensor", tensor=tensor.name)
        return to_blocks(tensor.type, value)
    values = value.dequantize() if isinstance(value, QTensor) else value
    stored = values.to(_DTYPES[tensor.type]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        source = bool(torch.isfinite(values).all())
        what = (
            f"its largest value, {float(values.abs().max()):.6g}, does not fit into F16"
            if source
            else "it holds NaN or infinity"
        )
        raise InputError("FB-E0314", what, tensor=tensor.name, remedy="store it as BF16 or F32" if source else None)
    return stored.view(torch.uint8)


def decoded(type_name: str, data: torch.Tensor, shape: tuple[int, ...], name: str = "") -> torch.Tensor:
    """The values of a stored tensor, float32.

    Args:
        data: uint8 rows of blocks, or already numbers for F32, F16 and BF16.

    Raises:
        InputError: FB-E0314 when a block's scale is not finite.
    """
    values = data.float() if data.dtype.is_floating_point else from_blocks(type_name, data, shape).dequantize()
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            "FB-E0314", f"{int((~torch.isfinite(values)).sum()):,} of its values are NaN or infinite", tensor=name
        )
    return values.reshape(shape)


def apart(q: QTensor) -> tuple[QTensor, torch.Tensor]:
    """NVFP4 as ggml has it: blocks under their E4M3 scales, and the scales over whole matrices, float32 [matrices]."""
    scale = q.scale
    if not isinstance(scale, QTensor) or not isinstance(scale.scale, torch.Tensor):
        raise InputError("FB-E0332", f"{q.scheme} has no scale over the whole tensor")
    blocks = replace(q, scheme=block_type("NVFP4").scheme, scale=scale.codes.view(torch.float8_e4m3fn))
    return blocks, scale.scale.float().reshape(-1)


def users(tensors: Sequence[Made]) -> dict[str, tuple[tuple[Made, int], ...]]:
    """Source name -> the targets or planned tensors that read it, each with its place among their reads."""
    found: dict[str, list[tuple[Made, int]]] = {}
    for tensor in tensors:
        for index, name in enumerate(tensor.reads):
            found.setdefault(name, []).append((tensor, index))
    return {name: tuple(items) for name, items in found.items()}


def checkpoint_tensor(
    name: str, readers: Mapping[str, tuple[tuple[Made, int], ...]], read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """A tensor of the original checkpoint, from the GGUF tensors that were made of it.

    Args:
        name: its name in the checkpoint.
        readers: from `users`.
        read: GGUF name -> values (see `decoded`).
    """
    if name not in readers:
        raise InputError("FB-E0323", "no tensor of the GGUF was made of it", tensor=name)
    return ops.restore([(tensor.ops, read(tensor.name), index) for tensor, index in readers[name]])
