"""quantize_: every linear layer, once, equal to the same module with decoded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.base.errors import InputError
from fewbit.nn import QuantLinear, quantize_

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else TINY)))
        .float()
        .eval()
    )


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
@pytest.mark.parametrize("word", ("nf4-g64-dq", "int8", "int4-g32", "fp8"))
def test_a_model_computes_with_its_decoded_weights(kind: str, word: str) -> None:
    model = make(kind)
    plain = copy.deepcopy(model)
    done = quantize_(model, word)
    assert len(done) == 2 * (7 if kind == "llama" else 4)
    assert not isinstance(model.lm_head, QuantLinear)
    for row in done:
        layer = model.get_submodule(row.name)
        decoded, target = layer.qtensor().dequantize(), plain.get_submodule(row.name)
        target.weight.data = decoded if isinstance(target, nn.Linear) else decoded.T.contiguous()
        assert row.after == layer.nbytes < row.before
    ids = torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=2e-5)


@pytest.mark.parametrize(("word", "threshold"), (("w8a8", 0.0), ("w8a8", 6.0), ("w8a8-fp8", 0.0)))
def test_quantised_activations_stay_close(word: str, threshold: float) -> None:
    model = make("llama")
    ids = torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        wanted = model(ids).logits
        quantize_(model, word, threshold=threshold)
        off = float((model(ids).logits - wanted).norm() / wanted.norm())
    assert 0 < off < (0.02 if word == "w8a8" else 0.1)


def test_skip_shared_layers_and_methods() -> None:
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict(
        {"a": layer, "b": layer, "c": nn.Linear(64, 8), "head": nn.Linear(64, 8), "d": nn.Sequential(nn.Linear(64, 8))}
    )
    bias = model["head"].bias
    done = quantize_(model, "int4-g32", method="hqq", skip=("c", "d.*"))
    assert [row.name for row in done] == ["a", "head"]
    assert model["a"] is model["b"] and isinstance(model["a"], QuantLinear)
    assert isinstance(model["c"], nn.Linear) and isinstance(model["d"][0], nn.Linear)
    assert model["head"].bias is bias
    assert quantize_(model, "int8", skip=("c", "d.0")) == ()  # what is quantised stays


def test_state_dict_of_a_model() -> None:
    model, other = make("llama"), make("llama")
    quantize_(model, "nf4-g64-dq")
    quantize_(other, "int8")
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 128, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    ("scheme", "options"),
    (
        ("int4-g128", {"method": "gptq"}),
        ("int8-channel+int8-tensor-static", {}),
        ("int4-g128", {"method": "nope"}),
        ("int99", {}),
        ("int8", {"threshold": 6.0}),
    ),
)
def test_refusals(scheme: str, options: dict) -> None:
    with pytest.raises(InputError, match=r"FB-E0[679]"):
        quantize_(nn.Sequential(nn.Linear(8, 8)), scheme, **options)


def test_a_weight_that_is_not_there() -> None:
    with pytest.raises(InputError, match="FB-E0905"):
        quantize_(nn.Sequential(nn.Linear(8, 8, device="meta")), "int8")
    with pytest.raises(InputError, match="FB-E0905"):
        quantize_(nn.Linear(8, 8), "int8")
