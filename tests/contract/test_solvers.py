"""What every solver must do under every scheme: finite, in range, deterministic, and no worse than the plain range by much."""

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.math.stats import Stats
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.solve.table import SOLVERS, Solved, solver_named

SCHEMES = [
    "int4-g32", "int2-g32-asym", "uint3-g32-min", "uint4-g32-asym{f16}", "int8-channel", "int4-tensor", "fp8-e4m3-block32",
    "mxfp4", "nvfp4", "nf4-g32", "nf4-flat64-dq", "ternary-g32", "uint4-g32-{uint6-g2-f16}-min{uint6-g2-f16}",
]  # fmt: skip
SHAPES = [(1, 64), (5, 64), (33, 192)]
NEEDS = frozenset({"absmax", "absmean", "sumsq", "gram", "cross_gram"})


def awkward(rows: int, cols: int) -> torch.Tensor:
    """Weights with a zero row, a constant row, an outlier and a row of tiny numbers, as far as there are rows."""
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    for row, values in enumerate((0.0, 0.75)):
        if rows > row + 2:
            w[row + 1] = values
    w[0, cols // 2] = 30.0
    if rows > 4:
        w[4] *= 1e-4
    return w


def statistics(cols: int, kind: str) -> Stats:
    """Calibration inputs: correlated, or with dead columns and fewer tokens than columns."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(16 if kind == "poor" else 256, cols, generator=generator)
    x = x @ (torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator) / cols**0.5)
    if kind == "poor":
        x[:, ::7] = 0.0
    return Stats().add(x, x + 0.01 * torch.randn(x.shape, generator=generator), needs=NEEDS)


def run(name: str, w: torch.Tensor, scheme: Scheme, kind: str = "rich") -> Solved:
    return SOLVERS[name](w, statistics(w.shape[-1], kind), scheme, seed=3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_under_every_scheme(name: str, spelling: str, shape: tuple[int, int]) -> None:
    scheme, w = parse_scheme(spelling), awkward(*shape)
    before = w.clone()
    solved = run(name, w, scheme)
    assert torch.equal(w, before), "a solver must not write to its weights"
    solved.q.check()
    assert solved.q.scheme == scheme and solved.q.shape == shape
    back = solved.q.dequantize()
    assert torch.isfinite(back).all() and solved.loss >= 0 and solved.loss < float("inf")
    again = run(name, w, scheme)
    assert torch.equal(back, again.q.dequantize()) and solved.loss == again.loss
    if shape[0] > 4 and scheme.blocks.rows == 1:
        assert (back[1] == 0).all(), "a row of zeros stays one"
    # no weight strays further than the plain range could throw it, with room for scales that clip outliers on purpose
    plain = quantize(scheme, w, search=Search("absmax")).dequantize()
    assert (back - w).norm() <= 2.0 * (plain - w).norm() + 1e-6


@pytest.mark.parametrize("spelling", ["int4-g32", "int3-g32-asym", "nvfp4"])
@pytest.mark.parametrize("name", SOLVERS)
def test_poor_statistics_do_not_fail(name: str, spelling: str) -> None:
    w = awkward(12, 128)
    solved = run(name, w, parse_scheme(spelling), kind="poor")
    solved.q.check()
    assert torch.isfinite(solved.q.dequantize()).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_stacked_weights(name: str) -> None:
    w = torch.stack([awkward(6, 64), 3 * awkward(6, 64)])
    try:
        solved = run(name, w, parse_scheme("int4-g32-asym"))
    except InputError as refusal:  # a solver may take one matrix at a time, if it says so
        assert refusal.code == "FB-E0602" and "(2, 6, 64)" in str(refusal)
        return
    solved.q.check()
    assert solved.q.shape == (2, 6, 64)
    assert (solved.q.dequantize() - w).abs().max() <= 30.0 * 3 / 15 * 2


@pytest.mark.parametrize("name", SOLVERS)
def test_non_finite_weights_are_refused(name: str) -> None:
    w = awkward(5, 64)
    w[2, 3] = float("nan")
    with pytest.raises(InputError) as caught:
        run(name, w, parse_scheme("int4-g32"))
    assert caught.value.code == "FB-E0702" and "(2, 3)" in str(caught.value)


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_and_options_are_checked(name: str) -> None:
    solver = solver_named(name)
    assert solver.name == name and solver.summary and "\n" not in solver.summary
    with pytest.raises(InputError) as caught:
        solver(awkward(1, 64), statistics(64, "rich"), parse_scheme("int4-g32"), options={"no such option": 1})
    assert caught.value.code == "FB-E0704"
    if solver.needs:
        with pytest.raises(InputError) as caught:
            solver(awkward(1, 64), None, parse_scheme("int4-g32"))
        assert caught.value.code == "FB-E0704"


def test_unknown_method() -> None:
    with pytest.raises(InputError) as caught:
        solver_named("magic")
    assert caught.value.code == "FB-E0704" and "rtn" in str(caught.value)
