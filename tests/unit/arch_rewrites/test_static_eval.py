"""Evaluation takes the stored static scale: inputs beyond it are clipped."""

from __future__ import annotations

import torch

from fewbit.eval.stream import ActivationQuantiser
from fewbit.num.scheme import parse_scheme


def test_a_fixed_scale_clips_and_rounds() -> None:
    weight = torch.eye(4)
    scheme = parse_scheme("int8-tensor+int8-tensor-static").activation
    assert scheme is not None
    x = torch.tensor([[0.26, -0.24, 900.0, -900.0], [1.0, 1.76, 0.0, 63.4]])
    with ActivationQuantiser({"w": scheme}, {"w": weight}, {"w": torch.tensor([0.5])}):
        found = torch.nn.functional.linear(x, weight)
    assert torch.equal(found[1], torch.tensor([1.0, 2.0, 0.0, 63.5]))
    assert found[0, 0] == 0.5 and found[0, 1] == 0.0 and found[0, 2] == 63.5 and found[0, 3] in (-63.5, -64.0)
    with ActivationQuantiser({"w": scheme}, {"w": weight}):
        free = torch.nn.functional.linear(x, weight)
    assert free[0, 2] > 800
