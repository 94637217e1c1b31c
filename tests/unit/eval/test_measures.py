"""Measures and their errors: against definitions, and against simulations in which the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewbit.eval.cache import decode_hidden, encode_hidden, rounding
from fewbit.eval.measures import Rounding, clustered, clustered_quantile, compare, interval, summarise, t_quantile


def logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def test_compare_is_the_definition() -> None:
    p_logits = logits(40, 500, 0)
    q_logits = p_logits + 0.3 * logits(40, 500, 1, 1.0)
    target = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(2))
    found = compare(p_logits, q_logits, target)
    p, q = torch.softmax(p_logits.double(), -1), torch.softmax(q_logits.double(), -1)
    rows = torch.arange(40)
    assert torch.allclose(found["kl"], (p * (p / q).log()).sum(-1), rtol=1e-10, atol=1e-14)
    assert torch.allclose(found["nll"], -q[rows, target].log()) and torch.allclose(
        found["base_nll"], -p[rows, target].log()
    )
    assert torch.allclose(found["delta_p"], q[rows, target] - p[rows, target])
    assert torch.equal(found["top1"], (p.argmax(-1) == q.argmax(-1)).double())
    shared = [
        len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(p.topk(5).indices, q.topk(5).indices, strict=True)
    ]
    assert torch.allclose(found["top5"], torch.tensor(shared, dtype=torch.float64))
    assert torch.allclose(found["best_p"], q.amax(-1)) and torch.allclose(found["base_best_p"], p.amax(-1))


def test_equal_logits_lose_exactly_nothing() -> None:
    same = logits(8, 300, 3)
    found = compare(same, same.clone(), torch.zeros(8, dtype=torch.int64))
    assert float(found["kl"].abs().max()) == 0.0 and float(found["delta_p"].abs().max()) == 0.0


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 23, 400])
def test_t_quantiles(degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.012 if degrees == 3 else 0.004)


def heavy(rng: np.random.Generator, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions as KL looks: positive, heavy-tailed, alike within a document."""
    level = rng.gamma(4.0, 0.25, (groups, 1))
    return torch.from_numpy((level * rng.lognormal(-4.0, 1.3, (groups, size))).ravel()), torch.arange(
        groups
    ).repeat_interleave(size)


def test_intervals_cover_the_mean_and_naive_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    truth = math.exp(-4.0 + 1.3**2 / 2)
    inside = naive = 0
    for _ in range(600):
        values, clusters = heavy(rng, 24, 200)
        low, high = interval(clustered(values, clusters), 24)
        inside += low <= truth <= high
        reach = 1.96 * float(values.std()) / math.sqrt(values.numel())
        naive += abs(float(values.mean()) - truth) <= reach
    assert 0.91 <= inside / 600 <= 0.98
    assert naive / 600 < 0.75  # what error bars without clusters would have promised


@pytest.mark.parametrize(("q", "least"), [(0.5, 0.90), (0.9, 0.90), (0.99, 0.86)])
def test_intervals_cover_quantiles(q: float, least: float) -> None:
    rng = np.random.default_rng(1)
    truth = float(heavy(np.random.default_rng(9), 20000, 50)[0].quantile(q)) if 20000 * 50 <= 16_000_000 else 0.0
    inside = 0
    for _ in range(300):
        values, clusters = heavy(rng, 30, 100)
        low, high = interval(clustered_quantile(values, clusters, q), 30)
        inside += low <= truth <= high
    assert least <= inside / 300 <= 0.99


def test_summary_pairs_errors() -> None:
    """The ratio's error is that of the difference: far below the two perplexities' own."""
    rng = np.random.default_rng(2)
    base = torch.from_numpy(rng.normal(3.0, 1.0, 5000))
    parts = {name: torch.zeros(5000, dtype=torch.float64) for name in ("kl", "kl_slack", "delta_p", "top1", "top5")}
    nll = base + 0.02 + torch.from_numpy(rng.normal(0, 0.05, 5000))
    made = summarise("x", {**parts, "base_nll": base, "nll": nll, "cluster": torch.arange(50).repeat_interleave(100)})
    ratio, error = made.measures["perplexity_ratio"]
    assert ratio == pytest.approx(math.exp(float((nll - base).mean()))) and error < 0.1 * made.measures["perplexity"][1]
    difference, paired = made.measures["perplexity_difference"]
    assert (
        difference == pytest.approx(made.measures["perplexity"][0] - made.measures["base_perplexity"][0])
        and paired < made.measures["perplexity"][1]
    )


def test_hidden_states_survive_sixteen_bits() -> None:
    hidden = logits(64, 128, 4) * torch.logspace(-6, 6, 64).unsqueeze(-1)
    hidden[3] = 0.0
    codes, scale = encode_hidden(hidden)
    assert codes.dtype == torch.int16
    assert bool(((decode_hidden(codes, scale) - hidden).abs() <= 0.51 * scale.unsqueeze(-1) + 1e-30).all())


def test_the_bound_on_kl_holds_at_every_position() -> None:
    exact, q_logits = logits(200, 1000, 5), logits(200, 1000, 5) + 0.2 * logits(200, 1000, 6, 1.0)
    for noise in (1e-4, 1e-2, 0.3):
        near = exact + noise * logits(200, 1000, 7, 1.0)
        target = torch.zeros(200, dtype=torch.int64)
        true = compare(exact, q_logits, target)["kl"]
        found = compare(near, q_logits, target, rounding(exact, near))
        miss = (found["kl"] - true).abs()
        assert bool((miss <= found["kl_slack"] * (1 + 1e-6) + 1e-13).all())
        assert float(found["kl_slack"].mean()) < 60 * float(miss.mean())  # a bound that says something


def test_a_rounding_that_understates_is_caught() -> None:
    """The check above can fail: with a hundredth of the true chi2 the bound breaks."""
    exact, q_logits = logits(200, 1000, 5), logits(200, 1000, 8)
    near = exact + 0.1 * logits(200, 1000, 7, 1.0)
    honest = rounding(exact, near)
    target = torch.zeros(200, dtype=torch.int64)
    found = compare(near, q_logits, target, Rounding(honest.kl * 0, honest.chi2 * 1e-4))
    assert bool(((found["kl"] - compare(exact, q_logits, target)["kl"]).abs() > found["kl_slack"]).any())
