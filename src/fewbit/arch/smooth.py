"""SmoothQuant (Xiao et al., 2023): outlier channels of activations are divided out and multiplied into the weights that read them."""

from __future__ import annotations

import torch

SMALLEST = 1e-5


def smooth_scales(absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scales s per channel: activations become x / s, weights w * s.

    s = max|x|^alpha / max|w|^(1 - alpha): at 0.5 both sides are equally hard to round.

    Args:
        absmax: float [channels] (or [experts, channels]), largest |x| over the calibration tokens.
        weight_absmax: the same shape, largest |w| over all weights that read the channel.
        alpha: 0 leaves the activations as they are relative to each other, 1 makes them all equal.

    Returns:
        float64, positive and finite; channels that are dead on either side keep 1. The geometric mean is 1, so that nothing grows or shrinks
        as a whole.
    """
    x, w = absmax.double(), weight_absmax.double()
    live = (
        (x > SMALLEST * x.amax(-1, keepdim=True))
        & (w > SMALLEST * w.amax(-1, keepdim=True))
        & torch.isfinite(x)
        & torch.isfinite(w)
    )
    s = x.clamp_min(torch.finfo(torch.float32).tiny) ** alpha / w.clamp_min(torch.finfo(torch.float32).tiny) ** (
        1 - alpha
    )
    s = torch.where(live, s, torch.ones_like(s))
    count = live.sum(-1, keepdim=True).clamp_min(1)
    middle = (torch.where(live, s.log(), torch.zeros_like(s)).sum(-1, keepdim=True) / count).exp()
    return torch.where(live, s / middle, torch.ones_like(s))
