"""Flags made from the recipe: one for each of its fields, with the field's own text and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fewbit.base.errors import InputError
from fewbit.plan.recipe import Recipe, parse_option, parse_rule, recipe_from, recipe_from_yaml

FLAG_NAMES = {"options": "--set", "rules": "--rule"}
REPEATED = frozenset({"to", "options", "rules", "include", "rewrites"})


def recipe_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a flag for each field of `Recipe`, and `--recipe FILE`.

    The command's parameter `recipe: Recipe` is made from them: the file first, then the flags that were given over it.
    """
    hints = get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters
    parameters = [parameter.replace(annotation=hints[name]) for name, parameter in own.items() if name != "recipe"]
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                list[str] | None if name in REPEATED else _flag_type(info.annotation) | None,
                typer.Option(
                    FLAG_NAMES.get(name, f"--{name.replace('_', '-')}"),
                    help=_help(info),
                    show_default=False,
                    rich_help_panel="Recipe",
                ),
            ],
        )
        for name, info in Recipe.model_fields.items()
    ]
    file = inspect.Parameter(
        "recipe_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option("--recipe", help="recipe file (YAML); flags given beside it win", rich_help_panel="Recipe"),
        ],
    )

    def command(**given: Any) -> None:
        fields = {name: given.pop(name) for name in Recipe.model_fields}
        function(recipe=build_recipe(given.pop("recipe_file"), fields), **given)

    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature([*ordered, *flags, file])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*ordered, *flags, file]}
    command.__doc__ = function.__doc__
    return command


def build_recipe(file: Path | None, fields: dict[str, Any]) -> Recipe:
    """A recipe from a file and flags; flags that were not given are None (or empty lists)."""
    base = _recipe_file(file).model_dump(exclude_defaults=True) if file else {}
    given = {name: value for name, value in fields.items() if value not in (None, [])}
    if "options" in given:
        given["options"] = {**base.get("options", {}), **dict(parse_option(text) for text in given["options"])}
    if "rules" in given:
        given["rules"] = [*base.get("rules", ()), *(parse_rule(text).model_dump() for text in given["rules"])]
    return recipe_from({**base, **given})


def _recipe_file(file: Path) -> Recipe:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("FB-E0401", f"the recipe cannot be read: {error}", file=file) from None
    return recipe_from_yaml(text, file=file)


def _flag_type(annotation: Any) -> Any:
    """The flag type of a recipe field: Optional fields become their inner type."""
    inner = [item for item in getattr(annotation, "__args__", ()) if item is not type(None)]
    optional = type(None) in getattr(annotation, "__args__", ())
    return inner[0] if optional and len(inner) == 1 else annotation


def _help(info: Any) -> str:
    default = info.get_default(call_default_factory=True)
    shown = "" if default in (None, (), {}, False) else f" (default: {default})"
    return f"{info.description}{shown}"
