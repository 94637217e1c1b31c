"""Fake quantisation: values are those of the quantised tensor, gradients those of the straight-through definition."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.scales import quantize
from fewbit.num.grid import IntGrid
from fewbit.num.qtensor import QTensor, decode_codes, expand, level_table
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.fake import MARGIN, FakeQuantise, edges, inside_cells, sum_blocks

WORDS = (
    "int4-channel", "int8-tensor", "int3-g32", "int4-g64-asym", "uint4-g32-min", "uint4-g64-asym{f16}", "int2-g64", "fp8", "fp8-e4m3-block128",
    "nf4-g64", "nf4-flat64", "mxfp4", "fp4-g16-f32", "ternary-g256-f16",
)  # fmt: skip
NESTED = ("nf4-g64-dq", "nvfp4", "q4_k", "q6_k", "q3_k", "iq4_xs")
SHAPES = ((12, 256), (5, 200), (3, 7, 130))


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    return w.to(dtype)


def straight_through(w: torch.Tensor, parts: dict[str, torch.Tensor], q: QTensor) -> torch.Tensor:
    """The definition, left to autograd: rounding has derivative 1, a clipped weight sits at the end of the grid."""
    scheme = q.scheme
    s, z, v = (
        None if parts.get(name) is None else expand(parts[name], scheme, q.shape).reshape(q.shape)
        for name in ("scale", "code_shift", "value_shift")
    )
    u = w if v is None else w - v
    u = u if s is None else u / s
    u = u if z is None else u + z
    if isinstance(scheme.grid, IntGrid):
        level = (u.round() - u).detach() + u
        level = level.clamp(scheme.grid.low, scheme.grid.high)
    else:
        table = level_table(scheme.grid, w.device).to(w.dtype)
        table = table[torch.isfinite(table)]
        nearest = torch.stack([table[(table - x).abs().argmin()] for x in u.detach().flatten()]).reshape(u.shape)
        low, high = edges(scheme.grid)
        through = torch.where((u > low) & (u < high), u, u.detach())
        level = through + (nearest - through).detach()
    out = level if z is None else level - z
    out = out if s is None else out * s
    return out if v is None else out + v


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_the_straight_through_ones(word: str, shape: tuple[int, ...]) -> None:
    scheme = parse_scheme(word)
    start = weights(shape)
    q = quantize(scheme, start)
    fake = FakeQuantise(q).double()
    w = (1.1 * weights(shape, dtype=torch.float64)).requires_grad_()  # some weights beyond the ends of the grid
    g = weights(shape, seed=1, dtype=torch.float64)
    out, found = fake.quantise(w)
    out.backward(g)
    counts = scheme.block_counts(shape)
    leaves = {name: part()[0].detach().reshape(counts).clone().requires_grad_() for name, part in fake.parts.items()}
    again = w.detach().clone().requires_grad_()
    wanted = straight_through(again, leaves, found)
    wanted.backward(g)
    assert torch.allclose(out, wanted, atol=1e-5)
    assert torch.allclose(w.grad, again.grad, rtol=1e-12, atol=1e-14)
    if isinstance(scheme.grid, IntGrid) and scheme.grid.bits < 5:
        assert 0 < float((w.grad == 0).double().mean()) < 0.5  # clipping happens, and is not the rule
    for name, part in fake.parts.items():
        into_values = leaves[name].grad.reshape(part.unit.shape) * part.unit
        assert torch.allclose(part.delta.grad, into_values, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("word", NESTED)
def test_nested_scales_learn_through_their_own_rounding(word: str) -> None:
    scheme = parse_scheme(word)
    w = weights((6, 512))
    q = quantize(scheme, w)
    fake = FakeQuantise(q).double()
    x = inside_cells(q, w).double().requires_grad_()
    out, again = fake.quantise(x)
    assert torch.equal(again.dequantize(), q.dequantize())
    out.square().sum().backward()
    # the gradient of the array of scales, by hand: sum over the block of g (L - z - u + z), times the unit of delta
    part = fake.parts["scale"]
    values = part()[0].detach()
    s = expand(values, scheme, q.shape).reshape(q.shape)
    v = None if "value_shift" not in fake.parts else expand(fake.parts["value_shift"]()[0].detach(), scheme, q.shape)
    u = (x.detach() if v is None else x.detach() - v.reshape(q.shape)) / s
    level = decode_codes(scheme.grid, again.codes).double().reshape(q.shape)
    low, high = edges(scheme.grid)
    inside = ((u > low) & (u < high)).double()
    into_scale = sum_blocks(2 * out.detach() * (level - inside * u), scheme, q.shape)
    inner = part.inner
    t = (part.start / _inner_scale(inner, part.start.shape)) if inner.parts else part.start
    through = ((t > edges(inner.scheme.grid)[0]) & (t < edges(inner.scheme.grid)[1])).double()
    if "value_shift" not in inner.parts:
        assert torch.allclose(part.delta.grad, into_scale.reshape(part.unit.shape) * through * part.unit, atol=1e-6)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fake.parameters())


def _inner_scale(inner: FakeQuantise, shape: torch.Size) -> torch.Tensor:
    values = inner.parts["scale"]()[0].detach()
    return expand(values, inner.scheme, tuple(shape)).reshape(shape)


def test_integer_gradients_match_torch() -> None:
    """The learnable fake quantisation of PyTorch, per channel, is the same function."""
    w, g = 1.3 * weights((9, 64)), weights((9, 64), seed=3)
    q = quantize(parse_scheme("int4-channel-f32"), weights((9, 64)))
    fake = FakeQuantise(q)
    ours = w.clone().requires_grad_()
    out = fake(ours)
    out.backward(g)
    theirs, scale = w.clone().requires_grad_(), q.scale.reshape(-1).clone().requires_grad_()
    zero = torch.zeros_like(scale).requires_grad_()
    reference = torch._fake_quantize_learnable_per_channel_affine(theirs, scale, zero, 0, -8, 7, 1.0)
    reference.backward(g)
    assert torch.allclose(out, reference, atol=1e-6)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.allclose(fake.parts["scale"].delta.grad.reshape(-1), scale.grad * q.scale.reshape(-1), atol=1e-4)


@pytest.mark.parametrize("word", (*WORDS, *NESTED))
def test_it_starts_where_the_solver_ended(word: str) -> None:
    scheme, shape = parse_scheme(word), (8, 512)
    w = weights(shape)
    q = quantize(scheme, w)
    fake = FakeQuantise(q)
    latent = inside_cells(q, w)
    assert float((latent - w).norm()) < 0.15 * float(w.norm())
    assert torch.equal(fake(latent), q.dequantize())
    fixed = FakeQuantise(q, keep_codes=True)
    empty = fixed.right_inverse(w)
    assert empty.numel() == 0 and torch.equal(fixed(empty), q.dequantize())
    out, _ = fixed.quantise(empty)
    out.sum().backward()
    assert all(p.grad is not None for p in fixed.parts["scale"].parameters())


def test_fixed_codes_learn_the_exact_derivative_of_the_scale() -> None:
    q = quantize(parse_scheme("int4-g32-asym"), weights((4, 96)))
    fake = FakeQuantise(q, keep_codes=True)
    g = weights((4, 96), seed=2)
    fake(torch.empty(0)).backward(g)
    blocks = (g.reshape(4, 3, 32) * (q.codes.float().reshape(4, 3, 32) - q.code_shift.float().unsqueeze(-1))).sum(-1)
    assert torch.allclose(fake.parts["scale"].delta.grad, blocks * q.scale.float(), atol=1e-5)
    shift = -(g.reshape(4, 3, 32).sum(-1) * q.scale.float())
    assert torch.allclose(fake.parts["code_shift"].delta.grad, shift, atol=1e-5)


@pytest.mark.parametrize("word", ("int4-g32", "nf4-g64-dq", "int2-g64-asym", "q4_k", "iq2_xs"))
def test_a_start_keeps_another_solvers_codes(word: str) -> None:
    scheme = parse_scheme(word)
    w = weights((4, 512))
    moved = w + 0.3 * weights((4, 512), seed=5)  # what a solver that looks at data would rather represent
    q = quantize(scheme, moved)
    fake, latent = FakeQuantise(q), inside_cells(q, w)
    assert torch.equal(fake(latent), q.dequantize())
    assert float((latent - w).norm()) < float((q.dequantize() - w).norm())
    if word == "int4-g32":
        s = expand(q.scale.float(), scheme, q.shape).reshape(q.shape)
        off = (w / s - q.codes).abs()
        inner = (q.codes > -8) & (q.codes < 7)  # the outermost cells have no outer border
        assert float((latent / s - q.codes)[inner].abs().max()) < 0.5 * (1 - MARGIN) + 1e-3
        near = off < 0.5 * (1 - MARGIN) - 1e-3
        assert torch.equal(latent[near], w[near]) and 0.1 < float(near.float().mean()) < 0.8


def test_scales_learn_and_stay_storable() -> None:
    w = weights((6, 64))
    q = quantize(parse_scheme("int4-channel-bf16"), w)
    fake = FakeQuantise(q)
    with torch.no_grad():
        fake.parts["scale"].delta.copy_(torch.linspace(-3, 1, 6)[:, None])
    values, stored = fake.parts["scale"]()
    assert stored.dtype == torch.bfloat16 and torch.equal(stored.sign(), q.scale.sign())
    assert torch.equal(values.detach(), stored.float())
    assert torch.equal(fake(w), fake.qtensor(w).dequantize())


def test_transposed_and_frozen() -> None:
    w = weights((64, 24))
    q = quantize(parse_scheme("int4-g64"), w.T.contiguous())
    fake = FakeQuantise(q, transposed=True)
    assert torch.equal(fake(w), q.dequantize().T)
    before = fake(w).clone()
    fake.freeze(w)
    assert torch.equal(fake(w + 1), before) and not any(p.requires_grad for p in fake.parameters())


def test_sides_are_refused() -> None:
    q = quantize(parse_scheme("int4-g32"), weights((4, 64)))
    bad = QTensor(q.scheme, q.shape, q.codes, q.scale, sides={"permutation": torch.arange(64)})
    with pytest.raises(InputError, match="FB-E0910"):
        FakeQuantise(bad)
