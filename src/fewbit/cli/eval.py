"""`fewbit eval CANDIDATE… --base MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.output import print_json
from fewbit.report.files import write_cards, write_report


def command(
    candidates: Annotated[list[str], typer.Argument(help="checkpoints of any format")],
    base: Annotated[str, typer.Option(help="the model that they shall equal")],
    text: Annotated[
        str, typer.Option(help="text file, jsonl, parquet, `default` (bundled, held out), or dataset `name#split`")
    ] = "default",
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens to use at most")] = None,
    length: Annotated[int, typer.Option(min=2, help="window length, tokens")] = 512,
    skip: Annotated[
        int,
        typer.Option(
            min=0, help="positions at each window's start that are not scored; half the length is llama.cpp's way"
        ),
    ] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="put documents into the chat template; score the assistant's part")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ram: Annotated[str | None, typer.Option(help="limit of resident memory, e.g. 8GB")] = None,
    cache: Annotated[
        str, typer.Option(help="auto, off, or a folder: keep the base's distributions for the next time")
    ] = "auto",
    noise: Annotated[bool, typer.Option(help="compare the base with itself in bfloat16 too")] = True,
    generate: Annotated[
        int, typer.Option(min=0, help="continue 16 prompts greedily by so many tokens and compare")
    ] = 0,
    tasks: Annotated[str, typer.Option(help="tasks of lm_eval, or their YAML files, separated by commas")] = "",
    task_limit: Annotated[int | None, typer.Option(min=1, help="questions per task at most")] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="compare embeddings and the order in which they rank passages")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="also run the candidates in llama.cpp, vllm or transformers itself")
    ] = None,
    engine_python: Annotated[str | None, typer.Option(help="interpreter that has the engine")] = None,
    look: Annotated[
        int | None, typer.Option(min=0, help="candidates to look at layer by layer [default: 1 with --report, else 0]")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="folder for report.html and report.json")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="write a model card, README.md, into each candidate's folder")
    ] = False,
    max_kl: Annotated[
        float | None, typer.Option(help="exit with status 4 when a candidate's mean KL exceeds this")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")] = False,
) -> None:
    """Perplexity, KL divergence and flips of candidates against a base, on identical tokens, with standard errors."""
    from fewbit.base.errors import QualityError
    from fewbit.eval.cache import default_folder
    from fewbit.eval.engines.engine import find_engine
    from fewbit.eval.extras import Wishes
    from fewbit.eval.fidelity import Options, study
    from fewbit.plan.recipe import parse_size
    from fewbit.report.scores import study_page

    folder = {"auto": default_folder(), "off": None}.get(cache, Path(cache))
    wishes = Wishes(generate, tuple(task for task in tasks.split(",") if task), task_limit, embed)
    options = Options(
        text,
        tokens,
        length,
        skip,
        chat,
        device,
        parse_size(ram) if ram else None,
        folder,
        noise,
        look if look is not None else int(report is not None),
        wishes,
    )
    real = find_engine(engine, engine_python, device) if engine else None
    made = study(candidates, base, options, lambda line: print(line, file=sys.stderr), real)
    record = made.record()
    if report is not None:
        write_report(report, record)
    if card:
        write_cards(record)
    print_json("fewbit.eval/1", record) if json else print(study_page(record))
    for score in made.scores:
        if max_kl is not None and score.measures["kl"][0] > max_kl:
            raise QualityError("FB-E0803", f"mean KL {score.measures['kl'][0]:.5f} exceeds {max_kl}", file=score.name)
