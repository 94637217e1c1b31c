"""Quantise the linear layers of a module in memory.

    quantize_(model, "nf4-g64-dq")
    quantize_(model, "w8a8", threshold=6.0)                       LLM.int8()
    quantize_(model, "int4-g128", method="hqq", skip=("lm_head", "*.router"))

One layer at a time: the float weight is let go before the next is solved.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.runtime.linear import QuantLinear, bias_of, weight_of
from fewbit.runtime.tables import QuantEmbedding, QuantStack
from fewbit.solve.table import Solver, solver_named

SHORT = {"nf4": "nf4-g64-dq", "int4": "int4-g128"}  # what people mean by a bare word


@dataclass(frozen=True)
class Replaced:
    """One layer that was quantised.

    Attributes:
        name: in the module.
        scheme, kernel: how it is stored and computed.
        before, after: bytes of the weight in memory.
        loss: the solver's, squared error summed over the weights.
        notes: what was out of the ordinary.
    """

    name: str
    scheme: str
    kernel: str
    before: int
    after: int
    loss: float
    notes: tuple[str, ...] = ()


def quantize_(
    module: nn.Module,
    scheme: str | Scheme,
    *,
    method: str = "rtn",
    skip: Collection[str] = ("lm_head",),
    threshold: float = 0.0,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    also: Collection[str] = (),
) -> tuple[Replaced, ...]:
    """Replaces every `nn.Linear` (and transformers' Conv1D) inside a module by a `QuantLinear`, in place.

    Args:
        module: any module; other parameters (norms, biases) stay as they are.
        scheme: spelling or preset, `num.scheme`.
        method: a solver that needs no calibration: rtn, hqq.
        skip: full names, last parts of names, or patterns of layers to leave alone.
        threshold: for int8 activations, see `QuantLinear`.
        options: of the solver.
        seed: for solvers that draw.
        also: "embeddings" and "experts" (parameters [experts, rows, cols]), which stay in floating point else; an embedding that a head is tied to
            takes the head along.

    Returns:
        What was replaced, in the module's order.

    Raises:
        InputError: FB-E0905 when the method needs calibration, the scheme a calibrated range, or a weight is on the meta device; FB-E0601,
            FB-E0702 to FB-E0704 from parsing and solving.
    """
    wanted = parse_scheme(SHORT.get(scheme, scheme)) if isinstance(scheme, str) else scheme
    data_free(wanted, method)
    if unknown := set(also) - {"embeddings", "experts"}:
        raise InputError("FB-E0905", f"`also` knows embeddings and experts, not {', '.join(sorted(unknown))}")
    if isinstance(module, (nn.Linear, *_conv1d())):
        raise InputError("FB-E0905", f"a {type(module).__name__} cannot replace itself in place; put it into a module")
    made: dict[int, QuantLinear] = {}
    rows = []
    for parent, attribute, name, layer in list(linears(module)):
        if skipped(name, skip):
            continue
        if id(layer) not in made:  # a layer that stands in two places stays one
            found, row = quantised_layer(
                weight_of(layer).detach(), bias_of(layer), wanted, name=name, transposed=not isinstance(layer, nn.Linear), method=method,
                threshold=threshold, options=options, seed=seed,
            )  # fmt: skip
            made[id(layer)] = found.train(layer.training)
            rows.append(row)
        setattr(parent, attribute, made[id(layer)])
        layer.register_parameter("weight", None)  # free the float weight even where someone still holds the layer
    words = {"threshold": 0.0, "method": method, "options": options, "seed": seed}
    if "experts" in also:
        rows += _stacks(module, wanted.weights_only, skip, words)
    if "embeddings" in also:
        rows += _embeddings(module, wanted.weights_only, skip, words)
    _tell_transformers(module, {"scheme": str(wanted), "method": method, "threshold": threshold}, also)
    return tuple(rows)


def _tell_transformers(module: nn.Module, said: dict[str, Any], also: Collection[str]) -> None:
    """Lets a transformers model know what it is, so that what `save_pretrained` writes can be loaded again."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is not None and isinstance(module, loaded.PreTrainedModel):
        from fewbit.runtime.hf import FewbitConfig, mark

        mark(module, FewbitConfig(**said), also)


def _stacks(module: nn.Module, scheme: Scheme, skip: Collection[str], words: dict[str, Any]) -> list[Replaced]:
    """Parameters [experts, rows, cols] become a QuantStack each."""
    rows = []
    for path, owner in list(module.named_modules()):
        for attribute, param in list(owner._parameters.items()):
            name = f"{path}.{attribute}".lstrip(".")
            kernel = isinstance(owner, nn.modules.conv._ConvNd)
            if kernel or param is None or param.dim() != 3 or not param.is_floating_point() or skipped(name, skip):
                continue
            found = [
                quantised_layer(w, None, scheme, name=f"{name}.{i}", **words) for i, w in enumerate(param.detach())
            ]
            del owner._parameters[attribute]
            setattr(owner, attribute, QuantStack([layer for layer, _ in found]))
            rows += [row for _, row in found]
            if hasattr(owner, "config"):
                owner.config._experts_implementation = "eager"  # one product per expert, through the stack
    return rows


def _embeddings(module: nn.Module, scheme: Scheme, skip: Collection[str], words: dict[str, Any]) -> list[Replaced]:
    """Embeddings become a QuantEmbedding each, and linear layers that share their weight its table."""
    rows: list[Replaced] = []
    tables: dict[int, QuantLinear] = {}
    weights = []  # kept, so that their ids stay their own
    for path, owner in list(module.named_modules()):
        for attribute, child in list(owner._modules.items()):
            name = f"{path}.{attribute}".lstrip(".")
            if not isinstance(child, nn.Embedding) or skipped(name, skip):
                continue
            if type(child).forward is not nn.Embedding.forward and not hasattr(child, "embed_scale"):
                size = child.weight.numel() * child.weight.element_size()
                note = f"a {type(child).__name__} looks up in a way of its own and stays as it is"
                rows.append(Replaced(name, "kept", "torch", size, size, 0.0, (note,)))
                continue
            layer, row = quantised_layer(child.weight.detach(), None, scheme, name=name, **words)
            factor = getattr(child, "embed_scale", None)
            made = QuantEmbedding(layer.qtensor(), padding_idx=child.padding_idx, scale=factor, dtype=layer.dtype)
            tables[id(child.weight)] = made.table
            weights.append(child.weight)
            setattr(owner, attribute, made)
            rows.append(row)
    for owner, attribute, _, user in list(linears(module)):
        if id(user.weight) in tables and user.bias is None:
            setattr(owner, attribute, tables[id(user.weight)])
    return rows


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, layer) of every linear layer, in order."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *_conv1d())
    for prefix, parent in module.named_modules():
        for attribute, child in parent._modules.items():  # named_children leaves out a second name of one layer
            if isinstance(child, kinds):
                yield parent, attribute, f"{prefix}.{attribute}".lstrip("."), child


def _conv1d() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D, where transformers is loaded: else no module can hold one."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded is not None else ()


def skipped(name: str, skip: Collection[str]) -> bool:
    """Whether a layer's full name, the last part of it, or a pattern that it matches is among those to leave alone."""
    return any(pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern) for pattern in skip)


def data_free(scheme: Scheme, method: str) -> Solver:
    """The solver, where it can serve this scheme without calibration.

    Raises:
        InputError: FB-E0905 when the method needs calibration or the scheme a calibrated range.
    """
    if scheme.static:
        raise InputError("FB-E0905", f"{scheme} needs activation ranges from calibration")
    solver = solver_named(method)
    if solver.needs:
        raise InputError("FB-E0905", f"{method} needs calibration statistics: {', '.join(sorted(solver.needs))}")
    return solver


def quantised_layer(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: Scheme,
    *,
    name: str,
    transposed: bool = False,
    method: str = "rtn",
    threshold: float = 0.0,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[QuantLinear, Replaced]:
    """A layer of a float weight.

    Args:
        weight: [out_features, in_features], or [in_features, out_features] if `transposed` (Conv1D).
        name: for errors and the report.
        dtype: that activations will have; the weight's by default.

    Raises:
        InputError: FB-E0905 for a weight without numbers, and as `data_free`.
    """
    solver = data_free(scheme, method)
    if weight.is_meta or not weight.is_floating_point():
        raise InputError("FB-E0905", f"the weight is {weight.dtype} on {weight.device}", tensor=name)
    rows_first = weight.T if transposed else weight
    solved = solver(rows_first.float().contiguous(), None, scheme.weights_only, seed=seed, options=dict(options or {}))
    q = replace(solved.q, scheme=replace(solved.q.scheme, activation=scheme.activation))
    made = QuantLinear(q, bias, dtype=dtype or weight.dtype, threshold=threshold)
    before = weight.numel() * weight.element_size()
    return made, Replaced(name, str(scheme), made.layout.name, before, made.nbytes, solved.loss, solved.notes)
