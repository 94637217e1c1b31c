"""The key-value cache against hand arithmetic."""

from __future__ import annotations

import pytest

from fewbit.base.errors import InputError
from fewbit.plan.kv import kv_bits, kv_bytes, kv_layers, kv_summary

from .models import model_of


def cache(name: str, context: int, batch: int = 1, dtype: str = "f16") -> int:
    return kv_bytes(kv_layers(model_of(name).text), context, batch, dtype)


def test_llama_3_8b_at_8192_takes_1_07_gigabytes_not_8() -> None:
    assert cache("llama-3.1-8b", 8192) == 2 * 32 * 8 * 128 * 8192 * 2 == 1_073_741_824


@pytest.mark.parametrize(
    ("name", "context", "by_hand"),
    [
        ("llama-3.1-70b", 8192, 2 * 80 * 8 * 128 * 8192 * 2),
        ("llama-3.1-405b", 131072, 2 * 126 * 8 * 128 * 131072 * 2),
        ("llama-2-7b", 4096, 2 * 32 * 32 * 128 * 4096 * 2),  # every head its own keys and values
        ("qwen3-8b", 32768, 2 * 36 * 8 * 128 * 32768 * 2),
        ("qwen3-30b-a3b", 32768, 2 * 48 * 4 * 128 * 32768 * 2),
        ("qwen2.5-7b", 32768, 2 * 28 * 4 * 128 * 32768 * 2),  # sliding_window is set and switched off
        ("mixtral-8x7b", 32768, 2 * 32 * 8 * 128 * 32768 * 2),
        ("mistral-7b-v0.1", 16384, 2 * 32 * 8 * 128 * 4096 * 2),  # all layers keep 4,096 tokens
        ("mistral-7b-v0.3", 16384, 2 * 32 * 8 * 128 * 16384 * 2),
        ("gemma-2-9b", 8192, 2 * 8 * 256 * 2 * (21 * 8192 + 21 * 4096)),  # every second layer is local
        ("gemma-3-27b", 131072, 2 * 16 * 128 * 2 * (10 * 131072 + 52 * 1024)),  # 5 local layers to each global one
        ("gemma-3-1b", 32768, 2 * 1 * 256 * 2 * (4 * 32768 + 22 * 512)),
        ("gpt-oss-20b", 131072, 2 * 8 * 64 * 2 * (12 * 131072 + 12 * 128)),
        ("deepseek-v3", 131072, 61 * (512 + 64) * 131072 * 2),  # one latent vector for all heads
        ("deepseek-v2-lite", 8192, 27 * (512 + 64) * 8192 * 2),
        ("phi-4", 16384, 2 * 40 * 10 * 128 * 16384 * 2),
        ("gpt2", 1024, 2 * 12 * 12 * 64 * 1024 * 2),
    ],
)
def test_cache_by_hand(name: str, context: int, by_hand: int) -> None:
    assert cache(name, context) == by_hand


def test_hybrid_layers_keep_a_fixed_state() -> None:
    """Qwen3-Next: 12 of 48 layers attend; the others keep 32 heads x 128 x 128 float32 and three steps of a convolution of 8,192 channels."""
    layers = kv_layers(model_of("qwen3-next-80b-a3b").text)
    assert [layer.kind for layer in layers[:4]] == ["linear", "linear", "linear", "full"]
    state = 36 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)) * 4
    assert kv_bytes(layers, 0) == state
    assert kv_bytes(layers, 1000) - state == 12 * 2 * 2 * 256 * 1000 * 2


def test_batch_multiplies_and_dtype_divides() -> None:
    assert cache("llama-3.1-8b", 4096, batch=4) == 4 * cache("llama-3.1-8b", 4096)
    assert cache("llama-3.1-8b", 4096, dtype="fp8") * 2 == cache("llama-3.1-8b", 4096)
    assert cache("llama-3.1-8b", 4096, dtype="q8_0") * 32 == cache("llama-3.1-8b", 4096) * 17
    assert cache("llama-3.1-8b", 4096, dtype="q4_0") * 32 == cache("llama-3.1-8b", 4096) * 9


def test_encoders_keep_nothing() -> None:
    assert kv_layers(model_of("bert-base-uncased").text) == ()
    assert kv_bytes((), 512) == 0
    assert kv_summary(()) == "no cache"


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        kv_bits("int3")
    assert caught.value.code == "FB-E0453"


@pytest.mark.parametrize(
    ("extra", "kinds"),
    [
        ({"layer_types": ["full_attention", "sliding_attention", "linear_attention", "full_attention"], "sliding_window": 8}, ["full", "sliding", "linear", "full"]),
        ({"hybrid_override_pattern": "M-*M"}, ["linear", "none", "full", "linear"]),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, ["linear", "linear", "full", "linear"]),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, ["full", "full", "sliding", "sliding"]),
        ({"attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0]}, ["sliding", "sliding", "sliding", "full"]),
        ({"num_kv_shared_layers": 2}, ["full", "full", "none", "none"]),
        ({"sliding_window": 8, "sliding_window_pattern": 4}, ["sliding", "sliding", "sliding", "full"]),
    ],
)  # fmt: skip
def test_the_spellings_of_hybrid_layers(extra: dict, kinds: list[str]) -> None:
    text = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, **extra}
    assert [layer.kind for layer in kv_layers(text)] == kinds
