"""Tensors out of safetensors files, and into bytes: the part of the store that needs torch.

A tensor is read by position into memory of its own. Nothing is mapped: mapped pages would count as resident memory, and a file
cut short under a mapping kills the process.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, TensorInfo, data_bytes
from fewbit.store.fileio import ReadableFile

# safetensors dtype -> torch dtype; sub-byte dtypes come as the raw bytes
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.uint8, "F6_E2M3": torch.uint8, "F6_E3M2": torch.uint8,
}  # fmt: skip
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in reversed(TORCH_DTYPES.items())} | {
    torch.uint8: "U8"
}


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has once read: `shape`, but for sub-byte dtypes the bytes along the last dimension.

    When the rows do not fill whole bytes, the raw bytes come flat.
    """
    bits = DTYPE_BITS[dtype]
    if bits >= 8:
        return shape
    if shape and shape[-1] * bits % 8 == 0:
        return (*shape[:-1], shape[-1] * bits // 8)
    return (data_bytes(dtype, shape),)


def from_buffer(buffer: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over the bytes of `buffer` (uint8 [nbytes], owned and aligned), without copying."""
    if not buffer.size:
        return torch.empty(stored_shape(dtype, shape), dtype=TORCH_DTYPES[dtype])
    raw = torch.from_numpy(buffer)
    if TORCH_DTYPES[dtype] is torch.bool and int(buffer.max()) > 1:
        raise ValueError("a boolean other than 0 and 1")
    return raw.view(TORCH_DTYPES[dtype]).reshape(stored_shape(dtype, shape))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies contiguous in CPU memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data.cast("B")


class BufferPool:
    """Memory of tensors that are gone, for the next ones of that size.

    A fresh buffer costs as much time in page faults as its bytes take to copy, so reading into used ones is twice as fast. A
    buffer comes back by itself when the last tensor over it dies.

    Args:
        keep: bytes that may wait for use.
        least: smaller buffers are not kept.
    """

    def __init__(self, keep: int = 256 << 20, least: int = 1 << 20) -> None:
        self.keep, self.least = keep, least
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.RLock()  # a collection inside `take` may call `_give` in the same thread

    def take(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], content undefined."""
        if not self.least <= nbytes <= self.keep // 2:
            return np.empty(nbytes, np.uint8)
        with self._lock:
            waiting = self._free.get(nbytes)
            memory = waiting.pop() if waiting else np.empty(nbytes, np.uint8)
        lent = memory[:]
        weakref.finalize(lent, self._give, memory).atexit = False
        return lent

    def _give(self, memory: np.ndarray) -> None:
        with self._lock:
            while self.waiting + memory.nbytes > self.keep:
                size = next(size for size, buffers in self._free.items() if buffers)  # the size first used goes first
                self._free[size].pop()
            self._free.setdefault(memory.nbytes, []).append(memory)

    @property
    def waiting(self) -> int:
        """Bytes kept for use."""
        return sum(size * len(buffers) for size, buffers in self._free.items())

    def clear(self) -> None:
        with self._lock:
            self._free.clear()


class Files:
    """Open files of one checkpoint, read from any thread.

    Args:
        root: folder that the paths in each TensorInfo are relative to.
        files: relative path -> file already open.
    """

    def __init__(self, root: Path, files: dict[str, ReadableFile]) -> None:
        self.root = root
        self._files = files
        self.pool = BufferPool()

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        return self._read(info, info.offset, info.nbytes, info.shape)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension: shape [stop - start, *shape[1:]]."""
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            what = f"rows {start} to {stop} of a tensor of shape {list(info.shape)}"
            raise InputError("FB-E0112", what, tensor=info.name, file=self.root / info.file)
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        if row * (info.shape[0] or 0) != info.nbytes:
            what = f"rows of {info.dtype} {list(info.shape)} do not fill whole bytes"
            raise InputError("FB-E0112", what, tensor=info.name, file=self.root / info.file)
        shape = (stop - start, *info.shape[1:])
        return self._read(info, info.offset + start * row, (stop - start) * row, shape)

    def _read(self, info: TensorInfo, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        buffer = self.pool.take(nbytes)
        file = self._files[info.file]
        file.read_into(buffer.data, offset, info.name)
        try:
            return from_buffer(buffer, info.dtype, shape)
        except ValueError as error:
            raise InputError("FB-E0113", f"the tensor holds {error}", tensor=info.name, file=file.path) from None
