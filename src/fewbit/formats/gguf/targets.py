"""Which tensors a GGUF of a checkpoint holds, and what each is made of: the rows of a family's table, written out.

Everything is decided from names and shapes. The account is complete both ways: a target without its source is refused, and so is a
source that no row takes and no row drops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fewbit.base.errors import InputError
from fewbit.base.names import matches, natural_key
from fewbit.formats.gguf.expressions import evaluate, first
from fewbit.formats.gguf.families import Family
from fewbit.formats.gguf.metadata import bad_name
from fewbit.formats.gguf.shapes import resolved, shape_after


class Info(Protocol):
    """What is needed of a source tensor: a row of a Manifest will do."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Target:
    """One tensor of the output.

    Attributes:
        name: its GGUF name.
        reads: the source tensors it is made of; none where it is made from the config.
        ops: what is done to them, in order; see `shapes.py`.
        shape: row-major shape afterwards.
        dtype: dtype of the first source, "F32" without one.
        values: the numbers themselves where it is made from the config.
    """

    name: str
    reads: tuple[str, ...]
    ops: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...] = ()


def rope_llama3(names: Mapping[str, Any]) -> list[float] | None:
    """Llama 3.1's frequency divisors: 1 for short waves, `factor` for long ones, a smooth passage between; None for other ropes."""
    rope = names["rope"]
    if rope.get("rope_type") != "llama3":
        return None
    dim = first(names.get("head_dim"), names["hidden_size"] // names["num_attention_heads"])
    base, factor = first(rope.get("rope_theta"), 10000.0), first(rope.get("factor"), 8.0)
    low, high = first(rope.get("low_freq_factor"), 1.0), first(rope.get("high_freq_factor"), 4.0)
    context = first(rope.get("original_max_position_embeddings"), 8192)
    factors = []
    for index in range(0, dim, 2):
        waves = context * base ** (-index / dim) / (2 * math.pi)  # turns within the original context
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


GENERATED: dict[str, Callable[[Mapping[str, Any]], list[float] | None]] = {
    "rope_llama3": rope_llama3,
    "rope_long": lambda names: names["rope"].get("long_factor"),
    "rope_short": lambda names: names["rope"].get("short_factor"),
}


class _Expansion:
    """The state of one pass over a family's rows."""

    def __init__(self, sources: Mapping[str, Info], names: Mapping[str, Any], family: Family) -> None:
        self.sources, self.names, self.family = sources, names, family
        self.blocks = first(*(names.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")))
        self.experts = first(*(names.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")))
        self.prefix = self._prefix()
        self.used: set[str] = set()
        self.targets: list[Target] = []
        self.missing: list[str] = []

    def _prefix(self) -> str:
        """What the checkpoint writes where the table has its first prefix."""
        usual = self.family.prefixes[0]
        rest = self.family.tensors["token_embd.weight"][0].partition("|")[0].strip().removeprefix(usual)
        return next((prefix for prefix in self.family.prefixes if prefix + rest in self.sources), usual)

    def row(self, key: str, rules: tuple[str, ...]) -> None:
        optional, name = key.endswith("?"), key.removesuffix("?")
        for block in range(self.blocks) if "{i}" in name else [0]:
            target = name.replace("{i}", str(block))
            found = next((made for rule in rules if (made := self.make(target, rule, block))), None)
            if found:
                self.targets.append(found)
            elif not optional:
                self.missing.append(f"{target} (from {self.source_name(rules[0], block)})")

    def source_name(self, rule: str, block: int) -> str:
        source = rule.partition("|")[0].strip().replace("{i}", str(block))
        usual = self.family.prefixes[0]
        return self.prefix + source.removeprefix(usual) if source.startswith(usual) else source

    def make(self, target: str, rule: str, block: int) -> Target | None:
        source, *ops = (part.strip() for part in rule.split("|"))
        if source in GENERATED:
            values = GENERATED[source](self.names)
            return Target(target, (), (), (len(values),), "F32", tuple(map(float, values))) if values else None
        reads = self.reads(self.source_name(rule, block))
        if not reads:
            return None
        info = self.sources[reads[0]]
        shape, done = tuple(info.shape), []
        for op in ops:
            done.append(resolved(op, shape, lambda text: evaluate(text, self.names)))
            shape = shape_after(done[-1], shape, len(reads))
        self.used.update(reads)
        return Target(target, reads, tuple(done), shape, info.dtype)

    def reads(self, source: str) -> tuple[str, ...]:
        if "{e}" not in source:
            return next(((name,) for name in (source, f"language_model.{source}") if name in self.sources), ())
        names = [source.replace("{e}", str(expert)) for expert in range(self.experts or 0)]
        held = [name for name in names if name in self.sources]
        if held and len(held) < len(names):
            lost = next(name for name in names if name not in self.sources)
            raise InputError("FB-E0323", f"{len(names) - len(held)} of {len(names)} experts are missing", tensor=lost)
        shapes = {self.sources[name].shape for name in held}
        if len(shapes) > 1:
            raise InputError(
                "FB-E0323", f"experts of different shapes cannot be stacked: {sorted(shapes)}", tensor=held[0]
            )
        return tuple(held)

    def leftovers(self) -> tuple[list[str], list[str]]:
        """(sources that nothing takes, a sentence for each note that applies)."""
        unknown: list[str] = []
        notes: dict[str, None] = {}
        tied = self.names.get("tie_word_embeddings") and "output.weight?" in self.family.tensors
        for name in self.sources:
            if name in self.used or any(matches(pattern, name) for pattern in self.family.drop):
                continue
            sentence = next((text for pattern, text in self.family.notes.items() if self._noted(pattern, name)), None)
            if sentence:
                notes[sentence] = None
            elif tied and name.endswith("lm_head.weight"):
                notes["lm_head.weight is left out: the config ties it to the embedding"] = None
            else:
                unknown.append(name)
        return sorted(unknown, key=natural_key), list(notes)

    def _noted(self, pattern: str, name: str) -> bool:
        if not matches(pattern, name):
            return False
        found = re.search(r"\.layers\.(\d+)\.", name) if r"(\d+)" in pattern else None
        return not found or int(found[1]) >= self.blocks


def expand(
    sources: Mapping[str, Info], names: Mapping[str, Any], family: Family
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """All targets of a checkpoint in file order, and what is worth saying.

    Args:
        sources: name -> anything with `shape` and `dtype`, e.g. a Manifest.
        names: a config made ready by `families.prepared`.

    Raises:
        InputError: FB-E0323 with all that is missing or left over; FB-E0308 for a name too long.
    """
    work = _Expansion(sources, names, family)
    tied = names.get("tie_word_embeddings")
    for key, rules in family.tensors.items():
        if not (key == "output.weight?" and tied):
            work.row(key, rules)
    made = {target.name for target in work.targets}
    for group in family.choices:
        for block in range(work.blocks):
            options = [option.replace("{i}", str(block)) for option in group]
            if not made.intersection(options):
                work.missing.append(" or ".join(options))
    if tied is False and "output.weight?" in family.tensors and "output.weight" not in made:
        work.missing.append("output.weight (from lm_head.weight: tie_word_embeddings is false)")
    unknown, notes = work.leftovers()
    problems = [f"missing: {', '.join(work.missing[:6])}{' …' * (len(work.missing) > 6)}"] * bool(work.missing)
    problems += [f"not known: {', '.join(unknown[:6])}{' …' * (len(unknown) > 6)}"] * bool(unknown)
    if problems:
        raise InputError("FB-E0323", f"{family.name}: {'; '.join(problems)}")
    for target in work.targets:
        if reason := bad_name(target.name):
            raise InputError("FB-E0308", f"the tensor name {reason}", tensor=target.name)
    return tuple(sorted(work.targets, key=lambda target: _file_order(target.name))), tuple(notes)


def _file_order(name: str) -> tuple:
    """Embedding and global tensors first, then block by block, then the output: the order in which a reader wants them."""
    if name.startswith("blk."):
        return (1, natural_key(name))
    return (2 if name.startswith("output") else 0, natural_key(name))
