"""Expressions of `families.toml`: a small, safe part of Python over the keys of a config.

Names are config keys and are None where the config is silent; dots reach into nested objects. Only arithmetic, comparisons,
`and`/`or`/`not`, conditionals, comprehensions over `range` and the functions below exist, so a table cannot do anything but compute.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from fewbit.base.errors import InputError


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def positive(value: Any) -> Any:
    """The value, or None when it is missing or zero."""
    return value or None


def each(values: Any, wanted: Any) -> list[bool] | None:
    """For each value whether it is the one wanted; None for a missing list."""
    return None if values is None else [value == wanted for value in values]


def longrope_attention_factor(rope: Mapping[str, Any], context: int) -> float | None:
    """Phi-3's attention factor: sqrt(1 + ln(scale) / ln(original)) for longrope, 0.1 ln(scale) + 1 for yarn; None without factors."""
    if not rope.get("long_factor"):
        return None
    original = rope.get("original_max_position_embeddings") or context
    scale = context / original
    if rope.get("rope_type") == "yarn":
        return 0.1 * math.log(scale) + 1.0 if scale > 1 else 1.0
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "first": first, "positive": positive, "each": each, "int": int, "float": float, "min": min, "max": max, "len": len,
    "range": range, "bool": bool, "longrope_attention_factor": longrope_attention_factor,
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Raises:
        InputError: FB-E0322 when the config's values do not allow the computation, naming the expression.
    """
    try:
        return _value(_parsed(text), names)
    except (TypeError, ValueError, ZeroDivisionError, KeyError, OverflowError) as error:
        raise InputError("FB-E0322", f"the config does not allow computing {text!r}: {error}") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names.get(node.id)
        case ast.Attribute():
            inner = _value(node.value, names)
            return inner.get(node.attr) if isinstance(inner, Mapping) else None
        case ast.BinOp():
            return _BINARY[type(node.op)](_value(node.left, names), _value(node.right, names))
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, names)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, names)
        case ast.BoolOp():
            return _boolean(node, names)
        case ast.Compare(ops=[op], comparators=[right]):
            return _BINARY[type(op)](_value(node.left, names), _value(right, names))
        case ast.IfExp():
            return _value(node.body if _value(node.test, names) else node.orelse, names)
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and not node.keywords:
            return FUNCTIONS[name](*(_value(argument, names) for argument in node.args))
        case ast.Tuple() | ast.List():
            return [_value(item, names) for item in node.elts]
        case ast.Dict():
            return {
                _value(key, names): _value(item, names) for key, item in zip(node.keys, node.values, strict=True) if key
            }
        case ast.Subscript():
            return _value(node.value, names)[_value(node.slice, names)]
        case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])]):
            return [_value(node.elt, {**names, name: item}) for item in _value(source, names)]
    raise ValueError(f"{ast.unparse(node)!r} is not part of the language")


def _boolean(node: ast.BoolOp, names: Mapping[str, Any]) -> Any:
    stop = isinstance(node.op, ast.Or)
    value: Any = None
    for item in node.values:
        value = _value(item, names)
        if bool(value) is stop:
            return value
    return value
