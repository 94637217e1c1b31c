"""Checkpoints to GGUF and back: codes follow their rows, values stay, and what is promised is what happens."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from format_cases import random_qtensor
from safetensors.torch import save_file

from fewbit.base.errors import InputError, Refusals
from fewbit.eval.verify import verify
from fewbit.formats import gptq
from fewbit.formats.gguf import ops
from fewbit.formats.regrid import regrid
from fewbit.formats.table import Assignment
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import parse_scheme
from fewbit.run.convert import convert, plan_conversion
from fewbit.run.convert_gguf import GgufQuantised, gather_rows
from fewbit.run.source import open_source

sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))
from format_models import quantised_sample, write_pair

LAYERS = 1
EXACT = [  # format, scheme, block type that holds its codes
    ("gptq", "int4-g128", "q4_0"), ("awq", "int4-g32-asym", "q5_0"), ("compressed-tensors", "int8-channel", "q8_0"), ("mlx", "uint4-g32-min", "q4_1"),
    ("compressed-tensors", "mxfp4", "mxfp4"), ("mlx", "mxfp4", "mxfp4"), ("compressed-tensors", "nvfp4", "nvfp4"), ("modelopt", "nvfp4", "nvfp4"),
]  # fmt: skip


def values(place: Path) -> dict[str, torch.Tensor]:
    with open_source(place) as source:
        view = GgufQuantised(source) if source.format is not None and source.format.name == "gguf" else source
        return {name: view.read(name).float() for name in view.manifest}


@pytest.mark.parametrize(("form", "spelling", "held"), EXACT)
def test_there_and_back_without_a_change(form: str, spelling: str, held: str, tmp_path: Path) -> None:
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    done = convert(ours, "gguf", tmp_path / "gguf")
    assert done.exact and done.plan.counts == {"exact": 7}
    assert {one.scheme for one in done.plan.weights.values()} == {parse_scheme(held)}
    wanted, found = values(twin), values(tmp_path / "gguf")
    # llama.cpp's NVFP4 takes the scale over the tensor last, ours first: one rounding of a float32 apart
    same = torch.equal if held != "nvfp4" else lambda a, b: torch.allclose(a, b, rtol=2e-7, atol=0)
    assert wanted.keys() == found.keys() and all(same(wanted[name], found[name]) for name in wanted)
    if held in ("q5_0", "nvfp4"):
        found_by_verify = verify(tmp_path / "gguf", twin)
        assert found_by_verify.ok, found_by_verify.summary
    back = convert(tmp_path / "gguf", "dense-f32", tmp_path / "floats")
    assert back.exact and back.plan.source == "gguf"
    assert (back.out / "tokenizer.json").is_file() and (back.out / "config.json").is_file()
    again = values(tmp_path / "floats")
    assert all(same(wanted[name], again[name]) for name in wanted)
    if form == "mlx" or "fp4" in spelling:  # (a GGUF keeps no sign of zero, so bytes may differ and values not)
        home = convert(tmp_path / "gguf", form, tmp_path / "home")
        assert home.exact and home.plan.counts == {"exact": 7}
        assert all(same(wanted[name], value) for name, value in values(home.out).items())


@pytest.mark.parametrize(
    ("form", "spelling", "target"),
    [
        ("bitsandbytes", "nf4-flat64-dq", "gguf"),
        ("fp8", "fp8-e4m3-block128", "gguf"),
        ("gptq-v2", "int4-g64-asym", "gguf:q4_1"),
        ("mlx", "uint4-g64-min", "gguf:Q4_K_M"),
    ],
)
def test_what_moves_was_predicted(form: str, spelling: str, target: str, tmp_path: Path) -> None:
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    done = convert(ours, target, tmp_path / "gguf", allow_lossy=True)
    assert not done.exact and {one.kind for one in done.plan.weights.values()} == {"re-gridded"}
    assert all(error <= 2 * done.plan.weights[name].error + 1e-6 for name, error in done.errors.items()), done.errors
    wanted, found = values(twin), values(tmp_path / "gguf")
    for name, tensor in wanted.items():  # what is not quantised is not touched, whatever a recipe says of it
        if name not in done.plan.weights:
            assert torch.equal(tensor, found[name]), name


def test_lossy_needs_leave(tmp_path: Path) -> None:
    ours, _ = write_pair("compressed-tensors", "int8-channel", tmp_path, layers=LAYERS)
    with pytest.raises(Refusals, match="FB-E0623"):
        convert(ours, "gguf:q4_0", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_gguf_to_gguf_is_quantising(tmp_path: Path) -> None:
    ours, _ = write_pair("gptq", "int4-g128", tmp_path, layers=LAYERS)
    out = convert(ours, "gguf", tmp_path / "gguf").out
    with open_source(out) as source, pytest.raises(InputError, match="fewbit quantize"):
        plan_conversion(source, "gguf:q8_0")


@pytest.mark.parametrize("spelling", ["q4_0", "q4_1", "q4_k", "q6_k", "q2_k", "q3_k", "iq4_xs", "mxfp4", "iq2_xxs"])
def test_rows_are_gathered_like_those_of_values(spelling: str) -> None:
    scheme = parse_scheme(spelling)
    pieces = [random_qtensor(scheme, (8, 512), seed) for seed in range(3)]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    got = gather_rows(pieces, order, (2, 12, 512))
    got.check()
    rows = torch.cat([piece.dequantize() for piece in pieces])
    assert torch.equal(got.dequantize(), rows[order].reshape(2, 12, 512))
    turned = ops.apply_quantised(("permute_rope:2",), pieces[:1])
    table = ops.restore([(("permute_rope:2",), torch.arange(8).reshape(8, 1), 0)]).reshape(-1)
    assert torch.equal(gather_rows([turned], table, (8, 512)).dequantize(), pieces[0].dequantize())


def test_columns_in_an_order_of_their_own(tmp_path: Path) -> None:
    """GPTQ with desc_act: kept between versions of GPTQ, rounded anew where a format has no place for it, and said so beforehand."""
    scheme = parse_scheme("int4-g128-asym")
    config, kept, quantised = quantised_sample(scheme, LAYERS)
    generator = torch.Generator().manual_seed(3)
    tensors = dict(kept)
    for name, q in quantised.items():
        cols = q.shape[-1]
        order = torch.cat([part.sort().values for part in torch.randperm(cols, generator=generator).split(128)])
        moved = quantize(scheme, q.dequantize()[:, order], search=Search(method="absmax"))
        tensors |= gptq.FORMAT.encode(name, replace(moved, sides={"permutation": order}))
    written, _ = gptq.FORMAT.config(config, Assignment(dict.fromkeys(quantised, scheme), options={"desc_act": True}))
    (tmp_path / "order").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "order" / "model.safetensors")
    (tmp_path / "order" / "config.json").write_text(json.dumps(written))
    first = values(tmp_path / "order")
    done = convert(tmp_path / "order", "gptq-v2", tmp_path / "v2")
    assert done.exact and json.loads((done.out / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert all(torch.equal(first[name], value) for name, value in values(done.out).items())
    for target in ("awq", "compressed-tensors", "gguf"):
        done = convert(tmp_path / "order", target, tmp_path / target.replace(":", "-"))
        assert done.plan.counts == {"re-gridded": 7} and len(done.errors) == 7, target
        assert all("order of their own" in one.how for one in done.plan.weights.values())
        assert all(error < 2 * done.plan.weights[name].error for name, error in done.errors.items())
    assert convert(tmp_path / "order", "dense-f32", tmp_path / "dense").exact


def test_order_does_not_matter_to_one_scale_a_row() -> None:
    scheme = parse_scheme("int8-channel")
    q = replace(random_qtensor(scheme, (16, 64)), sides={"permutation": torch.randperm(64)})
    out, error = regrid(q, scheme)
    assert error == 0.0 and not out.sides and torch.equal(out.dequantize(), q.dequantize())
