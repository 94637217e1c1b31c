"""One stream of hidden states through one block, stage by stage, each matrix product computed once.

A block is solved stage by stage (q k v, then o, then gate up, then down), and each stage wants its inputs as the stages before it, already
quantised, make them. Running the block from its start for every stage computes the first products five times. Here what a
stage took in or gave out is kept, and later passes answer its products from memory:

    pass for stage k     products of stages before k - 1: their kept outputs, or nothing at all (a tensor of NaN) where nobody looks
                         products of stage k - 1: computed now that its weights are settled, on the inputs kept in its own pass
                         products of stage k: seen, and the pass stops

Inputs that are much wider than those of the stage before (what gate and up make) are not kept but made again from that stage's own inputs: one
product more for most of the memory.

Which outputs nobody looks at (those of q, k and v once the inputs of o are kept) is not read off names but tried: `survey` runs one sequence
with NaN in their place and compares. What does not pass is kept; a block with experts is run from its start each time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map

from fewbit.plan.calibrated import WIDE
from fewbit.run.acts import ActStore
from fewbit.run.hf import Params
from fewbit.run.lanes import in_lanes
from fewbit.run.observe import Observer, StopForward, Use
from fewbit.run.stages import Block, Stage

CHANGE = 8.0  # of a product that is tried, times the size of the output
STRAIGHT = 0.02  # part of what such a change does that may be anything but itself: rounding in 16 bits

Run = Callable[[torch.Tensor], torch.Tensor]
"""A block with its parameters and arguments, on hidden states [sequences, length, width]."""


@dataclass(frozen=True)
class Kept:
    """What later passes need of one stage.

    Attributes:
        outputs: whether products that are done must be answered truly; if not, with NaN.
        inputs: whether its inputs must be kept from its own pass to the next, because earlier products are NaN by then.
        width: channels of its inputs; widths: of its products, by parameter.
        again: whether its inputs are made again in the next pass from the products of the stage before, instead of being kept.
        adds: how much of its one product comes out of the block, output = rest + adds * product; 0 where that is not so, or not the last stage.
    """

    outputs: bool
    inputs: bool
    width: int
    widths: dict[str, int]
    again: bool = False
    adds: float = 0.0

    @property
    def in_place(self) -> bool:
        """Whether what it gives out may take the place of what it took in: its one product reads each batch for the last time."""
        return self.inputs and list(self.widths.values()) == [self.width]


def survey(block: Block, params: Params, stages: list[Stage], hidden: torch.Tensor) -> list[Kept] | None:
    """What to keep of each stage, tried on hidden states [1, length, width]; None when the block must be run from its start every time."""
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

    with Observer(tracked, on_output=note):
        true = run(hidden)
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
        again = poisoned and k > 0 and not found[k - 1].inputs and width >= WIDE * found[k - 1].width
        adds = _added(run, tracked, names[0], products[names[0]], hidden, true) if last and len(names) == 1 else 0.0
        found.append(Kept(looked_at, poisoned and not again, width, widths, again, adds))
    return found


def _added(
    run: Run, tracked: Params, name: str, product: torch.Tensor, hidden: torch.Tensor, true: torch.Tensor
) -> float:
    """The factor with which a block adds a product to its output, tried with a large random change of it; 0 where it does more than that."""
    if product.numel() != true.numel() or product.shape[-1] != true.shape[-1]:
        return 0.0
    size = CHANGE * max(float(true.float().std()), float(product.float().std()))
    noise = torch.randn(product.shape, generator=torch.Generator().manual_seed(0)).to(product) * size
    with Observer({name: tracked[name]}, on_output=lambda use, found: found + noise):
        moved = (run(hidden) - true).float().flatten()
    noise = noise.float().flatten()
    factor = float(moved @ noise / (noise @ noise))
    off = float((moved - factor * noise).norm() / moved.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return factor if off < STRAIGHT and factor else 0.0


def _nan(like: torch.Tensor, shape: tuple[int, ...] | None = None, device: torch.device | None = None) -> torch.Tensor:
    """NaN in place of a tensor: one number, expanded."""
    shape = tuple(like.shape) if shape is None else shape
    one = torch.full((1,) * len(shape), torch.nan, dtype=like.dtype, device=device or like.device)
    return one.expand(shape)


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
        return products[use.param] if stage < k and found[stage].outputs else _nan(products[use.param])

    def feed(use: Use) -> torch.Tensor | None:
        return inputs[use.param] if stage_of[use.param] == k + 1 else None

    try:
        with _Skipping(tracked, feed, None, answer):
            out = run(hidden)
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
        return products[use.param] if found[stage_of[use.param]].outputs else _nan(products[use.param])

    def take(use: Use) -> None:
        if stage_of[use.param] == k:
            seen.append(use.x)
            raise StopForward

    try:
        with contextlib.suppress(StopForward), _Skipping(tracked, take, None, answer):
            run(hidden)
    except (RuntimeError, ValueError, IndexError):
        return True
    return not seen or not bool(torch.isfinite(seen[0]).all())


class _Skipping(Observer):
    """An observer that may answer a product itself; what is computed from nothing but such NaN is not computed either."""

    def __init__(
        self,
        tracked: Params,
        on_use: Callable[[Use], torch.Tensor | None] | None,
        on_output: Callable[[Use, torch.Tensor], None] | None,
        answer: Callable[[Use], torch.Tensor | None],
    ) -> None:
        super().__init__(tracked, on_use, on_output)
        self._answer = answer
        self._nothing: dict[int, torch.Tensor] = {}  # by address of the one NaN behind each

    def product(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = self._answer(use)
        if found is not None and found.untyped_storage().nbytes() == found.element_size():
            self._nothing[found.untyped_storage().data_ptr()] = found
        return compute() if found is None else found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._nothing and self.use_of(func, args)[1] is None and self._touched(args, kwargs):
            like = _like(func, args, kwargs)
            if like is not None:
                found = _nan(like, device=self._device)
                self._nothing[found.untyped_storage().data_ptr()] = found
                return found
        return super().__torch_function__(func, types, args, kwargs)

    def _touched(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        for item in (*args, *kwargs.values()):
            for part in item if isinstance(item, (list, tuple)) else (item,):
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() in self._nothing:
                    self._device = part.device
                    return True
        return False


_LIKE: dict[Any, torch.Tensor | None] = {}


def _like(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A tensor without data, of the shape and type that a function gives; None when it gives no floating tensor.

    Finding that out takes a millisecond, so answers are kept: the next batch asks the same.
    """
    key = (func, _spelt(args), _spelt(kwargs))
    if key not in _LIKE:
        try:
            found = func(*tree_map(_shell, args), **tree_map(_shell, kwargs))
        except RuntimeError:  # no kernel for tensors without data: the product is computed after all
            found = None
        if len(_LIKE) >= 4096:
            _LIKE.clear()
        _LIKE[key] = found if isinstance(found, torch.Tensor) and found.is_floating_point() else None
    return _LIKE[key]


def _spelt(item: Any) -> Any:
    """Arguments as something hashable, tensors by shape, strides and type."""
    if isinstance(item, torch.Tensor):
        return (item.shape, item.stride(), item.dtype)
    if isinstance(item, (list, tuple)):
        return tuple(_spelt(part) for part in item)
    if isinstance(item, dict):
        return tuple((name, _spelt(part)) for name, part in item.items())
    return repr(item)


def _shell(item: Any) -> Any:
    """A tensor without data in place of a tensor."""
    return item.to("meta") if isinstance(item, torch.Tensor) else item


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
            out = self._pass(stage, batch, take)
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

    def _pass(self, stage: int, batch: int, on_use: Callable[[Use], torch.Tensor | None]) -> torch.Tensor:
        """Run the block; products of stages before `stage - 1` are answered from what is kept."""
        tracked = {param: self.params[param] for param in self.stage_of}
        kept = self.kept
        if kept is None:
            with Observer(tracked, on_use):
                return self.block.run(self.params, self.hidden.get(batch))

        def answer(use: Use) -> torch.Tensor | None:
            k, shape = self.stage_of[use.param], use.x.shape[:-1]
            if k >= stage - 1 or (k == stage - 2 and kept[stage - 1].again):
                return None
            if not kept[k].outputs:
                return _nan(use.x, (*shape, kept[k].widths[use.param]))
            return self.stores[k, use.param].get(batch).to(use.x.device).reshape(*shape, -1)

        def keep(use: Use, product: torch.Tensor) -> None:
            k = self.stage_of[use.param]
            if k == stage - 1 and kept[k].outputs and stage < len(self.stages):
                self._keep(k, use.param, batch, product)

        with _Skipping(tracked, on_use, keep, answer):
            return self.block.run(self.params, self.hidden.get(batch))

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


def kept_bytes(kept: list[Kept], tokens: int, itemsize: int) -> int:
    """Most bytes that one stream keeps at a time, at least as much as it does."""
    inputs = [k.width for k in kept if k.inputs and not (k.in_place and k.outputs)]
    outputs = sum(sum(k.widths.values()) for k in kept[:-1] if k.outputs)
    return tokens * itemsize * (max(inputs, default=0) + outputs)
