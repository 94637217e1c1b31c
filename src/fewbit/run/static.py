"""Activation ranges that are fixed beforehand: what a static scheme stores besides the weight.

Solvers choose weights and know nothing of activations. Here the job's activation scheme is put back on their answer, and a static one gets
its scale from the largest input that calibration saw.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fewbit.base.errors import InputError
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme


def input_scale(activation: Scheme, absmax: torch.Tensor) -> torch.Tensor:
    """The scale under which the largest input just fits, float32 [1].

    For a scheme with scales of scales (NVFP4) it is the outermost one: largest level times largest stored scale.

    Raises:
        InputError: FB-E0706 for an asymmetric scheme, whose zero point no format of ours stores, or inputs that are not finite.
    """
    if not activation.symmetric:
        raise InputError("FB-E0706", f"static activation ranges are symmetric, got {activation}")
    largest = absmax.float().max().reshape(1)
    if not bool(torch.isfinite(largest)):
        raise InputError("FB-E0706", "the calibration inputs are not finite")
    reach = float(activation.grid.high)
    inner = activation.scale
    while inner is not None and not inner.is_leaf:  # a scale that is itself quantised spans its own grid
        reach *= float(inner.grid.high)
        inner = inner.scale
    return (largest / reach).clamp_min(torch.finfo(torch.float32).tiny)


def with_inputs(q: QTensor, scheme: Scheme, stats: Stats | None = None) -> QTensor:
    """A solved weight under the job's whole scheme; a static activation scheme takes its scale from the statistics, where there are any."""
    if scheme.activation is None:
        return q
    q = replace(q, scheme=replace(q.scheme, activation=scheme.activation, static=scheme.static))
    if scheme.static and stats is not None and stats.absmax is not None:
        q = replace(q, sides={**q.sides, "input_scale": input_scale(scheme.activation, stats.absmax)})
    return q
