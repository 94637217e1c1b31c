"""The tensor side of what formats share: codes with and without sign, reciprocal global scales, activation order, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fewbit.base.errors import InputError
from fewbit.num.qtensor import QTensor

if TYPE_CHECKING:
    from fewbit.num.scheme import Scheme

TORCH_DTYPE: dict[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U32": torch.uint32,
}  # fmt: skip
SAFETENSORS_DTYPE: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def signed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes counted from the lowest level (uint8) as those of a signed grid (int8)."""
    return (codes - (1 << (bits - 1))).view(torch.int8)  # modulo 256, which is what is wanted


def leaf_as(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """A directly stored scale as the safetensors dtype of a format; bits are kept, never rounded."""
    wanted = TORCH_DTYPE[dtype]
    if stored.dtype == wanted:
        return stored
    if {stored.dtype, wanted} <= {torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn}:
        return stored.view(wanted)
    raise InputError("FB-E0603", f"scales are {stored.dtype}, their scheme says {wanted}")


def refuse_sides(name: str, q: QTensor, format_name: str, allowed: tuple[str, ...] = ()) -> None:
    """Raise FB-E0620 when a tensor carries sides that the format cannot store: they would be lost silently."""
    lost = sorted(set(q.sides) - set(allowed))
    if lost:
        raise InputError(
            "FB-E0620", f"{format_name} has no place for the {', '.join(lost)} of this tensor", tensor=name
        )


def input_scale(name: str, q: QTensor) -> torch.Tensor:
    """The calibrated static activation scale, float32 [1].

    Raises:
        InputError: FB-E0620 when none was calibrated.
    """
    if "input_scale" not in q.sides:
        raise InputError("FB-E0620", f"{q.scheme} stores an activation scale and none was calibrated", tensor=name)
    return q.sides["input_scale"].float().reshape(1)


def divisor_of(scale: torch.Tensor) -> torch.Tensor:
    """float32 d with fl(1 / d) == scale wherever such a d exists, else the nearest; some formats store the reciprocal.

    The reciprocal of a reciprocal can be one ulp off, so the neighbours are tried too.
    """
    divisor = scale.reciprocal()
    for towards in (0.0, torch.inf):
        neighbour = torch.nextafter(divisor, torch.full_like(divisor, towards))
        better = (divisor.reciprocal() != scale) & (neighbour.reciprocal() == scale)
        divisor = torch.where(better, neighbour, divisor)
    return divisor


def multiple_of(scale: torch.Tensor, factor: float) -> torch.Tensor:
    """float32 m with fl(m / factor) == scale wherever such an m exists, else the nearest: some formats store scales times a constant."""
    multiple = scale * factor
    for towards in (0.0, torch.inf):
        neighbour = torch.nextafter(multiple, torch.full_like(multiple, towards))
        better = (multiple / factor != scale) & (neighbour / factor == scale)
        multiple = torch.where(better, neighbour, multiple)
    return multiple


def global_divisor(scale: QTensor) -> torch.Tensor:
    """The reciprocal of the float32 scale over all block scales (NVFP4), exactly as it was read where it came from a file."""
    return scale.sides.get("divisor", divisor_of(scale.leaf("scale")))


def from_divisor(scheme: Scheme, codes: torch.Tensor, divisor: torch.Tensor) -> QTensor:
    """NVFP4 block scales from E4M3 values [*batch, rows, groups] and the divisor float32 [1] or [*batch, 1, 1] over them.

    When the divisor cannot be told from its reciprocal it is kept as a side, so that writing gives the bytes that were read.
    """
    divisor = divisor.float().reshape((*codes.shape[:-2], 1, 1))
    scale = divisor.reciprocal()
    sides = {} if torch.equal(divisor_of(scale), divisor) else {"divisor": divisor}
    return QTensor(scheme, tuple(codes.shape), codes.view(torch.uint8), scale, sides=sides)


def sorted_by_group(q: QTensor, group_index: torch.Tensor, name: str) -> QTensor:
    """Bring columns that share a group together: codes [rows, cols] in file order, group_index int32 [cols] -> a permuted QTensor.

    Raises:
        InputError: FB-E0603 when a group has not its exact number of columns.
    """
    size, cols = q.scheme.group_size or q.shape[-1], q.shape[-1]
    index = group_index.long()
    counts = torch.bincount(index.clamp(0), minlength=-(-cols // size))
    if int(index.min()) < 0 or counts.tolist() != [size] * (cols // size):
        raise InputError("FB-E0603", f"g_idx does not divide {cols} columns into groups of {size}", tensor=name)
    permutation = torch.argsort(index, stable=True)
    if torch.equal(permutation, torch.arange(cols)):
        return q
    return replace(q, codes=q.codes[..., permutation], sides={**q.sides, "permutation": permutation})


def in_file_order(q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the order of the input columns, and the group of each column int32 [cols]: the inverse of `sorted_by_group`."""
    cols = q.shape[-1]
    size = q.scheme.group_size or cols
    permutation = q.sides.get("permutation")
    if permutation is None:
        return q.codes.reshape(q.shape), (torch.arange(cols) // size).to(torch.int32)
    place = torch.argsort(permutation)
    return q.codes.reshape(q.shape)[..., place], (place // size).to(torch.int32)
