"""Scales and rotations as pure functions."""

from __future__ import annotations

import pytest
import torch

from fewbit.arch.awq import candidate, output_error, search
from fewbit.arch.rewrite import scale
from fewbit.arch.rewrite_spaces import End, Space
from fewbit.arch.rotate import KeepsMean, rotation
from fewbit.arch.smooth import smooth_scales
from fewbit.base.errors import InputError


@pytest.mark.parametrize("n", [1, 2, 7, 12, 48, 64, 91, 320])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_rotations_are_orthogonal(n: int, keep_mean: bool) -> None:
    if keep_mean and n < 3:
        pytest.skip("nothing to rotate")
    q = rotation(n, seed=3, keep_mean=keep_mean)
    matrix = q.apply(torch.eye(n, dtype=torch.float64))
    assert q.size == n
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert isinstance(q, KeepsMean) == keep_mean
    if keep_mean:
        assert torch.allclose(
            q.apply(torch.ones(1, n, dtype=torch.float64)), torch.ones(1, n, dtype=torch.float64), atol=1e-12
        )
    again = rotation(n, seed=3, keep_mean=keep_mean).apply(torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix, again)


def test_smooth_scales_share_the_difficulty() -> None:
    x, w = torch.tensor([100.0, 1.0, 4.0]), torch.tensor([0.5, 2.0, 0.25])
    s = smooth_scales(x, w, 0.5)
    ratio = (x.double() / s) / (w.double() * s)
    assert torch.allclose(ratio, ratio[0].expand(3))
    assert torch.allclose(s.log().mean(), torch.zeros((), dtype=torch.float64), atol=1e-12)
    equal = x.double() / smooth_scales(x, w, 1.0)
    assert torch.allclose(equal, equal[0].expand(3))


def test_dead_channels_keep_their_scale() -> None:
    s = smooth_scales(torch.tensor([0.0, 3.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert s[0] == 1 and s[1] == 1 and bool(torch.isfinite(s).all())
    assert candidate(torch.tensor([0.0, 2.0, 1.0]), 0.5)[0] == 1


def test_awq_finds_scales_where_a_channel_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 32, generator=generator)
    x = torch.randn(512, 32, generator=generator)
    x[:, 3] *= 40
    x[:, 9] *= 25

    def rounding(v: torch.Tensor) -> torch.Tensor:
        step = v.abs().amax(1, keepdim=True) / 3
        return (v / step).round() * step

    found = search([(w, rounding)], x.abs().mean(0), x.T @ x, steps=20)
    direct = (x @ (rounding(w * found.scales.float()) / found.scales.float() - w).T).square().sum()
    assert abs(found.loss / float(direct) - 1) < 1e-3
    assert found.power > 0 and found.loss < 0.5 * found.loss_before
    assert abs(found.loss_before / output_error(w, torch.ones(32), rounding, x.T @ x) - 1) < 1e-6


@pytest.mark.parametrize(
    "s", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")]), torch.ones(3)]
)
def test_scales_that_are_not_exact_are_refused(s: torch.Tensor) -> None:
    space = Space("x/attn_in", "attn_in", 0, 2, readers=(End("w", "q", -1, 0, 2),), gains=("n",))
    with pytest.raises(InputError, match="FB-E0740"):
        scale(space, s)
