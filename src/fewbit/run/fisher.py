"""How much the loss feels an error at each output: grams of loss gradients, by one backward pass, block by block.

For a linear layer y = W x the Fisher information of the model's own predictions factors approximately into E[x xᵀ] and E[g gᵀ], with g the
gradient of the loss at y, for labels drawn from the model (arXiv 1503.05671; used for rounding in YAQA, arXiv 2505.22988, and
GuidedQuant, arXiv 2505.07004). The right factor is the gram that every calibrated solver uses; this file gives the left one, `out_gram`.
The two factors are not independent: where the gradient is large, inputs count for more. So the size of every token's gradient is kept too, and weighs
the token in the right factor (`token_weights`).

The pass is checkpointed at blocks: the forward pass keeps each block's inputs (on disk when they are large), the backward pass
recomputes one block at a time. So it needs one block and its graph in memory, like everything else here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fewbit.base.resident import trim
from fewbit.math.linalg import add_gram
from fewbit.plan.calibrated import LOGITS, MOST_OUTPUTS
from fewbit.run.acts import ActStore
from fewbit.run.hf import BlockModel, Params, Read
from fewbit.run.lanes import in_lanes
from fewbit.run.observe import Observer, Use

Tracked = dict[str, str]
"""Local parameter name -> stored tensor name."""
OUTPUT = "block.output"  # stands among the weights for what comes out of the block
TOKENS = "block.tokens"  # and this for the squared gradients there, token by token
POWER, MOST = 0.5, 10.0  # a token weighs as its squared gradient to this power, at most so many times the mean


def fisher_pass(
    model: BlockModel,
    read: Read,
    trunk: Params,
    tokens: torch.Tensor,
    tracked: list[Tracked],
    folder: Path,
    *,
    batch: int,
    seed: int,
    spill: bool,
    lanes: int = 1,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Writes `fisher-<block>.safetensors` into `folder` for every block: stored name (and `OUTPUT`) -> float32 [outputs, outputs], and
    `TOKENS` -> float32 [windows, length].

    Args:
        tokens: int64 [windows, length]. tracked: per block, the matrices wanted. batch: windows per step.
        spill: keep hidden states on disk. lanes: batches side by side. check_stop: called before each batch; may raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        beside = folder if spill else None
        inputs, kwargs = _forward(model, read, trunk, tokens, beside, batch, lanes, stack, check_stop)
        gradient = _top(model, trunk, tokens, inputs[-1], seed, beside, stack, check_stop)
        for index in reversed(range(len(model))):
            params = model.load_block(index, read)
            words = (kwargs[index], inputs[index], gradient, tracked[index], lanes, check_stop)
            grams = _backward(model, index, params, *words)
            inputs[index].close()
            trim()
            _save(grams, folder / f"fisher-{index}.safetensors")
    (folder / "fisher-done").touch()


def load_grams(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """The grams of a block that `fisher_pass` wrote; empty when it did not run."""
    path = folder / f"fisher-{index}.safetensors"
    return load_file(path) if path.exists() else {}


def token_weights(sizes: torch.Tensor | None, sequences: int) -> torch.Tensor | None:
    """What each token weighs, float32 [sequences, length] with a mean of one, from squared gradients [windows, length] of the first of them.

    The gradient is that of one drawn label, a noisy measure: the square root and the limit keep few tokens from outweighing all others.
    """
    if sizes is None or not bool(torch.isfinite(sizes).all()) or not bool(sizes.any()):
        return None
    weights = torch.ones(sequences, sizes.shape[1])
    found = (sizes / sizes.mean()).pow(POWER).clamp_(max=MOST)
    weights[: len(sizes)] = found / found.mean()
    return weights


def _save(grams: dict[str, torch.Tensor], path: Path) -> None:
    beside = path.with_name(path.name + ".new")
    save_file(grams, beside)
    beside.replace(path)


def _store(
    like: tuple[int, int, int], model: BlockModel, batch: int, path: Path | None, stack: contextlib.ExitStack
) -> ActStore:
    store = ActStore(like, model.dtype, batch, path)
    stack.callback(store.close)
    return store


def _forward(
    model: BlockModel,
    read: Read,
    trunk: Params,
    tokens: torch.Tensor,
    folder: Path | None,
    batch: int,
    lanes: int,
    stack: contextlib.ExitStack,
    check_stop: Callable[[], None],
) -> tuple[list[ActStore], list[dict[str, Any]]]:
    """Inputs of every block and, last, the outputs of the last one."""
    entry = model.enter(trunk, tokens[:batch])
    shape = (tokens.shape[0], tokens.shape[1], entry.hidden.shape[-1])
    recorded = min(batch, tokens.shape[0])
    stores = [
        _store(shape, model, batch, folder / f"fisher-in-{i}" if folder else None, stack) for i in range(len(model) + 1)
    ]
    with torch.no_grad():
        for number in range(len(stores[0])):
            start, stop = stores[0].span(number)
            stores[0].put(number, model.enter(trunk, tokens[start:stop]).hidden)
        for index in range(len(model)):
            params = model.load_block(index, read)
            model.prepare(index, lanes)

            def work(number: int, index: int = index, params: Params = params) -> None:
                hidden = stores[index].get(number).to(model.device)
                arguments = model.arguments(entry.kwargs[index], recorded, hidden.shape[0])
                stores[index + 1].put(number, model.run_block(index, params, hidden, arguments))

            in_lanes(len(stores[0]), lanes, work, check_stop)
    return stores, entry.kwargs


def _top(
    model: BlockModel,
    trunk: Params,
    tokens: torch.Tensor,
    last: ActStore,
    seed: int,
    folder: Path | None,
    stack: contextlib.ExitStack,
    check_stop: Callable[[], None],
) -> ActStore:
    """Gradient of the loss at the outputs of the last block, labels drawn from the model's own predictions."""
    gradient = _store(last.shape, model, last.batch, folder / "fisher-gradient" if folder else None, stack)
    generator = torch.Generator().manual_seed(seed)
    for number in range(len(last)):
        start, stop = last.span(number)
        few = max(1, LOGITS // (tokens.shape[1] * max(len(weight) for weight in trunk.values())))
        slopes: list[torch.Tensor] = []
        for ids, hidden in zip(tokens[start:stop].split(few), last.get(number).split(few), strict=True):
            check_stop()
            slopes.append(_slope(model, trunk, ids, hidden, generator))
        gradient.put(number, torch.cat(slopes))
    return gradient


def _slope(
    model: BlockModel, trunk: Params, ids: torch.Tensor, hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Gradient of the loss at the last hidden states of some sequences."""
    hidden = hidden.to(model.device).clone().requires_grad_(True)
    with torch.enable_grad():
        logits = model.leave(trunk, ids, hidden)
    slope = logits.detach().float().softmax(-1)  # of the cross entropy: probabilities less one at the label
    labels = _drawn(slope.flatten(0, -2), generator)
    slope.flatten(0, -2).scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
    return torch.autograd.grad(logits, hidden, slope.to(logits.dtype))[0]


def _drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index per row with these chances, int64 [rows, 1], by the inverse of the distribution function."""
    rising = chances.cumsum(-1)
    place = torch.rand(chances.shape[0], 1, generator=generator).to(chances.device) * rising[:, -1:]
    return torch.searchsorted(rising, place, right=True).clamp_(max=chances.shape[-1] - 1)


def _backward(
    model: BlockModel,
    index: int,
    params: Params,
    kwargs: dict[str, Any],
    inputs: ActStore,
    gradient: ActStore,
    tracked: Tracked,
    lanes: int,
    check_stop: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Grams of one block's outputs; `gradient` is turned into the gradient at the block's inputs."""
    sums: list[dict[str, torch.Tensor]] = [{} for _ in range(lanes)]
    sizes: dict[int, torch.Tensor] = {}  # by batch
    recorded = min(inputs.batch, inputs.shape[0])
    model.prepare(index, lanes)

    def work(number: int) -> None:
        grams = sums[number % lanes]

        def watch(use: Use, product: torch.Tensor) -> None:
            if use.expert is None and product.requires_grad and product.shape[-1] <= MOST_OUTPUTS:
                product.register_hook(partial(_add, grams, tracked[use.param]))

        hidden = inputs.get(number).to(model.device).clone().requires_grad_(True)
        arguments = model.arguments(kwargs, recorded, hidden.shape[0])
        with torch.enable_grad(), Observer({name: params[name] for name in tracked}, on_output=watch):
            out = model.run_block(index, params, hidden, arguments)
        slope = gradient.get(number).to(model.device)
        if slope.shape[-1] <= MOST_OUTPUTS:
            _add(grams, OUTPUT, slope)
        sizes[number] = slope.float().square().sum(-1)
        gradient.put(number, torch.autograd.grad(out, hidden, slope)[0])

    in_lanes(len(inputs), lanes, work, check_stop)
    whole = sums[0]
    for more in sums[1:]:
        for name, gram in more.items():
            whole[name] = whole[name] + gram if name in whole else gram
    whole[TOKENS] = torch.cat([sizes[number] for number in sorted(sizes)])
    return {name: gram.cpu() for name, gram in whole.items()}


def _add(grams: dict[str, torch.Tensor], name: str, gradient: torch.Tensor) -> None:
    flat = gradient.detach().flatten(0, -2).float()
    grams[name] = add_gram(grams.get(name), flat)
