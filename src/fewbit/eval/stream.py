"""Running a checkpoint of any format on tokens, block by block, through one reference path.

Weights are decoded; activations are quantised where the stored scheme says so. What is kept of a model is its last hidden states, [tokens,
width]: logits are made from them some rows at a time by the model's own head. So two models are never resident together, and the
logits of neither ever exist as a whole. What is alive at once, and how much it takes, is told by `eval.room`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from fewbit.base.manifest import Manifest
from fewbit.eval.room import Room
from fewbit.math.scales import Search, assemble, fit, quantize, snap
from fewbit.num.blocks import TENSOR
from fewbit.num.scheme import Scheme
from fewbit.run.acts import ActStore
from fewbit.run.hf import BlockModel, Params
from fewbit.run.observe import Observer, Use


class FloatSource(Protocol):
    """What a model is read from: `run.source.Source`, or a view that bears the same names."""

    config: dict[str, Any]
    manifest: Manifest
    stored: dict[str, Any]

    def read(self, name: str) -> torch.Tensor: ...


class Runner:
    """One checkpoint, run on tokens [windows, length].

    Attributes:
        model: its blocks. source: where the weights come from.
        passes: full passes over all blocks so far.
    """

    def __init__(
        self, source: FloatSource, dtype: torch.dtype = torch.float32, device: str = "cpu", room: Room | None = None
    ) -> None:
        self.source = source
        self.model = BlockModel(source.config, source.manifest, dtype=dtype, device=device)
        self.room = room or Room()
        self.passes = 0
        self._trunk: Params | None = None
        self._like: Params = {}

    @property
    def vocab(self) -> int:
        return int(self._embedding.shape[0])

    @property
    def width(self) -> int:
        return int(self._embedding.shape[1])

    @property
    def _embedding(self) -> torch.Tensor:
        """The parameter that tokens are looked up in, [vocab, width], on the meta device."""
        module: Any = self.model.module
        return module.get_input_embeddings().weight

    @property
    def context(self) -> int | None:
        """The longest context of the model, where its config says so."""
        return getattr(self.model.module.config, "max_position_embeddings", None)

    def share_with(self, other: Runner) -> None:
        """Tensors outside the blocks that equal another runner's are kept in memory once."""
        self._like = other.trunk

    @property
    def trunk(self) -> Params:
        """Embeddings, final norm and head; read on first use."""
        if self._trunk is None:
            read = self.model.load_trunk(self.source.read)
            for name, value in read.items():
                like = self._like.get(name)
                if like is not None and like.dtype == value.dtype and torch.equal(like, value):
                    read[name] = like
            self._trunk, self._like = read, {}
        return self._trunk

    def hidden(self, tokens: torch.Tensor, on_block: Callable[[int, int], None] | None = None) -> ActStore:
        """Hidden states after the last block for all windows, int64 [windows, length] -> [windows, length, width]."""
        store, kwargs = self.enter(tokens)
        for index in range(len(self.model)):
            self.pass_block(index, store, kwargs[index])
            if on_block:
                on_block(index + 1, len(self.model))
        self.passes += 1
        return store

    def enter(self, tokens: torch.Tensor) -> tuple[ActStore, list[dict[str, Any]]]:
        """Hidden states before the first block, and every block's arguments."""
        batch = self.room.batch(tokens.shape[1])
        store: ActStore | None = None
        kwargs: list[dict[str, Any]] = []
        with torch.no_grad():
            for start in range(0, tokens.shape[0], batch):
                entry = self.model.enter(self.trunk, tokens[start : start + batch])
                if store is None:
                    kwargs, store = entry.kwargs, self.store(tokens, int(entry.hidden.shape[-1]), batch)
                store.put(start // batch, entry.hidden)
        assert store is not None, "no windows"
        return store, kwargs

    def store(self, tokens: torch.Tensor, width: int, batch: int) -> ActStore:
        """An empty store for the hidden states of some windows, in a file where memory is short."""
        shape = (tokens.shape[0], tokens.shape[1], width)
        return ActStore(
            shape, self.model.dtype, batch, self.room.spill(tokens.numel() * width * self.model.dtype.itemsize)
        )

    def pass_block(self, index: int, store: ActStore, kwargs: dict[str, Any], params: Params | None = None) -> None:
        """Takes hidden states through one block, in place."""
        params = params if params is not None else self.model.load_block(index, self.source.read)
        whole = min(store.batch, store.shape[0])
        with torch.no_grad(), ActivationQuantiser(self.activation_schemes(index), params, self.input_scales(index)):
            for batch in range(len(store)):
                hidden = store.get(batch).to(self.model.device)
                arguments = self.model.arguments(kwargs, whole, hidden.shape[0])
                store.put(batch, self.model.run_block(index, params, hidden, arguments))

    def activation_schemes(self, index: int) -> dict[str, Scheme]:
        """Parameters of a block whose inputs are quantised at run time, with the scheme of the inputs."""
        found = {}
        for slot in self.model.block_slots(index):
            stored = self.source.stored.get(slot.name)
            if stored is not None and stored.scheme.activation is not None:
                found[self.model.local(index, slot)] = stored.scheme.activation
        return found

    def input_scales(self, index: int) -> dict[str, torch.Tensor]:
        """Stored scales of the parameters of a block whose inputs have one fixed scale, by local name; float32 [1]."""
        found = {}
        for slot in self.model.block_slots(index):
            stored = self.source.stored.get(slot.name)
            if stored is not None and stored.scheme.static and stored.scheme.activation.blocks == TENSOR:
                q = self.source.qtensor(slot.name)  # type: ignore[attr-defined] # only sources of safetensors have static schemes
                if q is not None and "input_scale" in q.sides:
                    found[self.model.local(index, slot)] = q.sides["input_scale"]
        return found

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of some positions: tokens [1, rows], hidden [1, rows, width] -> float32 [rows, vocab]."""
        with torch.no_grad():
            return self.model.leave(self.trunk, tokens, hidden.to(self.model.device, self.model.dtype)).float()[0]


class ActivationQuantiser:
    """While active, inputs of tracked weights are replaced by their quantised values, as an engine would compute.

    Scales are found per block of the scheme (per token), except the fixed ones of static schemes: larger inputs are clipped there.
    """

    def __init__(
        self, schemes: dict[str, Scheme], params: Params, scales: dict[str, torch.Tensor] | None = None
    ) -> None:
        self._schemes, self._scales = schemes, scales or {}
        self._observer = Observer({name: params[name] for name in schemes}, self._replace) if schemes else None

    def _replace(self, use: Use) -> torch.Tensor:
        scheme = self._schemes[use.param]
        flat = use.x.reshape(-1, use.x.shape[-1])
        fixed = self._scales.get(use.param)
        if fixed is not None:
            params = fit(scheme, flat.float(), None, Search(method="absmax"))
            shape = params.scale.shape if params.scale is not None else fixed.shape
            params = replace(params, scale=fixed.reshape(shape).to(flat.device))
            codes = snap(scheme, flat.float(), params)
            return assemble(scheme, tuple(flat.shape), codes, params).dequantize(use.x.dtype).reshape(use.x.shape)
        return (
            quantize(scheme, flat.float(), None, Search(method="absmax")).dequantize(use.x.dtype).reshape(use.x.shape)
        )

    def __enter__(self) -> ActivationQuantiser:
        if self._observer is not None:
            self._observer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._observer is not None:
            self._observer.__exit__(*error)


def rows_of(tokens: torch.Tensor, scored: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(window, positions to score) of at most `count` positions each, in order."""
    for window in range(tokens.shape[0]):
        positions = scored[window].nonzero()[:, 0]
        for start in range(0, positions.numel(), count):
            yield window, positions[start : start + count]


class States:
    """Hidden states of single windows out of a store, one batch in hand."""

    def __init__(self, store: ActStore) -> None:
        self._store, self._index, self._batch = store, -1, torch.empty(0)

    def __call__(self, window: int, positions: torch.Tensor) -> torch.Tensor:
        """float [positions, width]."""
        index = window // self._store.batch
        if index != self._index:
            self._index, self._batch = index, self._store.get(index)
        return self._batch[window % self._store.batch, positions]
