"""What `fewbit plan` says a model takes, against files that were really written: six kinds of architecture, every safetensors format."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from fewbit import api
from fewbit.cli.plan import open_model
from fewbit.formats.table import format_named, format_names
from fewbit.plan.shapes import model_from_config
from fewbit.plan.sizes import STORAGES, Storage, size_of
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.gguf_layout import lay_out_gguf
from fewbit.store.layout import lay_out

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320,
    "torch_dtype": "bfloat16", "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "original_max_position_embeddings": 512,
}  # fmt: skip
ARCHITECTURES = {
    "dense": {**SMALL, "model_type": "llama"},
    "gqa": {**SMALL, "model_type": "qwen2", "num_key_value_heads": 2},
    "tied": {**SMALL, "model_type": "qwen3", "head_dim": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "sliding": {**SMALL, "model_type": "gemma3_text", "head_dim": 64, "sliding_window": 64},
    "experts": {**SMALL, "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "stacked": {**SMALL, "model_type": "gpt_oss", "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "latent": {
        **SMALL, "model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    },
    "fused": {**SMALL, "model_type": "phi3", "sliding_window": 64},
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "phi3": "Phi3ForCausalLM",
}  # fmt: skip
TARGETS = [name for name in format_names() if name != "gguf"]


def write_model(folder: Path, config: dict) -> Path:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for weight in model_from_config("m", config).weights:
        for expert in range(weight.count):
            tensors[weight.name.replace("*", str(expert))] = (torch.randn(weight.shape) * 0.02).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [CLASSES[config["model_type"]]]}))
    return folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_predicted_bytes_are_the_bytes_written(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", ARCHITECTURES[kind])
    model = open_model(str(source))
    assert model.params == model_from_config("m", ARCHITECTURES[kind]).params
    for name in TARGETS:
        form = format_named(name)
        target = f"{name}:{form.default_scheme}"
        try:
            plan = api.plan_quantize(source, to=target, on_misfit="keep")
        except api.Refusals as refused:  # the format holds none of these matrices; then there is nothing to predict
            assert "no tensor would be quantised" in str(refused)
            continue
        result = api.quantize(
            source,
            to=target,
            options={"search": "absmax"},
            on_misfit="keep",
            out=tmp_path / name,
            verify=False,
            workers=2,
        )
        files = sorted((tmp_path / name).glob("*.safetensors"))
        written = sum(path.stat().st_size for path in files)
        (output,) = result.plan.outputs
        layout = lay_out([(part, *spec) for job in output.jobs for part, spec in job.writes.items()])
        assert written == layout.nbytes, target
        storage = Storage(target, form.default_scheme, target)
        assert (
            size_of(model, storage).total
            == plan.outputs[0].nbytes
            == sum(shard.size - len(shard.head) for shard in layout.shards)
        ), target


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_listed_storages_are_predicted_too(kind: str, tmp_path: Path) -> None:
    """Every row that names a safetensors target, by the resolver that makes the jobs."""
    source = write_model(tmp_path / "source", ARCHITECTURES[kind])
    model = open_model(str(source))
    for label, storage in STORAGES.items():
        if storage.container == "safetensors" and storage.target:
            try:
                plan = api.plan_quantize(source, to=storage.target, on_misfit="keep")
            except api.Refusals as refused:
                assert "no tensor would be quantised" in str(refused)
                continue
            assert size_of(model, storage).total == plan.outputs[0].nbytes, label


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gguf_files_are_predicted_to_the_byte(kind: str, tmp_path: Path) -> None:
    """Every listed recipe by the plan of the run; two of them by the file itself, its header and padding included."""
    source = write_model(tmp_path / "source", ARCHITECTURES[kind])
    model = open_model(str(source))
    for label, storage in STORAGES.items():
        if storage.container == "gguf":
            assert size_of(model, storage).total == api.plan_quantize(source, to=storage.target).outputs[0].nbytes, (
                label
            )
    for label in ("Q8_0", "Q4_K_M"):
        result = api.quantize(
            source, to=f"gguf:{label}", options={"search": "absmax"}, out=tmp_path / label, verify=False, workers=2
        )
        planned = result.plan.outputs[0].carry
        layout = lay_out_gguf(planned.layout_rows(), planned.metadata)
        (file,) = (tmp_path / label).glob("*.gguf")
        assert file.stat().st_size == layout.nbytes, label
        with open_checkpoint(file) as written:
            assert written.manifest.nbytes == size_of(model, STORAGES[label]).total
        assert open_model(str(file)).disk_bytes == size_of(model, STORAGES[label]).total


def test_the_sample_model(tmp_path: Path) -> None:
    sample = Path(__file__).parents[3] / "samples" / "sample"
    model = open_model(str(sample))
    assert model.params == sum(prod(weight.shape) for weight in model.weights) == 8_392_960
    result = api.quantize(
        sample, to="compressed-tensors:int4-g128", options={"search": "absmax"}, out=tmp_path / "out", verify=False
    )
    assert size_of(model, STORAGES["INT4 g128"]).total == result.plan.outputs[0].nbytes
