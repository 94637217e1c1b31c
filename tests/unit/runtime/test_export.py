"""What was trained, written: the file holds the numbers that the model computed with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qat_models import ids, make, step
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fewbit.base.errors import InputError
from fewbit.run.source import open_source
from fewbit.run.trained import export, start_from
from fewbit.runtime.qat import prepare, qtensors, trained_floats


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BF16 checkpoint."""
    place = tmp_path_factory.mktemp("tiny")
    make().to(torch.bfloat16).save_pretrained(place)
    return place


def load(place: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("word", "to", "loads"),
    [
        ("int4-channel-bf16", "compressed-tensors", True),
        ("int2-g32-bf16", "compressed-tensors", True),
        ("int4-g32-bf16-asym", "compressed-tensors", False),
        ("int8-channel-bf16+int8-token", "compressed-tensors", False),
        ("nf4-g64-f32", "dense-f32", True),
    ],
)
def test_the_file_computes_what_was_trained(checkpoint: Path, tmp_path: Path, word: str, to: str, loads: bool) -> None:
    model, tokens = load(checkpoint), ids()
    prepare(model, word, floats="bf16")
    step(model, tokens)
    with torch.no_grad():
        wanted = model(tokens).logits
    with open_source(checkpoint) as source:
        place = export(qtensors(model), trained_floats(model), source, to, tmp_path / "out")
    with open_source(place) as written:
        for name, q in qtensors(model).items():
            assert torch.equal(written.read(name).float(), q.dequantize()), name
        for name, value in trained_floats(model).items():
            assert torch.equal(written.read(name).float(), value)
            assert not torch.equal(value, load(checkpoint).get_parameter(name)), "norms and the embedding learn too"
        if to == "compressed-tensors":
            again = load(checkpoint)
            prepare(again, word, start=start_from(written), recipe="scales")
            assert {n: str(q.scheme) for n, q in qtensors(again).items()} == {
                n: str(q.scheme) for n, q in qtensors(model).items()
            }
    if loads:
        with torch.no_grad():
            assert torch.allclose(load(place)(tokens).logits, wanted, atol=1e-5)


def test_a_head_stored_beside_its_embedding_is_written_with_it(tmp_path: Path) -> None:
    """Some checkpoints hold a tied head a second time; a stale copy would be what an engine reads."""
    base = tmp_path / "base"
    make().to(torch.bfloat16).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    model = load(base)
    prepare(model, "int4-g32-bf16", recipe="floats", floats="bf16")
    step(model, ids())
    with open_source(base) as source:
        place = export(qtensors(model), trained_floats(model), source, "compressed-tensors", tmp_path / "out")
    with open_source(place) as written:
        for name in written.manifest.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
            assert torch.equal(written.read(name).float(), model.lm_head.weight), name


def test_stacked_experts_are_written_one_by_one(tmp_path: Path) -> None:
    make("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model, tokens = load(tmp_path / "base"), ids()
    prepare(model, "int4-g32-bf16", floats="bf16")
    step(model, tokens)
    with open_source(tmp_path / "base") as source:
        place = export(qtensors(model), trained_floats(model), source, "compressed-tensors", tmp_path / "out")
    whole = qtensors(model)["model.layers.0.mlp.experts.gate_up_proj"].dequantize()
    with open_source(place) as written:
        names = [name for name in written.stored if ".experts.2." in name]
        assert len(names) == 3
        (up,) = (name for name in names if "w3" in name or "up_proj" in name)
        assert torch.equal(written.read(up), whole[2, 96:])
        again = start_from(written)["model.layers.0.mlp.experts.gate_up_proj"]
        assert torch.equal(again.dequantize(), whole)


def test_export_refuses_what_it_would_change(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    prepare(model, "int4-g32")  # f16 scales, which compressed-tensors of a BF16 model does not hold; norms in f32
    step(model, ids())
    with open_source(checkpoint) as source:
        with pytest.raises(InputError, match="FB-E0917"):
            export(qtensors(model), {}, source, "compressed-tensors", tmp_path / "a")
        with pytest.raises(InputError, match="FB-E0917"):
            export(qtensors(model), trained_floats(model), source, "dense", tmp_path / "b")
        with pytest.raises(InputError, match="FB-E0917"):
            export({}, {}, source, "dense", tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")
