"""`fewbit verify OUT [--base MODEL]`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.output import print_json


def command(
    path: Annotated[str, typer.Argument(help="checkpoint of any format")],
    base: Annotated[str | None, typer.Option(help="the float checkpoint that it was made from")] = None,
    engine: Annotated[
        str | None, typer.Option(help="also open it with a real loader: transformers, vllm, llama.cpp, gptqmodel, mlx")
    ] = None,
    python: Annotated[str | None, typer.Option(help="interpreter of the environment that has the engine")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Complete, finite, legal codes, config against tensors, every weight held against its source. Exit status 4 when not."""
    from fewbit.eval.verify import verify
    from fewbit.report.text import verified_page

    found = verify(path, base=base, engine=engine, python=python)
    print_json("fewbit.verify/1", found.record()) if json else print(verified_page(found))
    if not found.ok:
        raise typer.Exit(4)
