"""Vision-language models to GGUF: the text part is written and runs in real llama.cpp, the plan says what is left out, and the rest is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import SAMPLE, VOCAB
from harness import require_env
from test_gguf_cli import fewbit
from test_gguf_models import PROMPTS, in_llamacpp
from typer.testing import CliRunner

from fewbit.cli.app import app

pytestmark = pytest.mark.engines

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.08,
}  # fmt: skip
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
QWEN_TOWER = {"depth": 1, "embed_dim": 64, "hidden_size": 256, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}

# name -> (class of transformers, text part, vision part, more of the config)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ("Llava", TEXT | {"model_type": "llama"}, TOWER | {"model_type": "clip_vision_model"}, {}),
    "llava-mistral": ("Llava", TEXT | {"model_type": "mistral", "head_dim": 32, "sliding_window": None}, TOWER | {"model_type": "pixtral"}, {}),
    "qwen2-vl": ("Qwen2VL", TEXT | {"rope_parameters": SECTIONS}, QWEN_TOWER, {}),
    "gemma3": (
        "Gemma3",
        TEXT | {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 16},
        TOWER | {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4},
    ),
}  # fmt: skip


def build(name: str, folder: Path) -> tuple[Path, torch.nn.Module]:
    """A float32 checkpoint with random weights and norms, and the sample's tokeniser; the model itself."""
    import transformers

    kind, text, vision, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.08) if weight.ndim > 1 else weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / file, folder / file)
    return folder, model


@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_runs(name: str, tmp_path: Path) -> None:
    require_env("llamacpp")
    folder, model = build(name, tmp_path / "model")
    if name == "gemma3":
        from gguf_models import spm_tokenizer

        spm_tokenizer(folder)
    shown = fewbit("quantize", folder, "--to", "gguf:Q8_0", "--dry-run")
    assert "mmproj" in shown, shown
    fewbit("quantize", folder, "--to", "gguf:Q8_0", "-o", tmp_path / "out")  # verify included
    (file,) = (tmp_path / "out").glob("*.gguf")
    found, _ = in_llamacpp(file, tmp_path / "logits.npz")
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0].float().numpy() for prompt in PROMPTS]
    for a, b in zip(expected, found, strict=True):
        gap = float(np.sqrt(np.mean(np.square(a - b))) / np.std(a))
        assert gap < 0.05, gap  # 8-bit weights and activations


def test_an_unknown_join_is_refused_at_plan_time(tmp_path: Path) -> None:
    folder, _ = build("llava", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"architectures": ["MllamaForConditionalGeneration"]}, "joins a language model with towers"),
        ({"text_config": {**config["text_config"], "model_type": "cohere2"}}, "model_type 'cohere2'"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        done = CliRunner().invoke(app, ["quantize", str(folder), "--to", "gguf:Q8_0", "-o", str(tmp_path / "out")])
        said = str(done.exception) + done.output
        assert done.exit_code != 0 and "FB-E0320" in said and words in said, said
        assert not (tmp_path / "out").exists()


def test_split_file_loads_from_its_first_part(tmp_path: Path) -> None:
    require_env("llamacpp")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fewbit("quantize", SAMPLE, "--to", "gguf:Q4_K_M", "-o", whole)
    fewbit("quantize", SAMPLE, "--to", "gguf:Q4_K_M,split=true", "--max-shard-size", "1MB", "-o", parts)
    names = sorted(path.name for path in parts.glob("*.gguf"))
    assert len(names) > 3 and all(f"-of-{len(names):05d}.gguf" in name for name in names)
    assert max(path.stat().st_size for path in parts.glob("*.gguf")) < 3_000_000  # the embedding is larger than a part
    (file,) = whole.glob("*.gguf")
    expected, _ = in_llamacpp(file, tmp_path / "whole.npz")
    found, _ = in_llamacpp(parts / names[0], tmp_path / "parts.npz")
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    fewbit("verify", parts / names[0], "--base", SAMPLE)
    fewbit("quantize", parts / names[0], "--to", "gguf:Q2_K", "--requantize", "-o", tmp_path / "again")


def test_one_part_missing_is_said(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    fewbit("quantize", SAMPLE, "--to", "gguf:Q4_K_M,split=true", "--max-shard-size", "1MB", "-o", parts)
    first, second, *_ = sorted(parts.glob("*.gguf"))
    second.unlink()
    done = CliRunner().invoke(app, ["inspect", str(first)])
    assert done.exit_code != 0 and second.name in str(done.exception) + done.output
