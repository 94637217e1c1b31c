"""Fake quantisation of a layer's inputs: per token with a scale found at run time, or with one range fixed beforehand and learned.

A dynamic scheme has nothing to learn: its scale is the input's own. A static one watches some batches first (`observe`), takes the mean of the
scales that fit them best, and then learns it like a weight's step size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.math.rounding import pack_leaf, store_scale
from fewbit.math.scales import Search, fit, quantize
from fewbit.num.blocks import TENSOR
from fewbit.num.qtensor import QTensor, code_dtype
from fewbit.num.scheme import Scheme
from fewbit.runtime.fake import FakeQuantise


class FakeInputs(nn.Module):
    """Rounds inputs as an activation scheme says; a forward pre-hook of the layer that it belongs to.

    Args:
        scheme: of the activations: `int8-token`, `fp8-e4m3-token`, `int8-tensor` …
        static: whether the range is fixed beforehand: then one symmetric scale for the whole tensor.
        search: how the scale of an observed batch is chosen.

    Raises:
        InputError: FB-E0911 for a static scheme that is more than one symmetric scale.
    """

    def __init__(self, scheme: Scheme, static: bool, search: Search = Search("mse")) -> None:  # noqa: B008
        super().__init__()
        plain = scheme.symmetric and scheme.scale is not None and scheme.scale.is_leaf
        if static and not (plain and scheme.blocks == TENSOR):
            raise InputError("FB-E0911", f"static activations have one symmetric scale for a tensor, got {scheme}")
        self.scheme, self.static, self.search = scheme, static, search
        self.observing = static
        self.batches = 0
        self.total: torch.Tensor
        self.register_buffer("total", torch.zeros(1, 1))
        self.fake: FakeQuantise | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., features] -> the same, rounded, with straight-through gradients."""
        if not x.numel():
            return x
        flat = x.reshape(-1, x.shape[-1])
        if not self.static:
            return _dynamic(self.scheme, flat).reshape(x.shape)
        if self.observing:
            self._observe(flat.detach())
            return x
        if self.fake is None:
            raise InputError("FB-E0912", f"no input was seen while observing, so {self.scheme} has no range")
        return self.fake.quantise(flat)[0].to(x.dtype).reshape(x.shape)

    @torch.no_grad()
    def _observe(self, x: torch.Tensor) -> None:
        found = fit(self.scheme, x.float(), None, self.search).scale
        assert isinstance(found, torch.Tensor)
        self.total += found.float().reshape(1, 1).to(self.total.device)
        self.batches += 1

    def settle(self) -> None:
        """Ends observation: the range is the mean of what was seen, and learns from now on.

        Raises:
            InputError: FB-E0912 when nothing was seen.
        """
        if not self.static or not self.observing:
            return
        if not self.batches:
            raise InputError("FB-E0912", f"no input was seen while observing, so {self.scheme} has no range")
        grid = self.scheme.part("scale").grid
        scale = pack_leaf(grid, store_scale(grid, self.total / self.batches))
        codes = torch.zeros((1, 1), dtype=code_dtype(self.scheme.grid), device=self.total.device)
        self.fake = FakeQuantise(QTensor(self.scheme, (1, 1), codes, scale))
        self.observing = False

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """A range that was settled when the state was taken counts as settled here: its node is made, and then filled as any child."""
        if self.static and self.observing and any(key.startswith(f"{prefix}fake.") for key in state_dict):
            self.total.fill_(1.0)
            self.batches = 1
            self.settle()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def input_scale(self) -> torch.Tensor | None:
        """The fixed scale, float32 [1]; None when there is none."""
        if self.fake is None:
            return None
        with torch.no_grad():
            return self.fake.parts["scale"]()[1].float().reshape(1)

    def extra_repr(self) -> str:
        state = "dynamic" if not self.static else "observing" if self.observing else "static"
        return f"{self.scheme}, {state}"


class _Rounded(torch.autograd.Function):
    """A value whose gradient is that of what it was rounded from."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g, None


def _dynamic(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, features] under scales that reach its largest entries, so that nothing is clipped and the gradient passes whole."""
    rounded = quantize(scheme, x.detach().float(), None, Search("absmax")).dequantize(x.dtype)
    return _Rounded.apply(x, rounded)
