"""Activation ranges that are fixed beforehand: what a static scheme stores besides the weight.

Solvers choose weights and know nothing of activations. Here the job's activation scheme is put back on their answer, and a static one gets
its scale from the inputs that calibration saw: the largest of them, a percentile of their magnitudes, or the range that rounds and clips
them with the least squared error. Inputs beyond it are clipped wherever the weight is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.ranges import least_error, percentile
from fewbit.math.stats import Stats
from fewbit.num.blocks import TENSOR
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme


@dataclass(frozen=True)
class Reach:
    """How far a static scale reaches.

    Attributes:
        method: absmax, percentile or mse.
        percent: of the inputs inside, for percentile.
    """

    method: str = "absmax"
    percent: float = 99.99

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Reach:
        """What a recipe, as plain data, asks for."""
        return cls(recipe["activation_range"], recipe["activation_percentile"])


def input_scale(activation: Scheme, stats: Stats, reach: Reach = Reach()) -> torch.Tensor:
    """The scale under which the inputs of the range just fit, float32 [1].

    For a scheme with scales of scales (NVFP4) it is the outermost one: largest level times largest stored scale.

    Args:
        stats: with `absmax`, and with `histogram` for percentile and mse.

    Raises:
        InputError: FB-E0706 for an asymmetric scheme, whose zero point no format of ours stores, inputs that are not finite, or a range of
            least error where the inputs have more than one scale.
    """
    if not activation.symmetric:
        raise InputError("FB-E0706", f"static activation ranges are symmetric, got {activation}")
    largest = float(stats.held("absmax").float().max())
    if not largest < float("inf"):
        raise InputError("FB-E0706", "the calibration inputs are not finite")
    if reach.method != "absmax" and largest > 0:
        if stats.histogram is None:
            raise InputError("FB-E0706", f"a range by {reach.method} needs the histogram of the inputs")
        if reach.method == "percentile":
            largest = min(largest, percentile(stats.histogram, reach.percent))
        elif activation.blocks != TENSOR:
            raise InputError("FB-E0706", f"a range of least error needs one scale for all inputs, got {activation}")
        else:
            largest = least_error(stats.histogram, activation.grid, largest)
    levels = float(activation.grid.high)
    inner = activation.scale
    while inner is not None and not inner.is_leaf:  # a scale that is itself quantised spans its own grid
        levels *= float(inner.grid.high)
        inner = inner.scale
    return torch.tensor([largest / levels]).clamp_min(torch.finfo(torch.float32).tiny)


def with_inputs(q: QTensor, scheme: Scheme, stats: Stats | None = None, reach: Reach = Reach()) -> QTensor:
    """A solved weight under the job's whole scheme; a static activation scheme takes its scale from the statistics, where there are any."""
    if scheme.activation is None:
        return q
    q = replace(q, scheme=replace(q.scheme, activation=scheme.activation, static=scheme.static))
    if scheme.static and stats is not None and stats.absmax is not None:
        q = replace(q, sides={**q.sides, "input_scale": input_scale(scheme.activation, stats, reach).to(q.device)})
    return q
