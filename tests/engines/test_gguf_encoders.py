"""Encoders as GGUF in real llama.cpp: what every position becomes agrees with transformers, and so do the tokens of each kind of tokeniser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import write_gguf
from harness import load_arrays, require_env, run_driver

pytestmark = pytest.mark.engines
TEXTS = [
    "Hello, World 123!",
    "The quick brown fox; naïve café: don't-stop",
    "def f(x): return x_1",
    "  two  spaces and\ta tab",
    "日本語 text",
]
CORPUS = sorted(Path(__file__).parent.glob("*.py"))
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
Encode = Callable[[str], list[int]]


def wordpiece(folder: Path) -> Encode:
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train([str(path) for path in CORPUS], vocab_size=900, min_frequency=1, show_progress=False)
    made.save(str(folder / "tokenizer.json"))
    words = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    settings(folder, words)
    return lambda text: made.encode(text, add_special_tokens=False).ids


def settings(folder: Path, words: dict[str, str]) -> None:
    stated = {f"{name}_token": word for name, word in words.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **stated}))


FAIRSEQ = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


def byte_level(folder: Path) -> Encode:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train([str(path) for path in CORPUS], vocab_size=900, show_progress=False, special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    settings(folder, FAIRSEQ)
    return lambda text: made.encode(text, add_special_tokens=False).ids


def unigram(folder: Path) -> Encode:
    """A unigram tokeniser as XLM-R's tokenizer.json has it: SentencePiece's normalisation, ids of fairseq."""
    import sentencepiece
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    text = folder / "corpus.txt"
    text.write_text(" ".join(path.read_text() for path in CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=900, model_type="unigram", minloglevel=2, hard_vocab_limit=False
    )  # fmt: skip
    text.unlink()
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    proto.ParseFromString((folder / "spm.model").read_bytes())
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    pieces.append(("<mask>", 0.0))
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    steps = [
        normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
        normalizers.Strip(),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    for path in folder.glob("spm.*"):
        path.unlink()
    settings(folder, FAIRSEQ)
    return lambda line: made.encode(line, add_special_tokens=False).ids


def config_of(name: str) -> Any:
    import transformers

    if name == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=1000, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=128, dropout=0.0
        )
    kind = {"bert": "BertConfig", "roberta": "RobertaConfig", "xlm-roberta": "XLMRobertaConfig"}[name]
    places = 130 if "roberta" in name else 128  # two before the first position
    more = {"type_vocab_size": 1} if "roberta" in name else {}
    return getattr(transformers, kind)(
        vocab_size=1000, max_position_embeddings=places, pad_token_id=int("roberta" in name), **SIZES, **more
    )


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("bert", wordpiece), ("distilbert", wordpiece), ("roberta", byte_level), ("xlm-roberta", unigram)],
)
def test_encoder(name: str, tokenizer: Callable[[Path], Encode], tmp_path: Path) -> None:
    require_env("llamacpp")
    import transformers

    torch.manual_seed(0)
    folder = tmp_path / "model"
    model = transformers.AutoModel.from_config(config_of(name)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    encode = tokenizer(folder)
    plan, file = write_gguf(folder, tmp_path / "out", "F32")
    assert plan.architecture == "bert" and plan.metadata["bert.attention.causal"].data is False
    prompts = [[5 + 7 * n % 890 for n in range(40)], [encode(TEXTS[1])[n] for n in range(8)]]
    job = {"model": file, "texts": TEXTS, "prompts": prompts, "embeddings": tmp_path / "found.npz"}
    result = run_driver("llamacpp", "llamacpp", job)
    assert result["vocab"] == 1000
    assert result["tokens"] == [encode(text) for text in TEXTS]
    found = load_arrays(tmp_path / "found.npz")
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        # ggml's GELU goes through a table of f16
        assert np.abs(found[str(number)] - expected).max() < 2e-2 * np.abs(expected).max()
