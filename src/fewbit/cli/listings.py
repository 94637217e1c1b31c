"""`fewbit formats` and `fewbit methods`: the hand-written tables, as people read them."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable
from importlib import resources
from typing import Annotated, Any

import typer

from fewbit.cli.output import print_json


def formats(json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False) -> None:
    """Formats, schemes and the engines that load them."""
    from fewbit.formats.table import format_named, format_names
    from fewbit.num.scheme import long_spelling, parse_scheme, presets
    from fewbit.report.text import render, table

    rows = [format_named(name) for name in format_names()]
    schemes = {name: scheme.bits_per_weight((4096, 4096)) for name, scheme in presets().items()}
    if json:
        listed = [
            {"name": r.name, "summary": r.summary, "default": r.default_scheme, "engines": list(r.engines)}
            for r in rows
        ]
        print_json("fewbit.formats/1", {"formats": listed, "presets": schemes})
        return
    columns = [("format", "left"), ("what", "left"), ("default", "left"), ("loaded by", "left")]
    made = table(columns, [(r.name, r.summary, r.default_scheme, ", ".join(r.engines)) for r in rows])
    named = table(
        [("preset", "left"), ("written out", "left"), ("bits/w at 4096x4096", "right")],
        [(name, long_spelling(parse_scheme(name)), f"{bits:.4f}") for name, bits in schemes.items()],
    )
    print(
        render(
            made,
            "",
            named,
            "",
            "A scheme is GRID[-BLOCKS][-asym|-min][-SCALE][-dq][+ACTIVATION], e.g. int4-g128-asym, nf4-g64-dq, int8-channel+int8-token.",
        )
    )


def methods(
    name: Annotated[str | None, typer.Argument(help="one method or rewrite, with what its options do")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Solvers and rewrites, what statistics they need, and their options."""
    from fewbit.arch.rewrite_table import REWRITES
    from fewbit.report.text import render, table
    from fewbit.solve.table import SOLVERS, solver_named

    if name is not None:
        row = REWRITES[name] if name in REWRITES else solver_named(name)
        _one_method(row, "rewrite" if name in REWRITES else "method", json)
        return
    rows, rewrites = list(SOLVERS.values()), list(REWRITES.values())
    if json:
        print_json("fewbit.methods/1", {"methods": [*map(_listed, rows)], "rewrites": [*map(_listed, rewrites)]})
        return

    def cells(of: Iterable[Any], prefix: bool) -> list[tuple[str, ...]]:
        return [(r.name, r.summary, ", ".join(sorted(r.needs)) or "nothing", _options(r, prefix)) for r in of]

    columns = [("what", "left"), ("needs", "left"), ("--set", "left")]
    solvers = table([("--method", "left"), *columns], cells(rows, False))
    folded = table([("--rewrites", "left"), *columns], cells(rewrites, True))
    print(render(solvers, "", folded, "", "fewbit methods NAME says what each option does"))


def _listed(row: Any) -> dict[str, Any]:
    """A solver or rewrite as plain data."""
    said = {name: described(row.name, name) for name in row.options}
    return {
        "name": row.name, "summary": row.summary, "needs": sorted(row.needs), "options": dict(row.options), "meaning": said,
    }  # fmt: skip


def _one_method(row: Any, kind: str, json: bool) -> None:
    from fewbit.report.text import render, table

    if json:
        print_json("fewbit.method/1", _listed(row))
        return
    prefix = f"{row.name}." if kind == "rewrite" else ""
    rows = [(f"{prefix}{name}", value, described(row.name, name)) for name, value in row.options.items()]
    head = f"{row.name}: {row.summary}"
    made = table([("--set", "left"), ("default", "left"), ("what it does", "left")], rows)
    print(render(head, f"needs {', '.join(sorted(row.needs)) or 'no calibration'}", "", made))


def described(row: str, option: str) -> str:
    """What an option of a solver or rewrite does, in one sentence (solve/options.toml)."""
    said = _sentences()
    shared = said["gptq"] if _extends_feedback(row) else {}
    return said.get(row, {}).get(option) or shared.get(option) or said["common"].get(option, "")


@functools.cache
def _sentences() -> dict[str, dict[str, str]]:
    return tomllib.loads(resources.files("fewbit.solve").joinpath("options.toml").read_text("utf-8"))


def _options(row: Any, prefix: bool) -> str:
    """The options of a solver or rewrite with their defaults; those that it shares with the feedback loop are not said again."""
    from fewbit.solve.table import SOLVERS

    shared = SOLVERS["gptq"].options.items() if _extends_feedback(row.name) else ()
    own = [item for item in row.options.items() if item not in shared]
    words = " ".join(f"{f'{row.name}.' if prefix else ''}{name}={value}" for name, value in own)
    return f"as gptq, and {words}" if shared else words


def _extends_feedback(name: str) -> bool:
    """Whether a solver has all options of the feedback loop, and more."""
    from fewbit.solve.table import SOLVERS

    return name in SOLVERS and set(SOLVERS["gptq"].options) < set(SOLVERS[name].options)
