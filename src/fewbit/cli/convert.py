"""`fewbit convert SRC --to FORMAT -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.output import print_json


def command(
    source: Annotated[str, typer.Argument(help="quantised checkpoint")],
    to: Annotated[str, typer.Option(help="FORMAT or FORMAT:SCHEME")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="output folder")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would become of every weight, and stop")] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="go on where values change by more than a re-gridding")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Change the format of a quantised checkpoint: exact, re-gridded or lossy, said beforehand for every weight."""
    from fewbit.report.text import conversion_page
    from fewbit.run.convert import convert, plan_conversion
    from fewbit.run.source import open_source

    if dry_run:
        with open_source(source) as opened:
            plan = plan_conversion(opened, to)
        print_json("fewbit.convert-plan/1", plan.record()) if json else print(conversion_page(plan))
        return
    if out is None:
        raise typer.BadParameter("an output folder is needed: -o OUT (or --dry-run)")
    done = convert(source, to, out, allow_lossy=allow_lossy, overwrite=overwrite)
    print_json("fewbit.convert/1", done.record()) if json else print(conversion_page(done.plan, done))
