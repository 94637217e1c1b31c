"""Uses that a stranger tried and that failed once: awkward widths, state in buffers, moves and merges, saving, families with modules of their own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qat_models import KINDS
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fewbit.base.errors import InputError
from fewbit.nn import FewbitConfig, QuantCache, QuantEmbedding, QuantLinear, quantize_
from fewbit.runtime.fake_inputs import FakeInputs
from fewbit.runtime.generate import cache_word, generate
from fewbit.runtime.qat import freeze, observe, prepare

IDS = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(1))


def make(kind: str = "llama", **words: Any) -> Any:
    torch.manual_seed(0)
    words = {**KINDS.get(kind, {}), **words}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **words)).float().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("columns", (65, 66, 100, 104))
@pytest.mark.parametrize("tokens", (1, 2, 3, 16))
def test_int8_rows_of_any_width_in_16_bits(columns: int, tokens: int) -> None:
    """torch's product reads whole vectors: it ended in a segmentation fault, or in numbers from beyond the row."""
    model = nn.Sequential(nn.Linear(columns, 24, dtype=torch.bfloat16))
    quantize_(model, "int8")
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    wanted = (x.float() @ model[0].qtensor().dequantize().T + model[0].bias.float()).detach()
    assert float((model(x).detach().float() - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_state_in_buffers_is_loaded(tmp_path: Path) -> None:
    """DeepSeek's routers keep a correction in a buffer; left at zero the model is another one."""
    from fewbit.run.source import open_source
    from fewbit.run.training import load_float

    model = make(
        "deepseek_v3", vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    biases[0].copy_(torch.linspace(-3, 3, 8))
    model.save_pretrained(tmp_path)
    with open_source(tmp_path) as source:
        loaded = load_float(source)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_infinite_numbers_of_a_config(tmp_path: Path) -> None:
    from fewbit.run.source import open_source
    from fewbit.run.training import load_float

    words = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
    }
    model = make("mamba2", **words, n_groups=1, chunk_size=8)
    model.save_pretrained(tmp_path)
    assert '"Infinity"' in (tmp_path / "config.json").read_text(), "transformers writes it otherwise now"
    with open_source(tmp_path) as source:
        loaded = load_float(source)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


@pytest.mark.parametrize("scheme", ("int4-g32", "nf4", "int8"))
def test_quantised_embeddings_can_be_moved_and_filled(scheme: str) -> None:
    model = make()
    quantize_(model, scheme, also=("embeddings",))
    state, wanted = model.state_dict(), logits(model)
    other = make()
    quantize_(other, scheme, also=("embeddings",))
    other.to(torch.bfloat16)
    other.load_state_dict(state)
    assert torch.allclose(logits(other).float(), wanted, atol=0.05 * float(wanted.abs().max()))
    assert torch.isfinite(logits(copy.deepcopy(model).half())).all()
    assert other.model.embed_tokens.table.layout.name in ("direct", "packed")


def test_a_layer_keeps_the_kernel_that_was_asked_for() -> None:
    layer = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, "int4-g32")
    named = QuantLinear(layer[0].qtensor(), dtype=torch.bfloat16, kernel="packed")
    assert named.to(torch.float16).layout.name == "packed"
    named.load_state_dict(named.state_dict())
    assert named.layout.name == "packed"


def test_what_quantize_made_is_saved_and_loaded(tmp_path: Path) -> None:
    model = make()
    quantize_(model, "nf4")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["scheme"] == "nf4-g64-dq"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))
    with pytest.raises(InputError, match="FB-E0909"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FewbitConfig("int8"))
    other = make()
    quantize_(other, "nf4", also=("embeddings",))
    with pytest.raises(InputError, match="no place for quantised embeddings"):
        other.save_pretrained(tmp_path / "x")
    plain = other.dequantize()
    assert isinstance(plain.model.embed_tokens, nn.Embedding) and torch.isfinite(logits(plain)).all()


def test_trunk_and_whole_model_read_each_others_folders(tmp_path: Path) -> None:
    model = make()
    quantize_(model, "nf4")
    model.save_pretrained(tmp_path / "whole")
    trunk = AutoModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        wanted = model.model(IDS).last_hidden_state
        assert torch.equal(trunk(IDS).last_hidden_state, wanted)
        trunk.save_pretrained(tmp_path / "trunk")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "trunk").eval()
        assert torch.equal(again.model(IDS).last_hidden_state, wanted)


def test_names_left_out_do_not_take_the_tied_head_in(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    words = FewbitConfig("nf4", skip=["*.down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=words)
    kinds = {name: type(m) for name, m in model.named_modules() if name.endswith(("down_proj", "up_proj", "lm_head"))}
    assert kinds["lm_head"] is nn.Linear and kinds["model.layers.0.mlp.down_proj"] is nn.Linear
    assert kinds["model.layers.0.mlp.up_proj"] is QuantLinear


def test_a_config_refuses_at_once() -> None:
    for words, code in (
        ({"scheme": "int4-g32", "method": "gptq"}, "FB-E0905"),
        ({"scheme": "int8-channel+int8-tensor-static"}, "FB-E0905"),
        ({"scheme": "int8", "threshold": 6.0}, "FB-E0904"),
    ):
        with pytest.raises(InputError, match=code):
            FewbitConfig(**words)


def test_modules_of_their_own_kind_stay(tmp_path: Path) -> None:
    opt = make(
        "opt", vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    rows = {row.name: row for row in quantize_(opt, "int8", also=("embeddings",))}
    assert rows["model.decoder.embed_positions"].scheme == "kept" and rows["model.decoder.embed_positions"].notes
    assert isinstance(opt.model.decoder.embed_tokens, QuantEmbedding) and torch.isfinite(logits(opt)).all()
    hybrid = make(
        "lfm2", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    quantize_(hybrid, "int8", also=("experts",))
    assert torch.isfinite(logits(hybrid)).all()
    # each layer of a hybrid has a cache of its own kind
    assert len(list(generate(hybrid, [1, 2, 3], 4))) == 4


def test_a_misspelt_word_changes_nothing() -> None:
    model = make()
    with pytest.raises(InputError, match="FB-E0905"):
        quantize_(model, "nf4", also=("embedding",))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_ids_beyond_the_table_are_refused() -> None:
    model = make()
    quantize_(model, "nf4", also=("embeddings",))
    for bad in (-1, 128):
        with pytest.raises(IndexError):
            model.model.embed_tokens(torch.tensor([bad]))


def test_static_inputs_go_on_from_a_state_dict() -> None:
    scheme = "int8-channel+int8-tensor-static"
    model, fresh = make(), make()
    prepare(model, scheme)
    observe(model, [IDS])
    prepare(fresh, scheme)
    fresh.load_state_dict(model.state_dict())
    assert not any(m.observing for m in fresh.modules() if isinstance(m, FakeInputs))
    assert torch.equal(logits(fresh), logits(model))
    freeze(fresh)


def test_compiled_in_one_graph_with_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    quantize_(model, "int8")
    x = torch.randn(5, 64, requires_grad=True)
    model(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_young_cache_can_be_emptied() -> None:
    model = make()
    cache = QuantCache(model.config, "int4", window=64)
    with torch.no_grad():
        model(
            IDS[:1],
            use_cache=True,
            **{cache_word(model): cache},
        )
    cache.crop(-200)
    assert cache.get_seq_length() == 0


def test_adapters_leave_tables_alone_and_failed_merges_change_nothing() -> None:
    pytest.importorskip("peft")
    from fewbit.runtime.qlora import adapted, attach, merge

    model = make()
    quantize_(model, "nf4", also=("embeddings",))
    tuned = attach(model, r=4)
    assert not any("embed" in name or "head" in name for name, _ in adapted(tuned))
    assert torch.isfinite(logits(tuned)).all()

    outliers = make()
    quantize_(outliers, "w8a8", threshold=2.0)
    tuned = attach(outliers, r=4)
    before = logits(tuned)
    merged, rows = merge(tuned, "nf4-g64-dq")
    assert rows[0].scheme == "nf4-g64-dq" and torch.allclose(
        logits(merged), before, atol=0.5 * float(before.abs().max())
    )


def test_experts_multiplied_the_other_way_learn_too() -> None:
    pytest.importorskip("peft")
    from fewbit.runtime.qlora import attach

    model = make(
        "gpt_oss", vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    quantize_(model, "nf4-g32", also=("experts",))
    tuned = attach(model, r=2)
    tuned(IDS, labels=IDS).loss.backward()
    # up-projections of fresh adapters are zero, so the gradient reaches those first
    missing = [name for name, p in tuned.named_parameters() if p.requires_grad and "lora_B" in name and p.grad is None]
    assert not missing
