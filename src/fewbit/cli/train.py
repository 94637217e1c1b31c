"""`fewbit train MODEL --to FORMAT:SCHEME -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.output import print_json, progress
from fewbit.plan.recipe import parse_size


def command(
    model: Annotated[str, typer.Argument(help="float checkpoint; the teacher too")],
    to: Annotated[str, typer.Option(help="output as FORMAT:SCHEME")],
    out: Annotated[Path, typer.Option("--out", "-o", help="output folder")],
    start: Annotated[
        str | None, typer.Option(help="checkpoint quantised to the same target, whose codes training starts from")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="full; floats: codes stay; scales: embeddings and head stay too")
    ] = "full",
    steps: Annotated[int, typer.Option(min=1, help="updates; a quarter is enough where codes stay")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="windows in each")] = 8,
    text: Annotated[str, typer.Option(help="text to learn from, as --calib of quantize")] = "default",
    samples: Annotated[int, typer.Option(min=1, help="windows of text")] = 2400,
    length: Annotated[int, typer.Option(min=8, help="tokens of a window")] = 256,
    lr: Annotated[float | None, typer.Option(help="peak learning rate of weights, in quantisation steps")] = None,
    scale_lr: Annotated[float | None, typer.Option(help="peak learning rate of all else, in steps too")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of text and order")] = 0,
    compute: Annotated[
        str, typer.Option(help="dtype of the products: float32, or bfloat16 where the processor multiplies it")
    ] = "float32",
    noise: Annotated[
        float, typer.Option(min=0, max=0.99, help="share of the tokens replaced by random ones in every second window")
    ] = 0.0,
    ram: Annotated[
        str | None, typer.Option(help="hard limit of resident memory, e.g. 8GB (default: 3/4 of what is free)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …, or auto")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, progress on stderr")] = False,
) -> None:
    """Train a model through the rounding: its float self teaches it, and the codes that come out are written.

    Start from a GPTQ result of the same target for the best of both. A run that is stopped or killed is finished by the same command.
    """
    from fewbit.run.training import RATES, train_checkpoint
    from fewbit.runtime.distil import Schedule

    weights, rest = RATES.get(recipe, (0.0, 0.0))
    limit = parse_size(ram) if ram else None
    with progress() as on_event:
        done = train_checkpoint(
            model,
            to,
            out,
            start=start,
            recipe=recipe,
            schedule=Schedule(
                steps=steps, batch=batch, every=max(1, steps // 8), seed=seed, compute=compute, noise=noise
            ),
            text=text,
            samples=samples,
            length=length,
            rates=(weights if lr is None else lr, rest if scale_lr is None else scale_lr),
            overwrite=overwrite,
            device=device,
            ram=limit,
            on_event=on_event,
        )
    if json:
        print_json("fewbit.train/1", done.record())
        return
    first, last = done.curve[0].measures["kl"], done.curve[-1].measures["kl"]
    typer.echo(f"{done.out}: {len(done.prepared.quantised)} weights as {done.scheme}, KL {first:.5f} -> {last:.5f}")
