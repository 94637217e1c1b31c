"""Learned rounding: gradient descent on what every weight rounds to, and on scales and shifts, against the output of a whole block.

The problem is AutoRound's (arXiv 2309.05516); the answer starts where the feedback loop ended instead of at rounding to nearest, so it needs
few steps. Every weight has a latent value that rounds to its code:

    value = (level(latent) - zero) * scale + shift          latent starts inside its level's interval, as near to the wanted weight as that allows

Forward uses the rounded value; backward passes the gradient of the value straight to the latent, and exactly to scale and shift. Latents move
by the sign of their gradient, by a share of the scale that falls to nothing: the unit of travel is a level, whatever the weight's size.
Scales and shifts move by Adam in the same unit. Stored forms are kept all along, so the loss seen is that of the file.

The block's forward and its wanted output come from the caller: this floor knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.rounding import pack_leaf, store, store_scale
from fewbit.math.search import Params
from fewbit.math.stats import Stats
from fewbit.num.blocks import EACH
from fewbit.num.grid import VectorGrid
from fewbit.num.qtensor import QTensor, values_of
from fewbit.num.scheme import Scheme
from fewbit.solve import gptq
from fewbit.solve.candidates import NAMES, by_group, by_row, groups_of
from fewbit.solve.gptq_loop import Rounder
from fewbit.solve.table import Solved, Solver

Weights = dict[str, torch.Tensor]
Forward = Callable[[Weights, int], torch.Tensor]  # (weights by name, number of the batch) -> output of the block


@dataclass(frozen=True)
class Schedule:
    """How far to go.

    Attributes:
        steps: gradient steps; check: steps between looks at the loss on the held batches.
        travel: how far a latent may move in all, in levels; tune: how far scales and shifts may, as a share of the scale.
    """

    steps: int = 60
    check: int = 10
    travel: float = 0.3
    tune: float = 0.02

    def rate(self, step: int) -> float:
        """Share of the travel left for this step: falls linearly, sums to one."""
        return 2 * (self.steps - step) / (self.steps * (self.steps + 1))


def learn(
    forward: Forward,
    wanted: Callable[[int], torch.Tensor],
    batches: int,
    start: Mapping[str, QTensor],
    latent: Mapping[str, torch.Tensor],
    *,
    metric: torch.Tensor | None = None,
    schedule: Schedule = Schedule(),
    seed: int = 0,
) -> dict[str, Solved]:
    """Improve the codes and parameters of the weights of one block together.

    Args:
        forward: the block's output from these weights and the inputs of a batch, differentiable in the weights.
        wanted: the output wished for a batch (that of the float model).
        batches: how many batches there are; one step uses one, in an order drawn from `seed`, one in eight is held out for judging.
        start: name -> quantised weight [rows, cols], scalar grid.
        latent: name -> float32 weight that the codes stand for ideally (the float weight, or the loop's drift-corrected one).
        metric: float32 [outputs, outputs]: gram of the loss gradients at the block's output; errors are weighed by it.

    Returns:
        name -> the best found by the held batches, the start itself if nothing was better. The loss is that of the block.
    """
    if batches < 1:
        raise InputError("FB-E0703", "learned rounding needs at least one batch")
    weights = {name: _Latent(q, latent[name]) for name, q in start.items()}
    root = None if metric is None else _root(metric)
    held = list(range(0, batches, 8)) if batches > 1 else [0]
    train = [k for k in range(batches) if k not in held] or held
    order = torch.randint(len(train), (schedule.steps,), generator=torch.Generator().manual_seed(seed)).tolist()

    def judge() -> float:
        with torch.no_grad():
            values = {name: weight.value() for name, weight in weights.items()}
            return sum(float(_error(forward(values, k), wanted(k), root)) for k in held)

    best, kept = judge(), dict(start)
    first = best
    for step in range(schedule.steps):
        batch = train[order[step]]
        values = {name: weight.value() for name, weight in weights.items()}
        loss = _error(forward(values, batch), wanted(batch), root)
        loss.backward()
        for weight in weights.values():
            weight.step(schedule, step)
        if (step + 1) % schedule.check == 0 or step + 1 == schedule.steps:
            now = judge()
            if now < best:
                best, kept = now, {name: weight.quantised() for name, weight in weights.items()}
    note = f"learned rounding lowered the block's error from {first:.4g} to {best:.4g} on batches held out"
    return {name: Solved(q, best, (note,)) for name, q in kept.items()}


def _error(found: torch.Tensor, wanted: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    miss = (found - wanted).flatten(0, -2)
    return (miss if root is None else miss @ root).square().sum()


def _root(metric: torch.Tensor, damping: float = 0.05) -> torch.Tensor:
    """V with V V^T = metric plus a little damping, scaled to mean diagonal one."""
    matrix = metric.double() / metric.double().diagonal().mean()
    matrix = (matrix + matrix.T) / 2 + damping * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()).float()


class _Latent:
    """A weight being learned: latent values, and the latent scale and shift of every group."""

    def __init__(self, q: QTensor, wanted: torch.Tensor) -> None:
        scheme = q.scheme
        if isinstance(scheme.grid, VectorGrid) or scheme.is_leaf or not by_row(scheme):
            raise InputError("FB-E0601", f"learned rounding needs scalar codes with scales within rows, not {scheme}")
        self.q, self.scheme, self.shape = q, scheme, tuple(q.shape)
        self.rounder = Rounder.of(scheme.grid)
        self.gid = groups_of(scheme, self.shape)[1].long()
        params = Params(q.scale, q.code_shift, q.value_shift)
        parts = {name: by_group(scheme, name, getattr(params, name), self.shape) for name, _ in scheme.parts()}
        self.scale, self.shift = (parts[name].clone() if name in parts else None for name in ("scale", "value_shift"))
        self.zero = parts.get("code_shift", torch.zeros(()))
        self.unit = (torch.ones(1, 1) if self.scale is None else self.scale.abs())[:, self.gid].contiguous()
        low, high = self._interval(q)
        self.latent = torch.minimum(torch.maximum(wanted.float(), low), high).requires_grad_(True)
        for part in (self.scale, self.shift):
            if part is not None:
                part.requires_grad_(True)
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(scale, zero, shift) per weight, scale and shift as storage would hold them, with straight-through gradients."""
        scale = torch.ones(()) if self.scale is None else self._through("scale", self.scale)[:, self.gid]
        shift = torch.zeros(()) if self.shift is None else self._through("value_shift", self.shift)[:, self.gid]
        return scale, self.zero if self.zero.ndim == 0 else self.zero[:, self.gid], shift

    def _through(self, name: str, latent: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            stored = by_group(
                self.scheme, name, represent(self.scheme, name, getattr(self.q, name), latent), self.shape
            )
        return latent + (stored - latent).detach()

    def _levels(
        self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(index, level) nearest to x."""
        u = torch.where(scale == 0, zero, (x - shift) / torch.where(scale == 0, 1, scale) + zero)
        if self.rounder.uniform:
            level = u.round().clamp(self.rounder.low, self.rounder.high)
            return level, level
        index = torch.bucketize(u, self.rounder.edges)
        return index, self.rounder.levels[index]

    def _interval(self, q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest latent that surely round to the present codes: 45 % of the way to the level beside, both sides."""
        value = q.dequantize()
        with torch.no_grad():
            reach = 0.45 * self.unit * self._gap(value)
        return value - reach, value + reach

    def _gap(self, value: torch.Tensor) -> torch.Tensor:
        """Distance in levels from each code's level to the nearer one beside it."""
        if self.rounder.uniform:
            return torch.ones(())
        scale, zero, shift = (part.detach() for part in self._numbers())
        index, _ = self._levels(value, scale, zero, shift)
        steps = self.rounder.levels.diff()
        infinite = torch.full((1,), float("inf"))
        return torch.minimum(torch.cat([infinite, steps])[index], torch.cat([steps, infinite])[index])

    def value(self) -> torch.Tensor:
        """The rounded weight, differentiable in latent, scale and shift."""
        scale, zero, shift = self._numbers()
        with torch.no_grad():
            _, level = self._levels(self.latent, scale, zero, shift)
        return (level - zero) * scale + shift + (self.latent - self.latent.detach())

    def step(self, schedule: Schedule, step: int) -> None:
        """One step along the gradients, which are cleared."""
        rate = schedule.rate(step)
        with torch.no_grad():
            self.latent -= rate * schedule.travel * self.unit * self.latent.grad.sign()
            self.latent.grad = None
            for k, part in enumerate((self.scale, self.shift)):
                if part is not None:
                    unit = self.scale.abs() if self.scale is not None else torch.ones_like(part)
                    part -= rate * schedule.tune * unit * self._direction(k, part.grad, step)
                    part.grad = None

    def _direction(self, k: int, gradient: torch.Tensor, step: int) -> torch.Tensor:
        """Adam's direction, about one in size."""
        first, second = self.moments.get(k, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
        self.moments[k] = (first, second)
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.99 ** (step + 1))
        return corrected[0] / corrected[1].sqrt().clamp(min=1e-30)

    def quantised(self) -> QTensor:
        """The present state in stored form."""
        with torch.no_grad():
            parts: dict[str, Any] = {}
            for name, latent in (("scale", self.scale), ("value_shift", self.shift)):
                if latent is not None:
                    parts[name] = represent(self.scheme, name, getattr(self.q, name), latent)
            index, _ = self._levels(self.latent, *self._numbers())
            return replace(self.q, codes=self.rounder.final_codes(index).reshape(self.q.codes.shape), **parts)


def represent(
    scheme: Scheme, name: str, stored: torch.Tensor | QTensor, values: torch.Tensor
) -> torch.Tensor | QTensor:
    """Values per group [rows, groups] in the form in which `stored` holds them: leaves rounded, quantised ones by their nearest codes
    under the outer scale they have."""
    part: Scheme = getattr(scheme, name)
    if not isinstance(stored, QTensor):
        if part.blocks != EACH:
            return stored
        rounded = store_scale(part.grid, values) if name == "scale" else store(part.grid, values)
        return pack_leaf(part.grid, rounded.reshape(stored.shape))
    shape = tuple(stored.shape)
    outer = [getattr(stored, inner) for inner in NAMES]
    parts = [None if s is None else by_group(part, inner, s, shape) for inner, s in zip(NAMES, outer, strict=True)]
    gid = groups_of(part, shape)[1].long()
    s, z, v = (
        torch.full((), default) if p is None else p[:, gid] for p, default in zip(parts, (1.0, 0.0, 0.0), strict=True)
    )
    rounder = Rounder.of(part.grid)
    u = torch.where(s == 0, z, (values.reshape(shape) - v) / torch.where(s == 0, 1, s) + z)
    index = u.round().clamp(rounder.low, rounder.high) if rounder.uniform else torch.bucketize(u, rounder.edges)
    return replace(stored, codes=rounder.final_codes(index))


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """The feedback loop's answer, then learned rounding of this one matrix against its own outputs (the quadratic of the loop)."""
    gptq_options = {name: options[name] for name in gptq.SOLVER.options}
    found = gptq.solve(w, stats, scheme, seed=seed, options=gptq_options)
    if (
        w.ndim != 2
        or found.q.scheme.is_leaf
        or not by_row(found.q.scheme)
        or isinstance(found.q.scheme.grid, VectorGrid)
    ):
        return replace(
            found,
            notes=(*found.notes, "no learned rounding: it needs a matrix with scalar codes and scales within rows"),
        )
    try:
        problem = gptq.Problem.of(w.float(), stats, gptq_options)
    except InputError as error:
        if error.code != "FB-E0705":
            raise
        return found
    quadratic = problem.quadratic
    inner, outer = _root(quadratic.gram, 0.0), None if quadratic.outer is None else quadratic.outer
    schedule = Schedule(options["learning_steps"], 10, options["travel"], options["tuning"])
    learned = learn(
        lambda weights, _: ((weights["w"] - quadratic.w) @ inner).T,
        lambda _: torch.zeros(()),
        1,
        {"w": found.q},
        {"w": quadratic.w},
        metric=outer,
        schedule=schedule,
        seed=seed,
    )["w"]
    loss = quadratic.loss(learned.q.dequantize())
    return Solved(learned.q, loss, found.notes) if loss < found.loss else found


SOLVER = Solver(
    name="learned",
    needs=gptq.SOLVER.needs,
    solve=solve,
    options={**gptq.SOLVER.options, "learning_steps": 60, "travel": 0.3, "tuning": 0.02},
    summary="error feedback, then rounding, scales and shifts learned by gradient against the layer's (or block's) output",
)

__all__ = ["SOLVER", "Schedule", "learn", "represent", "values_of"]
