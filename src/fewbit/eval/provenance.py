"""Where a checkpoint comes from, as far as it says so itself: recipe, command, hashes, sizes, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbit.base.record import plain
from fewbit.plan.kv import kv_bytes, kv_layers

CONTEXT = 8192  # tokens whose cache is counted
MANIFEST = "fewbit-manifest.json"
RECIPE_FLAGS = {
    "method": "rtn",
    "calib": None,
    "calib_samples": 128,
    "calib_length": 512,
    "seed": 0,
    "imatrix": None,
    "on_misfit": "refuse",
}


def about(source: Any) -> dict[str, Any]:
    """Facts about an open checkpoint, plain data: its format, weights, schemes, files, and the record that fewbit left beside it."""
    checkpoint = source.checkpoint
    counts: dict[str, int] = {}
    for name, stored in source.stored.items():
        counts[str(stored.scheme)] = counts.get(str(stored.scheme), 0) + source.manifest[name].numel
    if not counts:
        for info in checkpoint.manifest.values():
            kind = info.dtype.removeprefix("GGML:")
            counts[kind] = counts.get(kind, 0) + info.numel
    listed = manifest_of(checkpoint.root)
    recipe = listed.get("recipe", {})
    return plain(
        {
            "format": source.format.name if source.format else "gguf" if _is_gguf(checkpoint) else "plain",
            "model_type": source.config.get("model_type"),
            "weights": source.manifest.numel,
            "memory": memory(source),
            "bytes": checkpoint.manifest.nbytes,
            "schemes": dict(sorted(counts.items(), key=lambda item: -item[1])),
            "fingerprint": checkpoint.fingerprint(),
            "recipe": recipe,
            "made_by": f"fewbit {listed['fewbit']}" if "fewbit" in listed else None,
            "made_from": listed.get("source"),
            "command": command(listed) if recipe else None,
            "training": training(listed),
            "hashes": {name: facts.get("sha256") for name, facts in listed.get("files", {}).items()},
            "warnings": list(checkpoint.warnings),
        }
    )


def memory(source: Any) -> dict[str, int]:
    """Bytes that serving takes: weights as stored, and the key-value cache of one sequence; empty where the config does not say."""
    text = source.config.get("text_config") or source.config
    layers = kv_layers(text)
    if not layers:
        return {}
    context = min(CONTEXT, int(text.get("max_position_embeddings") or CONTEXT))
    cache, weights = kv_bytes(layers, context), source.checkpoint.manifest.nbytes
    return {"weights": weights, "cache": cache, "context": context, "total": weights + cache}


def manifest_of(root: Path) -> dict[str, Any]:
    """The record that `fewbit quantize` leaves in its outputs; empty without one."""
    path = root / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def training(listed: dict[str, Any]) -> dict[str, Any] | None:
    """How `fewbit train` came to the weights: its settings, and the points of its curve that can be drawn; None for what was not trained."""
    found = listed.get("training")
    if not isinstance(found, dict) or not isinstance(found.get("curve"), list):
        return None
    points = [point for point in found["curve"] if isinstance(point, dict)]
    numbers = [point for point in points if all(isinstance(point.get(key), (int, float)) for key in ("step", "kl"))]
    return {**found, "curve": numbers} if numbers else None


def command(listed: dict[str, Any]) -> str:
    """The command line that makes such an output again."""
    if isinstance(listed.get("training"), dict) and listed["training"].get("command"):
        return str(listed["training"]["command"])
    recipe = listed["recipe"]
    words = [
        "fewbit",
        "quantize",
        str(listed.get("source", "MODEL")),
        "--to",
        str(listed.get("target") or recipe.get("to", ["?"])[0]),
    ]
    for name, default in RECIPE_FLAGS.items():
        if recipe.get(name, default) != default:
            words += [f"--{name.replace('_', '-')}", str(recipe[name])]
    for name, value in (recipe.get("options") or {}).items():
        words += ["--set", f"{name}={value}"]
    for name in recipe.get("rewrites") or ():
        words += ["--rewrites", str(name)]
    return " ".join([*words, "-o", "OUT"])


def _is_gguf(checkpoint: Any) -> bool:
    return any(info.file.endswith(".gguf") for info in checkpoint.manifest.values())
