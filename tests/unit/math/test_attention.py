"""Causal attention by blocks of queries equals torch's own, and is what the calibrated engine's observer answers with."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fewbit.math.attention import ROWS, causal_attention, suits
from fewbit.run.observe import Observer


def heads(query: int, key: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, n, length, width, generator=generator).to(dtype) for n in (query, key, key)]


@pytest.mark.parametrize("length", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7])
@pytest.mark.parametrize(("query", "key"), [(4, 4), (4, 2), (3, 1)])
def test_it_is_attention(length: int, query: int, key: int) -> None:
    q, k, v = heads(query, key, length, 16, torch.float64)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v), wanted, rtol=1e-12, atol=1e-12)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3), wanted, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_it_is_as_near_as_torch() -> None:
    q, k, v = heads(4, 2, 300, 64, torch.bfloat16)
    true = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    errors = [(x.double() - true).abs().max() for x in (causal_attention(q, k, v), true.bfloat16())]
    assert errors[0] < 4 * errors[1]


def test_the_observer_takes_it_where_it_suits_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("fewbit.run.observe.causal_attention", lambda *given: taken.append(given) or given[0])
    q, k, v = heads(4, 4, ROWS + 1, 16, torch.bfloat16)
    assert suits(q) and not suits(q.float()) and not suits(q[:, :, :ROWS])
    with Observer({}), torch.no_grad():
        scaled_dot_product_attention(q, k, v, is_causal=True)
        assert len(taken) == 1
        scaled_dot_product_attention(q, k, v)
        scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(ROWS + 1, ROWS + 1, dtype=torch.bfloat16))
        scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)
        with torch.enable_grad():
            scaled_dot_product_attention(q, k, v, is_causal=True)
    assert len(taken) == 1
