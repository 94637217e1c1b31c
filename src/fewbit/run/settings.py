"""How a run is carried out: memory, workers, progress. None of it changes a byte of the output."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fewbit.base.errors import InputError

Event = dict[str, Any]
"""What a run reports as it goes: {"event": "start" | "job" | "note" | "done", …}."""


def default_workers() -> int:
    """One more than the usable cores, four at most: while one tensor waits for the disk the others keep the cores busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores + 1)


def default_ram() -> int:
    """Three quarters of the memory that is free now, in bytes."""
    return int(psutil.virtual_memory().available * 0.75)


def silent(event: Event) -> None:
    """Takes no notice."""


@dataclass(frozen=True)
class Settings:
    """Execution settings.

    Attributes:
        ram: hard limit of resident memory, bytes.
        vram: limit of device memory, bytes; 0 on the CPU.
        workers: tensors in flight at most.
        device: "cpu", "cuda", "cuda:0" …
        overwrite: replace an existing output.
        on_event: called with each event, from any thread.
    """

    ram: int
    workers: int
    vram: int = 0
    device: str = "cpu"
    overwrite: bool = False
    on_event: Callable[[Event], None] = silent


def settings(
    ram: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = silent,
    vram: int = 0,
) -> Settings:
    """Settings with defaults filled in from the machine."""
    device = chosen_device(device)
    return Settings(
        ram=ram or default_ram(),
        workers=workers or default_workers(),
        vram=device_bytes(device, vram) or 0,
        device=device,
        overwrite=overwrite,
        on_event=on_event,
    )


def chosen_device(device: str) -> str:
    """The device that a word stands for: `auto` is CUDA where there is one.

    Raises:
        InputError: FB-E0513 for a word that names none.
    """
    if device == "auto":
        if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
            return "cpu"  # without asking torch, which takes a second to import
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError("FB-E0513", f"{device!r} is no device; there are cpu, cuda, cuda:0 … and auto")
    return device


def device_bytes(device: str, vram: int = 0) -> int | None:
    """What a run may take of a device's memory: what was asked for, else nine tenths of what is free now; None on the CPU.

    Raises:
        InputError: FB-E0513 when the device has to be asked and is not there.
    """
    if device == "cpu":
        return None
    if vram:
        return vram
    require_device(device)
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0] * 0.9)


def require_device(device: str) -> None:
    """Makes sure that a run can be carried out on a device.

    Raises:
        InputError: FB-E0513.
    """
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("FB-E0513", f"torch {torch.__version__} sees no CUDA device here")
    index = torch.device(device).index
    if index is not None and index >= torch.cuda.device_count():
        raise InputError("FB-E0513", f"there are {torch.cuda.device_count()} CUDA devices, {device} is not among them")


def room_for(out: Path, nbytes: int) -> int:
    """Bytes missing on the disk of a folder for `nbytes` more; zero or less when they fit. A partial output counts as room."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    partial = out.absolute().with_name(out.name + ".partial")
    return nbytes - shutil.disk_usage(place).free - (folder_bytes(partial) if partial.exists() else 0)


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    )
