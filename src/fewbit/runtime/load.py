"""Fill a module that was built on the meta device, leaving quantised weights quantised.

    model = fill(module, slots, get, dtype)

`get(name)` gives a stored tensor: a QTensor where it is quantised, else a plain tensor. `slots` say which stored tensor is which part of which
parameter. A quantised weight of an `nn.Linear` becomes a `QuantLinear`; where a module wants numbers (embeddings, fused experts, Conv1D) it is
decoded, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.num.qtensor import QTensor
from fewbit.runtime.linear import QuantLinear, bias_of

Get = Callable[[str], "torch.Tensor | QTensor"]


class Place(Protocol):
    """Where a stored tensor goes: the whole of a parameter or a part of it."""

    @property
    def name(self) -> str: ...

    @property
    def param(self) -> str: ...

    @property
    def expert(self) -> int | None: ...

    def view(self, param: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Loaded:
    """What became of a model's parameters.

    Attributes:
        quantised: names of the layers that stay quantised.
        decoded: stored tensors that are quantised but had to be decoded.
        bytes: of all parameters and quantised weights in memory.
        kernels: kernel -> layers that it serves.
    """

    quantised: tuple[str, ...]
    decoded: tuple[str, ...]
    bytes: int
    kernels: dict[str, int]


def fill(module: nn.Module, slots: Iterable[Place], get: Get, dtype: torch.dtype) -> Loaded:
    """Gives every parameter of a module its values, one at a time.

    Args:
        module: parameters on the meta device; buffers real.
        slots: as `run.hf.bind` makes them.
        get: stored tensors by name.
        dtype: of float parameters and of what is computed in.

    Raises:
        InputError: FB-E0906 for a parameter that no stored tensor fills, or one of another shape.
    """
    by_param: dict[str, list[Place]] = {}
    for slot in slots:
        by_param.setdefault(slot.param, []).append(slot)
    filler = _Filler(module, get, dtype)
    for name, param in list(module.named_parameters(remove_duplicate=False)):
        filler.place(name, param, by_param.get(name, []))
    for name, buffer in module.named_buffers():
        if name in by_param:  # state that checkpoints hold, such as the biases of DeepSeek's routers
            filler.copy(buffer, by_param[name])
    missing = [name for name, param in module.named_parameters() if param.is_meta]
    if missing:
        raise InputError("FB-E0906", f"no stored tensor fills {len(missing)} parameter(s)", tensor=missing[0])
    return filler.report()


class _Filler:
    """The walk over a module's parameters; tied ones are filled once and stay tied."""

    def __init__(self, module: nn.Module, get: Get, dtype: torch.dtype) -> None:
        self.module, self.get, self.dtype = module, get, dtype
        self.quantised: list[str] = []
        self.decoded: list[str] = []
        self._made: dict[int, nn.Parameter] = {}
        self._seen: list[torch.Tensor] = []  # keeps meta parameters alive, so that their ids stay their own

    def place(self, name: str, param: nn.Parameter, slots: list[Place]) -> None:
        path, _, attribute = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if id(param) in self._made:
            setattr(owner, attribute, self._made[id(param)])
        elif slots:
            value = self._value(param, slots, keep=isinstance(owner, nn.Linear) and attribute == "weight")
            if isinstance(value, QTensor):
                self._replace(path, owner, value)
            else:
                self._seen.append(param)
                self._made[id(param)] = nn.Parameter(value, requires_grad=False)
                setattr(owner, attribute, self._made[id(param)])

    def copy(self, buffer: torch.Tensor, slots: list[Place]) -> None:
        """Fills a buffer, which keeps its dtype."""
        for slot in slots:
            found = self.get(slot.name)
            if isinstance(found, QTensor) or found.numel() != slot.view(buffer).numel():
                what = f"{tuple(found.shape)} does not fill {tuple(buffer.shape)}"
                raise InputError("FB-E0906", what, tensor=slot.name)
            slot.view(buffer).copy_(found.reshape(slot.view(buffer).shape))

    def _value(self, param: torch.Tensor, slots: list[Place], keep: bool) -> torch.Tensor | QTensor:
        whole = len(slots) == 1 and slots[0].expert is None
        if not whole:
            out = torch.empty(param.shape, dtype=self.dtype)
            for slot in slots:
                slot.view(out).copy_(self._float(slot.name))
            return out
        name = slots[0].name
        found = self.get(name)
        if isinstance(found, QTensor) and keep and tuple(found.shape) == tuple(param.shape):
            return found
        found = self._float(name, found)
        if found.numel() != param.numel():
            raise InputError("FB-E0906", f"{tuple(found.shape)} does not fill {tuple(param.shape)}", tensor=name)
        return found.reshape(param.shape)

    def _float(self, name: str, found: torch.Tensor | QTensor | None = None) -> torch.Tensor:
        found = self.get(name) if found is None else found
        if isinstance(found, QTensor):
            self.decoded.append(name)
            found = found.dequantize()
        return found.to(self.dtype)

    def _replace(self, path: str, owner: nn.Module, q: QTensor) -> None:
        parent, _, attribute = path.rpartition(".")
        layer = QuantLinear(q, bias_of(owner), dtype=self.dtype).train(owner.training)
        setattr(self.module.get_submodule(parent), attribute, layer)  # its bias is filled when its turn comes
        self.quantised.append(path)

    def report(self) -> Loaded:
        layers = [layer for layer in self.module.modules() if isinstance(layer, QuantLinear)]
        kernels: dict[str, int] = {}
        for layer in layers:
            kernels[layer.layout.name] = kernels.get(layer.layout.name, 0) + 1
        held = sum(p.numel() * p.element_size() for p in self.module.parameters()) + sum(
            layer.nbytes for layer in layers
        )
        return Loaded(tuple(self.quantised), tuple(self.decoded), held, kernels)
