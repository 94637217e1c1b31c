"""Hadamard matrices: the defining identity, and the fast product against the dense one."""

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.hadamard import hadamard, order_parts, random_signs, rotate


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 28, 36, 40, 44, 52, 60, 76, 100, 108, 140, 148, 344, 256])
def test_rows_are_orthogonal_and_the_fast_product_agrees(n: int) -> None:
    matrix = hadamard(n, torch.float64)
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(rotate(x), x @ matrix / n**0.5, atol=1e-12)
    assert torch.allclose(rotate(rotate(x), inverse=True), x, atol=1e-12)


@pytest.mark.parametrize(
    "n", [896, 1536, 2304, 2560, 3072, 3584, 4864, 5120, 5632, 8960, 9216, 11008, 13824, 14336, 18944, 28672, 29568]
)
def test_widths_of_known_models_are_reached(n: int) -> None:
    base, power = order_parts(n)
    assert base * power == n and power & (power - 1) == 0


def test_unreachable_order_is_refused() -> None:
    for n in (3, 6, 13696):
        assert order_parts(n) is None
    with pytest.raises(InputError) as caught:
        rotate(torch.zeros(2, 6))
    assert caught.value.code == "FB-E0705"


def test_half_precision_keeps_its_dtype_and_norm() -> None:
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = rotate(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float().norm(dim=1), x.float().norm(dim=1), rtol=1e-2)


def test_signs_come_from_the_seed_alone() -> None:
    first = random_signs(1000, 7)
    torch.manual_seed(1)
    assert torch.equal(first, random_signs(1000, 7)) and not torch.equal(first, random_signs(1000, 8))
    assert set(first.tolist()) == {1.0, -1.0}
