"""The outlier demonstration shows what the papers claim."""

from __future__ import annotations

import torch

from fewbit.eval.lab_outliers import CHANNEL, OUTLIER, example, outlier_demo


def test_the_example_is_what_it_says() -> None:
    x, _ = example()
    small = torch.cat([x[:, :CHANNEL], x[:, CHANNEL + 1 :]], dim=1)
    assert x[0, CHANNEL] == torch.tensor(OUTLIER)
    assert small.abs().min() > 0.08
    assert small.abs().max() < 0.12


def test_one_scale_loses_every_ordinary_activation() -> None:
    plain = outlier_demo().act_remedies[0]
    assert abs(plain.scale - 127.4 / 127) < 1e-6
    assert plain.survivors == (0, 28)
    assert plain.ordinary_error == 1.0


def test_the_remedies_bring_them_back() -> None:
    plain, per_token, mixed, smooth = outlier_demo().act_remedies
    assert per_token.survivors == (0, 28)  # every token has the outlier: no help
    assert mixed.survivors == smooth.survivors == (28, 28)
    assert mixed.ordinary_error < 0.01 < smooth.ordinary_error < 0.2 < plain.ordinary_error
    assert mixed.relative_error < smooth.relative_error < plain.relative_error / 5


def test_awq_protects_what_meets_the_outlier() -> None:
    rounded, awq = outlier_demo().weight_remedies
    assert awq.relative_error < rounded.relative_error / 10


def test_it_is_the_same_every_time() -> None:
    assert outlier_demo() == outlier_demo()
