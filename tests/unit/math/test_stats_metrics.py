"""Statistics add up however the tokens are cut, and metrics match their definitions."""

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.linalg import add_gram
from fewbit.math.metrics import kl_from_logits, output_error, relative_error, sqnr_db, weighted_error
from fewbit.math.stats import Stats

NEEDS = frozenset({"absmax", "absmean", "sumsq", "gram", "cross_gram"})


def test_merged_parts_equal_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_float = torch.randn(64, 12, generator=generator), torch.randn(64, 12, generator=generator)
    whole = Stats().add(x, x_float, needs=NEEDS)
    parts = (
        Stats()
        .add(x[:20], x_float[:20], needs=NEEDS)
        .merge(Stats().add(x[20:].view(4, 11, 12), x_float[20:], needs=NEEDS))
    )
    assert parts.count == whole.count == 64
    assert torch.equal(parts.absmax, whole.absmax) and torch.equal(whole.absmax, x.abs().amax(0))
    for name in ("absmean", "sumsq", "gram", "cross_gram"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    exact = x.double().T @ x.double()
    assert torch.allclose(whole.gram.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(whole.cross_gram.double(), x_float.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(whole.importance.double(), exact.diagonal() / 64, rtol=1e-5)
    assert torch.allclose(Stats(whole.count, gram=whole.gram).importance, whole.importance, rtol=1e-5)


def test_grams_of_bfloat16_are_summed_in_float32() -> None:
    """Their products are rounded piece by piece, and the errors of the pieces average out."""
    x = torch.randn(16_384, 64, generator=torch.Generator().manual_seed(0)).add(1).bfloat16()
    exact = x.double().T @ x.double()
    found = Stats().take(x, needs=frozenset({"gram"})).take(x, needs=frozenset({"gram"})).gram
    assert found.dtype == torch.float32
    error = ((found / 2 - exact) / exact).abs()
    assert error.max() < 2**-9 and error.mean() < 2**-11
    weights = torch.full((len(x), 1), 0.5)
    weighed = Stats().take(x, needs=frozenset({"gram"}), root=weights).gram
    torch.testing.assert_close(weighed * 4, found / 2, rtol=2**-9, atol=0)


@pytest.mark.parametrize("channels", [1, 100, 128, 300, 1000])
def test_half_of_a_gram_is_computed_and_both_are_right(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, channels, generator=generator) for _ in range(2))
    first = add_gram(None, x)
    assert add_gram(first, y, alpha=-1) is first
    exact = x.double().T @ x.double() - y.double().T @ y.double()
    assert torch.equal(first, first.T) and torch.allclose(first.double(), exact, rtol=1e-5, atol=1e-4)


def test_no_tokens_is_no_importance() -> None:
    empty = Stats().add(torch.zeros(0, 8), needs=frozenset({"sumsq", "absmax"}))
    assert empty.count == 0 and empty.importance is None and empty.absmax is None


@pytest.mark.parametrize("x", [torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf"), 0.0]])])
def test_non_finite_inputs_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError) as caught:
        Stats().add(x, needs=NEEDS)
    assert caught.value.code == "FB-E0703"


def test_spaces_of_different_width_do_not_merge() -> None:
    with pytest.raises(InputError):
        Stats().add(torch.ones(2, 3), needs=frozenset({"absmax"})).merge(
            Stats().add(torch.ones(2, 4), needs=frozenset({"absmax"}))
        )


def test_metrics_by_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    w, w_hat = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    miss = (w.double() - w_hat.double()).square()
    h = torch.rand(7, generator=generator)
    assert weighted_error(w, w_hat, h) == pytest.approx(float((miss * h.double()).sum()))
    assert weighted_error(w, w_hat, h.expand(5, 7)) == pytest.approx(float((miss * h.double()).sum()))
    assert sqnr_db(w, w_hat) == pytest.approx(10 * torch.log10(w.double().square().sum() / miss.sum()).item())
    assert relative_error(w, w_hat) == pytest.approx((miss.sum() / w.double().square().sum()).sqrt().item())
    assert sqnr_db(w, w) == float("inf") and sqnr_db(torch.zeros(2, 2), torch.ones(2, 2)) == float("-inf")
    x = torch.randn(30, 7, generator=generator).double()
    assert output_error(w, w_hat, x.T @ x) == pytest.approx(float(((w - w_hat).double() @ x.T).square().sum()))


def test_kl_by_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 50, generator=generator), torch.randn(4, 50, generator=generator)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert torch.allclose(kl_from_logits(a, b), (p * (p / q).log()).sum(-1))
    assert torch.equal(kl_from_logits(a, a), torch.zeros(4, dtype=torch.float64))
