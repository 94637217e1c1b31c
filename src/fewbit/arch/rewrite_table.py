"""The hand-written table of rewrites: what each needs and which options it has. Imports no torch, so that plans can read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.arch.rewrite_spaces import SCALABLE, Spaces
from fewbit.base.errors import FewbitError, InputError


@dataclass(frozen=True)
class Rewrite:
    """One rewrite.

    Attributes:
        name: as the user types it after `--rewrites`.
        needs: calibration statistics of the float model's spaces; empty for a rewrite that needs no data.
        options: every option with its default; given as NAME.OPTION=value.
        summary: one line for `fewbit methods`.
    """

    name: str
    needs: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


REWRITES: dict[str, Rewrite] = {
    "rotate": Rewrite(
        "rotate",
        frozenset(),
        {"resid": True, "values": True, "untie": True},
        "Hadamard rotation of the residual stream and of every head's values (QuaRot R1, R2)",
    ),
    "spin": Rewrite(
        "spin",
        frozenset({"tokens"}),
        {"resid": True, "values": True, "untie": True, "steps": 100, "rate": 0.1, "batch": 4},
        "learned rotations (SpinQuant R1, R2): the whole quantised model's KL from the float one, by Cayley steps",
    ),
    "smooth": Rewrite(
        "smooth",
        frozenset({"absmax"}),
        {"alpha": 0.5, "spaces": ",".join(SCALABLE)},
        "SmoothQuant: outliers of activations moved into weights, by largest magnitudes",
    ),
    "awq": Rewrite(
        "awq",
        frozenset({"absmean", "gram"}),
        {"steps": 20, "spaces": ",".join(SCALABLE)},
        "AWQ: scales per channel, searched for the least output error of the rounded weights",
    ),
}


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A rewrite's options, defaults filled in, from recipe options such as smooth.alpha."""
    mine = {
        key.partition(".")[2]: value for key, value in given.items() if key.partition(".")[0] == name and "." in key
    }
    return {**REWRITES[name].options, **mine}


def needs_of(names: Iterable[str]) -> frozenset[str]:
    """Statistics that rewrites ask for."""
    return frozenset().union(*(REWRITES[name].needs for name in names))


def check(names: Iterable[str], given: Mapping[str, Any]) -> list[FewbitError]:
    """Everything wrong with a recipe's rewrites and their options."""
    names = tuple(names)
    problems: list[FewbitError] = []
    for name in names:
        if name not in REWRITES:
            problems.append(InputError("FB-E0741", f"no rewrite is called {name!r}; there are {', '.join(REWRITES)}"))
    if "rotate" in names and "spin" in names:
        problems.append(InputError("FB-E0741", "rotate and spin both rotate: name one of them"))
    if len(set(names)) != len(names):
        problems.append(InputError("FB-E0741", f"a rewrite is named twice: {', '.join(names)}"))
    for key, value in given.items():
        name, dot, option = key.partition(".")
        if not dot:
            continue
        if name not in names or name not in REWRITES:
            problems.append(InputError("FB-E0741", f"option {key}: the recipe has no rewrite {name!r}"))
        elif option not in REWRITES[name].options:
            has = ", ".join(REWRITES[name].options)
            problems.append(InputError("FB-E0741", f"rewrite {name} has no option {option!r}; it has {has}"))
        else:
            problems += _check_value(key, option, value, REWRITES[name].options[option])
    return problems


def _check_value(key: str, option: str, value: Any, default: Any) -> list[FewbitError]:
    kind = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(default, bool)):
        return [InputError("FB-E0741", f"option {key} is a {type(default).__name__}, got {value!r}")]
    if option == "spaces":
        odd = [word for word in str(value).split(",") if word not in SCALABLE]
        return (
            [
                InputError(
                    "FB-E0741",
                    f"option {key}: {odd[0]!r} is no space that bears scales; there are {', '.join(SCALABLE)}",
                )
            ]
            if odd
            else []
        )
    if option == "rate" and not 0 < value <= 10:
        return [InputError("FB-E0741", f"option {key} is above 0 and at most 10, got {value}")]
    if option == "alpha" and not 0 <= value <= 1:
        return [InputError("FB-E0741", f"option {key} lies between 0 and 1, got {value}")]
    if option in ("steps", "batch") and value < 1:
        return [InputError("FB-E0741", f"option {key} is too small: {value}")]
    return []


def describe(names: Iterable[str], given: Mapping[str, Any], found: Spaces) -> tuple[list[str], list[str]]:
    """(what will be rewritten, warnings): a sentence per rewrite, and why some do not apply."""
    does: list[str] = []
    warnings: list[str] = []
    names = [name for name in names if name in REWRITES]
    if names and found.off:
        return [], [f"rewrites are off ({', '.join(names)}): {found.off}"]
    for name in names:
        options = options_of(name, given)
        if name in ("rotate", "spin"):
            said, problem = _describe_rotation(name, options, found)
            does += said
            warnings += problem
            continue
        wanted = str(options["spaces"]).split(",")
        chosen = found.scalable(wanted)
        missing = [kind for kind in wanted if not any(space.kind == kind for space in chosen)]
        kinds = ", ".join(dict.fromkeys(space.kind for space in chosen))
        if chosen:
            does.append(f"{name}: {len(chosen)} spaces get scales ({kinds})")
        if missing:
            warnings.append(f"{name}: this architecture has no scales to fold in {', '.join(missing)}")
    return does, warnings


def _describe_rotation(name: str, options: Mapping[str, Any], found: Spaces) -> tuple[list[str], list[str]]:
    does: list[str] = []
    warnings: list[str] = []
    resid = found.one("resid")
    if options["resid"] and rotates_residual(options, found):
        does.append(f"{name}: the residual stream of {resid.size if resid else 0} channels")
    elif options["resid"]:
        warnings.append(
            f"{name}: not the residual stream: {found.no_rotation or f'the head is tied to the embedding, and {name}.untie=false'}"
        )
    heads = [space for space in found.all if space.kind == "attn_v" and space.writers]
    if options["values"] and heads:
        does.append(f"{name}: the values of {len(heads)} attention layers, per head of {heads[0].head}")
    return does, warnings


def rotates_residual(options: Mapping[str, Any], found: Spaces) -> bool:
    """Whether the residual stream is rotated under these options."""
    return (
        bool(options["resid"])
        and not found.off
        and not found.no_rotation
        and (bool(options["untie"]) or not found.tied)
    )
