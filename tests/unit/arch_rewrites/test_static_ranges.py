"""Static activation ranges through a run: each method's scale, in every format that has a place for it, clipped by wherever it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_rewrites_run import CALIB, checkpoint

from fewbit import api
from fewbit.base.errors import InputError, Refusals
from fewbit.math.ranges import magnitudes
from fewbit.math.rounding import round_levels
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.run.source import open_source
from fewbit.run.static import Reach, input_scale
from fewbit.runtime.linear import QuantLinear

INT8 = "int8-tensor+int8-tensor-static"
FP8 = "fp8-e4m3-tensor+fp8-e4m3-tensor-static"
NAME = "model.layers.1.mlp.down_proj.weight"


def stats(x: torch.Tensor) -> Stats:
    return Stats().add(x, needs=frozenset({"absmax", "histogram"}))


@pytest.mark.parametrize("spelling", [INT8, FP8, "nvfp4+nvfp4-static"])
def test_scales_reach_as_far_as_asked(spelling: str) -> None:
    inner = parse_scheme(spelling).activation
    assert inner is not None
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    x[0, 0] = -90.0
    levels = {INT8: 127.0, FP8: 448.0}.get(spelling, 6.0 * 448.0)
    assert float(input_scale(inner, stats(x))) == pytest.approx(90 / levels)
    cut = float(input_scale(inner, stats(x), Reach("percentile", 99.9))) * levels
    assert float((x.abs() <= cut).float().mean()) >= 0.999 and 2.5 < cut < 5
    assert float(input_scale(inner, stats(x), Reach("percentile", 100.0))) == pytest.approx(90 / levels)
    if spelling == INT8:
        best = float(input_scale(inner, stats(x), Reach("mse"))) * levels

        def loss(reach: float) -> float:
            return float((round_levels(inner.grid, x / (reach / 127)) * (reach / 127) - x).square().sum())

        assert loss(best) <= 1.01 * min(loss(90.0 * share / 50) for share in range(1, 51))
    with pytest.raises(InputError) as error:
        input_scale(inner, Stats(5, absmax=torch.ones(3)), Reach("percentile"))
    assert error.value.code == "FB-E0706"


def test_inputs_of_zeros_have_a_scale() -> None:
    inner = parse_scheme(INT8).activation
    assert inner is not None
    for method in ("absmax", "percentile", "mse"):
        assert float(input_scale(inner, stats(torch.zeros(4, 3)), Reach(method))) > 0


@pytest.mark.parametrize("target", [f"compressed-tensors:{INT8}", f"fp8:{FP8}", f"modelopt:{FP8}"])
def test_the_scale_is_stored_and_honoured(target: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    found = {}
    for method in ("absmax", "percentile", "mse"):
        words = {"activation_range": method, "activation_percentile": 99.0}
        result = api.quantize(model, to=target, out=tmp_path / method, verify=False, **words, **CALIB)
        assert ("histogram" in result.plan.needs) == (method != "absmax")
        with open_source(result.outputs[0]) as source:
            q = source.qtensor(NAME)
            sibling = (
                source.qtensor("model.layers.0.self_attn.q_proj.weight"),
                source.qtensor("model.layers.0.self_attn.v_proj.weight"),
            )
        assert q is not None and q.scheme.static and all(one is not None for one in sibling)
        assert sibling[0].sides["input_scale"] == sibling[1].sides["input_scale"], "engines fuse q, k and v"
        found[method] = q
    scales = {method: float(q.sides["input_scale"]) for method, q in found.items()}
    assert scales["percentile"] < scales["absmax"] and scales["mse"] <= scales["absmax"]
    q = found["percentile"]
    layer = QuantLinear(q, dtype=torch.float32)
    scale, grid = scales["percentile"], q.scheme.activation.grid
    x = 3 * scale * float(grid.high) * torch.rand(5, q.shape[1], generator=torch.Generator().manual_seed(1))
    rounded = round_levels(grid, x / scale) * scale
    wanted = rounded @ q.dequantize().T
    assert float(rounded.max()) < float(x.max()), "some inputs are clipped"
    assert float((layer(x) - wanted).norm() / wanted.norm()) < 1e-4


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    with pytest.raises(Refusals) as refused:
        api.plan_quantize(model, to="compressed-tensors:nvfp4+nvfp4-static", activation_range="mse", **CALIB)
    assert "FB-E0706" in {error.code for error in refused.value.errors}
    with pytest.raises(InputError):
        api.plan_quantize(model, to=f"compressed-tensors:{INT8}", activation_range="median")
    with pytest.raises(InputError):
        api.plan_quantize(model, to=f"compressed-tensors:{INT8}", activation_percentile=0.0)
    assert magnitudes(torch.zeros(0)).sum() == 0
