"""Small models of every architecture that goes to GGUF, built from their configs with random weights, and written as GGUF files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewbit.formats.gguf.encode import source_values, tensor_bytes
from fewbit.formats.gguf.plan import GgufPlan, PlannedTensor, gguf_plan
from fewbit.formats.gguf.vocabulary import FILES
from fewbit.num.qtensor import QTensor
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.gguf_layout import lay_out_gguf
from fewbit.store.tensors import as_bytes
from fewbit.store.writer import ShardWriter

SAMPLE = Path(__file__).parents[2] / "samples" / "sample"
VOCAB = 8192

_DENSE = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "initializer_range": 0.08,
}  # fmt: skip
_MOE = _DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 256,
    "long_factor": [1.0 + 0.1 * n for n in range(16)], "short_factor": [1.0 + 0.01 * n for n in range(16)],
}  # fmt: skip

# name -> (config class of transformers, arguments, rows worth having: what of the architecture this covers)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DENSE | {"tie_word_embeddings": True}),
    "llama3-rope-untied": ("LlamaConfig", _DENSE | {"rope_parameters": _LLAMA3, "tie_word_embeddings": False}),
    "llama-bias-headdim": ("LlamaConfig", _DENSE | {"attention_bias": True, "mlp_bias": True, "head_dim": 64}),
    "mistral": ("MistralConfig", _DENSE | {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("MixtralConfig", _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", _DENSE | {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", _DENSE | {"rope_parameters": _YARN}),
    "qwen2moe": ("Qwen2MoeConfig", _MOE | {"shared_expert_intermediate_size": 256, "decoder_sparse_step": 1}),
    "qwen3": ("Qwen3Config", _DENSE | {"head_dim": 64}),
    "qwen3moe": ("Qwen3MoeConfig", _MOE | {"head_dim": 64, "norm_topk_prob": True}),
    "gemma": ("GemmaConfig", _DENSE | {"head_dim": 32}),
    "gemma2": ("Gemma2Config", _DENSE | {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", _DENSE | {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 16}),
    "phi3": ("Phi3Config", _DENSE | {"original_max_position_embeddings": 512}),
    "phi3-longrope": ("Phi3Config", _DENSE | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256}),
    "olmo2": ("Olmo2Config", _DENSE),
    "olmo3": ("Olmo3Config", _DENSE | {"num_hidden_layers": 4, "sliding_window": 16}),
    "granite": (
        "GraniteConfig",
        _DENSE | {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "deepseek2": (
        "DeepseekV2Config",
        _DENSE
        | {
            "num_hidden_layers": 3, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 256, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        },
    ),
    "deepseek3": (
        "DeepseekV3Config",
        _DENSE
        | {
            "num_hidden_layers": 3, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 256, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "scoring_func": "sigmoid",
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        _DENSE | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 512, "initializer_range": 0.08, "bos_token_id": 0, "eos_token_id": 0}),
}  # fmt: skip


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """A float32 checkpoint of one of MODELS with the sample's tokeniser; norms and biases are random too, so that none can be mixed up."""
    import transformers

    kind, arguments = MODELS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
        for label, buffer in model.named_buffers():
            if label.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
        for label, weight in model.named_parameters():
            if "experts." in label or "router" in label:
                weight.normal_(0, 0.08)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / file, folder / file)
    return folder


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def plan_of(folder: Path, recipe: str = "F32", overrides: Mapping[str, str] | None = None, **options: Any) -> GgufPlan:
    with open_checkpoint(folder) as source:
        return gguf_plan(source.manifest, source.config, tokenizer_files(folder), recipe, overrides, **options)


Solve = Callable[[PlannedTensor, torch.Tensor], QTensor]


def by_least_squares(tensor: PlannedTensor, values: torch.Tensor) -> QTensor:
    from fewbit.math.scales import quantize

    return quantize(tensor.scheme, values)


def write_gguf(
    folder: Path, out: Path, recipe: str = "F32", solve: Solve = by_least_squares, **options: Any
) -> tuple[GgufPlan, Path]:
    """The checkpoint as out/<recipe>.gguf: plan, layout, ops, rounding, bytes. Returns the plan and the first file."""
    max_bytes = options.pop("max_bytes", None)
    with open_checkpoint(folder) as source:
        plan = gguf_plan(source.manifest, source.config, tokenizer_files(folder), recipe, **options)
        layout = lay_out_gguf(plan.layout_rows(), plan.metadata, recipe, max_bytes)
        with ShardWriter(out, layout, overwrite=True, sources=[folder]) as writer:
            for tensor in plan.tensors:
                values = source_values(tensor, source.read)
                value = values if tensor.scheme is None else solve(tensor, values)
                writer.write(tensor.name, as_bytes(tensor_bytes(tensor, value)))
            writer.finish({})
    return plan, out / layout.shards[0].name


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def dense_twin(model: Path, file: Path, plan: GgufPlan, folder: Path) -> Path:
    """A float32 checkpoint of what a GGUF file holds, through our own decoder and the inverse of every op."""
    from safetensors.torch import save_file

    from fewbit.formats.gguf.encode import checkpoint_tensor, decoded, users
    from fewbit.store.gguf import open_gguf

    source, readers = open_gguf(file), users(plan.tensors)
    types = {tensor.name: tensor.type for tensor in plan.tensors}

    def read(name: str) -> torch.Tensor:
        info = source.manifest[name]
        return decoded(types[name], source.read(info), info.shape, name)

    folder.mkdir()
    save_file(
        {name: checkpoint_tensor(name, readers, read).contiguous() for name in readers},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text((model / "config.json").read_text().replace("bfloat16", "float32"))
    source.close()
    return folder


def spm_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Gives a model a SentencePiece tokeniser trained here, as tokenizer.model and tokenizer.json; returns its encoder."""
    import sentencepiece
    import transformers

    text = " ".join(path.read_text() for path in sorted((SAMPLE.parents[1] / "src" / "fewbit" / "num").glob("*.py")))
    corpus = folder / "corpus.txt"
    corpus.write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=2000, model_type="bpe", byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(n) for n in range(model.vocab_size())]
    merges = _merges_of(pieces, [model.get_score(n) for n in range(len(pieces))])
    transformers.LlamaTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges).save_pretrained(
        folder
    )
    config = config_of(folder) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return lambda line: model.encode(line)


def _merges_of(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece BPE model in the order of its scores, as transformers converts them."""
    known = dict(zip(pieces, scores, strict=True))
    found = []
    for piece in sorted(known, key=lambda p: -known[p]):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in known and piece[at:] in known]
        found += sorted(cuts, key=lambda cut: (pieces.index(cut[0]), pieces.index(cut[1])))
    return found
