"""The calibrated engine: a model solved block by block, from disk, in bounded memory.

For each block, in order:

    read its float weights
    for each stage (tensors that read one space: q k v, then o, then gate up, then down):
        run the calibration sequences through the block, earlier stages already quantised, and collect the stage's statistics
        solve its tensors, put the dequantised weights in their place
    run the sequences through the finished block; hand the answers to the sinks; forget it

Two streams of hidden states are kept where a solver asks for `cross_gram`: one through the quantised model, one through the float
model, so that each block also corrects what the blocks before it got wrong. After each block the hidden states are saved, so a killed
run goes on with the block it was in and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fewbit.math.stats import Stats
from fewbit.plan.calibrated import SPILL_SHARE
from fewbit.run.acts import ActStore
from fewbit.run.answers import Answers
from fewbit.run.fisher import fisher_pass, load_grams
from fewbit.run.hf import Params, Slot
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.stages import Block, ByExpert, Stage, collect, find_stages
from fewbit.run.start import batch_size, block_model, fill, text_for
from fewbit.solve.table import Solved

if TYPE_CHECKING:
    from fewbit.run.engine import Group, _Run

FISHER_SAMPLES = 64  # sequences of the backward pass


class Calibrated:
    """One calibrated pass over a model; iterating it yields (group, solved)."""

    def __init__(self, groups: list[Group], run: _Run) -> None:
        self.run = run
        self.model = block_model(run.source, run.settings.device)
        self.answers = Answers(groups, run, self.model.device)
        self.needs = frozenset(run.plan.needs)
        text = text_for(run.source, run.plan.recipe, run.sinks[0])
        for warning in text.warnings:
            run.settings.on_event({"event": "note", "text": f"warning: {warning}"})
        self.tokens = text.tokens
        self.scratch = run.sinks[0].scratch
        self.batch = batch_size(self.tokens)

    # ---- the walk

    def __iter__(self) -> Iterator[tuple[Group, Solved]]:
        with contextlib.ExitStack() as stack, torch.no_grad():
            trunk = self.model.load_trunk(self.run.source.read)
            self._weigh_by_loss(trunk)
            arguments, quantised, floats = self._enter(trunk, stack)
            for index in range(self._resume(quantised, floats), len(self.model)):
                block = Block(self.model, index, arguments[index], self.batch)
                yield from self._block(block, quantised, floats)
                self._checkpoint(index, quantised, floats)
            yield from self._outside(trunk, quantised)

    def _enter(
        self, trunk: Params, stack: contextlib.ExitStack
    ) -> tuple[list[dict[str, Any]], ActStore, ActStore | None]:
        """Hidden states before block 0 for all sequences, and the blocks' arguments (equal for all batches of one size)."""
        entry = self.model.enter(trunk, self.tokens[: self.batch])
        shape = (*self.tokens.shape, entry.hidden.shape[-1])
        streams = ("quantised", "float") if "cross_gram" in self.needs else ("quantised",)
        nbytes = torch.Size(shape).numel() * self.model.dtype.itemsize * len(streams)
        spill = nbytes > SPILL_SHARE * self.run.settings.ram
        stores = []
        for name in streams:
            path = self.scratch / f"acts-{name}.live" if spill else None
            stores.append(ActStore(shape, self.model.dtype, self.batch, path))
            stack.callback(stores[-1].close)
        fill(self.model, trunk, self.tokens, stores)
        return entry.kwargs, stores[0], stores[1] if len(stores) == 2 else None

    def _weigh_by_loss(self, trunk: Params) -> None:
        """Runs the backward pass once, where a solver uses it; its grams stay in the scratch folder."""
        groups = (group for made in self.answers.by_tensor.values() for group in made)
        if not any(self.run.options_all(group.job).get("loss_weighting") for group in groups):
            return
        if (self.scratch / "fisher-done").exists():
            return
        tracked = [
            {
                self.model.local(index, slot): slot.name
                for slot in self.model.block_slots(index)
                if slot.name in self.answers.by_tensor and slot.expert is None
            }
            for index in range(len(self.model))
        ]
        tokens = self.tokens[:FISHER_SAMPLES]
        width = max(info.shape[-1] for info in self.run.source.manifest.values() if info.shape)
        nbytes = tokens.numel() * width * self.model.dtype.itemsize * (len(self.model) + 2)

        def told(index: int) -> None:
            self.run._check_stop()

        fisher_pass(
            self.model, self.run.source.read, trunk, tokens, tracked, self.scratch, batch=self.batch,
            seed=self.run.plan.recipe["seed"], spill=nbytes > SPILL_SHARE * self.run.settings.ram, on_block=told,
        )  # fmt: skip

    def _resume(self, quantised: ActStore, floats: ActStore | None) -> int:
        """Index of the first block that is not done; the stores hold its inputs."""
        done = self.run.sinks[0].notes.get("block", {}).get("index", -1)
        if done < 0:
            return 0
        loaded = quantised.load(self.scratch / f"acts-quantised-{done}")
        if floats is not None:
            loaded = floats.load(self.scratch / f"acts-float-{done}") and loaded
        return done + 1 if loaded else 0

    def _checkpoint(self, index: int, quantised: ActStore, floats: ActStore | None) -> None:
        """Makes a finished block durable: its tensors, its outputs, then the note that says so."""
        for sink in self.run.sinks:
            sink.flush()
        quantised.save(self.scratch / f"acts-quantised-{index}")
        if floats is not None:
            floats.save(self.scratch / f"acts-float-{index}")
        self.run.sinks[0].note("block", {"index": index})
        for name in ("quantised", "float"):
            (self.scratch / f"acts-{name}-{index - 1}").unlink(missing_ok=True)

    # ---- one block

    def _block(self, block: Block, quantised: ActStore, floats: ActStore | None) -> Iterator[tuple[Group, Solved]]:
        params = self.model.load_block(block.index, self.run.source.read)
        originals = {name: value.clone() for name, value in params.items()} if floats is not None else None
        slots = self._slots(block.index)
        self.answers.grams = load_grams(self.scratch, block.index)
        solved: set[str] = set()
        for stage in find_stages(block, params, slots, quantised.get(0)[:1]):
            stats = collect(
                block, stage, params, quantised, originals, floats, self.needs, self.run._check_stop
            )  # fmt: skip
            for slot, found in self._solve(stage, slots, stats):
                self.answers.put_back(params, self.model.local(block.index, slot), slot, found[0][1].q)
                solved.add(slot.name)
                for group, piece in found:
                    yield from self.answers.assembled(group, slot.name, piece)
        for slot in (slot for held in slots.values() for slot in held if slot.name not in solved):
            yield from self.answers.without_stats(slot.name, "no matrix product of the calibration pass used it")
        block.advance(params, quantised)
        if floats is not None and originals is not None:
            block.advance(originals, floats)

    def _slots(self, index: int) -> dict[str, list[Slot]]:
        """Local parameter name -> the stored tensors in it that are to be solved."""
        found: dict[str, list[Slot]] = {}
        for slot in self.model.block_slots(index):
            if slot.name in self.answers.by_tensor:
                found.setdefault(self.model.local(index, slot), []).append(slot)
        return found

    def _solve(
        self, stage: Stage, slots: dict[str, list[Slot]], stats: ByExpert
    ) -> list[tuple[Slot, list[tuple[Group, Solved]]]]:
        """The answers for all tensors of a stage, several at once."""
        members = [slot for name in stage.params for slot in slots[name]]
        with ThreadPoolExecutor(max_workers=self.run.room.workers) as pool:
            answers = list(pool.map(partial(self.answers.solve, stats=stats), members))
        return list(zip(members, answers, strict=True))

    # ---- outside the blocks

    def _outside(self, trunk: Params, quantised: ActStore) -> Iterator[tuple[Group, Solved]]:
        """Tensors outside the blocks (a head that shall be quantised): statistics from the model's own last steps."""
        inside = {slot.name for index in range(len(self.model)) for slot in self.model.block_slots(index)}
        for name in [name for name in self.answers.by_tensor if name not in inside]:
            slot = self.model.slots.get(name)
            stats = self._last_inputs(trunk, slot, quantised) if slot is not None else {}
            if slot is None or not stats:
                yield from self.answers.without_stats(name, "no matrix product of the calibration pass used it")
                continue
            for group, piece in self.answers.solve(slot, stats):
                yield from self.answers.assembled(group, name, piece)

    def _last_inputs(self, trunk: Params, slot: Slot, quantised: ActStore) -> ByExpert:
        """Statistics of what a tensor after the last block is multiplied with; empty when it is not."""
        stats: ByExpert = {}
        seen: list[torch.Tensor] = []

        def take(use: Use) -> None:
            seen.append(use.x)
            raise StopForward

        for batch in range(len(quantised)):
            start, stop = quantised.span(batch)
            seen.clear()
            with contextlib.suppress(StopForward), Observer({slot.name: trunk[slot.param]}, take):
                self.model.leave(trunk, self.tokens[start:stop], quantised.get(batch))
            for x in seen:
                stats[None] = stats.get(None, Stats()).add(x, x, needs=self.needs)
        return stats


def calibrated(groups: list[Group], wanted: set[str], run: _Run) -> Iterator[tuple[Group, Solved]]:
    """Solves the groups that need calibration, block by block; see the text of this module."""
    for group, solved in Calibrated(groups, run):
        if group.key in wanted:
            yield group, solved
