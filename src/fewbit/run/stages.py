"""The stages of a block: which weights see the same inputs, in the order in which the block uses them, and the statistics of those inputs.

Stages are found by watching which matrix products share an input, not by names: q k v, then o, then gate up, then down; experts of a
stack are a stage of their own, each with the tokens that the router gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.math.stats import Stats
from fewbit.run.acts import ActStore
from fewbit.run.hf import BlockModel, Params
from fewbit.run.observe import Observer, StopForward, Use

ROUNDS = 8  # passes that send tokens to starved experts, at most

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
        lanes: batches that are run side by side.
    """

    model: BlockModel
    index: int
    kwargs: dict[str, Any]
    recorded: int
    lanes: int = 1

    def run(
        self, params: Params, hidden: torch.Tensor, within: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        """Hidden states [batch, length, width] after the block with the given parameters.

        Args:
            within: an observer, say, that sees the block's own calls and none that prepare them.
        """
        arguments = self.model.arguments(self.kwargs, self.recorded, hidden.shape[0])
        hidden = hidden.to(self.model.device)
        with within or nullcontext():
            return self.model.run_block(self.index, params, hidden, arguments)


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


def top_up(
    block: Block,
    stage: Stage,
    params: Params,
    quantised: ActStore,
    stats: ByExpert,
    routers: Iterable[str],
    experts: int,
    floor: int,
    needs: frozenset[str],
) -> dict[int, int]:
    """Gives experts that fewer than `floor` tokens reached the statistics of tokens sent to them by force, counted as what is missing.

    Args:
        stats: of the stage, changed in place. routers: local names of the block's router weights. experts: how many there are.

    Returns:
        expert -> tokens that came by themselves, for those that were topped up. An architecture whose routers are no plain products, or do not
        let themselves be swayed, gets nothing.
    """
    reached = {expert: stats[expert].count if expert in stats else 0 for expert in range(experts)}
    missing = {expert: floor - count for expert, count in reached.items() if count < floor}
    sent: dict[int, Stats] = {}
    used: set[tuple[int, int]] = set()
    for turn in range(ROUNDS):
        starved = [expert for expert, count in missing.items() if expert not in sent or sent[expert].count < count]
        if not starved:
            break
        batch = turn % len(quantised)
        found = inputs(block, stage, params, quantised.get(batch), tuple(routers), starved)
        for expert in starved:
            if expert in found and found[expert].shape[0] and (expert, batch) not in used:
                used.add((expert, batch))
                sent[expert] = sent.get(expert, Stats()).add(found[expert], needs=needs - {"cross_gram"})
    for expert, forced in sent.items():
        count = min(forced.count, missing[expert])
        stats[expert] = stats.get(expert, Stats()).merge(forced.scaled(count / forced.count, count))
    return {expert: reached[expert] for expert in sent}


def inputs(
    block: Block,
    stage: Stage,
    params: Params,
    hidden: torch.Tensor,
    routers: tuple[str, ...] = (),
    forced: Sequence[int] = (),
) -> dict[int | None, torch.Tensor]:
    """What the stage's weights are multiplied with for one batch; with `routers`, when they favour the experts `forced`."""
    found: dict[int | None, torch.Tensor] = {}

    def take(use: Use) -> None:
        if use.param != stage.params[0]:
            return
        if use.expert not in found:
            found[use.expert] = use.x
        if not stage.experts:
            raise StopForward

    def sway(use: Use, product: torch.Tensor) -> torch.Tensor | None:
        if use.param not in routers or product.shape[-1] <= max(forced):  # the gate of a shared expert is no router
            return None
        product = product.clone()
        product[..., list(forced)] += 2 * (product.amax() - product.amin()) + 10
        return product

    watched = {name: params[name] for name in (stage.params[0], *routers)}
    with contextlib.suppress(StopForward), Observer(watched, take, sway if routers else None):
        block.run(params, hidden)
    return found
