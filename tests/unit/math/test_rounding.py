"""Rounding against torch's own casts and against a float64 search over all levels."""

import numpy as np
import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.rounding import nearest, round_levels, store_scale
from fewbit.num.grid import (
    BF16,
    E4M3,
    E5M2,
    E8M0,
    F16,
    F32,
    NAMED_GRIDS,
    Codebook,
    FloatGrid,
    Grid,
    IntGrid,
    VectorGrid,
)
from fewbit.num.qtensor import decode_codes

ALL_BF16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
FINITE = ALL_BF16[torch.isfinite(ALL_BF16)]


@pytest.mark.parametrize("grid, dtype", [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_fp8_codes_are_those_of_torch_for_every_bf16(grid: FloatGrid, dtype: torch.dtype) -> None:
    theirs = FINITE.clamp(-grid.high, grid.high).to(dtype).view(torch.uint8)
    assert torch.equal(nearest(grid, FINITE), theirs)


@pytest.mark.parametrize("grid, dtype", [(F16, torch.float16), (BF16, torch.bfloat16), (F32, torch.float32)])
def test_wide_floats_round_as_torch(grid: FloatGrid, dtype: torch.dtype) -> None:
    u = torch.randn(10000) * torch.logspace(-20, 20, 10000)
    u = torch.cat([u, FINITE])
    assert torch.equal(round_levels(grid, u), u.clamp(grid.low, grid.high).to(dtype).float())


def slow_nearest(grid: Grid, u: np.ndarray) -> np.ndarray:
    """Nearest level by looking at all of them in float64; ties to the even code, for codebooks to the lower level."""
    levels = grid.levels().astype(np.float32).astype(np.float64)
    codes = np.flatnonzero(np.isfinite(levels))
    if isinstance(grid, FloatGrid) and grid.signed:  # the sign of zero follows the number
        half = len(levels) // 2
        own = np.where(np.signbit(u)[:, None], codes >= half, codes < half)
    else:
        own = np.ones((len(u), len(codes)), bool)
    distance = np.where(own, np.abs(u[:, None] - levels[codes]), np.inf)
    least = distance.min(1, keepdims=True)
    out = np.empty(len(u), np.int64)
    for i in range(len(u)):
        tied = codes[distance[i] == least[i]]
        if isinstance(grid, Codebook):
            out[i] = tied[np.argmin(levels[tied])]
        else:
            even = tied[(tied + grid.low if isinstance(grid, IntGrid) else tied) % 2 == 0]
            out[i] = (even if len(tied) > 1 else tied)[0]
    return out + (grid.low if isinstance(grid, IntGrid) else 0)


@pytest.mark.parametrize("name", [name for name, grid in NAMED_GRIDS.items() if grid.bits <= 8])
def test_nearest_against_all_levels(name: str) -> None:
    grid = NAMED_GRIDS[name]
    levels = np.unique(grid.levels()[np.isfinite(grid.levels())])
    with np.errstate(over="ignore"):
        middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    beside = np.concatenate([np.nextafter(middles, np.float32(-np.inf)), np.nextafter(middles, np.float32(np.inf))])
    rng = np.random.default_rng(0)
    wide = rng.normal(size=500) * min(max(abs(grid.high), abs(grid.low)), 1e37)
    u = np.concatenate([levels, middles, beside, wide]).astype(np.float32)
    u = u[
        np.isfinite(u) & ((np.abs(u) >= 2.0**-126) | (u == 0))
    ]  # what is smaller, float64 distances cannot tell apart
    ours = nearest(grid, torch.from_numpy(u)).long().numpy()
    assert np.array_equal(ours, slow_nearest(grid, u.astype(np.float64)))


def test_infinities_go_to_the_ends() -> None:
    u = torch.tensor([float("inf"), float("-inf")])
    for grid in NAMED_GRIDS.values():
        got = round_levels(grid, u)
        assert got[0] == grid.high
        assert got[1] == (grid.low if grid.name != "e8m0" else 2.0**-127), grid.name


def test_scales_never_vanish_nor_overflow() -> None:
    values = torch.tensor([0.0, 1e-30, -1e-30, 1e30, -1e30, 1e-8])
    for grid in (F16, BF16, F32, E4M3):
        got = store_scale(grid, values)
        assert torch.isfinite(got).all() and got[0] == 0 and (got[1:] != 0).all()
        assert torch.equal(torch.sign(got), torch.sign(values))
    assert store_scale(E8M0, values).min() > 0


class Pairs(VectorGrid):
    """A small vector grid with a table of its own: magnitudes (1,1), (1,3), (3,1), (3,3)."""

    def magnitudes(self) -> np.ndarray:
        return np.array([[1.0, 1], [1, 3], [3, 1], [3, 3]])[:, : self.dim // self.parts]


@pytest.mark.parametrize("sign_bits, parts, dim", [(2, 1, 2), (1, 1, 2), (0, 1, 2), (4, 2, 4), (3, 2, 4)])
def test_vector_codes_are_the_weighted_nearest(sign_bits: int, parts: int, dim: int) -> None:
    grid = Pairs("pairs", dim=dim, index_bits=2, sign_bits=sign_bits, parts=parts)
    table = torch.tensor(grid.magnitudes(), dtype=torch.float32)
    from fewbit.num import qtensor

    levels = torch.tensor(grid.levels(), dtype=torch.float64)  # [codes, dim]
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(200, dim, generator=generator) * 3
    weight = torch.rand(200, dim, generator=generator)
    assert qtensor.level_table(grid, u.device).shape == table.shape
    codes = nearest(grid, u.reshape(1, -1), weight.reshape(1, -1))
    got = decode_codes(grid, codes).reshape(200, dim).double()
    cost = (weight.double() * (u.double() - got).square()).sum(1)
    best = (weight.double()[:, None] * (u.double()[:, None] - levels[None]).square()).sum(2).min(1).values
    assert torch.allclose(cost, best, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError):
        nearest(grid, torch.zeros(dim + 1))
