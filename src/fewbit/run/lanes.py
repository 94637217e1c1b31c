"""Batches of the calibration text side by side: two at a time with half of the cores each, for small products keep few threads busy.

Lane k takes batches k, k + lanes, …, in order, and what it sums it sums for itself; the sums of lanes are added in their order. So the result does not
depend on which thread was faster. Modules are not shared: see `hf.BlockModel.run_block`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fewbit.run.limits import torch_threads

LANES = 2
_THREAD = threading.local()


def lane() -> int:
    """The lane that the calling thread is in; 0 outside of any."""
    return getattr(_THREAD, "lane", 0)


def in_lanes(
    count: int, lanes: int, work: Callable[[int], None], check_stop: Callable[[], None] = lambda: None
) -> None:
    """Calls `work(batch)` for every batch below `count`; the first exception of any lane stops all and is raised.

    Args:
        lanes: how many at a time; 1 runs here, with all threads.
    """
    if lanes == 1:
        for batch in range(count):
            check_stop()
            work(batch)
        return
    failed, grads = threading.Event(), torch.is_grad_enabled()

    def run(number: int) -> None:
        _THREAD.lane = number
        with torch.set_grad_enabled(grads):
            for batch in range(number, count, lanes):
                if failed.is_set():
                    return
                try:
                    check_stop()
                    work(batch)
                except BaseException:
                    failed.set()
                    raise

    with torch_threads(lanes), ThreadPoolExecutor(max_workers=lanes) as pool:
        for future in [pool.submit(run, number) for number in range(lanes)]:
            future.result()
