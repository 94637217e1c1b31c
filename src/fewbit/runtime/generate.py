"""Text from a causal model, one token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

import torch
from torch import nn

from fewbit.base.errors import InputError


def generate(
    model: nn.Module,
    prompt: list[int],
    count: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yields up to `count` tokens after a prompt; a stop token ends it and is not yielded.

    Args:
        model: a transformers model with a causal head.
        prompt: token ids, at least one.
        temperature: 0 takes the most probable token.
        top_p: sample among the most probable tokens that together have this share.
        seed: of the sampling.

    Raises:
        InputError: FB-E0907 for an empty prompt or options out of range, FB-E0806 when logits are not finite.
    """
    from transformers import DynamicCache

    if not prompt or temperature < 0 or not 0 < top_p <= 1 or count < 0:
        raise InputError(
            "FB-E0907",
            f"cannot generate from {len(prompt)} tokens at temperature {temperature}, top-p {top_p}, {count} tokens",
        )
    generator = torch.Generator().manual_seed(seed)
    layered = (
        "config" in inspect.signature(DynamicCache.__init__).parameters
    )  # hybrids need a layer of its own kind for each of theirs
    cache = DynamicCache(config=model.config) if layered else DynamicCache()
    word, ids = cache_word(model), torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, use_cache=True, **{word: cache}).logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise InputError("FB-E0806", "the model's logits are not finite")
        token = pick(logits, temperature, top_p, generator)
        if token in stop:
            return
        yield token
        ids = torch.tensor([[token]])


def cache_word(model: nn.Module) -> str:
    """What a transformers model calls the argument and output that hold its cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token of logits float32 [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    chances, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    kept = chances * (chances.cumsum(-1) - chances < top_p)  # the first token always stays
    return int(order[torch.multinomial(kept, 1, generator=generator)])
