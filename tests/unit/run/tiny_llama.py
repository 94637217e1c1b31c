"""A checkpoint and a text that tests of training from file to file share."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def write_llama(place: Path, **more: object) -> Path:
    """A tiny random BF16 checkpoint with the sample's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, **more,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "samples" / "sample" / name, place)
    return place


def write_text(place: Path) -> str:
    """The beginning of WikiText-2; the path of the file."""
    path = place / "some.txt"
    path.write_text((ROOT / "samples" / "text" / "wikitext2-test.txt").read_text()[:40_000])
    return str(path)
