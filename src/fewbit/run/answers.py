"""From a stored weight and its inputs' statistics to the answers that the outputs ask for.

One stored tensor may be wanted under several schemes; a job of one output may be made of several stored tensors. Experts of a stack are
solved one by one, and by their weights alone where too few tokens reached them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import torch

from fewbit.arch.infer import facts
from fewbit.base.errors import FewbitError
from fewbit.formats.gguf.ops import apply_quantised
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.run.hf import Params, Slot
from fewbit.run.stages import ByExpert
from fewbit.run.static import Reach, with_inputs
from fewbit.solve.table import SOLVERS, Solved

if TYPE_CHECKING:
    from fewbit.plan.jobs import Job
    from fewbit.run.engine import Group, _Run

MIN_EXPERT_TOKENS = 128  # below this an expert's statistics are topped up or replaced, and the report says so
Found = list[tuple["Group", Solved]]


class Answers:
    """Solves stored tensors for all groups that want them.

    Attributes:
        by_tensor: stored tensor -> the groups that are made of it.
        grams: grams of the loss gradients of the present block's weights, by name.
        topped: experts of the present stage that tokens were sent to by force -> tokens that came by themselves.
    """

    def __init__(self, groups: list[Group], run: _Run, device: torch.device) -> None:
        self.run, self.device = run, device
        self.seed, self.reach = run.plan.recipe["seed"], Reach.of(run.plan.recipe)
        self.known = facts(run.source.manifest, run.source.config)
        self.by_tensor: dict[str, list[Group]] = {}
        for group in groups:
            if group.job.needs:
                for name in group.job.reads:
                    self.by_tensor.setdefault(name, []).append(group)
        self.grams: dict[str, torch.Tensor] = {}
        self.topped: dict[int, int] = {}
        self._pieces: dict[str, dict[str, Solved]] = {}

    def solve(self, slot: Slot, stats: ByExpert) -> Found:
        """All answers for one stored tensor: one per scheme that the outputs ask for. The first is the one that is propagated."""
        for sink in self.run.sinks:
            sink.saw(slot.name, stats if slot.expert is None else {None: stats.get(slot.expert, Stats())})
        return [
            (group, self._answer(group.job, slot, self.matrix(slot.name), stats)) for group in self.by_tensor[slot.name]
        ]

    def without_stats(self, name: str, why: str) -> Iterator[tuple[Group, Solved]]:
        """Answers by the weights alone."""
        for group in self.by_tensor[name]:
            found = SOLVERS["rtn"](self.matrix(name), None, group.job.wanted, seed=self.seed)
            yield from self.assembled(group, name, replace(found, notes=(f"fallback to rounding to nearest: {why}",)))

    def matrix(self, name: str) -> torch.Tensor:
        """A stored weight as solvers want it, [..., out, in]: transforms that move whole rows come after solving."""
        weight = self.run.source.read(name)
        turned = self.known[name].transposed
        return (weight.transpose(-1, -2).contiguous() if turned else weight).to(self.device)

    def assembled(self, group: Group, name: str, piece: Solved) -> Iterator[tuple[Group, Solved]]:
        """A job's answer once all the tensors that it is made of are solved, rows moved as its output wants them."""
        pieces = self._pieces.setdefault(group.key, {})
        pieces[name] = piece
        if len(pieces) < len(group.job.reads):
            return
        del self._pieces[group.key]
        ordered = [pieces[read] for read in group.job.reads]
        rest = tuple(op for op in group.job.ops if op != "transpose")
        q = apply_quantised(rest, [one.q for one in ordered]) if rest else ordered[0].q
        notes = tuple(dict.fromkeys(note for one in ordered for note in one.notes))
        yield group, Solved(q.to("cpu"), sum(one.loss for one in ordered), notes)

    def put_back(self, params: Params, local: str, slot: Slot, q: QTensor) -> None:
        """Replaces a weight of the running block by what its codes stand for."""
        self.put(params, local, slot, q.dequantize())

    def put(self, params: Params, local: str, slot: Slot, value: torch.Tensor) -> None:
        """Writes a stored weight [..., out, in] into the running block's parameter."""
        if self.known[slot.name].transposed:
            value = value.transpose(-1, -2)
        slot.view(params[local]).copy_(value.to(params[local].dtype))

    def _answer(self, job: Job, slot: Slot, weight: torch.Tensor, stats: ByExpert) -> Solved:
        if weight.dim() == 3 and slot.expert is None and set(stats) != {None}:
            parts = [self._one(job, weight[e], stats.get(e), e) for e in range(weight.shape[0])]
            seen = [Stats(one.count, absmax=one.absmax, histogram=one.histogram) for one in stats.values()]
            stacked = stack_experts(job.wanted, tuple(weight.shape), [part.q for part in parts])
            q = with_inputs(stacked, job.wanted, reduce(Stats.merge, seen, Stats()), self.reach)
            return Solved(
                q, sum(part.loss for part in parts), tuple(dict.fromkeys(n for part in parts for n in part.notes))
            )
        return self._one(job, weight, stats.get(slot.expert), slot.expert)

    def _one(self, job: Job, weight: torch.Tensor, stats: Stats | None, expert: int | None) -> Solved:
        """One matrix, with the recipe's solver, or by its weights alone when too few tokens reached it."""
        count = stats.count if stats is not None else 0
        solver = SOLVERS[job.solver]
        where = "" if expert is None else f"expert {expert}: "
        try:
            if count < (1 if expert is None else MIN_EXPERT_TOKENS):
                fallback = SOLVERS["rtn"](weight, None, job.wanted, seed=self.seed)
                q = with_inputs(fallback.q, job.wanted, stats, self.reach)
                why = f"{where}fallback to rtn, only {count} calibration tokens reached it"
                return replace(fallback, q=q, notes=(why,))
            missing = [need for need in solver.needs if getattr(stats, need, None) is None]
            if missing == ["cross_gram"] and stats is not None:
                stats = replace(stats, cross_gram=stats.gram)  # no second stream here, or its correction is known
            if stats is not None and job.name in self.grams and expert is None:
                stats = replace(stats, out_gram=self.grams[job.name].to(weight.device))
            found = solver(weight, stats, job.wanted, seed=self.seed, options=self.run.options_for(job))
        except FewbitError as error:
            if error.tensor is None:
                error.tensor = job.name
            raise
        counted: tuple[str, ...] = ()
        if expert in self.topped:
            counted = (f"{where}{self.topped[expert]} calibration tokens, topped up to {count} by tokens sent to it",)
        elif expert is not None:
            counted = (f"{where}{count} calibration tokens",)
        q = with_inputs(found.q, job.wanted, stats, self.reach)
        return replace(found, q=q, notes=(*counted, *found.notes))


def stack_experts(scheme: Scheme, shape: tuple[int, ...], parts: list[QTensor]) -> QTensor:
    """One stacked tensor [experts, out, in] from the quantised experts."""

    def stacked(name: str, inner: Scheme | None) -> torch.Tensor | QTensor | None:
        stored = [getattr(part, name) for part in parts]
        if stored[0] is None or inner is None:
            return None
        if isinstance(stored[0], QTensor):
            return stack_experts(inner, scheme.block_counts(shape), stored)
        return torch.stack(stored)

    return QTensor(
        scheme,
        shape,
        torch.stack([part.codes for part in parts]),
        stacked("scale", scheme.scale),
        stacked("code_shift", scheme.code_shift),
        stacked("value_shift", scheme.value_shift),
    )
