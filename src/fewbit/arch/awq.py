"""AWQ (Lin et al., 2024): scales per channel of a space, searched for the least output error of the rounded weights that read it.

The error is exact over the calibration tokens: with E = round(W s) / s - W and G the sum of x x^T, the outputs differ by trace(E G E^T).
How weights are rounded is a function that the caller passes, so the search serves int3, NF4 and Q4_K alike. Clipping is part of that
function: our fits search clipped scales anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Round = Callable[[torch.Tensor], torch.Tensor]
"""float [.., out, in] -> what the weights are after quantisation, the same shape."""


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        scales: float64 [channels], geometric mean 1; all ones when nothing was better.
        power: of the mean magnitude; 0 means no scaling.
        loss, loss_before: summed squared output error with and without the scales.
    """

    scales: torch.Tensor
    power: float
    loss: float
    loss_before: float


def candidate(mean_abs: torch.Tensor, power: float) -> torch.Tensor:
    """mean|x|^power with geometric mean 1, float64; dead channels keep 1."""
    x = mean_abs.double()
    live = x > 1e-6 * x.max()
    logs = torch.where(live, x.clamp_min(torch.finfo(torch.float32).tiny).log(), torch.zeros_like(x))
    middle = logs.sum() / live.sum().clamp_min(1)
    return torch.where(live, (power * (logs - middle)).exp(), torch.ones_like(x))


def search(
    weights: Sequence[tuple[torch.Tensor, Round]],
    mean_abs: torch.Tensor,
    gram: torch.Tensor,
    steps: int = 20,
    expand: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
) -> Found:
    """The best power of the mean magnitude as scale of a space.

    Args:
        weights: readers of the space, float [out, inputs], each with its rounding.
        mean_abs: float [channels]. gram: float [inputs, inputs], sum of x x^T of the readers' inputs.
        steps: powers tried: 0, 1/steps, 2/steps … below 1.
        expand: scales [channels] -> [inputs], where heads are read many times.
    """
    best: Found | None = None
    before = 0.0
    for step in range(steps):
        s = candidate(mean_abs, step / steps)
        loss = sum(output_error(w, expand(s), rounding, gram) for w, rounding in weights)
        if step == 0:
            before = loss
        if best is None or loss < best.loss:
            best = Found(s, step / steps, loss, before)
    assert best is not None, "steps >= 1"
    return best


def output_error(w: torch.Tensor, s: torch.Tensor, rounding: Round, gram: torch.Tensor) -> float:
    """Summed squared difference of x W^T over the tokens of the gram, with weights rounded after scaling by s."""
    factor = s.to(w)
    error = rounding(w * factor) / factor - w
    return float(((error @ gram.to(error)) * error).sum(dtype=torch.float64))
