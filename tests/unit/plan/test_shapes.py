"""Tensor shapes from config.json: parameter counts of public models, errors, manifests."""

from __future__ import annotations

import pytest

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.plan import shapes_config
from fewbit.plan.shapes import model_from_config, model_from_manifest
from fewbit.plan.sizes import count_by_kind

from .models import CONFIGS, PUBLISHED, config_of, model_of


def test_every_config_has_a_published_count() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_published_count_exactly(name: str) -> None:
    assert model_of(name).params == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("qwen3-30b-a3b", 3.35),
        ("qwen3-235b-a22b", 22.2),
        ("deepseek-v3", 37.6),
        ("qwen3-next-80b-a3b", 3.87),
    ],
)
def test_active_parameters_of_mixtures(name: str, billions: float) -> None:
    assert model_of(name).active_params / 1e9 == pytest.approx(billions, abs=0.06)


def test_active_parameters_of_gpt_oss_are_the_published_ones_without_the_embedding() -> None:
    """OpenAI counts 3.61B and 5.13B active, unembedding in and embedding out."""
    for name, billions in (("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)):
        model = model_of(name)
        embedding = count_by_kind(model)["embedding"][1]
        assert (model.active_params - embedding) / 1e9 == pytest.approx(billions, abs=0.005)


def test_dense_models_use_all_their_parameters() -> None:
    model = model_of("llama-3.1-8b")
    assert model.active_params == model.params
    assert model.experts == 0


def test_kinds_of_a_mixture_add_up() -> None:
    kinds = count_by_kind(model_of("deepseek-v3"))
    assert sum(params for _, params, _ in kinds.values()) == PUBLISHED["deepseek-v3"]
    assert kinds["experts"][:2] == (58 * 256 * 3, 58 * 256 * 3 * 7168 * 2048)
    assert kinds["shared experts"][0] == 58 * 3
    assert kinds["mlp"][0] == 3 * 3
    assert kinds["router"][1] == 58 * 256 * 7168


def test_roles_of_latent_attention_are_known() -> None:
    roles = {weight.role for weight in model_of("deepseek-v3").weights}
    assert {"q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down", "router", "embed", "head", "norm", "bias"} == roles


def test_stacked_and_transposed_experts_keep_their_matrix_shape() -> None:
    weight = next(weight for weight in model_of("gpt-oss-20b").weights if weight.role == "gate_up")
    assert weight.shape == (32, 2880, 5760)
    assert weight.matrix == (32, 5760, 2880)
    assert weight.kind == "experts"


def test_tied_models_have_no_head() -> None:
    assert model_of("qwen3-0.6b").tied
    assert not model_of("qwen3-8b").tied


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(InputError) as caught:
        model_from_config("x", {"model_type": "rwkv9", "hidden_size": 8})
    assert caught.value.code == "FB-E0450"
    assert "rwkv9" in str(caught.value)
    assert "llama" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads"]
)
def test_a_missing_size_is_named(key: str) -> None:
    config = {name: value for name, value in config_of("llama-3.1-8b").items() if name != key}
    with pytest.raises(InputError) as caught:
        model_from_config("x", config)
    assert caught.value.code == "FB-E0451"
    if key != "num_hidden_layers":
        assert key in caught.value.message


@pytest.mark.parametrize("value", ["4096", -1, 0, 1.5, None, [1]])
def test_a_size_that_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(InputError) as caught:
        model_from_config("x", {**config_of("llama-3.1-8b"), "hidden_size": value})
    assert caught.value.code == "FB-E0451"


def test_expressions_of_the_tables_are_arithmetic_only() -> None:
    for text in ("__import__('os')", "hidden_size.__class__.__mro__[1]", "[x for x in y]", "lambda: 1", "f(1)"):
        with pytest.raises(InputError):
            shapes_config._compiled(text)


def test_every_line_of_every_family_is_used_by_a_block_that_exists() -> None:
    tables = shapes_config._tables()
    used = {block for family in tables["family"].values() for block in family["blocks"]}
    assert used == set(tables["blocks"])
    for block in tables["blocks"].values():
        assert shapes_config._lines(block)


def _manifest(model) -> Manifest:
    tensors = {}
    for weight in model.weights:
        for expert in range(weight.count):
            name = weight.name.replace("*", str(expert))
            tensors[name] = TensorInfo(name, weight.dtype, weight.shape, data_bytes(weight.dtype, weight.shape))
    return Manifest(tensors)


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen1.5-moe-a2.7b", "gpt-oss-20b", "gpt2", "gemma-3-4b", "mixtral-8x7b"]
)
def test_headers_and_config_give_the_same_model(name: str) -> None:
    derived = model_of(name)
    config = {key: value for key, value in config_of(name).items() if key != "quantization_config"}
    read = model_from_manifest(name, _manifest(derived), config)
    assert set(read.weights) == set(derived.weights)
    assert read.source == "headers"
    assert read.disk_bytes == sum(weight.nbytes for weight in derived.weights)


def test_headers_of_an_unknown_family_are_enough() -> None:
    tensors = {
        "trunk.layers.0.mix.weight": TensorInfo("trunk.layers.0.mix.weight", "BF16", (64, 32), 4096),
        "trunk.norm.weight": TensorInfo("trunk.norm.weight", "BF16", (32,), 64),
    }
    model = model_from_manifest("odd", Manifest(tensors), {"model_type": "never-seen"})
    assert model.params == 64 * 32 + 32
    assert [weight.kept for weight in model.weights] == [False, True]


def test_a_quantised_checkpoint_counts_as_the_float_model_it_stands_for() -> None:
    config = {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {
        name: TensorInfo(name, "F8_E4M3", (256, 256), 256 * 256),
        f"{name}_scale_inv": TensorInfo(f"{name}_scale_inv", "F32", (2, 2), 16),
        "model.norm.weight": TensorInfo("model.norm.weight", "BF16", (256,), 512),
    }
    model = model_from_manifest("q", Manifest(tensors), config)
    assert model.params == 256 * 256 + 256
    assert model.disk_bytes == 256 * 256 + 16 + 512
    assert any("fp8" in note for note in model.notes)


def test_a_gguf_file_is_understood_from_its_own_names() -> None:
    metadata = {
        "general.architecture": "llama", "llama.block_count": "1", "llama.embedding_length": "256", "llama.attention.head_count": "4",
        "llama.attention.head_count_kv": "2", "llama.context_length": "512", "llama.expert_count": "4", "llama.expert_used_count": "2",
    }  # fmt: skip
    shapes = {
        "token_embd.weight": (1000, 256), "blk.0.attn_q.weight": (256, 256), "blk.0.attn_k.weight": (128, 256), "blk.0.ffn_gate_inp.weight": (4, 256),
        "blk.0.ffn_down_exps.weight": (4, 256, 512), "blk.0.attn_norm.weight": (256,), "output_norm.weight": (256,),
    }  # fmt: skip
    tensors = {
        name: TensorInfo(name, "GGML:Q4_K" if len(shape) > 1 else "F32", shape, 1) for name, shape in shapes.items()
    }
    model = model_from_manifest("g", Manifest(tensors, metadata), {})
    kinds = {weight.name: weight.kind for weight in model.weights}
    assert (model.layers, model.hidden_size, model.vocab_size, model.max_context, model.experts) == (
        1,
        256,
        1000,
        512,
        4,
    )
    assert kinds["blk.0.ffn_down.experts.weight"] == "experts"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "router"
    assert model.active_share == 0.5
    assert model.tied
