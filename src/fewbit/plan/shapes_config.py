"""Tensor shapes of a model from its config.json alone, by the tables of `shapes.toml`.

A family is a list of blocks of lines; a line is a tensor's name and one expression for each dimension. Nothing about a family is code.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from types import CodeType
from typing import Any

from fewbit.base.errors import InputError

_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.Attribute,
)  # fmt: skip


Row = tuple[str, tuple[int, ...], int]
"""(name with * for an expert's index, shape, how many)."""


def rows_of(config: Mapping[str, Any]) -> tuple[list[Row], tuple[str, ...]]:
    """All tensors that a config.json describes, and what the reader should know about them.

    Raises:
        InputError: FB-E0450 when the family is not in `shapes.toml`, FB-E0451 when the config lacks what its shapes need.
    """
    model_type = str(config.get("model_type", ""))
    composite = _tables()["composite"].get(model_type)
    if composite is not None:
        return _composite_rows(composite, config), ()
    text = text_config(config)
    rows = list(_family_rows(_family(str(text.get("model_type") or model_type)), text))
    if any(key in config for key in ("vision_config", "audio_config")):
        return rows, (f"only the language part is counted: no table says how {model_type}'s other parts are shaped",)
    return rows, ()


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language part of a config, flat, with the defaults that its family's config class would fill in."""
    inner = next(
        (
            config[key]
            for key in ("text_config", "llm_config", "language_config")
            if isinstance(config.get(key), Mapping)
        ),
        config,
    )
    model_type = str(inner.get("model_type") or config.get("model_type") or "")
    found = next((family for family in _tables()["family"].values() if model_type in family["model_types"]), None)
    defaults = {} if found is None else {**_tables()["common"]["defaults"], **found.get("defaults", {})}
    return {**defaults, **{key: value for key, value in inner.items() if value is not None or key not in defaults}}


def known_model_types() -> tuple[str, ...]:
    """Every model_type whose shapes follow from its config."""
    tables = _tables()
    return tuple(
        sorted(
            {kind for family in tables["family"].values() for kind in family["model_types"]} | set(tables["composite"])
        )
    )


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("shapes.toml").read_text(encoding="utf-8"))


def _family(model_type: str) -> dict[str, Any]:
    found = next((family for family in _tables()["family"].values() if model_type in family["model_types"]), None)
    if found is None:
        known = ", ".join(known_model_types())
        what = f"no shape table for model_type {model_type or '(none given)'!r}; there are {known}"
        raise InputError(
            "FB-E0450",
            what,
            remedy="give a directory or hub id with safetensors files: their headers are exact for any family",
        )
    return found


@dataclass(frozen=True)
class _Line:
    """One line of a block: how tensors are named and shaped, and when they are there."""

    name: str
    shape: tuple[CodeType, ...]
    condition: CodeType | None
    per_layer: bool
    per_expert: bool


@functools.cache
def _lines(text: str) -> tuple[_Line, ...]:
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        body, _, condition = line.partition(" if ")
        name, *shape = re.split(r"\s{2,}", body.strip())
        found.append(
            _Line(
                name,
                tuple(map(_compiled, shape)),
                _compiled(condition.strip()) if condition else None,
                "{layer}" in name,
                "{expert}" in name,
            )
        )
    return tuple(found)


@functools.cache
def _compiled(text: str) -> CodeType:
    """An expression of names, integers, arithmetic, comparisons and and/or/not; anything else is a fault of the table."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise InputError("FB-E0001", f"shapes.toml: {type(node).__name__} is not allowed in {text!r}")
    return compile(tree, f"shapes.toml: {text}", "eval")


class _Names(dict):
    """Names of an expression; what the config does not have is None."""

    def __missing__(self, key: str) -> None:
        return None


def _evaluate(code: CodeType, names: _Names) -> Any:
    try:
        return eval(code, {"__builtins__": {}}, names)  # node types were checked in _compiled
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        missing = [name for name in code.co_names if names.get(name) is None]
        what = f"config.json lacks {', '.join(missing) or 'a usable value'} ({code.co_filename})"
        raise InputError("FB-E0451", what) from error


def _family_rows(family: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """(name, shape, count) of all tensors of a family for one config."""
    tables = _tables()
    names = _Names(
        {
            **tables["common"]["defaults"],
            **family.get("defaults", {}),
            **{k: v for k, v in config.items() if v is not None},
        }
    )
    let = {**tables["common"]["let"], **family.get("let", {})}
    if family.get("alone"):
        let = dict(family["let"])
    lines = [line for block in family["blocks"] for line in _lines(tables["blocks"][block])]
    yield from _expand([line for line in lines if not line.per_layer], _bind(names, let, 0), "")
    layers = _bind(names, let, 0)["layers"]
    if not isinstance(layers, int):
        raise InputError("FB-E0451", "config.json does not say how many layers the model has")
    for layer in range(layers):
        yield from _expand([line for line in lines if line.per_layer], _bind(names, let, layer), str(layer))


def _bind(names: _Names, let: Mapping[str, str], layer: int) -> _Names:
    bound = _Names(names)
    bound["layer"] = layer
    for name, expression in let.items():
        bound[name] = _evaluate(_compiled(expression), bound)
    return bound


def _expand(lines: Iterable[_Line], names: _Names, layer: str) -> Iterable[tuple[str, tuple[int, ...], int]]:
    for line in lines:
        if line.condition is not None and not _evaluate(line.condition, names):
            continue
        shape = tuple(_evaluate(code, names) for code in line.shape)
        if not all(isinstance(size, int) and size > 0 for size in shape):
            missing = sorted({name for code in line.shape for name in code.co_names if not names.get(name)})
            raise InputError("FB-E0451", f"config.json lacks {', '.join(missing)}, which {line.name} needs")
        count = names["experts"] if line.per_expert else 1
        yield line.name.replace("{layer}", layer).replace("{expert}", "*"), shape, count


def _composite_rows(composite: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    rows, parts = [], _Names()
    for part in composite["parts"]:
        family = _tables()["family"][part["family"]]
        inner = config.get(part["config"]) or {}
        rows += [(part["prefix"] + name, shape, count) for name, shape, count in _family_rows(family, inner)]
        parts[part["config"].removesuffix("_config")] = _Part({**family.get("defaults", {}), **inner})
    return rows + list(_expand(_lines(composite["bridge"]), parts, ""))


class _Part:
    """A sub-config whose keys read as attributes, for the lines between the parts."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
