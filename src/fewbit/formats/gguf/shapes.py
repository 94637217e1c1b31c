"""Transforms between a checkpoint's tensors and a GGUF's, as words, and what they do to shapes. `ops.py` does it to tensors.

    transpose                     the last two dimensions change places
    stack                         all tensors read become one with a leading dimension
    permute_rope:H                rows of H heads from half-split to interleaved rotary order, as llama.cpp's ROPE_TYPE_NORM reads them
    unfold:H                      [R, C] -> [H, R / H, C]
    slice:AXIS:START:STOP:STEP    a part along one axis
    add:X                         a number added to every weight (gemma's norms are stored less one)

Tables may write three short forms of slice, with expressions for numbers: take:AXIS:K:N (part K of N equal ones),
range:AXIS:START:STOP and every:AXIS:START:STEP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbit.base.errors import InputError

Shape = tuple[int, ...]


def parse(op: str) -> tuple[str, tuple[float, ...]]:
    """The word and the numbers of an op: "slice:-2:0:64:1" -> ("slice", (-2, 0, 64, 1))."""
    word, *numbers = op.split(":")
    return word, tuple(float(n) if word == "add" else int(n) for n in numbers)


def resolved(op: str, shape: Shape, compute: Callable[[str], Any]) -> str:
    """An op of a table with its numbers filled in for a source of this shape; `compute` evaluates expressions."""
    word, *texts = op.strip().split(":")
    numbers = [compute(text) for text in texts]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise InputError("FB-E0322", f"the config lacks a number that {op!r} needs")
    if word == "take":
        axis, part, count = numbers
        if shape[axis] % count:
            raise InputError("FB-E0323", f"dimension {axis} of {list(shape)} cannot be cut into {count} equal parts")
        size = shape[axis] // count
        word, numbers = "slice", [axis, part * size, (part + 1) * size, 1]
    elif word == "range":
        word, numbers = "slice", [*numbers, 1]
    elif word == "every":
        axis, start, step = numbers
        word, numbers = "slice", [axis, start, shape[axis], step]
    return ":".join([word, *map(str, numbers)])


def shape_after(op: str, shape: Shape, count: int = 1) -> Shape:
    """The shape that an op makes of `shape`; `count` is how many tensors a stack gets.

    Raises:
        InputError: FB-E0323 when the op cannot be applied to this shape.
    """
    word, numbers = parse(op)
    if word == "stack":
        return (count, *shape)
    if word == "add":
        return shape
    if word == "transpose" and len(shape) >= 2:
        return (*shape[:-2], shape[-1], shape[-2])
    if word in ("permute_rope", "unfold") and shape[0] % (int(numbers[0]) * (2 if word == "permute_rope" else 1)) == 0:
        heads = int(numbers[0])
        return shape if word == "permute_rope" else (heads, shape[0] // heads, *shape[1:])
    if word == "slice":
        axis, start, stop, step = map(int, numbers)
        if -len(shape) <= axis < 0 and 0 <= start < stop <= shape[axis]:
            size = len(range(start, stop, step))
            return (*shape[: len(shape) + axis], size, *shape[len(shape) + axis + 1 :])
    raise InputError("FB-E0323", f"{op} cannot be applied to a tensor of shape {list(shape)}")
