"""Learning rotations: the matrices under which the quantised model says what the float model says.

    Q (residual stream, and one per attention layer for its values)  --fold-->  equal float model  --round, straight through-->  logits
                                                      gradient of KL(float || rounded)  --Cayley step-->  Q

The start is the random Hadamard rotation of `rotate`. Each step folds the rotations into all weights, rounds these (and inputs, where the scheme
quantises activations) as the recipe says, by the weights alone, and turns the matrices against the gradient; rounding passes gradients straight
through. Sequences that were held out judge the start and what became of it a few times on the way; the best is kept. The whole model is in memory:
see `plan.calibrated`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from fewbit.arch.rewrite import Steps, apply_steps
from fewbit.arch.rewrite_table import options_of
from fewbit.arch.rotate import Dense, KeepsMean, Rotation, dense
from fewbit.arch.spin import Turner
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import Scheme
from fewbit.run.hf import BlockModel, Params
from fewbit.run.observe import Observer, Use
from fewbit.run.start import text_for
from fewbit.solve.table import SOLVERS

if TYPE_CHECKING:
    from fewbit.plan.jobs import Job
    from fewbit.run.engine import _Run
    from fewbit.run.rewrites import RewrittenSource

FILE = "rotations.safetensors"
HELD_OUT = 4  # sequences that judge, at most a fifth of all
TOLD_EVERY = 10  # steps
JUDGED = 5  # times on the way


class Spin:
    """Learns the rotations of one run.

    Attributes:
        start: the rotations that it begins with, by the key of their space.
    """

    def __init__(self, source: RewrittenSource, run: _Run, start: dict[str, Rotation]) -> None:
        self.source, self.run, self.start = source, run, start
        recipe = run.plan.recipe
        options = options_of("spin", recipe["options"])
        self.steps, self.rate, self.batch = int(options["steps"]), float(options["rate"]), int(options["batch"])
        self.seed = recipe["seed"]
        self.model = BlockModel(source.config, source.manifest, device=run.settings.device)
        tokens = text_for(source, recipe, run.sinks[0]).tokens
        apart = min(HELD_OUT, max(1, len(tokens) // 5))
        self.judged, self.tokens = tokens[-apart:], tokens[: max(1, len(tokens) - apart)]
        self.held = {name: source.read_stored(name).float().to(self.model.device) for name in self.model.slots}
        self.jobs: dict[str, Job] = {}
        for output in run.plan.outputs:
            for job in output.quantised:
                for name in job.reads:
                    self.jobs.setdefault(name, job)
        self.true = self._params(lambda name: self.held[name])

    def learn(self) -> tuple[dict[str, Rotation], str]:
        """The learned rotations by key, and what came of it in a sentence."""
        turners = {key: Turner(dense(rotation).matrix.to(self.model.device)) for key, rotation in self.start.items()}
        judged_at = {-(-self.steps * part // JUDGED) for part in range(1, JUDGED + 1)}
        best, when = dict(self.start), 0
        before = least = self._judge(best)
        for step in range(self.steps):
            self.run.stop.check()
            loss = self._step(turners, step)
            if step % TOLD_EVERY == 0 or step + 1 == self.steps:
                text = f"rotations: step {step + 1} of {self.steps}, KL {loss:.5f}"
                self.run.settings.on_event({"event": "note", "text": text})
            if step + 1 in judged_at:
                found = self._rotations({key: one.matrix.cpu() for key, one in turners.items()})
                score = self._judge(found)
                if score < least:
                    best, when, least = found, step + 1, score
        if not when:
            return (
                best,
                f"learned rotations were no better and were not kept: KL on held-out calibration text {before:.5f}",
            )
        said = f"KL on held-out calibration text {before:.5f} at the start, {least:.5f} after {when} steps"
        return best, f"learned rotations: {said}"

    def _step(self, turners: dict[str, Turner], step: int) -> float:
        """Turns all matrices once; the loss before."""
        matrices = {key: one.matrix.clone().requires_grad_() for key, one in turners.items()}
        with torch.enable_grad():
            loss = self._loss(self._rotations(matrices), self._sequences(step))
            gradients = torch.autograd.grad(loss, list(matrices.values()))
        rate = self.rate * (1 - step / self.steps)
        for one, gradient in zip(turners.values(), gradients, strict=True):
            one.step(gradient, rate)
        return float(loss.detach())

    def _sequences(self, step: int) -> torch.Tensor:
        """The tokens of a step: the text over and over, in order."""
        picks = [(step * self.batch + k) % len(self.tokens) for k in range(self.batch)]
        return self.tokens[picks]

    def _rotations(self, matrices: dict[str, torch.Tensor]) -> dict[str, Rotation]:
        return {
            key: KeepsMean(Dense(matrix)) if isinstance(self.start[key], KeepsMean) else Dense(matrix)
            for key, matrix in matrices.items()
        }

    def _judge(self, rotations: dict[str, Rotation]) -> float:
        with torch.no_grad():
            losses = [float(self._loss(rotations, one[None])) for one in self.judged]
        return sum(losses) / len(losses)

    # ---- the two models

    def _loss(self, rotations: dict[str, Rotation], tokens: torch.Tensor) -> torch.Tensor:
        """Mean KL of the rounded, rotated model from the float one."""
        with torch.no_grad():
            wanted = self._logits(self.true, tokens).log_softmax(-1)
        steps = self.source.rotated(rotations)
        found = self._logits(self._params(lambda name: self._rounded(name, steps)), tokens, quantised=True).log_softmax(
            -1
        )
        return torch.nn.functional.kl_div(
            found.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean"
        )

    def _rounded(self, name: str, steps: Steps) -> torch.Tensor:
        """A weight under rotations, rounded straight through as its job says."""
        weight = apply_steps(self.held[name], steps.get(name, ()))
        job = self.jobs.get(name)
        if job is None or job.scheme is None:
            return weight
        turned = "transpose" in job.ops
        matrix = weight.detach().transpose(-1, -2) if turned else weight.detach()
        options = self.run.options_for(job) if job.solver == "rtn" else {}
        solver = SOLVERS["rtn"]
        q = solver(matrix.contiguous(), None, job.scheme.weights_only, seed=self.seed, options=options).q.dequantize()
        return weight + ((q.transpose(-1, -2) if turned else q) - weight).detach()

    def _params(self, read: Any) -> Params:
        """All parameters of the module, tied ones too."""
        params = dict(self.model.load_trunk(read))
        for index in range(len(self.model)):
            block = self.model.load_block(index, read)
            params |= {f"{self.model.prefix}.{index}.{name}": value for name, value in block.items()}
        return params

    def _logits(self, params: Params, tokens: torch.Tensor, quantised: bool = False) -> torch.Tensor:
        """float32 [sequences, length, vocab]."""
        inner = dict(self._activations()) if quantised else {}
        rounding = (
            Observer({name: params[name] for name in inner}, lambda use: _rounded_inputs(use, inner)) if inner else None
        )
        with rounding or nullcontext():
            ids = tokens.to(self.model.device)
            out = torch.func.functional_call(self.model.module, params, (ids,), tie_weights=False, strict=False)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float()

    def _activations(self) -> Iterator[tuple[str, Scheme]]:
        """Parameters whose inputs the recipe quantises, with the scheme of the inputs (static ones are rounded per tensor here)."""
        for name, slot in self.model.slots.items():
            job = self.jobs.get(name)
            if job is not None and job.scheme is not None and job.scheme.activation is not None:
                yield slot.param, job.scheme.activation


def _rounded_inputs(use: Use, schemes: dict[str, Scheme]) -> torch.Tensor:
    """Inputs rounded straight through."""
    flat = use.x.detach().reshape(-1, use.x.shape[-1]).float()
    q = quantize(schemes[use.param], flat, None, Search(method="absmax")).dequantize(use.x.dtype).reshape(use.x.shape)
    return use.x + (q - use.x).detach()


def learned(source: RewrittenSource, run: _Run, start: dict[str, Rotation]) -> dict[str, Rotation]:
    """The rotations of a run: learned, or read from its scratch folder when an interrupted run had learned them."""
    sink = run.sinks[0]
    path = sink.scratch / FILE
    if not path.exists():
        found, said = Spin(source, run, start).learn()
        matrices = {key: dense(rotation).matrix.contiguous() for key, rotation in found.items()}
        beside = path.with_name(path.name + ".new")
        save_file(matrices, beside)
        os.replace(beside, path)
        sink.note("spin", {"said": said})
    run.notes["rotations"] = (str(sink.notes.get("spin", {}).get("said", "")),)
    held = load_file(path)
    return {
        key: KeepsMean(Dense(held[key])) if isinstance(rotation, KeepsMean) else Dense(held[key])
        for key, rotation in start.items()
    }
