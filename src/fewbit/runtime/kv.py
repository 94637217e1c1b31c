"""A transformers cache whose keys and values stay in few bits (after KIVI, arXiv 2402.02750).

    cache = QuantCache(model.config, "int4", window=128)
    model.generate(**inputs, cache=cache)          or model(ids, cache=cache, use_cache=True)      (past_key_values before transformers 5.24)

Keys have channels that are large for every token, so they are rounded per channel, over runs of `group` tokens; values have none, so they are rounded per
token, over runs of `group` channels. The newest tokens stay as they came: at least `window` of them, and what does not fill a group yet.

    tokens      0 ……………………………… n - window - rest   ………… n
                | groups of codes, scale and minimum | floats |

A prompt is attended to in full precision when it comes in one piece; what later tokens see of it is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.runtime.parts import flatten, rebuild

KINDS = {
    "int8": "int8-g{group}",
    "int4": "uint4-g{group}-min",
    "int2": "uint2-g{group}-min",
    "fp8": "fp8-e4m3-g{group}-f16",
}  # scheme per kind: a float minimum per group where there are few levels
GROUP, WINDOW = 32, 128


def scheme_for(kind: str, group: int) -> Scheme:
    """The scheme of keys and values.

    Raises:
        InputError: FB-E0923 for an unknown kind or a group that does not fill whole bytes.
    """
    if kind not in KINDS or group <= 0 or group % 8:
        raise InputError(
            "FB-E0923", f"{kind!r} in groups of {group}; kinds are {', '.join(KINDS)}, groups multiples of 8"
        )
    return parse_scheme(KINDS[kind].format(group=group))


class Store:
    """Numbers [batch, heads, rows, cols] in groups along the columns, growing along one axis.

    Args:
        scheme: of groups along the last axis.
        axis: that grows: -1 (keys, tokens last) or -2 (values, tokens before channels).
    """

    def __init__(self, scheme: Scheme, axis: int) -> None:
        self.scheme, self.axis = scheme, axis
        self.parts: dict[str, torch.Tensor] = {}
        self.shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.shape[self.axis] if self.shape else 0

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def append(self, numbers: torch.Tensor) -> None:
        q = quantize(self.scheme, numbers.float(), search=Search("absmax"))
        counts = self.scheme.block_counts(tuple(numbers.shape))
        new = {name: part if name == "codes" else part.reshape(counts) for name, part in flatten(q).items()}
        self.parts = {n: torch.cat([self.parts[n], part], self.axis) if self.parts else part for n, part in new.items()}
        size = len(self) + numbers.shape[self.axis]
        self.shape = (*numbers.shape[:-1], size) if self.axis == -1 else (*numbers.shape[:-2], size, numbers.shape[-1])

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """All numbers, rounded."""
        return rebuild(self.scheme, self.shape, self.parts).dequantize(dtype)

    def keep(self, count: int) -> None:
        """Drops all but the first `count` along the growing axis, whole groups."""
        for name, part in self.parts.items():
            self.parts[name] = part.narrow(self.axis, 0, part.shape[self.axis] * count // len(self)).contiguous()
        size = count if self.axis == -1 else self.shape[-1]
        self.shape = (*self.shape[:-1], size) if self.axis == -1 else (*self.shape[:-2], count, size)

    def select(self, index: torch.Tensor) -> None:
        """Sequences of the batch by index."""
        self.parts = {name: part[index.to(part.device)] for name, part in self.parts.items()}
        self.shape = (index.numel(), *self.shape[1:])


class QuantLayer(DynamicLayer):
    """Keys and values of one attention layer: old tokens in few bits, new ones (`keys`, `values`) as they came."""

    keys: torch.Tensor  # transformers leaves them undeclared
    values: torch.Tensor

    def __init__(self, kind: str = "int4", group: int = GROUP, window: int = WINDOW) -> None:
        super().__init__()
        self.scheme, self.group, self.window = scheme_for(kind, group), group, window
        if window < 0:
            raise InputError("FB-E0923", f"a window of {window} tokens")
        self._clear()

    def _clear(self) -> None:
        self.old_keys, self.old_values = Store(self.scheme, -1), Store(self.scheme, -2)

    def _rounded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Old keys and values [batch, heads, tokens, channels]."""
        values = self.old_values.read(dtype)
        return self.old_keys.read(dtype).transpose(-1, -2), values[..., : self.channels]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new states [batch, heads, tokens, channels]; all keys and values, old ones rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.channels = value_states.shape[-1]
        keys, values = super().update(key_states, value_states)
        if len(self.old_keys):
            old_keys, old_values = self._rounded(keys.dtype)
            whole = torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)
        else:
            whole = keys, values
        self._round_old()
        return whole

    def _round_old(self) -> None:
        """Moves whole groups of tokens that left the window into few bits."""
        count = (self.keys.shape[-2] - self.window) // self.group * self.group
        if count <= 0:
            return
        self.old_keys.append(self.keys[..., :count, :].transpose(-1, -2).contiguous())
        padded = torch.nn.functional.pad(self.values[..., :count, :], (0, -self.channels % self.group))
        self.old_values.append(padded.contiguous())
        self.keys, self.values = self.keys[..., count:, :].clone(), self.values[..., count:, :].clone()

    def get_seq_length(self) -> int:
        return len(self.old_keys) + super().get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        held = [part for part in (self.keys, self.values) if part is not None]
        floats = sum(part.numel() * part.element_size() for part in held)
        return floats + self.old_keys.nbytes + self.old_values.nbytes

    def reset(self) -> None:
        self._clear()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens; those of a group that is cut come back as rounded floats."""
        remove = abs(tokens_to_remove)
        recent = 0 if self.keys is None else self.keys.shape[-2]
        if tokens_to_remove > 0 or remove <= recent or not len(self.old_keys):
            super().crop(tokens_to_remove)
            return
        left = max(0, self.get_seq_length() - remove)
        keys, values = self._rounded(self.keys.dtype)
        whole = left // self.group * self.group
        self.keys, self.values = keys[..., whole:left, :].clone(), values[..., whole:left, :].clone()
        self.old_keys.keep(whole)
        self.old_values.keep(whole)
        if not whole:
            self._clear()

    def _select(self, index: torch.Tensor) -> None:
        if len(self.old_keys):
            self.old_keys.select(index)
            self.old_values.select(index)
        self.keys, self.values = self.keys[index.to(self.keys.device)], self.values[index.to(self.values.device)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0])[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            for store in (self.old_keys, self.old_values):
                store.parts = {name: part.to(device) for name, part in store.parts.items()}


class QuantCache(Cache):
    """A cache for a model: quantised where a layer attends to all tokens; sliding windows, which are short, stay as they are.

    Args:
        config: of the model.
        kind: int8, int4, int2 or fp8.
        group: tokens that share a scale of keys, channels that share one of values.
        window: newest tokens that stay in full precision.

    Raises:
        InputError: FB-E0923.
    """

    def __init__(self, config: Any, kind: str = "int4", *, group: int = GROUP, window: int = WINDOW) -> None:
        layers = [
            QuantLayer(kind, group, window) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer_bytes(layer) for layer in self.layers)


def layer_bytes(layer: Any) -> int:
    """Bytes that a layer of any transformers cache holds."""
    if isinstance(layer, QuantLayer):
        return layer.nbytes
    held = [part for part in (getattr(layer, "keys", None), getattr(layer, "values", None)) if part is not None]
    return sum(part.numel() * part.element_size() for part in held)
