"""Facts about the tensors of a checkpoint, without their data.

A manifest comes from file headers alone, so it is the one thing that planning, auditing and inspecting need; it holds no
tensor and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

# dtype name as safetensors spells it -> bits per element
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        name: full name in the checkpoint.
        dtype: safetensors dtype name, or `GGML:<type>` for a tensor in a GGUF file.
        shape: row-major shape, outermost first (GGUF's reversed order is turned round on reading).
        nbytes: bytes of data on disk.
        file: path relative to the checkpoint's root.
        offset: absolute byte offset of the data in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str = ""
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Manifest(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint by name, in file order, with the checkpoint's metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))


def data_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this dtype and shape takes; sub-byte dtypes are rounded up to a whole byte."""
    return (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
