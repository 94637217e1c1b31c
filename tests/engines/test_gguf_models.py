"""GGUF files that we write are opened by real llama.cpp: logits of every architecture agree with transformers, tokens are identical."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import MODELS, SAMPLE, build, dense_twin, plan_of, spm_tokenizer, write_gguf
from harness import load_arrays, require_env, run_driver

from fewbit.formats.gguf.types import FLOATS, TYPES
from fewbit.store.gguf import open_gguf

pytestmark = pytest.mark.engines

PROMPTS = [[5, 17, 300, 42, 1001, 77, 8, 512, 900, 33] * 4, list(range(100, 148))]
# largest difference of a logit: GELU goes through a table of f16 in ggml, and an expert near a tie may be chosen otherwise
TOLERANCE = {"gemma": 2e-2, "gemma2": 2e-2, "gemma3": 2e-2, "gpt2": 2e-2, "gpt-oss": 6e-2}
SPM = ("gemma", "gemma2", "gemma3", "phi3")
DATA = Path(__file__).parents[3] / "shared" / "data"


def reference(folder: Path) -> list[np.ndarray]:
    """Logits of transformers in float32, [tokens, vocab] per prompt."""
    import transformers

    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float().numpy() for prompt in PROMPTS]


def in_llamacpp(file: Path, out: Path, **more: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    result = run_driver("llamacpp", "llamacpp", {"model": file, "prompts": PROMPTS, "logits": out, **more})
    arrays = load_arrays(out)
    return [arrays[str(n)] for n in range(len(PROMPTS))], result


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree(name: str, tmp_path: Path) -> None:
    require_env("llamacpp")
    folder = build(name, tmp_path / "model")
    if name in SPM:
        spm_tokenizer(folder)
    expected = reference(folder)
    _, file = write_gguf(folder, tmp_path / "out", "F32")
    found, _ = in_llamacpp(file, tmp_path / "logits.npz")
    worst = max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))
    assert float(np.std(expected[0])) > 0.3  # logits that say something
    assert worst < TOLERANCE.get(name, 1e-4)


@pytest.mark.parametrize("name", ["llama3-rope-untied", "gemma2", "deepseek3", "qwen2moe"])
def test_files_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    """Every tensor bit for bit, every model key, and the whole vocabulary."""
    require_env("llamacpp")
    folder = build(name, tmp_path / "model")
    if name in SPM:
        spm_tokenizer(folder)
        (folder / "tokenizer.json").unlink()
    _, file = write_gguf(folder, tmp_path / "out", "F32")
    job = {"model": folder, "out": tmp_path / "theirs.gguf", "outtype": "f32", "pre": "gpt-2"}
    run_driver("hf", "convert", job)
    ours, theirs = open_gguf(file), open_gguf(tmp_path / "theirs.gguf")
    more = {
        "general.quantized_by",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.unknown_token_id",
    }
    assert set(ours.metadata) - set(theirs.metadata) <= more
    free = {"general.name", "general.size_label", "general.basename", "general.finetune"}
    if name == "gemma2":
        free.add(
            "tokenizer.ggml.add_space_prefix"
        )  # fixed to false there; we read it from the model, and Gemma's own says false too
    assert set(theirs.metadata) - set(ours.metadata) <= free
    for key in set(ours.metadata) & set(theirs.metadata) - free:
        assert ours.metadata[key] == theirs.metadata[key], key
    assert {n: (i.dtype, i.shape) for n, i in ours.manifest.items()} == {
        n: (i.dtype, i.shape) for n, i in theirs.manifest.items()
    }
    for info in ours.manifest.values():
        left, right = ours.read(info), theirs.read(theirs.manifest[info.name])
        # the divisors of the rotary frequencies are computed there in float32, here in float64
        assert (
            torch.allclose(left, right, rtol=1e-6) if info.name == "rope_freqs.weight" else torch.equal(left, right)
        ), info.name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize("kind", [name for name in TYPES if name not in FLOATS])
def test_every_type_loads(kind: str, small: Path, tmp_path: Path) -> None:
    """All block linears in one type: llama.cpp checks every block, loads it, and computes what our decoder says."""
    require_env("llamacpp")
    plan, file = write_gguf(small, tmp_path / "out", f"pure-{kind.lower()}", overrides={"token_embd.weight": "F32"})
    assert {tensor.type for tensor in plan.tensors} == {"F32", kind}
    expected = reference(dense_twin(small, file, plan, tmp_path / "twin"))
    found, _ = in_llamacpp(file, tmp_path / "logits.npz")
    # llama.cpp rounds activations to 8 bits for these types: a relative error of half a percent or so, on logits of 1.3; random blocks make it four
    gap = float(np.sqrt(np.mean(np.square(expected[0] - found[0]))) / np.std(expected[0]))
    assert gap < 0.06, gap


def test_sample_tokens_are_identical(tmp_path: Path) -> None:
    require_env("llamacpp")
    import tokenizers

    if not DATA.exists():
        pytest.skip(f"no texts in {DATA}")
    _, file = write_gguf(SAMPLE, tmp_path / "out", "Q8_0")
    texts = []
    for path in sorted(DATA.iterdir()):
        text = path.read_text()
        texts += [text[at : at + 20000] for at in range(0, len(text), 20000)][::3]
    own = tokenizers.Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    expected = [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert sum(map(len, expected)) > 200_000
    assert run_driver("llamacpp", "llamacpp", {"model": file, "texts": texts})["tokens"] == expected


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_tokens_are_identical(source: str, tmp_path: Path) -> None:
    require_env("llamacpp")
    folder = build("phi3", tmp_path / "model")
    encode = spm_tokenizer(folder)
    if source == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    else:
        (folder / "tokenizer.json").unlink()
    _, file = write_gguf(folder, tmp_path / "out", "F16")
    texts = [
        "Hello, world's 123",
        "  two  spaces\n\n\ttabs 日本語 🚀",
        "The quick brown fox; naïve café.",
        "a",
        " ",
        "x = {'k': 1}\n",
    ]
    found = run_driver("llamacpp", "llamacpp", {"model": file, "texts": texts})["tokens"]
    assert found == [encode(text) for text in texts]


def test_split_files_load(tmp_path: Path) -> None:
    require_env("llamacpp")
    plan, file = write_gguf(SAMPLE, tmp_path / "out", "Q8_0", max_bytes=2_000_000)
    parts = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(parts) > 3 and file == parts[0]
    whole, _ = write_gguf(SAMPLE, tmp_path / "whole", "Q8_0")
    a, _ = in_llamacpp(file, tmp_path / "a.npz")
    b, _ = in_llamacpp(tmp_path / "whole" / "Q8_0.gguf", tmp_path / "b.npz")
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    source = open_gguf(parts[2])
    assert set(source.manifest) == {tensor.name for tensor in whole.tensors} == {tensor.name for tensor in plan.tensors}


def test_sample_plan_needs_no_guess() -> None:
    plan = plan_of(SAMPLE, "Q4_K_M")
    assert plan.metadata["tokenizer.ggml.pre"].data == "gpt-2" and not plan.notes


def test_bert_loads_and_its_wordpieces_are_identical(tmp_path: Path) -> None:
    require_env("llamacpp")
    import transformers
    from tokenizers import BertWordPieceTokenizer

    folder = tmp_path / "model"
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=128
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train(
        [str(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
        vocab_size=900,
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **words}))
    plan, file = write_gguf(folder, tmp_path / "out", "F16")
    assert plan.architecture == "bert" and plan.metadata["bert.attention.causal"].data is False
    texts = ["Hello, World 123!", "naïve café: don't-stop", "def f(x): return x_1", "日本語 text"]
    result = run_driver("llamacpp", "llamacpp", {"model": file, "texts": texts})
    assert result["vocab"] == 1000
    assert result["tokens"] == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
