"""The fast fit of blocks of small floats under a power of two: against the plain reference, for every MX scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.math.kernels import mx
from fewbit.math.scales import Search, assemble, fit, fit_plain, quantize, snap
from fewbit.num.scheme import parse_scheme

SCHEMES = ("mxfp4", "mxfp6-e3m2", "mxfp6-e2m3", "mxfp8")


@pytest.mark.parametrize("name", SCHEMES)
def test_no_worse_than_the_plain_reference(name: str) -> None:
    scheme, rng = parse_scheme(name), np.random.default_rng(0)
    w = torch.from_numpy(rng.standard_t(4, (7, 3 * 32)).astype(np.float32) * 0.02)
    h = torch.from_numpy(np.exp(rng.standard_normal(96)).astype(np.float32))
    for importance in (None, h, h.expand(7, 96) * torch.rand(7, 1)):
        params = fit_plain(scheme, w, importance)
        plain = assemble(scheme, (7, 96), snap(scheme, w, params, importance), params)
        q = quantize(scheme, w, importance)
        q.check()
        weight = 1.0 if importance is None else importance
        ours, theirs = (float((weight * (one.dequantize() - w).double() ** 2).sum()) for one in (q, plain))
        assert ours <= theirs * (1 + 1e-6)
        chosen = fit(scheme, w, importance)
        assert torch.equal(chosen.scale.view(torch.uint8), q.scale.view(torch.uint8))
        assert float((snap(scheme, w, chosen, importance) != q.codes).float().mean()) < 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_awkward_blocks(name: str) -> None:
    scheme = parse_scheme(name)
    w = torch.zeros(6, 32)
    w[1, 0], w[2], w[3] = 3e38, 1e-38, torch.linspace(-1, 1, 32)
    w[4, 5], w[5] = -(2.0**-130), 6.0
    q = quantize(scheme, w)
    q.check()
    back = q.dequantize()
    assert bool(torch.isfinite(back).all()) and not bool(back[0].any()) and torch.equal(back[5], w[5])
    assert float((back[1, 0] / w[1, 0] - 1).abs()) < 0.5 and float((back[3] - w[3]).abs().max()) < 0.2
    assert quantize(scheme, w[:0]).dequantize().shape == (0, 32)


def test_other_searches_go_the_plain_way() -> None:
    scheme, w = parse_scheme("mxfp4"), torch.randn(4, 64)
    assert not mx._fast(scheme, w, Search(method="absmax")) and mx._fast(scheme, w, Search())
    q = quantize(scheme, w, None, Search(method="absmax"))
    assert torch.equal(q.dequantize(), mx.quantize(scheme, w, None, Search(method="absmax")).dequantize())
