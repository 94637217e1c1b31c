"""Which calls of a block's forward pass nobody needs, once some of its products are answered from memory.

A pass for a late stage still norms what the first products would read, though they are answered without a look at it: half of the norms of a
run. `Recorder` writes down every call of one pass with the storages that it reads and writes; going backwards from what is wanted, `needless` finds the
calls that nothing wanted depends on. They are told apart by their number, for a block makes the same calls for every batch; a call of another function under that
number is computed. That none was needed after all is not taken on trust: `keeping.survey` tries each pass without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.run.observe import Observer, Use


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        func: the function.
        reads, writes: addresses of the storages of its arguments, and of what it gives or changes.
        param: the tracked weight that it multiplies by, if it is such a product.
    """

    func: Any
    reads: frozenset[int]
    writes: frozenset[int]
    param: str | None


class Recorder(Observer):
    """An observer that also writes down every call, in order."""

    def __init__(
        self, tracked: Mapping[str, torch.Tensor], on_output: Callable[[Use, torch.Tensor], torch.Tensor | None] | None
    ) -> None:
        super().__init__(tracked, None, on_output)
        self.calls: list[Call] = []
        self._alive: list[torch.Tensor] = []  # an address must not be used twice

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        use = self.use_of(func, args)[1]
        given = list(tensors_in((args, kwargs or {})))
        result = super().__torch_function__(func, types, args, kwargs)
        made = list(tensors_in(result))
        self._alive += given + made
        changed = given[:1] if _changes(func) else [*tensors_in((kwargs or {}).get("out"))]
        self.calls.append(Call(func, _addresses(given), _addresses(made + changed), None if use is None else use.param))
        return result


def needless(calls: list[Call], wanted: Iterable[int], answered: Collection[str]) -> dict[int, Any]:
    """The calls that none of the wanted storages depends on: number -> function.

    Args:
        wanted: addresses of storages.
        answered: weights whose products are not computed, or not from the inputs that they are called with, which need not be true then.
    """
    live, unread = set(wanted), {}
    for number in range(len(calls) - 1, -1, -1):
        call = calls[number]
        if call.param in answered:
            continue
        if call.writes & live:
            live |= call.reads
        elif call.writes:
            unread[number] = call.func
    return unread


def _changes(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def tensors_in(item: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists, tuples and dicts too."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from tensors_in(part)
    elif isinstance(item, dict):
        yield from tensors_in(tuple(item.values()))


def _addresses(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(one.untyped_storage().data_ptr() for one in tensors)
