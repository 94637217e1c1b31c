"""Tiny models that tests of training share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.runtime.distil import Schedule, train
from fewbit.runtime.qat import parameter_groups

LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MIXTRAL = {**LLAMA, "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
KINDS = {"llama": LLAMA, "mixtral": MIXTRAL, "gpt2": GPT2}


def make(kind: str = "llama", **more: object) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**KINDS[kind], **more})
    return AutoModelForCausalLM.from_config(config).float().eval()


def ids(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, tokens: torch.Tensor, count: int = 2) -> None:
    train(model, tokens, Schedule(steps=count, batch=2, every=10), groups=parameter_groups(model, 0.3, 0.3))
