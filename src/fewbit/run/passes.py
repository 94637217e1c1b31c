"""One stream of hidden states through one block, stage by stage, each matrix product computed once.

A block is solved stage by stage (q k v, then o, then gate up, then down), and each stage wants its inputs as the stages before it, already
quantised, make them. Running the block from its start for every stage computes the first products five times. Here what a
stage took in or gave out is kept, and later passes answer its products from memory:

    pass for stage k     products of stages before k - 1: their kept outputs, or nothing at all (a tensor of NaN) where nobody looks
                         products of stage k - 1: computed now that its weights are settled, on the inputs kept in its own pass
                         products of stage k: seen, and the pass stops

Where memory is short, inputs that are much wider than those of the stage before (what gate and up make) are not kept but made again from that stage's own
inputs: one product more for most of the memory.

What to keep, and what each pass can leave out, `run.keeping` has found out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from fewbit.run.acts import ActStore
from fewbit.run.hf import Params
from fewbit.run.keeping import Kept, from_memory
from fewbit.run.lanes import in_lanes
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.skipping import Skipping, nothing
from fewbit.run.stages import Block, Stage


class Stream:
    """One stream through one block, called for stage 0, 1, … over all batches, then `finish`.

    Args:
        block: the block; params: its parameters, by local name, read anew at every pass.
        hidden: its inputs, replaced by its outputs as batches are finished.
        stages: the stages; kept: what `survey` found, or None.
        files: path of the files of what is kept, to which names are appended, or None to keep it in memory.
    """

    def __init__(
        self,
        block: Block,
        params: Params,
        hidden: ActStore,
        stages: list[Stage],
        kept: list[Kept] | None,
        files: Path | None = None,
    ) -> None:
        self.block, self.params, self.hidden, self.stages, self.kept, self.files = (
            block,
            params,
            hidden,
            stages,
            kept,
            files,
        )
        self.stage_of = {param: k for k, stage in enumerate(stages) for param in stage.params}
        self.left = set(range(len(hidden)))  # batches that were not run to the end
        self.lock = threading.Lock()
        self.stores: dict[tuple[int, str], ActStore] = {}
        """(stage, "" for its inputs or the parameter whose products they are)"""

    def inputs(self, stage: int, batch: int, finish: bool = False) -> dict[int | None, torch.Tensor]:
        """What the weights of a stage are multiplied with for one batch, per expert; with `finish` the batch is also run to its end."""
        finish = finish and self.kept is not None  # else `finish` is a pass of its own
        found, out = self._seen(stage, batch, stop=not finish, keep=not finish)
        if finish and out is not None:
            self._put(batch, out)
        return found

    def outputs(self, stage: int, batch: int) -> tuple[dict[int | None, torch.Tensor], torch.Tensor]:
        """As `inputs`, and what comes out of the block with the stage's weights as they are now; the batch stays unfinished."""
        found, out = self._seen(stage, batch, stop=False, keep=True)
        return found, cast(torch.Tensor, out)  # the pass did not stop

    def _seen(
        self, stage: int, batch: int, stop: bool, keep: bool
    ) -> tuple[dict[int | None, torch.Tensor], torch.Tensor | None]:
        """The inputs of a stage, kept if a later pass needs them, and, unless the pass stops there, the block's outputs."""
        found: dict[int | None, torch.Tensor] = {}
        first, experts = self.stages[stage].params[0], self.stages[stage].experts

        def take(use: Use) -> torch.Tensor | None:
            if self.kept is not None and self.stage_of[use.param] == stage - 1:
                return self._fed(stage - 1, batch, use)
            if use.param == first and use.expert not in found:
                found[use.expert] = use.x
                if not experts and stop:
                    raise StopForward
            return None

        out = None
        with contextlib.suppress(StopForward):
            out = self._pass(stage, batch, take, stop)
        if keep and self.kept is not None and self.kept[stage].inputs:
            self._keep(stage, "", batch, found[None])
        return found, out

    def forget(self, stage: int) -> None:
        """Frees inputs that no pass from this stage on asks for."""
        for key in [key for key in self.stores if not key[1] and key[0] < stage - 1]:
            store = self.stores.pop(key)
            if store not in self.stores.values():
                store.close()

    def finish(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Runs what is left to the end of the block; outputs take the place of the inputs."""
        last = len(self.stages)

        def run(batch: int) -> None:
            def feed(use: Use) -> torch.Tensor | None:
                return self._fed(last - 1, batch, use) if self.kept and self.stage_of[use.param] == last - 1 else None

            self._put(batch, self._pass(last, batch, feed))

        self.forget(last)
        left = sorted(self.left)
        in_lanes(len(left), self.block.lanes, lambda number: run(left[number]), check_stop)
        self.close()

    def close(self) -> None:
        """Frees what was kept."""
        for store in self.stores.values():
            store.close()
        self.stores.clear()

    def _put(self, batch: int, out: torch.Tensor) -> None:
        self.hidden.put(batch, out)
        self.left.discard(batch)

    def _pass(
        self, stage: int, batch: int, on_use: Callable[[Use], torch.Tensor | None], stop: bool = False
    ) -> torch.Tensor:
        """Run the block; products of stages before `stage - 1` are answered from what is kept."""
        tracked = {param: self.params[param] for param in self.stage_of}
        kept = self.kept
        if kept is None:
            return self.block.run(self.params, self.hidden.get(batch), Observer(tracked, on_use))

        def answer(use: Use) -> torch.Tensor | None:
            k, shape = self.stage_of[use.param], use.x.shape[:-1]
            if not from_memory(kept, k, stage):
                return None
            if not kept[k].outputs:
                return nothing(use.x, (*shape, kept[k].widths[use.param]))
            return self.stores[k, use.param].get(batch).to(use.x.device).reshape(*shape, -1)

        def keep(use: Use, product: torch.Tensor) -> None:
            k = self.stage_of[use.param]
            if k == stage - 1 and kept[k].outputs and stage < len(self.stages):
                self._keep(k, use.param, batch, product)

        last = stage == len(kept)
        less = kept[-1 if last else stage].needless.get("finish" if last else "stop" if stop else "on", {})
        return self.block.run(self.params, self.hidden.get(batch), Skipping(tracked, on_use, keep, answer, less))

    def _fed(self, stage: int, batch: int, use: Use) -> torch.Tensor | None:
        """The true inputs of a stage whose own pass is over; None when they come of themselves."""
        if self.kept is None or not self.kept[stage].inputs:
            return None
        return self.stores[stage, ""].get(batch).to(use.x.device).reshape(use.x.shape)

    def _keep(self, stage: int, param: str, batch: int, value: torch.Tensor) -> None:
        start, stop = self.hidden.span(batch)
        store = self._store(stage, param, value.shape[-1])
        store.put(batch, value.reshape(stop - start, self.hidden.shape[1], -1))

    def _store(self, stage: int, param: str, width: int) -> ActStore:
        """Where a stage's inputs ("") or products are kept, made when first asked for."""
        with self.lock:
            if (stage, param) not in self.stores:
                path = None if self.files is None else self.files.with_name(f"{self.files.name}-{stage}-{param}.live")
                in_place = param and self.kept is not None and self.kept[stage].in_place
                words = ((*self.hidden.shape[:2], width), self.hidden.dtype, self.hidden.batch, path)
                self.stores[stage, param] = self.stores[stage, ""] if in_place else ActStore(*words)
            return self.stores[stage, param]
