"""Clips found on the outputs: never more output error than without, and what each sweep does is seen in it."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, assemble, fit, quantize, snap
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve.clip import clamped, output_error
from fewbit.solve.table import SOLVERS


def problem(rows: int = 24, cols: int = 256, tokens: int = 512) -> tuple[torch.Tensor, Stats]:
    """Weights with heavy tails on inputs that go together."""
    generator = torch.Generator().manual_seed(rows + cols)
    w = torch.randn(rows, cols, generator=generator)
    w = w * (1 + w.square() / 4)
    x = torch.randn(tokens, cols, generator=generator) @ (
        torch.eye(cols) + 0.6 * torch.randn(cols, cols, generator=generator) / cols**0.5
    )
    return w, Stats().add(x, needs=frozenset({"gram"}))


def loss(w: torch.Tensor, back: torch.Tensor, stats: Stats) -> float:
    assert stats.gram is not None
    return float(output_error(back - w, stats.gram).sum()) / stats.count


@pytest.mark.parametrize(
    "spelling",
    [
        "int4-g64",
        "int3-g32-asym",
        "int2-g64-asym",
        "int4-channel",
        "q4_k",
        "q2_k",
        "nf4-g64",
        "fp8-e4m3-block32",
        "int4-tensor",
        "iq2_xxs",
        "nvfp4",
    ],
)
def test_less_output_error_than_without(spelling: str) -> None:
    scheme = parse_scheme(spelling)
    w, stats = problem()
    solved = SOLVERS["clip"](w, stats, scheme)
    solved.q.check()
    found = loss(w, solved.q.dequantize(), stats)
    assert solved.loss == pytest.approx(found, rel=1e-3)
    plain = loss(w, quantize(scheme, w, None, Search("absmax")).dequantize(), stats)
    assert found <= plain * (1 + 1e-6)
    weighted = quantize(scheme, w, stats.importance).dequantize()
    assert found <= loss(w, weighted, stats) * 1.001
    if spelling in ("int4-g64", "int3-g32-asym", "int2-g64-asym", "q4_k"):
        assert found < 0.95 * plain


def test_sweeps_lower_the_error_of_the_layer() -> None:
    w, stats = problem()
    scheme = parse_scheme("int3-g32")
    losses = [SOLVERS["clip"](w, stats, scheme, options={"sweeps": n}).loss for n in (0, 1, 2)]
    assert losses[0] > losses[1] >= losses[2]


def test_a_group_is_solved_as_by_trying_every_ratio_by_hand() -> None:
    w, stats = problem(rows=5, cols=16)
    scheme, ladder = parse_scheme("int4-g16"), torch.linspace(1.0, 0.5, 7).tolist()
    found = SOLVERS["clip"](w, stats, scheme, options={"steps": 7, "sweeps": 0}).q.dequantize()
    for row in range(5):
        one = w[row : row + 1]
        tried = []
        for r in ladder:
            params = fit(scheme, one.clamp(-r * one.abs().max(), r * one.abs().max()), None, Search("absmax"))
            tried.append(assemble(scheme, (1, 16), snap(scheme, one, params), params))
        tried.append(quantize(scheme, one, stats.importance))
        assert stats.gram is not None
        best = min(float(output_error(q.dequantize() - one, stats.gram)) for q in tried)
        assert float(output_error(found[row : row + 1] - one, stats.gram)) == pytest.approx(best, rel=1e-4)


def test_ranges_are_drawn_in_block_by_block() -> None:
    w = torch.tensor([[1.0, -4.0, 8.0, 0.5, -3.0]])
    drawn = clamped(w, parse_scheme("int4-g2-asym"), 0.5)
    assert torch.equal(drawn, torch.tensor([[0.5, -2.0, 4.0, 0.5, -1.5]]))
    assert clamped(w, parse_scheme("int4-g2"), 1.0) is w


def test_a_gram_that_is_not_finite_is_told() -> None:
    w, stats = problem(rows=3, cols=32)
    assert stats.gram is not None
    stats.gram[0, 0] = torch.nan
    solved = SOLVERS["clip"](w, stats, parse_scheme("int4-g32"))
    assert "fallback" in solved.notes[0] and torch.isfinite(solved.q.dequantize()).all()


@pytest.mark.parametrize("options", [{"steps": 0}, {"tightest": 0.0}, {"sweeps": -1}])
def test_options_without_sense_are_refused(options: dict[str, float]) -> None:
    w, stats = problem(rows=3, cols=32)
    with pytest.raises(InputError) as error:
        SOLVERS["clip"](w, stats, parse_scheme("int4-g32"), options=options)
    assert error.value.code == "FB-E0704"
