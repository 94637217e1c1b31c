"""Families of schemes that several formats share, and the few words that formats use to name tensors and dtypes.

A format asks `affine_of(scheme)` instead of looking into the recursion of a `Scheme` itself; what it gets back is flat data, or
None when the scheme is of another family. Torch-free: planning uses it from shapes alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fewbit.base.errors import InputError
from fewbit.formats.table import Assignment
from fewbit.num.blocks import EACH, TENSOR, Blocks
from fewbit.num.grid import BF16, E2M1, E4M3, E5M2, E8M0, F16, F32, FloatGrid, IntGrid
from fewbit.num.scheme import Scheme, leaf

Zero = Literal["none", "code", "float", "value"]

# grid of a leaf -> safetensors dtype of the tensor that holds it
STORED_DTYPE: dict[str, str] = {
    F32.name: "F32", F16.name: "F16", BF16.name: "BF16", E4M3.name: "F8_E4M3", E5M2.name: "F8_E5M2", E8M0.name: "F8_E8M0",
}  # fmt: skip
LEAF_GRID: dict[str, FloatGrid] = {"F32": F32, "F16": F16, "BF16": BF16}
SMALL_DTYPES = frozenset(("U8", "I8", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"))


@dataclass(frozen=True)
class Affine:
    """An integer scheme with directly stored scales: w = (code - zero) * scale, or code * scale + zero.

    Attributes:
        bits: 1 to 8.
        blocks: which weights share a scale.
        zero: "none" (signed codes), "code" (an integer zero point of the same grid), "float" (a zero point in units of codes, stored as a
            float), "value" (an offset in units of weights).
        scale: float grid of the stored scale.
        shift: float grid of the stored float zero or offset, if there is one.
    """

    bits: int
    blocks: Blocks
    zero: Zero
    scale: FloatGrid
    shift: FloatGrid | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that this describes; `affine_of(affine.scheme) == affine`."""
        grid = IntGrid(self.bits, signed=self.zero == "none")
        code_shift = (
            leaf(grid) if self.zero == "code" else leaf(self.shift) if self.zero == "float" and self.shift else None
        )
        value_shift = leaf(self.shift) if self.zero == "value" and self.shift else None
        return Scheme(grid, self.blocks, leaf(self.scale), code_shift, value_shift)


def direct_float(part: Scheme | None) -> FloatGrid | None:
    """The float grid of a part that is stored directly, one entry per block, or None."""
    if part is None or not part.is_leaf or part.blocks != EACH or not isinstance(part.grid, FloatGrid):
        return None
    return part.grid if part.grid.name in STORED_DTYPE else None


def affine_of(scheme: Scheme) -> Affine | None:
    """The scheme as `Affine`, activations aside, or None when it is not one."""
    grid, scale = scheme.grid, direct_float(scheme.scale)
    if not isinstance(grid, IntGrid) or scale not in (F32, F16, BF16):
        return None
    code, value = scheme.code_shift, scheme.value_shift
    if grid.signed:
        return Affine(grid.bits, scheme.blocks, "none", scale) if code is None and value is None else None
    if code is not None and value is None:
        if code == leaf(grid):
            return Affine(grid.bits, scheme.blocks, "code", scale)
        shift = direct_float(code)
        return Affine(grid.bits, scheme.blocks, "float", scale, shift) if shift in (F32, F16, BF16) else None
    shift = direct_float(value)
    if value is not None and code is None and shift in (F32, F16, BF16):
        return Affine(grid.bits, scheme.blocks, "value", scale, shift)
    return None


def as_affine(scheme: Scheme) -> Affine:
    """`affine_of` a scheme that a format has accepted.

    Raises:
        InputError: FB-E0603 when it is not one.
    """
    affine = affine_of(scheme)
    if affine is None:
        raise InputError("FB-E0603", f"{scheme} is not integers under one scale a block")
    return affine


def mx_element(scheme: Scheme) -> FloatGrid | None:
    """The element grid of an OCP microscaling scheme (groups of 32 under E8M0 scales), or None."""
    if scheme.scale != leaf(E8M0) or scheme.blocks != Blocks(1, 32) or not scheme.symmetric:
        return None
    return scheme.grid if isinstance(scheme.grid, FloatGrid) else None


def is_nvfp4(scheme: Scheme) -> bool:
    """Whether this is NVFP4: E2M1 in groups of 16 under E4M3 scales under one float32 for the tensor."""
    return scheme.grid == E2M1 and scheme.blocks == Blocks(1, 16) and scheme.symmetric and scheme.scale == NVFP4_SCALE


NVFP4_SCALE = Scheme(E4M3, TENSOR, leaf(F32))


def fp8_scale(scheme: Scheme) -> FloatGrid | None:
    """The scale grid of an E4M3 scheme with directly stored float scales, or None."""
    if scheme.grid != E4M3 or not scheme.symmetric:
        return None
    scale = direct_float(scheme.scale)
    return scale if scale in (F32, F16, BF16) else None


def part(name: str, suffix: str) -> str:
    """Name of a stored tensor beside a weight: `x.weight` + "scale" -> `x.weight_scale`; stacked experts the same way."""
    return f"{name}_{suffix}"


def sibling(name: str, word: str) -> str:
    """Name of a tensor of the same module: `x.weight` + "qweight" -> `x.qweight`; without a `.weight`, `x_qweight`."""
    return name[: -len("weight")] + word if name.endswith(".weight") else f"{name}_{word}"


def misfit(shape: tuple[int, ...], columns: int = 1, rows: int = 1) -> str | None:
    """A sentence when a weight is no matrix (or stack), or its columns or rows are no whole number of units; else None."""
    if len(shape) < 2 or 0 in shape:
        return f"needs a matrix or a stack of matrices, got shape {list(shape)}"
    if shape[-1] % columns:
        return f"needs in_features % {columns} == 0, got {shape[-1]}"
    if shape[-2] % rows:
        return f"needs out_features % {rows} == 0, got {shape[-2]}"
    return None


_KV_SCALE = re.compile(r"(?P<attention>.+?)\.(?:[kv]_proj\.|attn\.)?(?P<which>[kv])_scale")


def kv_scale(name: str) -> tuple[str, str] | None:
    """(attention module, "k" or "v") of a stored scale of cached keys or values, under whatever name a format has for it; else None."""
    found = _KV_SCALE.fullmatch(name)
    return (found["attention"], found["which"]) if found else None


def single_scheme(assignment: Assignment, format_name: str) -> Scheme:
    """The one scheme of all weights, for formats whose config has room for one.

    Raises:
        InputError: FB-E0620 naming the schemes when there are several.
    """
    schemes = set(assignment.schemes.values())
    if len(schemes) != 1:
        listed = ", ".join(sorted(str(scheme) for scheme in schemes))
        raise InputError("FB-E0620", f"{format_name} has one scheme for all weights of a model, got {listed or 'none'}")
    (scheme,) = schemes
    return scheme
