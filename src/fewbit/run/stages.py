"""The stages of a block: which weights see the same inputs, in the order in which the block uses them, and the statistics of those inputs.

Stages are found by watching which matrix products share an input, not by names: q k v, then o, then gate up, then down; experts of a
stack are a stage of their own, each with the tokens that the router gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.math.stats import Stats
from fewbit.run.acts import ActStore
from fewbit.run.hf import BlockModel, Params
from fewbit.run.observe import Observer, StopForward, Use

ByExpert = dict[int | None, Stats]
"""Statistics of a stage's inputs; per expert for stacks, else under None."""


@dataclass(frozen=True)
class Stage:
    """Parameters of a block that are solved together because they see the same inputs."""

    params: tuple[str, ...]
    experts: bool = False


@dataclass(frozen=True)
class Block:
    """One block of a model, and what it is called with.

    Attributes:
        kwargs: arguments recorded with `recorded` sequences.
    """

    model: BlockModel
    index: int
    kwargs: dict[str, Any]
    recorded: int

    def run(self, params: Params, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, length, width] after the block with the given parameters."""
        arguments = self.model.arguments(self.kwargs, self.recorded, hidden.shape[0])
        return self.model.run_block(self.index, params, hidden.to(self.model.device), arguments)

    def advance(self, params: Params, store: ActStore) -> None:
        """Takes all hidden states of a store through the block, in place."""
        for batch in range(len(store)):
            store.put(batch, self.run(params, store.get(batch)))


def find_stages(block: Block, params: Params, names: Iterable[str], hidden: torch.Tensor) -> list[Stage]:
    """The stages of the named parameters, from one pass over one sequence [1, length, width]."""
    uses: list[Use] = []
    with Observer({name: params[name] for name in names}, lambda use: uses.append(use)):
        block.run(params, hidden)
    stages: list[Stage] = []
    last: torch.Tensor | None = None
    seen: set[str] = set()
    for use in uses:
        if use.param in seen:
            continue
        seen.add(use.param)
        same = last is not None and use.x.data_ptr() == last.data_ptr() and use.x.shape == last.shape
        if same and stages and use.expert is None and not stages[-1].experts:
            stages[-1] = Stage((*stages[-1].params, use.param))
        else:
            stages.append(Stage((use.param,), experts=use.expert is not None))
        last = use.x
    return stages


def collect(
    block: Block,
    stage: Stage,
    params: Params,
    quantised: ActStore,
    originals: Params | None,
    floats: ActStore | None,
    needs: frozenset[str],
    check_stop: Callable[[], None],
) -> ByExpert:
    """Statistics of a stage's inputs over all sequences.

    Args:
        params, quantised: weights and hidden states of the quantised model so far.
        originals, floats: those of the float model, or None where no solver asks for `cross_gram`.
    """
    stats: ByExpert = {}
    paired = floats is not None and not stage.experts  # experts see other tokens in the two streams
    needs = needs if paired else needs - {"cross_gram"}
    for batch in range(len(quantised)):
        check_stop()
        other: dict[int | None, torch.Tensor] = {}
        if paired and floats is not None and originals is not None:
            other = inputs(block, stage, originals, floats.get(batch))
        for expert, x in inputs(block, stage, params, quantised.get(batch)).items():
            stats[expert] = stats.get(expert, Stats()).add(x, other.get(expert), needs=needs)
    return stats


def inputs(block: Block, stage: Stage, params: Params, hidden: torch.Tensor) -> dict[int | None, torch.Tensor]:
    """What the stage's weights are multiplied with for one batch."""
    found: dict[int | None, torch.Tensor] = {}

    def take(use: Use) -> None:
        if use.expert not in found:
            found[use.expert] = use.x
        if not stage.experts:
            raise StopForward

    with contextlib.suppress(StopForward), Observer({stage.params[0]: params[stage.params[0]]}, take):
        block.run(params, hidden)
    return found
