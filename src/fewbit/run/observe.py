"""Seeing what goes into every matrix product of a block, whatever module computes it.

An `Observer` is a torch function mode: while it is active, each linear product whose weight is a tracked tensor (or a slice of one:
an expert of a stack) is reported with its input. No hooks on module classes: nn.Linear, GPT-2's Conv1D and stacked experts look alike.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fewbit.math.attention import causal_attention, suits

_LINEAR = {torch.nn.functional.linear}
_MATMUL = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
}
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_ATTENDED = inspect.signature(lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False: None)  # fmt: skip
_ADDMM = {torch.addmm, torch.Tensor.addmm}
SLOW_BF16 = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


def _multiply(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A product; in bfloat16 on a CPU that has no instructions for it, in float32 and rounded: torch's own emulation takes four times as long."""
    held = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
    if SLOW_BF16 and all(part.dtype == torch.bfloat16 and part.device.type == "cpu" for part in held):
        args = tuple(part.float() if isinstance(part, torch.Tensor) else part for part in args)
        kwargs = {name: part.float() if isinstance(part, torch.Tensor) else part for name, part in kwargs.items()}
        return func(*args, **kwargs).to(torch.bfloat16)
    return func(*args, **kwargs)


def _attend(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Attention; what is causal and plain by our own way where that is quicker. With gradients torch's keeps less."""
    found = _ATTENDED.bind(*args, **kwargs).arguments
    plain = found.get("attn_mask") is None and not found.get("dropout_p") and found["query"].dim() == 4
    alike = found["query"].shape[-2] == found["key"].shape[-2] and not torch.is_grad_enabled()
    if not (plain and alike and found.get("is_causal") and suits(found["query"])):
        return _ATTENTION(*args, **kwargs)
    return causal_attention(found["query"], found["key"], found["value"], found.get("scale"))


@dataclass(frozen=True)
class Use:
    """One product with a tracked weight.

    Attributes:
        param: name that the weight is tracked under.
        expert: index of the slice, or None when the weight was used whole.
        x: the input, [..., in].
    """

    param: str
    expert: int | None
    x: torch.Tensor


class StopForward(Exception):
    """Raised by an observer's callback when the rest of a forward pass is not needed."""


class Observer(TorchFunctionMode):
    """Reports products with tracked weights.

    Args:
        tracked: name -> weight tensor, as the forward pass will use it.
        on_use: called with each `Use` before the product; may return a tensor that takes the input's place.
        on_output: called with each `Use` and the product, [..., out]; may return a tensor that takes the product's place.
    """

    def __init__(
        self,
        tracked: Mapping[str, torch.Tensor],
        on_use: Callable[[Use], torch.Tensor | None] | None = None,
        on_output: Callable[[Use, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self._by_storage = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in tracked.items()}
        self._on_use = on_use
        self._on_output = on_output

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        position, use = self.use_of(func, args)
        if use is None:
            return _attend(args, kwargs or {}) if func is _ATTENTION else func(*args, **(kwargs or {}))
        replaced = self._on_use(use) if self._on_use else None
        if replaced is not None:
            args = (*args[:position], replaced, *args[position + 1 :])
        result = self.product(use, lambda: _multiply(func, args, kwargs or {}))
        changed = self._on_output(use, result) if self._on_output else None
        return result if changed is None else changed

    def use_of(self, func: Any, args: tuple) -> tuple[int, Use | None]:
        """Where a function takes its input, and the use of a tracked weight that a call of it is, if any."""
        position = 0 if func in _LINEAR or func in _MATMUL else 1 if func in _ADDMM else -1
        found = self._find(args[position + 1]) if 0 <= position < len(args) - 1 else None
        return position, None if found is None else Use(found[0], found[1], args[position])

    def product(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The product; subclasses may know it already."""
        return compute()

    def _find(self, weight: Any) -> tuple[str, int | None] | None:
        if not isinstance(weight, torch.Tensor):
            return None
        found = self._by_storage.get(weight.untyped_storage().data_ptr())
        if found is None:
            return None
        name, whole = found
        if whole.dim() == 3 and weight.dim() == 2:
            return name, (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
        return name, None
