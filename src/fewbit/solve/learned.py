"""Learned rounding: all weights of a block together, against what comes out of the block.

The problem is AutoRound's (arXiv 2309.05516): which way shall each weight round, and with which ranges, so that the block's output stays?
Solvers before this one look at one layer at a time; here errors may cancel between layers, and what attention and the feed-forward make
of them counts. Gradients move the float numbers beneath codes and parts (`solve.latent`) in steps that shrink to nothing, the loss on
batches held out says which state was best, and a start that nothing beats is given back as it was.

Measured on a block of the sample (dev/LOG.md): 60 steps leave .61 of the feedback loop's error at 2 bits, .79 at 4. Gradients over their usual
size (Adam) do better than their signs; weights that the feedback loop pushed across a border must start close to it.

The loss comes from the caller as a function of the weights: this floor knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import quantize
from fewbit.math.search import Search
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.solve import gptq
from fewbit.solve.latent import Latent, learns
from fewbit.solve.table import Solved, Solver

Weights = dict[str, torch.Tensor]
Loss = Callable[[Weights, int], torch.Tensor]
"""(weights by name, number of the batch) -> scalar, differentiable in the weights."""

HELD = 8  # one batch in so many judges and is not learned from
LOOKS = 8  # how often the batches held out are looked at
DECAY = (0.9, 0.99)  # of the averages of gradients and of their squares


@dataclass(frozen=True)
class Schedule:
    """How far to go.

    Attributes:
        iterations: steps, one batch each.
        rate: all steps together could move a weight by half this many levels.
        ranges: steps of scales and shifts, as a share of their size, over those of weights in levels; 0 leaves them.
        rule: "sign" (of the gradient) or "adam" (gradient over its usual size).
    """

    iterations: int = 200
    rate: float = 2.0
    ranges: float = 0.5
    rule: str = "adam"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.rate <= 0 or self.ranges < 0:
            raise InputError("FB-E0704", "learned rounding takes iterations >= 1, rate > 0 and ranges >= 0")
        if self.rule not in ("sign", "adam"):
            raise InputError("FB-E0704", f"rule is 'sign' or 'adam', not {self.rule!r}")


class Steps:
    """Directions of steps from gradients, per weight and part."""

    def __init__(self, rule: str) -> None:
        self.rule, self.count = rule, 0
        self.sums: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def direction(self, key: tuple[str, str], gradient: torch.Tensor) -> torch.Tensor:
        if self.rule == "sign":
            return gradient.sign_()
        first, second = self.sums.setdefault(key, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        a, b = DECAY
        first.mul_(a).add_(gradient, alpha=1 - a)
        second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        scale = (second / (1 - b**self.count)).sqrt_().add_(torch.finfo(torch.float32).tiny)
        return (first / (1 - a**self.count)).div_(scale)


def learn(
    loss: Loss,
    batches: int,
    start: Mapping[str, QTensor],
    wanted: Mapping[str, torch.Tensor],
    *,
    schedule: Schedule = Schedule(),
    seed: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Solved]:
    """Improve the codes and parts of several weights together.

    Args:
        loss: what shall be small for a batch: squared errors of a block's output, or KL divergence of the logits.
        batches: how many there are.
        start: name -> quantised weight of which `latent.learns` holds. wanted: name -> the float weight, [..., out, in].
        seed: of the order of the batches. check_stop: called before each step; may raise.

    Returns:
        name -> the best state by the batches held out, the start itself if nothing was better; the loss is that of the batches held out.

    Raises:
        InputError: FB-E0703 without batches, FB-E0601 for a weight that cannot be learned.
    """
    if batches < 1:
        raise InputError("FB-E0703", "learned rounding needs at least one batch")
    for name, q in start.items():
        if not learns(q):
            raise InputError(
                "FB-E0601", f"{q.scheme} cannot be learned: it needs scalar codes and a scale", tensor=name
            )
    held = list(range(0, batches, HELD)) if batches > 1 else [0]
    train = [k for k in range(batches) if k not in held] or held
    best = dict(start)
    first = least = _held_loss(loss, {name: q.dequantize() for name, q in start.items()}, held)
    latents = {name: Latent(q, wanted[name]) for name, q in start.items()}
    steps, order = Steps(schedule.rule), _order(train, seed)
    for number in range(1, schedule.iterations + 1):
        check_stop()
        steps.count = number
        size = schedule.rate / schedule.iterations * (1 - (number - 1) / schedule.iterations)
        _step(loss, latents, next(order), steps, size, schedule.ranges)
        if number == schedule.iterations or number % max(1, schedule.iterations // LOOKS) == 0:
            now = _held_loss(loss, {name: latent.values() for name, latent in latents.items()}, held)
            if now < least:
                least, best = now, {name: latent.finish() for name, latent in latents.items()}
    note = f"learned rounding lowered the block's loss on batches held out from {first:.4g} to {least:.4g}"
    return {name: Solved(q, least, (note,)) for name, q in best.items()}


def _order(train: list[int], seed: int) -> Any:
    """Batches without end, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(train), generator=generator).tolist():
            yield train[index]


def _step(loss: Loss, latents: Mapping[str, Latent], batch: int, steps: Steps, size: float, ranges: float) -> None:
    values = {name: latent.values().requires_grad_(True) for name, latent in latents.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(loss(values, batch), list(values.values()), allow_unused=True)
    with torch.no_grad():
        for (name, latent), slope in zip(latents.items(), found, strict=True):
            if slope is not None:  # experts that this batch did not reach stay
                gradients = latent.gradients(slope)
                latent.move({part: steps.direction((name, part), g) for part, g in gradients.items()}, size, ranges)


def _held_loss(loss: Loss, values: Weights, held: list[int]) -> float:
    with torch.no_grad():
        return sum(float(loss(values, k)) for k in held)


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Where learning starts: the feedback loop's answer, or rounding to nearest. The engine calls `together` when a block is complete.

    Raises:
        InputError: as `gptq.solve`; FB-E0704 for an unknown start.
    """
    _schedule(options)
    if options["start"] == "gptq":
        inner = {name: options[name] for name in gptq.SOLVER.options}
        return gptq.solve(w, stats, scheme, seed=seed, options=inner)
    if options["start"] != "rtn":
        raise InputError("FB-E0704", f"start is 'gptq' or 'rtn', not {options['start']!r}")
    importance = None if stats is None else stats.importance
    q = quantize(scheme.weights_only, w.float(), importance, Search(options["search"], options["steps"]))
    return Solved(q, float((w.float() - q.dequantize()).double().square().sum()))


def together(
    loss: Loss,
    batches: int,
    start: Mapping[str, QTensor],
    wanted: Mapping[str, torch.Tensor],
    *,
    seed: int,
    options: Mapping[str, Any],
    check_stop: Callable[[], None],
) -> dict[str, Solved]:
    """`learn` with a solver's options, for those of the weights that can be learned."""
    able = {name: q for name, q in start.items() if learns(q)}
    if not able:
        return {}
    return learn(loss, batches, able, wanted, schedule=_schedule(options), seed=seed, check_stop=check_stop)


def _schedule(options: Mapping[str, Any]) -> Schedule:
    return Schedule(options["iterations"], options["rate"], options["ranges"], options["rule"])


SOLVER = Solver(
    name="learned",
    needs=gptq.SOLVER.needs,
    solve=solve,
    together=together,
    options={
        **gptq.SOLVER.options,
        "drift_samples": 128,
        "start": "gptq",
        "iterations": Schedule.iterations,
        "rate": Schedule.rate,
        "ranges": Schedule.ranges,
        "rule": Schedule.rule,
    },
    summary="learned rounding (AutoRound's problem): a block's weights together by gradients, from the feedback loop's answer",
)
