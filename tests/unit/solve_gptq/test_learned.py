"""Learned rounding: it lowers the loss that it is given, keeps stored forms, and never returns something worse."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve import gptq
from fewbit.solve.learned import Schedule, learn

NEEDS = frozenset({"gram", "cross_gram"})


def network(text: str, seed: int = 0):
    """Two layers with a nonlinearity between them, quantised one by one; -> (loss, batches, start, problems)."""
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(48, 64, generator=gen) * 0.2, torch.randn(16, 48, generator=gen) * 0.2
    x = torch.randn(640, 64, generator=gen) @ (torch.eye(64) + 0.2 * torch.randn(64, 64, generator=gen))
    scheme, options = parse_scheme(text), {"sweeps": 0}
    hidden = torch.relu(x @ a.T)
    start, problems = {}, {}
    for name, w, inputs in (("a", a, x), ("b", b, hidden)):
        stats = Stats().add(inputs, inputs, needs=NEEDS)
        start[name] = gptq.SOLVER(w, stats, scheme, options=options).q
        problems[name] = gptq.Problem.of(w, stats, {**gptq.SOLVER.options, **options}).quadratic
    batches = list(x.split(40))
    wanted = [torch.relu(part @ a.T) @ b.T for part in batches]

    def loss(weights, k):
        return (torch.relu(batches[k] @ weights["a"].T) @ weights["b"].T - wanted[k]).square().sum()

    return loss, len(batches), start, problems


@pytest.mark.parametrize("text", ["int2-g16-asym", "int3-g16", "nf4-g16", "uint3-g16-{uint4-g2-f16}-min{uint4-g2-f16}"])
def test_the_loss_falls_and_stored_forms_stay(text: str) -> None:
    loss, batches, start, problems = network(text)
    said: list[str] = []
    found = learn(loss, batches, start, problems, schedule=Schedule(rounds=6), report=said.append)
    for name, solved in found.items():
        solved.q.check()
        assert solved.q.scheme == start[name].scheme
    before, after = (
        sum(float(loss({n: q.dequantize() for n, q in weights.items()}, k)) for k in range(batches))
        for weights in (start, {n: s.q for n, s in found.items()})
    )
    assert after < 0.97 * before
    assert len(said) == 6 and "lowered the loss" in found["a"].notes[0]


def test_nothing_worse_is_returned() -> None:
    loss, batches, start, problems = network("int3-g16")
    found = learn(lambda weights, k: -loss(weights, k), batches, start, problems, schedule=Schedule(rounds=2))
    judged = [k for k in range(batches) if k % 8 == 0]

    def total(weights) -> float:
        return sum(float(-loss({n: q.dequantize() for n, q in weights.items()}, k)) for k in judged)

    assert total({n: s.q for n, s in found.items()}) <= total(start)


def test_refusals() -> None:
    loss, batches, start, problems = network("int3-g16")
    with pytest.raises(InputError, match="at least one batch"):
        learn(loss, 0, start, problems)
    w = torch.randn(16, 48)
    stats = Stats().add(torch.randn(100, 48), torch.randn(100, 48), needs=NEEDS)
    tiles = gptq.SOLVER(w, stats, parse_scheme("fp8-e4m3-block16")).q
    with pytest.raises(InputError, match="scales within rows"):
        learn(loss, batches, {"a": tiles}, problems)
