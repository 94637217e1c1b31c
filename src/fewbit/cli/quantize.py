"""`fewbit quantize MODEL --to FORMAT:SCHEME -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import recipe_flags
from fewbit.cli.output import print_json, progress
from fewbit.plan.recipe import Recipe, parse_size


@recipe_flags
def command(
    model: Annotated[str, typer.Argument(help="folder, .safetensors or .gguf file, or hub id")],
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="output folder; several outputs get a folder each in it")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="hard limit of resident memory, e.g. 8GB (default: 3/4 of what is free)")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="limit of device memory, e.g. 20GB (default: 9/10 of what is free)")
    ] = None,
    device: Annotated[
        str, typer.Option(help="where calibrated methods compute: cpu, cuda, cuda:1 …, or auto")
    ] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="tensors in flight at most")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be done to every tensor, and stop")
    ] = False,
    verify: Annotated[bool, typer.Option(help="decode every tensor afterwards and compare it with the source")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="fail when a solver had to fall back on too many tensors")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="errors only")] = False,
) -> None:
    """Turn a checkpoint into fewer bits.

    One calibration can serve many outputs: give --to as often as you like. A run that is killed is finished by the same command.
    """
    from fewbit import api
    from fewbit.report.text import outcome_page, plan_page

    main, beside = parse_size(ram) if ram else None, parse_size(vram) if vram else 0
    if dry_run:
        plan = api.plan_quantize(
            model, recipe, out=out, ram=main, vram=beside, device=device, workers=workers, revision=revision
        )
        print_json("fewbit.dry-run/1", plan.record()) if json else print(plan_page(plan))
        return
    if out is None:
        raise typer.BadParameter("an output folder is needed: -o OUT (or --dry-run)")
    with progress(quiet=quiet or json) as on_event:
        result = api.quantize(
            model, recipe, out=out, ram=main, vram=beside, device=device, workers=workers, overwrite=overwrite,
            verify=verify, strict=strict, revision=revision, on_event=on_event,
        )  # fmt: skip
    if json:
        print_json("fewbit.quantize/1", result.record())
    elif not quiet:
        print(outcome_page(result))
