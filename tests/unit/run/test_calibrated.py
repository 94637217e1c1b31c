"""The calibrated engine on small models made here: equal to the model's own forward, every tensor solved, killed and resumed to the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from fewbit import api
from fewbit.base.errors import Interrupted
from fewbit.math.stats import Stats
from fewbit.run.fisher import OUTPUT, TOKENS, _drawn, fisher_pass, load_grams, token_weights
from fewbit.run.hf import BlockModel
from fewbit.run.source import open_source

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 32},
    "gemma2": {**SMALL, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {**SMALL, "head_dim": 16, "sliding_window": 16},
    "phi3": {**SMALL, "pad_token_id": 0},
    "olmo2": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gpt2": {"vocab_size": 8192, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bert": {
        "vocab_size": 8192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}


def make(model_type: str, folder: Path) -> torch.nn.Module:
    """A random model of a family, saved as a checkpoint with the sample's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    factory = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    model = factory.from_config(config).float().eval()
    for name, param in model.named_parameters():
        if "norm" in name or "ln_" in name:
            param.data += 0.1 * torch.randn_like(param)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_streamed_blocks_equal_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = make(model_type, tmp_path)
    tokens = torch.randint(5, 8000, (2, 40))
    with open_source(tmp_path) as source, torch.no_grad():
        blocks = BlockModel(source.config, source.manifest)
        trunk = blocks.load_trunk(source.read)
        entry = blocks.enter(trunk, tokens)
        hidden = entry.hidden
        for index in range(len(blocks)):
            hidden = blocks.run_block(index, blocks.load_block(index, source.read), hidden, entry.kwargs[index])
        found = blocks.leave(trunk, tokens, hidden)
        wanted = model(tokens).logits
    assert torch.allclose(found, wanted, atol=2e-5, rtol=1e-4), (found - wanted).abs().max()


@pytest.mark.parametrize("model_type", MODELS)
def test_every_matrix_is_solved_with_statistics(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path / "model")
    result = api.quantize(
        tmp_path / "model", to="dense:int4-g32-asym", method="imatrix", calib_samples=8, calib_length=64,
        options={"steps": 3}, out=tmp_path / "out", verify=False,
    )  # fmt: skip
    output = result.plan.outputs[0]
    assert {job.role for job in output.quantised} >= (
        {"qkv"} if model_type in ("gpt2", "phi3") else {"down"} if model_type != "bert" else {"fc1"}
    )
    unseen = [name for name, notes in result.notes.items() if any("no matrix product" in note for note in notes)]
    assert unseen in ([], ["bert.pooler.dense.weight"], ["cls.predictions.transform.dense.weight"]), unseen
    assert set(result.losses[output.target]) == {job.target for job in output.quantised}


def test_fisher_grams_equal_plain_autograd(tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    tokens = torch.randint(5, 8000, (5, 24))
    with open_source(tmp_path) as source:
        blocks = BlockModel(source.config, source.manifest)
        trunk = blocks.load_trunk(source.read)
        names = {
            "self_attn.o_proj.weight": "model.layers.0.self_attn.o_proj.weight",
            "mlp.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
        }
        fisher_pass(blocks, source.read, trunk, tokens, [names, {}], tmp_path / "s", batch=2, seed=3, spill=True)
        found = load_grams(tmp_path / "s", 0)
    outputs: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    for name, module in (
        ("self_attn.o_proj.weight", layer.self_attn.o_proj),
        ("mlp.gate_proj.weight", layer.mlp.gate_proj),
    ):
        module.register_forward_hook(
            lambda _m, _i, out, name=name: (out.retain_grad(), outputs.__setitem__(name, out))[1]
        )
    layer.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), outputs.__setitem__(OUTPUT, out))[1])
    generator = torch.Generator().manual_seed(3)
    wanted = dict.fromkeys((*names, OUTPUT), 0.0)
    sizes = []
    for batch in tokens.split(2):
        logits = model(inputs_embeds=model.model.embed_tokens(batch).detach().requires_grad_(True)).logits.flatten(0, 1)
        labels = _drawn(logits.detach().softmax(-1), generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, out in outputs.items():
            g = out.grad.flatten(0, 1)
            wanted[name] = wanted[name] + g.T @ g
        sizes.append(outputs[OUTPUT].grad.square().sum(-1))
    for local, stored in {**names, OUTPUT: OUTPUT}.items():
        assert torch.allclose(found[stored], wanted[local], rtol=1e-3, atol=1e-5)
    assert torch.allclose(found[TOKENS], torch.cat(sizes), rtol=1e-3, atol=1e-7)


def test_tokens_weigh_what_the_loss_feels() -> None:
    sizes = torch.tensor([[1.0, 4.0, 9.0, 0.0], [1.0, 1.0, 1.0, 1e9]])
    weights = token_weights(sizes, 3)
    assert weights is not None and weights.shape == (3, 4) and bool((weights[2] == 1).all())
    assert abs(float(weights[:2].mean()) - 1) < 1e-6
    assert torch.allclose(weights[0, 1] / weights[0, 0], torch.tensor(2.0)), "the square root of a squared gradient"
    assert float(weights.max()) < 10 * 8, "one token does not outweigh all others"
    for bad in (None, torch.zeros(2, 4), torch.full((2, 4), torch.nan)):
        assert token_weights(bad, 3) is None


def test_weighted_tokens_count_in_the_grams_only() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    share = torch.rand(10, 1, generator=generator)
    needs = frozenset({"gram", "cross_gram", "absmax", "sumsq"})
    found = Stats().take(x, y, needs=needs, root=share.sqrt()).take(x, y, needs=needs)
    flat, other = x.flatten(0, 1), y.flatten(0, 1)
    assert torch.allclose(found.gram, flat.T @ (flat * share) + flat.T @ flat, atol=1e-5)
    assert torch.allclose(found.cross_gram, other.T @ (flat * share) + other.T @ flat, atol=1e-5)
    assert torch.allclose(found.sumsq.float(), 2 * flat.square().sum(0)) and found.count == 20


RUN = {
    "to": ["dense:int4-g32-asym", "compressed-tensors:int4-g64"],
    "method": "gptq",
    "calib_samples": 6,
    "calib_length": 48,
    "options": {"sweeps": 1, "steps": 4},
}


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_a_stopped_calibrated_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    api.quantize(tmp_path / "model", out=tmp_path / "whole", verify=False, **RUN)
    seen = 0

    def stop_after(limit: int):
        def on_event(event: dict) -> None:
            nonlocal seen
            seen += event["event"] == "job"
            if seen >= limit:
                raise Interrupted("FB-E0511", "stopped by the test")

        return on_event

    for limit in (9, 20):
        seen = 0
        with pytest.raises(Interrupted):
            api.quantize(tmp_path / "model", out=tmp_path / "stopped", verify=False, on_event=stop_after(limit), **RUN)
    result = api.quantize(tmp_path / "model", out=tmp_path / "stopped", verify=False, **RUN)
    assert result.resumed > 0
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


def test_the_journal_knows_the_calibration_text(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    with pytest.raises(Interrupted):
        api.quantize(tmp_path / "model", out=tmp_path / "out", verify=False, on_event=_raise_on_first_job, **RUN)
    journals = list(tmp_path.rglob("journal.jsonl"))
    notes = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()[1:]]
    assert any(note.get("key") == "calibration" and len(note["digest"]) == 64 for note in notes)


def _raise_on_first_job(event: dict) -> None:
    if event["event"] == "job" and "proj" in event["name"]:
        raise Interrupted("FB-E0511", "stopped by the test")


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "mixtral", "phi3"])
def test_a_dense_output_of_eight_bits_stays_close_to_the_model(model_type: str, tmp_path: Path) -> None:
    model = make(model_type, tmp_path / "model")
    result = api.quantize(tmp_path / "model", to="dense-f32:int8-channel", out=tmp_path / "out", verify=False)
    again = AutoModelForCausalLM.from_pretrained(result.outputs[0], dtype=torch.float32).eval()
    tokens = torch.randint(5, 8000, (2, 24))
    with torch.no_grad():
        wanted, found = model(tokens).logits, again(tokens).logits
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_matrices_that_a_gguf_turns_round_are_solved_by_their_weights(tmp_path: Path) -> None:
    """MLA's key matrix is stored with its rows as columns: statistics of the layer's inputs say nothing of these."""
    make("deepseek_v3", tmp_path / "model")
    result = api.quantize(
        tmp_path / "model", to="gguf:Q8_0", method="imatrix", calib_samples=8, calib_length=64, out=tmp_path / "out"
    )
    solvers = {job.target: job.solver for job in result.plan.outputs[0].quantised}
    assert {solvers[f"blk.{layer}.attn_k_b.weight"] for layer in (0, 1)} == {"rtn"}
    assert {solvers[f"blk.{layer}.attn_v_b.weight"] for layer in (0, 1)} == {"imatrix"}
