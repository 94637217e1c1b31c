"""The text part of vision-language models: which family it is, what its config may leave out, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_plan import CONFIG, sources

from fewbit.base.errors import InputError
from fewbit.formats.gguf.families import family_of, prepared
from fewbit.formats.gguf.plan import gguf_plan

TEXT = {key: value for key, value in CONFIG.items() if key != "architectures"}


def llava(**text: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {**TEXT, **text},
        "vision_config": {"hidden_size": 64},
    }


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize(
    "tower",
    [
        "vision_tower.vision_model.x.weight",
        "model.connector.x.weight",
        "image_newline",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_towers_are_left_out_and_said_so(body: str, head: str, tower: str) -> None:
    held = {
        (head if name == "lm_head.weight" else name.replace("model.", body, 1)): info
        for name, info in sources().items()
    }
    held[tower] = SimpleNamespace(shape=(4, 4), dtype="F32")
    plan = gguf_plan(held, llava(), {}, "Q4_K_M")
    assert plan.architecture == "llama" and len(plan.tensors) == len(sources())
    assert any("mmproj" in note and "LlavaForConditionalGeneration" in note for note in plan.notes)


def test_what_a_text_config_leaves_out_is_what_transformers_fills_in() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": kind.lower()}}
        family = family_of(config)
        names, filled = prepared(config, family), getattr(transformers, f"{kind}Config")().to_dict()
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "vocab_size",
        ):
            assert names[key] == filled[key], (kind, key)
        assert names.get("num_key_value_heads", names["num_attention_heads"]) == filled["num_key_value_heads"], kind
        assert names["rms_norm_eps"] == filled["rms_norm_eps"] and names["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            llava() | {"architectures": ["MllamaForConditionalGeneration"]},
            "MllamaForConditionalGeneration joins a language model with towers",
        ),
        (llava(model_type="cohere2"), "of model_type 'cohere2'; known are llama, mistral"),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, "of model_type None"),
    ],
)
def test_what_is_not_known_to_run_as_text_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        family_of(config)
    assert caught.value.code == "FB-E0320" and "compressed-tensors" in str(caught.value.remedy)


def test_qwen2_vl_wants_its_sections() -> None:
    config = {
        **CONFIG,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    }
    held = sources() | {"visual.blocks.0.attn.qkv.weight": SimpleNamespace(shape=(4, 4), dtype="F32")}
    plan = gguf_plan(held, config, {}, "Q8_0")
    assert plan.architecture == "qwen2vl" and any("mmproj" in note for note in plan.notes)
    sections = plan.metadata["qwen2vl.rope.dimension_sections"]
    assert list(sections.data) == [4, 6, 6, 0] and sections.kind == "i32"
    with pytest.raises(InputError, match="shared out"):
        gguf_plan(held, {**config, "rope_scaling": None}, {}, "Q8_0")
