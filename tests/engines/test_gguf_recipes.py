"""Our choice of type for every tensor is llama-quantize's, for every recipe, with and without an importance matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_models import SAMPLE, plan_of, write_gguf
from harness import require_env, run_driver

from fewbit.formats.gguf.metadata import GgufManifest
from fewbit.formats.gguf.plan import GgufPlan, requantised
from fewbit.formats.gguf.recipes import choose, recipe_named, recipe_names
from fewbit.store.checkpoint import open_checkpoint

pytestmark = pytest.mark.engines

_BASE = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# what of the recipes' logic each model reaches
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "four heads per kv, tied": ("LlamaConfig", _BASE | {"tie_word_embeddings": True}),
    "one head per kv, untied": ("LlamaConfig", _BASE | {"num_key_value_heads": 8, "tie_word_embeddings": False, "num_hidden_layers": 17}),
    "eight experts": ("MixtralConfig", _BASE | {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 8}),
    "four experts and a shared one": (
        "Qwen2MoeConfig",
        _BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    ),
    "fused qkv": ("Phi3Config", _BASE | {"original_max_position_embeddings": 64, "pad_token_id": 0}),
    "rows of 288 and 96": (
        "LlamaConfig",
        _BASE | {"hidden_size": 288, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def _checkpoint(name: str, folder: Path) -> Path:
    import torch
    import transformers

    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**arguments)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def _compare(file: Path, plan: Callable[[str, bool], GgufPlan]) -> None:
    """Holds our choices for a model against the dry run of llama-quantize on it."""
    cases = [(recipe, imatrix) for recipe in (*recipe_names(), "pure-q4_k") for imatrix in (False, True)]
    wishes = []
    for recipe, imatrix in cases:
        pure = recipe.startswith("pure")
        number = recipe_named("Q4_K_S" if pure else recipe).file_type
        wishes.append({"ftype": number, "pure": pure, "imatrix": imatrix})
    answer = run_driver("llamacpp", "gguf_quantize", {"model": str(file), "recipes": wishes})
    differences, compared = {}, 0
    for (recipe, imatrix), theirs, needed in zip(cases, answer["types"], answer["needs"], strict=True):
        ours = {tensor.name: tensor for tensor in plan(recipe, imatrix).tensors}
        if theirs is None:  # it has no fallback for some types and gives up, where we keep F16; NVFP4 it only reads
            assert recipe == "NVFP4" or any("falls back on F16" in tensor.reason for tensor in ours.values()), recipe
            continue
        wrong = {
            name: (tensor.type, theirs.get(name, "F32"))
            for name, tensor in ours.items()
            if tensor.type != theirs.get(name, "F32")
        }
        if any(tensor.needs_imatrix for tensor in ours.values()) != needed:
            wrong["needs an importance matrix"] = (not needed, needed)
        if wrong:
            differences[recipe, imatrix] = wrong
        compared += 1
    assert not differences
    assert compared > len(cases) / 2


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    require_env("llamacpp")
    folder = _checkpoint(name, tmp_path / "model")
    _, file = write_gguf(folder, tmp_path / "f32", "F32")
    _compare(file, lambda recipe, imatrix: plan_of(folder, recipe, imatrix=imatrix))


def test_types_of_falcon(tmp_path: Path) -> None:
    """An architecture that llama-quantize treats apart and that we know as a GGUF alone, made by llama.cpp's own converter."""
    require_env("llamacpp")
    import shutil

    import torch
    import transformers

    config = transformers.FalconConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=17, num_attention_heads=4, num_kv_heads=1, alibi=False
    )
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / file, folder / file)
    run_driver("hf", "convert", {"model": folder, "out": tmp_path / "falcon.gguf", "outtype": "f32", "pre": "falcon"})
    with open_checkpoint(tmp_path / "falcon.gguf") as source:
        manifest = source.manifest
    assert isinstance(manifest, GgufManifest)
    _compare(tmp_path / "falcon.gguf", lambda recipe, imatrix: requantised(manifest, recipe, imatrix=imatrix))


def test_order_of_tensors_does_not_matter() -> None:
    from fewbit.formats.gguf.recipes import ModelFacts

    shapes = [(f"blk.{i}.{part}.weight", (256, 256)) for i in range(11) for part in ("attn_v", "ffn_down", "attn_q")]
    facts = ModelFacts("llama", 11, 0, 4)
    forward = choose(shapes, recipe_named("Q4_K_M"), facts)
    backward = choose(reversed(shapes), recipe_named("Q4_K_M"), facts)
    assert forward == backward and {choice.type for choice in forward.values()} == {"Q4_K", "Q6_K"}
