"""Fidelity at single token positions, and what they sum up to, with standard errors that respect dependence.

For each scored position the base's and the candidate's next-token distributions p and q are compared:

    nll      -log q(correct)                       perplexity = exp(mean)
    kl       sum p (log p - log q), in nats        the information that quantisation lost
    delta p  q(correct) - p(correct)               its root mean square and percentiles are llama.cpp's measures
    top1     whether both put the same token first; top5: share of the base's five best among the candidate's five best

Positions of one document are not independent. Errors are those of cluster totals (linearised ratio, G/(G-1) corrected); a quantile's error
is Woodruff's: the clustered error of the share below it, mapped back through the quantiles. Intervals use Student's t with G-1 degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

KL_QUANTILES = (0.5, 0.9, 0.99, 0.999)
DELTA_QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)

Estimate = tuple[float, float]
"""A value and its standard error."""


FLOATS = ("base_nll", "nll", "kl", "kl_slack", "delta_p", "top1", "top5", "base_best_p", "best_p")
INDICES = ("base_best", "best", "target", "window", "position", "cluster")


class PerToken:
    """Measures of every scored position, in window order; room for all of them is taken at once, so that batches leave no holes in memory.

    base_nll, nll, kl, delta_p, top1, top5: float64; base_best, best: int64, the likeliest token of each model; base_best_p, best_p: float64, what
    each model gives to its own likeliest token; target, window, position, cluster: int64. kl_slack: float64, bound on the error of kl that a
    rounded base brings (see `cache`).
    """

    def __init__(self, positions: int) -> None:
        self.measures = {name: torch.empty(positions, dtype=torch.float64) for name in FLOATS}
        self.measures |= {name: torch.empty(positions, dtype=torch.int64) for name in INDICES}
        self._filled = 0

    def add(self, **parts: torch.Tensor) -> None:
        """One batch of positions: a tensor for every measure."""
        stop = self._filled + parts["kl"].numel()
        for name, values in self.measures.items():
            values[self._filled : stop] = parts[name]
        self._filled = stop


@dataclass(frozen=True)
class Rounding:
    """How far a rounded base distribution p~ is from the exact p, per position: float64 [positions] each.

    kl: KL(p || p~). chi2: sum (p - p~)^2 / p~.
    """

    kl: torch.Tensor
    chi2: torch.Tensor


def softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and the logarithm of what they were divided by: float64 [rows, vocab], [rows, 1]. (torch's own takes thrice as long.)"""
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top + total.log()


def compare(
    p_logits: torch.Tensor, q_logits: torch.Tensor, target: torch.Tensor, rounding: Rounding | None = None
) -> dict[str, torch.Tensor]:
    """Measures of a batch of positions.

    Args:
        p_logits, q_logits: [positions, vocab] of base and candidate.
        target: int64 [positions], the token that came next.
        rounding: where the base's logits are not exact.
    """
    right = target.to(p_logits.device).unsqueeze(-1)
    few = min(5, p_logits.shape[-1])
    best_p, best_q = p_logits.topk(few, -1), q_logits.topk(few, -1)
    whole_p, whole_q = p_logits.double(), q_logits.double()
    p, norm_p = softmax(whole_p)
    norm_q = softmax(whole_q)[1]
    p_right, q_right = (whole_p.gather(-1, right) - norm_p)[:, 0], (whole_q.gather(-1, right) - norm_q)[:, 0]
    gap = torch.sub(whole_p, whole_q, out=whole_q)  # log p - log q, but for norm_q - norm_p
    mean = (p * gap).sum(-1, keepdim=True)
    kl = (mean + norm_q - norm_p)[:, 0]
    slack = torch.zeros_like(kl)
    if rounding is not None:
        # KL(p||q) - KL(p~||q) = KL(p||p~) + sum (p - p~)(log p~/q - c) for any c; with c the mean, Cauchy-Schwarz bounds the sum
        variance = (p * gap.sub_(mean).square_()).sum(-1)
        slack = rounding.kl.to(kl.device) + (rounding.chi2.to(kl.device) * variance).sqrt()
    return {
        "base_nll": -p_right,
        "nll": -q_right,
        "kl": kl,
        "kl_slack": slack,
        "delta_p": q_right.exp() - p_right.exp(),
        "top1": (best_p.indices[:, 0] == best_q.indices[:, 0]).double(),
        "top5": (best_p.indices.unsqueeze(-1) == best_q.indices.unsqueeze(-2)).any(-1).double().mean(-1),
        "base_best": best_p.indices[:, 0],
        "base_best_p": (best_p.values[:, :1].double() - norm_p).exp()[:, 0],
        "best": best_q.indices[:, 0],
        "best_p": (best_q.values[:, :1].double() - norm_q).exp()[:, 0],
        "target": target,
    }


def clustered(values: torch.Tensor, clusters: torch.Tensor) -> Estimate:
    """Mean over positions and its cluster-robust standard error (linearised ratio of cluster totals)."""
    _, index = clusters.unique(return_inverse=True)
    groups = int(index.max()) + 1
    mean = float(values.double().mean())
    if groups < 2:
        return mean, float(
            values.double().std(correction=1) / math.sqrt(values.numel())
        ) if values.numel() > 1 else math.inf
    totals = torch.zeros(groups, dtype=torch.float64).index_add_(0, index, values.double() - mean)
    return mean, float((totals.square().sum() * groups / (groups - 1)).sqrt() / values.numel())


def clustered_quantile(values: torch.Tensor, clusters: torch.Tensor, q: float) -> Estimate:
    """A quantile and its standard error: half the distance between the quantiles at q ± the clustered error of the share below."""
    ordered = values.double().sort().values

    def at(share: float) -> float:
        return float(ordered[min(ordered.numel() - 1, max(0, int(share * ordered.numel())))])

    value = at(q)
    _, error = clustered((values <= value).double(), clusters)
    return value, (at(q + error) - at(q - error)) / 2 if math.isfinite(error) else math.inf


def t_quantile(level: float, degrees: int) -> float:
    """Two-sided quantile of Student's t, e.g. level 0.95; the Cornish-Fisher series, within 0.5 % from 4 degrees on."""
    z = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
    if degrees <= 0:
        return math.inf
    if degrees == 1:
        return math.tan(math.pi * level / 2)
    if degrees == 2:
        return level * math.sqrt(2 / (1 - level * level))
    d = float(degrees)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / d**power for power, term in enumerate(terms))


def interval(estimate: Estimate, groups: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of an estimate made from `groups` clusters."""
    reach = t_quantile(level, groups - 1) * estimate[1]
    return estimate[0] - reach, estimate[0] + reach


@dataclass(frozen=True)
class Score:
    """Fidelity of one candidate. Every measure is (value, standard error).

    Attributes:
        name: path of the candidate, or what was done to the base.
        path: "reference" for our decoded weights, else the engine that ran it.
        tokens, clusters: positions scored, and independent documents or windows among them.
        measures: perplexity, base_perplexity, perplexity_ratio, perplexity_difference, kl, top1, top5, rms_delta_p, mean_delta_p.
        kl_quantiles: quantile -> KL; the maximum under 1.0, its error 0 as none can be given.
        delta_p_quantiles: quantile -> probability change of the correct token.
        kl_slack: bound on the error of the mean KL that a base from the cache brings; 0 without one.
        nbytes, bits_per_weight: of the candidate's weights.
        facts: recipe, hashes, format, sizes: plain data for the report.
    """

    name: str
    tokens: int
    clusters: int
    measures: dict[str, Estimate]
    kl_quantiles: dict[float, Estimate]
    delta_p_quantiles: dict[float, Estimate]
    nbytes: int = 0
    bits_per_weight: float = 0.0
    kl_slack: float = 0.0
    path: str = "reference"
    facts: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The score as plain data."""

        def shown(estimate: Estimate) -> dict[str, float | None]:
            low, high = interval(estimate, self.clusters)
            numbers = {"value": estimate[0], "stderr": estimate[1], "low": low, "high": high}
            return {name: number if math.isfinite(number) else None for name, number in numbers.items()}

        return {
            "name": self.name,
            "path": self.path,
            "tokens": self.tokens,
            "clusters": self.clusters,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            **{name: shown(estimate) for name, estimate in self.measures.items()},
            "kl_error_bound": self.kl_slack,
            "kl_quantiles": {str(q): shown(value) for q, value in self.kl_quantiles.items()},
            "delta_p_quantiles": {str(q): shown(value) for q, value in self.delta_p_quantiles.items()},
            "facts": self.facts,
        }


def summarise(name: str, measures: dict[str, torch.Tensor], **about: Any) -> Score:
    """All measures with standard errors, from those of single positions (see `PerToken`)."""
    cluster = measures["cluster"]
    groups = int(cluster.unique().numel())
    groups = groups if groups > 1 else int(cluster.numel())

    def mean(values: torch.Tensor) -> Estimate:
        return clustered(values, cluster)

    def exponential(values: torch.Tensor) -> Estimate:
        centre, error = mean(values)
        value = math.exp(centre) if centre < 700 else math.inf
        return value, value * error

    kl, delta = measures["kl"], measures["delta_p"]
    square, square_error = mean(delta.square())
    rms = math.sqrt(square)
    ppl, base_ppl = exponential(measures["nll"]), exponential(measures["base_nll"])
    # d(ppl - base) = ppl d(nll) - base d(base nll): the paired error, not the two errors side by side
    paired = measures["nll"] * ppl[0] - measures["base_nll"] * base_ppl[0] if math.isfinite(ppl[0]) else measures["nll"]
    return Score(
        name=name,
        tokens=int(kl.numel()),
        clusters=groups,
        measures={
            "perplexity": ppl,
            "base_perplexity": base_ppl,
            "perplexity_ratio": exponential(measures["nll"] - measures["base_nll"]),
            "perplexity_difference": (ppl[0] - base_ppl[0], mean(paired)[1]),
            "kl": mean(kl),
            "top1": mean(measures["top1"]),
            "top5": mean(measures["top5"]),
            "rms_delta_p": (rms, square_error / (2 * rms) if rms else 0.0),
            "mean_delta_p": mean(delta),
        },
        kl_quantiles={**{q: clustered_quantile(kl, cluster, q) for q in KL_QUANTILES}, 1.0: (float(kl.max()), 0.0)},
        delta_p_quantiles={q: clustered_quantile(delta, cluster, q) for q in DELTA_QUANTILES},
        kl_slack=float(measures["kl_slack"].mean()),
        **about,
    )
