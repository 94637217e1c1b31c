"""Tensor names: patterns that select them, and the order people expect."""

from __future__ import annotations

import fnmatch
import functools
import re

from fewbit.base.errors import InputError

_NUMBER = re.compile(r"(\d+)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d+)\.")


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern as a compiled expression: `re:…` is a regular expression (searched), anything else a glob of the whole name.

    Raises:
        InputError: FB-E0404 for what is no regular expression.
    """
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise InputError("FB-E0404", f"the pattern {pattern!r} is no regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    """Whether a tensor name is selected by a pattern (see `compile_pattern`)."""
    compiled = compile_pattern(pattern)
    return bool(compiled.search(name) if pattern.startswith("re:") else compiled.match(name))


def pattern_of(name: str) -> str:
    """A name with its numbers as `*`: the pattern of the same tensor in every layer and expert."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def natural_key(name: str) -> tuple:
    """Sort key that puts layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in _NUMBER.split(name))


def layer_index(name: str) -> int | None:
    """Index of the transformer block that a tensor belongs to, or None for tensors outside the blocks."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def stem(name: str) -> str:
    """The module part of a parameter name: `model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return name[: -len(".weight")] if name.endswith(".weight") else name
