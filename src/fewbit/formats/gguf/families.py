"""Architectures as llama.cpp knows them: the loader of `families.toml`, and a config made ready for its expressions."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from fewbit.base.errors import InputError
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.expressions import evaluate
from fewbit.formats.gguf.metadata import Metadata, Value

_LISTS = ("hf", "vocab", "drop", "choices", "prefixes")
_TABLES = ("defaults", "metadata", "tensors", "notes", "requires", "config")


@dataclass(frozen=True)
class Family:
    """One GGUF architecture, its inherited rows included; the fields are those of `families.toml`.

    Attributes:
        name: value of `general.architecture`.
        prefixes: what may stand in source names in place of the first, e.g. `language_model.model.` for `model.`.
    """

    name: str
    hf: tuple[str, ...]
    vocab: tuple[str, ...]
    prefixes: tuple[str, ...]
    drop: tuple[str, ...]
    notes: dict[str, str]
    choices: tuple[tuple[str, ...], ...]
    requires: dict[str, str]
    defaults: dict[str, Any]
    metadata: dict[str, str]
    config: dict[str, str]
    tensors: dict[str, tuple[str, ...]]


_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "model.text_model.", "language_model.", "")


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files(__package__).joinpath("families.toml").read_text(encoding="utf-8"))


def _merged(name: str) -> dict[str, Any]:
    own = _table()[name]
    unknown = set(own) - {*_LISTS, *_TABLES, "extends", "architecture"}
    if unknown:
        raise ValueError(f"families.toml: [{name}] has unknown fields {sorted(unknown)}")
    merged: dict[str, Any] = {key: {} for key in _TABLES}
    for base in own.get("extends", ()):
        inherited = _merged(base)
        for key in _TABLES:
            merged[key] |= inherited[key]
        merged |= {key: inherited[key] for key in _LISTS if key in inherited}
    for key in _TABLES:
        merged[key] |= own.get(key, {})
    return merged | {key: own[key] for key in _LISTS if key in own}


@functools.cache
def family_named(name: str) -> Family:
    """An architecture by llama.cpp's name for it.

    Raises:
        InputError: FB-E0320 when it is not in the table.
    """
    if name not in _table() or not _table()[name].get("hf"):
        raise InputError(
            "FB-E0320", f"the GGUF architecture {name!r} is not known; there are {', '.join(architectures())}"
        )
    rows = _merged(name)
    return Family(
        name=_table()[name].get("architecture", name),
        hf=tuple(rows["hf"]),
        vocab=tuple(rows.get("vocab", ())),
        prefixes=tuple(rows.get("prefixes", _PREFIXES)),
        drop=tuple(rows.get("drop", ())),
        notes=rows["notes"],
        choices=tuple(tuple(group) for group in rows.get("choices", ())),
        requires={text: sentence for text, sentence in rows["requires"].items() if sentence},
        defaults={key: value for key, value in rows["defaults"].items() if value != ""},
        metadata={key: text for key, text in rows["metadata"].items() if text},
        config={key: text for key, text in rows["config"].items() if text},
        tensors={
            key: (text,) if isinstance(text, str) else tuple(text) for key, text in rows["tensors"].items() if text
        },
    )


@functools.cache
def architectures() -> tuple[str, ...]:
    """llama.cpp's names of all architectures in the table."""
    return tuple(name for name, rows in _table().items() if rows.get("hf"))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config, by its `architectures`; of a vision-language model that of its text part.

    Raises:
        InputError: FB-E0320 with what is known.
    """
    classes = config.get("architectures") or []
    for name in architectures():
        if any(cls in _table()[name]["hf"] for cls in classes):
            return family_named(name)
    said = ", ".join(map(str, classes)) or "a config without `architectures`"
    if any(isinstance(config.get(key), Mapping) for key in ("vision_config", "audio_config", "text_config")):
        return _family_of_text(config, said)
    known = ", ".join(cls for name in architectures() for cls in _table()[name]["hf"])
    raise InputError("FB-E0320", f"{said} has no row among the GGUF architectures ({known})")


def _family_of_text(config: Mapping[str, Any], said: str) -> Family:
    """The family of a composite model's text part, what its config may leave out filled in, and its towers noted as left out."""
    composite = _table()["composite"]
    kinds, text = composite["text"], config.get("text_config") or {}
    if not set(config.get("architectures") or ()) & set(composite["classes"]):
        what = f"{said} joins a language model with towers in a way that is not known to run as plain text in llama.cpp"
    elif text.get("model_type") not in kinds:
        what = f"the text part of {said} is of model_type {text.get('model_type')!r}; known are {', '.join(kinds)}"
    else:
        row = dict(kinds[text["model_type"]])
        family = family_named(row.pop("family"))
        sentence = (
            f"of {said} only the text part is written ({family.name}): its towers belong in a second file (mmproj), "
            "which is not made, so llama.cpp answers text alone"
        )
        return replace(family, defaults=family.defaults | row, notes={**family.notes, composite["towers"]: sentence})
    raise InputError(
        "FB-E0320", what, remedy="another format keeps towers as they are, e.g. --to compressed-tensors:int4-g128"
    )


def prepared(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config made ready for the expressions: text part at the root, defaults filled in, one shape of rope parameters.

    transformers 5 writes `rope_parameters`, possibly one per kind of layer; before it, `rope_theta` and `rope_scaling` stood apart.
    Both become `rope` (all or full-attention layers) and `rope_local` (sliding-window layers).
    """
    flat = {**config, **(config.get("text_config") or {})}
    names = {**family.defaults, **{key: value for key, value in flat.items() if value is not None}}
    given = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    rope = dict(given.get("full_attention") or (given if "sliding_attention" not in given else {}))
    local = dict(given.get("sliding_attention") or {})
    rope.setdefault("rope_theta", names.get("rope_theta"))
    rope.setdefault("rope_type", rope.get("type"))
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        rope.setdefault(key, flat.get(key))
    local.setdefault("rope_theta", names.get("rope_local_base_freq"))
    for key, value in rope.items():
        names.setdefault(key, value)
    return names | {"rope": rope, "rope_local": local}


def check_config(names: Mapping[str, Any], family: Family) -> None:
    """Refuses what llama.cpp has no place for.

    Raises:
        InputError: FB-E0322 with the sentence of the family's table.
    """
    for expression, sentence in family.requires.items():
        if not evaluate(expression, names):
            raise InputError("FB-E0322", f"{family.name}: {sentence} (needed: {expression})")


def model_metadata(names: Mapping[str, Any], family: Family) -> Metadata:
    """The `<architecture>.*` values of a prepared config.

    Raises:
        InputError: FB-E0322 for a number that the file must have and the config lacks.
    """
    found: Metadata = {}
    for key, row in family.metadata.items():
        kind, _, expression = row.partition(" ")
        value = evaluate(expression, names)
        if value is None and kind.endswith("!"):
            raise InputError("FB-E0322", f"the config lacks what {family.name}.{key} is made of: {expression}")
        if value is not None:
            found[f"{family.name}.{key}"] = _typed(kind.rstrip("!"), value, key)
    return found


def _typed(kind: str, value: Any, key: str) -> Value:
    try:
        if kind.startswith("["):
            return meta.array(kind[1:-1], value)
        if kind == "str":
            return meta.text(str(value))
        if kind == "bool":
            return meta.boolean(value)
        if isinstance(value, (list, tuple)):
            return meta.array({"u32": "i32"}.get(kind, kind), value)
        return meta.f32(value) if kind == "f32" else meta.u32(value)
    except (TypeError, ValueError):
        raise InputError("FB-E0322", f"{key} cannot be made of {value!r}") from None
