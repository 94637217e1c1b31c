"""`fewbit formats` and `fewbit methods`: the hand-written tables, as people read them."""

from __future__ import annotations

from collections.abc import Iterable
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


def methods(json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False) -> None:
    """Solvers and rewrites, what statistics they need, and their options."""
    from fewbit.arch.rewrite_table import REWRITES
    from fewbit.report.text import render, table
    from fewbit.solve.table import SOLVERS

    rows = list(SOLVERS.values())
    if json:
        listed = [
            {"name": r.name, "summary": r.summary, "needs": sorted(r.needs), "options": dict(r.options)} for r in rows
        ]
        folded = [
            {"name": r.name, "summary": r.summary, "needs": sorted(r.needs), "options": dict(r.options)}
            for r in REWRITES.values()
        ]
        print_json("fewbit.methods/1", {"methods": listed, "rewrites": folded})
        return

    def cells(of: Iterable[Any], prefix: bool) -> list[tuple[str, ...]]:
        return [(r.name, r.summary, ", ".join(sorted(r.needs)) or "nothing", _options(r, prefix)) for r in of]

    columns = [("what", "left"), ("needs", "left"), ("--set", "left")]
    solvers = table([("--method", "left"), *columns], cells(rows, False))
    print(render(solvers, "", table([("--rewrites", "left"), *columns], cells(REWRITES.values(), True))))


def _options(row: Any, prefix: bool) -> str:
    """The options of a solver or rewrite with their defaults; those that it shares with the feedback loop are not said again."""
    from fewbit.solve.table import SOLVERS

    shared = SOLVERS["gptq"].options.items()
    more = prefix or row.name == "gptq" or not set(SOLVERS["gptq"].options) <= set(row.options)
    own = row.options.items() if more else [item for item in row.options.items() if item not in shared]
    words = " ".join(f"{f'{row.name}.' if prefix else ''}{name}={value}" for name, value in own)
    return words if more else f"as gptq, and {words}"
