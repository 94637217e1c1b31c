"""Plain data: one canonical JSON for hashing, one readable JSON for people."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import PurePath
from typing import Any


def plain(value: Any) -> Any:
    """A value as JSON-ready data: dataclasses become dicts, tuples lists, sets sorted lists, fractions and paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (Fraction, PurePath)):
        return str(value)
    return value


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text on every machine."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def readable_json(value: Any) -> str:
    """JSON for people and diffs: two-space indent, keys as they come, one newline at the end."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
