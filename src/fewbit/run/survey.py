"""What a checkpoint holds, from its headers: the data behind `fewbit inspect`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewbit.arch.infer import facts, model_type_of
from fewbit.base.names import matches
from fewbit.formats.table import Stored
from fewbit.run.source import Source

MANIFEST_NAME = "fewbit-manifest.json"
FLOAT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


def survey(source: Source) -> dict[str, Any]:
    """Schemes, methods, bytes and bits of every tensor, of every kind of tensor, and of every branch of the model, as plain data."""
    known = facts(source.manifest, source.config)
    raw = source.checkpoint.manifest
    written = _manifest_beside(source.root)
    listed: list[dict[str, Any]] = []
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
                "bits": _code_bits(stored, info.dtype),
                "bytes": nbytes,
                "bits_per_weight": 8 * nbytes / max(1, info.numel),
                "method": _method(name, written, source) if stored else None,
                "parts": list(stored.parts) if stored else [name],
            }
        )
    weights, nbytes = sum(item["weights"] for item in listed), sum(item["bytes"] for item in listed)
    return {
        "path": str(source.root),
        "format": source.format.name if source.format else "plain",
        "model_type": model_type_of(source.config) or raw.metadata.get("general.architecture"),
        "tensors": len(listed),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, weights),
        "groups": _groups(listed),
        "tree": _tree(listed),
        "list": listed,
        "warnings": list(source.checkpoint.warnings),
    }


def _code_bits(stored: Stored | None, dtype: str) -> float | None:
    """Bits of one weight's code, scales not counted."""
    if stored is None:
        return FLOAT_BITS.get(dtype)
    return float(stored.scheme.grid.bits) / stored.scheme.grid.dim


def _manifest_beside(root: Path) -> dict[str, Any]:
    file = (root if root.is_dir() else root.parent) / MANIFEST_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _method(name: str, written: dict[str, Any], source: Source) -> str:
    """How a weight was quantised: by our manifest, else as far as the config or the GGUF tells."""
    recipe = written.get("recipe") or {}
    if recipe:
        rules = [rule for rule in recipe.get("rules") or () if rule.get("method") and matches(rule["pattern"], name)]
        return str(rules[-1]["method"] if rules else recipe.get("method", "?"))
    if "converted" in written:
        return f"converted from {written['converted'].get('from')}"
    settings = source.checkpoint.config.get("quantization_config") or {}
    meta = settings.get("meta") or {}
    made_by = meta.get("quantizer") or settings.get("autoround_version") or (settings.get("producer") or {}).get("name")
    named = made_by[0] if isinstance(made_by, list) and made_by else made_by
    if source.format is not None and source.format.container == "gguf":
        keys = source.checkpoint.manifest.metadata
        weighed = "quantize.imatrix.file" in keys or "quantize.imatrix.entries_count" in keys
        return "gguf with an importance matrix" if weighed else "gguf"
    method = str(settings.get("quant_method") or (source.format.name if source.format else ""))
    return f"{method} by {named}" if named and str(named) != method else method


def _tree(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors that are alike but for their numbers as one branch each, in the order of the file: `model.layers.0-31.mlp.up_proj.weight`."""
    branches: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in listed:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", item["name"])
        key = (kind, item["stored"], tuple(item["shape"]), item["method"])
        branches.setdefault(key, []).append(item)
    return [_branch(kind, items) for (kind, *_), items in branches.items()]


def _branch(kind: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [[int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", item["name"])] for item in items]
    path = kind
    for place in zip(*numbers, strict=True):
        path = path.replace("#", ranges(place), 1)
    weights, nbytes = sum(item["weights"] for item in items), sum(item["bytes"] for item in items)
    return {
        "path": path,
        **{key: items[0][key] for key in ("role", "stored", "shape", "bits", "method")},
        "tensors": len(items),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, weights),
    }


def ranges(numbers: Iterable[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


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
