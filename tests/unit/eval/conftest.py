"""What the tests of evaluation share: a tiny model with the sample's tokenizer, and candidates made of both once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewbit import api

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "samples" / "sample"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    """Random weights with which every block matters."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, spread: float = 0.16) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=generator)

    tensors = {"model.embed_tokens.weight": made(8192, 64, spread=0.5), "model.norm.weight": torch.ones(64)}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
        }  # fmt: skip
        tensors |= {f"{prefix}.{name}.weight": made(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}_layernorm.weight": torch.ones(64) for name in ("input", "post_attention")}
    return tensors


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of width 64 behind the sample's tokenizer."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    folder.mkdir()
    for file in SAMPLE.iterdir():
        if "token" in file.name or file.suffix == ".md":
            shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_int4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits."""
    out = tmp_path_factory.mktemp("tiny") / "int4"
    options = {"search": "absmax"}
    return api.quantize(tiny, to="compressed-tensors:int4-g32", out=out, verify=False, options=options).outputs[0]


@pytest.fixture(scope="session")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as Q4_K_M."""
    out = tmp_path_factory.mktemp("sample") / "q4"
    return api.quantize(SAMPLE, to="gguf:Q4_K_M", out=out, verify=False, options={"search": "absmax"}).outputs[0]
