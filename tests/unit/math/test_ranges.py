"""Histograms of magnitudes add up in any order, and the ranges they give are those of the numbers themselves."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.ranges import BINS, TIGHTEST, centres, least_error, magnitudes, percentile
from fewbit.math.rounding import round_levels
from fewbit.math.stats import Stats
from fewbit.num.grid import E4M3, IntGrid

INT8 = IntGrid(8, signed=True)


def inputs(count: int = 20_000, outliers: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator)
    x[:outliers] *= 40
    return x.to(dtype)


def test_parts_add_up_to_the_whole_bit_for_bit() -> None:
    x = inputs().reshape(-1, 8)
    need = frozenset({"histogram", "absmax"})
    whole = Stats().add(x, needs=need)
    parts = Stats().add(x[1900:], needs=need).merge(Stats().take(x[:1900], needs=need))
    assert whole.histogram is not None and parts.histogram is not None
    assert torch.equal(whole.histogram, parts.histogram) and whole.histogram.sum() == x.numel()
    halved = whole.scaled(0.5, whole.count // 2)
    assert halved.histogram is not None and halved.histogram.sum() == x.numel() / 2
    assert whole.channels == 8 and Stats(3, histogram=whole.histogram).channels is None


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1.5, -3.25e38, 65504.0])
def test_a_number_lies_in_the_bin_around_it(value: float) -> None:
    found = magnitudes(torch.tensor([value]))
    assert found.shape == (BINS,) and found.sum() == 1
    middle = float(centres()[found.argmax()])
    assert abs(middle - abs(value)) <= max(abs(value) / 256, 2e-40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentiles_of_magnitudes(percent: float, dtype: torch.dtype) -> None:
    x = inputs(dtype=dtype).float()
    true = float(x.abs().sort().values[max(0, -(-int(percent * x.numel()) // 100) - 1)])
    found = percentile(magnitudes(x), percent)
    assert true <= found <= true * (1 + 1 / 256) + 1e-30
    with pytest.raises(InputError) as error:
        percentile(magnitudes(x), 0.0)
    assert error.value.code == "FB-E0706"


@pytest.mark.parametrize("grid", [INT8, IntGrid(4, signed=True), E4M3], ids=str)
def test_the_range_of_least_error_is_that_of_the_numbers_themselves(grid: object) -> None:
    x = inputs()
    largest = float(x.abs().max())

    def loss(reach: float) -> float:
        scale = reach / float(grid.high)  # type: ignore[attr-defined]
        return float((round_levels(grid, x.abs() / scale) * scale - x.abs()).double().square().sum())  # type: ignore[arg-type]

    found = least_error(magnitudes(x), grid, largest)  # type: ignore[arg-type]
    best = min(loss(largest * TIGHTEST ** (step / 200)) for step in range(201))
    assert largest * TIGHTEST <= found <= largest
    assert loss(found) <= 1.03 * best and loss(found) <= loss(largest)
    if grid == INT8:
        assert found < largest, "twenty outliers in twenty thousand are worth clipping in part"


def test_numbers_that_fit_exactly_are_not_clipped() -> None:
    x = torch.arange(-127, 128).float()
    assert least_error(magnitudes(x), INT8, 127.0) > 126
