"""Where a candidate's loss arises: per tensor and per block.

    weights   SQNR of every tensor that differs from the base's
    blocks    two streams side by side: the candidate's block on the base's inputs (its own error), and on its own (the drift so far)
    share     what each tensor adds to the final KL, by integrated gradients along w(s) = base + s (candidate - base):

                  KL(1) - KL(0) = integral over s of  dKL/dw(s) . (candidate - base)

              The integral is a sum over tensors, so the shares add up to the KL itself: no one-at-a-time runs, interactions included.
              Three points of Simpson's rule (the first is zero, as KL has its minimum there) are exact while KL is cubic in s.

The gradient goes backward block by block through stored block inputs, so one block is in memory at a time here too. Where a rewrite
moved weights (folded scales, rotations) tensors differ without loss: then neither SQNR nor shares mean anything, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.eval.room import GRADIENT_TOKENS
from fewbit.eval.stream import ActivationQuantiser, Runner, States, rows_of
from fewbit.eval.windows import Windows
from fewbit.math.metrics import sqnr_db
from fewbit.run.acts import ActStore
from fewbit.run.hf import Params

SIMPSON = ((0.5, 4 / 6), (1.0, 1 / 6))  # (s, weight); s = 0 weighs 1/6 and adds nothing
REWRITTEN = 0.02  # relative change of a norm or bias from which weights are taken to be rewritten


@dataclass(frozen=True)
class TensorLoss:
    """One tensor: how it is stored, its SQNR in dB (None where equal), its share of the final KL in nats (None where not computed)."""

    name: str
    block: int | None
    kind: str
    stored: str
    weights: int
    sqnr_db: float | None
    share: float | None


@dataclass(frozen=True)
class BlockLoss:
    """One block: relative error of its output on the base's inputs, and of the hidden states after it in the candidate's own stream."""

    index: int
    own: float
    drift: float


@dataclass(frozen=True)
class LayerReport:
    """Attributes: tensors and blocks in order; kl: of the tokens looked at; explained: sum of the shares; notes: sentences."""

    tensors: tuple[TensorLoss, ...]
    blocks: tuple[BlockLoss, ...]
    kl: float
    explained: float
    notes: tuple[str, ...]


def layer_report(
    base: Runner, candidate: Runner, chosen: Windows, gradients: bool = True, say: Callable[[str], None] | None = None
) -> LayerReport:
    """Looks at a candidate layer by layer.

    Args:
        base, candidate: of one architecture. chosen: few windows are enough (2,048 tokens give shares to some per cent).
        gradients: compute shares too: two forward and backward passes.
    """
    tell = say or (lambda _line: None)
    tell("layers: errors of blocks")
    blocks = _blocks(base, candidate, chosen.tokens)
    shares: dict[str, float] = {}
    kl, notes = 0.0, []
    if gradients:
        tell("layers: shares of the loss")
        work = _Shares(base, candidate, chosen)
        shares, kl = work.run()
        if any(candidate.activation_schemes(index) for index in range(len(candidate.model))):
            notes.append("shares are of the weights alone: quantised activations are left out of them")
    tell("layers: errors of weights")
    tensors = _tensors(base, candidate, shares)
    if _rewritten(base, candidate):
        notes.append(
            "norms differ from the base's: weights were rewritten (folded or rotated), so SQNR and shares do not measure loss"
        )
    return LayerReport(tuple(tensors), tuple(blocks), kl, sum(shares.values()), tuple(notes))


def _blocks(base: Runner, candidate: Runner, tokens: torch.Tensor) -> list[BlockLoss]:
    """Both streams, one block at a time: the base's, the candidate's, and the candidate's block on the base's inputs."""
    true, kwargs = base.enter(tokens)
    drifted, own_kwargs = candidate.enter(tokens)
    whole = min(true.batch, true.shape[0])
    found = []
    try:
        for index in range(len(base.model)):
            weights, other = (
                base.model.load_block(index, base.source.read),
                candidate.model.load_block(index, candidate.source.read),
            )
            signal = own = drift = 0.0
            schemes = candidate.activation_schemes(index)
            for batch in range(len(true)):
                hidden, moved = true.get(batch).to(base.model.device), drifted.get(batch).to(base.model.device)
                arguments = base.model.arguments(kwargs[index], whole, hidden.shape[0])
                with torch.no_grad():
                    exact = base.model.run_block(index, weights, hidden, arguments)
                    with ActivationQuantiser(schemes, other):
                        alone = candidate.model.run_block(index, other, hidden, arguments)
                        after = candidate.model.run_block(
                            index, other, moved, candidate.model.arguments(own_kwargs[index], whole, moved.shape[0])
                        )
                signal += _square(exact)
                own += _square(alone - exact)
                drift += _square(after - exact)
                true.put(batch, exact)
                drifted.put(batch, after)
            found.append(BlockLoss(index, (own / max(signal, 1e-300)) ** 0.5, (drift / max(signal, 1e-300)) ** 0.5))
    finally:
        true.close()
        drifted.close()
    return found


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _tensors(base: Runner, candidate: Runner, shares: dict[str, float]) -> list[TensorLoss]:
    """Every tensor of two or more dimensions, and every other one that differs."""
    place = {slot.name: index for index in range(len(base.model)) for slot in base.model.block_slots(index)}
    found = []
    for name in base.model.slots:
        w, w_hat = base.source.read(name).float(), candidate.source.read(name).float()
        same = torch.equal(w, w_hat)
        if w.dim() < 2 and same:
            continue
        kind = name.removesuffix(".weight").rpartition(".")[2]
        found.append(
            TensorLoss(
                name,
                place.get(name),
                kind,
                stored_as(candidate, name),
                w.numel(),
                None if same else sqnr_db(w, w_hat),
                shares.get(name),
            )
        )
    return found


def stored_as(runner: Runner, name: str) -> str:
    """How a candidate stores a tensor: a scheme, a GGML type, or a dtype."""
    stored = runner.source.stored.get(name)
    if stored is not None:
        return str(stored.scheme)
    kind = getattr(runner.source, "kind", None)
    return kind(name) if kind is not None else runner.source.manifest[name].dtype


def _rewritten(base: Runner, candidate: Runner) -> bool:
    """Whether one-dimensional tensors changed by more than rounding."""
    for name in base.model.slots:
        if len(base.source.manifest[name].shape) == 1:
            w, w_hat = base.source.read(name).float(), candidate.source.read(name).float()
            if float((w - w_hat).norm()) > REWRITTEN * float(w.norm()) + 1e-12:
                return True
    return False


class _Shares:
    """Integrated gradients of the KL; hidden states of every block's input are kept, one block's graph is alive at a time."""

    def __init__(self, base: Runner, candidate: Runner, chosen: Windows) -> None:
        self.base, self.candidate, self.chosen = base, candidate, chosen
        self.shares: dict[str, float] = dict.fromkeys(base.model.slots, 0.0)
        self.kl = 0.0
        self.count = int(chosen.scored.sum())

    def run(self) -> tuple[dict[str, float], float]:
        tokens = self.chosen.tokens
        batch = max(1, GRADIENT_TOKENS // tokens.shape[1])
        for start in range(0, tokens.shape[0], batch):
            part = slice(start, start + batch)
            target = self.base.hidden(tokens[part])
            for s, weight in SIMPSON:
                self._walk(tokens[part], self.chosen.scored[part], target, s, weight)
            target.close()
        return {name: value for name, value in self.shares.items() if value != 0.0}, self.kl

    def _mixed(self, base: Params, other: Params, s: float) -> Params:
        return {name: (value + s * (other[name] - value)).requires_grad_(True) for name, value in base.items()}

    def _walk(self, tokens: torch.Tensor, scored: torch.Tensor, target: ActStore, s: float, weight: float) -> None:
        """Forward through all blocks at w(s), then backward, for a batch of windows."""
        model = self.base.model
        with torch.no_grad():
            entry, moved = (
                model.enter(self.base.trunk, tokens),
                self.candidate.model.enter(self.candidate.trunk, tokens),
            )
            step = moved.hidden - entry.hidden
            inputs = [entry.hidden + s * step]
            for index in range(len(model)):
                params = {name: value.detach() for name, value in self._block(index, s)[0].items()}
                inputs.append(model.run_block(index, params, inputs[-1], entry.kwargs[index]))
        gradient = self._head(tokens, scored, target, inputs.pop(), s, weight)
        for index in reversed(range(len(model))):
            mixed, base, other = self._block(index, s)
            hidden = inputs.pop().requires_grad_(True)
            model.run_block(index, mixed, hidden, entry.kwargs[index]).backward(gradient)
            assert hidden.grad is not None
            gradient = hidden.grad
            self._add_block(index, mixed, base, other, weight)
        self._add_trunk_input(step, gradient, weight)

    def _block(self, index: int, s: float) -> tuple[Params, Params, Params]:
        base = self.base.model.load_block(index, self.base.source.read)
        other = self.candidate.model.load_block(index, self.candidate.source.read)
        return self._mixed(base, other, s), base, other

    def _head(
        self,
        tokens: torch.Tensor,
        scored: torch.Tensor,
        target: ActStore,
        hidden: torch.Tensor,
        s: float,
        weight: float,
    ) -> torch.Tensor:
        """Final norm and head, some rows at a time: their shares, and the gradient at the last block's output."""
        hidden = hidden.detach().requires_grad_(True)
        base, other = self.base.trunk, self.candidate.trunk
        mixed = self._mixed_trunk(base, other, s)
        states = States(target)
        for window, positions in rows_of(tokens, scored, self.base.room.rows(self.base.vocab)):
            shown = tokens[window, positions].unsqueeze(0)
            log_p = torch.log_softmax(self.base.logits(shown, states(window, positions).unsqueeze(0)), -1)
            log_q = torch.log_softmax(
                self.base.model.leave(mixed, shown, hidden[window, positions].unsqueeze(0))[0], -1
            )
            loss = (log_p.exp() * (log_p - log_q)).sum() / self.count
            loss.backward()
            if s == 1.0:
                self.kl += float(loss.detach())
        self._add_trunk(mixed, base, other, weight)
        assert hidden.grad is not None
        return hidden.grad

    def _add_trunk(self, mixed: Params, base: Params, other: Params, weight: float) -> None:
        seen: set[int] = set()
        for slot in self.base.model.slots.values():
            param = mixed.get(slot.param)
            if param is not None and param.grad is not None and id(param) not in seen:
                seen.add(id(param))
                self.shares[slot.name] += weight * float((param.grad * (other[slot.param] - base[slot.param])).sum())

    def _mixed_trunk(self, base: Params, other: Params, s: float) -> Params:
        """As `_mixed`, tied tensors staying one tensor."""
        made: dict[int, torch.Tensor] = {}
        mixed = {}
        for name, value in base.items():
            if id(value) not in made:
                made[id(value)] = (value + s * (other[name] - value)).requires_grad_(True)
            mixed[name] = made[id(value)]
        return mixed

    def _add_block(self, index: int, mixed: Params, base: Params, other: Params, weight: float) -> None:
        for slot in self.base.model.block_slots(index):
            name = self.base.model.local(index, slot)
            grad = mixed[name].grad
            if grad is not None:
                self.shares[slot.name] += weight * float(
                    (slot.view(grad) * (slot.view(other[name]) - slot.view(base[name]))).sum()
                )

    def _add_trunk_input(self, step: torch.Tensor, gradient: torch.Tensor, weight: float) -> None:
        """What the embeddings add through the first hidden states; the share of everything before the blocks goes to the token embedding."""
        total = weight * float((step * gradient).sum())
        if total:
            module: Any = self.base.model.module
            embedding = module.get_input_embeddings().weight
            names = {id(param): name for name, param in self.base.model.module.named_parameters()}
            full = names[id(embedding)]
            slot = next(slot for slot in self.base.model.slots.values() if slot.param == full)
            self.shares[slot.name] += total


def damaged_tokens(
    per_token: dict[str, torch.Tensor],
    chosen: Windows,
    decode: Callable[[list[int]], str],
    count: int = 12,
    context: int = 24,
) -> list[dict[str, Any]]:
    """The positions with the largest KL, in context: what came before, what came, what each model would have said."""
    worst = per_token["kl"].topk(min(count, per_token["kl"].numel())).indices.tolist()
    found = []
    for index in worst:
        window, position = int(per_token["window"][index]), int(per_token["position"][index])
        before = chosen.tokens[window, max(0, position + 1 - context) : position + 1].tolist()
        found.append(
            {
                "kl": float(per_token["kl"][index]),
                "window": window,
                "position": position,
                "context": decode(before),
                "correct": decode([int(per_token["target"][index])]),
                "base_says": decode([int(per_token["base_best"][index])]),
                "base_p": float(per_token["base_best_p"][index]),
                "says": decode([int(per_token["best"][index])]),
                "p": float(per_token["best_p"][index]),
                "p_correct": float((-per_token["nll"][index]).exp()),
                "base_p_correct": float((-per_token["base_nll"][index]).exp()),
            }
        )
    return found
