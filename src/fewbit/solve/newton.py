"""Weights of a block moved together, by the slope of the block's loss and the curvature that each weight has anyway.

The feedback loop settles one weight after the other, against a quadratic of its own. Once all are settled, the slope of the loss of the block
as a whole says what they leave undone together: errors that attention and the feed-forward make large, or that other weights could cancel. With the
grams of inputs H and of loss gradients G as curvature (K-FAC, arXiv 1503.05671) the step towards the best is closed, and rounding to it is the
coordinate descent that there is already:

    direction  d = - (G + damping)^-1 slope (H + damping)^-1        for every weight
    length     a = where the parabola through the loss at 0, its slope and the loss at d has its minimum: all weights move at once
    codes      sweeps over tr(G (v - w) H (v - w)^T) from the present ones, w = v + a d

Rounds repeat this until the loss does not fall. What stands at the end is what had the least loss on the batches held out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from fewbit.base.errors import InputError
from fewbit.math.linalg import damped
from fewbit.math.search import Params
from fewbit.math.stats import Stats
from fewbit.num.grid import VectorGrid
from fewbit.num.qtensor import QTensor
from fewbit.solve.candidates import by_row
from fewbit.solve.sweeps import Quadratic, sweep

Weights = dict[str, torch.Tensor]
Loss = Callable[[Weights, int], torch.Tensor]


@dataclass(frozen=True)
class Curvature:
    """How the loss bends in one weight: tr(G E H E^T).

    Attributes:
        gram: float32 [cols, cols], outer: float32 [rows, rows]; damped, of mean diagonal about one.
        unit: what a loss of one by them stands for, in a unit that all weights share.
    """

    gram: torch.Tensor
    outer: torch.Tensor
    unit: float

    @classmethod
    def of(cls, stats: Stats, damping: float, outer_damping: float) -> Curvature:
        """From statistics.

        Raises:
            InputError: FB-E0705 when a gram is not finite or nothing but zero.
        """
        gram, level = _scaled(stats.gram, damping)
        outer, outer_level = _scaled(stats.out_gram, outer_damping)
        return cls(gram, outer, level * outer_level / max(1, stats.count))

    def step(self, slope: torch.Tensor) -> torch.Tensor:
        """- G^-1 slope H^-1, float32 [rows, cols]."""
        found = torch.cholesky_solve(slope.double().T, torch.linalg.cholesky(self.gram.double())).T
        found = torch.cholesky_solve(found, torch.linalg.cholesky(self.outer.double()))
        return (found / -self.unit).float()


def _scaled(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """(damped gram of mean diagonal one, the mean diagonal that it had)."""
    out, dead = damped((gram + gram.T).double() / 2, damping)
    out.diagonal()[dead] = out.diagonal()[~dead].mean()
    level = float(out.diagonal().mean())
    return (out / level).float(), level


def moves(q: QTensor) -> bool:
    """Whether a weight can be moved: a matrix with scalar codes and a scale."""
    return q.codes.dim() == 2 and not isinstance(q.scheme.grid, VectorGrid) and not q.scheme.is_leaf


def refine(
    loss: Loss,
    train: list[int],
    start: Mapping[str, QTensor],
    curvature: Mapping[str, Curvature],
    *,
    rounds: int,
    sweeps: int,
    tune: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, QTensor]:
    """Up to `rounds` rounds of this module's text for the weights that have a curvature.

    Args:
        loss: of a batch, differentiable in the weights; train: numbers of the batches.
        start: name -> quantised weight. sweeps, tune: as for `solve.sweeps.sweep`.
    """
    present, share = dict(start), 1.0
    values = {name: q.dequantize() for name, q in present.items()}
    mine = [name for name in start if name in curvature]
    before, slopes = _slopes(loss, train, values, mine, check_stop)
    for number in range(rounds):
        directions = {name: curvature[name].step(slope) for name, slope in slopes.items()}
        length = share * _length(loss, train, values, directions, slopes, before, check_stop)
        if length <= 0:
            break
        trial = dict(present)
        for name, direction in directions.items():
            trial[name] = _rounded(present[name], values[name] + length * direction, curvature[name], sweeps, tune)
        moved = {name: q.dequantize() for name, q in trial.items()}
        last = number + 1 == rounds
        now, found = _slopes(loss, train, moved, [] if last else mine, check_stop)
        if now < before:
            present, values, before, slopes = trial, moved, now, found
        elif share < 0.3:
            break
        else:
            share /= 2
    return present


def _slopes(
    loss: Loss, train: list[int], values: Weights, names: list[str], check_stop: Callable[[], None]
) -> tuple[float, Weights]:
    """(loss, its gradients in the named weights), summed over the batches."""
    held = {name: value.detach().requires_grad_(name in names) for name, value in values.items()}
    total, slopes = 0.0, {name: torch.zeros_like(held[name]) for name in names}
    for batch in train:
        check_stop()
        with torch.set_grad_enabled(bool(names)):
            one = loss(held, batch)
        total += float(one.detach())
        if names:
            for name, slope in zip(
                names, torch.autograd.grad(one, [held[n] for n in names], allow_unused=True), strict=True
            ):
                if slope is not None:
                    slopes[name] += slope
    return total, slopes


def _length(
    loss: Loss,
    train: list[int],
    values: Weights,
    directions: Weights,
    slopes: Weights,
    before: float,
    check_stop: Callable[[], None],
) -> float:
    """Where along the directions the loss is least, by a parabola; 0 when they lead nowhere. Scales the directions' common unit away."""
    falls = sum(float((slopes[name].double() * d.double()).sum()) for name, d in directions.items())
    if not falls < 0:
        return 0.0
    # the statistics' units are unknown here, so a first length is one at which the slope alone would take half the loss
    first = before / (2 * -falls)
    moved = {name: value + first * directions[name] if name in directions else value for name, value in values.items()}
    after, _ = _slopes(loss, train, moved, [], check_stop)
    bend = (after - before - first * falls) / first**2
    return min(-falls / (2 * bend), 4 * first) if bend > 0 else first


def _rounded(q: QTensor, wanted: torch.Tensor, curvature: Curvature, sweeps: int, tune: bool) -> QTensor:
    """Coordinate descent towards the wanted weights from the codes that there are."""
    scheme = q.scheme.weights_only
    params = Params(q.scale, q.code_shift, q.value_shift)
    quadratic = Quadratic(wanted, curvature.gram, curvature.outer)
    codes, found, _ = sweep(scheme, q.codes, params, quadratic, sweeps=sweeps, tune=tune and by_row(scheme))
    return replace(q, codes=codes, scale=found.scale, code_shift=found.code_shift, value_shift=found.value_shift)


def curvatures(stats: Mapping[str, Stats], damping: float, outer_damping: float) -> dict[str, Curvature]:
    """Name -> curvature, for all weights whose statistics give one."""
    found = {}
    for name, one in stats.items():
        if one.gram is None or one.out_gram is None:
            continue
        with contextlib.suppress(InputError, torch.linalg.LinAlgError):  # nothing flowed through it: it stays as it is
            found[name] = Curvature.of(one, damping, outer_damping)
    return found
