"""Embeddings, stacked experts, LLM.int8() on outliers, NF4 against bitsandbytes, torch.compile and safetensors."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.nn import QuantEmbedding, QuantLinear, QuantStack, quantize_
from fewbit.num.scheme import parse_scheme

ROOT = Path(__file__).parents[3]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "bitsandbytes.json").read_text())
WORDS = (
    "int4-g32",
    "nf4-g64-dq",
    "nf4-flat64",
    "q4_k",
    "int8",
    "int8-tensor",
    "fp8-e4m3-block128",
    "int3-g32",
    "q6_k",
    "mxfp4",
    "uint4-g32-min",
)


@pytest.mark.parametrize("word", WORDS)
def test_embeddings_are_rows_of_the_decoded_table(word: str) -> None:
    torch.manual_seed(0)
    q = quantize(parse_scheme(word), torch.randn(130, 256), search=Search("absmax"))
    layer = QuantEmbedding(q, dtype=torch.float32)
    ids = torch.tensor([[3, 129, 0], [64, 3, 127]])
    assert torch.allclose(layer(ids), q.dequantize()[ids], rtol=1e-6, atol=1e-7)
    assert layer(ids[:0]).shape == (0, 3, 256) and torch.equal(layer.weight, q.dequantize())
    again = QuantEmbedding(quantize(parse_scheme(word), torch.ones(130, 256)), dtype=torch.float32)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(ids), layer(ids))


def test_tied_embeddings_lie_in_memory_once() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 128, (2, 9))
    table = quantize(parse_scheme("int8"), model.model.embed_tokens.weight.detach(), search=Search("lsq")).dequantize()
    quantize_(model, "int8", also=("embeddings",))
    assert model.lm_head is model.model.embed_tokens.table
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.endswith("embed_tokens.weight")}, strict=False
    )
    with torch.no_grad():
        assert model(ids).logits.shape == (2, 9, 128)
        assert torch.allclose(model.model.embed_tokens(ids), table[ids], atol=1e-3)


def test_stacked_experts() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=96,
        num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 96, (1, 12))
    with torch.no_grad():
        before = model(ids).logits
        rows = quantize_(model, "int8", also=("experts",))
        after = model(ids).logits
    stacks = [m for m in model.modules() if isinstance(m, QuantStack)]
    assert len(stacks) == 4 and len([row for row in rows if ".experts." in row.name]) == 16
    assert stacks[0].shape == (4, 192, 64)
    assert 0 < float((after - before).norm() / before.norm()) < 0.03
    x = torch.randn(3, 64)
    assert torch.allclose(torch.nn.functional.linear(x, stacks[0][2]), stacks[0].experts[2](x))
    assert torch.allclose(torch.matmul(x, stacks[0][2].layer.weight.T), stacks[0].experts[2](x), atol=1e-4)


def test_also_knows_its_words() -> None:
    with pytest.raises(InputError, match="FB-E0905"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(32, 32)), "int8", also=("norms",))


def test_nf4_is_bitsandbytes_bit_for_bit() -> None:
    w = torch.tensor(GOLDEN["weights"]).view(8, 64)
    layer = QuantLinear(quantize(parse_scheme("nf4-flat64"), w, search=Search("absmax")), dtype=torch.float32)
    theirs = torch.tensor(GOLDEN["nf4_blocks"]["packed"], dtype=torch.uint8)
    assert torch.equal(
        layer._buffers["codes"].reshape(-1), (theirs >> 4) | (theirs << 4)
    )  # their first code is the high half
    assert layer.weight.flatten().tolist() == GOLDEN["nf4_blocks"]["dequantized"]


def test_their_double_quantised_codes_multiply_as_they_decode_them() -> None:
    golden = GOLDEN["nf4_nested_blocks"]
    scheme = parse_scheme("nf4-flat64-dq")
    ours = quantize(scheme, torch.tensor(GOLDEN["weights"]).view(8, 64), search=Search("absmax"))
    theirs = torch.tensor(golden["packed"])
    codes = torch.stack([theirs >> 4, theirs & 15], -1).to(torch.uint8).view(8, 64)
    layer = QuantLinear(replace(ours, codes=codes), dtype=torch.float32)
    assert layer.layout.name == "direct" and layer._buffers["scale_codes"].flatten().tolist() == golden["absmax_codes"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = x @ torch.tensor(golden["dequantized"]).view(8, 64).T
    assert torch.allclose(layer(x), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_bytes_of_nf4() -> None:
    layer = QuantLinear(quantize(parse_scheme("nf4-g64-dq"), torch.randn(512, 4096), search=Search("absmax")))
    wanted = 4 + 8 / 64 + 32 / (64 * 256)  # code, code of its scale, scale of 256 scales
    assert 8 * layer.nbytes == pytest.approx(wanted * 512 * 4096 + 32, abs=0.5) and round(wanted, 3) == 4.127


def test_llm_int8_restores_what_outliers_break(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from make_outlier_sample import make
    finally:
        sys.path.pop(0)
    make(ROOT / "samples" / "sample", tmp_path)
    text = (ROOT / "samples" / "text" / "wikitext2-test.txt").read_text(encoding="utf-8")[:6000]
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt").input_ids[:, :512]
    kl = {}
    for threshold in (None, 0.0, 6.0):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        if threshold is not None:
            quantize_(model, "w8a8", threshold=threshold)
        with torch.no_grad():
            found = torch.log_softmax(model(ids).logits[0], -1)
        if threshold is None:
            full = found
        else:
            kl[threshold] = float((full.exp() * (full - found)).sum(-1).mean())
    assert kl[6.0] < 0.003 < 0.01 < kl[0.0], kl


@pytest.mark.parametrize("word", ("nf4-g64-dq", "int4-g32", "w8a8"))
def test_compiled_and_saved_without_pickles(word: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))  # noqa: E731
    model = make()
    quantize_(model, word)
    x = torch.randn(5, 64)
    with torch.no_grad():
        wanted = model(x)
        for one in (model, copy.deepcopy(model)):
            assert torch.equal(torch.compile(one, backend="aot_eager", fullgraph=True)(x), wanted)
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        other = make()
        quantize_(other, word)
        other.load_state_dict(load_file(tmp_path / "m.safetensors"))
        assert torch.equal(other(x), wanted)
        assert other.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
