"""Newton rounds on a toy of two layers: the loss falls below the feedback loop's, what cannot be moved stays, and the same comes out twice."""

from __future__ import annotations

import torch

from fewbit.math.scales import quantize
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.solve.newton import Curvature, curvatures, moves, refine

WIDTH, INNER, TOKENS, BATCHES = 32, 64, 256, 3


def toy() -> tuple[dict[str, torch.Tensor], list[torch.Tensor], dict[str, Stats]]:
    """Weights of two layers with a nonlinearity between, inputs of unequal directions, and their statistics."""
    gen = torch.Generator().manual_seed(0)
    weights = {
        "up": torch.randn(INNER, WIDTH, generator=gen) / 6,
        "down": torch.randn(WIDTH, INNER, generator=gen) / 8,
    }
    mix = torch.randn(WIDTH, WIDTH, generator=gen) * torch.logspace(0, -1.5, WIDTH)
    batches = [torch.randn(TOKENS, WIDTH, generator=gen) @ mix for _ in range(BATCHES)]
    x = torch.cat(batches)
    inner = x @ weights["up"].T
    slope = weights["down"].T @ torch.randn(WIDTH, len(x), generator=gen) * (inner > 0).T
    last = torch.randn(len(x), WIDTH, generator=gen)
    hidden = torch.relu(inner)
    stats = {
        "up": Stats(len(x), gram=x.T @ x, out_gram=slope @ slope.T),
        "down": Stats(len(x), gram=hidden.T @ hidden, out_gram=last.T @ last),
    }
    return weights, batches, stats


def run(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ weights["up"].T) @ weights["down"].T


def test_rounds_lower_the_loss_of_both_layers_together() -> None:
    weights, batches, stats = toy()
    wanted = [run(weights, x) for x in batches]

    def loss(values: dict[str, torch.Tensor], batch: int) -> torch.Tensor:
        return (run(values, batches[batch]) - wanted[batch]).square().sum() / TOKENS

    scheme = parse_scheme("int3-g32-asym")
    start = {name: quantize(scheme, w) for name, w in weights.items()}
    curved = curvatures(stats, 0.01, 0.05)

    def total(held: dict[str, QTensor]) -> float:
        return sum(float(loss({name: q.dequantize() for name, q in held.items()}, k)) for k in range(BATCHES))

    words = {"rounds": 4, "sweeps": 2, "tune": True}
    found = refine(loss, list(range(BATCHES)), start, curved, **words)
    assert total(found) < 0.5 * total(start)
    again = refine(loss, list(range(BATCHES)), start, curved, **words)
    assert all(torch.equal(found[name].codes, again[name].codes) for name in found)
    one = refine(loss, list(range(BATCHES)), start, {"up": curved["up"]}, **words)
    assert torch.equal(one["down"].codes, start["down"].codes) and total(one) < total(start)


def test_the_step_is_that_of_the_quadratic() -> None:
    _, _, stats = toy()
    found = Curvature.of(stats["up"], 1e-6, 1e-6)
    slope = torch.randn(INNER, WIDTH)
    step = found.step(slope)
    count = stats["up"].count
    back = stats["up"].out_gram.double() @ step.double() @ stats["up"].gram.double() / count
    assert torch.allclose(-back.float(), slope, atol=0.05 * float(slope.abs().max()))


def test_weights_without_statistics_have_no_curvature() -> None:
    assert (
        curvatures(
            {"a": Stats(4, gram=torch.eye(3)), "b": Stats(4, gram=torch.zeros(3, 3), out_gram=torch.eye(2))}, 0.01, 0.05
        )
        == {}
    )
    assert moves(quantize(parse_scheme("int4-g32"), torch.randn(4, 32)))
