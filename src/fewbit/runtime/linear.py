"""QuantLinear: a linear layer whose weight stays quantised.

Holds the parts of a QTensor as buffers in the layout of one kernel. The state dict holds the canonical parts, whatever the kernel, as plain
tensors, so it can be saved with safetensors and loaded on another device.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.math.rounding import round_levels
from fewbit.math.scales import Search, quantize
from fewbit.num.blocks import TENSOR
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.kernels.packed import transposed_matmul
from fewbit.runtime.layouts import Layout, choose
from fewbit.runtime.parts import flatten, rebuild, sparse

ABOUT = "about"  # name of the state dict's entry that says how a weight is stored


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer of any kind.

    Raises:
        InputError: FB-E0905 for a module that has none.
    """
    found = getattr(layer, "weight", None)
    if not isinstance(found, torch.Tensor):
        raise InputError("FB-E0905", f"a {type(layer).__name__} has no weight")
    return found


def bias_of(layer: nn.Module) -> torch.Tensor | None:
    """The bias of a linear layer of any kind, or None."""
    found = getattr(layer, "bias", None)
    return found if isinstance(found, torch.Tensor) else None


class QuantLinear(nn.Module):
    """y = x @ w.T + bias with `w` quantised.

    Args:
        q: the weight, [out_features, in_features].
        bias: [out_features] or None.
        dtype: that activations will mostly have; kernels keep their tables in it.
        threshold: for int8 activations: inputs of this size or above have their columns in floating point (LLM.int8()); 0 for none.
        kernel: name of a row of `runtime.layouts`, or several of which the first that accepts is taken; None for any. A layer that is moved or
            filled anew keeps to them where they accept.

    Raises:
        InputError: FB-E0903 when no kernel accepts the weight, FB-E0904 for a threshold that has no meaning here.
    """

    def __init__(
        self,
        q: QTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        threshold: float = 0.0,
        kernel: str | tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.kernels = (kernel,) if isinstance(kernel, str) else kernel
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, False)
        self.threshold = float(threshold)
        self._register()
        self._hold(q, dtype, strict=True)

    def _hold(self, q: QTensor, dtype: torch.dtype, strict: bool = False) -> None:
        """Takes a weight: chooses the kernel and registers its tensors. Nothing is changed where that fails.

        Args:
            strict: refuse when none of the kernels that were asked for accepts, instead of taking another.
        """
        shape = tuple(q.shape)
        layout = self._chosen(q, dtype, strict)
        if not self.threshold >= 0 or (self.threshold and not layout.quantises_inputs):
            raise InputError("FB-E0904", f"a threshold of {self.threshold} with the kernel {layout.name!r}")
        held = layout.to_layout(q, dtype)
        self.scheme, self.shape, self.dtype, self.layout = q.scheme, shape, dtype, layout
        for name in list(self._buffers):
            del self._buffers[name]
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)  # the state dict holds the canonical parts instead

    def _chosen(self, q: QTensor, dtype: torch.dtype, strict: bool) -> Layout:
        refused = None
        for name in self.kernels or ():
            try:
                return choose(q.scheme, tuple(q.shape), q.device, name, dtype)
            except InputError as error:
                refused = error
        if refused is not None and strict:
            raise refused
        return choose(q.scheme, tuple(q.shape), q.device, None, dtype)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The kernel's tensors by name."""
        return cast("dict[str, torch.Tensor]", self._buffers)  # torch allows None among them, `_hold` registers none

    @property
    def device(self) -> torch.device:
        return next(iter(self.held.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory: codes, scales and the kernel's tables."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.held.values())

    @property
    def weight(self) -> torch.Tensor:
        """The weight in floating point, made anew at every call; for code that wants to look at it."""
        return self.qtensor().dequantize(self.dtype)

    def qtensor(self) -> QTensor:
        """The weight, exactly as it was given."""
        return self.layout.from_layout(self.scheme, self.shape, self.held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] of any float dtype -> [..., out_features] of the same."""
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            out = product_of(flat, self.handle)
        elif torch.is_grad_enabled() and flat.requires_grad:
            out = _Frozen.apply(flat, self)
        else:
            out = self.product(flat)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy is a layer of its own

    def _register(self) -> None:
        self.handle = next(_HANDLES)
        _LAYERS[self.handle] = self

    @torch.compiler.disable  # kernels are not traced
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, in_features] @ w.T, sides undone, without bias."""
        held = self.held
        inner = self._inputs(x)
        if self.layout.quantises_inputs:
            out = self.layout.matmul(inner, held, self.scheme, self.shape, self.threshold)
        else:
            out = self.layout.matmul(self._quantised(inner), held, self.scheme, self.shape)
        if "side_values" in held:
            out = out + (sparse(held, self.shape) @ x.float().T).T.to(out.dtype)
        return out

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What the codes are multiplied by: columns scaled and in the order of the codes."""
        held = self.held
        if "side_column_scale" in held:
            x = x * held["side_column_scale"].to(x.dtype)
        if "side_permutation" in held:
            x = x[:, held["side_permutation"]]
        return x

    def _quantised(self, x: torch.Tensor) -> torch.Tensor:
        """Activations rounded as the scheme says, for kernels that compute in floating point."""
        inner = self.scheme.activation
        if inner is None or not x.numel():
            return x
        fixed = self.held.get("side_input_scale")
        if self.scheme.static and fixed is not None and inner.blocks == TENSOR:  # what lies beyond the range is clipped
            scale = fixed.float().reshape(())
            return (round_levels(inner.grid, x.float() / scale) * scale).to(x.dtype)
        return quantize(inner, x.float(), search=Search("absmax")).dequantize(x.dtype)

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [tokens, out_features] @ w -> [tokens, in_features]; rounded activations pass gradients straight through."""
        q = self.qtensor()
        dx = transposed_matmul(dy, flatten(replace(q, sides={})), self.scheme, self.shape)
        if "permutation" in q.sides:
            dx = dx[:, torch.argsort(q.sides["permutation"])]
        if "column_scale" in q.sides:
            dx = dx * q.sides["column_scale"].to(dx.dtype)
        if "outliers" in q.sides:
            dx = dx + (q.sides["outliers"].float().t() @ dy.float().T).T.to(dx.dtype)
        return dx

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """`.to()` and the like: a float dtype is what to compute in, stored parts keep their own."""
        buffers = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)
        self._buffers.update(buffers)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            self._hold(self.qtensor().to(probe.device), probe.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        about = {"scheme": str(self.scheme), "shape": self.shape, "threshold": self.threshold}
        data = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        destination[f"{prefix}weight.{ABOUT}"] = data
        for name, tensor in flatten(self.qtensor()).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stem = f"{prefix}weight."
        parts = {name.removeprefix(stem): state_dict[name] for name in state_dict if name.startswith(stem)}
        _local_metadata, _strict, missing, *_ = args
        if ABOUT in parts:
            about = json.loads(bytes(parts.pop(ABOUT).tolist()))
            self.threshold = float(about["threshold"])
            q = rebuild(parse_scheme(about["scheme"]), tuple(about["shape"]), parts)
            q.check(stem)
            self._hold(q.to(self.device), self.dtype)
        else:
            missing.append(stem + ABOUT)
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if not k.startswith(stem)}, prefix, *args)

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, kernel={self.layout.name}, {bits:.3f} bits per weight in memory"
        )


_HANDLES = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, QuantLinear] = weakref.WeakValueDictionary()


@torch.library.custom_op("fewbit::product", mutates_args=())
def product_of(x: torch.Tensor, handle: int) -> torch.Tensor:
    """`QuantLinear.product` of the layer with a handle, as one node of a compiled graph: no break, and the kernel runs as it is."""
    return _LAYERS[handle].product(x)


@product_of.register_fake
def _(x: torch.Tensor, handle: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], _LAYERS[handle].out_features)


@torch.library.custom_op("fewbit::input_gradient", mutates_args=())
def input_gradient_of(dy: torch.Tensor, handle: int) -> torch.Tensor:
    """`QuantLinear.input_gradient` of the layer with a handle, as one node."""
    return _LAYERS[handle].input_gradient(dy)


@input_gradient_of.register_fake
def _(dy: torch.Tensor, handle: int) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], _LAYERS[handle].in_features)


def _keep_handle(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.handle = inputs[1]


def _compiled_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
    return input_gradient_of(dy.contiguous(), ctx.handle), None


product_of.register_autograd(_compiled_backward, setup_context=_keep_handle)


class _Frozen(torch.autograd.Function):
    """The product with a weight that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.input_gradient(dy), None
