"""Which GGML type each tensor gets: llama-quantize's recipes, pure types, overrides, and what happens to rows that do not fit.

Everything follows from names, shapes and a few numbers of the model, so it needs neither torch nor data. Two lists of tensors given in
any order get the same types: layers are counted in the order in which llama.cpp walks them.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.names import matches
from fewbit.formats.gguf.expressions import evaluate
from fewbit.formats.gguf.types import FLOATS, TYPES

KINDS = ("output", "token_embd", "attn_v", "attn_k", "attn_q", "attn_output", "ffn_down", "ffn_gate", "ffn_up", "every")
_FIELDS = {*KINDS, "file_type", "base", "small", "needs"}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
# type -> what llama.cpp takes instead when a row is no whole number of its blocks; everything else becomes F16
FALLBACKS: dict[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
# parts of names that are never quantised, and names that are always F32: llama.cpp reads them so or they are tiny
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "attn_rel_b.weight",
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight", "rope_freqs.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Recipe:
    """A recipe by name; see `recipes.toml`.

    Attributes:
        name: as the user writes it.
        file_type: value of general.file_type.
        base: type of matrices that no row names.
        rows: kind -> expression.
        needs: types that need an importance matrix here besides those that always do.
        small: whether it is one of the one- and two-bit recipes, which llama.cpp treats apart.
        pure: whether every matrix gets `base`.
    """

    name: str
    file_type: int
    base: str
    rows: Mapping[str, str]
    needs: tuple[str, ...] = ()
    small: bool = False
    pure: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a model that recipes ask for.

    Attributes:
        architecture: llama.cpp's name.
        blocks: number of layers.
        experts: experts per layer, 0 for a dense model.
        heads_per_kv: attention heads that share one key head.
    """

    architecture: str
    blocks: int
    experts: int = 0
    heads_per_kv: int = 1


@dataclass(frozen=True)
class Choice:
    """The type of one tensor and why, for the plan's table; `needs_imatrix` where it is useless without importance."""

    type: str
    reason: str
    needs_imatrix: bool = False


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    table = tomllib.loads(resources.files(__package__).joinpath("recipes.toml").read_text(encoding="utf-8"))
    for name, rows in table.items():
        if set(rows) - _FIELDS:
            raise ValueError(f"recipes.toml: [{name}] has unknown fields {sorted(set(rows) - _FIELDS)}")
    return table


def recipe_names() -> tuple[str, ...]:
    """All recipes, as llama-quantize calls them."""
    return tuple(name for name in _table() if name not in ("shared", "small"))


def recipe_named(name: str) -> Recipe:
    """A recipe by name (any case), or `pure-TYPE`.

    Raises:
        InputError: FB-E0324 with the names that exist.
    """
    wanted = name.upper().replace("-", "_")
    if wanted.startswith("PURE_") and (base := wanted.removeprefix("PURE_")) in TYPES:
        number = next((rows["file_type"] for rows in _table().values() if rows.get("base") == base), 1)
        return Recipe(f"pure-{base.lower()}", number, base, {}, pure=True)
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in recipe_names():
        what = f"no GGUF recipe is called {name!r}; there are {', '.join(recipe_names())}, and pure-TYPE for one type throughout"
        raise InputError("FB-E0324", what)
    own = _table()[wanted]
    small = bool(own.get("small"))
    rows = {**_table()["shared"], **(_table()["small"] if small else {}), **own}
    kinds = {kind: rows[kind] for kind in KINDS if kind in rows}
    return Recipe(wanted, own["file_type"], own["base"], kinds, tuple(own.get("needs", ())), small)


def kind_of(name: str) -> str:
    """The kind of tensor that recipes tell apart, "other" for the rest."""
    if name in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if name == "output.weight" else "token_embd"
    for part, kind in (
        ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"), ("attn_k.weight", "attn_k"),
        ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
        ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
    ):  # fmt: skip
        if part in name:
            return kind
    return "other"


def quantisable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantises such a tensor at all: matrices and stacks of them, without norms, routers and positions."""
    leading = next((index for index, size in enumerate(shape) if size > 1), len(shape))
    if len(shape) - leading < 2 or not name.endswith("weight") or name in _KEPT_NAMES:
        return False
    return not any(part in name for part in _KEPT)


def _walk(name: str) -> tuple:
    found = _BLOCK.match(name)
    return (int(found[1]) if found else -1, name)


def choose(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    recipe: Recipe,
    facts: ModelFacts,
    overrides: Mapping[str, str] | None = None,
    imatrix: bool = False,
) -> dict[str, Choice]:
    """The type of every tensor.

    Args:
        tensors: (GGUF name, row-major shape).
        recipe: from `recipe_named`.
        facts: numbers of the model.
        overrides: pattern (glob, or `re:` expression) -> type name; the first that matches wins.
        imatrix: whether an importance matrix will be there.

    Raises:
        InputError: FB-E0330 for an override to a type that does not exist.
    """
    shapes = dict(tensors)
    wanted = {pattern: _override_type(pattern, kind) for pattern, kind in (overrides or {}).items()}
    tied = "output.weight" not in shapes
    totals = {"attn_v": sum(kind_of(name) == "attn_v" for name in shapes)}
    seen: dict[str, int] = {}
    chosen: dict[str, Choice] = {}
    for name in sorted(shapes, key=_walk):
        shape = shapes[name]
        manual = next((kind for pattern, kind in wanted.items() if matches(pattern, name)), None)
        if not quantisable(name, shape):
            chosen[name] = Choice("F32", "kept: not a weight matrix that llama.cpp quantises")
            continue
        kind = "output" if tied and name == "token_embd.weight" else kind_of(name)
        if manual is not None:  # llama.cpp does not count overridden layers either
            picked, why = manual, "by override"
        else:
            picked, why = _picked(kind, _Layer(name, shape, recipe, facts, imatrix, totals, seen))
        chosen[name] = _fitted(picked, why, shape, recipe, kind, imatrix)
    return {name: chosen[name] for name in shapes}


def _override_type(pattern: str, kind: str) -> str:
    if kind.upper() not in TYPES:
        raise InputError(
            "FB-E0330", f"the override {pattern!r} names {kind!r}, which is no GGUF type; there are {', '.join(TYPES)}"
        )
    return kind.upper()


@dataclass
class _Layer:
    """One tensor on the walk, and the counts so far."""

    name: str
    shape: tuple[int, ...]
    recipe: Recipe
    facts: ModelFacts
    imatrix: bool
    totals: dict[str, int]
    seen: dict[str, int]

    def names(self, kind: str) -> dict[str, Any]:
        """What expressions may ask for; counts the layer."""
        facts, recipe, layers = self.facts, self.recipe, self.totals.get(kind, self.facts.blocks)
        layer = self.seen.get(kind, 0)
        self.seen[kind] = layer + 1
        found = _BLOCK.match(self.name)
        if found and facts.experts > 1 and kind != "attn_v" and not recipe.small:
            layer = int(found[1])  # several matrices a layer: counting them would run ahead
        return {
            **{type_name: type_name for type_name in TYPES},
            "base": recipe.base, "layer": layer, "layers": layers, "experts": facts.experts, "imatrix": self.imatrix,
            "heads_per_kv": facts.heads_per_kv, "width": self.shape[-1], "misfit": self.shape[-1] % TYPES[recipe.base].block != 0,
            "falcon": facts.architecture == "falcon",
            "stacked": len(self.shape) > 2 and self.shape[-3] > 1,
            "first_eighth": layer < layers // 8, "first_sixteenth": layer < layers // 16,
            "middle": layers // 8 <= layer < 7 * layers // 8, "more_bits": more_bits(layer, layers),
        }  # fmt: skip


def _picked(kind: str, layer: _Layer) -> tuple[str, str]:
    """The recipe's type before it is seen whether rows fit, and the row of the recipe that says so."""
    recipe, facts = layer.recipe, layer.facts
    names = layer.names(kind)
    row = recipe.rows.get("every", recipe.rows.get(kind)) if kind != "output" else recipe.rows.get("output")
    if recipe.pure or recipe.base in FLOATS or row is None:
        return recipe.base, recipe.name
    picked = evaluate(row, names)
    seventy_billion = facts.blocks == 80 and facts.architecture in ("llama", "qwen2") and facts.heads_per_kv > 1
    if kind == "attn_v" and seventy_billion and not recipe.small and picked in ("Q3_K", "Q4_K"):
        picked = "Q5_K"  # eight heads share attn_v there: more bits cost next to nothing
    return picked, recipe.name if picked == recipe.base else f"{recipe.name}: {kind}"


def more_bits(layer: int, layers: int) -> bool:
    """Layers worth more bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitted(picked: str, why: str, shape: tuple[int, ...], recipe: Recipe, kind: str, imatrix: bool) -> Choice:
    """The type after llama.cpp's fallbacks for rows that do not divide."""
    width = shape[-1]
    final = picked
    if width % TYPES[final].block:
        final = FALLBACKS.get(final, "F16")
        if width % TYPES[final].block:
            final = "F16"
        why = f"{why}; rows of {width} are no multiple of {TYPES[picked].block}, {picked} falls back on {final}"
    needed = final in _NEED_IMATRIX or final in recipe.needs
    return Choice(final, why, needed and not imatrix and kind not in ("output", "token_embd"))
