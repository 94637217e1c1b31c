"""Coordinate descent: every step lowers the true quadratic, and the end is a place where no single step helps. Candidates and joins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.math.linalg import cholesky_, damped, feedback_factor, solve_damped, turn_
from fewbit.math.scales import assemble, fit, snap
from fewbit.math.search import Params, Search
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.solve import sweeps
from fewbit.solve.candidates import by_group, join, neighbours, only
from fewbit.solve.sweeps import Quadratic, sweep

SCHEMES = ["int3-g16-asym", "int4-g32", "nf4-g16", "q4_k", "q3_k", "iq4_xs", "uint4-g16-min", "nvfp4", "mxfp4"]


def problem(scheme, rows: int = 10, two: bool = False, seed: int = 0) -> Quadratic:
    gen = torch.Generator().manual_seed(seed)
    cols = max(64, scheme.span)
    x = torch.randn(3 * cols, cols, generator=gen) @ torch.randn(cols, cols, generator=gen)
    g = torch.randn(4 * rows, rows, generator=gen) @ torch.randn(rows, rows, generator=gen)
    gram, outer = damped(x.T @ x, 0.01)[0], damped(g.T @ g, 0.05)[0]
    gram, outer = gram / gram.diagonal().mean(), outer / outer.diagonal().mean()
    return Quadratic(torch.randn(rows, cols, generator=gen) * 0.05, gram, outer if two else None)


@pytest.mark.parametrize("two", [False, True], ids=["columns", "both"])
@pytest.mark.parametrize("text", SCHEMES)
def test_more_sweeps_never_raise_the_loss(text: str, two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "TILE", 4)
    monkeypatch.setattr(sweeps, "WIDTH", 32)
    scheme = parse_scheme(text)
    case = problem(scheme, two=two)
    params = fit(scheme, case.w, None, Search())
    codes = snap(scheme, case.w, params)
    shape = tuple(case.w.shape)
    last = case.loss(assemble(scheme, shape, codes, params).dequantize())
    start = last
    for count in (1, 2, 4):
        found, tuned, loss = sweep(scheme, codes, params, case, sweeps=count, tune=True)
        q = assemble(scheme, shape, found, tuned)
        q.check()
        assert loss == pytest.approx(case.loss(q.dequantize()), rel=1e-3)
        assert loss <= last * (1 + 1e-4)
        last = loss
    assert last < 0.8 * start


@pytest.mark.parametrize("two", [False, True], ids=["columns", "both"])
def test_the_end_is_a_minimum_in_every_single_code(two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "ENOUGH", 0.0)
    scheme = parse_scheme("int3-g16-asym")
    case = problem(scheme, rows=3, two=two, seed=4)
    params = fit(scheme, case.w, None, Search())
    codes, params, loss = sweep(scheme, snap(scheme, case.w, params), params, case, sweeps=50, tune=False)
    shape = tuple(case.w.shape)
    for i, j in np.ndindex(*shape):
        for by in (-1, 1):
            other = codes.clone()
            code = int(codes[i, j]) + by
            if 0 <= code <= 7:
                other[i, j] = code
                assert case.loss(assemble(scheme, shape, other, params).dequantize()) >= loss * (1 - 1e-4)


@pytest.mark.parametrize("text", [*SCHEMES, "int4-channel", "nf4-g16-dq", "fp8-e4m3-block16"])
def test_candidates_are_what_their_stored_form_says(text: str) -> None:
    scheme = parse_scheme(text)
    w = torch.randn(6, max(64, scheme.span), generator=torch.Generator().manual_seed(1))
    shape, params = tuple(w.shape), fit(scheme, w, None, Search())
    if text not in ("nf4-g16-dq", "fp8-e4m3-block16"):
        found = neighbours(scheme, params, shape)
        numbers = found.numbers()
        assert len(found.combinations) > 1
        choice = torch.randint(
            len(found.combinations), numbers.scale.shape[:2], generator=torch.Generator().manual_seed(2)
        )
        picked = found.pick(choice)
        for name, part in zip(
            ("scale", "code_shift", "value_shift"), (numbers.scale, numbers.zero, numbers.shift), strict=True
        ):
            if getattr(scheme, name) is not None:
                wanted = part.gather(2, choice[..., None])[..., 0]
                assert torch.equal(by_group(scheme, name, getattr(picked, name), shape), wanted)
        codes = snap(scheme, w, picked)
        assemble(scheme, shape, codes, picked).check()
    codes = snap(scheme, w, params)
    numbers = only(scheme, params, shape).numbers()
    s, z, v = (part[:, numbers.gid.long(), 0] for part in (numbers.scale, numbers.zero, numbers.shift))
    levels = torch.tensor(scheme.grid.levels(), dtype=torch.float32)
    level = levels[codes.long() - scheme.grid.first_code]
    assert torch.allclose((level - z) * s + v, assemble(scheme, shape, codes, params).dequantize(), atol=1e-6)


@pytest.mark.parametrize("text", ["int4-g32-asym", "q4_k", "q3_k", "uint3-g16-{uint4-g4-f16}-min{uint4-g4-f16}"])
def test_pieces_joined_are_the_whole(text: str) -> None:
    scheme = parse_scheme(text)
    w = torch.randn(5, 3 * scheme.span, generator=torch.Generator().manual_seed(3))
    whole = fit(scheme, w, None, Search())
    pieces = [fit(scheme, part, None, Search()) for part in w.split(scheme.span, dim=1)]
    joined = join(scheme, pieces, tuple(w.shape))
    _same(joined, whole)


def _same(a: Params | QTensor, b: Params | QTensor) -> None:
    for name in ("scale", "code_shift", "value_shift"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if isinstance(x, QTensor):
            assert torch.equal(x.codes, y.codes) and x.shape == y.shape
            _same(x, y)
        elif x is not None:
            assert torch.equal(x, y)


def test_the_factor_is_a_factor_and_the_blockwise_one_too() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(80, 24, generator=gen, dtype=torch.float64)
    gram = x.T @ x
    gram[7], gram[:, 7] = 0, 0
    found = feedback_factor(gram, 0.02)
    full = (found.upper.double() + torch.eye(24)) * found.pivot.double()
    assert torch.allclose(full @ full.T, damped(gram, 0.02)[0], rtol=1e-5, atol=1e-4)
    assert found.dead.tolist() == [j == 7 for j in range(24)]
    assert not found.upper[7].any() and not found.upper[:, 7].any()
    order = torch.randperm(24, generator=gen)
    again = feedback_factor(gram, 0.02, permutation=order)
    full = (again.upper.double() + torch.eye(24)) * again.pivot.double()
    assert torch.allclose(full @ full.T, damped(gram, 0.02)[0][order][:, order], rtol=1e-5, atol=1e-4)
    block = found.blockwise(8)
    e = torch.randn(3, 24, generator=gen)
    full = ((found.upper + torch.eye(24)) * found.pivot).float()
    fed = e + e @ block.upper  # what remains in each vector, in the metric of its block
    inner = [full[a : a + 8, a : a + 8] for a in (0, 8, 16)]
    total = sum(((fed[:, a : a + 8] @ inner[k]) ** 2).sum() for k, a in enumerate((0, 8, 16)))
    assert float(total) == pytest.approx(float(((e @ full) ** 2).sum()), rel=1e-4)


def test_damped_solution_solves() -> None:
    gen = torch.Generator().manual_seed(0)
    x, rhs = torch.randn(80, 24, generator=gen), torch.randn(5, 24, generator=gen)
    gram = x.T @ x
    found, notes = solve_damped(gram, rhs, 0.01)
    assert notes == () and torch.allclose(found @ damped(gram, 0.01)[0], rhs, atol=1e-3)
    order = torch.randperm(24, generator=gen)
    again = feedback_factor(gram, 0.01, permutation=order).solve(rhs[:, order].double())
    assert torch.allclose(again.float(), found[:, order], atol=1e-5)
    held = rhs.clone()
    inplace, _ = solve_damped(gram, held, 0.01, inplace=True)
    assert inplace.data_ptr() == held.data_ptr() and torch.equal(inplace, found)


@pytest.mark.parametrize("n", [1, 2, 7, 600])
def test_factors_in_place(n: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=gen)
    gram = x.T @ x
    where = gram.clone()
    assert torch.equal(turn_(where), gram.flip(0, 1))
    where = gram.clone()
    lower = cholesky_(where)
    assert lower is not None and lower.data_ptr() == where.data_ptr() and not lower.triu(1).any()
    assert torch.allclose(lower @ lower.T, gram, rtol=1e-4, atol=1e-3 * n)
    assert cholesky_(-gram) is None


def test_the_quadratic_is_that_of_a_damped_scaled_gram() -> None:
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(90, 32, generator=gen), torch.randn(5, 32, generator=gen)
    gram, missing = x.T @ x, torch.randn(5, 32, generator=gen)
    lazy = Quadratic(w, gram, share=0.01, ridge=0.5)
    plain = Quadratic(w, 0.01 * gram + 0.5 * torch.eye(32))
    cut = slice(8, 24)
    assert torch.allclose(lazy.slope(missing, cut), plain.slope(missing)[:, cut], atol=1e-4)
    assert torch.allclose(lazy.metric(cut), plain.gram[cut, cut], atol=1e-5)
    assert lazy.loss(w + missing) == pytest.approx(float((missing @ plain.gram * missing).sum()), rel=1e-4)
