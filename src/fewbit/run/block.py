"""The calibrated engine: a model solved block by block, from disk, in bounded memory.

For each block, in order:

    read its float weights
    for each stage (tensors that read one space: q k v, then o, then gate up, then down):
        run the calibration sequences through the block, earlier stages already quantised, and collect the stage's statistics
        solve its tensors, hand them to the sinks, put the dequantised weights in their place
    run the sequences through the finished block; forget it

Two streams of hidden states are kept where a solver asks for `cross_gram`: one through the quantised model, one through the float
model, so that each block also corrects what the blocks before it got wrong. Stages are found by watching which matrix products share
an input, not by names. After each block the hidden states are saved, so a killed run goes on with the block it was in and ends with
the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbit.arch.infer import facts
from fewbit.base.errors import FewbitError, InputError
from fewbit.formats.gguf.ops import apply_quantised
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.run.acts import ActStore
from fewbit.run.calib import Calibration, calibration
from fewbit.run.fisher import fisher_pass, load_grams
from fewbit.run.hf import BlockModel, Params, Slot
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.static import with_inputs
from fewbit.solve.table import SOLVERS, Solved

if TYPE_CHECKING:
    from fewbit.plan.jobs import Job
    from fewbit.run.engine import Group, _Run

BATCH_TOKENS = 4096
BIG_MODEL = 2_000_000_000  # parameters from which blocks are computed in bfloat16
SPILL_SHARE = 0.3  # share of the budget that activations may take before they go to disk
FISHER_SAMPLES = 64  # sequences of the backward pass
MIN_EXPERT_TOKENS = 64  # below this an expert's statistics are topped up or replaced, and the report says so

Key = tuple[str, int | None]
"""A parameter of the block by local name, and the expert of it."""


@dataclass(frozen=True)
class Stage:
    """Parameters of a block that are solved together because they see the same inputs."""

    params: tuple[str, ...]
    experts: bool = False


class Calibrated:
    """One calibrated pass over a model; iterating it yields (group, solved)."""

    def __init__(self, groups: list[Group], wanted: set[str], run: _Run) -> None:
        self.run, self.wanted = run, wanted
        recipe = run.plan.recipe
        source = run.source
        dtype = torch.bfloat16 if source.manifest.numel >= BIG_MODEL else torch.float32
        self.model = BlockModel(source.config, source.manifest, dtype=dtype, device=run.settings.device)
        self.by_tensor: dict[str, list[Group]] = {}
        for group in groups:
            if group.job.needs:
                for name in group.job.reads:
                    self.by_tensor.setdefault(name, []).append(group)
        self.known = facts(source.manifest, source.config)
        self.pieces: dict[str, dict[str, Solved]] = {}
        self.needs = frozenset(run.plan.needs)
        vocab = self._vocabulary()
        self.text: Calibration = calibration(
            recipe["calib"] or "default",
            source.root,
            recipe["calib_samples"],
            recipe["calib_length"],
            recipe["seed"],
            vocab,
        )
        self.scratch: Path = run.sinks[0].scratch
        self._check_same_text()
        self.grams: dict[str, torch.Tensor] = {}
        self.batch = min(self.text.tokens.shape[0], max(1, BATCH_TOKENS // self.text.tokens.shape[1]))

    def _vocabulary(self) -> int:
        sizes = [
            info.shape[0]
            for name, info in self.run.source.manifest.items()
            if (len(info.shape) == 2 and "emb" in name) or "wte" in name
        ]
        return max(sizes, default=1 << 62)

    def _check_same_text(self) -> None:
        """A resumed run must see the tokens that the interrupted one saw."""
        before = self.run.sinks[0].notes.get("calibration", {}).get("digest")
        if before is not None and before != self.text.digest:
            raise InputError(
                "FB-E0411", "the calibration text has changed since this run was interrupted", file=self.scratch
            )
        if before is None:
            self.run.sinks[0].note("calibration", {"digest": self.text.digest, "summary": self.text.summary})
        for warning in self.text.warnings:
            self.run.settings.on_event({"event": "note", "text": f"warning: {warning}"})

    # ---- the walk

    def __iter__(self) -> Iterator[tuple[Group, Solved]]:
        with contextlib.ExitStack() as stack, torch.no_grad():
            trunk = self.model.load_trunk(self.run.source.read)
            self._weigh_by_loss(trunk)
            entries, quantised, floats = self._enter(trunk, stack)
            first = self._resume(quantised, floats)
            for index in range(first, len(self.model)):
                yield from self._block(index, entries, quantised, floats)
                self._checkpoint(index, quantised, floats)
            yield from self._outside(trunk, quantised, floats)

    def _enter(
        self, trunk: Params, stack: contextlib.ExitStack
    ) -> tuple[list[dict[str, Any]], ActStore, ActStore | None]:
        """Hidden states before block 0 for all sequences, and the blocks' arguments (equal for all batches of one size)."""
        tokens = self.text.tokens
        entry = self.model.enter(trunk, tokens[: self.batch])
        width = entry.hidden.shape[-1]
        shape = (tokens.shape[0], tokens.shape[1], width)
        streams = 2 if "cross_gram" in self.needs else 1
        nbytes = shape[0] * shape[1] * shape[2] * self.model.dtype.itemsize * streams
        spill = nbytes > SPILL_SHARE * self.run.settings.ram
        stores = []
        for name in ("quantised", "float")[:streams]:
            store = ActStore(shape, self.model.dtype, self.batch, self.scratch / f"acts-{name}.live" if spill else None)
            stack.callback(store.close)
            stores.append(store)
        for index in range(len(stores[0])):
            start, stop = stores[0].span(index)
            hidden = self.model.enter(trunk, tokens[start:stop]).hidden
            for store in stores:
                store.put(index, hidden)
        return entry.kwargs, stores[0], stores[1] if streams == 2 else None

    def _weigh_by_loss(self, trunk: Params) -> None:
        """Runs the backward pass once, where a solver uses it; its grams stay in the scratch folder."""
        if not any(
            self.run.options_all(group.job).get("loss_weighting")
            for groups in self.by_tensor.values()
            for group in groups
        ):
            return
        if (self.scratch / "fisher-done").exists():
            return
        tracked = [
            {
                self.model.local(index, slot): slot.name
                for slot in self.model.block_slots(index)
                if slot.name in self.by_tensor and slot.expert is None
            }
            for index in range(len(self.model))
        ]
        tokens = self.text.tokens[:FISHER_SAMPLES]
        width = max(info.shape[-1] for info in self.run.source.manifest.values() if info.shape)
        spill = (
            tokens.numel() * width * self.model.dtype.itemsize * (len(self.model) + 2)
            > SPILL_SHARE * self.run.settings.ram
        )

        def told(index: int) -> None:
            self.run._check_stop()

        fisher_pass(
            self.model, self.run.source.read, trunk, tokens, tracked, self.scratch,
            batch=self.batch, seed=self.run.plan.recipe["seed"], spill=spill, on_block=told,
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

    def _block(
        self, index: int, entries: list[dict[str, Any]], quantised: ActStore, floats: ActStore | None
    ) -> Iterator[tuple[Group, Solved]]:
        model = self.model
        params = model.load_block(index, self.run.source.read)
        originals = {name: value.clone() for name, value in params.items()} if floats is not None else params
        kwargs = entries[index]
        slots = {slot.name: slot for slot in model.block_slots(index) if slot.name in self.by_tensor}
        by_param: dict[str, list[Slot]] = {}
        for slot in slots.values():
            by_param.setdefault(model.local(index, slot), []).append(slot)
        solved_names: set[str] = set()
        self.grams = load_grams(self.scratch, index)
        for stage in self._stages(index, params, by_param, quantised.get(0), kwargs):
            stats = self._collect(index, stage, params, originals, kwargs, quantised, floats)
            members = [slot for name in stage.params for slot in by_param[name]]
            with ThreadPoolExecutor(max_workers=self.run.room.workers) as pool:
                answers = list(pool.map(lambda slot: self._solve(index, slot, stats), members))  # noqa: B023  used at once
            for slot, found in zip(members, answers, strict=True):
                self._put_back(params, model.local(index, slot), slot, found[0][1].q)
                solved_names.add(slot.name)
                for group, piece in found:
                    yield from self._assembled(group, slot.name, piece)
        for name in slots.keys() - solved_names:  # never multiplied by: no statistics exist
            yield from self._without_stats(name, "no matrix product of the calibration pass used it")
        self._advance(index, params, kwargs, quantised)
        if floats is not None:
            self._advance(index, originals, kwargs, floats)

    def _stages(
        self, index: int, params: Params, by_param: dict[str, list[Slot]], hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> list[Stage]:
        """Which parameters share inputs, in the order in which the block uses them, from one pass over a batch."""
        uses: list[Use] = []
        with Observer({name: params[name] for name in by_param}, lambda use: uses.append(use)):
            self.model.run_block(
                index, params, hidden[:1].to(self.model.device), self.model.arguments(kwargs, self.batch, 1)
            )
        stages: list[Stage] = []
        last: torch.Tensor | None = None
        seen: set[str] = set()
        for use in uses:
            if use.param in seen:
                continue
            seen.add(use.param)
            same = last is not None and use.x.data_ptr() == last.data_ptr() and use.x.shape == last.shape
            if same and stages and use.expert is None and not stages[-1].experts:
                stages[-1] = Stage((*stages[-1].params, use.param))
            else:
                stages.append(Stage((use.param,), experts=use.expert is not None))
            last = use.x
        return stages

    def _collect(
        self,
        index: int,
        stage: Stage,
        params: Params,
        originals: Params,
        kwargs: dict[str, Any],
        quantised: ActStore,
        floats: ActStore | None,
    ) -> dict[int | None, Stats]:
        """Statistics of a stage's inputs over all sequences; per expert for stacks."""
        stats: dict[int | None, Stats] = {}
        paired = floats is not None and not stage.experts  # experts see other tokens in the two streams
        needs = self.needs if paired else self.needs - {"cross_gram"}
        for batch in range(len(quantised)):
            self.run._check_stop()
            seen = self._inputs(index, stage, params, kwargs, quantised.get(batch))
            other = (
                self._inputs(index, stage, originals, kwargs, floats.get(batch))
                if paired and floats is not None
                else {}
            )
            for expert, x in seen.items():
                stats[expert] = stats.get(expert, Stats()).add(x, other.get(expert), needs=frozenset(needs))
        return stats

    def _inputs(
        self, index: int, stage: Stage, params: Params, kwargs: dict[str, Any], hidden: torch.Tensor
    ) -> dict[int | None, torch.Tensor]:
        """What the stage's weights are multiplied with for one batch."""
        found: dict[int | None, torch.Tensor] = {}

        def take(use: Use) -> None:
            if use.expert not in found:
                found[use.expert] = use.x
            if not stage.experts:
                raise StopForward

        with contextlib.suppress(StopForward), Observer({stage.params[0]: params[stage.params[0]]}, take):
            self.model.run_block(
                index, params, hidden.to(self.model.device), self.model.arguments(kwargs, self.batch, hidden.shape[0])
            )
        return found

    def _advance(self, index: int, params: Params, kwargs: dict[str, Any], store: ActStore) -> None:
        for batch in range(len(store)):
            hidden = store.get(batch)
            store.put(
                batch,
                self.model.run_block(
                    index,
                    params,
                    hidden.to(self.model.device),
                    self.model.arguments(kwargs, self.batch, hidden.shape[0]),
                ),
            )

    # ---- one tensor

    def _solve(self, index: int, slot: Slot, stats: dict[int | None, Stats]) -> list[tuple[Group, Solved]]:
        """All answers for one stored tensor: one per scheme that the outputs ask for. The first is the one that is propagated."""
        return [
            (group, self._answer(group.job, slot, self._matrix(slot.name), stats))
            for group in self.by_tensor[slot.name]
        ]

    def _matrix(self, name: str) -> torch.Tensor:
        """A stored weight as solvers want it, [..., out, in]: transforms that move whole rows come after solving."""
        weight = self.run.source.read(name)
        turned = self.known[name].transposed
        return (weight.transpose(-1, -2).contiguous() if turned else weight).to(self.model.device)

    def _assembled(self, group: Group, name: str, piece: Solved) -> Iterator[tuple[Group, Solved]]:
        """A job's answer once all the tensors that it is made of are solved, rows moved as its output wants them."""
        pieces = self.pieces.setdefault(group.key, {})
        pieces[name] = piece
        if len(pieces) < len(group.job.reads):
            return
        del self.pieces[group.key]
        ordered = [pieces[read] for read in group.job.reads]
        rest = tuple(op for op in group.job.ops if op != "transpose")
        q = apply_quantised(rest, [one.q for one in ordered]) if rest else ordered[0].q
        notes = tuple(dict.fromkeys(note for one in ordered for note in one.notes))
        yield group, Solved(q, sum(one.loss for one in ordered), notes)

    def _answer(self, job: Job, slot: Slot, weight: torch.Tensor, stats: dict[int | None, Stats]) -> Solved:
        if weight.dim() == 3 and slot.expert is None and set(stats) != {None}:
            parts = [self._one(job, weight[e], stats.get(e), f"expert {e}") for e in range(weight.shape[0])]
            assert job.scheme is not None
            seen = [one.absmax.max() for one in stats.values() if one.absmax is not None]
            largest = Stats(absmax=torch.stack(seen)) if seen else None
            q = with_inputs(
                stack_experts(job.scheme, tuple(weight.shape), [part.q for part in parts]), job.scheme, largest
            )
            return Solved(
                q, sum(part.loss for part in parts), tuple(dict.fromkeys(n for part in parts for n in part.notes))
            )
        label = "" if slot.expert is None else f"expert {slot.expert}"
        return self._one(job, weight, stats.get(slot.expert), label)

    def _one(self, job: Job, weight: torch.Tensor, stats: Stats | None, label: str) -> Solved:
        """One matrix, with the recipe's solver, or by its weights alone when too few tokens reached it."""
        count = stats.count if stats is not None else 0
        solver = SOLVERS[job.solver]
        where = f"{label}: " if label else ""
        try:
            if count < (MIN_EXPERT_TOKENS if label else 1):
                fallback = SOLVERS["rtn"](weight, None, job.scheme, seed=self.run.plan.recipe["seed"])
                return replace(fallback, notes=(f"{where}fallback to rtn, only {count} calibration tokens reached it",))
            missing = [need for need in solver.needs if getattr(stats, need, None) is None]
            if missing == ["cross_gram"] and stats is not None:
                stats = replace(stats, cross_gram=stats.gram)  # no second stream here: no drift to correct
            if stats is not None and job.name in self.grams and not label:
                stats = replace(stats, out_gram=self.grams[job.name].to(weight.device))
            found = solver(
                weight, stats, job.scheme, seed=self.run.plan.recipe["seed"], options=self.run.options_for(job)
            )
        except FewbitError as error:
            if error.tensor is None:
                error.tensor = job.name
            raise
        counted = (f"{where}{count} calibration tokens",) if label else ()
        return replace(found, q=with_inputs(found.q, job.scheme, stats), notes=(*counted, *found.notes))

    def _put_back(self, params: Params, local: str, slot: Slot, q: QTensor) -> None:
        """Replaces a weight of the running block by what its codes stand for."""
        value = q.dequantize()
        if self.known[slot.name].transposed:
            value = value.transpose(-1, -2)
        slot.view(params[local]).copy_(value.to(self.model.dtype))

    def _without_stats(self, name: str, why: str) -> Iterator[tuple[Group, Solved]]:
        for group in self.by_tensor[name]:
            found = SOLVERS["rtn"](self._matrix(name), None, group.job.scheme, seed=self.run.plan.recipe["seed"])
            yield from self._assembled(group, name, replace(found, notes=(f"rounded to nearest: {why}",)))

    # ---- outside the blocks

    def _outside(self, trunk: Params, quantised: ActStore, floats: ActStore | None) -> Iterator[tuple[Group, Solved]]:
        """Tensors outside the blocks (a head that shall be quantised): statistics from the model's own last steps."""
        inside = {slot.name for index in range(len(self.model)) for slot in self.model.block_slots(index)}
        for name in [name for name in self.by_tensor if name not in inside]:
            slot = self.model.slots.get(name)
            stats: dict[int | None, Stats] = {}
            for batch in range(len(quantised)) if slot is not None else ():
                start, stop = quantised.span(batch)
                seen: list[torch.Tensor] = []
                with (
                    contextlib.suppress(StopForward),
                    Observer({name: trunk[slot.param]}, partial(self._seen, seen)),
                ):
                    self.model.leave(trunk, self.text.tokens[start:stop], quantised.get(batch))
                for x in seen:
                    stats[None] = stats.get(None, Stats()).add(x, x, needs=self.needs)
            if slot is None or not stats:
                yield from self._without_stats(name, "no matrix product of the calibration pass used it")
            else:
                for group, piece in self._solve(len(self.model), slot, stats):
                    yield from self._assembled(group, name, piece)

    def _seen(self, seen: list[torch.Tensor], use: Use) -> None:
        seen.append(use.x)
        raise StopForward


def calibrated(groups: list[Group], wanted: set[str], run: _Run) -> Iterator[tuple[Group, Solved]]:
    """Solves the groups that need calibration, block by block; see the text of this module."""
    for group, solved in Calibrated(groups, wanted, run):
        if group.key in wanted:
            yield group, solved


def stack_experts(scheme: Scheme, shape: tuple[int, ...], parts: list[QTensor]) -> QTensor:
    """One stacked tensor [experts, out, in] from the quantised experts."""

    def stacked(name: str, inner: Scheme | None) -> torch.Tensor | QTensor | None:
        stored = [getattr(part, name) for part in parts]
        if stored[0] is None or inner is None:
            return None
        if isinstance(stored[0], QTensor):
            return stack_experts(inner, scheme.block_counts(shape), stored)
        return torch.stack(stored)

    codes = torch.stack([part.codes for part in parts])
    return QTensor(
        scheme,
        shape,
        codes,
        stacked("scale", scheme.scale),
        stacked("code_shift", scheme.code_shift),
        stacked("value_shift", scheme.value_shift),
    )
