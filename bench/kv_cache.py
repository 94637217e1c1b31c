"""Quantised KV cache: bytes, and KL to the same model with a full cache, against context length.

    python bench/kv_cache.py [--model samples/sample] [--context 4096] [--windows 2] [--out bench/results/kv_cache.json]

Text goes in pieces of `--piece` tokens, so that every piece sees its past through the cache, as in generation. The sample was trained on 512 positions: beyond,
its rotary frequencies are divided by context / 512 (position interpolation), for the full cache too, so KL is between equals, and perplexity is given to
show what the stretched model is still worth. Bytes are also measured on random keys and values of an 8B Llama's shape (32 layers, 8 heads of 128).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.cache_utils import DynamicCache

from fewbit.runtime.kv import KINDS, QuantCache, QuantLayer, layer_bytes

ROOT = Path(__file__).parents[1]


def load(folder: Path, context: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trained = model.config.max_position_embeddings
    if context > trained:
        model.model.rotary_emb.inv_freq /= context / trained
    return model


def logits(model: Any, ids: torch.Tensor, cache: Any, piece: int) -> torch.Tensor:
    """float32 [tokens, vocab] of one window, fed piece by piece."""
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits[0] for part in ids.split(piece, 1)])


def measured(model: Any, windows: list[torch.Tensor], kind: str, window: int, piece: int) -> dict[str, Any]:
    """KL (nats per token), shares of equal tops and bytes; KL also per quarter of the context."""
    total, quarters, agree, count, nats = 0.0, [0.0] * 4, 0, 0, 0.0
    cache: Any = None
    for ids in windows:
        full = torch.log_softmax(logits(model, ids, DynamicCache(config=model.config), piece), -1)
        cache = QuantCache(model.config, kind, window=window)
        found = torch.log_softmax(logits(model, ids, cache, piece), -1)
        kl = (full.exp() * (full - found)).sum(-1)
        total, count = total + float(kl.sum()), count + kl.numel()
        for i, part in enumerate(kl.chunk(4)):
            quarters[i] += float(part.mean()) / len(windows)
        agree += int((full.argmax(-1) == found.argmax(-1)).sum())
        nats -= float(found[:-1].gather(1, ids[0, 1:, None]).sum())
    full_bytes = (
        sum(2 * layer.get_seq_length() for layer in cache.layers)
        * 2
        * (model.config.num_key_value_heads * model.config.head_dim)
    )  # in 16 bits
    held = sum(layer_bytes(layer) - layer.keys.nbytes // 2 - layer.values.nbytes // 2 for layer in cache.layers)
    return {
        "kl": round(total / count, 6), "kl_quarters": [round(q, 6) for q in quarters], "same_top": round(agree / count, 5),
        "perplexity": round(math.exp(nats / (count - len(windows))), 3), "bytes": held, "share_of_16_bit": round(held / full_bytes, 4),
    }  # fmt: skip


def plain(model: Any, windows: list[torch.Tensor], piece: int) -> float:
    """Perplexity with a full cache."""
    nats, count = 0.0, 0
    for ids in windows:
        found = torch.log_softmax(logits(model, ids, DynamicCache(config=model.config), piece), -1)
        nats, count = nats - float(found[:-1].gather(1, ids[0, 1:, None]).sum()), count + ids.shape[1] - 1
    return math.exp(nats / count)


def large(kind: str, window: int, context: int) -> dict[str, Any]:
    """Bytes of an 8B Llama's cache at a context, from one layer of random states in BF16."""
    config = LlamaConfig(num_hidden_layers=32, num_key_value_heads=8, head_dim=128)
    layer = QuantLayer(kind, window=window)
    states = torch.randn(2, 1, config.num_key_value_heads, context, config.head_dim, dtype=torch.bfloat16)
    layer.update(states[0], states[1])
    full = states.numel() * 2
    return {"bytes": 32 * layer.nbytes, "full_bytes": 32 * full, "share": round(layer.nbytes / full, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "sample")
    parser.add_argument("--text", type=Path, default=ROOT / "samples" / "text" / "wikitext2-test.txt")
    parser.add_argument("--context", type=int, action="append", help="may be given again")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, action="append", help="tokens in full precision; may be given again")
    parser.add_argument("--piece", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kv_cache.json")
    words = parser.parse_args()
    torch.set_grad_enabled(False)
    tokens = AutoTokenizer.from_pretrained(words.model)(
        words.text.read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "model": words.model.name,
        "piece": words.piece,
        "rows": [],
    }
    for context in words.context or [512, 4096]:
        model = load(words.model, context)
        count = words.windows if context > 1024 else 8 * words.windows
        windows = [tokens[:, i * context : (i + 1) * context] for i in range(count)]
        base = plain(model, windows, words.piece)
        for kind in KINDS:
            for window in words.window or [128]:
                row = {
                    "context": context,
                    "windows": count,
                    "kind": kind,
                    "window": window,
                    "perplexity_full": round(base, 3),
                }
                record["rows"].append({**row, **measured(model, windows, kind, window, words.piece)})
                print(json.dumps(record["rows"][-1]), flush=True)
    record["llama_8b_4096"] = {kind: large(kind, 128, 4096) for kind in KINDS}
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
