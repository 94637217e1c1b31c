"""SpQR and LLM.int8(): what is kept apart, what it buys, what it costs."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.metrics import output_error
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve import gptq, int8_split, spqr


def heavy(rows: int = 16, cols: int = 128) -> tuple[torch.Tensor, Stats]:
    """Weights with a few huge ones, inputs with a few huge channels."""
    gen = torch.Generator().manual_seed(2)
    w = torch.randn(rows, cols, generator=gen) * 0.02
    w.view(-1)[torch.randperm(w.numel(), generator=gen)[:20]] *= 40
    x = torch.randn(600, cols, generator=gen) @ (torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=gen))
    x[:, [3, 77]] *= 30
    return w, Stats().add(x, x, needs=frozenset({"gram", "cross_gram", "absmax", "importance"}))


@pytest.mark.parametrize("text", ["int3-g32-asym", "uint3-g16-{uint4-g8-f16}-min{uint4-g8-f16}"])
def test_spqr_beats_gptq_at_its_stated_bits(text: str) -> None:
    w, stats = heavy()
    scheme = parse_scheme(text)
    found, plain = spqr.SOLVER(w, stats, scheme), gptq.SOLVER(w, stats, scheme)
    error, other = (output_error(w, s.q.dequantize(), stats.gram) for s in (found, plain))
    assert error < 0.5 * other
    count = round(0.01 * w.numel())
    outliers = found.q.sides["outliers"].to_dense()
    assert 0.8 * count <= int((outliers != 0).sum()) <= count
    assert torch.equal(outliers, outliers.half().float())
    assert found.q.storage_bits == scheme.storage_bits(tuple(w.shape)) + 48 * found.q.sides["outliers"]._nnz()
    assert "bits per weight with them" in found.notes[-1]


def test_spqr_without_outliers_is_gptq() -> None:
    w, stats = heavy()
    scheme = parse_scheme("int4-g32-asym")
    found = spqr.SOLVER(w, stats, scheme, options={"outliers": 0.0})
    assert torch.equal(found.q.dequantize(), gptq.SOLVER(w, stats, scheme).q.dequantize())
    with pytest.raises(InputError, match="between 0 and"):
        spqr.SOLVER(w, stats, scheme, options={"outliers": 0.7})
    with pytest.raises(InputError, match="one matrix"):
        spqr.SOLVER(w[None], stats, scheme)


def test_int8_split_keeps_outlying_columns() -> None:
    w, stats = heavy()
    scheme = parse_scheme("int8-channel+int8-token")
    found = int8_split.SOLVER(w, stats, scheme, options={"threshold": 40.0})
    columns = torch.nonzero(stats.absmax >= 40)[:, 0].tolist()
    assert columns == [3, 77]
    assert torch.equal(found.q.dequantize()[:, columns], w[:, columns].half().float())
    assert not found.q.codes[:, columns].any()
    assert found.q.scheme == scheme.weights_only
    none = int8_split.SOLVER(w, stats, scheme, options={"threshold": 1e9})
    assert not none.q.sides and none.loss > found.loss


def test_int8_split_is_limited_and_refuses() -> None:
    w, stats = heavy()
    scheme = parse_scheme("int8-channel")
    all_of_them = int8_split.SOLVER(w, stats, scheme, options={"threshold": 1e-6})
    assert "12 of 128" in all_of_them.notes[0]
    with pytest.raises(InputError, match="must be positive"):
        int8_split.SOLVER(w, stats, scheme, options={"threshold": 0})
    with pytest.raises(InputError, match="do not suit"):
        int8_split.SOLVER(w[:, :64], stats, scheme)
    stacked = int8_split.SOLVER(torch.stack([w, -w]), stats, scheme, options={"threshold": 40.0})
    assert torch.equal(stacked.q.dequantize()[0], -stacked.q.dequantize()[1])
