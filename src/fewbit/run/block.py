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
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fewbit.base.resident import freed_memory_stays, straight_from_the_system, trim
from fewbit.math.stats import Stats
from fewbit.plan.calibrated import calibrated_budget, is_big
from fewbit.run.acts import ActStore
from fewbit.run.answers import MIN_EXPERT_TOKENS, Answers, Found
from fewbit.run.collect import collect
from fewbit.run.fisher import OUTPUT, TOKENS, fisher_pass, load_grams, token_weights
from fewbit.run.hf import Params, Slot
from fewbit.run.keeping import Kept, kept_bytes, survey
from fewbit.run.lanes import in_lanes
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.passes import Stream
from fewbit.run.stages import Block, ByExpert, Stage, find_stages, top_up
from fewbit.run.start import batch_size, block_model, fill, lanes_for, text_for
from fewbit.run.together import Together, ideal_block, wants
from fewbit.solve.table import Solved

if TYPE_CHECKING:
    from fewbit.run.engine import Group, _Run


class Calibrated:
    """One calibrated pass over a model; iterating it yields (group, solved)."""

    def __init__(self, groups: list[Group], run: _Run) -> None:
        self.run = run
        self.model = block_model(run.source, run.settings.device, run.plan.recipe["compute"])
        self.answers = Answers(groups, run, self.model.device)
        dtype = str(self.model.dtype).removeprefix("torch.")
        run.settings.on_event({"event": "note", "text": f"calibration text is run through the model in {dtype}"})
        self.needs = frozenset(run.plan.needs)
        text = text_for(run.source, run.plan.recipe, run.sinks[0])
        for warning in text.warnings:
            run.settings.on_event({"event": "note", "text": f"warning: {warning}"})
        self.tokens = text.tokens
        self.scratch = run.sinks[0].scratch
        self.room = calibrated_budget(
            run.plan, run.source.manifest, run.settings.ram, run.settings.workers, run.settings.vram or None
        )
        self.lanes = lanes_for(run.source, run.settings.device)
        self.batch = batch_size(self.tokens, self.lanes)
        self.structures: dict[tuple[str, tuple[str, ...]], tuple[list[Stage], list[Kept] | None]] = {}

    # ---- the walk

    def __iter__(self) -> Iterator[tuple[Group, Solved]]:
        with contextlib.ExitStack() as stack, torch.no_grad():
            # what lanes free waits in the heap for their next batch, but where memory is short
            scarce = self.room.spill or is_big(self.run.source.manifest)
            stack.enter_context(straight_from_the_system() if scarce else freed_memory_stays())
            arguments, quantised, floats = self._enter(stack)
            self._find_structures(arguments, quantised.get(0)[:1])
            for index in range(self._resume(quantised, floats), len(self.model)):
                block = Block(self.model, index, arguments[index], self.batch, self.lanes)
                self.model.prepare(index, self.lanes)
                yield from self._block(block, quantised, floats)
                self._checkpoint(index, quantised, floats)
            yield from self._outside(quantised)

    def _enter(self, stack: contextlib.ExitStack) -> tuple[list[dict[str, Any]], ActStore, ActStore | None]:
        """Hidden states before block 0 for all sequences, and the blocks' arguments (equal for all batches of one size)."""
        trunk = self.model.load_trunk(self.run.source.read)  # gone when this returns: it may outweigh a block
        self._weigh_by_loss(trunk)
        trim()
        entry = self.model.enter(trunk, self.tokens[: self.batch])
        sequences = {"quantised": self.tokens.shape[0]}
        if "cross_gram" in self.needs and any(options.get("drift", True) for options in self._options()):
            sequences["float"] = self._samples("drift_samples")
        shape = (self.tokens.shape[1], entry.hidden.shape[-1])
        stores = []
        for name, count in sequences.items():
            path = self.scratch / f"acts-{name}.live" if self.room.spill else None
            stores.append(ActStore((count, *shape), self.model.dtype, self.batch, path))
            stack.callback(stores[-1].close)
        fill(self.model, trunk, self.tokens, stores)
        return entry.kwargs, stores[0], stores[1] if len(stores) == 2 else None

    def _options(self) -> list[dict[str, Any]]:
        """The solver options of every weight that is solved here."""
        return [self.run.options_all(group.job) for made in self.answers.by_tensor.values() for group in made]

    def _samples(self, option: str) -> int:
        """How many sequences a part of the statistics is taken from: the most that a solver asks for, all where one does not say."""
        every = self.tokens.shape[0]
        return min(every, max((options.get(option, every) for options in self._options()), default=every))

    def _weigh_by_loss(self, trunk: Params) -> None:
        """Runs the backward pass once, where a solver uses it; its grams stay in the scratch folder."""
        if not any(options.get("loss_weighting") for options in self._options()):
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
        tokens = self.tokens[: self._samples("loss_samples")]

        fisher_pass(
            self.model, self.run.source.read, trunk, tokens, tracked, self.scratch, batch=max(1, self.batch // 2),
            seed=self.run.plan.recipe["seed"], spill=self.room.spill, lanes=self.lanes,
            check_stop=self.run.stop.check,
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
        trim()

    # ---- one block

    def _block(self, block: Block, quantised: ActStore, floats: ActStore | None) -> Iterator[tuple[Group, Solved]]:
        params = self.model.load_block(block.index, self.run.source.read)
        originals = {name: value.clone() for name, value in params.items()} if floats is not None else None
        slots = self._slots(block.index)
        self.answers.grams = load_grams(self.scratch, block.index)
        weights = token_weights(self.answers.grams.pop(TOKENS, None), len(self.tokens))
        solved: dict[str, tuple[Slot, Found]] = {}
        corrections: dict[str, torch.Tensor] = {}
        together = any(wants(self.answers.by_tensor[s.name]) for held in slots.values() for s in held)
        stages, kept = self.structures[self._kind(block.index, slots)]
        first, second = self._streams(block, stages, kept, params, originals, quantised, floats)
        for number, stage in enumerate(stages):
            stats = collect(first, second, number, self.needs, self.run.stop.check, weights)
            if second is not None and originals is not None and not second.left:
                originals.clear()  # the float stream is through: its block need not lie beside the last stage's grams
            trim()
            self._top_up(block, stage, params, quantised, stats)
            correction = None if None not in stats else stats[None].correction
            for slot, found in self._solve(stage, slots, stats):
                self.answers.put_back(params, self.model.local(block.index, slot), slot, found[0][1].q)
                solved[slot.name] = (slot, found if together else [])
                if together and correction is not None:
                    corrections[slot.name] = correction
                for group, piece in [] if together else found:
                    yield from self.answers.assembled(group, slot.name, piece)
        for slot in (slot for held in slots.values() for slot in held if slot.name not in solved):
            yield from self.answers.without_stats(slot.name, "no matrix product of the calibration pass used it")
        if second is not None:
            second.finish(self.run.stop.check)
        if together:
            first.close()
            yield from self._improve(block, params, quantised, corrections, solved)
        else:
            first.finish(self.run.stop.check)

    def _kind(self, index: int, slots: dict[str, list[Slot]]) -> tuple[str, tuple[str, ...]]:
        return self.model.kind(index), tuple(slots)

    def _find_structures(self, arguments: list[dict[str, Any]], hidden: torch.Tensor) -> None:
        """The stages of blocks and what to keep of each, looked for once for all blocks of a kind.

        Always in the first of a kind and on what enters block 0, also by a run that goes on: what is measured there (`Kept.adds`) must be the same number.
        """
        for index in range(len(self.model)):
            slots = self._slots(index)
            key = self._kind(index, slots)
            if key in self.structures:
                continue
            params = self.model.load_block(index, self.run.source.read)
            block = Block(self.model, index, arguments[index], self.batch, self.lanes)
            stages = find_stages(block, params, slots, hidden)
            kept = survey(block, params, stages, hidden, self.room.again) if stages else None
            if kept is not None and not _whole(slots[stages[-1].params[0]]):
                kept[-1] = replace(kept[-1], adds=0.0)
            self.structures[key] = stages, kept

    def _improve(
        self,
        block: Block,
        params: Params,
        quantised: ActStore,
        corrections: dict[str, torch.Tensor],
        solved: dict[str, tuple[Slot, Found]],
    ) -> Iterator[tuple[Group, Solved]]:
        """Lets solvers improve the block's answers together, then takes the hidden states through it."""
        slots = {name: slot for name, (slot, _) in solved.items()}
        found = {name: pieces for name, (_, pieces) in solved.items()}
        path = self.scratch / "acts-wanted.live" if self.room.spill else None
        wanted = ActStore(quantised.shape, quantised.dtype, quantised.batch, path)
        try:
            ideal = ideal_block(block, params, slots, corrections, self.answers)
            self._pass(block, ideal, quantised, wanted)
            del ideal
            whole = Together(block, params, quantised, wanted, self.answers.grams.get(OUTPUT), self.answers)
            whole.improve(found, slots, self.run.stop.check)
        finally:
            wanted.close()
        for name, pieces in found.items():
            for group, piece in pieces:
                yield from self.answers.assembled(group, name, piece)
        self._pass(block, params, quantised, quantised)

    def _pass(self, block: Block, params: Params, source: ActStore, target: ActStore) -> None:
        """Takes all hidden states through a block."""
        in_lanes(
            len(source), self.lanes, lambda k: target.put(k, block.run(params, source.get(k))), self.run.stop.check
        )

    def _streams(
        self,
        block: Block,
        stages: list[Stage],
        kept: list[Kept] | None,
        params: Params,
        originals: Params | None,
        quantised: ActStore,
        floats: ActStore | None,
    ) -> tuple[Stream, Stream | None]:
        """The quantised and the float stream through a block."""
        tokens = self.tokens.shape[1] * (quantised.shape[0] + (floats.shape[0] if floats is not None else 0))
        spill = kept is not None and kept_bytes(kept, tokens, quantised.dtype.itemsize) > self.room.kept
        files = {name: self.scratch / f"kept-{name}" if spill else None for name in ("quantised", "float")}
        first = Stream(block, params, quantised, stages, kept, files["quantised"])
        if floats is None or originals is None:
            return first, None
        return first, Stream(block, originals, floats, stages, kept, files["float"])

    def _top_up(self, block: Block, stage: Stage, params: Params, quantised: ActStore, stats: ByExpert) -> None:
        """Sends tokens to the experts of a stage that too few reached."""
        routers = [
            self.model.local(block.index, slot)
            for slot in self.model.block_slots(block.index)
            if self.answers.known[slot.name].role == "router" and params[self.model.local(block.index, slot)].dim() == 2
        ]
        weight = params[stage.params[0]]
        self.answers.topped = {}
        if stage.experts and routers and weight.dim() == 3:
            words = (routers, weight.shape[0], MIN_EXPERT_TOKENS, self.needs)
            self.answers.topped = top_up(block, stage, params, quantised, stats, *words)

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
        with ThreadPoolExecutor(max_workers=self.room.workers) as pool:
            answers = list(pool.map(partial(self.answers.solve, stats=stats), members))
        return list(zip(members, answers, strict=True))

    # ---- outside the blocks

    def _outside(self, quantised: ActStore) -> Iterator[tuple[Group, Solved]]:
        """Tensors outside the blocks (a head that shall be quantised): statistics from the model's own last steps."""
        inside = {slot.name for index in range(len(self.model)) for slot in self.model.block_slots(index)}
        outside = [name for name in self.answers.by_tensor if name not in inside]
        trunk = self.model.load_trunk(self.run.source.read) if outside else {}
        for name in outside:
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


def _whole(slots: list[Slot]) -> bool:
    """Whether a parameter is one stored matrix."""
    return len(slots) == 1 and slots[0].expert is None and slots[0].rows is None


def calibrated(groups: list[Group], wanted: set[str], run: _Run) -> Iterator[tuple[Group, Solved]]:
    """Solves the groups that need calibration, block by block; see the text of this module."""
    for group, solved in Calibrated(groups, run):
        if group.key in wanted:
            yield group, solved
