"""What `fewbit eval` measures besides: greedy continuations, tasks, embeddings. The base first, then each candidate as it comes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fewbit.eval.encoders import EmbeddingScore, compare_embeddings, embedding_table, embeddings
from fewbit.eval.generate import Continuations, Resident, continuations, generation_table
from fewbit.eval.stream import Runner
from fewbit.eval.tasks import require_harness, run_tasks, task_table
from fewbit.eval.windows import Windows
from fewbit.run.calib import Tokens

PROMPTS, PROMPT_TOKENS = 16, 32


@dataclass(frozen=True)
class Wishes:
    """Attributes: generate: tokens to continue prompts by (0: none); tasks: of lm_eval; task_limit: questions per task; embed: compare embeddings."""

    generate: int = 0
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    embed: bool = False


class Extras:
    """The wishes being carried out."""

    def __init__(
        self, wishes: Wishes, base: Runner, chosen: Windows, tokenizer: Callable[[], Tokens], say: Callable[[str], None]
    ) -> None:
        """Runs the base on what is wished for.

        Raises:
            InputError: FB-E0811 without lm_eval, FB-E0812 for an unknown task; before any work.
        """
        self.wishes, self.chosen, self._say = wishes, chosen, say
        self._tokenizer = tokenizer() if wishes.tasks or wishes.generate else None
        self.names: list[str] = []
        if wishes.tasks:
            require_harness()
            self.tasks = [("base", self._run_tasks(base))]
        if wishes.generate:
            length = min(PROMPT_TOKENS, chosen.tokens.shape[1] // 2)
            self.prompts = chosen.tokens[:PROMPTS, :length]
            say(f"base: continuing {self.prompts.shape[0]} prompts")
            self.expected = Resident(base).greedy(self.prompts, wishes.generate)
            self.spoken: list[Continuations] = []
        if wishes.embed:
            say("base: embeddings")
            self.vectors = embeddings(base, chosen)
            self.alike: list[EmbeddingScore] = []

    def _run_tasks(self, runner: Runner) -> dict[str, Any]:
        assert self._tokenizer is not None
        self._say(f"tasks: {', '.join(self.wishes.tasks)}")
        return run_tasks(runner, self._tokenizer, self.wishes.tasks, self.wishes.task_limit)

    def add(self, name: str, runner: Runner) -> None:
        """Runs a candidate."""
        self.names.append(name)
        if self.wishes.tasks:
            self.tasks.append((name, self._run_tasks(runner)))
        if self.wishes.generate:
            self._say("continuing prompts")
            self.spoken.append(
                continuations(self.prompts, self.expected, Resident(runner).greedy(self.prompts, self.wishes.generate))
            )
        if self.wishes.embed:
            self._say("embeddings")
            self.alike.append(compare_embeddings(self.vectors, embeddings(runner, self.chosen), self.chosen.clusters))

    def tables(self) -> dict[str, Any]:
        """{"generation" | "tasks" | "embedding": table} for the report."""
        made: dict[str, Any] = {}
        if self.wishes.generate and self.names:
            made["generation"] = generation_table(self.names, self.spoken)
            made["generation"]["examples"] = {
                name: self._example(item) for name, item in zip(self.names, self.spoken, strict=True)
            }
        if self.wishes.tasks and self.names:
            made["tasks"] = task_table(self.tasks)
        if self.wishes.embed and self.names:
            made["embedding"] = embedding_table(self.names, self.alike)
        return made

    def _example(self, item: Continuations) -> dict[str, str]:
        assert self._tokenizer is not None
        decode = self._tokenizer.inner.decode
        return dict(zip(("prompt", "base", "candidate"), (decode(ids) for ids in item.example), strict=True))
