"""Finding the scales of smooth and awq: one walk of the calibration text through the float model, block by block.

A block's statistics are those of the float model as rotations leave it. Scales change no output, so the next block's inputs do not depend
on them; a resumed walk gives every block the same inputs and finds the same scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fewbit.arch.awq import Round, search
from fewbit.arch.rewrite import Steps, apply_steps, merge, pooled, repeated, scale
from fewbit.arch.rewrite_spaces import End, Space
from fewbit.arch.rewrite_table import needs_of, options_of
from fewbit.arch.smooth import smooth_scales
from fewbit.math.stats import Stats
from fewbit.run.acts import ActStore
from fewbit.run.observe import Observer, Use
from fewbit.run.start import batch_size, block_model, float_states, text_for
from fewbit.solve.table import SOLVERS

if TYPE_CHECKING:
    from fewbit.plan.jobs import Job
    from fewbit.run.engine import _Run
    from fewbit.run.rewrites import RewrittenSource

MIN_TOKENS = 64  # an expert that fewer tokens reached keeps its scale
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Probe = tuple[str, int | None]
"""A parameter of the block by local name, and the expert of it."""


class Walk:
    """Iterating it yields (block, scales by the key of the space) for every block that is not done."""

    def __init__(self, source: RewrittenSource, run: _Run, done: set[int]) -> None:
        self.source, self.run, self.done = source, run, done
        recipe = run.plan.recipe
        self.seed, self.offset = recipe["seed"], source.offset
        self.needs = needs_of(source.scaled)
        self.options: dict[str, dict[str, Any]] = {name: options_of(name, recipe["options"]) for name in source.scaled}
        self.model = block_model(source, run.settings.device, exact=True)
        self.tokens = text_for(source, recipe, run.sinks[0]).tokens
        self.batch = batch_size(self.tokens)
        self.rounded = _jobs_by_tensor(run)

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        todo = [index for index in range(len(self.model)) if index not in self.done]
        if not todo:
            return
        states = float_states(self.model, self.source.read_rotated, self.tokens, self.run, "rewrites")
        with torch.no_grad(), states as (store, kwargs):
            for index in range(todo[-1] + 1):
                stats = self._pass(index, store, kwargs[index], observe=index not in self.done)
                if index not in self.done:
                    yield index, self._decide(index, stats)
                self.run.settings.on_event(
                    {"event": "note", "text": f"rewrites: block {index + 1} of {len(self.model)}"}
                )

    # ---- statistics

    def _spaces(self, index: int) -> list[Space]:
        names = {slot.name for slot in self.model.block_slots(index)}
        kinds = {word for options in self.options.values() for word in str(options["spaces"]).split(",")}
        return [
            space for space in self.source.spaces.scalable(kinds) if any(end.name in names for end in space.readers)
        ]

    def _probe(self, index: int, space: Space) -> list[Probe]:
        """Products whose inputs are the space's: of one reader, a router or dense layer rather than an expert; one per expert of a stack."""
        slots = {slot.name: slot for slot in self.model.block_slots(index)}
        dense = [end for end in space.readers if slots[end.name].expert is None]
        end = next((end for end in dense if end.role == "router"), (dense or list(space.readers))[0])
        local = self.model.local(index, slots[end.name])
        return [(local, expert) for expert in range(space.stack)] if space.stack else [(local, slots[end.name].expert)]

    def _pass(self, index: int, store: ActStore, kwargs: dict[str, Any], observe: bool) -> dict[Probe, Stats]:
        """Takes the hidden states through a float block, in place; statistics of the products that `_probe` names."""
        params = self.model.load_block(index, self.source.read_rotated)
        wanted = {use for space in self._spaces(index) for use in self._probe(index, space)} if observe else set()
        stats: dict[Probe, Stats] = {}

        def take(use: Use) -> None:
            key = (use.param, use.expert)
            if key in wanted:
                stats[key] = stats.get(key, Stats()).add(use.x, needs=self.needs)

        with Observer({name: params[name] for name, _ in wanted}, take):
            for batch in range(len(store)):
                self.run.stop.check()
                hidden = store.get(batch).to(self.model.device)
                arguments = self.model.arguments(kwargs, self.batch, hidden.shape[0])
                store.put(batch, self.model.run_block(index, params, hidden, arguments))
        return stats

    # ---- decisions

    def _decide(self, index: int, stats: dict[Probe, Stats]) -> dict[str, torch.Tensor]:
        """Scales of a block's spaces: smooth first, then awq on what smooth leaves; each sees the spaces decided before it."""
        made: dict[str, torch.Tensor] = {}
        for name in self.source.scaled:
            for space in self._spaces(index):
                if space.kind not in str(self.options[name]["spaces"]).split(","):
                    continue
                parts = [stats.get(use) for use in self._probe(index, space)]
                current = made.get(space.key, torch.ones(space.stack or 1, space.size, dtype=torch.float64)).reshape(
                    -1, space.size
                )
                steps = merge(*(scale(self._by_key[key], s, self.offset) for key, s in made.items()))
                rows = [
                    self._one(name, space, expert, part, current[expert], steps) for expert, part in enumerate(parts)
                ]
                total = current * torch.stack(rows)
                made[space.key] = self._stored_exactly(space, total if space.stack else total[0])
        return made

    @property
    def _by_key(self) -> dict[str, Space]:
        return {space.key: space for space in self.source.spaces.all}

    def _one(
        self, name: str, space: Space, expert: int, stats: Stats | None, current: torch.Tensor, steps: Steps
    ) -> torch.Tensor:
        """Scales of one instance (one expert of a stack), over what `current` does already; float64 [size]."""
        if stats is None or stats.count < MIN_TOKENS:
            self._note(
                space, f"{name}: kept as it is, only {stats.count if stats else 0} calibration tokens reached it"
            )
            return torch.ones(space.size, dtype=torch.float64)
        reader = space.readers[0]
        weights = [(end, self._matrix(end, steps, expert if space.stack else None)) for end in space.readers]
        if name == "smooth":
            largest = torch.stack([pooled(w.abs().amax(0), space, end) for end, w in weights]).amax(0)
            return smooth_scales(
                pooled(stats.held("absmax").cpu(), space, reader) / current, largest, float(self.options[name]["alpha"])
            )
        seen = repeated(current, space, reader)
        gram = stats.held("gram").cpu().double() / seen / seen.unsqueeze(-1)
        mean = pooled(stats.held("mean_abs").cpu(), space, reader) / current
        jobs = [(w, self._rounding(self.rounded[end.name])) for end, w in weights if end.name in self.rounded]
        if not jobs:
            return torch.ones(space.size, dtype=torch.float64)
        found = search(jobs, mean, gram, int(self.options[name]["steps"]), lambda s: repeated(s, space, reader))
        gain = 1 - found.loss / found.loss_before if found.loss_before else 0.0
        self._note(space, f"awq: power {found.power:g}, {gain:.1%} less output error")
        return found.scales

    def _matrix(self, end: End, steps: Steps, expert: int | None) -> torch.Tensor:
        """A reader as float32 [out, in], with the scales decided so far."""
        tensor = apply_steps(self.source.read_rotated(end.name), steps.get(end.name, ()))
        tensor = tensor if expert is None else tensor[expert]
        matrix = (tensor.transpose(-1, -2) if end.transposed else tensor).float()
        return matrix.reshape(-1, matrix.shape[-1])

    def _rounding(self, job: Job) -> Round:
        """Weights as the job's scheme stores them, chosen by their values alone."""
        scheme, rtn = job.wanted.weights_only, SOLVERS["rtn"]
        options = self.run.options_for(job) if job.solver == "rtn" else {}
        return lambda w: rtn(w, None, scheme, seed=self.seed, options=options).q.dequantize()

    def _stored_exactly(self, space: Space, s: torch.Tensor) -> torch.Tensor:
        """The scales nearest to s whose division of the norm's gain is exact in the dtype that the gain is stored in."""
        if not space.gains:
            return s
        name = space.gains[0]
        gain = self.source.read_rotated(name).double() + self.offset
        dtype = DTYPES.get(self.source.manifest[name].dtype, torch.float32)
        stored = (gain / s - self.offset).to(dtype).double() + self.offset
        exact = gain / stored
        return torch.where(
            (gain == 0) | (stored == 0) | ~((exact / s > 0.5) & (exact / s < 2)), torch.ones_like(s), exact
        )

    def _note(self, space: Space, text: str) -> None:
        self.run.notes[space.key] = (*self.run.notes.get(space.key, ()), text)


def _jobs_by_tensor(run: _Run) -> dict[str, Job]:
    """Source tensor -> the first output's job that quantises it."""
    found: dict[str, Job] = {}
    for output in run.plan.outputs:
        for job in output.quantised:
            for name in job.reads:
                found.setdefault(name, job)
    return found
