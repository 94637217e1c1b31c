"""Roles from names and shapes: every tensor gets one, nothing is skipped."""

from __future__ import annotations

import pytest

from fewbit.arch.infer import facts
from fewbit.arch.spec import KEPT_ROLES, QUANTISED_ROLES, _load, families, family_of
from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo


def manifest(**shapes: tuple[int, ...]) -> Manifest:
    tensors = {}
    for name, shape in shapes.items():
        full = name.replace("__", ".")
        tensors[full] = TensorInfo(full, "BF16", shape, 0)
    return Manifest(tensors)


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "role"),
    [
        ("llama", "model.embed_tokens.weight", (32, 8), "embed"),
        ("llama", "lm_head.weight", (32, 8), "head"),
        ("llama", "model.layers.3.self_attn.q_proj.weight", (8, 8), "q"),
        ("llama", "model.layers.3.mlp.down_proj.weight", (8, 16), "down"),
        ("llama", "model.layers.3.input_layernorm.weight", (8,), "norm"),
        ("qwen3", "model.layers.3.self_attn.q_norm.weight", (8,), "norm"),
        ("qwen2", "model.layers.3.self_attn.q_proj.bias", (8,), "bias"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", (4, 8), "router"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", (16, 8), "gate"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", (4, 8), "router"),
        ("qwen3_moe", "model.layers.0.mlp.experts.7.down_proj.weight", (8, 16), "down"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (4, 8, 32), "gate_up"),
        ("gpt_oss", "model.layers.0.self_attn.sinks", (8,), "sinks"),
        ("gpt2", "h.0.attn.c_attn.weight", (8, 24), "qkv"),
        ("gpt2", "wpe.weight", (32, 8), "position"),
        ("bert", "bert.encoder.layer.0.attention.self.query.weight", (8, 8), "q"),
        ("bert", "bert.encoder.layer.0.attention.output.dense.weight", (8, 8), "o"),
        ("bert", "bert.encoder.layer.0.output.dense.weight", (8, 16), "fc2"),
        ("bert", "bert.encoder.layer.0.intermediate.dense.weight", (16, 8), "fc1"),
        ("somethingnew", "model.layers.0.mixer.in_proj.weight", (8, 8), "linear"),
        ("somethingnew", "model.layers.0.mixer.conv1d.weight", (8, 1, 4), "vector"),
        ("somethingnew", "model.layers.0.self_attn.o_proj.weight", (8, 8), "o"),
    ],
)
def test_roles(model_type: str, name: str, shape: tuple[int, ...], role: str) -> None:
    found = facts(Manifest({name: TensorInfo(name, "BF16", shape, 0)}), {"model_type": model_type})
    assert found[name].role == role


def test_conv1d_weights_are_turned_round() -> None:
    found = facts(manifest(h__0__attn__c_attn__weight=(8, 24)), {"model_type": "gpt2"})["h.0.attn.c_attn.weight"]
    assert found.transposed and found.matrix_shape((8, 24)) == (24, 8)


def test_integer_tensors_are_no_weights() -> None:
    info = TensorInfo("model.layers.0.self_attn.q_proj.weight", "I32", (8, 8), 0)
    assert facts(Manifest({info.name: info}), {"model_type": "new"})[info.name].role in KEPT_ROLES | QUANTISED_ROLES
    info = TensorInfo("model.layers.0.odd", "I32", (8, 8), 0)
    assert facts(Manifest({info.name: info}), {"model_type": "new"})[info.name].role == "buffer"


def test_unknown_keys_and_roles_are_errors() -> None:
    with pytest.raises(TypeError):
        _load("x", 'model_types = []\ncolour = "red"\n')
    with pytest.raises(TypeError):
        _load("x", '[[tensor]]\npattern = "*"\nrole = "q"\nspace = "resid"\n')
    with pytest.raises(InputError):
        _load("x", '[[tensor]]\npattern = "*"\nrole = "colour"\n')


def test_a_model_type_belongs_to_one_family() -> None:
    listed = [model_type for family in families().values() for model_type in family.model_types]
    assert len(listed) == len(set(listed))
    assert family_of("llama") is families()["llama"] and family_of("nonsense") is None


@pytest.mark.parametrize(
    "tower",
    ["model.visual.blocks.0.attn.qkv.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight", "audio_tower.layers.0.fc1.weight",
     "model.vision_encoder.transformer.layers.0.attention.q_proj.weight", "multi_modal_projector.linear_1.weight"],
)  # fmt: skip
def test_towers_beside_a_language_model_are_kept_but_not_where_they_are_the_model(tower: str) -> None:
    shapes = {tower: (16, 8), tower.replace("weight", "bias"): (16,), "model.layers.0.mlp.up_proj.weight": (32, 8)}
    tensors = {name: TensorInfo(name, "BF16", shape, 0) for name, shape in shapes.items()}
    found = facts(Manifest(tensors), {"model_type": "made_up"})
    assert found[tower].role == "tower" and found[tower].kept and found[tower.replace("weight", "bias")].role == "bias"
    assert found["model.layers.0.mlp.up_proj.weight"].role == "up"
    del tensors["model.layers.0.mlp.up_proj.weight"]
    assert not facts(Manifest(tensors), {"model_type": "made_up"})[tower].kept
