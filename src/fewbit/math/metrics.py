"""Measures of how far a quantised tensor, or a distribution of logits, is from the original. Differences are in float32 (float64 for
float64 arguments), sums in float64."""

from __future__ import annotations

import torch

from fewbit.math.tiles import CHUNK

IN_CACHE = 1 << 16  # weights whose differences stay in a core's cache


def squared_error(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """Sum of squared differences."""
    return weighted_error(w, w_hat, None)


def weighted_error(w: torch.Tensor, w_hat: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Sum of importance * (w - w_hat)^2; importance is [cols], [rows, cols], of w's shape, or None for 1."""
    cols = w.shape[-1] if w.ndim else 1
    a, b = w.reshape(-1, cols), w_hat.reshape(-1, cols)
    if importance is not None and importance.ndim > 1:
        importance = importance.expand(w.shape).reshape(-1, cols)
    step = max(1, IN_CACHE // max(1, cols))
    kind = torch.float64 if torch.float64 in (w.dtype, w_hat.dtype) else torch.float32
    total = 0.0
    for i in range(0, a.shape[0], step):
        miss = (a[i : i + step].to(kind) - b[i : i + step].to(kind)).square_()
        if importance is not None:
            miss *= importance if importance.ndim == 1 else importance[i : i + step]
        total += float(miss.sum(dtype=torch.float64))
    return total


def sqnr_db(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 10 log10(sum w^2 / sum (w - w_hat)^2); infinite for no error."""
    signal, noise = weighted_error(w, torch.zeros_like(w)), squared_error(w, w_hat)
    if noise == 0:
        return float("inf")
    return float("-inf") if signal == 0 else float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def relative_error(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """||w - w_hat|| / ||w|| in the Frobenius norm; 0 for equal tensors."""
    noise, signal = squared_error(w, w_hat), weighted_error(w, torch.zeros_like(w))
    return 0.0 if noise == 0 else float("inf") if signal == 0 else (noise / signal) ** 0.5


def output_error(w: torch.Tensor, w_hat: torch.Tensor, gram: torch.Tensor) -> float:
    """trace((w - w_hat) gram (w - w_hat)^T): squared error of the layer's outputs over the calibration inputs.

    Args:
        w, w_hat: [rows, cols].
        gram: float [cols, cols], sum of x x^T.
    """
    gram = gram.double()
    step = max(1, CHUNK // max(1, w.shape[-1]))
    total = 0.0
    for i in range(0, w.shape[0], step):
        miss = w[i : i + step].double() - w_hat[i : i + step].double()
        total += float(((miss @ gram) * miss).sum())
    return total


def kl_from_logits(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(base || other) in nats for each position: [..., vocab] twice -> float64 [...]."""
    p = torch.log_softmax(base.double(), dim=-1)
    q = torch.log_softmax(other.double(), dim=-1)
    return (p.exp() * (p - q)).sum(-1).clamp_(min=0)
