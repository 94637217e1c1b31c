"""A GGUF file as planning sees it: llama.cpp's names told as roles, its metadata as a config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fewbit.base.manifest import Manifest
from fewbit.base.names import layer_index

# part of the name -> role; the first that occurs counts
_ROLES = (
    ("token_embd.", "embed"), ("output.weight", "head"), ("position_embd", "position"), ("rope_freqs", "buffer"), ("_norm", "norm"),
    (".bias", "bias"), ("ffn_gate_inp", "router"), ("exp_probs_b", "bias"), ("attn_sinks", "sinks"), ("attn_qkv", "qkv"),
    ("attn_q_a", "q_a"), ("attn_q_b", "q_b"), ("attn_kv_a", "kv_a"), ("attn_kv_b", "kv_b"), ("attn_k_b", "linear"), ("attn_v_b", "linear"),
    ("attn_q.", "q"), ("attn_k.", "k"), ("attn_v.", "v"), ("attn_output.", "o"), ("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down", "down"),
)  # fmt: skip
_KEPT = frozenset({"embed", "head", "position", "buffer", "norm", "bias", "router", "sinks", "vector"})
_EXPERTS = "_exps."
# config.json's key -> key of the file, after the architecture's name
_KEYS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length", "sliding_window": "attention.sliding_window", "max_position_embeddings": "context_length",
    "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length",
    "kv_lora_rank": "attention.kv_lora_rank", "q_lora_rank": "attention.q_lora_rank", "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count", "vocab_size": "vocab_size",
}  # fmt: skip
_PATTERNS = {
    "gemma2": 2,
    "gemma3": 6,
    "gpt-oss": 2,
    "cohere2": 4,
}  # every n-th layer attends to everything; the files do not say so


def is_gguf(manifest: Manifest) -> bool:
    return "general.architecture" in manifest.metadata


def config_of_gguf(manifest: Manifest) -> dict[str, Any]:
    """The numbers of the metadata under the names of config.json; arrays (one value a layer) are left out."""
    metadata = manifest.metadata
    architecture = metadata["general.architecture"]
    found: dict[str, Any] = {"model_type": architecture}
    for key, name in _KEYS.items():
        value = metadata.get(f"{architecture}.{name}", "")
        if value.isdigit():
            found[key] = int(value)
    if "kv_lora_rank" not in found:
        found.pop("qk_rope_head_dim", None)
    if "token_embd.weight" in manifest:
        found["vocab_size"] = manifest["token_embd.weight"].shape[0]
    if found.get("sliding_window") and architecture in _PATTERNS:
        found["sliding_window_pattern"] = _PATTERNS[architecture]
    return found


def facts_of_gguf(manifest: Manifest) -> Iterator[Mapping[str, Any]]:
    """The fields of a `Weight` for every tensor, but its kind; stacked experts keep their leading dimension."""
    for info in manifest.values():
        role = next((role for part, role in _ROLES if part in info.name), "linear" if len(info.shape) > 1 else "vector")
        plain = {"GGML:F32": "F32", "GGML:F16": "F16", "GGML:BF16": "BF16"}.get(info.dtype, info.dtype)
        yield {
            "name": info.name.replace(_EXPERTS, ".experts."), "shape": info.shape, "dtype": "F16" if plain.startswith("GGML:") else plain, "count": 1,
            "role": role, "layer": layer_index(info.name), "matrix": info.shape, "kept": role in _KEPT or len(info.shape) < 2,
        }  # fmt: skip
