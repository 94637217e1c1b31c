"""A checkpoint opened by the loader that it is meant for, its log probabilities held against ours: what `verify --engine` does.

A loader cannot be trusted to complain: it fills a parameter that it misses with random numbers and runs. So it reports which it filled,
where it knows; and it scores a few random tokens, which our own reference path does too on the decoded weights. The two may differ by what
the loader's arithmetic rounds, never by what a lost scale does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fewbit.base.errors import InputError
from fewbit.base.record import plain
from fewbit.eval.engines.engine import find_engine
from fewbit.eval.stream import Runner
from fewbit.run.source import Source

WINDOWS, LENGTH = 2, 48
BOUND = 0.1  # mean |difference| of log probabilities, nats; a lost scale or a wrong zero point costs several
DTYPES = {
    "transformers": "float32",
    "gptqmodel": "float32",
    "vllm": "bfloat16",
    "mlx": "float32",
}  # what each computes in


@dataclass(frozen=True)
class Opened:
    """What an engine made of a checkpoint.

    Attributes:
        engine, version: who opened it.
        problem: why it is not well, None when it is.
        difference: mean |difference| of log probabilities from ours, nats; NaN when it did not load.
        missing: parameters that the engine did not find and filled with random numbers.
    """

    engine: str
    version: str
    problem: str | None
    difference: float
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.problem is None

    def record(self) -> dict[str, object]:
        return {**plain(self), "ok": self.ok}


def open_with(
    engine: str, source: Source, *, python: str | None = None, timeout: float = 1800.0, bound: float = BOUND
) -> Opened:
    """Opens a checkpoint with a real loader and compares log probabilities with ours.

    Args:
        engine: a name of `engine.ENGINES`.
        source: the checkpoint, open.
        python: interpreter of the environment that has the engine; None for our own.
        timeout: seconds for loading and running.
        bound: what the mean difference may be, nats.

    Raises:
        InputError: FB-E0809 for an engine that is not known or not there.
    """
    found = find_engine(engine, python)
    dtype = DTYPES.get(engine)
    found = replace(found, timeout=timeout, options=(("dtype", dtype),) if dtype else ())
    tokens, ours = own_logprobs(source)
    theirs = []
    try:
        with found.open(str(source.root), tokens) as logits:
            for window in range(len(tokens)):
                scores = torch.log_softmax(logits(window, torch.arange(LENGTH - 1)).double(), -1)
                theirs.append(scores.gather(-1, tokens[window, 1:, None])[:, 0])
            version, missing = logits.version, logits.missing
    except InputError as refusal:
        return Opened(engine, "", f"did not run it: {refusal.message}", math.nan)
    difference = float((torch.stack(theirs) - ours).abs().mean())
    problem = None
    if missing:
        problem = (
            f"did not find {len(missing)} parameter(s) and filled them with random numbers: {', '.join(missing[:3])}"
        )
    elif not difference <= bound:
        problem = f"differs from the decoded weights by {difference:.3g} nats a token, {bound:g} allowed"
    return Opened(engine, version, problem, difference, missing)


def own_logprobs(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64 [windows, length], log probability of each next token float64 [windows, length - 1]) from the decoded weights."""
    if source.format is not None and source.format.container == "gguf":
        from fewbit.run.gguf_source import GgufAsCheckpoint

        source = GgufAsCheckpoint(source)
    runner = Runner(source)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, runner.vocab, (WINDOWS, LENGTH), generator=generator)
    store = runner.hidden(tokens)
    rows = torch.cat([store.get(batch) for batch in range(len(store))])
    found = []
    for window in range(WINDOWS):
        scores = torch.log_softmax(runner.logits(tokens[window : window + 1], rows[window : window + 1]).double(), -1)
        found.append(scores[:-1].gather(-1, tokens[window, 1:, None])[:, 0])
    return tokens, torch.stack(found)
