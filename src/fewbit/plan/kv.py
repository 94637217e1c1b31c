"""The cache that attention keeps of earlier tokens: what each layer stores, from config.json.

    full attention      2 x kv_heads x head_dim values a token       (MHA, GQA and MQA differ in kv_heads only)
    sliding window      the same, for the last `window` tokens only
    latent (MLA)        kv_lora_rank + qk_rope_head_dim values a token, shared by all heads
    linear, state space a fixed state, whatever the context

Llama-3-8B at 8,192 tokens in FP16: 2 x 8 x 128 values x 32 layers x 8192 x 2 bytes = 1.07 GB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fewbit.base.errors import InputError

# bits per stored value. The q types are blocks of 32 with an f16 scale (and minimum), as llama.cpp stores them; fp8 and int8 caches carry scales
# per tensor or head, which are too few to count.
KV_BITS: dict[str, Fraction] = {
    "f32": Fraction(32), "f16": Fraction(16), "bf16": Fraction(16), "fp8": Fraction(8), "int8": Fraction(8), "fp4": Fraction(9, 2),
    "q8_0": Fraction(17, 2), "q5_1": Fraction(6), "q5_0": Fraction(11, 2), "q4_1": Fraction(5), "q4_0": Fraction(9, 2), "int4": Fraction(9, 2),
}  # fmt: skip


@dataclass(frozen=True)
class KvLayer:
    """What one layer keeps.

    Attributes:
        kind: full, sliding, latent, linear, or none (it reads another layer's cache, or has no attention).
        values: values a token.
        window: tokens kept at most, None for all.
        state: values kept whatever the context.
        state_bits: bits of a state value.
    """

    kind: str
    values: int = 0
    window: int | None = None
    state: int = 0
    state_bits: int = 32

    def tokens(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


def kv_bits(dtype: str) -> Fraction:
    """Bits of one cached value.

    Raises:
        InputError: FB-E0453 with the names that exist.
    """
    if dtype.lower() not in KV_BITS:
        raise InputError("FB-E0453", f"no cache dtype is called {dtype!r}; there are {', '.join(KV_BITS)}")
    return KV_BITS[dtype.lower()]


def kv_layers(text: Mapping[str, Any]) -> tuple[KvLayer, ...]:
    """What every layer of a model keeps; () when the config does not say or the model is an encoder."""
    count = next(
        (int(text[key]) for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if text.get(key)), 0
    )
    heads = next((int(text[key]) for key in ("num_attention_heads", "n_head", "n_heads") if text.get(key)), 0)
    hidden = next((int(text[key]) for key in ("hidden_size", "n_embd", "d_model") if text.get(key)), 0)
    if not count or not heads or not hidden or text.get("model_type") in _ENCODERS:
        return ()
    kinds = _kinds(text, count)
    shared = int(text.get("num_kv_shared_layers") or 0)
    layers = [_layer(kind, text, heads, hidden) for kind in kinds[: count - shared]]
    return tuple(layers + [KvLayer("none")] * shared)


def kv_bytes(layers: tuple[KvLayer, ...], context: int, batch: int = 1, dtype: str = "f16") -> int:
    """Bytes of the cache for `batch` sequences of `context` tokens."""
    bits = kv_bits(dtype)
    values = sum(layer.values * layer.tokens(context) for layer in layers)
    state = sum(layer.state * layer.state_bits for layer in layers)
    return -(-int(batch * (values * bits + state)) // 8)


def kv_summary(layers: tuple[KvLayer, ...]) -> str:
    """One line of words: how many layers of each kind keep how much."""
    counts = Counter(layers)
    parts = []
    for layer, count in counts.items():
        if layer.kind == "none":
            parts.append(f"{count} layers that keep nothing of their own")
        elif layer.state:
            parts.append(f"{count} {layer.kind} layers with a fixed state of {layer.state:,} values")
        else:
            window = f", last {layer.window:,} tokens" if layer.window else ""
            parts.append(f"{count} {layer.kind} layers x {layer.values:,} values a token{window}")
    return " + ".join(parts) or "no cache"


_ENCODERS = {"bert", "roberta", "distilbert", "xlm-roberta", "modernbert", "deberta", "deberta-v2", "electra", "mpnet"}


def _layer(kind: str, text: Mapping[str, Any], heads: int, hidden: int) -> KvLayer:
    if kind == "linear":
        return _linear_state(text, hidden)
    if kind == "none":
        return KvLayer("none")
    if text.get("kv_lora_rank"):
        return KvLayer("latent", int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0))
    kv_heads = int(
        text.get("num_key_value_heads") or text.get("n_head_kv") or (1 if text.get("multi_query") else heads)
    )
    head_dim = int(text.get("head_dim") or hidden // heads)
    values = kv_heads * (head_dim + int(text.get("v_head_dim") or head_dim))
    window = text.get("sliding_window") or text.get("attention_chunk_size")
    return KvLayer("sliding", values, int(window)) if kind == "sliding" and window else KvLayer("full", values)


def _linear_state(text: Mapping[str, Any], hidden: int) -> KvLayer:
    """Gated delta nets keep a float32 matrix a head and the tail of a convolution; state-space layers likewise."""
    if text.get("linear_num_value_heads"):
        key = int(text["linear_key_head_dim"])
        value = int(text["linear_value_head_dim"])
        heads = int(text["linear_num_value_heads"])
        channels = 2 * int(text["linear_num_key_heads"]) * key + heads * value
        return KvLayer("linear", state=heads * key * value + channels * (int(text["linear_conv_kernel_dim"]) - 1))
    inner = int(text.get("mamba_d_inner") or text.get("mamba_expand", 2) * hidden)
    size = int(text.get("mamba_d_state") or text.get("ssm_state_size") or 16)
    kernel = int(text.get("mamba_d_conv") or text.get("conv_kernel") or 4)
    return KvLayer("linear", state=inner * size + inner * (kernel - 1))


def _kinds(text: Mapping[str, Any], count: int) -> list[str]:
    """full, sliding, linear or none for each layer, by whichever of the configs' spellings is there."""
    named = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(named, list) and len(named) >= count:
        return [_kind_of(str(word)) for word in named[:count]]
    if pattern := text.get("hybrid_override_pattern"):
        return [{"*": "full", "M": "linear"}.get(char, "none") for char in str(pattern)[:count]]
    if interval := text.get("full_attention_interval"):
        return ["full" if (layer + 1) % int(interval) == 0 else "linear" for layer in range(count)]
    if period := text.get("attn_layer_period"):
        offset = int(text.get("attn_layer_offset") or 0)
        return ["full" if layer % int(period) == offset else "linear" for layer in range(count)]
    if not text.get("sliding_window") and not text.get("attention_chunk_size"):
        return ["full"] * count
    if text.get("use_sliding_window") is False:
        return ["full"] * count
    if text.get("no_rope_layers"):  # Llama 4: layers with rotary positions attend in chunks
        return ["sliding" if flag else "full" for flag in text["no_rope_layers"]][:count]
    pattern = (
        text.get("sliding_window_pattern")
        or text.get("_sliding_window_pattern")
        or _PATTERNS.get(str(text.get("model_type")))
    )
    if pattern:
        return ["full" if (layer + 1) % int(pattern) == 0 else "sliding" for layer in range(count)]
    if text.get("max_window_layers") is not None and text.get("use_sliding_window"):
        return ["full" if layer < int(text["max_window_layers"]) else "sliding" for layer in range(count)]
    return ["sliding"] * count


# every n-th layer attends to everything, where the config class says so and the config need not
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2}


def _kind_of(word: str) -> str:
    if "sliding" in word or "chunked" in word or "local" in word:
        return "sliding"
    if word in ("mamba", "linear_attention", "recurrent", "mamba2", "conv"):
        return "linear"
    return "none" if word in ("mlp", "moe") else "full"
