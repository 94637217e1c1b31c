"""FP8 scales of cached keys and values: the largest magnitude that each attention puts into its cache, over what E4M3 reaches.

    open_source ─> rewritten ─> KvSource ─> plan, engine, formats: two more tensors per attention, `x.k_scale` and `x.v_scale`, float32 [1]

Before anything is solved, the calibration text walks once through the float model, block by block, with a cache that keeps nothing and
looks at what it is given: keys after rotary positions and norms, as an engine would store them. A block's ranges are journalled as they
are found, so a killed run goes on with the same. Where a scale lies in a checkpoint is each format's business (`Format.kv_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fewbit.arch.infer import facts
from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.base.names import stem
from fewbit.num.grid import E4M3
from fewbit.num.qtensor import QTensor
from fewbit.plan.recipe import Recipe
from fewbit.run.source import Source
from fewbit.run.start import block_model, float_states, text_for

if TYPE_CHECKING:
    from fewbit.run.engine import _Run

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache")
WHICH = ("k", "v")


def attentions(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, int]:
    """Attention modules that have keys and values of their own -> index of their block."""
    found: dict[str, int] = {}
    for name, known in facts(manifest, config).items():
        if known.role in ("k", "v", "qkv") and known.layer is not None:
            found[stem(name).rpartition(".")[0]] = known.layer
    return found


class KvSource(Source):
    """A source with two scales more per attention; `decide` finds them.

    Raises:
        InputError: FB-E0733 for a model without attention whose keys and values are cached as they are projected.
    """

    def __init__(self, inner: Source) -> None:
        self.inner, self.checkpoint, self.format, self.stored = inner, inner.checkpoint, inner.format, inner.stored
        self.config, self.small_files = inner.config, inner.small_files
        self.does, self.warnings = inner.does, inner.warnings
        self.attentions = attentions(inner.manifest, inner.config)
        if not self.attentions:
            raise InputError("FB-E0733", "no attention of this model has key and value projections", file=inner.root)
        names = [f"{module}.{which}_scale" for module in self.attentions for which in WHICH]
        made = {name: TensorInfo(name, "F32", (1,), 4, "") for name in names if name not in inner.manifest}
        self.manifest = Manifest({**inner.manifest.tensors, **made}, inner.manifest.metadata)
        self._made: dict[str, torch.Tensor | None] = dict.fromkeys(made)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._made:
            return self.inner.read(name)
        value = self._made[name]
        assert value is not None, "scales are read after `decide`"
        return value

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop] if name in self._made else self.inner.read_rows(name, start, stop)

    def qtensor(self, name: str) -> QTensor | None:
        return self.inner.qtensor(name)

    def decide(self, run: _Run) -> None:
        """Finds the ranges of every attention, or takes them from an interrupted run's journal."""
        self.inner.decide(run)
        sink = run.sinks[0]
        for index, ranges in _walk(self, run):
            sink.note(f"kv.{index}", {"largest": ranges})
        for module, index in self.attentions.items():
            largest = sink.notes.get(f"kv.{index}", {}).get("largest")
            for which, value in zip(WHICH, largest or (), strict=False):
                if (name := f"{module}.{which}_scale") in self._made:
                    self._made[name] = torch.tensor([max(value / float(E4M3.high), torch.finfo(torch.float32).tiny)])
        lost = [name for name, value in self._made.items() if value is None]
        if lost:
            raise InputError("FB-E0733", "this attention put nothing into its cache", tensor=lost[0])


class _Ranges:
    """Stands where a block expects a cache; keeps the largest magnitudes of what it is given."""

    def __init__(self) -> None:
        self.largest = [0.0, 0.0]
        self.updates = 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `transformers.Cache.update`: (keys, values) to attend to."""
        found = [float(keys.detach().abs().amax()), float(values.detach().abs().amax())]
        self.largest = [max(pair) for pair in zip(self.largest, found, strict=True)]
        self.updates += 1
        return keys, values


def _walk(source: KvSource, run: _Run) -> Any:
    """(block, [largest key, largest value]) for every block with attention that is not in the journal yet."""
    sink = run.sinks[0]
    todo = sorted({index for index in source.attentions.values() if f"kv.{index}" not in sink.notes})
    if not todo:
        return
    model = block_model(source.inner, run.settings.device, exact=True)
    tokens = text_for(source.inner, run.plan.recipe, sink).tokens
    with torch.no_grad(), float_states(model, source.inner.read, tokens, run, "kv") as (store, kwargs):
        for index in range(todo[-1] + 1):
            seen = _Ranges()
            params = model.load_block(index, source.inner.read)
            for number in range(len(store)):
                run.stop.check()
                hidden = store.get(number).to(model.device)
                arguments = model.arguments(_with_cache(kwargs[index], seen), store.batch, hidden.shape[0])
                store.put(number, model.run_block(index, params, hidden, arguments))
            if index in todo and seen.updates:
                yield index, seen.largest
            run.settings.on_event({"event": "note", "text": f"cache ranges: block {index + 1} of {len(model)}"})


def _with_cache(kwargs: dict[str, Any], cache: _Ranges) -> dict[str, Any]:
    """A block's arguments with our cache where its family expects one."""
    name = next((name for name in CACHE_ARGUMENTS if name in kwargs), CACHE_ARGUMENTS[0])
    return {**kwargs, name: cache}


def with_kv(source: Source, recipe: Recipe) -> Source:
    """The source with scales of cached keys and values, where the recipe asks for them."""
    return KvSource(source) if recipe.kv else source
