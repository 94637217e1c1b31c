"""Small random checkpoints of every family, in float64, and their logits computed in nothing less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.run.hf import BlockModel
from fewbit.run.source import Source

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "granite": {
        **SMALL,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "smollm3": {**SMALL, "pad_token_id": 0},
    "seed_oss": {**SMALL, "head_dim": 12},
    "ernie4_5": {**SMALL, "head_dim": 12, "use_bias": True},
    "gemma": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**SMALL, "head_dim": 16, "sliding_window": 8},
    "olmo2": SMALL,
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {**SMALL, "pad_token_id": 0},
    "stablelm": {**SMALL, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt2": {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_oss": {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
NORMED_RESIDUAL = ("gemma2", "gemma3_text", "olmo2")
NO_DATA = ("gpt_oss",)


def make(model_type: str, folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> torch.nn.Module:
    """A random model of a family, saved as a checkpoint; norm gains and all biases random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**MODELS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, param in model.named_parameters():
        if "norm" in name or "ln_" in name:
            param.data += 0.3 * torch.randn_like(param)
        elif name.endswith("bias") or param.dim() == 1:
            param.data += 0.1 * torch.randn_like(param)
        else:
            param.data += 0.1 * torch.randn_like(param)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return model


class OnlyFloat64(TorchFunctionMode):
    """Families' own code casts to float32 in norms, softmax and routers; here it does not, so that a proof is not hidden by rounding."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func in (torch.Tensor.float, torch.Tensor.type_as):
                return first
            if func is torch.Tensor.to:
                args = (first, *(torch.float64 if a in (torch.float32, torch.bfloat16) else a for a in args[1:]))
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a checkpoint, every operation on float64."""
    model = BlockModel(source.config, source.manifest, dtype=torch.float64)
    with torch.no_grad(), OnlyFloat64():
        trunk = model.load_trunk(source.read)
        entry = model.enter(trunk, tokens)
        hidden = entry.hidden
        for index in range(len(model)):
            hidden = model.run_block(index, model.load_block(index, source.read), hidden, entry.kwargs[index])
        return model.leave(trunk, tokens, hidden)
