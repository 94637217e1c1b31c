"""What keeps a run within its memory and its cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fewbit.base.errors import ResourceError


class ByteGate:
    """Lets work through as long as the bytes in flight stay within a limit; one job may always run."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._running = limit, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0 or self._held + nbytes <= self._limit)
            self._held += nbytes
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._running -= 1
                self._changed.notify_all()


@contextmanager
def torch_threads(workers: int) -> Iterator[None]:
    """Shares torch's threads among workers that are started in here, so that they do not crowd the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // max(1, workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def device_memory(device: str, vram: int) -> Iterator[None]:
    """Holds torch to `vram` bytes of a CUDA device while this lasts; nothing on the CPU.

    Raises:
        ResourceError: FB-E0512 in place of torch's own error, when more is asked for; what is finished is kept, as after an interruption.
    """
    if device == "cpu":
        yield
        return
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.device(device)).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram / total), torch.device(device))
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{device} ran out of the {vram / 1e9:.2f} GB that --vram allows: {str(error).splitlines()[0]}"
        raise ResourceError("FB-E0512", what) from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0, torch.device(device))
