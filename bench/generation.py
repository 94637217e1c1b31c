"""Generation, not only likelihood: twenty prompts continued greedily by the sample and by quantised versions of it, at 2 bits.

    PYTHONPATH=src python bench/generation.py [--ours rtn gptq learned] [--scheme int2-g128-asym] [--made FOLDER …] [--count 96]

Each version is quantised here (or found in a folder). Reported: tokens before the first that differs from the float model's continuation; share of
4-grams that occurred before in the same continuation (repetition), and that of the float model's own; and how likely the float model finds each
continuation after its prompt (nats per token): text off its topic or out of its language is unlikely. JSON on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

import torch

from fewbit import api
from fewbit.eval.generate import Resident, continuations
from fewbit.eval.stream import Runner
from fewbit.run.calib import Tokens
from fewbit.run.source import open_source

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "sample"
PROMPTS = (
    "The city of Rome was founded", "In the year 1914 the war", "The album was released in", "She was born in London and",
    "The species is found in the forests of", "The river flows through", "The film received positive reviews from",
    "The game was developed by", "During the second season, the team", "The church was built in the",
    "He joined the army and served", "The storm reached the coast of", "The song was written by", "The old man looked at the sea and",
    "Once upon a time there was a king who", "The ship sailed from the harbour", "The station opened on the line between",
    "In the first half of the match,", "The president of the United States", "The novel tells the story of a young woman who",
)  # fmt: skip


def surprise(judge: Resident, prompt: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Nats per token that the judge finds in what was said after the prompt: [prompts]."""
    whole = torch.cat([prompt, said], 1)
    logs = torch.log_softmax(judge.logits(whole)[:, prompt.shape[1] - 1 : -1], -1)
    return -logs.gather(2, said.unsqueeze(-1))[..., 0].mean(1)


def speak(model: Resident, prompts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [model.greedy(prompt, count) for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", nargs="*", default=["rtn", "gptq"], help="methods to quantise with here")
    parser.add_argument("--scheme", default="int2-g128-asym")
    parser.add_argument("--made", nargs="*", type=Path, default=[], help="checkpoints that are there already")
    parser.add_argument("--count", type=int, default=96)
    given = parser.parse_args()
    tokenizer = Tokens(SAMPLE)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {str(path): path for path in given.made}
        for method in given.ours:
            api.quantize(
                SAMPLE, to=f"compressed-tensors:{given.scheme}", method=method, out=folder / method, verify=False
            )
            paths[method] = folder / method
        source = stack.enter_context(open_source(SAMPLE))
        base = Resident(Runner(source))
        prompts = [torch.tensor([tokenizer.inner(text, add_special_tokens=False)["input_ids"]]) for text in PROMPTS]
        true = speak(base, prompts, given.count)
        rows = [{"who": "float", "nats": mean([surprise(base, p, t) for p, t in zip(prompts, true, strict=True)])}]
        examples = {"float": tokenizer.inner.decode(true[0][0].tolist())}
        for name, path in paths.items():
            with open_source(path) as made:
                said = speak(Resident(Runner(made)), prompts, given.count)
            found = continuations(torch.zeros(len(said), 1, dtype=torch.int64), torch.cat(true), torch.cat(said))
            nats = mean([surprise(base, p, t) for p, t in zip(prompts, said, strict=True)])
            rows.append(
                {"who": name, "same_tokens": found.agreement, "repetition": found.repetition, "base_repetition": found.base_repetition, "nats": nats}
            )  # fmt: skip
            examples[name] = tokenizer.inner.decode(said[0][0].tolist())
    out = {
        "bench": "generation",
        "scheme": given.scheme,
        "prompts": len(PROMPTS),
        "count": given.count,
        "rows": rows,
        "examples": examples,
    }
    print(json.dumps(out, indent=1))


def mean(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean over prompts and its standard error."""
    held = torch.cat(values).double()
    return float(held.mean()), float(held.std() / len(held) ** 0.5)


if __name__ == "__main__":
    main()
