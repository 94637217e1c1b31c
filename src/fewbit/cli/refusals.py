"""Errors as people read them: those that say the same of many tensors are shown once, with the names folded into patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.base.errors import FewbitError
from fewbit.base.names import pattern_of

SHOWN = 20


@dataclass(frozen=True)
class Line:
    """One thing to say: its message, and (label, text) of what it is about."""

    code: str
    message: str
    about: tuple[tuple[str, str], ...]


def lines(errors: Sequence[FewbitError]) -> list[Line]:
    """Errors of equal code, message and file as one line each, in order of first appearance."""
    groups: dict[tuple[str, str, str | None], list[FewbitError]] = {}
    for error in errors:
        groups.setdefault((error.code, error.message, error.file), []).append(error)
    return [_line(group) for group in groups.values()]


def _line(group: list[FewbitError]) -> Line:
    first = group[0]
    names = [error.tensor for error in group if error.tensor]
    patterns = Counter(map(pattern_of, names)) if len(names) > 1 else Counter(names)
    about = [("tensor", pattern + (f"  ({count} tensors)" if count > 1 else "")) for pattern, count in patterns.items()]
    if first.file:
        about.append(("file", first.file))
    if first.remedy:
        kept = list(dict.fromkeys(_folded(error, patterns) for error in group))
        about.append(("hint", kept[0] + (" (likewise for the others)" if len(kept) > 1 else "")))
    return Line(first.code, first.message, tuple(about))


def _folded(error: FewbitError, patterns: Counter[str]) -> str:
    """An error's remedy, with the pattern that stands for its tensor instead of its name."""
    remedy, pattern = error.remedy or "", pattern_of(error.tensor or "")
    return remedy.replace(error.tensor, pattern) if error.tensor and pattern in patterns else remedy
