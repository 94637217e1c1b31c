"""`fewbit eval CANDIDATE… --base MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit.cli.output import print_json
from fewbit.report.files import write_cards, write_report

if TYPE_CHECKING:
    from fewbit.eval.fidelity import Study

Candidates = Annotated[list[str], typer.Argument(help="checkpoints of any format")]
Base = Annotated[str, typer.Option(help="the model that they shall equal")]
Text = Annotated[
    str, typer.Option(help="text file, jsonl, parquet, `default` (bundled, held out), or dataset `name#split`")
]
Count = Annotated[int | None, typer.Option(min=1, help="tokens to use, rounded up to whole windows")]
Length = Annotated[int, typer.Option(min=2, help="window length, tokens")]
Skip = Annotated[
    int, typer.Option(min=0, help="positions at a window's start not scored; half the length is llama.cpp's way")
]
Chat = Annotated[bool, typer.Option("--chat", help="put documents into the chat template; score the assistant's part")]
Place = Annotated[str, typer.Option(help="cpu or cuda")]
Ram = Annotated[str | None, typer.Option(help="limit of resident memory, e.g. 8GB; refused where it cannot be held")]
Cache = Annotated[str, typer.Option(help="auto, off, or a folder: keep the base's distributions for the next time")]
Noise = Annotated[bool, typer.Option(help="compare the base with itself in bfloat16 too")]
Generate = Annotated[int, typer.Option(min=0, help="continue 16 prompts greedily by so many tokens and compare")]
Tasks = Annotated[str, typer.Option(help="tasks of lm_eval, or their YAML files, separated by commas")]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="questions per task at most")]
Embed = Annotated[bool, typer.Option("--embed", help="compare embeddings and the order in which they rank passages")]
EngineName = Annotated[
    str | None, typer.Option(help="also run the candidates in llama.cpp, vllm or transformers itself")
]
EnginePython = Annotated[str | None, typer.Option(help="interpreter that has the engine")]
Look = Annotated[
    int | None, typer.Option(min=0, help="candidates to look at layer by layer (default: 1 with --report, else 0)")
]
Report = Annotated[Path | None, typer.Option(help="folder for report.html and report.json")]
Card = Annotated[bool, typer.Option("--card", help="write a model card, README.md, into each candidate's folder")]
MaxKl = Annotated[float | None, typer.Option(help="exit with status 4 when a candidate's mean KL exceeds this")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")]


def command(
    candidates: Candidates,
    base: Base,
    text: Text = "default",
    tokens: Count = None,
    length: Length = 512,
    skip: Skip = 0,
    chat: Chat = False,
    device: Place = "cpu",
    ram: Ram = None,
    cache: Cache = "auto",
    noise: Noise = True,
    generate: Generate = 0,
    tasks: Tasks = "",
    task_limit: TaskLimit = None,
    embed: Embed = False,
    engine: EngineName = None,
    engine_python: EnginePython = None,
    look: Look = None,
    report: Report = None,
    card: Card = False,
    max_kl: MaxKl = None,
    json: Json = False,
) -> None:
    """Perplexity, KL divergence and flips of candidates against a base, on identical tokens, with standard errors."""
    from fewbit.eval.engines.engine import find_engine
    from fewbit.eval.extras import Wishes
    from fewbit.eval.fidelity import Options, study
    from fewbit.plan.recipe import parse_size
    from fewbit.report.scores import study_page
    from fewbit.store.writer import check_place

    limit = parse_size(ram) if ram else None
    kept = _folder(cache)
    for place in (report, kept):
        if place is not None:
            check_place(place)  # before the long work
    looks = look if look is not None else int(report is not None)
    wishes = Wishes(generate, tuple(task for task in tasks.split(",") if task), task_limit, embed)
    options = Options(text, tokens, length, skip, chat, device, limit, kept, noise, looks, wishes)
    real = find_engine(engine, engine_python, device) if engine else None
    made = study(candidates, base, options, lambda line: print(line, file=sys.stderr), real)
    record = made.record()
    if report is not None:
        write_report(report, record)
    if card:
        write_cards(record)
    print_json("fewbit.eval/1", record) if json else print(study_page(record))
    _gate(made, max_kl, json)


def _folder(cache: str) -> Path | None:
    """Where the base's distributions are kept, by the word of `--cache`."""
    from fewbit.eval.cache import default_folder

    return {"auto": default_folder(), "off": None}.get(cache, Path(cache))


def _gate(made: Study, max_kl: float | None, json: bool) -> None:
    """Raises QualityError FB-E0803 when a candidate loses more than is allowed; with `json` the one document is printed already, so stderr says it."""
    from fewbit.base.errors import QualityError

    for score in made.scores:
        kl = score.measures["kl"][0]
        if max_kl is not None and not kl <= max_kl:
            error = QualityError("FB-E0803", f"mean KL {kl:.5f} exceeds {max_kl}", file=score.name)
            if not json:
                raise error
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_status)
