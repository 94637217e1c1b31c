"""Answering products of a block from memory, and leaving out whatever is then made from nothing or for nobody.

A product that nobody will look at is answered with NaN: one number, expanded to the product's shape. What is computed from nothing but such NaN is NaN too, and is
not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fewbit.run.hf import Params
from fewbit.run.needless import tensors_in
from fewbit.run.observe import Observer, Use

NONE: Mapping[int, Any] = {}


def nothing(
    like: torch.Tensor, shape: tuple[int, ...] | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """NaN in place of a tensor: one number, expanded."""
    shape = tuple(like.shape) if shape is None else shape
    one = torch.full((1,) * len(shape), torch.nan, dtype=like.dtype, device=device or like.device)
    return one.expand(shape)


class Skipping(Observer):
    """An observer that may answer a product itself; what is computed from nothing but such NaN is not computed either.

    Args:
        answer: a product's answer, or None to compute it.
        needless: calls that are answered with NaN, number -> function; see `run.needless`.
    """

    def __init__(
        self,
        tracked: Params,
        on_use: Callable[[Use], torch.Tensor | None] | None,
        on_output: Callable[[Use, torch.Tensor], None] | None,
        answer: Callable[[Use], torch.Tensor | None],
        needless: Mapping[int, Any] = NONE,
    ) -> None:
        super().__init__(tracked, on_use, on_output)
        self._answer = answer
        self._needless, self._number = needless, -1
        self._nothing: dict[int, torch.Tensor] = {}  # by address of the one NaN behind each

    def product(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = self._answer(use)
        if found is not None and found.untyped_storage().nbytes() == found.element_size():
            self._nothing[found.untyped_storage().data_ptr()] = found
        return compute() if found is None else found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._number += 1
        unread = self._number in self._needless and self._needless[self._number] == func
        if self.use_of(func, args)[1] is None and (unread or self._touched(args, kwargs)):
            like = _like(func, args, kwargs)
            near = next(tensors_in((args, kwargs)), None)
            if like is not None and near is not None:
                found = nothing(like, device=near.device)
                self._nothing[found.untyped_storage().data_ptr()] = found
                return found
        return super().__torch_function__(func, types, args, kwargs)

    def _touched(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        return bool(self._nothing) and any(
            part.untyped_storage().data_ptr() in self._nothing for part in tensors_in((args, kwargs))
        )


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
