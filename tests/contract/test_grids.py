"""What every grid must do: nearest is really nearest, levels are their own nearest, codes stay in range."""

import numpy as np
import pytest
import torch

from fewbit.math.rounding import nearest, round_levels
from fewbit.num.grid import NAMED_GRIDS, FloatGrid, Grid, VectorGrid
from fewbit.num.qtensor import code_dtype, decode_codes
from fewbit.num.vectors import VECTOR_GRIDS

SCALAR = [grid for grid in NAMED_GRIDS.values() if grid.dim == 1]


def ident(grid: Grid) -> str:
    return grid.name


@pytest.mark.parametrize("grid", [g for g in SCALAR if g.bits <= 16], ids=ident)
def test_levels_are_their_own_nearest(grid: Grid) -> None:
    levels = grid.levels()
    levels = torch.tensor(levels[np.isfinite(levels)], dtype=torch.float32)
    codes = nearest(grid, levels)
    assert codes.dtype == code_dtype(grid)
    assert torch.equal(decode_codes(grid, codes), levels)
    assert levels.max() == grid.high and (
        grid.name == "e8m0" or levels.min() == torch.tensor(grid.low, dtype=torch.float32)
    )


@pytest.mark.parametrize("grid", [g for g in SCALAR if g.bits <= 8], ids=ident)
def test_nearest_is_nearest(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    reach = min(max(abs(grid.low), abs(grid.high)), 1e30)
    u = torch.cat(
        [torch.randn(2000, generator=generator) * reach, torch.randn(2000, generator=generator) * reach * 1e-3]
    )
    levels = torch.tensor(grid.levels())
    levels = levels[torch.isfinite(levels)].float().double()
    best = (u.double()[:, None] - levels[None]).abs().min(1).values
    got = (u.double() - round_levels(grid, u).double()).abs()
    assert torch.equal(got, best)


@pytest.mark.parametrize("grid", SCALAR, ids=ident)
def test_rounding_is_monotone_and_odd_where_the_grid_is(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(1)
    u = (torch.randn(3000, generator=generator) * min(grid.high, 1e30)).sort().values
    got = round_levels(grid, u)
    assert (got[1:] >= got[:-1]).all()
    if isinstance(grid, FloatGrid) and grid.signed:
        assert torch.equal(round_levels(grid, -u), -got)


@pytest.mark.parametrize("grid", VECTOR_GRIDS.values(), ids=ident)
def test_vectors_are_their_own_nearest(grid: VectorGrid) -> None:
    pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(2)
    width = grid.parts * grid.index_bits + grid.sign_bits
    top = len(grid.magnitudes()) if grid.parts == 1 and not grid.sign_bits else 1 << width
    codes = torch.randint(0, top, (1, 200), generator=generator, dtype=torch.int32)
    levels = decode_codes(grid, codes)
    assert levels.shape == (1, 200 * grid.dim)
    again = decode_codes(grid, nearest(grid, levels))
    assert torch.allclose(again, levels)
