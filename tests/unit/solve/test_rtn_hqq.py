"""Searched scales against the plain range on the sample model, and HQQ by its own measure."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewbit.math.metrics import weighted_error
from fewbit.math.scales import Search, quantize
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve.hqq import lp_error
from fewbit.solve.table import SOLVERS

SAMPLE = Path(__file__).parents[3] / "samples" / "sample" / "model.safetensors"
SCHEMES = [
    *(f"int{bits}-g64{asym}" for bits in range(2, 9) for asym in ("", "-asym")),
    "fp4-g32", "nf4-g64", "mxfp4", "nvfp4", "int8-channel", "uint4-g32-min",
]  # fmt: skip


def sample_weights() -> dict[str, torch.Tensor]:
    """The matrices of the sample model that are quantised by default."""
    with safe_open(SAMPLE, "pt") as file:
        names = [name for name in file.keys() if name.endswith("proj.weight")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


@pytest.mark.parametrize("spelling", SCHEMES)
def test_searched_scales_beat_the_plain_range_on_every_tensor_of_the_sample(spelling: str) -> None:
    scheme, weights = parse_scheme(spelling), sample_weights()
    assert len(weights) > 10
    for i, (name, w) in enumerate(weights.items()):
        w = (
            w if spelling == "int4-g64-asym" else w[:64]
        )  # rows of the others are many alike: a part of them saves a minute
        h = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(i)) ** 2 + 0.01
        for importance in (None, h):
            errors = {
                method: weighted_error(w, quantize(scheme, w, importance, Search(method)).dequantize(), importance)
                for method in ("absmax", "lsq")
            }
            assert errors["lsq"] < errors["absmax"], (name, errors)


def test_rtn_weighs_errors_by_the_inputs_when_it_knows_them() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = (
        torch.randn(32, 64, generator=generator),
        torch.randn(100, 64, generator=generator) * torch.linspace(0.01, 3, 64),
    )
    stats = Stats().add(x, needs=frozenset({"sumsq"}))
    scheme = parse_scheme("int3-g64")
    known, blind = SOLVERS["rtn"](w, stats, scheme), SOLVERS["rtn"](w, None, scheme)
    h = stats.importance
    assert known.loss == pytest.approx(weighted_error(w, known.q.dequantize(), h))
    assert known.loss < weighted_error(w, blind.q.dequantize(), h)


@pytest.mark.parametrize(
    "spelling",
    [
        "int4-g64-asym",
        "int3-g64-asym",
        "uint4-g64-asym{f16}",
        "uint4-g64-min",
        "int4-g64",
        "nf4-g64",
        "nvfp4",
        "int4-channel",
        "nf4-flat64-dq",
    ],
)
def test_hqq_is_never_worse_by_its_own_measure(spelling: str) -> None:
    scheme = parse_scheme(spelling)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(24, 256, generator=generator) * torch.rand(24, 1, generator=generator)
    w[3], w[4], w[7, 5] = 0.0, 0.3, 20.0
    solved = SOLVERS["hqq"](w, None, scheme)
    plain = SOLVERS["rtn"](w, None, scheme, options={"search": "minmax"})
    assert solved.loss == pytest.approx(lp_error(w, solved.q, None, 0.7))
    assert solved.loss < 0.99 * lp_error(w, plain.q, None, 0.7)
    if spelling not in ("nvfp4", "nf4-flat64-dq"):
        searched = SOLVERS["rtn"](w, None, scheme)
        assert solved.loss < lp_error(w, searched.q, None, 0.7)


def test_hqq_measure_by_definition() -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    q = quantize(parse_scheme("int4-g32"), w)
    h = torch.rand(64)
    want = (h.double() * (w.double() - q.dequantize().double()).abs() ** 0.7).sum().item()
    assert lp_error(w, q, h, 0.7) == pytest.approx(want, rel=1e-5)
