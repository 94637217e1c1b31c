"""Completeness: weights of a kind that is quantised elsewhere, and are not, or are not there at all.

A kind is a name with its numbers taken out, `model.layers.#.mlp.experts.#.up_proj.weight`. What the config leaves out by name is no fault.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from typing import Any

from fewbit.base.names import natural_key, stem


def skipped(names: Iterable[str], quantised: Container[str], config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) for every weight that was skipped or lost.

    Args:
        names: logical tensors of the checkpoint.
        quantised: those that are stored quantised.
        config: config.json, with its quantisation part.
    """
    everything: dict[str, set[str]] = defaultdict(set)
    for name in names:
        everything[_kind(name)].add(name)
    left_out = list(_names_left_out(config))
    for kind, members in everything.items():
        done = {name for name in members if name in quantised}
        for name in sorted(members - done, key=natural_key) if done else ():
            if not any(_mentions(pattern, stem(name)) for pattern in left_out):
                yield (
                    name,
                    f"is not quantised, {len(done)} weights of its kind are and the config does not leave it out",
                )
        for name in _gaps(kind, members):
            yield name, f"is missing, {len(members)} tensors of its kind are stored"


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _gaps(kind: str, names: set[str]) -> list[str]:
    """Names that a run of numbers lacks: experts 0, 1 and 3 of a layer, where every layer has four."""
    count = kind.count("#")
    numbers = [tuple(int(number) for number in re.findall(r"\d+", name)) for name in names]
    if count == 0 or len(numbers) < 2:
        return []
    missing: list[tuple[int, ...]] = []
    if count == 1:
        present = {number[0] for number in numbers}
        missing = [(index,) for index in range(min(present), max(present)) if index not in present]
        missing = missing if len(missing) * 4 <= len(present) else []  # kinds that only some layers have are no gaps
    elif count == 2:
        inner = {number[1] for number in numbers}
        for outer in sorted({number[0] for number in numbers}):
            missing += [(outer, index) for index in sorted(inner) if (outer, index) not in set(numbers)]
        missing = missing if len(missing) * 4 <= len(numbers) else []
    pieces = kind.split("#")
    return ["".join(piece + str(n) for piece, n in zip(pieces, number)) + pieces[-1] for number in missing]


def _names_left_out(config: dict[str, Any]) -> Iterator[str]:
    """Every string of the quantisation settings that could name a module left in floating point."""
    settings = config.get("quantization_config") or config.get("quantization") or {}
    for key in (
        "ignore",
        "modules_to_not_convert",
        "ignored_layers",
        "exclude_modules",
        "llm_int8_skip_modules",
        "skip_modules",
    ):
        yield from settings.get(key) or ()
    for key, value in settings.items():
        if value is False:
            yield key
    for pattern in settings.get("dynamic") or {}:
        if pattern.startswith("-:"):
            yield f"re:{pattern[2:]}"
    for name, words in (settings.get("extra_config") or {}).items():
        if isinstance(words, dict) and words.get("bits") == 16:
            yield name


def _mentions(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return re.fullmatch(".*".join(re.escape(piece) for piece in pattern.split("*")), module) is not None
    return pattern == module or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")
