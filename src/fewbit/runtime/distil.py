"""A small training loop: a student follows its teacher's distributions, and the curve is kept.

The loss is KL(teacher || student) over next tokens, to which a share of the usual cross entropy can be added; without a teacher it is cross entropy alone.
Nothing here knows of quantisation: it serves models that `runtime.qat` prepared and models with adapters alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbit.base.errors import InputError

Evaluate = Callable[[nn.Module], dict[str, float]]
SPREAD = 1_000_003  # between the random numbers of one seed's steps and the next seed's
PIECE = 1 << 19  # logits that are looked at together: two megabytes stay in a core's cache


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: updates. batch: windows in each.
        lr: peak learning rate of groups that state none; warmup: share of the steps that it takes to get there, then a cosine to `floor` of it.
        temperature: of the teacher's and student's distributions. labels: weight of the cross entropy beside the distillation, 0 to 1.
        clip: largest norm of the gradient.
        every: steps between evaluations. seed: of the order of the windows.
        compute: dtype of the matrix products; weights, their gradients and the loss stay float32. bfloat16 takes half the time where processors multiply it.
        noise: in every second window, the share of tokens that give way to random ones of the text. The teacher answers them like any other, so a short
            text offers new contexts each time it comes round, and is learnt by heart later.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    warmup: float = 0.05
    floor: float = 0.05
    temperature: float = 1.0
    labels: float = 0.0
    clip: float = 1.0
    every: int = 50
    seed: int = 0
    compute: str = "float32"
    noise: float = 0.0

    def __post_init__(self) -> None:
        positive = self.steps > 0 and self.batch > 0 and self.temperature > 0 and self.clip > 0 and self.every > 0
        shares = 0 <= self.labels <= 1 and 0 <= self.warmup < 1 and 0 <= self.floor <= 1 and 0 <= self.noise < 1
        if not positive or not shares:
            raise InputError("FB-E0916", f"steps, batch, clip and the like are positive, shares below 1: got {self}")
        if self.compute not in ("float32", "bfloat16"):
            raise InputError("FB-E0916", f"products are computed in float32 or bfloat16, got {self.compute!r}")

    def share(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        along = (step - rise) / max(1, self.steps - rise)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * along)) / 2


@dataclass(frozen=True)
class Point:
    """One point of a curve: after `step` updates; mean loss since the last point; what the evaluation said; seconds of training so far."""

    step: int
    loss: float
    seconds: float
    measures: dict[str, float]

    def record(self) -> dict[str, Any]:
        loss = None if math.isnan(self.loss) else self.loss  # before the first step there is none
        return {"step": self.step, "loss": loss, "seconds": round(self.seconds, 2), **self.measures}


@dataclass(frozen=True)
class State:
    """Where a training run stands after `step` updates: what it takes to go on to the very same numbers.

    Attributes:
        tensors: of every parameter that learns its value (`value:NAME`) and the optimiser's averages (`exp_avg:NAME` …).
        losses: since the last point of the curve. points: the curve so far. seconds: of training so far.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    losses: tuple[float, ...]
    points: tuple[Point, ...]
    seconds: float


AfterStep = Callable[[int, float, Callable[[], State]], None]
"""Called after each update with the steps done, the loss, and what takes the state; an exception that it raises ends the run."""


def train(
    student: nn.Module,
    tokens: torch.Tensor,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    groups: list[dict[str, Any]] | None = None,
    evaluate: Evaluate | None = None,
    on_point: Callable[[Point], None] | None = None,
    state: State | None = None,
    after_step: AfterStep | None = None,
) -> list[Point]:
    """Trains what of the student learns.

    Args:
        student, teacher: causal models: tokens -> .logits.
        tokens: int64 [windows, length].
        groups: of the optimiser, each with its peak `lr`; None for everything that learns at `schedule.lr`.
        evaluate: called before the first step, every `schedule.every` steps and after the last, in evaluation mode without gradients.
        state: of an earlier run with the same arguments, to go on from; both together end as one run would have, bit for bit on one machine.
        after_step: sees every step, and may keep the state.

    Returns:
        The curve, its first point before any update.

    Raises:
        InputError: FB-E0916 when nothing learns, there are too few windows, or the loss is not finite.
    """
    run = _Run(student, tokens, schedule, groups)
    curve = _Curve(student, evaluate, on_point)
    if state is None:
        curve.add(0, float("nan"))
    else:
        run.put_back(state)
        curve.go_on(state)
    student.train()
    while run.step < schedule.steps:
        loss = run.update(teacher)
        if run.step % schedule.every == 0 or run.step == schedule.steps:
            curve.add(run.step, sum(run.losses) / len(run.losses))
            run.losses.clear()
        if after_step is not None:
            after_step(run.step, loss, lambda: run.state(curve))
    student.eval()
    return curve.points


class _Run:
    """What a step needs and changes. Random numbers depend on the seed and the step alone, so a run can begin at any step."""

    def __init__(
        self, student: nn.Module, tokens: torch.Tensor, schedule: Schedule, groups: list[dict[str, Any]] | None
    ) -> None:
        self.student, self.tokens, self.schedule = student, tokens, schedule
        self.params = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if not self.params or tokens.ndim != 2 or tokens.shape[0] < schedule.batch:
            what = f"{len(self.params)} parameters learn from {tuple(tokens.shape)} tokens, {schedule.batch} at a time"
            raise InputError("FB-E0916", what)
        groups = [dict(g) for g in groups or [{"params": list(self.params.values()), "lr": schedule.lr}]]
        self.peaks = [group.get("lr", schedule.lr) for group in groups]
        self.optimiser = torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
        self.order = batches(tokens.shape[0], schedule.batch, schedule.seed)
        self.step = 0
        self.losses: list[float] = []

    def update(self, teacher: nn.Module | None) -> float:
        """One step. -> its loss."""
        schedule, device = self.schedule, next(iter(self.params.values())).device
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * schedule.share(self.step)
        seed = schedule.seed * SPREAD + self.step
        noise = torch.Generator().manual_seed(seed)
        batch = disturbed(self.tokens[next(self.order)], self.tokens, schedule.noise, noise).to(device)
        bfloat16 = schedule.compute == "bfloat16"
        with _seeded(seed, device), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(self.student, teacher, batch, schedule)
        loss.backward()
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise InputError("FB-E0916", f"the loss is {self.losses[-1]} at step {self.step}: lower the learning rate")
        torch.nn.utils.clip_grad_norm_(self.params.values(), schedule.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return self.losses[-1]

    def state(self, curve: _Curve) -> State:
        """The present state. Its tensors are the run's own: write them before the next step."""
        tensors = {f"value:{name}": param.detach() for name, param in self.params.items()}
        for name, param in self.params.items():
            tensors |= {f"{key}:{name}": value for key, value in self.optimiser.state[param].items()}
        return State(self.step, tensors, tuple(self.losses), tuple(curve.points), curve.seconds())

    @torch.no_grad()
    def put_back(self, state: State) -> None:
        """Goes to where `state` was taken.

        Raises:
            InputError: FB-E0919 when it is of other parameters.
        """
        shapes = {name: param.shape for name, param in self.params.items()}
        found = {key.partition(":")[2]: t.shape for key, t in state.tensors.items() if key.startswith("value:")}
        if shapes != found:
            differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise InputError("FB-E0919", "the state is of other parameters", tensor=differing[0])
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition(":")
            param = self.params[name]
            if kind == "value":
                param.copy_(tensor)
            else:
                self.optimiser.state[param][kind] = tensor.to(param.device)
        self.step, self.losses = state.step, list(state.losses)
        for _ in range(state.step):
            next(self.order)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What a model draws in here (dropout) follows from the seed; the process's own random numbers are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Curve:
    """Points as they come; evaluation does not count as training time."""

    def __init__(self, student: nn.Module, evaluate: Evaluate | None, on_point: Callable[[Point], None] | None) -> None:
        self.student, self.evaluate, self.on_point = student, evaluate, on_point
        self.points: list[Point] = []
        self.started, self.paused = time.monotonic(), 0.0

    def seconds(self) -> float:
        """Of training so far."""
        return time.monotonic() - self.started - self.paused

    def go_on(self, state: State) -> None:
        """Takes over an earlier run's points and time."""
        self.points, self.paused = list(state.points), self.paused - state.seconds

    def add(self, step: int, loss: float) -> None:
        at = time.monotonic()
        measures: dict[str, float] = {}
        if self.evaluate is not None:
            training = self.student.training
            self.student.eval()
            with torch.no_grad():
                measures = self.evaluate(self.student)
            self.student.train(training)
        self.points.append(Point(step, loss, at - self.started - self.paused, measures))
        self.paused += time.monotonic() - at
        if self.on_point is not None:
            self.on_point(self.points[-1])


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Index batches without end; every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while left.numel() < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def disturbed(batch: torch.Tensor, text: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """A batch [windows, length] in whose every second window a share of the tokens are random ones of the text [windows, length], as frequent as there."""
    if not share:
        return batch
    some = batch[1::2]
    other = text.flatten()[torch.randint(text.numel(), some.shape, generator=generator)]
    out = batch.clone()
    out[1::2] = torch.where(torch.rand(some.shape, generator=generator) < share, other, some)
    return out


def loss_of(student: nn.Module, teacher: nn.Module | None, tokens: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Mean loss per position of a batch [windows, length], in nats (times the square of the temperature, which keeps gradients alike)."""
    logits = student(tokens, use_cache=False).logits.float()
    labels = schedule.labels if teacher is not None else 1.0
    loss = logits.new_zeros(())
    if labels:
        loss = loss + labels * nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if teacher is not None and labels < 1:
        with torch.no_grad():
            wanted = teacher(tokens, use_cache=False).logits.float()
        kl = divergence(logits.flatten(0, 1), wanted.flatten(0, 1), schedule.temperature)
        loss = loss + (1 - labels) * schedule.temperature**2 * kl
    return loss


class _Divergence(torch.autograd.Function):
    """Mean KL between two softmaxes and, found on the same way, its gradient softmax(q) - p: no distribution is kept whole."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
        rows = max(1, PIECE // max(1, logits.shape[-1]))
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros(())
        for i in range(0, logits.shape[0], rows):
            q, p = (torch.log_softmax(x[i : i + rows] / temperature, -1) for x in (logits, wanted))
            share = p.exp()
            total += torch.dot(share.flatten(), p.sub_(q).flatten())
            if slope is not None:
                torch.sub(q.exp_(), share, out=slope[i : i + rows])
        ctx.save_for_backward(slope)
        ctx.scale = 1 / (logits.shape[0] * temperature)
        return total / logits.shape[0]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * (g * ctx.scale), None, None


def divergence(logits: torch.Tensor, wanted: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over positions of KL(softmax(wanted / t) || softmax(logits / t)), in nats; differentiable once, in `logits`.

    Args:
        logits, wanted: float32 [positions, vocabulary].
    """
    return _Divergence.apply(logits, wanted, temperature)


@torch.no_grad()
def fidelity(model: nn.Module, base: nn.Module, windows: Iterable[torch.Tensor]) -> dict[str, float]:
    """Mean KL(base || model) and mean losses over batches of windows [n, length], in nats per position."""
    totals = torch.zeros(4, dtype=torch.float64)
    for tokens in windows:
        p, q = (net(tokens, use_cache=False).logits[:, :-1].float().flatten(0, 1) for net in (base, model))
        right = tokens[:, 1:].flatten()
        kl = divergence(q, p) * len(right)
        losses = (nn.functional.cross_entropy(x, right, reduction="sum") for x in (q, p))
        totals += torch.stack([kl, *losses, torch.tensor(float(len(right)))]).double().cpu()
    kl, nll, base_nll, count = totals.tolist()
    return {"kl": kl / count, "nll": nll / count, "base_nll": base_nll / count}
