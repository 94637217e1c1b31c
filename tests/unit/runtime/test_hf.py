"""transformers loads through us: float checkpoints rounded while they are read, our own saved ones, and checkpoints of other formats."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fewbit as fb
from fewbit.base import resident
from fewbit.base.errors import InputError
from fewbit.nn import FewbitConfig, QuantLinear, quantize_
from fewbit.runtime import hf

TOKENS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=96,
        attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.data.normal_()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("word", ("nf4", "int8", "w8a8", "int4-g32", "fp8"))
def test_rounding_while_loading_equals_rounding_afterwards(word: str, llama: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(llama, quantization_config=FewbitConfig(word), dtype="auto")
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    other = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    quantize_(other, hf.SHORT.get(word, word))
    assert torch.equal(logits(loaded), logits(other))

    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "fewbit" and saved["scheme"] == hf.SHORT.get(word, word)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", quantization_config=FewbitConfig()),
    ):
        assert torch.equal(logits(loaded), logits(again))
        assert not [name for name, p in again.named_parameters() if p.is_meta]


def test_never_more_than_one_float_weight(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    take = hf.FewbitHfQuantizer.take

    def watched(self: Any, model: Any, name: str, value: torch.Tensor) -> None:
        held = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
        seen.append(sum(m.weight.numel() > 0 and not m.weight.is_meta for m in held))
        take(self, model, name, value)

    monkeypatch.setattr(hf.FewbitHfQuantizer, "take", watched)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=FewbitConfig("nf4"), dtype="auto")
    assert len(seen) == 14 and max(seen) == 0


def test_what_is_freed_while_loading_goes_back_to_the_system(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(resident, "_mallopt", sizes.append)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=FewbitConfig("int4-g32"), dtype="auto")
    assert sizes == [1 << 20, resident.LARGEST]


FREED = """
import os, torch
from fewbit.base.resident import straight_from_the_system

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with straight_from_the_system():
    before = resident()
    large, small = [], []
    for _ in range(64):
        large.append(torch.ones(1 << 19))  # 2 MB each
        small.append(torch.ones(256))
    taken = resident() - before
    large.clear()
    print(taken, resident() - before, len(small))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_between_small_ones_that_stay_are_given_back() -> None:
    # in a process of its own: in one that has run a while, blocks come from holes in its heap
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    taken, left, small = map(int, done.stdout.split())
    assert taken > 120 << 20 and left < 16 << 20 and small == 64


@pytest.mark.parametrize(
    "to",
    (
        "compressed-tensors:int4-g32",
        "gptq:int4-g32-asym",
        "awq:int4-g32-asym",
        "bitsandbytes:nf4-flat64-dq",
        "mlx:uint4-g32-min",
    ),
)
def test_checkpoints_of_other_formats(to: str, llama: Path, tmp_path: Path) -> None:
    fb.quantize(llama, to=to, out=tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", quantization_config=FewbitConfig(), dtype=torch.float32
    )
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 14
    plain = LlamaForCausalLM(loaded.config).eval()
    with fb.open(tmp_path / "q") as source:
        plain.load_state_dict({name: source.read(name).float() for name in source.manifest}, strict=False)
    plain.tie_weights()
    wanted = logits(plain)
    assert float((logits(loaded) - wanted).norm() / wanted.norm()) < 1e-5
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(again))


def test_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=32)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FewbitConfig("int8"), dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 8
    assert loaded.transformer.h[0].attn.c_attn.weight.shape == (192, 64)
    assert float((logits(loaded) - logits(plain)).norm() / logits(plain).norm()) < 0.02
    loaded.save_pretrained(tmp_path / "q")
    assert torch.equal(
        logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32))
    )


def test_back_to_floats(llama: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(llama, quantization_config=FewbitConfig("int8"), dtype=torch.float32)
    before = logits(loaded)
    plain = loaded.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in plain.modules())
    assert float((logits(plain) - before).abs().max()) < 1e-4


def test_refusals(llama: Path, tmp_path: Path) -> None:
    for bad in ("int99", "nf4-q"):
        with pytest.raises(InputError, match="FB-E06"):
            FewbitConfig(bad)
    with pytest.raises(InputError, match="FB-E0909"):
        FewbitConfig("nf4", treshold=6.0)
    with pytest.raises(InputError, match="FB-E0909"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=FewbitConfig())
    fb.quantize(llama, to="compressed-tensors:int4-g32", out=tmp_path / "q")
    with pytest.raises(InputError, match="FB-E0909"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", quantization_config=FewbitConfig("nf4"))
