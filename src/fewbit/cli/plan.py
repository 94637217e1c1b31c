"""`fewbit plan MODEL`: what fits, what it costs, how fast it can be, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.output import print_json
from fewbit.plan.advise import Wish
from fewbit.plan.devices import device_named, devices
from fewbit.plan.memory import Use
from fewbit.plan.overview import overview
from fewbit.plan.shapes import Model, model_from_config, model_from_manifest
from fewbit.report.plan_text import device_page, page


def command(
    model: Annotated[
        str, typer.Argument(help="folder, .safetensors or .gguf file, config.json, or hub id", show_default=False)
    ] = "",
    context: Annotated[int, typer.Option("--context", "-c", min=1, help="tokens of each sequence")] = 8192,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="sequences at once")] = 1,
    kv_dtype: Annotated[
        str, typer.Option("--kv-dtype", help="dtype of the cache: f16, bf16, fp8, int8, q8_0, q4_0 …")
    ] = "f16",
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", help='a device ("RTX 4090", "2x H100") or a memory (24GB); may be repeated'),
    ] = None,
    sequence: Annotated[int, typer.Option(min=1, help="tokens of a training sequence")] = 2048,
    workers: Annotated[int, typer.Option(min=1, help="workers of the quantising run that is costed")] = 2,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    list_devices: Annotated[bool, typer.Option("--devices", help="list the device table and stop")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Memory, speed bounds and what fits, from headers alone: no weights are read.

    \b
    fewbit plan ./llama-3.1-8b --device "RTX 4090" --context 16384
    fewbit plan meta-llama/Llama-3.1-405B --device "8x H100"
    """
    if list_devices:
        print_json("fewbit.devices/1", {"devices": devices()}) if json else print(device_page())
        return
    if not model:
        raise typer.BadParameter("name a model: a folder, a file, a config.json or a hub id")
    chosen = tuple(device_named(text) for text in device or ())
    use = Use(context, batch, kv_dtype)
    made = overview(open_model(model, revision), use, chosen, wish=Wish(model, use), sequence=sequence, workers=workers)
    if json:
        print_json("fewbit.plan/1", made.record())
    else:
        print(page(made))


def open_model(text: str, revision: str | None = None) -> Model:
    """The facts about a model: from a config.json alone where there are no weights beside it, else from the headers of its files."""
    from fewbit.store.checkpoint import open_checkpoint
    from fewbit.store.strictjson import load_object

    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        return model_from_config(
            path.parent.name if path.name == "config.json" else path.stem, load_object(path, "FB-E0201")
        )
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        return model_from_config(path.resolve().name, load_object(path / "config.json", "FB-E0201"))
    with open_checkpoint(text, revision=revision) as checkpoint:
        name = path.resolve().name if path.exists() else text
        return model_from_manifest(name, checkpoint.manifest, checkpoint.config)


def _has_weights(folder: Path) -> bool:
    return any(
        child.name.endswith((".safetensors", ".gguf", ".index.json", ".bin", ".pt", ".pth"))
        for child in folder.iterdir()
    )
