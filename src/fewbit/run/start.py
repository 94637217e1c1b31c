"""What every walk of calibration text through a model begins with: the model, its text, and the hidden states before block 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbit.arch.rewrite_table import needs_of
from fewbit.base.errors import InputError
from fewbit.plan.calibrated import BATCH_TOKENS, SPILL_SHARE, in_bfloat16, is_big
from fewbit.plan.jobs import Plan
from fewbit.run.acts import ActStore
from fewbit.run.calib import Calibration, calibration
from fewbit.run.hf import BlockModel, Params, Read
from fewbit.run.imatrix import read_imatrix
from fewbit.run.lanes import LANES
from fewbit.run.source import Source

if TYPE_CHECKING:
    from fewbit.run.engine import _Run
    from fewbit.run.sinks import Sink


def block_model(source: Source, device: str, compute: str = "auto", exact: bool = False) -> BlockModel:
    """The model of a source in the dtype of the recipe's `compute`; with `exact` in float32 unless it is big."""
    half = is_big(source.manifest) if exact else in_bfloat16(source.manifest, compute, device)
    dtype = torch.bfloat16 if half else torch.float32
    return BlockModel(source.config, source.manifest, dtype=dtype, device=device)


def lanes_for(source: Source, device: str) -> int:
    """Batches that are run side by side: of a small model on the CPU two, whose sums are small; a big one keeps all cores busy by itself."""
    return 1 if device != "cpu" or is_big(source.manifest) else LANES


def text_for(source: Source, recipe: dict[str, Any], sink: Sink) -> Calibration:
    """The recipe's calibration tokens, noted in the journal: a resumed run must see those that the interrupted one saw.

    Raises:
        InputError: FB-E0411 when the text has changed since.
    """
    text = _text(source, recipe)
    before = sink.notes.get("calibration", {}).get("digest")
    if before is None:
        sink.note("calibration", {"digest": text.digest, "summary": text.summary})
    elif before != text.digest:
        raise InputError(
            "FB-E0411", "the calibration text has changed since this run was interrupted", file=sink.scratch
        )
    return text


def _text(source: Source, recipe: dict[str, Any]) -> Calibration:
    name, shape = recipe["calib"] or "default", (recipe["calib_samples"], recipe["calib_length"])
    return calibration(name, source.root, *shape, recipe["seed"], _vocabulary(source))


def check_inputs(plan: Plan, source: Source) -> None:
    """Reads what a run will calibrate with, so that it fails before the first tensor and not after.

    Raises:
        InputError: as `calibration` and `read_imatrix`.
    """
    recipe, needs = plan.recipe, set(plan.needs)
    if recipe.get("imatrix"):
        read_imatrix(Path(recipe["imatrix"]))
        needs -= {"importance"}
    if needs or recipe.get("kv") or (plan.rewrites and needs_of(recipe["rewrites"])):  # none for families without data
        _text(source, recipe)


def _vocabulary(source: Source) -> int:
    """Rows of the embedding, by the names that embeddings bear; a number no token reaches when there is none."""
    sizes = [
        info.shape[0]
        for name, info in source.manifest.items()
        if (len(info.shape) == 2 and "emb" in name) or "wte" in name
    ]
    return max(sizes, default=1 << 62)


def batch_size(tokens: torch.Tensor, lanes: int = 1) -> int:
    """Sequences that are run at once in a lane: some `BATCH_TOKENS` tokens in all lanes."""
    return min(tokens.shape[0], max(1, BATCH_TOKENS // lanes // tokens.shape[1]))


@contextmanager
def float_states(
    model: BlockModel, read: Read, tokens: torch.Tensor, run: _Run, name: str
) -> Iterator[tuple[ActStore, list[dict[str, Any]]]]:
    """A text on its way through the float model: (hidden states before block 0, each block's arguments for the first batch).

    Hidden states go to a file `acts-NAME.live` of the run's scratch folder where they would take too much of --ram.
    """
    trunk, batch = model.load_trunk(read), batch_size(tokens)
    entry = model.enter(trunk, tokens[:batch])
    width = entry.hidden.shape[-1]
    spill = width * tokens.numel() * model.dtype.itemsize > SPILL_SHARE * run.settings.ram
    path = run.sinks[0].scratch / f"acts-{name}.live" if spill else None
    store = ActStore((*tokens.shape, width), model.dtype, batch, path)
    try:
        fill(model, trunk, tokens, [store])
        del trunk
        yield store, entry.kwargs
    finally:
        store.close()


def fill(model: BlockModel, trunk: Params, tokens: torch.Tensor, stores: list[ActStore]) -> None:
    """Puts the hidden states before block 0 into the stores; those after the first may hold the first sequences only."""
    for index in range(len(stores[0])):
        start, stop = stores[0].span(index)
        hidden = model.enter(trunk, tokens[start:stop]).hidden
        for store in stores:
            if index < len(store):
                store.put(index, hidden)
