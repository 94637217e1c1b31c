"""The figures of llama-perplexity, from logits: its formulas, written out from its description."""

from __future__ import annotations

import numpy as np


def kl_divergence(base: np.ndarray, other: np.ndarray, tokens: np.ndarray, first: int) -> dict[str, float]:
    """llama-perplexity --kl-divergence: base log probabilities in 16 bits over at most 16 nats, sums in double over single-precision terms.

    Args:
        base, other: float32 logits [windows, length, vocab]. first: positions before it are not scored (n_ctx / 2 there).
    """
    sums = dict.fromkeys(("kl", "nll", "base_nll", "p_diff2", "same"), 0.0)
    count = 0
    for window in range(base.shape[0]):
        for position in range(first, base.shape[1] - 1):
            p, q, token = base[window, position], other[window, position], tokens[window, position + 1]
            high, low = p.max(), max(p.min(), p.max() - np.float32(16))
            norm = np.float32(np.log(np.exp(p - high).sum(dtype=np.float64)))
            scale = np.float32((high - low) / np.float32(65535))
            stored = np.where(p > low, np.rint((p - low) / scale), 0).astype(np.uint16)
            log_p = scale * stored.astype(np.float32) + np.float32(low - high - norm)
            q_norm = np.float32(q.max() + np.log(np.exp(q - q.max()).sum(dtype=np.float64)))
            kept = log_p > -16
            sums["kl"] += float((np.exp(log_p[kept]) * (log_p[kept] - q[kept] + q_norm)).sum(dtype=np.float64))
            sums["nll"] += float(q_norm - q[token])
            sums["base_nll"] -= float(log_p[token])
            sums["p_diff2"] += float((np.exp(q[token] - q_norm) - np.exp(log_p[token])) ** 2)
            sums["same"] += float(q.argmax() == stored.argmax())
            count += 1
    return {name: value / count for name, value in sums.items()}
