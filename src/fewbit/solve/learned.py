"""Learned rounding: many weights together, against what comes out of a block or of the whole model.

The problem is AutoRound's (arXiv 2309.05516): which way shall each weight round, and with which scales, so that the output stays? The way is
another. Steps by the sign of a gradient flip thousands of codes that each looked right alone; here every round takes the true gradient at
the quantised weights once, over all batches, and the curvature that the feedback loop already knows, so that for every weight W

    loss(W_hat + D)  ~  loss + <gradient, D> + c / 2 tr(G D H D^T)  =  const + c / 2 |D - step|^2 in the metric of G and H

which is the problem of `solve.sweeps` with other wanted weights: coordinate descent moves codes, scales and shifts, in stored form, to where
the model says the loss is least. A round that does not lower the loss on batches held out is undone and tried with a shorter step.

The loss comes from the caller as a function of the weights: this floor knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import assemble
from fewbit.math.search import Params
from fewbit.num.grid import VectorGrid
from fewbit.num.qtensor import QTensor
from fewbit.solve.candidates import by_row
from fewbit.solve.sweeps import Quadratic, sweep
from fewbit.solve.table import Solved

Weights = dict[str, torch.Tensor]
Loss = Callable[
    [Weights, int], torch.Tensor
]  # (weights by name, number of the batch) -> scalar, differentiable in the weights


@dataclass(frozen=True)
class Schedule:
    """How far to go.

    Attributes:
        rounds: gradients taken; sweeps: passes of coordinate descent on each.
        caution: factor on the curvature at first; it doubles whenever a round is undone and shrinks again after a good one.
        held: one batch in so many judges and is not learned from.
    """

    rounds: int = 4
    sweeps: int = 2
    caution: float = 1.0
    held: int = 8


def learn(
    loss: Loss,
    batches: int,
    start: Mapping[str, QTensor],
    problems: Mapping[str, Quadratic],
    *,
    schedule: Schedule = Schedule(),
    report: Callable[[str], None] | None = None,
) -> dict[str, Solved]:
    """Improve the codes and parameters of several weights together.

    Args:
        loss: sum over the tokens of a batch of what shall be small: squared errors of a block's output, or KL divergence of the logits.
        batches: how many batches there are.
        start: name -> quantised matrix, scalar codes, scales within rows.
        problems: name -> the quadratic that it was solved by (`gptq.Problem.of(...).quadratic`): wanted weights and both grams.
        report: called with a sentence after each round.

    Returns:
        name -> the best found by the batches held out, the start itself if nothing was better; the loss is that of the batches held out.

    Raises:
        InputError: FB-E0703 without batches, FB-E0601 for schemes that sweeps cannot move.
    """
    if batches < 1:
        raise InputError("FB-E0703", "learned rounding needs at least one batch")
    for name, q in start.items():
        if isinstance(q.scheme.grid, VectorGrid) or q.scheme.is_leaf or not by_row(q.scheme):
            raise InputError(
                "FB-E0601", f"learned rounding needs scalar codes with scales within rows, not {q.scheme}", tensor=name
            )
    held = list(range(0, batches, schedule.held)) if batches > 1 else [0]
    train = [k for k in range(batches) if k not in held] or held
    now, caution = dict(start), schedule.caution
    first = best = _total(loss, now, held)
    curvature = None
    for number in range(schedule.rounds):
        total, gradients = _gradients(loss, now, train)
        if curvature is None:
            known = sum(problem.loss(now[name].dequantize()) for name, problem in problems.items())
            curvature = 2 * total / max(known, 1e-30)
        moved = {
            name: _moved(q, problems[name], gradients[name] / (curvature * caution), schedule.sweeps)
            for name, q in now.items()
        }
        after = _total(loss, moved, held)
        if report is not None:
            report(f"round {number + 1}: {best:.6g} -> {after:.6g} on batches held out, caution {caution:g}")
        if after < best:
            now, best, caution = moved, after, max(1.0, caution / 1.5)
        else:
            caution *= 3
    note = f"learned rounding lowered the loss on batches held out from {first:.4g} to {best:.4g}"
    return {name: Solved(q, best, (note,)) for name, q in now.items()}


def _total(loss: Loss, weights: Mapping[str, QTensor], batches: list[int]) -> float:
    values = {name: q.dequantize() for name, q in weights.items()}
    with torch.no_grad():
        return sum(float(loss(values, k)) for k in batches)


def _gradients(loss: Loss, weights: Mapping[str, QTensor], batches: list[int]) -> tuple[float, Weights]:
    """(loss, gradient of each weight), summed over the batches."""
    values = {name: q.dequantize().requires_grad_(True) for name, q in weights.items()}
    total = 0.0
    with torch.enable_grad():
        for k in batches:
            part = loss(values, k)
            part.backward()
            total += float(part.detach())
    return total, {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in values.items()}


def _moved(q: QTensor, problem: Quadratic, gradient: torch.Tensor, sweeps: int) -> QTensor:
    """The weight after coordinate descent on the quadratic whose slope here is `gradient`."""
    step = torch.cholesky_solve(gradient.double().T / problem.unit, torch.linalg.cholesky(problem.gram.double())).T
    if problem.outer is not None:
        step = torch.cholesky_solve(step, torch.linalg.cholesky(problem.outer.double()))
    there = replace(problem, w=(q.dequantize().double() - step).float())
    codes, params, _ = sweep(
        q.scheme, q.codes, Params(q.scale, q.code_shift, q.value_shift), there, sweeps=sweeps, tune=True
    )
    return replace(assemble(q.scheme, q.shape, codes, params), sides=q.sides)
