"""The transforms of `shapes.py` on tensors, on quantised tensors, and backwards.

Forward, `apply` makes a GGUF tensor of what was read. On a quantised tensor only what moves whole rows is possible: `apply_quantised` does
that, so that a solver may work in the checkpoint's own order. `restore` goes back, from one or several GGUF tensors to the
checkpoint's tensor that they were made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.shapes import parse
from fewbit.num.qtensor import QTensor


def _rope_order(rows: int, heads: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [rows]: row j of the result is row order[j] of the source."""
    return torch.arange(rows, device=device).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _slices(numbers: tuple[float, ...]) -> tuple[int, slice]:
    axis, start, stop, step = map(int, numbers)
    return axis, slice(start, stop, step)


def _along(tensor: torch.Tensor, axis: int, part: slice) -> torch.Tensor:
    index = [slice(None)] * tensor.ndim
    index[axis] = part
    return tensor[tuple(index)]


def apply(ops: Sequence[str], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The target tensor made of what was read; a view where possible."""
    value = tensors[0]
    for op in ops:
        word, numbers = parse(op)
        if word == "stack":
            value = torch.stack(list(tensors))
        elif word == "transpose":
            value = value.swapaxes(-1, -2)
        elif word == "permute_rope":
            value = value[_rope_order(value.shape[0], int(numbers[0]), value.device)]
        elif word == "unfold":
            value = value.unflatten(0, (int(numbers[0]), -1))
        elif word == "slice":
            value = _along(value, *_slices(numbers))
        elif word == "add":
            value = value.float() + numbers[0]
        else:
            raise ValueError(f"unknown op {op!r}")
    return value


def apply_quantised(ops: Sequence[str], tensors: Sequence[QTensor]) -> QTensor:
    """The same on quantised tensors, for ops that move whole rows: stack, permute_rope, unfold and slices of rows or of experts.

    Raises:
        InputError: FB-E0603 for an op that would cut through rows or change values.
    """
    value = tensors[0]
    for op in ops:
        word, numbers = parse(op)
        if word == "stack":
            value = stack_quantised(list(tensors))
        elif word == "permute_rope":
            value = _rows(value, _rope_order(value.shape[0], int(numbers[0])))
        elif word == "unfold":
            heads = int(numbers[0])
            value = _reshaped(value, (heads, value.shape[0] // heads, *value.shape[1:]))
        elif word == "slice" and -len(value.shape) <= numbers[0] < -1:
            axis, part = _slices(numbers)
            if axis == -2:
                value = _rows(value, torch.arange(value.shape[-2])[part])
            else:
                value = _batch(value, axis + len(value.shape), part)
        else:
            raise InputError("FB-E0603", f"{op} cannot be done to a quantised tensor of shape {list(value.shape)}")
    return value


S = TypeVar("S", QTensor, torch.Tensor)


def _each_part(q: QTensor, codes: torch.Tensor, shape: tuple[int, ...], change: Callable[[str, Any], Any]) -> QTensor:
    """A QTensor with other codes, and its scale and shifts changed alike."""
    if q.sides:
        raise InputError("FB-E0603", f"a tensor with {', '.join(q.sides)} cannot be cut or stacked")
    parts: dict[str, Any] = {}
    for name in ("scale", "code_shift", "value_shift"):
        part, scheme = getattr(q, name), getattr(q.scheme, name)
        if part is None:
            continue
        if (
            q.scheme.blocks.rows != 1
            or q.scheme.blocks.flat
            or (not isinstance(part, QTensor) and scheme.blocks.rows != 1)
        ):
            raise InputError("FB-E0603", f"{q.scheme} shares scales between rows, its rows cannot be moved")
        parts[name] = change(name, part)
    return replace(q, shape=shape, codes=codes, **parts)


def _rows(q: S, order: torch.Tensor) -> S:
    """Rows in another order, or some of them: [..., rows, n] -> [..., len(order), n]."""
    if not isinstance(q, QTensor):
        return q.index_select(-2, order.to(q.device))
    shape = (*q.shape[:-2], len(order), q.shape[-1])
    return _each_part(q, q.codes.index_select(-2, order.to(q.codes.device)), shape, lambda _, part: _rows(part, order))


def _batch(q: S, axis: int, part: slice) -> S:
    """Some entries of a leading dimension."""
    if not isinstance(q, QTensor):
        return _along(q, axis, part)
    shape = (*q.shape[:axis], len(range(q.shape[axis])[part]), *q.shape[axis + 1 :])
    return _each_part(q, _along(q.codes, axis, part), shape, lambda _, inner: _batch(inner, axis, part))


def _reshaped(q: S, shape: tuple[int, ...]) -> S:
    """Other leading dimensions for the same rows."""
    if not isinstance(q, QTensor):
        return q.reshape(*shape[:-1], q.shape[-1])
    codes = q.codes.reshape(*shape[:-1], q.codes.shape[-1])
    return _each_part(q, codes, (*shape[:-1], q.shape[-1]), lambda _, part: _reshaped(part, shape))


def stack_quantised(parts: list[S]) -> S:
    """Equal tensors under a new leading dimension."""
    first: S = parts[0]
    if not isinstance(first, QTensor):
        return torch.stack(parts)
    if any(part.scheme != first.scheme or part.shape != first.shape for part in parts):
        raise InputError("FB-E0603", "tensors of different schemes or shapes cannot be stacked")
    codes = torch.stack([part.codes for part in parts])
    shape = (len(parts), *first.shape)
    return _each_part(first, codes, shape, lambda name, _: stack_quantised([getattr(part, name) for part in parts]))


def undo_quantised(ops: Sequence[str], q: QTensor) -> QTensor | None:
    """The source matrix of a target that was made of it alone, still quantised; None where an op does more than move whole rows."""
    for op in reversed(ops):
        word, numbers = parse(op)
        if word != "permute_rope":
            return None
        q = _rows(q, torch.argsort(_rope_order(q.shape[-2], int(numbers[0]), q.device)))
    return q


def restore(pieces: Sequence[tuple[Sequence[str], torch.Tensor, int]]) -> torch.Tensor:
    """The source tensor that GGUF tensors were made of.

    Args:
        pieces: for each target that read it: (ops, the target's values, which of the target's reads it is).

    Raises:
        InputError: FB-E0323 when the pieces do not make up the whole.
    """
    undone = [_undo(list(ops), value, index) for ops, value, index in pieces]
    ops, value, sliced = undone[0]
    if sliced is not None:
        value = _joined(undone)
    for op in reversed(ops):
        value = _inverse(op, value)
    return value


def _undo(ops: list[str], value: torch.Tensor, index: int) -> tuple[list[str], torch.Tensor, str | None]:
    """Walk back to the slice, if there is one: (ops still to undo, values, the slice)."""
    while ops:
        op = ops.pop()
        if op.startswith("slice:"):
            return ops, value, op
        value = value[index] if op == "stack" else _inverse(op, value)
    return ops, value, None


def _inverse(op: str, value: torch.Tensor) -> torch.Tensor:
    word, numbers = parse(op)
    if word == "transpose":
        return value.swapaxes(-1, -2)
    if word == "permute_rope":
        return value[torch.argsort(_rope_order(value.shape[0], int(numbers[0]), value.device))]
    if word == "unfold":
        return value.flatten(0, 1)
    if word == "add":
        return value - numbers[0]
    raise ValueError(f"{op!r} cannot be undone by itself")


def _joined(undone: list[tuple[list[str], torch.Tensor, str | None]]) -> torch.Tensor:
    """Slices of one tensor put together again."""
    parts = [(*_slices(parse(op)[1]), value) for _, value, op in undone if op is not None]
    axis = parts[0][0]
    size = sum(value.shape[axis] for _, _, value in parts)
    whole = parts[0][2].new_empty(
        [size if d == parts[0][2].ndim + axis else n for d, n in enumerate(parts[0][2].shape)]
    )
    covered = torch.zeros(size, dtype=torch.bool)
    for _, part, value in parts:
        covered[part] = True
        _along(whole, axis, part).copy_(value)
    if len(parts) != len(undone) or not bool(covered.all()):
        raise InputError("FB-E0323", "the parts of a tensor that was cut do not make up the whole")
    return whole
