"""What a checkpoint holds, from its headers: the data behind `fewbit inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fewbit.arch.infer import facts, model_type_of
from fewbit.run.source import Source


def survey(source: Source) -> dict[str, Any]:
    """Schemes, bytes and bits of every tensor and of every kind of tensor, as plain data."""
    known = facts(source.manifest, source.config)
    raw = source.checkpoint.manifest
    listed = []
    for name, info in source.manifest.items():
        stored = source.stored.get(name)
        nbytes = sum(raw[part].nbytes for part in stored.parts) if stored else info.nbytes
        listed.append(
            {
                "name": name,
                "role": known[name].role,
                "stored": str(stored.scheme) if stored else info.dtype,
                "shape": list(info.shape),
                "weights": info.numel,
                "bytes": nbytes,
                "parts": list(stored.parts) if stored else [name],
            }
        )
    weights, nbytes = sum(item["weights"] for item in listed), sum(item["bytes"] for item in listed)
    return {
        "path": str(source.root),
        "format": source.format.name if source.format else "plain",
        "model_type": model_type_of(source.config),
        "tensors": len(listed),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, weights),
        "groups": _groups(listed),
        "list": listed,
        "warnings": list(source.checkpoint.warnings),
    }


def _groups(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tensors: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for item in listed:
        key = (item["role"], item["stored"])
        tensors[key] += 1
        weights[key] += item["weights"]
        nbytes[key] += item["bytes"]
    return [
        {
            "role": role,
            "stored": stored,
            "tensors": tensors[role, stored],
            "weights": weights[role, stored],
            "bytes": nbytes[role, stored],
        }
        for role, stored in tensors
    ]
