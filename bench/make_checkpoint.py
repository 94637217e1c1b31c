"""Makes a Llama-shaped checkpoint of random weights of any size, sharded, in BF16: python bench/make_checkpoint.py OUT --billions 8

Weights are normal with the spread that trained models have (1 / sqrt(in)), each tensor other windows of one random pool, so that making
16 GB takes a minute. The tokenizer is the sample's; the vocabulary is Llama 3's size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fewbit.store.layout import lay_out
from fewbit.store.tensors import as_bytes
from fewbit.store.writer import ShardWriter

# hidden, feed-forward, layers, heads, key-value heads
SHAPES = {
    1: (2048, 8192, 16, 32, 8),
    2: (2560, 9216, 22, 20, 4),
    4: (3072, 9216, 32, 24, 8),
    8: (4096, 14336, 32, 32, 8),
}
VOCAB = 128256
POOL = 1 << 26
PIECE = 1 << 24


def shapes(hidden: int, ffn: int, layers: int, heads: int, kv: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """All tensors of a Llama of these sizes."""
    head = hidden // heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for index in range(layers):
        stem = f"model.layers.{index}."
        found |= {
            f"{stem}input_layernorm.weight": (hidden,),
            f"{stem}self_attn.q_proj.weight": (heads * head, hidden),
            f"{stem}self_attn.k_proj.weight": (kv * head, hidden),
            f"{stem}self_attn.v_proj.weight": (kv * head, hidden),
            f"{stem}self_attn.o_proj.weight": (hidden, heads * head),
            f"{stem}post_attention_layernorm.weight": (hidden,),
            f"{stem}mlp.gate_proj.weight": (ffn, hidden),
            f"{stem}mlp.up_proj.weight": (ffn, hidden),
            f"{stem}mlp.down_proj.weight": (hidden, ffn),
        }
    found["model.norm.weight"] = (hidden,)
    return found if tied else {**found, "lm_head.weight": (VOCAB, hidden)}


def make(out: Path, billions: int, seed: int = 0) -> Path:
    """Writes the checkpoint and returns its folder."""
    hidden, ffn, layers, heads, kv = SHAPES[billions]
    tied = billions < 8
    listed = shapes(hidden, ffn, layers, heads, kv, tied)
    layout = lay_out([(name, "BF16", shape) for name, shape in listed.items()])
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads,
        "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": tied, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    sample = Path(__file__).parents[1] / "samples" / "sample"
    with ShardWriter(out, layout) as writer:
        for name, shape in listed.items():
            _fill(writer, name, shape, pool, generator)
        writer.finish(
            {"config.json": json.dumps(config, indent=1).encode()},
            [sample / "tokenizer.json", sample / "tokenizer_config.json"],
        )
    return out


def _fill(
    writer: ShardWriter, name: str, shape: tuple[int, ...], pool: torch.Tensor, generator: torch.Generator
) -> None:
    numel = torch.Size(shape).numel()
    if len(shape) == 1:
        writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
        return
    spread = shape[-1] ** -0.5
    for start in range(0, numel, PIECE):
        count = min(PIECE, numel - start)
        offset = int(torch.randint(0, POOL - count + 1, (1,), generator=generator))
        writer.write_at(name, 2 * start, as_bytes(pool[offset : offset + count] * spread))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--billions", type=int, choices=sorted(SHAPES), default=1)
    given = parser.parse_args()
    print(make(given.out, given.billions))
