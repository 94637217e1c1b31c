"""Candidate parameters: every stored scale and shift with its representable neighbours, as numbers for the feedback loop.

A solver that can tell the true cost of a choice (the loop's own loss, the exact quadratic) needs only a list of choices. Here they
come from the stored form itself, so one function serves all schemes: directly stored scales times a few factors, integer zero points a step
up and down, quantised scales and minima (k-quants, NVFP4, double quantisation) the codes beside their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch

from fewbit.base.errors import InputError
from fewbit.math.nested import stepped
from fewbit.math.rounding import pack_leaf, store, store_scale
from fewbit.math.scales import effective
from fewbit.math.search import Params
from fewbit.num.blocks import EACH
from fewbit.num.grid import FloatGrid, IntGrid
from fewbit.num.qtensor import QTensor, expand, values_of
from fewbit.num.scheme import Scheme
from fewbit.solve.gptq_loop import Parameters

NAMES = ("scale", "code_shift", "value_shift")
COARSE = (1.0, 0.86, 0.93, 1.07, 1.14)  # factors of a directly stored scale while codes are still free
FINE = (1.0, 0.97, 0.99, 1.01, 1.03)  # and once they are chosen


@dataclass(frozen=True)
class Candidates:
    """Alternatives of each part of some columns' parameters, and every combination of them.

    Attributes:
        stored: name -> alternatives in stored form, the present one first.
        combinations: index of the alternative of each name, per candidate.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    stored: dict[str, list[torch.Tensor | QTensor]]
    combinations: list[dict[str, int]]

    @cached_property
    def arrays(self) -> dict[str, list[torch.Tensor]]:
        """name -> each alternative as float32 [rows, groups]."""
        return {
            name: [by_group(self.scheme, name, s, self.shape) for s in stored] for name, stored in self.stored.items()
        }

    def numbers(self, start: int = 0, end: int | None = None) -> Parameters:
        """The candidates of a range of columns of whole groups, as numbers per group; the groups are counted from the first of the range."""
        gid = groups_of(self.scheme, self.shape)[1][start:end]
        cut = slice(int(gid[0]), int(gid[-1]) + 1)
        arrays = {name: [array[:, cut] for array in held] for name, held in self.arrays.items()}
        first = next(iter(arrays.values()))[0]
        defaults = (torch.ones_like(first), torch.zeros_like(first), torch.zeros_like(first))
        scale, zero, shift = (
            torch.stack([arrays[name][c[name]] if name in arrays else default for c in self.combinations], dim=-1)
            for name, default in zip(NAMES, defaults, strict=True)
        )
        return Parameters(scale, zero, shift, (gid - gid[0]).to(first.device))

    def pick(self, choice: torch.Tensor) -> Params:
        """The stored parameters of the chosen candidates: choice int [rows, groups]."""
        out: dict[str, torch.Tensor | QTensor] = {}
        for name, alternatives in self.stored.items():
            table = torch.tensor([c[name] for c in self.combinations], device=choice.device)
            out[name] = _merge(alternatives, table[choice.long()])
        return Params(**out)


def only(scheme: Scheme, params: Params, shape: tuple[int, ...]) -> Candidates:
    """The parameters themselves, with no alternative."""
    stored = {name: [getattr(params, name)] for name, _ in scheme.parts()}
    return Candidates(scheme, shape, stored, [dict.fromkeys(stored, 0)])


def neighbours(
    scheme: Scheme, params: Params, shape: tuple[int, ...], factors: tuple[float, ...] = COARSE
) -> Candidates:
    """The parameters and their neighbours; for schemes of which every weight row has its own parameters (`by_row`)."""
    stored = {name: _alternatives(scheme, name, params, shape, factors) for name, _ in scheme.parts()}
    names = list(stored)
    combinations = [
        dict(zip(names, pick, strict=True)) for pick in product(*(range(len(stored[name])) for name in names))
    ]
    return Candidates(scheme, shape, stored, combinations)


def by_row(scheme: Scheme) -> bool:
    """Whether every group lies in one row and each of its parameters is its own, so that groups may choose freely."""
    if scheme.blocks.rows != 1 or scheme.blocks.flat:
        return False
    return all(part.blocks == EACH if part.is_leaf else not part.code_shift for _, part in scheme.parts())


def separable(scheme: Scheme) -> bool:
    """Whether a range of columns of whole spans can be fitted alone and joined with the others."""
    if scheme.blocks.rows != 1 or scheme.blocks.flat or scheme.blocks.cols == 0:
        return False
    return all(part.blocks == EACH if part.is_leaf else separable(part) for _, part in scheme.parts())


def join(scheme: Scheme, pieces: list[Params], shape: tuple[int, ...]) -> Params:
    """Parameters of consecutive column ranges of a `separable` scheme as those of the whole."""
    counts = scheme.block_counts(shape)
    out: dict[str, torch.Tensor | QTensor] = {}
    for name, part in scheme.parts():
        stored = [getattr(piece, name) for piece in pieces]
        out[name] = _join(part, stored, counts) if isinstance(stored[0], QTensor) else torch.cat(stored, dim=-1)
    return Params(**out)


def _join(part: Scheme, stored: list[QTensor], shape: tuple[int, ...]) -> QTensor:
    inner = join(part, [Params(q.scale, q.code_shift, q.value_shift) for q in stored], shape)
    codes = torch.cat([q.codes for q in stored], dim=-1)
    return QTensor(part, shape, codes, inner.scale, inner.code_shift, inner.value_shift)


def groups_of(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, torch.Tensor]:
    """(groups of a row, int32 [cols] group of each column); flat blocks count every column as a group."""
    cols = shape[-1]
    if scheme.blocks.flat:
        return cols, torch.arange(cols, dtype=torch.int32)
    tiling = scheme.blocks.resolve(shape)
    return tiling.grid[-1], torch.arange(cols, dtype=torch.int32) // tiling.block_cols


def by_group(scheme: Scheme, name: str, stored: torch.Tensor | QTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A stored part as float32 [rows, groups of a row]."""
    if scheme.blocks.flat:
        found = effective(scheme, Params(**{name: stored}), shape)[NAMES.index(name)]
        if found is None:
            raise InputError("FB-E0603", f"{scheme} has no {name}")
        return found.contiguous()
    part = scheme.part(name)
    tiling = scheme.blocks.resolve(shape)
    values = values_of(stored)
    values = (expand(values, part, tiling.grid) if part.is_leaf else values).reshape(tiling.grid)
    return values if tiling.block_rows == 1 else values.repeat_interleave(tiling.block_rows, dim=0)[: tiling.rows]


def _alternatives(
    scheme: Scheme, name: str, params: Params, shape: tuple[int, ...], factors: tuple[float, ...]
) -> list[torch.Tensor | QTensor]:
    part, stored = getattr(scheme, name), getattr(params, name)
    if isinstance(stored, QTensor):
        return [stepped(stored, by) for by in (0, -1, 1)]
    if part.grid.dim != 1 or part.blocks != EACH:
        return [stored]
    values = values_of(stored)
    if name == "scale" and isinstance(part.grid, FloatGrid):
        if part.grid.mantissa == 0:
            factors = (1.0, 0.5, 2.0) if factors is COARSE else (1.0,)
        return [stored, *(pack_leaf(part.grid, store_scale(part.grid, values * f)) for f in factors[1:])]
    if isinstance(part.grid, IntGrid):
        grid = part.grid
        return [stored, *((values + by).clamp(grid.low, grid.high).to(stored.dtype) for by in (-1, 1))]
    step = 0.3 if factors is COARSE else 0.05
    unit = torch.ones_like(values)
    if name == "value_shift" and params.scale is not None:
        unit = by_group(scheme, "scale", params.scale, shape).reshape(values.shape)
    return [stored, *(pack_leaf(part.grid, store(part.grid, values + by * step * unit)) for by in (-1, 1))]


def _merge(alternatives: list[torch.Tensor | QTensor], index: torch.Tensor) -> torch.Tensor | QTensor:
    """Entry by entry the alternative with the given index."""
    first = alternatives[0]
    if isinstance(first, QTensor):
        return replace(first, codes=_entries([q.codes for q in alternatives if isinstance(q, QTensor)], index))
    return _entries([array for array in alternatives if isinstance(array, torch.Tensor)], index)


def _entries(alternatives: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    first = alternatives[0]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[first.element_size()]
    stacked = torch.stack([a.contiguous().view(bits) for a in alternatives])
    return stacked.gather(0, index.reshape(1, *first.shape))[0].view(first.dtype)
