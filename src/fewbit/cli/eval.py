"""`fewbit eval CANDIDATE… --base MODEL`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbit.cli.output import print_json


def command(
    candidates: Annotated[list[str], typer.Argument(help="checkpoints of any format")],
    base: Annotated[str, typer.Option(help="the model that they shall equal")],
    text: Annotated[str, typer.Option(help="text file, jsonl, parquet, `default`, or dataset name")] = "default",
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens to use at most")] = None,
    length: Annotated[int, typer.Option(min=2, help="window length, tokens")] = 512,
    max_kl: Annotated[float | None, typer.Option(help="exit with status 4 when a candidate's mean KL exceeds this")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, logs on stderr")] = False,
) -> None:
    """Perplexity, KL divergence and flips of candidates against a base, on identical tokens, with standard errors."""
    from fewbit.base.errors import QualityError
    from fewbit.eval.fidelity import evaluate, records
    from fewbit.report.text import scores_page

    scores = evaluate(candidates, base, text=text, tokens=tokens, length=length, on_progress=lambda line: print(line, file=sys.stderr))
    print_json("fewbit.eval/1", {"base": base, "text": text, "scores": records(scores)}) if json else print(scores_page(base, text, scores))
    for score in scores:
        if max_kl is not None and score.measures["kl"][0] > max_kl:
            raise QualityError("FB-E0803", f"mean KL {score.measures['kl'][0]:.5f} exceeds {max_kl}", file=score.name)
