"""Whether an engine loads what an option would write: asked of the formats themselves, matrix by matrix."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fewbit.base.errors import InputError
from fewbit.formats.engines import ENGINES, engine_accepts
from fewbit.formats.table import format_named, format_names
from fewbit.num.scheme import parse_scheme
from fewbit.plan.devices import Device
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import misfit

# what runs where when nobody says: others take every format
USUAL_ENGINE = {"datacentre": "vllm", "apple": "llama.cpp", "cpu": "llama.cpp"}


@functools.cache
def measured() -> dict[str, Any]:
    """The tables of `measured.toml`."""
    return tomllib.loads(resources.files(__package__).joinpath("measured.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Engine:
    """An engine on a device.

    Attributes:
        label: as people call it.
        key: its name in `formats.engines`.
        plain, gguf: whether it reads plain safetensors, and GGUF.
        backends: what it runs on.
    """

    label: str
    key: str
    plain: bool
    gguf: bool
    backends: tuple[str, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format it reads."""
        own = tuple(name for name, reads in (("plain", self.plain), ("gguf", self.gguf)) if reads)
        return own + tuple(name for name in format_names() if name != "gguf" and self.key in format_named(name).engines)


def engine_on(name: str, device: Device) -> Engine | None:
    """The engine that a word names, or the one that is usual on such a device; None where every format is fine.

    Raises:
        InputError: FB-E0454 with the names that exist.
    """
    wanted = name or USUAL_ENGINE.get(device.kind, "")
    if not wanted:
        return None
    table = measured()["engine"]
    key = next((key for key in table if _plain(key) == _plain(wanted)), None)
    if key is None:
        raise InputError("FB-E0454", f"no engine is called {name!r}; there are {', '.join(table)}")
    row = table[key]
    place = row.get("cpu", key) if device.backend == "cpu" else key
    return Engine(ENGINES.get(place, key), place, row["plain"], row["gguf"], tuple(row["backends"]))


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


@functools.lru_cache(maxsize=512)
def misfits(model: Model, target: str) -> tuple[int, int, str]:
    """(matrices that the format cannot hold in this scheme, all matrices, the first reason) of a target FORMAT:SCHEME."""
    name, _, spelling = target.partition(":")
    if name not in format_names() or name == "gguf":
        return 0, 0, ""
    form = format_named(name)
    scheme = form.conform(parse_scheme(spelling or form.default_scheme), "BF16")
    odd = total = 0
    first = ""
    reasons: dict[tuple, str | None] = {}
    for weight in model.weights:
        if weight.kept:
            continue
        key = (weight.matrix, weight.transposed)
        if key not in reasons:
            reasons[key] = misfit(weight, form, scheme)
        total += weight.count
        if reason := reasons[key]:
            odd, first = odd + weight.count, first or reason
    return odd, total, first


def refusal(model: Model, row: Mapping[str, Any], engine: Engine | None, device: Device) -> str:
    """Why an engine cannot load an option of `measured.toml`, in a sentence, or nothing."""
    kind, target = row["format"], row.get("to", "")
    if engine is not None and device.backend != "any" and device.backend not in engine.backends:
        return f"{engine.label} does not run on {device.backend} devices"
    if kind == "plain" or kind == "gguf":
        if engine is None or (engine.plain if kind == "plain" else engine.gguf):
            return ""
        return f"{engine.label} does not read {'plain safetensors' if kind == 'plain' else 'GGUF'}"
    if kind == "mlx" and device.backend not in ("metal", "any"):
        return "MLX is made for Apple's GPUs"
    odd, total, reason = misfits(model, target)
    if total and odd == total:
        return reason
    return _engine_refusal(model, kind, target, engine) if engine is not None else ""


def _engine_refusal(model: Model, kind: str, target: str, engine: Engine) -> str:
    form = format_named(kind)
    scheme = form.conform(parse_scheme(target.partition(":")[2] or form.default_scheme), "BF16")
    for weight in {weight.matrix: weight for weight in model.weights if not weight.kept}.values():
        if misfit(weight, form, scheme) is None and (reason := engine_accepts(kind, scheme, weight.matrix, engine.key)):
            return reason
    return ""
