"""Tokenisers as GGUF metadata: what llama.cpp does is recognised by rule, everything else is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from fewbit.base.errors import InputError
from fewbit.formats.gguf.pretokenize import pre_name, rows, steps_of
from fewbit.formats.gguf.sentencepiece import parse_model
from fewbit.formats.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [*parts, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
    }


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "expected"),
    [
        (GPT2, False, "gpt-2"),
        (sequence(split(LLAMA3)), True, "llama-bpe"),
        (sequence(split(LLAMA3)), False, "dbrx"),
        (sequence(split(LLAMA3.replace("{1,3}", ""))), False, "qwen2"),
        (sequence(split(LLAMA3, "Removed", True)), True, "llama-bpe"),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]},
            False,
            "starcoder",
        ),
    ],
)
def test_rules_are_recognised(pre_tokenizer: dict[str, Any], ignore_merges: bool, expected: str) -> None:
    model = {"type": "BPE", "ignore_merges": ignore_merges}
    assert pre_name({"pre_tokenizer": pre_tokenizer, "model": model, "normalizer": {"type": "NFC"}}) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": sequence(split(LLAMA3 + "|x"))}, "no pre-tokeniser"),
        ({"pre_tokenizer": {**GPT2, "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": sequence(split(LLAMA3, "MergedWithNext"))}, "Split"),
        ({"pre_tokenizer": GPT2, "model": {"type": "BPE", "ignore_merges": True}}, "ignore_merges"),
        ({"pre_tokenizer": GPT2, "normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": None}, "no pre-tokeniser"),
    ],
)
def test_other_rules_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="FB-E0321") as caught:
        pre_name({"pre_tokenizer": GPT2, "model": {"type": "BPE"}, **change})
    assert words in str(caught.value)


def test_the_table_has_no_two_answers_for_one_rule() -> None:
    keys = [(steps, ignore) for steps, ignore, name in rows() if name != "chatglm-bpe"]
    assert len(keys) == len(set(keys)) and all(steps for steps, _ in keys)
    assert steps_of(sequence(split(LLAMA3))) == list(next(steps for steps, _, name in rows() if name == "llama-bpe"))


def sample_files(**changes: Any) -> dict[str, bytes]:
    data = json.loads((SAMPLE / "tokenizer.json").read_text())
    data.update(changes)
    return {
        "tokenizer.json": json.dumps(data).encode(),
        "tokenizer_config.json": (SAMPLE / "tokenizer_config.json").read_bytes(),
    }


def test_the_sample() -> None:
    made = read_vocabulary(sample_files(), {}, ("spm", "bpe"), 8200)
    assert (made.model, made.pre, len(made.tokens)) == ("gpt2", "gpt-2", 8200)
    assert made.types[:3] == [CONTROL, CONTROL, NORMAL] and made.types[-1] == UNUSED and made.tokens[-1] == "[PAD8199]"
    assert made.merges[0] == "Ġ Ġ" and made.adds == {"bos": False, "eos": False}
    assert made.ids["bos"] == 0 and made.ids["pad"] == 1
    assert (
        len(made.metadata()["tokenizer.ggml.tokens"].data)
        == len(made.metadata()["tokenizer.ggml.token_type"].data)
        == 8200
    )


def test_added_tokens_keep_their_kind() -> None:
    added = [
        {"id": 0, "content": "<|endoftext|>", "special": True},
        {"id": 8192, "content": "<tool>", "special": False},
        {"id": 8193, "content": "<|looks special|>", "special": False},
        {"id": 8194, "content": "a\u2581b", "special": False},
    ]
    made = read_vocabulary(sample_files(added_tokens=added), {"eos_token_id": 8193}, ("bpe",), 8195)
    assert made.types[8192:] == [USER_DEFINED, CONTROL, USER_DEFINED] and made.tokens[8194] == "a b"


def test_surroundings_come_from_the_post_processor() -> None:
    single = [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}]
    made = read_vocabulary(
        sample_files(post_processor={"type": "TemplateProcessing", "single": single}), {}, ("bpe",), 8192
    )
    assert made.adds == {"bos": True, "eos": False}


def test_templates_of_every_shape() -> None:
    files = sample_files()
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    files["tokenizer_config.json"] = json.dumps(config).encode()
    found = read_vocabulary(files, {}, ("bpe",), 8192).metadata()
    assert found["tokenizer.chat_template"].data == "A" and found["tokenizer.chat_template.tool_use"].data == "B"
    files["chat_template.jinja"] = b"C"
    assert read_vocabulary(files, {}, ("bpe",), 8192).metadata()["tokenizer.chat_template"].data == "C"


@pytest.mark.parametrize(
    ("files", "kinds", "rows_", "words"),
    [
        ({}, ("bpe",), 10, "neither"),
        (sample_files(), ("wpm",), 8192, "llama.cpp takes wpm"),
        (sample_files(), ("bpe",), 100, "100 rows"),
        ({"tokenizer.json": b"{"}, ("bpe",), 10, "not JSON"),
        ({"tokenizer.model": b"\x0a\xff\xff\xff"}, ("spm",), 10, "SentencePiece"),
        (
            sample_files(
                added_tokens=[
                    {"id": 8192, "content": "the", "special": False},
                    {"id": 8193, "content": "the", "special": False},
                ]
            ),
            ("bpe",),
            8194,
            "twice",
        ),
    ],
)
def test_tokenisers_that_cannot_work_are_refused(
    files: dict[str, bytes], kinds: tuple[str, ...], rows_: int, words: str
) -> None:
    with pytest.raises(InputError, match="FB-E0321") as caught:
        read_vocabulary(files, {}, kinds, rows_)
    assert words in str(caught.value)


def sentencepiece_bytes(pieces: list[tuple[str, float, int]], model_type: int = 2, prefix: bool = True) -> bytes:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    body = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
        for text, score, kind in pieces
    )
    return body + field(2, bytes([0x18, model_type])) + field(3, bytes([0x18, prefix]))


PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<0x0A>", 0.0, 6),
    ("\u2581a", -1.0, 1),
    ("b", -2.5, 1),
]


def test_sentencepiece_models_are_read() -> None:
    model = parse_model(sentencepiece_bytes(PIECES, prefix=False))
    assert [piece.decode() for piece, _, _ in model.pieces] == [text for text, _, _ in PIECES]
    assert model.pieces[5][1] == -2.5 and not model.add_dummy_prefix
    made = read_vocabulary({"tokenizer.model": sentencepiece_bytes(PIECES)}, {"eos_token_id": 2}, ("spm",), 8)
    assert made.types == [UNKNOWN, CONTROL, CONTROL, BYTE, NORMAL, NORMAL, UNUSED, UNUSED]
    assert made.adds == {"bos": True, "eos": False, "space_prefix": True} and made.ids == {"eos": 2}
    with pytest.raises(InputError, match="unigram"):
        read_vocabulary({"tokenizer.model": sentencepiece_bytes(PIECES, model_type=1)}, {}, ("spm",), 8)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_cut_sentencepiece_models_raise_typed_errors(cut: int) -> None:
    data = sentencepiece_bytes(PIECES)[:-cut]
    try:
        parse_model(data)
    except InputError as error:
        assert error.code == "FB-E0321"
