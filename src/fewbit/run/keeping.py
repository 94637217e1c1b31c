"""What to keep of a block's stages between the passes through it: tried on one sequence, not read off names.

Which products nobody looks at (those of q, k and v once the inputs of o are kept) is found with NaN in their place; what else a pass can do without, by going
backwards through the calls of one pass (`run.needless`) and leaving them out once. A block with experts is run from its start each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fewbit.plan.calibrated import WIDE
from fewbit.run.hf import Params
from fewbit.run.needless import Call, Recorder, needless
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.skipping import Skipping, nothing
from fewbit.run.stages import Block, Stage

CHANGE = 8.0  # of a product that is tried, times the size of the output
STRAIGHT = 0.02  # part of what such a change does that may be anything but itself: rounding in 16 bits

Run = Callable[[torch.Tensor, AbstractContextManager[Any] | None], torch.Tensor]
"""A block with its parameters and arguments, on hidden states [sequences, length, width], within an observer."""


@dataclass(frozen=True)
class Kept:
    """What later passes need of one stage.

    Attributes:
        outputs: whether products that are done must be answered truly; if not, with NaN.
        inputs: whether its inputs must be kept from its own pass to the next, because earlier products are NaN by then.
        width: channels of its inputs; widths: of its products, by parameter.
        again: whether its inputs are made again in the next pass from the products of the stage before, instead of being kept.
        adds: how much of its one product comes out of the block, output = rest + adds * product; 0 where that is not so, or not the last stage.
        needless: the calls (number -> function) that a pass for this stage can do without: one that stops at its inputs, one that goes on to the end of the block
            and, of the last stage, one that finishes the block.
    """

    outputs: bool
    inputs: bool
    width: int
    widths: dict[str, int]
    again: bool = False
    adds: float = 0.0
    needless: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether what it gives out may take the place of what it took in: its one product reads each batch for the last time."""
        return self.inputs and list(self.widths.values()) == [self.width]


def survey(
    block: Block, params: Params, stages: list[Stage], hidden: torch.Tensor, again: bool = True
) -> list[Kept] | None:
    """What to keep of each stage, tried on hidden states [1, length, width]; None when the block must be run from its start every time.

    Args:
        again: wide inputs are made again instead of kept.
    """
    if any(stage.experts for stage in stages):
        return None
    stage_of = {name: k for k, stage in enumerate(stages) for name in stage.params}
    tracked = {name: params[name] for name in stage_of}
    run: Run = partial(block.run, params)
    inputs: dict[str, torch.Tensor] = {}
    products: dict[str, torch.Tensor] = {}

    def note(use: Use, product: torch.Tensor) -> None:
        if use.expert is not None or use.param in products:
            inputs[""] = use.x  # used twice, or by slices: not a plain chain of products
        inputs[use.param], products[use.param] = use.x, product

    recorder = Recorder(tracked, note)
    true = run(hidden, recorder)
    if "" in inputs or any(x.numel() // x.shape[-1] != hidden.shape[1] for x in inputs.values()):
        return None
    found: list[Kept] = []
    for k, stage in enumerate(stages):
        names = stage.params
        last = k + 1 == len(stages)
        looked_at = last or not _same(run, tracked, stage_of, found, k, inputs, products, hidden, true)
        poisoned = _poisoned(run, tracked, stage_of, found, k, products, hidden)
        widths = {name: products[name].shape[-1] for name in names}
        width = inputs[names[0]].shape[-1]
        wide = again and k > 0 and not found[k - 1].inputs and width >= WIDE * found[k - 1].width
        adds = _added(run, tracked, names[0], products[names[0]], hidden, true) if last and len(names) == 1 else 0.0
        found.append(Kept(looked_at, poisoned and not wide, width, widths, poisoned and wide, adds))
    trial = _Trial(run, tracked, stages, found, inputs, products, hidden, true, recorder.calls)
    return [replace(kept, needless=trial.needless(k)) for k, kept in enumerate(found)]


def from_memory(kept: list[Kept], k: int, stage: int) -> bool:
    """Whether a pass for a stage takes the products of stage k from memory."""
    return k < stage - 1 and not (k == stage - 2 and kept[stage - 1].again)


def _answered(stages: list[Stage], kept: list[Kept], stage: int) -> tuple[set[str], set[str]]:
    """Weights of earlier stages whose products a pass for a stage takes from memory, and those that it computes from inputs in memory."""
    known = {param for k, one in enumerate(stages) if from_memory(kept, k, stage) for param in one.params}
    return known, set(stages[stage - 1].params) if stage and kept[stage - 1].inputs else set()


@dataclass(frozen=True)
class _Trial:
    """A pass of one sequence in which all is known, to try what a pass can do without."""

    run: Run
    tracked: Params
    stages: list[Stage]
    kept: list[Kept]
    inputs: Params
    products: Params
    hidden: torch.Tensor
    true: torch.Tensor
    calls: list[Call]

    def needless(self, k: int) -> dict[str, dict[int, Any]]:
        """What passes for stage k can do without, as `Kept` has it: what was found to be so and did no harm."""
        first, last = self.stages[k].params[0], k + 1 == len(self.stages)
        seen, out = (x.untyped_storage().data_ptr() for x in (self.inputs[first], self.true))
        passes = {"stop": (k, [seen])}
        passes |= {"on": (k, [seen, out]), "finish": (k + 1, [out])} if last else {}
        found = {}
        for name, (stage, wanted) in passes.items():
            known, fed = _answered(self.stages, self.kept, stage)
            unread = needless(self.calls, wanted, known | fed)
            found[name] = unread if self._harmless(stage, name, known, fed, unread) else {}
        return found

    def _harmless(self, stage: int, name: str, known: set[str], fed: set[str], unread: dict[int, Any]) -> bool:
        outputs = {
            param: kept.outputs for one, kept in zip(self.stages, self.kept, strict=True) for param in one.params
        }
        seen: list[torch.Tensor] = []

        def take(use: Use) -> torch.Tensor | None:
            if stage < len(self.stages) and use.param == self.stages[stage].params[0]:
                seen.append(use.x)
                if name == "stop":
                    raise StopForward
            return self.inputs[use.param] if use.param in fed else None

        def answer(use: Use) -> torch.Tensor | None:
            if use.param not in known:
                return None
            return self.products[use.param] if outputs[use.param] else nothing(self.products[use.param])

        out = self.true
        try:
            with contextlib.suppress(StopForward):
                out = self.run(self.hidden, Skipping(self.tracked, take, None, answer, unread))
        except (RuntimeError, ValueError, IndexError):
            return False
        wanted = [] if stage == len(self.stages) else [self.inputs[self.stages[stage].params[0]]]
        same = len(seen) == len(wanted) and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
        return same and torch.equal(out, self.true)


def _added(
    run: Run, tracked: Params, name: str, product: torch.Tensor, hidden: torch.Tensor, true: torch.Tensor
) -> float:
    """The factor with which a block adds a product to its output, tried with a large random change of it; 0 where it does more than that."""
    if product.numel() != true.numel() or product.shape[-1] != true.shape[-1]:
        return 0.0
    size = CHANGE * max(float(true.float().std()), float(product.float().std()))
    noise = torch.randn(product.shape, generator=torch.Generator().manual_seed(0)).to(product) * size
    noisy = Observer({name: tracked[name]}, on_output=lambda use, found: found + noise)
    moved = (run(hidden, noisy) - true).float().flatten()
    noise = noise.float().flatten()
    factor = float(moved @ noise / (noise @ noise))
    off = float((moved - factor * noise).norm() / moved.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return factor if off < STRAIGHT and factor else 0.0


def _same(
    run: Run,
    tracked: Params,
    stage_of: dict[str, int],
    found: list[Kept],
    k: int,
    inputs: dict[str, torch.Tensor],
    products: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    true: torch.Tensor,
) -> bool:
    """Whether the block's output is the same when the products of stage k are NaN and the inputs of the next stage are given."""

    def answer(use: Use) -> torch.Tensor | None:
        stage = stage_of[use.param]
        if stage > k:
            return None
        return products[use.param] if stage < k and found[stage].outputs else nothing(products[use.param])

    def feed(use: Use) -> torch.Tensor | None:
        return inputs[use.param] if stage_of[use.param] == k + 1 else None

    try:
        out = run(hidden, Skipping(tracked, feed, None, answer))
    except (RuntimeError, ValueError, IndexError):  # NaN where the block wants to index, say
        return False
    return torch.equal(out, true)


def _poisoned(
    run: Run,
    tracked: Params,
    stage_of: dict[str, int],
    found: list[Kept],
    k: int,
    products: Params,
    hidden: torch.Tensor,
) -> bool:
    """Whether the inputs of stage k are not what they should be, once all earlier products are answered from what is kept."""
    if not any(not kept.outputs for kept in found):
        return False
    seen: list[torch.Tensor] = []

    def answer(use: Use) -> torch.Tensor:
        return products[use.param] if found[stage_of[use.param]].outputs else nothing(products[use.param])

    def take(use: Use) -> None:
        if stage_of[use.param] == k:
            seen.append(use.x)
            raise StopForward

    try:
        with contextlib.suppress(StopForward):
            run(hidden, Skipping(tracked, take, None, answer))
    except (RuntimeError, ValueError, IndexError):
        return True
    return not seen or not bool(torch.isfinite(seen[0]).all())


def kept_bytes(kept: list[Kept], tokens: int, itemsize: int) -> int:
    """Most bytes that one stream keeps at a time, at least as much as it does."""
    inputs = [k.width for k in kept if k.inputs and not (k.in_place and k.outputs)]
    outputs = sum(sum(k.widths.values()) for k in kept[:-1] if k.outputs)
    return tokens * itemsize * (max(inputs, default=0) + outputs)
