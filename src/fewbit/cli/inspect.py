"""`fewbit inspect PATH`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.output import print_json


def command(
    path: Annotated[str, typer.Argument(help="checkpoint of any format: folder, file or hub id")],
    tensors: Annotated[bool, typer.Option("--tensors", help="every tensor on a line of its own")] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """What a checkpoint holds, as a tree: scheme, bits, effective bits per weight, bytes, method."""
    from fewbit import api
    from fewbit.report.tree import survey_page

    found = api.inspect(path, revision=revision)
    print_json("fewbit.inspect/1", found) if json else print(survey_page(found, tensors))
