"""Learned rounding: it lowers the loss that it is given, keeps stored forms, and never returns something worse."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import quantize
from fewbit.math.search import Search
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve import gptq
from fewbit.solve.latent import Latent, learns
from fewbit.solve.learned import Schedule, learn

NEEDS = frozenset({"gram", "cross_gram"})
SCHEMES = [
    "int2-g16-asym",
    "int3-g16",
    "nf4-g16",
    "fp4-e2m1-g16-e8m0",
    "uint3-g16-{uint4-g2-f16}-min{uint4-g2-f16}",
    "uint3-g16-min",
    "int4-block16",
    "nf4-flat64-dq",
    "int4-g24-asym",
]


def network(text: str, seed: int = 0, feedback: bool = False):
    """Two layers with a nonlinearity between them, quantised one by one; -> (loss, batches, start, wanted)."""
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(48, 64, generator=gen) * 0.2, torch.randn(16, 48, generator=gen) * 0.2
    x = torch.randn(640, 64, generator=gen) @ (torch.eye(64) + 0.2 * torch.randn(64, 64, generator=gen))
    scheme = parse_scheme(text)
    hidden = torch.relu(x @ a.T)
    start = {}
    for name, w, inputs in (("a", a, x), ("b", b, hidden)):
        if not feedback:
            start[name] = quantize(scheme, w, None, Search("absmax"))
            continue
        stats = Stats().add(inputs, inputs, needs=NEEDS)
        start[name] = gptq.SOLVER(w, stats, scheme, options={"sweeps": 0, "steps": 3}).q
    batches = list(x.split(40))
    wanted = [torch.relu(part @ a.T) @ b.T for part in batches]

    def loss(weights, k):
        return (torch.relu(batches[k] @ weights["a"].T) @ weights["b"].T - wanted[k]).square().sum()

    return loss, len(batches), start, {"a": a, "b": b}


@pytest.mark.parametrize(("text", "rule"), [(text, "adam") for text in SCHEMES] + [("int3-g16", "sign")])
def test_the_loss_falls_and_stored_forms_stay(text: str, rule: str) -> None:
    loss, batches, start, wanted = network(text)
    found = learn(loss, batches, start, wanted, schedule=Schedule(iterations=60, rate=0.7, rule=rule))
    for name, solved in found.items():
        solved.q.check()
        assert solved.q.scheme == start[name].scheme
    before, after = (
        sum(float(loss({n: q.dequantize() for n, q in weights.items()}, k)) for k in range(batches))
        for weights in (start, {n: s.q for n, s in found.items()})
    )
    if text.startswith("nf4"):  # this toy leaves nothing to gain there: the start is kept
        assert after <= before
        return
    assert after < 0.98 * before
    assert "lowered the block's loss" in found["a"].notes[0]


@pytest.mark.parametrize("text", SCHEMES)
def test_it_starts_from_the_codes_it_is_given(text: str) -> None:
    _, _, start, wanted = network(text, feedback=True)
    for name, q in start.items():
        latent = Latent(q, wanted[name])
        assert torch.allclose(latent.values(), q.dequantize(), rtol=1e-6, atol=1e-7)
        assert torch.equal(latent.finish().codes, q.codes)


@pytest.mark.parametrize("text", ["int3-g16-asym", "nf4-g16"])
def test_gradients_of_parts_equal_autograd_of_the_straight_through_definition(text: str) -> None:
    gen = torch.Generator().manual_seed(1)
    w = torch.randn(8, 32, generator=gen)
    scheme = parse_scheme(text)
    latent = Latent(quantize(scheme, w * 0.7), w)  # ranges too small: some weights are clipped
    latent.values()
    slope = torch.randn(8, 32, generator=gen)
    found = latent.gradients(slope)
    s, z, _ = (part.clone() for part in latent.numbers())
    s, z = s.requires_grad_(), z.requires_grad_()
    theta = latent.theta.clone().requires_grad_()
    u = theta / s + z
    low, high = latent.cells.ends()
    level = latent.cells.nearest(u.detach())
    through = torch.where((u >= low) & (u <= high), u + (level - u).detach(), level)
    ((through - z) * s).mul(slope.reshape(latent.tiling.blocked)).sum().backward()
    assert torch.allclose(found["weights"], theta.grad * s.detach(), atol=1e-5)
    assert torch.allclose(found["scale"], (s.grad * s.detach()).reshape(found["scale"].shape), rtol=1e-4, atol=1e-4)
    if "code_shift" in found:
        assert torch.allclose(found["code_shift"], z.grad.reshape(found["code_shift"].shape), rtol=1e-4, atol=1e-4)


def test_nothing_worse_is_returned() -> None:
    loss, batches, start, wanted = network("int3-g16")
    found = learn(
        lambda weights, k: 1e6 + 0 * loss(weights, k), batches, start, wanted, schedule=Schedule(iterations=3)
    )
    for name, solved in found.items():
        assert torch.equal(solved.q.codes, start[name].codes)


def test_refusals() -> None:
    loss, batches, start, wanted = network("int3-g16")
    with pytest.raises(InputError, match="at least one batch"):
        learn(loss, 0, start, wanted)
    with pytest.raises(InputError, match="sign"):
        Schedule(rule="newton")
    leaf = quantize(parse_scheme("bf16"), torch.randn(16, 48))
    assert not learns(leaf)
    with pytest.raises(InputError, match="scalar codes and a scale"):
        learn(loss, batches, {"a": leaf}, wanted)
