"""Checkpoints into modules with quantised weights left quantised; text from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit import api
from fewbit.base.errors import InputError
from fewbit.num.qtensor import QTensor
from fewbit.run.hf import bind, build_model
from fewbit.run.source import open_source
from fewbit.runtime.generate import generate, pick
from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.load import Loaded, fill

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def checkpoint(folder: Path, tied: bool) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG, tie_word_embeddings=tied))
        .float()
        .eval()
    )
    model.save_pretrained(folder)
    return model


def load(path: Path, decode: bool = False) -> tuple[torch.nn.Module, Loaded]:
    with open_source(path) as source:

        def get(name: str) -> torch.Tensor | QTensor:
            q = None if decode else source.qtensor(name)
            return source.read(name) if q is None else q

        module = build_model(source.config)
        return module, fill(module, bind(module, source.manifest).values(), get, torch.float32)


@pytest.mark.parametrize("tied", (False, True))
def test_a_plain_checkpoint_is_the_model(tmp_path: Path, tied: bool) -> None:
    model = checkpoint(tmp_path, tied)
    made, loaded = load(tmp_path)
    ids = torch.randint(0, 96, (2, 12))
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, model(ids).logits, atol=1e-6)
    assert loaded.quantised == loaded.decoded == () and (made.lm_head.weight is made.model.embed_tokens.weight) is tied
    assert loaded.bytes == sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "to", ("bitsandbytes:nf4-g64-dq", "compressed-tensors:int4-g32", "gptq:int4-g32", "fp8:fp8-e4m3-block128")
)
def test_quantised_weights_stay_so(tmp_path: Path, to: str) -> None:
    checkpoint(tmp_path / "base", True)
    api.quantize(tmp_path / "base", to=to, method="rtn", out=tmp_path / "out")
    made, loaded = load(tmp_path / "out")
    plain, _ = load(tmp_path / "out", decode=True)
    assert len(loaded.quantised) == 14 and loaded.decoded == ()
    assert sum(isinstance(layer, QuantLinear) for layer in made.modules()) == sum(loaded.kernels.values()) == 14
    ids = torch.randint(0, 96, (2, 12))
    with torch.no_grad():
        off = float((made(ids).logits - plain(ids).logits).abs().max())
    rounded_inputs = any(layer.scheme.activation for layer in made.modules() if isinstance(layer, QuantLinear))
    assert rounded_inputs == to.startswith("fp8:")
    assert 1e-4 < off < 0.05 if rounded_inputs else off < 2e-5
    assert loaded.bytes < sum(4 * p.numel() for p in plain.parameters()) * 0.6


def test_generation_is_the_models_own(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, True)
    made, _ = load(tmp_path)
    wanted = [1, 2, 3]
    for _ in range(6):
        wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
    assert list(generate(made, [1, 2, 3], 6)) == wanted[3:]
    first = wanted[3]
    assert list(generate(made, [1, 2, 3], 6, stop={first})) == []
    sampled = [list(generate(made, [1, 2, 3], 6, temperature=1.5, seed=seed)) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(InputError, match="FB-E0907"):
            next(generate(made, [1], 4, **bad))
    with pytest.raises(InputError, match="FB-E0907"):
        next(generate(made, [], 4))
    made.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="FB-E0806"):
        next(generate(made, [1], 4))


def test_top_p_cuts_the_tail() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    assert {pick(logits, 1.0, 0.5, generator) for _ in range(200)} == {0}
    assert {pick(logits, 1.0, 0.79, generator) for _ in range(200)} == {0, 1}
    assert {pick(logits, 1.0, 1.0, generator) for _ in range(400)} == {0, 1, 2, 3}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, False)
    with open_source(tmp_path) as source:
        module = build_model(source.config)
        slots = list(bind(module, source.manifest).values())
        with pytest.raises(InputError, match="FB-E0906"):
            fill(module, slots[:-1], source.read, torch.float32)
        with pytest.raises(InputError, match=r"FB-E0906.*does not fill"):
            fill(build_model(source.config), slots, lambda name: torch.zeros(3, 5), torch.float32)
