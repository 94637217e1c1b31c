"""Quantised weights that are not the matrix of a linear layer: embeddings, and experts stacked in one parameter.

A table of embeddings is held as a QuantLinear: `embedding.table` is also the head, where the two are tied, so the numbers lie in memory once. Experts
become one QuantLinear each; `stack[i]` stands where a model's code wants the i-th matrix and multiplies without decoding it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.num.blocks import EACH
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels import packed
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.parts import codes_shape, pack_codes, unpack_codes

Held = Mapping[str, torch.Tensor]


class QuantEmbedding(nn.Module):
    """Rows of a quantised table, decoded when they are asked for.

    Args:
        q: [entries, width].
        padding_idx, scale: as the float layer has them; what comes out is multiplied by `scale`.
        dtype: of what comes out.

    Raises:
        InputError: FB-E0903 when no kernel accepts the table, FB-E0901 for sides, which no lookup undoes.
    """

    def __init__(
        self,
        q: QTensor,
        *,
        padding_idx: int | None = None,
        scale: float | torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if q.sides:
            raise InputError("FB-E0901", f"an embedding carries {', '.join(q.sides)}")
        self.table = QuantLinear(q, dtype=dtype, kernel=("direct", "packed"))  # the layouts whose rows can be looked up
        self.padding_idx, self.scale = padding_idx, scale

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def embedding_dim(self) -> int:
        return self.table.in_features

    @property
    def weight(self) -> torch.Tensor:
        """The table in floating point, made anew at every call."""
        return self.table.weight

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids integers [...] -> [..., width]."""
        layer = self.table
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < layer.out_features:
            raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} in a table of {layer.out_features} rows")
        found = rows_of(layer.scheme, layer.shape, layer.held, ids.reshape(-1), bytewise=layer.layout.name == "direct")
        out = found.to(layer.dtype).reshape(*ids.shape, layer.in_features)
        if self.scale is None:
            return out
        return out * (self.scale.to(out.dtype) if isinstance(self.scale, torch.Tensor) else self.scale)


def rows_of(
    scheme: Scheme, shape: tuple[int, ...], held: Held, index: torch.Tensor, *, bytewise: bool = False
) -> torch.Tensor:
    """float32 [n, cols]: some rows of a matrix in the parts of `runtime.parts`; `bytewise`: codes of scales in a byte each."""
    q = _selected(scheme, shape, held, "", index, bytewise)
    if q is not None:
        return q.dequantize()
    arrays = packed.block_arrays(scheme, shape, _canonical(scheme, held) if bytewise else held)
    cols, tiling = shape[1], scheme.blocks.resolve(shape)
    if scheme.blocks.flat:
        at = index[:, None] * cols + torch.arange(cols, device=index.device)
        entries = {name: values[0][at // tiling.block_cols] for name, values in arrays.items()}
    else:
        block = torch.arange(cols, device=index.device) // tiling.block_cols
        entries = {name: values[index // tiling.block_rows][:, block] for name, values in arrays.items()}
    codes = unpack_codes(scheme.grid, held["codes"][index], codes_shape(scheme, shape)[-1])
    levels = replace(scheme, scale=None, code_shift=None, value_shift=None, activation=None, static=False)
    values = QTensor(replace(levels, blocks=EACH), (len(index), cols), codes).dequantize()
    if "code_shift" in entries:
        values = values - entries["code_shift"]
    if "scale" in entries:
        values = values * entries["scale"]
    return values + entries["value_shift"] if "value_shift" in entries else values


def _canonical(scheme: Scheme, held: Held) -> Held:
    packed_codes = {
        f"{name}_codes": pack_codes(part.grid, held[f"{name}_codes"])
        for name, part in scheme.parts()
        if not part.is_leaf
    }
    return {**held, **packed_codes}


def _selected(
    scheme: Scheme, shape: tuple[int, ...], held: Held, prefix: str, index: torch.Tensor, bytewise: bool
) -> QTensor | None:
    """Rows as a quantised matrix of their own, or None where scales do not lie row by row."""
    if scheme.blocks.flat or scheme.blocks.rows != 1:
        return None
    counts = scheme.block_counts(shape)
    parts: dict[str, Any] = {}
    for name, part in scheme.parts():
        if f"{prefix}{name}" in held:
            if not part.is_leaf or part.blocks.rows != 1 or part.blocks.cols != 1:
                return None
            parts[name] = held[f"{prefix}{name}"].reshape(counts)[index]
        else:
            parts[name] = _selected(part, counts, held, f"{prefix}{name}_", index, bytewise)
            if parts[name] is None:
                return None
    codes = held[f"{prefix}codes"][index]
    if not (prefix and bytewise):
        codes = unpack_codes(scheme.grid, codes, codes_shape(scheme, shape)[-1])
    plain = replace(scheme, activation=None, static=False)
    return QTensor(plain, (len(index), *shape[1:]), codes, **parts)


class QuantStack(nn.Module):
    """Matrices of experts where a model holds one parameter [experts, rows, cols].

    Args:
        layers: one per expert.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(layers)

    @property
    def shape(self) -> torch.Size:
        first: Any = self.experts[0]
        return torch.Size((len(self.experts), first.out_features, first.in_features))

    @property
    def dtype(self) -> torch.dtype:
        first: Any = self.experts[0]
        return first.dtype

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.experts if isinstance(layer, QuantLinear))

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, index: int | torch.Tensor) -> Matrix:
        layer: Any = self.experts[int(index)]
        return Matrix(layer)


class Matrix:
    """Stands for the matrix of a QuantLinear in torch's functions: `linear` goes through its kernel, others get the decoded weight."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.layer.shape)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.nn.functional.linear and len(args) >= 2 and isinstance(args[1], Matrix):
            out = args[1].layer(args[0])
            bias = args[2] if len(args) > 2 else named.get("bias")
            return out if bias is None else out + bias
        decoded = [_numbers(arg) for arg in args]
        return func(*decoded, **{name: _numbers(value) for name, value in named.items()})


def _numbers(value: Any) -> Any:
    """What stands for a matrix where its numbers are wanted: with adapters (`runtime.qlora`) their sum, through which they learn."""
    if not isinstance(value, Matrix):
        return value
    layer: Any = value.layer
    return layer.adapted_weight() if hasattr(layer, "adapted_weight") else layer.weight
