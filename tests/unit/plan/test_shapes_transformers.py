"""Derived shapes against transformers' own models, built on the meta device (no weights)."""

from __future__ import annotations

import pytest

from fewbit.plan.shapes import model_from_config
from fewbit.plan.shapes_config import known_model_types

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "pad_token_id": 0,
}
MOE = {**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    **SMALL, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
CASES = {
    "llama": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**SMALL, "tie_word_embeddings": True, "head_dim": 24},
    "granite": SMALL, "smollm3": SMALL, "mistral": SMALL, "ministral": {**SMALL, "head_dim": 16}, "qwen2": SMALL, "qwen3": {**SMALL, "head_dim": 32},
    "gemma": {**SMALL, "head_dim": 32}, "gemma2": {**SMALL, "head_dim": 32}, "gemma3_text": {**SMALL, "head_dim": 32}, "olmo2": SMALL, "olmo3": SMALL,
    "glm4": {**SMALL, "head_dim": 16, "attention_bias": True}, "phi": SMALL, "phi3": SMALL, "starcoder2": SMALL, "ernie4_5": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4}, "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 48}, "qwen3_moe": {**MOE, "head_dim": 32},
    "qwen3_moe-mixed": {**MOE, "head_dim": 32, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    "qwen3_next": {
        **MOE, "num_hidden_layers": 4, "head_dim": 32, "shared_expert_intermediate_size": 48, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_num_value_heads": 4, "linear_value_head_dim": 8,
    },
    "glm4_moe": {**MLA, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v2": MLA, "deepseek_v3": MLA, "deepseek_v3-noq": {**MLA, "q_lora_rank": None},
    "gpt_oss": {**SMALL, "num_local_experts": 4, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 160, "n_positions": 32},
    "gpt_neox": SMALL, "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
    "bert": {**SMALL, "max_position_embeddings": 40},
    "siglip_vision_model": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "vision_use_head": False},
}  # fmt: skip
# transformers holds these experts stacked in memory while checkpoints store them one by one: only the sum can be compared
STACKED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v2", "deepseek_v3")


# names that transformers 5 changed in memory; files keep the older ones
RENAMED = {"lm_head.weight": {"gpt_neox": "embed_out.weight"}}


def _built(model_type: str, values: dict) -> dict[str, tuple[int, ...]]:
    import torch

    config = transformers.AutoConfig.for_model(model_type, **values)
    encoder = model_type in ("bert", "siglip_vision_model")
    with torch.device("meta"):
        model = (transformers.AutoModel if encoder else transformers.AutoModelForCausalLM).from_config(config)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied parameters once
    found |= {
        name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    }
    if model_type == "siglip_vision_model":
        return {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in found.items()}
    return {RENAMED.get(name, {}).get(model_type, name): shape for name, shape in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_that_transformers_builds(case: str) -> None:
    model_type = case.partition("-")[0]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = transformers.AutoConfig.for_model(model_type, **CASES[case]).to_dict()
    built = _built(model_type, CASES[case])
    derived = model_from_config(case, {**config, **CASES[case]})
    assert derived.params == sum(_count(shape) for shape in built.values())
    if model_type not in STACKED:
        assert {weight.name: weight.shape for weight in derived.weights} == built


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_every_table_is_compared() -> None:
    compared = {case.partition("-")[0] for case in CASES} | {
        "gemma3",
        "kimi_k2",
    }  # gemma3 by its published counts; kimi_k2 is deepseek_v3's table
    assert set(known_model_types()) == compared
