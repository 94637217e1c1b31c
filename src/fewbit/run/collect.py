"""The statistics of a stage's inputs over all sequences, from one stream of hidden states or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fewbit.base.errors import InputError
from fewbit.math.linalg import solve_damped
from fewbit.math.stats import Stats
from fewbit.run.lanes import in_lanes
from fewbit.run.passes import Stream
from fewbit.run.stages import ByExpert

DAMPING = 0.003  # share of the mean diagonal in the regression of the float model's inputs on the quantised model's


def collect(
    quantised: Stream,
    floats: Stream | None,
    stage: int,
    needs: frozenset[str],
    check_stop: Callable[[], None],
) -> ByExpert:
    """Statistics of a stage's inputs over all sequences.

    Args:
        quantised, floats: the two streams; the second may hold the first sequences only, or be None where no solver asks for `cross_gram`.
    """
    lanes, last = quantised.block.lanes, stage + 1 == len(quantised.stages)
    plain = not quantised.stages[stage].experts  # experts see other tokens in the two streams
    sums: list[ByExpert] = [{} for _ in range(lanes)]
    drifts = [Drift() for _ in range(lanes)]
    paired = len(floats.hidden) if plain and floats is not None else 0
    for stream in (quantised, floats):
        if stream is not None:
            stream.forget(stage)

    def work(batch: int) -> None:
        stats, drift = sums[batch % lanes], drifts[batch % lanes]
        other = floats.inputs(stage, batch, finish=last) if floats is not None and batch < paired else {}
        for expert, x in quantised.inputs(stage, batch).items():
            stats[expert] = stats.get(expert, Stats()).take(x, needs=needs - {"cross_gram"})
            if floats is not None and expert in other:
                last_pair = batch + lanes >= paired and floats.hidden.shape[0] < quantised.hidden.shape[0]
                drift.add(other[expert], x, stats[expert].gram if last_pair else None)

    in_lanes(len(quantised.hidden), lanes, work, check_stop)
    stats = sums[0]
    for more in sums[1:]:
        for expert, one in more.items():
            stats[expert] = stats[expert].merge(one) if expert in stats else one
    if paired and "cross_gram" in needs:
        stats[None] = replace(stats[None], cross_gram=Drift.together(drifts).cross(stats[None].held("gram")))
    return stats


class Drift:
    """What the float model's inputs have more than the quantised model's, summed against the latter over the tokens of both streams.

    Attributes:
        moved: [channels, channels], sum of (x_float - x) x^T; gram: sum of x x^T over the same tokens, None when they are all tokens.
    """

    def __init__(self) -> None:
        self.moved: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None

    @classmethod
    def together(cls, parts: list[Drift]) -> Drift:
        """The sums of several, which are used up."""
        whole = parts[0]
        for part in parts[1:]:
            if part.moved is not None:
                whole.moved = part.moved if whole.moved is None else whole.moved.add_(part.moved)
            if part.gram is not None:
                whole.gram = part.gram if whole.gram is None else whole.gram.add_(part.gram)
        return whole

    def add(self, true: torch.Tensor, x: torch.Tensor, gram: torch.Tensor | None = None) -> None:
        """Adds a batch, of which the float stream may hold the first tokens only; the difference of the streams is summed as such, for it is
        small beside either.

        Args:
            gram: the sum of x x^T up to this batch, where it is the last but other tokens follow.
        """
        flat = x.reshape(-1, x.shape[-1]).float()
        true = true.reshape(-1, x.shape[-1]).float()
        count = len(true)
        part = flat[:count]
        missing = true - part
        self.moved = missing.T @ part if self.moved is None else self.moved.addmm_(missing.T, part)
        if gram is not None:
            self.gram = gram.clone()
            if count < len(flat):
                self.gram.addmm_(flat[count:].T, flat[count:], alpha=-1)

    def cross(self, gram: torch.Tensor) -> torch.Tensor:
        """The cross-gram that goes with the gram of all tokens: the regression of the float model's inputs on the others is that of these tokens."""
        if self.moved is None:
            return gram.clone()
        if self.gram is None:
            return self.moved.add_(gram)
        try:
            found, _ = solve_damped(self.gram, self.moved, DAMPING)
        except InputError:  # nothing to regress on: no drift to speak of
            return gram.clone()
        return (found @ gram).add_(gram)
