"""Plans of GGUF files from shapes alone: every refusal a sentence, every tensor accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewbit.base.errors import InputError
from fewbit.formats.gguf.expressions import evaluate
from fewbit.formats.gguf.families import architectures, family_named, family_of, model_metadata, prepared
from fewbit.formats.gguf.plan import gguf_plan, size_label
from fewbit.formats.gguf.recipes import FALLBACKS, ModelFacts, choose, more_bits, recipe_named, recipe_names
from fewbit.formats.gguf.targets import expand, rope_llama3
from fewbit.formats.gguf.types import TYPES

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def sources(config: dict[str, Any] = CONFIG) -> dict[str, SimpleNamespace]:
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = width // config["num_attention_heads"]
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for i in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (head * config["num_key_value_heads"], width), "self_attn.v_proj": (head * config["num_key_value_heads"], width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in own.items()}
    return {name: SimpleNamespace(shape=shape, dtype="BF16") for name, shape in shapes.items()}


def test_every_source_is_used_once_and_no_torch_is_loaded() -> None:
    plan = gguf_plan(sources(), CONFIG, {}, "Q4_K_M")
    assert sorted(name for tensor in plan.tensors for name in tensor.reads) == sorted(sources())
    assert plan.metadata["tokenizer.ggml.model"].data == "no_vocab" and "no vocabulary" in plan.notes[0]
    code = "import sys; import fewbit.formats.gguf.plan, fewbit.store.gguf, fewbit.store.gguf_layout; print('torch' in sys.modules, 'gguf' in sys.modules)"
    source = str(Path(__file__).parents[3] / "src")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}, check=True
    )
    assert run.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "FB-E0320", "NoSuchForCausalLM"),
        ({"num_attention_heads": None}, "FB-E0322", "head_count"),
        ({"hidden_act": "relu"}, "FB-E0322", "SiLU"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "FB-E0322", "rotary"),
        ({"num_hidden_layers": 3}, "FB-E0323", "missing: blk.2"),
        ({"num_hidden_layers": 1}, "FB-E0323", "not known: model.layers.1"),
    ],
)
def test_configs_that_cannot_be_written_are_refused(change: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        gguf_plan(sources(), {**CONFIG, **change}, {}, "Q4_K_M")
    assert caught.value.code in (code, "FB-E0400") and code in str(caught.value) and words in str(caught.value)


def test_missing_and_unknown_tensors_are_named() -> None:
    held = sources()
    del held["model.layers.1.mlp.up_proj.weight"], held["lm_head.weight"]
    held["model.layers.0.mlp.extra.weight"] = SimpleNamespace(shape=(4, 4), dtype="F32")
    with pytest.raises(InputError) as caught:
        gguf_plan(held, CONFIG, {}, "Q4_K_M")
    text = str(caught.value)
    assert "blk.1.ffn_up" in text and "model.layers.0.mlp.extra.weight" in text and "output.weight" in text


def test_a_tied_head_is_left_out_and_said_so() -> None:
    plan = gguf_plan(sources(), {**CONFIG, "tie_word_embeddings": True}, {}, "Q4_K_M")
    assert "output.weight" not in {tensor.name for tensor in plan.tensors} and "lm_head" in plan.notes[0]


def test_text_part_of_a_multimodal_config_is_found() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "text_config": {key: value for key, value in CONFIG.items() if key != "architectures"},
    }
    held = {
        name.replace("model.", "language_model.model.", 1)
        if name.startswith("model.")
        else f"language_model.{name}": info
        for name, info in sources().items()
    }
    assert len(gguf_plan(held, config, {}, "Q8_0").tensors) == len(sources())


def test_all_families_are_whole() -> None:
    """Every row of every architecture parses, and what it names exists in the language."""
    for name in architectures():
        family = family_named(name)
        assert family.tensors["token_embd.weight"] and family.metadata["block_count"]
        for row in family.metadata.values():
            kind, _, expression = row.partition(" ")
            assert kind.rstrip("!").strip("[]") in ("u32", "i32", "f32", "bool", "str")
            try:
                evaluate(expression, prepared(CONFIG, family))
            except InputError as error:
                assert error.code == "FB-E0322" and "not part of the language" not in str(error), (
                    f"{name}: {expression}"
                )


def test_expressions_can_do_no_more_than_compute() -> None:
    for text in (
        "__import__('os')",
        "().__class__.__mro__[0]",
        "open('x')",
        "[x for x in y if x]",
        "lambda: 1",
        "a := 1",
    ):
        with pytest.raises((InputError, SyntaxError)):
            evaluate(text, {"y": [1]})
    assert evaluate("first(a.b, c // 2 if d else 3)", {"c": 8, "d": True}) == 4
    assert evaluate("[(n + 1) % 4 != 0 for n in range(5)]", {}) == [True, True, True, False, True]


def test_llama3_frequencies_are_those_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    factors = rope_llama3({"rope": rope, "hidden_size": 512, "num_attention_heads": 4})
    assert torch.allclose(plain / scaled.double(), torch.tensor(factors).double(), rtol=1e-5)


def test_rope_parameters_of_both_ages_are_read_alike() -> None:
    family = family_of(CONFIG)
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {**CONFIG, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}
    assert model_metadata(prepared(old, family), family) == model_metadata(prepared(new, family), family)
    assert model_metadata(prepared(new, family), family)["llama.rope.scaling.factor"].data == 4.0


def test_overrides_win_and_misfits_fall_back_with_a_reason() -> None:
    plan = gguf_plan(sources(), CONFIG, {}, "Q4_K_M", {"blk.0.*": "q8_0", "re:attn_v": "F16"})
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    assert (
        types["blk.0.attn_q.weight"] == "Q8_0"
        and types["blk.1.attn_v.weight"] == "F16"
        and types["blk.1.attn_q.weight"] == "Q4_K"
    )
    assert types["blk.0.attn_norm.weight"] == "F32"
    narrow = {**CONFIG, "intermediate_size": 96}
    down = next(
        t for t in gguf_plan(sources(narrow), narrow, {}, "Q4_K_S").tensors if t.name == "blk.1.ffn_down.weight"
    )
    assert down.type == "Q5_0" and "96" in down.reason and "Q4_K falls back on Q5_0" in down.reason
    with pytest.raises(InputError, match="FB-E0330"):
        gguf_plan(sources(), CONFIG, {}, "Q4_K_M", {"*": "q9_9"})
    with pytest.raises(InputError, match="FB-E0324"):
        gguf_plan(sources(), CONFIG, {}, "Q9_K_XXL")


def test_recipes_name_types_that_exist_and_fit() -> None:
    shapes = [
        (f"blk.{i}.{part}.weight", (256, width))
        for i in range(16)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
        for width in (256,)
    ]
    shapes += [("token_embd.weight", (64, 256)), ("output.weight", (64, 256)), ("output_norm.weight", (256,))]
    for recipe in recipe_names():
        for experts in (0, 8):
            chosen = choose(shapes, recipe_named(recipe), ModelFacts("llama", 16, experts, 4))
            assert {choice.type for choice in chosen.values()} <= set(TYPES) and chosen[
                "output_norm.weight"
            ].type == "F32"
    assert set(FALLBACKS) | set(FALLBACKS.values()) <= set(TYPES)
    assert [more_bits(i, 16) for i in range(6)] == [True, True, False, False, True, False]


def test_size_labels() -> None:
    assert [size_label(n) for n in (8_030_261_248, 270_000_000, 1_500_000, 12_000)] == ["8.0B", "270M", "1.5M", "12K"]


def test_experts_must_be_complete() -> None:
    config = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}
    held = {name: info for name, info in sources().items() if ".mlp." not in name}
    for i in range(2):
        held[f"model.layers.{i}.block_sparse_moe.gate.weight"] = SimpleNamespace(shape=(3, 256), dtype="BF16")
        for e in range(3):
            for part, shape in (("w1", (512, 256)), ("w2", (256, 512)), ("w3", (512, 256))):
                held[f"model.layers.{i}.block_sparse_moe.experts.{e}.{part}.weight"] = SimpleNamespace(
                    shape=shape, dtype="BF16"
                )
    family = family_of(config)
    targets, _ = expand(held, prepared(config, family), family)
    down = next(target for target in targets if target.name == "blk.1.ffn_down_exps.weight")
    assert down.shape == (3, 256, 512) and len(down.reads) == 3 and down.ops == ("stack",)
    del held["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(InputError, match="1 of 3 experts are missing"):
        expand(held, prepared(config, family), family)


def test_plan_is_plain_data_for_the_layout() -> None:
    rows = list(gguf_plan(sources(), CONFIG, {}, "Q4_K_M").layout_rows())
    assert json.dumps(rows) and rows[0][0] == "token_embd.weight"
