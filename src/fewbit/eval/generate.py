"""Greedy continuations: does the candidate still say what the base says, for how long, and does it begin to repeat itself?

A model's blocks stay resident for this, with the cache of keys and values of its own modelling code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.eval.measures import Estimate, clustered
from fewbit.eval.stream import ActivationQuantiser, Runner
from fewbit.num.scheme import Scheme
from fewbit.runtime.generate import cache_word

NGRAM = 4


class Resident:
    """A model with all its weights in memory, by the names of its parameters."""

    def __init__(self, runner: Runner) -> None:
        self.runner, model = runner, runner.model
        self.params, self._cache = dict(runner.trunk), cache_word(model.module)
        self._schemes: dict[str, Scheme] = {}
        for index in range(len(model)):
            prefix = f"{model.prefix}.{index}."
            self.params |= {prefix + name: value for name, value in model.load_block(index, runner.source.read).items()}
            self._schemes |= {prefix + name: scheme for name, scheme in runner.activation_schemes(index).items()}

    def forward(self, tokens: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits of the last position [batch, vocab] and the cache, for new tokens [batch, length] after a cache."""
        out = self._call(tokens, use_cache=True, **{self._cache: cache})
        return out.logits[:, -1].float(), getattr(out, self._cache)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """All logits, float32 [batch, length, vocab]."""
        return self._call(tokens).logits.float()

    def _call(self, tokens: torch.Tensor, **options: Any) -> Any:
        module = self.runner.model.module
        tokens = tokens.to(self.runner.model.device)
        with torch.no_grad(), ActivationQuantiser(self._schemes, self.params):
            return torch.func.functional_call(module, self.params, (tokens,), options, tie_weights=False, strict=False)

    def greedy(self, prompts: torch.Tensor, count: int) -> torch.Tensor:
        """The `count` likeliest next tokens, one after another: prompts int64 [batch, length] -> [batch, count]."""
        made = []
        logits, cache = self.forward(prompts)
        for step in range(count):
            made.append(logits.argmax(-1).cpu())
            if step + 1 < count:
                logits, cache = self.forward(made[-1].unsqueeze(-1), cache)
        return torch.stack(made, -1)


@dataclass(frozen=True)
class Continuations:
    """How a candidate's continuations compare with the base's; each measure is (value, standard error over prompts).

    Attributes:
        agreement: tokens before the first difference, of `count`. identical: share of prompts with none.
        repetition, base_repetition: share of 4-grams that occurred before in the same continuation.
        example: (prompt, base, candidate), the prompt that parted first.
    """

    prompts: int
    count: int
    agreement: Estimate
    identical: Estimate
    repetition: Estimate
    base_repetition: Estimate
    example: tuple[list[int], list[int], list[int]]


def repetition(tokens: Sequence[int]) -> float:
    """Share of the n-grams of a sequence that occurred before in it."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def continuations(prompts: torch.Tensor, base: torch.Tensor, candidate: torch.Tensor) -> Continuations:
    """Compares two sets of continuations [prompts, count]."""
    differs = base != candidate
    first = torch.where(differs.any(-1), differs.int().argmax(-1), base.shape[1])
    worst = int(first.argmin())
    alone = torch.arange(prompts.shape[0])

    def mean(values: torch.Tensor) -> Estimate:
        return clustered(values.double(), alone)

    return Continuations(
        prompts=prompts.shape[0],
        count=base.shape[1],
        agreement=mean(first),
        identical=mean(first == base.shape[1]),
        repetition=mean(torch.tensor([repetition(row) for row in candidate.tolist()])),
        base_repetition=mean(torch.tensor([repetition(row) for row in base.tolist()])),
        example=(prompts[worst].tolist(), base[worst].tolist(), candidate[worst].tolist()),
    )


def generation_table(names: Sequence[str], found: Sequence[Continuations]) -> dict[str, Any]:
    """The table of the report: plain data."""

    def cell(value: Estimate, scale: float = 1.0) -> dict[str, float]:
        return {"value": value[0] * scale, "stderr": value[1] * scale}

    heads = ["candidate", f"same tokens, of {found[0].count}", "identical, %", "repetition, %", "base's, %"]
    rows = [
        [
            name,
            cell(item.agreement),
            cell(item.identical, 100),
            cell(item.repetition, 100),
            cell(item.base_repetition, 100),
        ]
        for name, item in zip(names, found, strict=True)
    ]
    note = f"{found[0].prompts} prompts from the text, continued greedily. Repetition: share of 4-grams that occurred before in the same continuation."
    return {"heads": heads, "rows": rows, "note": note}
