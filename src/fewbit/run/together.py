"""Solvers that improve all weights of a block together: what they need of the running block.

loss(weights, batch)  =  what the block makes of the quantised model's hidden states with these weights
                         against what the ideal block makes of the same, squared (in the metric of the loss, where it is known)

The ideal block has the float weights, its last product corrected for what the quantised model got wrong so far as the inputs tell of it
(`run.drift`). What the float model's own hidden states would give is no better a target: most of the difference is nothing that this block's weights
can mend, and gradients then follow its noise. Measured on a block of the sample at 2 bits (dev/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fewbit.base.errors import InputError
from fewbit.run.acts import ActStore
from fewbit.run.answers import Answers, Found
from fewbit.run.hf import Params, Slot
from fewbit.run.stages import Block
from fewbit.solve.table import SOLVERS

if TYPE_CHECKING:
    from fewbit.run.engine import Group

OUTPUT_DAMPING = 0.05  # share of the mean diagonal added to the metric of a block's outputs


class Together:
    """One block and its answers, for solvers with `together`.

    Args:
        params: the block's weights as the first output has them; changed when that output's answers improve.
        quantised: inputs of the block in the quantised model; wanted: what the ideal block makes of them.
        metric: float32 [width, width], gram of the loss gradients at the block's outputs, or None.
    """

    def __init__(
        self,
        block: Block,
        params: Params,
        quantised: ActStore,
        wanted: ActStore,
        metric: torch.Tensor | None,
        answers: Answers,
    ) -> None:
        self.block, self.params, self.quantised, self.wanted, self.answers = block, params, quantised, wanted, answers
        self.metric = None if metric is None else _damped(metric)

    def improve(self, found: dict[str, Found], slots: Mapping[str, Slot], check_stop: Callable[[], None]) -> None:
        """Replaces answers by better ones, in `found` (stored tensor -> answers) and in the block's weights.

        Each output's answers are improved as a whole; an output that shares them all with an earlier one is done already.
        """
        done: set[str] = set()
        outputs = sorted({index for pieces in found.values() for group, _ in pieces for index, _ in group.jobs})
        for output in outputs:
            mine = {name: _of(pieces, output) for name, pieces in found.items()}
            picked = {name: at for name, at in mine.items() if at is not None}
            todo = {
                name: at
                for name, at in picked.items()
                if found[name][at][0].key not in done and SOLVERS[found[name][at][0].job.solver].together is not None
            }
            if todo:
                self._improve(found, picked, todo, slots, check_stop)
                done |= {found[name][at][0].key for name, at in todo.items()}
        for name, pieces in found.items():
            self.answers.put_back(self.params, self._local(slots[name]), slots[name], pieces[0][1].q)

    def _improve(
        self,
        found: dict[str, Found],
        picked: dict[str, int],
        todo: dict[str, int],
        slots: Mapping[str, Slot],
        check_stop: Callable[[], None],
    ) -> None:
        """One output's answers; tensors that another solver settled stay as that output has them."""
        params = dict(self.params)
        for name, at in picked.items():
            local = self._local(slots[name])
            if params[local] is self.params[local]:
                params[local] = self.params[local].clone()
            self.answers.put_back(params, local, slots[name], found[name][at][1].q)
        job = found[next(iter(todo))][next(iter(todo.values()))][0].job
        improve = SOLVERS[job.solver].together
        if improve is None:
            raise InputError("FB-E0704", f"method {job.solver} solves one weight at a time")
        better = improve(
            lambda weights, batch: self._loss(params, slots, weights, batch),
            len(self.wanted),
            {name: found[name][at][1].q for name, at in todo.items()},
            {name: self.answers.matrix(name) for name in todo},
            seed=self.answers.seed + self.block.index,
            options=self.answers.run.options_all(job),
            check_stop=check_stop,
        )
        for name, at in todo.items():
            group, old = found[name][at]
            if name in better:
                new = replace(better[name], notes=(*old.notes, *better[name].notes))
            else:
                new = replace(old, notes=(*old.notes, f"{job.solver} does not apply to {group.job.scheme}"))
            found[name][at] = (group, new)

    def _local(self, slot: Slot) -> str:
        return self.block.model.local(self.block.index, slot)

    def _loss(
        self, params: Params, slots: Mapping[str, Slot], weights: Mapping[str, torch.Tensor], batch: int
    ) -> torch.Tensor:
        """Mean over the tokens of a batch of the squared error of the block's output; differentiable in `weights`."""
        trial = dict(params)
        for name, weight in weights.items():
            slot = slots[name]
            local = self._local(slot)
            value = weight.transpose(-1, -2) if self.answers.known[name].transposed else weight
            if slot.expert is None and slot.rows is None:
                trial[local] = value.to(params[local].dtype)
                continue
            if trial[local] is params[local]:
                trial[local] = params[local].clone()
            slot.view(trial[local]).copy_(value)
        wanted = self.wanted.get(batch).to(self.block.model.device)
        error = (self.block.run(trial, self.quantised.get(batch)) - wanted).float().flatten(0, -2)
        moved = error if self.metric is None else error @ self.metric
        return (moved * error).sum() / error.shape[0]


def ideal_block(
    block: Block,
    params: Params,
    slots: Mapping[str, Slot],
    corrections: Mapping[str, torch.Tensor],
    answers: Answers,
) -> Params:
    """A block's parameters with the float weights in their places (stored name -> slot), corrected where a correction [out, in] is known."""
    found = {name: value.clone() for name, value in params.items()}
    for name, slot in slots.items():
        value = answers.matrix(name)
        if name in corrections:
            value = value.float() + corrections[name].to(value.device)
        answers.put(found, block.model.local(block.index, slot), slot, value)
    return found


def _of(pieces: Found, output: int) -> int | None:
    """Which of a tensor's answers an output takes, or None."""
    return next((at for at, (group, _) in enumerate(pieces) if any(index == output for index, _ in group.jobs)), None)


def _damped(metric: torch.Tensor) -> torch.Tensor:
    """Mean diagonal about one, with a share of the identity: errors that the loss does not feel shall stay small too."""
    scaled = metric / metric.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    scaled.diagonal().add_(OUTPUT_DAMPING)
    return scaled


def wants(groups: list[Group]) -> bool:
    """Whether any of the groups' solvers improves blocks as a whole."""
    return any(SOLVERS[group.job.solver].together is not None for group in groups)
