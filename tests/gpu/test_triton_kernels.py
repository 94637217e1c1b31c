"""The Triton kernels beside what they stand in for. Needs CUDA; `tests/unit/runtime/test_triton_interpreted.py` runs it on the CPU, interpreted."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fewbit.math.kernels import has_triton
from fewbit.math.scales import quantize
from fewbit.math.stats import Stats
from fewbit.num.grid import grid_named
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.kernels import gpu
from fewbit.runtime.layouts import choose
from fewbit.solve.gptq_loop import Block, Parameters, Rounder, _triton_block, round_block
from fewbit.solve.table import SOLVERS

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_triton(), reason="NOT TESTED: Triton is not installed"),
    pytest.mark.skipif(
        not CUDA and not INTERPRETED, reason="NOT TESTED: no CUDA device, and TRITON_INTERPRET is not 1"
    ),
]
cuda_only = pytest.mark.skipif(not CUDA, reason="NOT TESTED: no CUDA device")

GRIDS = ["int4", "uint4", "int2", "int8", "nf4", "fp4", "fp8-e4m3", "iq4"]


def block(name: str, rows: int, cols: int, group: int, candidates: int) -> tuple[Rounder, Block]:
    generator = torch.Generator().manual_seed(rows * cols + candidates)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    grid = grid_named(name)
    assert grid is not None
    rounder = Rounder.of(grid)
    groups = -(-cols // group)
    reach = max(abs(rounder.low), abs(rounder.high))
    scale = (draw(rows, groups, candidates).abs() + 0.5) * 2.5 / reach
    scale[0, 0] = 0.0  # a group whose every level is its shift
    middle = (rounder.low + rounder.high) / 2
    zero = torch.full_like(scale, middle).round() if rounder.uniform else torch.zeros_like(scale)
    shift = 0.1 * draw(rows, groups, candidates)
    gid = (torch.arange(cols) // group).to(torch.int32)
    upper = (0.2 * draw(cols, cols)).triu(1)
    w, fed = draw(rows, cols), 0.1 * draw(rows, cols)
    blank = torch.zeros(rows, cols)
    return rounder, Block(
        w, w + fed, upper, draw(cols).square() + 0.1, Parameters(scale, zero, shift, gid),
        blank.to(torch.int32), blank.clone(), torch.zeros(rows, groups, dtype=torch.int32), torch.zeros(rows, dtype=torch.float64),
    )  # fmt: skip


def on(device: str, b: Block) -> Block:
    p = Parameters(*(t.clone().to(device) for t in (b.params.scale, b.params.zero, b.params.shift, b.params.gid)))
    tensors = [t.clone().to(device) for t in (b.w, b.x, b.upper, b.weight)]
    return Block(*tensors, p, *(t.clone().to(device) for t in (b.codes, b.out, b.choice, b.loss)))


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(("rows", "cols", "group"), [(1, 8, 8), (5, 13, 5), (18, 16, 8)])
@pytest.mark.parametrize("name", GRIDS)
def test_the_feedback_loop_equals_the_plain_one(name: str, rows: int, cols: int, group: int, candidates: int) -> None:
    rounder, start = block(name, rows, cols, group, candidates)
    plain, fast = on("cpu", start), on(DEVICE, start)
    round_block(rounder, plain)
    _triton_block(rounder, fast)
    same = (fast.codes.cpu() == plain.codes).float().mean()
    assert float(same) >= (1.0 if rows == 1 else 0.98), "ties and contracted products move a code here and there"
    rows_alike = (fast.codes.cpu() == plain.codes).all(-1)
    assert torch.allclose(fast.out.cpu()[rows_alike], plain.out[rows_alike], atol=1e-5, rtol=1e-5)
    assert torch.allclose(fast.loss.cpu()[rows_alike], plain.loss[rows_alike], rtol=1e-4, atol=1e-8)
    assert torch.equal(fast.choice.cpu()[rows_alike], plain.choice[rows_alike])
    assert torch.allclose(fast.x.cpu()[rows_alike], plain.x[rows_alike], atol=1e-4, rtol=1e-4)


SCHEMES = [
    "int4-g32", "int4-g64-asym", "uint4-g32-min", "int8-channel", "int8-g64-asym", "nf4-g64", "nf4-flat64-dq", "fp8-e4m3-block64",
    "fp8-e4m3-tensor", "int4-channel", "q4_k", "mxfp4",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 7, 256), (3, 64, 256), (21, 70, 512)])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_the_product_equals_that_of_the_decoded_weight(
    spelling: str, tokens: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    if not CUDA and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bfloat16")
    scheme = parse_scheme(spelling)
    generator = torch.Generator().manual_seed(tokens + rows)
    w, x = torch.randn(rows, cols, generator=generator), torch.randn(tokens, cols, generator=generator).to(dtype)
    q = quantize(scheme, w).to(DEVICE)
    assert gpu.misfit(scheme, (rows, cols)) is None
    held = gpu.to_layout(q, dtype)
    back = gpu.from_layout(scheme, (rows, cols), held)
    assert torch.equal(back.codes, q.codes.reshape(back.codes.shape)) and torch.equal(back.dequantize(), q.dequantize())
    found = gpu.matmul(x.to(DEVICE), held, scheme, (rows, cols))
    wanted = x.double() @ q.to("cpu").dequantize().double().T
    assert found.dtype == dtype and found.shape == (tokens, rows)
    least = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert float((found.cpu().double() - wanted).norm() / wanted.norm()) < least


def test_no_tokens_no_product() -> None:
    scheme = parse_scheme("int4-g32")
    q = quantize(scheme, torch.randn(8, 64)).to(DEVICE)
    assert gpu.matmul(torch.empty(0, 64, device=DEVICE), gpu.to_layout(q, torch.float32), scheme, (8, 64)).shape == (
        0,
        8,
    )


@cuda_only
def test_a_layer_on_cuda_is_served_by_it() -> None:
    scheme = parse_scheme("nf4-g64-dq")
    assert choose(scheme, (64, 256), torch.device("cuda")).name == "triton"


@cuda_only
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("spelling", ["int4-g64-asym", "nf4-g64", "q4_k", "int3-channel"])
def test_gptq_on_cuda_is_as_good_as_on_the_cpu(spelling: str, two_sided: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(96, 256, generator=generator), torch.randn(1024, 256, generator=generator)
    stats = Stats().add(x, x, needs=frozenset({"gram", "cross_gram"}))
    if two_sided:
        g = torch.randn(512, 96, generator=generator)
        stats = replace(stats, out_gram=g.T @ g)
    losses = [SOLVERS["gptq"](w.to(d), stats.to(d), parse_scheme(spelling)).loss for d in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@cuda_only
@pytest.mark.parametrize("method", ["clip", "rtn", "hqq"])
def test_other_solvers_on_cuda(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 128, generator=generator), torch.randn(512, 128, generator=generator)
    stats = Stats().add(x, needs=frozenset({"gram", "sumsq"}))
    losses = [SOLVERS[method](w.to(d), stats.to(d), parse_scheme("int4-g32-asym")).loss for d in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
