"""JSON as the standard says it, from files nobody vouches for.

Python's own reader takes NaN, keeps the last of two equal keys, and builds whatever it is told to. Here size, nesting and
the number of values are bounded before anything is built, and every departure from the standard is an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.store.fileio import require_regular

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return found


def _constant(text: str) -> None:
    raise _Refused(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"the number {text[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)


def loads(data: bytes, *, max_bytes: int, max_values: int) -> Any:
    """Parses JSON bytes.

    Args:
        data: UTF-8 text without byte-order mark.
        max_bytes: refused when longer.
        max_values: refused when `data` holds more commas and opening brackets than this (a bound on values, before parsing).

    Raises:
        ValueError: with a sentence that says what is wrong; the caller makes a typed error of it.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data):,} bytes, at most {max_bytes:,} are read")
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_values:
        raise ValueError(f"it holds more than {max_values:,} values")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it starts with a byte-order mark")
    if not data.strip():
        raise ValueError("it is empty")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
        if _SURROGATE.search(data):
            _check_text(value)
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check_text(value: Any) -> None:
    """Refuses half surrogate pairs, which no UTF-8 can hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def load_object(path: Path, code: str, *, max_bytes: int = 64 << 20, max_values: int = 1_000_000) -> dict[str, Any]:
    """Reads a file that must hold one JSON object; InputError `code` naming the file when it does not."""
    require_regular(path)
    try:
        with open(path, "rb") as file:
            value = loads(file.read(max_bytes + 1), max_bytes=max_bytes, max_values=max_values)
    except ValueError as error:
        raise InputError(code, f"{path.name} cannot be read: {error}", file=path) from None
    except OSError as error:
        raise InputError(code, f"{path.name} cannot be read: {error.strerror}", file=path) from None
    if not isinstance(value, dict):
        raise InputError(code, f"{path.name} holds a {type(value).__name__}, an object is needed", file=path)
    return value
