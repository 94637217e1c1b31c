"""Equal float models: exact linear changes of a space, as steps on the tensors at its ends.

A rewrite of a model is a dictionary: tensor name -> steps, applied in order to the tensor as it is stored. A step is a pure function that
knows along which axis it works, so a tensor can be rewritten some rows at a time whenever all its steps work along columns.

    scale(space, s)        what passes through the space becomes x / s: writers / s, readers * s
    turn(space, rotation)  what passes through becomes Q x: writers and readers turned alike, Q orthogonal
    absorb(space, …)       a norm's gain goes into its readers, so that the norm commutes with a rotation of what it reads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch

from fewbit.arch.rewrite_spaces import End, Space
from fewbit.base.errors import InputError

Steps = dict[str, tuple["Step", ...]]


class Step(Protocol):
    """A pure change of one tensor. axis: -1 or -2, the axis that it mixes or scales."""

    @property
    def axis(self) -> int: ...

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor: ...


class Turning(Protocol):
    """An orthogonal matrix Q of order `size`: apply(x) is x Q^T along the last axis."""

    @property
    def size(self) -> int: ...

    def apply(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Multiply:
    """Entries along a part of an axis times factors.

    Attributes:
        axis, start: where. factor: [n], or [experts, n] for a stack.
        offset: the tensor stands for itself plus this (norm gains of Gemma).
    """

    axis: int
    factor: torch.Tensor
    start: int = 0
    offset: float = 0.0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        factor = self.factor.to(tensor)
        if factor.dim() == 2 or self.axis == -2:
            factor = factor.unsqueeze(-1 if self.axis == -2 else -2)
        return _on_part(tensor, self, self.factor.shape[-1], lambda part: self._scaled(part, factor))

    def _scaled(self, part: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (part + self.offset) * factor - self.offset if self.offset else part * factor


@dataclass(frozen=True, eq=False)
class Turn:
    """A part of an axis, in blocks of the rotation's order, turned by it."""

    axis: int
    rotation: Turning
    start: int
    size: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return _on_part(tensor, self, self.size, self._turned)

    def _turned(self, part: torch.Tensor) -> torch.Tensor:
        last = part if self.axis == -1 else part.transpose(-1, -2)
        out = self.rotation.apply(last.reshape(*last.shape[:-1], -1, self.rotation.size)).reshape(last.shape)
        return out if self.axis == -1 else out.transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Put:
    """The whole tensor replaced by another (a norm's bias)."""

    value: torch.Tensor
    axis: int = -1

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.value.to(tensor).expand(tensor.shape).clone()


def _on_part(
    tensor: torch.Tensor, step: Multiply | Turn, size: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    start, length = step.start, tensor.shape[step.axis]
    if start == 0 and size == length:
        return change(tensor)
    out = tensor.clone()
    where = (..., slice(start, start + size)) if step.axis == -1 else (..., slice(start, start + size), slice(None))
    out[where] = change(tensor[where])
    return out


def apply_steps(tensor: torch.Tensor, steps: tuple[Step, ...]) -> torch.Tensor:
    """A tensor with steps applied, in float64 for float64 and in float32 for everything else."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return reduce(lambda made, step: step(made), steps, wide)


def merge(*parts: Mapping[str, tuple[Step, ...]]) -> Steps:
    """Rewrites one after another."""
    made: Steps = {}
    for part in parts:
        for name, steps in part.items():
            made[name] = (*made.get(name, ()), *steps)
    return made


def scale(space: Space, s: torch.Tensor, offset: float = 0.0) -> Steps:
    """What passes through a space becomes x / s.

    Args:
        s: float [size], or [stack, size]; positive and finite.
        offset: of the family's norms.

    Raises:
        InputError: FB-E0740 when the space bears no scale, or s is not positive and finite.
    """
    if not space.scalable:
        raise InputError("FB-E0740", f"the space {space.key} bears no scale")
    wanted = (space.stack, space.size) if space.stack else (space.size,)
    if tuple(s.shape) != wanted or not bool((torch.isfinite(s) & (s > 0)).all()):
        raise InputError("FB-E0740", f"scales of {space.key} must be positive, finite and of shape {wanted}")
    s = s.double()
    made: list[Steps] = [{name: (Multiply(-1, 1 / s, offset=offset),)} for name in space.gains]
    made += [{name: (Multiply(-1, 1 / s),)} for name in space.shifts]
    made += [{end.name: (Multiply(end.axis, 1 / s, end.start),)} for end in space.writers]
    made += [{end.name: (Multiply(end.axis, repeated(s, space, end)),)} for end in space.readers]
    return merge(*made)


def repeated(s: torch.Tensor, space: Space, end: End) -> torch.Tensor:
    """Factors of a space as a reader sees them: heads repeated under grouped-query attention."""
    if end.repeat == 1:
        return s
    heads = s.reshape(*s.shape[:-1], -1, space.head)
    return heads.repeat_interleave(end.repeat, dim=-2).reshape(*s.shape[:-1], -1)


def pooled(x: torch.Tensor, space: Space, end: End) -> torch.Tensor:
    """Statistics [.., channels of the reader] as the space sees them: the largest over heads that share one head."""
    if end.repeat == 1:
        return x
    heads = x.reshape(*x.shape[:-1], -1, end.repeat, space.head)
    return heads.amax(-2).reshape(*x.shape[:-1], space.size)


def turn(space: Space, rotation: Turning) -> Steps:
    """What passes through a space becomes Q x, with Q of the space's order or of one head's.

    Raises:
        InputError: FB-E0740 when the order does not divide the space, or a norm with a gain writes it.
    """
    if space.gains or space.size % rotation.size or (space.head and space.head % rotation.size):
        raise InputError("FB-E0740", f"{space.key} cannot be turned by a matrix of order {rotation.size}")
    ends = (*space.writers, *(end for end in space.readers if end.role != "norm"))
    return merge(*({end.name: (Turn(end.axis, rotation, end.start, end.size),)} for end in ends))


def absorb(
    space: Space, gain: torch.Tensor, rotation: Turning, shift: torch.Tensor | None = None, offset: float = 0.0
) -> Steps:
    """The norm that writes a space reads what `rotation` turned: its gain goes into the readers, which turn alike.

    y = gain * n(x) + shift becomes y' = n(Q x) + Q (shift / gain), readers W' = W diag(gain) Q^T. Q must commute with n: any orthogonal
    matrix for RMS norm, one that keeps the mean for LayerNorm.

    Args:
        gain: float [size], the factor itself (weight + offset).

    Raises:
        InputError: FB-E0740 when a bias stands where the gain is zero.
    """
    if shift is not None and bool(((gain == 0) & (shift != 0)).any()):
        raise InputError(
            "FB-E0740", f"{space.key}: the norm has a bias where its gain is zero, so the gain cannot be absorbed"
        )
    made: list[Steps] = [{name: (Put(torch.tensor(1.0 - offset)),)} for name in space.gains]
    if shift is not None:
        moved = rotation.apply(torch.where(gain == 0, torch.zeros_like(shift), shift / gain))
        made += [{name: (Put(moved),)} for name in space.shifts]
    made += [
        {end.name: (Multiply(end.axis, gain), Turn(end.axis, rotation, end.start, end.size))} for end in space.readers
    ]
    return merge(*made)
