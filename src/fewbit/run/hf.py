"""A transformers model as a stream of blocks, none of which needs to be in memory before its turn.

The module is built on the meta device: no weight is allocated. Its repeated blocks are found by structure (the ModuleList that holds
most parameters), whatever the family calls them. A block is run with `torch.func.functional_call` on tensors that the caller passes, so
the same block can be run with float weights, quantised weights, or fake-quantised ones, and nothing is ever loaded into modules.

    model = BlockModel(source.config, source.manifest)
    trunk = model.load_trunk(source.read)                 embeddings, final norm, head
    entry = model.enter(trunk, tokens)                    hidden states before block 0, and each block's keyword arguments
    hidden = model.run_block(i, params, hidden, entry.kwargs[i])
    logits = model.leave(trunk, tokens, hidden)           final norm, head, soft caps: the model's own code

What a family's forward does before and after the blocks is its own code too: it is run with blocks that record or pass on.
Checkpoint names and parameter names differ where transformers fuses experts: a `Slot` says which part of which parameter a stored
tensor is. Only this file and `runtime` import transformers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.run.lanes import lane
from fewbit.runtime.floats import held
from fewbit.store.config import INFINITE

Read = Callable[[str], torch.Tensor]
Params = dict[str, torch.Tensor]

# part of a fused parameter's name -> names of the stored tensors that it is made of, per expert, in order along its rows
_EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_PREFIXES = ("", "model.", "transformer.", "bert.", "model.language_model.", "language_model.")


@dataclass(frozen=True)
class Slot:
    """Where a stored tensor goes: the whole of a parameter, or rows [start, stop) of one expert of it.

    Attributes:
        name: in the checkpoint.
        param: full name of the module's parameter.
        expert: index along the first dimension, or None.
        rows: part of the rows of that expert's matrix, or None for all.
    """

    name: str
    param: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, param: torch.Tensor) -> torch.Tensor:
        """The part of the parameter that this tensor fills; a view."""
        part = param if self.expert is None else param[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


@dataclass
class Entry:
    """What the blocks of a model are called with for one batch: the first hidden states and each block's arguments."""

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]] = field(default_factory=list)


def build_config(config: Mapping[str, Any]) -> Any:
    """transformers' config object of plain config data; nothing in it can load code.

    Raises:
        InputError: FB-E0720 when transformers knows no such model type.
    """
    from transformers import AutoConfig

    data = {
        key: _numbers(value)
        for key, value in config.items()
        if not key.startswith("_") and key not in ("auto_map", "quantization_config")
    }
    model_type = data.pop("model_type", None)
    data.pop("transformers_version", None)
    try:
        made = AutoConfig.for_model(model_type, **data)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "FB-E0720", f"transformers cannot build a model of type {model_type!r}: {str(error).splitlines()[0][:200]}"
        ) from None
    made.use_cache = False
    for part in (made, getattr(made, "text_config", None)):
        if part is not None:
            part._experts_implementation = "eager"  # one matrix product per expert, which an observer can tell apart
    return made


def _numbers(value: Any) -> Any:
    """Config data in which infinite numbers are numbers."""
    if isinstance(value, Mapping):
        return float(value[INFINITE]) if value.keys() == {INFINITE} else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """New parameters are meta tensors; buffers (rotary frequencies) are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The module of a config, its parameters on the meta device, in evaluation mode."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    made = build_config(config)
    architectures = config.get("architectures") or [""]
    masked = any("Masked" in name for name in architectures)
    for factory in (AutoModelForMaskedLM,) if masked else (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        if type(made) in factory._model_mapping:
            with _meta_parameters():
                module = factory.from_config(made, dtype=torch.float32).eval()
            module.tie_weights()  # parameters made on the meta device lost their ties
            return module
    raise InputError("FB-E0720", f"transformers has no text model for {made.model_type!r}")


class BlockModel:
    """A transformer whose blocks are run one at a time on tensors given by the caller.

    Attributes:
        module: the whole model; blocks on the meta device.
        prefix: full name of the list of blocks, e.g. "model.layers".
        blocks: the block modules.
        slots: stored tensor name -> Slot.
        dtype: of weights and activations.
    """

    def __init__(
        self, config: Mapping[str, Any], manifest: Manifest, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.module = build_model(config).requires_grad_(False)
        self.dtype, self.device = dtype, torch.device(device)
        self.prefix, self.blocks = find_blocks(self.module)
        self.slots = bind(self.module, manifest)
        self._by_param: dict[str, list[Slot]] = {}
        for slot in self.slots.values():
            self._by_param.setdefault(slot.param, []).append(slot)
        self._tied = _tied(self.module)
        self._copies: dict[int, nn.Module] = {}
        self._copied = -1
        self._check_complete()

    def __len__(self) -> int:
        return len(self.blocks)

    def _check_complete(self) -> None:
        for name, _ in stored_tensors(self.module):
            if name not in self._by_param and name not in self._tied:
                raise InputError(
                    "FB-E0721", f"the model has a parameter {name!r} that the checkpoint has not", tensor=name
                )

    def block_params(self, index: int) -> dict[str, str]:
        """Local name -> full name of the parameters of a block."""
        return {name: f"{self.prefix}.{index}.{name}" for name, _ in stored_tensors(self.blocks[index])}

    def block_slots(self, index: int) -> list[Slot]:
        """The stored tensors that a block is made of."""
        return [slot for full in self.block_params(index).values() for slot in self._by_param[full]]

    def local(self, index: int, slot: Slot) -> str:
        """A slot's parameter name within its block."""
        return slot.param.removeprefix(f"{self.prefix}.{index}.")

    def _gather(self, full: str, like: torch.Tensor, read: Read) -> torch.Tensor:
        slots = self._by_param[full]
        if len(slots) == 1 and slots[0].expert is None:
            found = read(slots[0].name)
            if tuple(found.shape) != tuple(like.shape):
                what = f"the checkpoint has {list(found.shape)}, the model wants {list(like.shape)}"
                raise InputError("FB-E0723", what, tensor=slots[0].name)
            return found.to(self.device, self.dtype)
        param = torch.empty(like.shape, dtype=self.dtype, device=self.device)
        for slot in slots:
            slot.view(param).copy_(read(slot.name))
        return param

    def load_block(self, index: int, read: Read) -> Params:
        """The parameters of a block, by local name, read from a checkpoint."""
        return {
            name: self._gather(f"{self.prefix}.{index}.{name}", param, read)
            for name, param in stored_tensors(self.blocks[index])
        }

    def load_trunk(self, read: Read) -> Params:
        """All parameters outside the blocks, by full name; tied ones share memory."""
        trunk: Params = {}
        for name, param in stored_tensors(self.module):
            if not name.startswith(self.prefix + "."):
                trunk[name] = self._gather(name, param, read)
        for name, other in self._tied.items():
            trunk[name] = trunk[other]
        return trunk

    def enter(self, trunk: Params, tokens: torch.Tensor) -> Entry:
        """Runs everything before block 0 on tokens [batch, length]."""
        entry = Entry(torch.empty(0))

        def record(hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
            if not entry.kwargs:
                entry.hidden = hidden
            entry.kwargs.append(kwargs)
            return hidden

        with self._blocks_as(record), torch.no_grad():
            self._call_backbone(trunk, tokens)
        return entry

    def leave(self, trunk: Params, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Runs everything after the last block; logits [batch, length, vocab] (or hidden states of a model without head)."""
        with self._blocks_as(lambda _hidden, _kwargs: hidden):
            out = torch.func.functional_call(
                self.module, trunk, (tokens.to(self.device),), tie_weights=False, strict=False
            )
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    def _call_backbone(self, trunk: Params, tokens: torch.Tensor) -> None:
        base: nn.Module = getattr(self.module, "base_model", self.module)
        prefix = next((name + "." for name, module in self.module.named_modules() if module is base and name), "")
        params = {name.removeprefix(prefix): value for name, value in trunk.items() if name.startswith(prefix)}
        torch.func.functional_call(base, params, (tokens.to(self.device),), tie_weights=False, strict=False)

    @staticmethod
    def arguments(kwargs: dict[str, Any], recorded: int, batch: int) -> dict[str, Any]:
        """A block's arguments for `batch` sequences, from those that were recorded with `recorded` sequences."""
        return kwargs if batch == recorded else {name: _cut(value, recorded, batch) for name, value in kwargs.items()}

    def kind(self, index: int) -> str:
        """Blocks of one kind do the same with their parameters: their modules agree in all but their number in the model."""

        def plain(module: nn.Module) -> list[tuple[str, Any]]:
            held = (
                (name, value)
                for name, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None)))
            )
            return sorted((name, value) for name, value in held if name != "layer_idx")

        block = self.blocks[index]
        return repr(
            [(name, type(module).__qualname__, plain(module)) for name, module in block.named_modules()]
        ) + repr([(name, tuple(param.shape)) for name, param in block.named_parameters()])

    def prepare(self, index: int, lanes: int) -> None:
        """Makes the modules with which lanes beside the first run a block: a call puts parameters into its module for as long as it lasts."""
        if self._copied != index or len(self._copies) < lanes - 1:
            self._copies = {number: copy.deepcopy(self.blocks[index]) for number in range(1, lanes)}
            self._copied = index

    def run_block(self, index: int, params: Params, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """One block on hidden states [batch, length, width] with the given parameters; in a lane, by the lane's own module (see `prepare`)."""
        module = self._copies[lane()] if lane() else self.blocks[index]
        out = torch.func.functional_call(module, params, (hidden,), kwargs, tie_weights=False, strict=True)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _blocks_as(self, call: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]) -> Iterator[None]:
        """While this lasts, blocks do `call(hidden, kwargs)` instead of their work; arguments by position become keywords."""
        import inspect

        before = [block.forward for block in self.blocks]
        for block, real in zip(self.blocks, before, strict=True):
            names = [name for name in inspect.signature(real).parameters if name not in ("args", "kwargs")]

            def forward(hidden: torch.Tensor, *args: Any, _names: list[str] = names, **kwargs: Any) -> torch.Tensor:
                return call(hidden, {**dict(zip(_names[1:], args, strict=False)), **kwargs})

            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _cut(value: Any, recorded: int, batch: int) -> Any:
    """Masks and positions that have one entry per sequence, for fewer sequences."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == recorded:
        return value[:batch]
    if isinstance(value, tuple):
        return tuple(_cut(item, recorded, batch) for item in value)
    return value


def find_blocks(module: nn.Module) -> tuple[str, list[nn.Module]]:
    """The repeated blocks: the outermost ModuleList with most parameters.

    Raises:
        InputError: FB-E0722 when there is none.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(name.startswith(outer + ".") for _, outer, _ in found):
            found.append((sum(p.numel() for p in child.parameters()), name, child))
    if not found:
        raise InputError("FB-E0722", f"{type(module).__name__} has no list of repeated blocks")
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, list(blocks)


def _tied(module: nn.Module) -> dict[str, str]:
    """Parameter names that are another name of the same tensor (tied heads) -> the name that `named_parameters` gives."""
    return {name: one.names[0] for one in held(module) for name in one.names[1:]}


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a module, by name: its parameters, then its persistent buffers (DeepSeek's correction of the router's scores)."""
    yield from module.named_parameters()
    kept = module.state_dict()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def bind(module: nn.Module, manifest: Manifest) -> dict[str, Slot]:
    """Which stored tensor fills which part of which parameter. Stored tensors that no parameter wants are left out."""
    slots: dict[str, Slot] = {}
    for name, param in stored_tensors(module):
        stored = _stored_as(name, manifest)
        if stored is not None:
            slots[stored] = Slot(stored, name)
            continue
        for slot in _expert_slots(name, tuple(param.shape), manifest):
            slots[slot.name] = slot
    return slots


def copies(module: nn.Module, manifest: Manifest, slots: Mapping[str, Slot]) -> dict[str, str]:
    """Stored tensors that only repeat a parameter under its other name (a head beside the embedding it is tied to) -> the parameter.

    Args:
        slots: of the same, from `bind`.
    """
    found = ((_stored_as(name, manifest), param) for name, param in _tied(module).items())
    return {stored: param for stored, param in found if stored is not None and stored not in slots}


def _stored_as(name: str, manifest: Manifest) -> str | None:
    """The name under which a parameter is stored, or None."""
    return next((found for found in _spellings(name) if found in manifest), None)


def _spellings(name: str) -> Iterator[str]:
    """Names under which a parameter may be stored: with or without the base model's prefix."""
    bare = next(
        (name.removeprefix(p) for p in sorted(_PREFIXES, key=len, reverse=True) if p and name.startswith(p)), name
    )
    yield name
    for form in (name, bare):
        for prefix in _PREFIXES:
            yield prefix + form
    if ".mlp.gate." in name:  # Mixtral's router
        yield from _spellings(name.replace(".mlp.gate.", ".block_sparse_moe.gate."))


def _expert_slots(name: str, shape: tuple[int, ...], manifest: Manifest) -> list[Slot]:
    """Slots of a fused expert parameter [experts, rows, cols] whose experts are stored one by one."""
    match = re.fullmatch(r"(.*)\.experts\.(gate_up_proj|down_proj)", name)
    if match is None or len(shape) != 3:
        return []
    stem, kind = match.groups()
    for base in (stem, stem.replace(".mlp", ".block_sparse_moe")):
        for parts in _EXPERT_PARTS[kind]:
            step = shape[1] // len(parts)
            slots = [
                Slot(found, name, expert, (i * step, (i + 1) * step))
                for expert in range(shape[0])
                for i, part in enumerate(parts)
                if (found := _stored_as(f"{base}.experts.{expert}.{part}.weight", manifest)) is not None
            ]
            if len(slots) == shape[0] * len(parts):
                return slots
    return []
