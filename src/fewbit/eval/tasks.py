"""Tasks of EleutherAI's harness (lm_eval, an optional extra) on the reference path.

    results = run_tasks(runner, ["arc_easy", "my_task.yaml"], limit=100)

`harness_model` wraps a runner as lm_eval's LM: log likelihoods stream through the blocks, all requests of a length together; text is
generated greedily with the weights resident.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.eval.generate import Resident
from fewbit.eval.stream import Runner, States
from fewbit.run.calib import Tokens

LENGTH_STEP = 32  # requests are padded to a multiple of this
DEFAULT_CONTEXT = 2048
DEFAULT_NEW_TOKENS = 256


def require_harness() -> None:
    """Raises InputError FB-E0811 when lm_eval is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError("FB-E0811", "--tasks needs EleutherAI's harness, which is not installed") from None


def run_tasks(
    runner: Runner, tokenizer: Tokens, tasks: Sequence[str], limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Scores of a model on tasks: task -> {metric: (value, standard error or None)}.

    Args:
        tasks: names known to lm_eval, or paths of its YAML files.
        limit: questions per task at most.

    Raises:
        InputError: FB-E0811 without lm_eval, FB-E0812 for a task that it does not know.
    """
    require_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError("FB-E0812", f"lm_eval knows no task {', '.join(unknown)}")
    found = lm_eval.simple_evaluate(
        model=harness_model(runner, tokenizer), tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, log_samples=False, verbosity="ERROR",
    )  # fmt: skip
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm_eval's "acc,none" and "acc_stderr,none" as pairs."""
    made = {}
    for key, value in values.items():
        name, _, form = key.partition(",")
        if isinstance(value, (int, float)) and form and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{form}")
            made[name] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return made


def task_table(columns: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Tasks down, models across (the base first): the table of the report, plain data."""
    rows = []
    for task, metrics in columns[0][1].items():
        for metric in metrics:
            pairs = [found.get(task, {}).get(metric, (None, None)) for _, found in columns]
            rows.append(
                [
                    f"{task} · {metric}",
                    *({"value": value, "stderr": error or 0.0} if value is not None else "·" for value, error in pairs),
                ]
            )
    return {
        "heads": ["task", *(name for name, _ in columns)],
        "rows": rows,
        "note": "By lm_eval on the reference path; ± is its standard error.",
    }


def harness_model(runner: Runner, tokenizer: Tokens) -> Any:
    """A runner as lm_eval's LM (made here, as the class to inherit from is lm_eval's)."""
    from lm_eval.api.model import LM

    class Harness(LM):
        """The three requests of lm_eval, on a runner."""

        def __init__(self) -> None:
            super().__init__()
            self.work = Likelihoods(runner, tokenizer)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self.work.of_pairs([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self.work.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self.work.generated([request.args for request in requests])

    return Harness()


def _shared(context: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens the context keeps when the continuation follows it: fewer than it has where they merge; one is always left to score."""
    differs = next(
        (i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), min(len(context), len(whole))
    )
    return max(1, min(differs, len(whole) - 1))


class Likelihoods:
    """What lm_eval asks, answered through the block stream."""

    def __init__(self, runner: Runner, tokenizer: Tokens) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.most = int(runner.context or DEFAULT_CONTEXT)
        self._start = (tokenizer.separator or [0])[:1]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer.inner(text, add_special_tokens=special)["input_ids"])

    def of_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log likelihood of the continuation, whether it is the greedy one) of (context, continuation) pairs."""
        rows = []
        for context, continuation in pairs:
            trimmed = context.rstrip()
            continuation, context = (
                context[len(trimmed) :] + continuation,
                trimmed,
            )  # spaces belong to the words after them
            whole = self._ids(context + continuation) if context else self._start + self._ids(continuation)
            before = _shared(self._ids(context), whole) if context else 1
            rows.append((whole[-self.most - 1 :], min(len(whole) - before, self.most)))
        return self.scored(rows)

    def scored(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each (ids, n): the log likelihood of the last n ids, and whether each is the likeliest at its place."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        buckets: dict[int, list[int]] = {}
        for index, (ids, _) in enumerate(rows):
            buckets.setdefault(-(-(len(ids) - 1) // LENGTH_STEP) * LENGTH_STEP, []).append(index)
        for length, members in sorted(buckets.items()):
            tokens = torch.zeros(len(members), max(1, length), dtype=torch.int64)
            for row, index in enumerate(members):
                ids = rows[index][0][:-1]
                tokens[row, : len(ids)] = torch.tensor(ids)
            hidden = self.runner.hidden(tokens)
            states = States(hidden)
            for row, index in enumerate(members):
                ids, count = rows[index]
                positions = torch.arange(len(ids) - 1 - count, len(ids) - 1)
                log_p = torch.log_softmax(
                    self.runner.logits(
                        tokens[row, positions].unsqueeze(0), states(row, positions).unsqueeze(0)
                    ).double(),
                    -1,
                )
                target = torch.tensor(ids[len(ids) - count :], device=log_p.device)
                answers[index] = (
                    float(log_p.gather(-1, target.unsqueeze(-1)).sum()),
                    bool((log_p.argmax(-1) == target).all()),
                )
            hidden.close()
        return answers

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log likelihood of whole texts, in windows that do not overlap, each with one token of context."""
        rows, owner = [], []
        for index, text in enumerate(texts):
            ids = self._start + self._ids(text)
            for start in range(0, len(ids) - 1, self.most):
                part = ids[start : start + self.most + 1]
                rows.append((part, len(part) - 1))
                owner.append(index)
        totals = [0.0] * len(texts)
        for index, (value, _) in zip(owner, self.scored(rows), strict=True):
            totals[index] += value
        return totals

    def generated(self, requests: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
        """Greedy continuations, cut at the first stop word."""
        model = Resident(self.runner)
        answers = []
        for context, wish in requests:
            stops = wish.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            count = int(wish.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            ids = (self._ids(context) or self._start)[-max(1, self.most - count) :]
            answers.append(self._until(model, ids, count, stops))
        return answers

    def _until(self, model: Resident, ids: list[int], count: int, stops: Sequence[str]) -> str:
        logits, cache = model.forward(torch.tensor([ids]))
        made: list[int] = []
        while len(made) < count:
            made.append(int(logits.argmax()))
            text = self.tokenizer.inner.decode(made)
            ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
            if made[-1] in self.tokenizer.separator:
                return self.tokenizer.inner.decode(made[:-1])
            logits, cache = model.forward(torch.tensor([made[-1:]]), cache)
        return self.tokenizer.inner.decode(made)
