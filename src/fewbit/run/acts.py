"""The activation store: hidden states of all calibration sequences between two blocks.

One tensor per batch, in memory while they fit the budget, else in a file that is read and written by position (never mapped: mapped
pages count as resident memory). Updated in place, batch by batch, as a block is passed. `save` and `load` keep it across a crash.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fewbit.store.fileio import pread_into, pwrite_all


class ActStore:
    """Hidden states [sequences, length, width] in batches of sequences.

    Args:
        shape: (sequences, length, width).
        dtype: of what is stored.
        batch: sequences per batch.
        path: file to spill to, or None to stay in memory.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, batch: int, path: Path | None = None) -> None:
        self.shape, self.dtype, self.batch, self.path = shape, dtype, batch, path
        self._row = shape[1] * shape[2] * dtype.itemsize
        self._memory: torch.Tensor | None = None
        self._fd = -1
        if path is None:
            self._memory = torch.empty(shape, dtype=dtype)
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._fd, shape[0] * self._row)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.shape[0] // self.batch)

    def span(self, index: int) -> tuple[int, int]:
        """Sequences [start, stop) of a batch."""
        return index * self.batch, min(self.shape[0], (index + 1) * self.batch)

    def get(self, index: int) -> torch.Tensor:
        """Hidden states of a batch, [batch, length, width]; not to be written to."""
        start, stop = self.span(index)
        if self._memory is not None:
            return self._memory[start:stop]
        raw = torch.empty((stop - start) * self._row, dtype=torch.uint8)
        pread_into(self._fd, raw.numpy().data, start * self._row)
        return raw.view(self.dtype).view(stop - start, *self.shape[1:])

    def put(self, index: int, hidden: torch.Tensor) -> None:
        """Replaces the hidden states of a batch."""
        start, stop = self.span(index)
        value = hidden.detach().to("cpu", self.dtype)
        if self._memory is not None:
            self._memory[start:stop] = value
        else:
            pwrite_all(self._fd, value.contiguous().view(-1).view(torch.uint8).numpy().data, start * self._row)

    def save(self, path: Path) -> None:
        """Writes the whole store to a file: beside first, then renamed."""
        beside = path.with_name(path.name + ".new")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for index in range(len(self)):
                data = self.get(index).contiguous().view(-1).view(torch.uint8).numpy()
                pwrite_all(fd, data.data, self.span(index)[0] * self._row)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(beside, path)

    def load(self, path: Path) -> bool:
        """Fills the store from a saved file; False when there is none of the right size."""
        if not path.exists() or path.stat().st_size != self.shape[0] * self._row:
            return False
        fd = os.open(path, os.O_RDONLY)
        try:
            for index in range(len(self)):
                start, stop = self.span(index)
                raw = torch.empty((stop - start) * self._row, dtype=torch.uint8)
                pread_into(fd, raw.numpy().data, start * self._row)
                self.put(index, raw.view(self.dtype).view(stop - start, *self.shape[1:]))
        finally:
            os.close(fd)
        return True

    def close(self) -> None:
        """Frees memory and the spill file."""
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self.path is not None:
                self.path.unlink(missing_ok=True)
