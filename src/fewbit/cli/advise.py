"""`fewbit advise MODEL --device D --engine E --task T`: ranked choices with reasons and the command for each."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.output import print_json
from fewbit.cli.plan import open_model
from fewbit.plan.advise import Wish, advise
from fewbit.plan.devices import device_named
from fewbit.plan.kv import kv_layers
from fewbit.plan.memory import Use
from fewbit.plan.overview import option_record
from fewbit.report.advice_text import advice_page


def command(
    model: Annotated[str, typer.Argument(help="folder, .safetensors or .gguf file, config.json, or hub id")],
    device: Annotated[str, typer.Option("--device", "-d", help='a device ("RTX 4090", "2x H100") or a memory (24GB)')],
    engine: Annotated[
        str, typer.Option("--engine", "-e", help="vllm, sglang, transformers, llama.cpp, ollama, lmstudio, mlx")
    ] = "",
    task: Annotated[str, typer.Option("--task", "-t", help="chat, code, math, agent or embed")] = "chat",
    priority: Annotated[str, typer.Option("--priority", "-p", help="balanced, quality, speed or size")] = "balanced",
    context: Annotated[int, typer.Option("--context", "-c", min=1, help="tokens of each sequence")] = 8192,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="sequences at once")] = 1,
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="dtype of the cache")] = "f16",
    calibration: Annotated[bool, typer.Option(help="whether calibration text may be run through the model")] = True,
    finetune: Annotated[bool, typer.Option("--finetune", help="the model will be fine-tuned")] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Ranked choices for a device, an engine and a task, every step of the decision explained."""
    facts = open_model(model, revision)
    target = device_named(device)
    wish = Wish(model, Use(context, batch, kv_dtype), engine, task, priority, calibration, finetune)
    found = advise(facts, kv_layers(facts.text), target, wish)
    if json:
        print_json(
            "fewbit.advice/1",
            {
                "model": facts.name,
                "device": target.name,
                "wish": wish,
                "steps": found.steps,
                "options": [option_record(o) for o in found.options],
            },
        )
    else:
        print(advice_page(facts, target, found))
