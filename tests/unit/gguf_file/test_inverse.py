"""Every architecture to GGUF and back from the file alone, by shapes: the same config, the same tensors, the same plan again."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))
from gguf_models import MODELS

from fewbit.base.errors import InputError
from fewbit.base.manifest import TensorInfo
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.families import architectures, family_named
from fewbit.formats.gguf.inverse import ROPE_TENSORS, inverse
from fewbit.formats.gguf.metadata import GgufManifest
from fewbit.formats.gguf.plan import GgufPlan, gguf_plan


def as_file(plan: GgufPlan) -> GgufManifest:
    """The manifest that the planned file will have."""
    kinds = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
    tensors = {
        t.name: TensorInfo(t.name, kinds.get(t.type, f"GGML:{t.type}"), t.shape, t.nbytes, "m.gguf")
        for t in plan.tensors
    }
    return GgufManifest(tensors, {}, plan.metadata)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str) -> None:
    import torch
    import transformers

    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**arguments)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = config.tie_word_embeddings
    # names as in memory: experts fused, where files on disk may have them apart; both must plan
    sources = {
        n: SimpleNamespace(shape=tuple(t.shape), dtype="BF16")
        for n, t in model.state_dict().items()
        if not (tied and n == "lm_head.weight")
    }
    raw = {**config.to_dict(), "architectures": [type(model).__name__]}
    plan = gguf_plan(sources, raw, {}, "Q4_K_M")
    factors = {t.name: list(t.values) for t in plan.tensors if t.name in ROPE_TENSORS}
    found = inverse(as_file(plan), factors)
    assert found.config["architectures"][0] in family_named(plan.architecture).hf
    again = gguf_plan(found.manifest, found.config, {}, "Q4_K_M")
    assert [(t.name, t.shape, t.type) for t in again.tensors] == [(t.name, t.shape, t.type) for t in plan.tensors]
    for key, value in plan.metadata.items():
        if not key.startswith("general."):
            assert again.metadata.get(key) == value, key


def test_every_architecture_has_a_way_back() -> None:
    assert not [name for name in architectures() if "architectures" not in family_named(name).config]


def test_encoders_there_and_back() -> None:
    """All encoders come back as BertModel, positions cut: the same plan again."""
    import torch
    import transformers

    size = {
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    small = {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    for kind, arguments in (("Bert", size), ("Roberta", size), ("XLMRoberta", size), ("DistilBert", small)):
        config = getattr(transformers, f"{kind}Config")(**arguments, max_position_embeddings=66)
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}Model")(config)
        sources = {n: SimpleNamespace(shape=tuple(t.shape), dtype="F32") for n, t in model.state_dict().items()}
        plan = gguf_plan(sources, {**config.to_dict(), "architectures": [f"{kind}Model"]}, {}, "Q8_0")
        assert plan.architecture == "bert"
        context = 64 if "oberta" in kind.lower() else 66  # positions start behind the padding token's id
        assert plan.metadata["bert.context_length"].data == context
        assert next(t for t in plan.tensors if t.name == "position_embd.weight").shape == (context, 64)
        found = inverse(as_file(plan))
        again = gguf_plan(found.manifest, found.config, {}, "Q8_0")
        assert [(t.name, t.shape, t.type) for t in again.tensors] == [(t.name, t.shape, t.type) for t in plan.tensors]


def test_what_cannot_be_read_back_says_so() -> None:
    info = TensorInfo("token_embd.weight", "F32", (8, 64), 2048, "m.gguf")
    for architecture, code, words in (("never-heard-of", "0320", "is not known"), ("bert", "0312", "how many blocks")):
        with pytest.raises(InputError, match=f"FB-E{code}") as caught:
            inverse(GgufManifest({"token_embd.weight": info}, {}, {"general.architecture": meta.text(architecture)}))
        assert words in str(caught.value)
    facts = {
        "general.architecture": meta.text("llama"),
        "llama.block_count": meta.u32(1),
        "llama.embedding_length": meta.u32(64),
        "llama.attention.head_count": meta.u32(4),
    }
    strange = {
        "token_embd.weight": info,
        "blk.0.strange.weight": TensorInfo("blk.0.strange.weight", "F32", (4,), 16, "m.gguf"),
    }
    with pytest.raises(InputError, match=r"FB-E0323.*strange"):
        inverse(GgufManifest(strange, {}, facts))
    with pytest.raises(InputError, match="rope_freqs"):
        inverse(GgufManifest({"token_embd.weight": info}, {}, facts), {"rope_freqs.weight": [1.0, 3.0, 2.0, 8.0]})
