"""Conversions between schemes: what is promised from shapes alone is what happens to numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from format_cases import SCHEMES, random_qtensor

from fewbit.formats.exchange import conversion, image, predicted_error
from fewbit.formats.regrid import regrid
from fewbit.formats.table import format_named, format_names
from fewbit.math.metrics import relative_error
from fewbit.math.scales import Search, quantize
from fewbit.num.grid import VectorGrid
from fewbit.num.scheme import Scheme, parse_scheme

SHAPE = (64, 256)
FORMATS = [name for name in format_names() if format_named(name).container == "safetensors"]
SCALAR = [
    scheme for scheme in SCHEMES if not isinstance(scheme.grid, VectorGrid) and not scheme.static and not scheme.is_leaf
]
SOURCES = [parse_scheme(text) for text in (
    "int4-g128", "int4-g128-bf16", "int4-g128-asym", "int4-g32-asym", "int3-g64-asym", "int8-channel", "int8-channel+int8-token", "uint4-g64-min",
    "int4-g64-asym{f16}", "q4_k", "q4_1", "q8_0", "nf4-flat64-dq", "nf4-flat64", "fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e4m3-block128",
    "mxfp4", "mxfp8", "nvfp4", "fp4-g16-fp8-e4m3",
)]  # fmt: skip


def real_qtensor(scheme: Scheme) -> tuple[torch.Tensor, object]:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.02
    return w, quantize(scheme, w, search=Search(method="absmax"))


@pytest.mark.parametrize("scheme", SOURCES, ids=str)
@pytest.mark.parametrize("target", FORMATS)
def test_promises_are_kept(scheme: Scheme, target: str) -> None:
    promised = conversion(scheme, SHAPE, target)
    assert promised.kind != "impossible" or len(promised.how.split()) > 3
    if promised.scheme is None:
        return
    form = format_named(target)
    assert form.accepts(promised.scheme, SHAPE) is None, promised
    _, q = real_qtensor(scheme)
    out, error = regrid(q, promised.scheme)
    out.check()
    assert out.scheme == promised.scheme
    if promised.kind == "exact":
        assert error == 0.0, (promised, error)
    else:
        assert error <= promised.error * 3 + 1e-7, (promised, error)
    form.encode("x.weight", out)


EXACT = [
    ("int4-g128-asym", "gptq-v2"), ("int4-g128-asym", "awq"), ("int4-g128-asym", "compressed-tensors"), ("int4-g128", "gptq"),
    ("int4-g128", "awq"), ("int4-g128-bf16", "mlx"), ("int4-g128-asym", "hqq"), ("mxfp4", "mlx"), ("mxfp8", "mlx"), ("mxfp8", "modelopt"),
    ("mxfp8", "compressed-tensors"), ("nvfp4", "modelopt"), ("nvfp4", "compressed-tensors"), ("fp4-g16-fp8-e4m3", "compressed-tensors"),
    ("fp8-e4m3-channel", "modelopt"), ("fp8-e4m3-block128", "fp8"), ("fp8-e4m3-block128", "compressed-tensors"), ("fp8-e4m3-block128", "modelopt"),
    ("fp8-e4m3-tensor", "fp8"), ("nf4-flat64-dq", "dense-f32"), ("int8-channel", "gptq"), ("int4-g64", "auto-round"), ("q4_1", "mlx"),
]  # fmt: skip


@pytest.mark.parametrize(("spelling", "target"), EXACT)
def test_what_must_be_exact_is(spelling: str, target: str) -> None:
    scheme = parse_scheme(spelling)
    promised = conversion(scheme, SHAPE, target, "F16" if "bf16" not in spelling else "BF16")
    assert promised.kind == "exact", promised
    _, q = real_qtensor(scheme)
    assert regrid(q, promised.scheme)[1] == 0.0


@pytest.mark.parametrize("scheme", [s for s in SCALAR if s.weights_only == s], ids=str)
def test_predicted_error_is_near_the_real_one(scheme: Scheme) -> None:
    w, q = real_qtensor(scheme)
    real = relative_error(w, q.dequantize())
    assert 0.25 * real < predicted_error(scheme) < 4 * real, (real, predicted_error(scheme))


def test_image_of_every_pair_is_honest() -> None:
    """Whatever scheme is turned into whatever other by its codes: a promise of exactness is kept to the bit."""
    targets = [parse_scheme(text) for text in (
        "int4-g32", "int4-g32-asym", "uint4-g32-min", "uint4-g32-f32-min{f32}", "int4-g32-f32-asym{f32}", "int8-g32", "int8-channel-f32", "int5-g32-asym",
        "fp8-e4m3-block128", "fp8-e4m3-channel", "nf4-g64", "nvfp4", "q4_1", "q4_0", "q8_0",
    )]  # fmt: skip
    exact = 0
    for source in SOURCES:
        q = random_qtensor(source, SHAPE)
        for target in targets:
            found = image(source, target, SHAPE)
            if found is not None and found[1] == 0.0:
                _, error = regrid(q, target)
                assert error == 0.0, (str(source), str(target), found, error)
                exact += 1
    assert exact > 30


def test_permuted_columns_cannot_go_to_another_block_size() -> None:
    q = random_qtensor(parse_scheme("int4-g64-asym"), SHAPE)
    permuted = type(q)(q.scheme, q.shape, q.codes, q.scale, q.code_shift, sides={"permutation": torch.randperm(256)})
    out, error = regrid(permuted, parse_scheme("int4-g64-bf16-asym"), ordered=True)
    assert error < 0.01 and "permutation" in out.sides
    out, error = regrid(permuted, parse_scheme("int4-g32-asym"), ordered=True)
    assert 0.01 < error < 0.15 and not out.sides


@pytest.mark.parametrize("spelling", ["int4-g64-asym", "int4-g64-bf16-asym", "int3-g64-asym"])
def test_offsets_become_zero_points_again(spelling: str) -> None:
    """AWQ to MLX rounds offsets to the dtype of the model; the way back finds the zero points."""
    scheme = parse_scheme(spelling)
    _, q = real_qtensor(scheme)
    there, _ = regrid(q, format_named("mlx").conform(scheme, "BF16"))
    back, _ = regrid(there, scheme)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.code_shift, q.code_shift)


@pytest.mark.parametrize("script", ["conversion_matrix", "engines_page"])
def test_the_page_says_what_the_code_does(script: str) -> None:
    root = Path(__file__).parents[3]
    spec = importlib.util.spec_from_file_location(script, root / "dev" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), f"run dev/{script}.py"
