"""The regression of drift: right where the inputs tell of it, silent where they do not, and never trusted further than sequences left out allow."""

from __future__ import annotations

import pytest
import torch

from fewbit.run.drift import DAMPINGS, Drift, held_batches

LENGTH = 64


def problem(noise: float, sequences: int = 48, channels: int = 40, outputs: int = 24) -> tuple[torch.Tensor, ...]:
    """(x [sequences, length, channels], y, the true B)."""
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(sequences, LENGTH, channels, generator=gen)
    true = 0.1 * torch.randn(outputs, channels, generator=gen)
    return x, x @ true.T + noise * torch.randn(sequences, LENGTH, outputs, generator=gen), true


def sums(x: torch.Tensor, y: torch.Tensor, batch: int = 4) -> Drift:
    found, count = Drift(), -(-len(x) // batch)
    held = held_batches(count, LENGTH)
    for number in range(count):
        cut = slice(number * batch, (number + 1) * batch)
        found.add(x[cut].flatten(0, 1), y[cut].flatten(0, 1), LENGTH, number in held)
    return found


def gram(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1)
    return flat.T @ flat


def test_without_noise_the_drift_is_found() -> None:
    x, y, true = problem(0.0)
    found = sums(x, y).solve(gram(x))
    assert found is not None and float((found - true).norm() / true.norm()) < 0.02


def test_noise_raises_the_damping_until_nothing_is_left() -> None:
    shares = []
    for noise in (0.01, 3.0, 100.0):
        x, y, true = problem(noise, sequences=8)
        found = sums(x, y, batch=1).solve(gram(x))
        shares.append(0.0 if found is None else float(found.norm() / true.norm()))
        plain = torch.linalg.solve(gram(x), x.flatten(0, 1).T @ y.flatten(0, 1)).T
        error = 1.0 if found is None else float((found - true).norm() / true.norm())
        assert error <= 0.02 + float((plain - true).norm() / true.norm())
    assert shares[0] > 0.98 and shares[2] < 0.5 * float((plain - true).norm() / true.norm())


def test_sequences_left_out_count_in_the_answer() -> None:
    x, y, _ = problem(0.5)
    flat, wanted = x.flatten(0, 1), y.flatten(0, 1)
    found = sums(x, y).solve(gram(x))
    answers = []
    for damping in DAMPINGS:
        metric = gram(x)
        metric.diagonal().add_(damping * metric.diagonal().mean())
        answers.append(torch.linalg.solve(metric, flat.T @ wanted).T)
    assert found is not None and min(float((found - answer).abs().max()) for answer in answers) < 1e-5


def test_parts_of_lanes_add_up_and_later_tokens_do_not_count() -> None:
    x, y, _ = problem(0.2)
    whole = sums(x, y).solve(gram(x))
    later = torch.randn(100, x.shape[-1])
    first, second = sums(x[:24], y[:24]), sums(x[24:], y[24:])
    first.end(gram(x[:24]) + later.T @ later, later)
    second.end(gram(x[24:]), later[:0])
    found = Drift.together([first, second]).solve(gram(x) + later.T @ later)
    assert whole is not None and found is not None and torch.allclose(found, whole, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("bad", ["nothing", "zeros", "nan"])
def test_nothing_to_regress_on_gives_none(bad: str) -> None:
    x, y, _ = problem(0.1, sequences=8)
    if bad == "nothing":
        assert Drift().solve(gram(x)) is None
        return
    x = torch.zeros_like(x) if bad == "zeros" else x.clone()
    if bad == "nan":
        x[0, 0, 0] = torch.nan
    assert sums(x, y).solve(gram(x)) is None


def test_one_batch_is_not_split() -> None:
    assert held_batches(1, 512) == frozenset()
    assert held_batches(16, 512) == {0, 4, 8, 12} and len(held_batches(1000, 512)) <= 4
    x, y, true = problem(0.0, sequences=4)
    found = sums(x, y).solve(gram(x))  # cautious where there is nothing to judge by
    assert found is not None and 0.3 < float(found.norm() / true.norm()) < 0.8
