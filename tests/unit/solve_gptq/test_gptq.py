"""The gptq solver as a whole: never worse than rounding, every scheme, every bad gram."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.metrics import output_error
from fewbit.math.scales import quantize
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve.gptq import SOLVER

NEEDS = frozenset({"gram", "cross_gram"})


def make(
    rows: int = 24, cols: int = 256, seed: int = 0, drift: float = 0.0
) -> tuple[torch.Tensor, Stats, torch.Tensor, torch.Tensor]:
    """Weights, statistics, inputs of the quantised path and of the float path."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen) * 0.05
    mix = torch.randn(cols, cols, generator=gen)
    x_float = torch.randn(3 * cols, cols, generator=gen) @ mix
    x = x_float + drift * torch.randn(3 * cols, cols, generator=gen) @ mix
    return w, Stats().add(x, x_float, needs=NEEDS), x, x_float


@pytest.mark.parametrize(
    "text",
    ["int1-g32-asym", "int2-g64-asym", "int3-g128", "int4-channel", "int8-g32", "nf4-g64", "nf4-g64-dq", "nf4-flat64", "fp8-e4m3-block128",
     "mxfp4", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q4_1", "ternary-g256-f16", "uint4-g64-asym{f16}"],
)  # fmt: skip
def test_less_output_error_than_rounding_in_every_scheme(text: str) -> None:
    scheme = parse_scheme(text)
    w, stats, *_ = make()
    found = SOLVER(w, stats, scheme)
    found.q.check()
    assert found.q.scheme == scheme and found.q.shape == tuple(w.shape)
    rounded = quantize(scheme, w, stats.importance)
    assert output_error(w, found.q.dequantize(), stats.gram) < 0.8 * output_error(w, rounded.dequantize(), stats.gram)


@pytest.mark.parametrize("text", ["iq3_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m"])
def test_vector_grids_take_feedback_too(text: str) -> None:
    scheme = parse_scheme(text)
    w, stats, *_ = make(rows=4, cols=512)
    found = SOLVER(w, stats, scheme)
    found.q.check()
    rounded = quantize(scheme, w, stats.importance)
    assert output_error(w, found.q.dequantize(), stats.gram) < 0.85 * output_error(w, rounded.dequantize(), stats.gram)


@pytest.mark.parametrize(
    "options",
    [{"sweeps": 0}, {"trial": False, "sweeps": 0}, {"refit": False, "trial": False, "sweeps": 0}, {"order": "importance"},
     {"order": "importance", "sweeps": 0}, {"plain": True, "sweeps": 1}, {"tune": False}, {"search": "minmax", "sweeps": 0}],
)  # fmt: skip
@pytest.mark.parametrize("text", ["int3-g64-asym", "q4_k"])
def test_every_combination_of_options_beats_rounding(text: str, options: dict) -> None:
    scheme = parse_scheme(text)
    w, stats, *_ = make(rows=8)
    found = SOLVER(w, stats, scheme, options=options)
    found.q.check()
    rounded = quantize(scheme, w, stats.importance)
    assert output_error(w, found.q.dequantize(), stats.gram) < 0.9 * output_error(w, rounded.dequantize(), stats.gram)


@pytest.mark.parametrize("shape", [(1, 64), (5, 1), (3, 100), (7, 130), (2, 31)])
@pytest.mark.parametrize("text", ["int4-g32-asym", "int3-channel", "nf4-g64"])
def test_awkward_shapes(text: str, shape: tuple[int, int]) -> None:
    scheme = parse_scheme(text)
    w, stats, *_ = make(*shape)
    found = SOLVER(w, stats, scheme)
    found.q.check()
    rounded = quantize(scheme, w, stats.importance)
    exact = output_error(w, rounded.dequantize(), stats.gram)
    assert output_error(w, found.q.dequantize(), stats.gram) <= exact * 1.02 + 1e-12


def test_a_stack_is_solved_matrix_by_matrix() -> None:
    w, stats, *_ = make(rows=6)
    other = make(rows=6, seed=9)[0]
    for text in ("int4-g64-asym", "q4_k", "nf4-g64"):
        scheme = parse_scheme(text)
        both = SOLVER(torch.stack([w, other]), stats, scheme)
        both.q.check()
        for k, part in enumerate((w, other)):
            assert torch.equal(both.q.dequantize()[k], SOLVER(part, stats, scheme).q.dequantize())


def test_drift_is_corrected() -> None:
    w, stats, x, x_float = make(drift=0.5, seed=4)
    scheme, wanted = parse_scheme("int4-g64-asym"), x_float @ w.T
    errors = {}
    for drift in (False, True):
        q = SOLVER(w, stats, scheme, options={"drift": drift}).q.dequantize()
        errors[drift] = float((x @ q.T - wanted).square().sum())
    assert errors[True] < 0.9 * errors[False]


def test_loss_weighting_lowers_the_weighted_error() -> None:
    w, stats, *_ = make(seed=6)
    gen = torch.Generator().manual_seed(1)
    g = torch.randn(300, 24, generator=gen) @ torch.randn(24, 24, generator=gen)
    weighted = replace(stats, out_gram=g.T @ g)
    scheme = parse_scheme("int3-g64-asym")

    def loss(q: torch.Tensor) -> float:
        miss = (q - w).double()
        return float(((weighted.out_gram.double() @ miss @ stats.gram.double()) * miss).sum())

    one, two = (SOLVER(w, s, scheme).q.dequantize() for s in (stats, weighted))
    assert loss(two) < 0.8 * loss(one)


def test_dead_inputs_keep_the_rounded_weight() -> None:
    w, stats, *_ = make(rows=8, cols=64)
    gram = stats.gram.clone()
    dead = [0, 5, 63]
    gram[dead], gram[:, dead] = 0, 0
    scheme = parse_scheme("int8-g32")
    found = SOLVER(w, Stats(stats.count, gram=gram, cross_gram=gram), scheme, options={"sweeps": 0})
    assert any("3 of 64 inputs" in note for note in found.notes)
    scale = found.q.scale.float().abs().repeat_interleave(32, 1)
    assert ((found.q.dequantize() - w).abs()[:, dead] <= 0.5001 * scale[:, dead]).all()


@pytest.mark.parametrize("kind", ["rank one", "zero", "nan", "negative", "tiny", "huge", "duplicate"])
def test_bad_grams_never_fail(kind: str) -> None:
    w, stats, *_ = make(rows=8, cols=64)
    gram = stats.gram.double()
    if kind == "rank one":
        gram = torch.ones(64, 1, dtype=torch.float64) @ torch.ones(1, 64, dtype=torch.float64)
    elif kind == "zero":
        gram = torch.zeros(64, 64, dtype=torch.float64)
    elif kind == "nan":
        gram[3, 4] = float("nan")
    elif kind == "negative":
        gram = gram - 3 * gram.diagonal().mean() * torch.eye(64)
    elif kind == "tiny":
        gram = gram * 1e-30
    elif kind == "huge":
        gram = gram * 1e30
    else:
        gram[:32, :32] = gram[32:, 32:]
        gram[:32, 32:] = gram[32:, :32] = gram[32:, 32:]
    gram = gram.float()
    scheme = parse_scheme("int4-g32-asym")
    found = SOLVER(w, Stats(stats.count, gram=gram, cross_gram=gram), scheme)
    found.q.check()
    assert torch.isfinite(found.q.dequantize()).all()
    assert (found.q.dequantize() - w).abs().max() < 2 * w.abs().max()
    if kind in ("zero", "nan"):
        assert "fallback to rounding to nearest" in found.notes[0]
    if kind == "negative":
        assert any("damping" in note or "fallback" in note for note in found.notes)


def test_too_little_damping_climbs_the_ladder() -> None:
    w, *_ = make(rows=4, cols=32)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    gram = (basis * torch.linspace(-0.05, 1, 32, dtype=torch.float64)) @ basis.T
    found = SOLVER(w, Stats(10, gram=gram, cross_gram=gram), parse_scheme("int4-g32"), options={"damping": 0.01})
    assert any("damping of 0.01 did not" in note for note in found.notes)
    found.q.check()


def test_constant_and_zero_weights() -> None:
    _, stats, *_ = make(rows=4, cols=64)
    for text in ("int4-g32-asym", "int2-g32", "nf4-g32", "q4_1"):
        for value in (0.0, 0.25, -1e-30):
            w = torch.full((4, 64), value)
            found = SOLVER(w, stats, parse_scheme(text))
            found.q.check()
            assert (found.q.dequantize() - w).abs().max() <= abs(value) * 0.2 + 1e-7, (text, value)


def test_bad_input_is_refused_in_words() -> None:
    w, stats, *_ = make(rows=4, cols=64)
    scheme = parse_scheme("int4-g32")
    with pytest.raises(InputError, match="FB-E0702"):
        SOLVER(torch.full((4, 64), float("nan")), stats, scheme)
    with pytest.raises(InputError, match="statistics of 64 channels"):
        SOLVER(torch.zeros(4, 32), stats, scheme)
    with pytest.raises(InputError, match="option order of method gptq must be one of"):
        SOLVER(w, stats, scheme, options={"order": "up"})
    with pytest.raises(InputError, match="no option 'dampening'"):
        SOLVER(w, stats, scheme, options={"dampening": 1})
    with pytest.raises(InputError, match="needs calibration statistics"):
        SOLVER(w, None, scheme)
    with pytest.raises(InputError, match="needs a matrix"):
        SOLVER(torch.zeros(64), stats, scheme)


def test_deterministic() -> None:
    w, stats, *_ = make(rows=16)
    scheme = parse_scheme("int3-g64-asym")
    a, b = (SOLVER(w, stats, scheme).q for _ in range(2))
    assert all(torch.equal(p, r) for p, r in zip(a.named_parts().values(), b.named_parts().values(), strict=True))
