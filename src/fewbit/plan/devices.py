"""Devices that a model may run on: a table of facts, and words that name a row of it.

"RTX 4090"      one row           "2x H100"   several of one kind, with the model split over them
"24GB"          just a memory     "16 GiB"
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources

from fewbit.base.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One device, or several of one kind.

    Attributes:
        kind: consumer, workstation, datacentre, apple, cpu, or memory (nothing known but a size).
        backend: cuda, rocm, xpu, metal, cpu.
        memory_bytes: what it has in all.
        usable: share of it that a model can have.
        overhead_bytes: what the runtime takes, an assumption.
        bandwidth: bytes a second, 0 when unknown.
        tflops: dense peak by dtype, in 10^12 operations a second.
        count: how many of them.
    """

    name: str
    kind: str
    backend: str
    memory_bytes: int
    usable: float
    overhead_bytes: int
    bandwidth: float
    tflops: Mapping[str, float]
    count: int = 1

    @property
    def budget(self) -> int:
        """Bytes for weights, cache and activations together."""
        return int(self.memory_bytes * self.usable) - self.overhead_bytes * self.count

    def native(self, dtype: str) -> bool:
        """Whether it multiplies this dtype in hardware."""
        return dtype in self.tflops

    def rate(self, dtype: str) -> float:
        """Operations a second in a dtype that it multiplies natively, 0 in others; 16-bit floats at the better of their two rates."""
        if dtype in ("bf16", "fp16"):
            return 1e12 * max(self.tflops.get("bf16", 0.0), self.tflops.get("fp16", 0.0))
        return 1e12 * self.tflops.get(dtype, 0.0)


@functools.cache
def devices() -> dict[str, Device]:
    """All rows of `devices.toml` by name."""
    table = tomllib.loads(resources.files(__package__).joinpath("devices.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table["device"].items():
        backend = table["backend"][row["backend"]]
        usable = 2 / 3 if row["backend"] == "metal" and row["memory"] < 36 else backend["usable"]
        overhead = int(backend["overhead_gb"] * 1e9)
        memory = int(row["memory"] * GIB)
        found[name] = Device(
            name, row["kind"], row["backend"], memory, usable, overhead, row["bandwidth"] * 1e9, row["tflops"]
        )
    return found


def device_named(text: str) -> Device:
    """The device that a word names.

    Raises:
        InputError: FB-E0452 with the nearest names.
    """
    count, name = 1, text.strip()
    several = re.match(r"(\d+)\s*[x×]\s+(.+)$", name, re.IGNORECASE)
    if several:
        count, name = max(1, int(several.group(1))), several.group(2).strip()
    found = _bare_memory(name) or _row(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), [key.lower() for key in devices()], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(key for key in devices() if key.lower() in near)}? " if near else ""
        what = f"no device is called {text!r}; {hint}A bare size such as 24GB works too"
        raise InputError("FB-E0452", what)
    return found if count == 1 else several_of(found, count)


def several_of(device: Device, count: int) -> Device:
    """`count` devices that share a model: memory, bandwidth and rates add up at best."""
    tflops = {dtype: rate * count for dtype, rate in device.tflops.items()}
    return replace(
        device,
        name=f"{count}x {device.name}",
        memory_bytes=device.memory_bytes * count,
        bandwidth=device.bandwidth * count,
        tflops=tflops,
        count=count,
    )


def _row(name: str) -> Device | None:
    """A row by its name without regard to case, spaces or vendor; by a unique beginning else."""

    def plain(text: str) -> str:
        return re.sub(r"nvidia|geforce|amd|radeon|instinct|intel|[\s_-]+", "", text.lower())

    wanted = plain(name)
    by_plain = {plain(key): device for key, device in devices().items()}
    if wanted in by_plain:
        return by_plain[wanted]
    near = [
        device
        for key, device in by_plain.items()
        if wanted and key.removeprefix("rtx").removeprefix("apple").startswith(wanted.removeprefix("rtx"))
    ]
    return near[0] if len(near) == 1 or (near and len({device.memory_bytes for device in near}) == 1) else None


def _bare_memory(text: str) -> Device | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB|TB|TiB)", text, re.IGNORECASE)
    if not found:
        return None
    unit = {"gb": 1e9, "gib": GIB, "g": 1e9, "mb": 1e6, "mib": 1 << 20, "tb": 1e12, "tib": 1 << 40}[
        found.group(2).lower()
    ]
    return Device(text, "memory", "any", int(float(found.group(1)) * unit), 1.0, 0, 0.0, {})
