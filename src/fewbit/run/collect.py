"""The statistics of a stage's inputs over all sequences, from one stream of hidden states or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fewbit.math.stats import Stats
from fewbit.run.drift import Drift, held_batches
from fewbit.run.lanes import in_lanes
from fewbit.run.passes import Stream
from fewbit.run.stages import ByExpert


def collect(
    quantised: Stream,
    floats: Stream | None,
    stage: int,
    needs: frozenset[str],
    check_stop: Callable[[], None],
    weights: torch.Tensor | None = None,
) -> ByExpert:
    """Statistics of a stage's inputs over all sequences.

    What the blocks before got wrong is to be made up for: by the inputs of the two streams (`cross_gram`) or, at the end of a block whose last product
    is added to the hidden states, by what comes out of it (`correction`), which holds what every product before got wrong.

    Args:
        quantised, floats: the two streams; the second may hold the first sequences only, or be None where no solver asks for `cross_gram`.
        weights: float32 [sequences, length], what each token counts in the grams and in the regression of the drift; None: all alike. Tokens that
            are sent to experts count alike.
    """
    lanes, last = quantised.block.lanes, stage + 1 == len(quantised.stages)
    plain = not quantised.stages[stage].experts  # experts see other tokens in the two streams
    adds = quantised.kept[stage].adds if quantised.kept is not None and last else 0.0
    sums: list[ByExpert] = [{} for _ in range(lanes)]
    drifts = [Drift() for _ in range(lanes)]
    paired = len(floats.hidden) if plain and floats is not None else 0
    length = quantised.hidden.shape[1]
    held = held_batches(paired, length)
    for stream in (quantised, floats):
        if stream is not None:
            stream.forget(stage)

    def work(batch: int) -> None:
        stats, drift = sums[batch % lanes], drifts[batch % lanes]
        both = floats is not None and batch < paired
        true = floats.inputs(stage, batch, finish=last) if floats is not None and both else {}
        out = None
        if both and adds:
            mine, out = quantised.outputs(stage, batch)
        else:
            mine = quantised.inputs(stage, batch)
        root = None if weights is None else weights[slice(*quantised.hidden.span(batch))].flatten().sqrt()
        for expert, x in mine.items():
            share = None if root is None or expert is not None else root.to(x.device)[:, None]
            stats[expert] = stats.get(expert, Stats()).take(x, needs=needs - {"cross_gram"}, root=share)
            if floats is None or expert not in true:
                continue
            flat, other = x.flatten(0, -2), true[expert].flatten(0, -2)
            count = len(other)
            missing = other - flat[:count] if out is None else _missing(floats.hidden.get(batch), out, adds)
            if share is not None:
                flat, missing = flat * share, missing * share[:count]
            drift.add(flat[:count], missing, length, batch in held)
            if batch + lanes >= paired and floats.hidden.shape[0] < quantised.hidden.shape[0]:
                drift.end(stats[expert].held("gram"), flat[count:])

    in_lanes(len(quantised.hidden), lanes, work, check_stop)
    stats = _merged(sums)
    if paired and "cross_gram" in needs:
        stats[None] = _corrected(stats[None], Drift.together(drifts), bool(adds))
    return stats


def _missing(wanted: torch.Tensor, out: torch.Tensor, adds: float) -> torch.Tensor:
    """What the last product would have to add for a block's outputs to be those of the float stream, which may hold fewer sequences."""
    wanted = wanted.to(out.device).flatten(0, -2)
    return (wanted - out.flatten(0, -2)[: len(wanted)]) / adds


def _merged(sums: list[ByExpert]) -> ByExpert:
    """The statistics of all lanes, in their order."""
    stats = sums[0]
    for more in sums[1:]:
        for expert, one in more.items():
            stats[expert] = stats[expert].merge(one) if expert in stats else one
    return stats


def _corrected(stats: Stats, drift: Drift, whole: bool) -> Stats:
    """The statistics with what makes up for drift: of the weight (`whole`), or of its inputs, as the cross-gram that goes with the gram of all tokens."""
    gram = stats.held("gram")
    found = drift.solve(gram)
    if whole:
        return stats if found is None else replace(stats, correction=found)
    return replace(stats, cross_gram=gram.clone() if found is None else (found @ gram).add_(gram))
