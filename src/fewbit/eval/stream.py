"""Running a checkpoint of any format on tokens, block by block, through one reference path.

Weights are decoded; activations are quantised where the stored scheme says so. What is kept of a model is its last hidden states, [tokens,
width]: logits are made from them a batch at a time by the model's own head. So two models are never resident together, and the
logits of neither ever exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import Scheme
from fewbit.run.acts import ActStore
from fewbit.run.hf import BlockModel, Params
from fewbit.run.observe import Observer, Use
from fewbit.run.source import Source

BATCH_TOKENS = 4096


class Runner:
    """One checkpoint, run on tokens [windows, length].

    Attributes:
        model: its blocks. source: where the weights come from.
    """

    def __init__(self, source: Source, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.source = source
        self.model = BlockModel(source.config, source.manifest, dtype=dtype, device=device)
        self._trunk: Params | None = None

    @property
    def trunk(self) -> Params:
        """Embeddings, final norm and head; read on first use."""
        if self._trunk is None:
            self._trunk = self.model.load_trunk(self.source.read)
        return self._trunk

    def hidden(self, tokens: torch.Tensor, spill: Path | None = None, on_block: Callable[[int, int], None] | None = None) -> ActStore:
        """Hidden states after the last block for all windows.

        Args:
            tokens: int64 [windows, length].
            spill: file to keep them in instead of memory.
            on_block: called with (blocks done, blocks).
        """
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
        with torch.no_grad():
            store: ActStore | None = None
            kwargs = None
            for start in range(0, tokens.shape[0], batch):
                entry = self.model.enter(self.trunk, tokens[start : start + batch])
                if store is None:
                    shape = (tokens.shape[0], tokens.shape[1], entry.hidden.shape[-1])
                    store, kwargs = ActStore(shape, self.model.dtype, batch, spill), entry.kwargs
                store.put(start // batch, entry.hidden)
            assert store is not None and kwargs is not None
            for index in range(len(self.model)):
                self._pass_block(index, store, kwargs[index])
                if on_block:
                    on_block(index + 1, len(self.model))
        return store

    def _pass_block(self, index: int, store: ActStore, kwargs: dict) -> None:
        params = self.model.load_block(index, self.source.read)
        whole = min(store.batch, store.shape[0])
        with ActivationQuantiser(self._activation_schemes(index), params):
            for batch in range(len(store)):
                hidden = store.get(batch).to(self.model.device)
                arguments = self.model.arguments(kwargs, whole, hidden.shape[0])
                store.put(batch, self.model.run_block(index, params, hidden, arguments))

    def _activation_schemes(self, index: int) -> dict[str, Scheme]:
        """Parameters of a block whose inputs are quantised at run time, with the scheme of the inputs."""
        found = {}
        for slot in self.model.block_slots(index):
            stored = self.source.stored.get(slot.name)
            if stored is not None and stored.scheme.activation is not None:
                found[self.model.local(index, slot)] = stored.scheme.activation
        return found

    def logits(self, tokens: torch.Tensor, store: ActStore) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first window, last window + 1, float32 logits [windows, length, vocab]) a batch at a time."""
        with torch.no_grad():
            for batch in range(len(store)):
                start, stop = store.span(batch)
                hidden = store.get(batch).to(self.model.device)
                yield start, stop, self.model.leave(self.trunk, tokens[start:stop], hidden).float()


class ActivationQuantiser:
    """While active, inputs of tracked weights are replaced by their quantised values, per token, as an engine would compute.

    Static activation scales are taken per token too: the reference path does not model a fixed range.
    """

    def __init__(self, schemes: dict[str, Scheme], params: Params) -> None:
        self._schemes = schemes
        self._observer = Observer({name: params[name] for name in schemes}, self._replace) if schemes else None

    def _replace(self, use: Use) -> torch.Tensor:
        scheme = self._schemes[use.param]
        flat = use.x.reshape(-1, use.x.shape[-1])
        return quantize(scheme, flat.float(), None, Search(method="absmax")).dequantize(use.x.dtype).reshape(use.x.shape)

    def __enter__(self) -> ActivationQuantiser:
        if self._observer is not None:
            self._observer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._observer is not None:
            self._observer.__exit__(*error)
