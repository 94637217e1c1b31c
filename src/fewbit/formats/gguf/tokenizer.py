"""The way back of `vocabulary.py`: a GGUF's `tokenizer.*` keys as tokenizer.json and tokenizer_config.json, which transformers loads.

    gpt2    byte-level BPE: vocabulary and merges as they stand, the splitting rule looked up by its name in `pretokenizers.toml`
    llama   SentencePiece BPE: merges are every cut of a token into two tokens, in the order of the scores
    bert    WordPiece: words regain their bare form, the rest its ##
    t5      SentencePiece unigram: pieces with their scores

What has no row (a splitting rule that only llama.cpp knows) gives no files and a sentence instead: a tokeniser that is nearly right is wrong.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from fewbit.formats.gguf.metadata import Metadata
from fewbit.formats.gguf.pretokenize import rows
from fewbit.formats.gguf.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

_SPACE = "\u2581"
_PATTERN_OF = {  # other names that llama.cpp has for the rules of the table
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "roberta-bpe", "jina-v2-es", "jina-v2-de", "jina-es", "jina-de", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "kormo"), "qwen2"),
    **dict.fromkeys(("smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "starcoder"),
}  # fmt: skip
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "seperator": "sep",
    "padding": "pad",
    "cls": "cls",
    "mask": "mask",
}


def tokenizer_files(typed: Metadata) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """File name -> content, and what is worth saying where there is none.

    Args:
        typed: metadata of a GGUF.
    """
    own = {
        key.removeprefix("tokenizer.ggml."): value.data
        for key, value in typed.items()
        if key.startswith("tokenizer.ggml.")
    }
    model = str(own.get("model", "no_vocab"))
    if "tokens" not in own:
        return {}, ("the GGUF holds no vocabulary: no tokenizer is written",)
    made = _MODELS.get(model)
    if made is None:
        return {}, (f"no tokenizer is written: llama.cpp's tokeniser {model!r} has no counterpart here",)
    tokens = [_text(token) for token in own["tokens"]]
    kinds = [int(kind) for kind in own.get("token_type", [NORMAL] * len(tokens))]
    parts = made(tokens, kinds, own)
    if isinstance(parts, str):
        return {}, (f"no tokenizer is written: {parts}",)
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens, kinds),
        "normalizer": None, "pre_tokenizer": None, "post_processor": _around(tokens, own), "decoder": None,
    }  # fmt: skip
    return {"tokenizer.json": data | parts, "tokenizer_config.json": _settings(tokens, own, typed)}, ()


def _text(token: Any) -> str:
    return token if isinstance(token, str) else bytes(token).decode("utf-8", "replace")


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": tokens[index], **flags, "special": kind in (CONTROL, UNKNOWN)}
        for index, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _around(tokens: list[str], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is put before and after a text."""
    model = own.get("model")
    first = own.get("cls_token_id", own.get("bos_token_id")) if model == "bert" else own.get("bos_token_id")
    last = own.get("seperator_token_id" if model == "bert" else "eos_token_id")
    head = first if own.get("add_bos_token", model in ("llama", "bert")) else None
    tail = last if own.get("add_eos_token", model in ("bert", "t5")) else None
    if head is None and tail is None:
        return None

    def special(token: int, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokens[int(token)], "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    start, end = [] if head is None else [special(head)], [] if tail is None else [special(tail)]
    second = [] if head is None or model == "bert" else [special(head, 1)]
    ids = [int(token) for token in (head, tail) if token is not None]
    return {
        "type": "TemplateProcessing",
        "single": [*start, text("A", 0), *end],
        "pair": [*start, text("A", 0), *end, *second, text("B", 1), *([] if tail is None else [special(tail, 1)])],
        "special_tokens": {tokens[token]: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]} for token in ids},
    }  # fmt: skip


def _settings(tokens: list[str], own: Mapping[str, Any], typed: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for word, role in _ROLES.items():
        token = own.get(f"{word}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            found[f"{role}_token"] = tokens[int(token)]
    length = next((value.data for key, value in typed.items() if key.endswith(".context_length")), None)
    if length is not None:
        found["model_max_length"] = int(length)
    if "tokenizer.chat_template" in typed:
        found["chat_template"] = typed["tokenizer.chat_template"].data
    return found


def _numbers(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _bpe(tokens: list[str], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": _numbers(tokens), "merges": merges, **more,
    }  # fmt: skip


def _byte_level(tokens: list[str], kinds: list[int], own: Mapping[str, Any]) -> dict[str, Any] | str:
    pre = str(own.get("pre", "default"))
    name = _PATTERN_OF.get(pre, pre)
    row = next((row for row in rows() if row[2] == name), None)
    if row is None:
        return f"the pre-tokeniser {pre!r} is not known"
    steps, ignore_merges, _ = row
    merges = [list(_text(merge).partition(" ")[::2]) for merge in own.get("merges", ())]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = [_step(step, level) for step in steps]
    if "@gpt2" not in steps:
        split.append({**level, "use_regex": False})
    return {
        "pre_tokenizer": split[0] if len(split) == 1 else {"type": "Sequence", "pretokenizers": split},
        "decoder": {**level, "use_regex": True},
        "model": _bpe(tokens, merges, ignore_merges=ignore_merges),
    }


def _step(step: str, level: Mapping[str, Any]) -> dict[str, Any]:
    """A flat step of `pretokenizers.toml` as tokenizer.json has it."""
    if step == "@gpt2":
        return {**level, "use_regex": True}
    if step.startswith("@digits"):
        return {"type": "Digits", "individual_digits": step.endswith(":1")}
    if step == "@punctuation":
        return {"type": "Punctuation", "behavior": "Contiguous"}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _spaces(own: Mapping[str, Any]) -> dict[str, Any]:
    """Normalizer and decoder of SentencePiece's way with spaces."""
    prefix = bool(own.get("add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    start = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, replace]},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }


def merges_of(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """Merges of a SentencePiece BPE model: every cut of a token into two tokens, best score first."""
    known = {token: index for index, token in enumerate(tokens) if kinds[index] in (NORMAL, USER_DEFINED)}
    found = []
    for token, index in known.items():
        if kinds[index] != NORMAL or len(token) < 2:
            continue
        cuts = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in known and token[at:] in known]
        found += [(-scores[index], index, known[left], known[right], [left, right]) for left, right in cuts]
    return [cut for *_, cut in sorted(found, key=lambda item: item[:4])]


def _sentencepiece(tokens: list[str], kinds: list[int], own: Mapping[str, Any]) -> dict[str, Any] | str:
    unknown = next((tokens[index] for index, kind in enumerate(kinds) if kind == UNKNOWN), None)
    merges = merges_of(tokens, kinds, [float(score) for score in own["scores"]])
    return _spaces(own) | {"model": _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)}


def _wordpiece(tokens: list[str], kinds: list[int], own: Mapping[str, Any]) -> dict[str, Any] | str:
    for index, kind in enumerate(kinds):
        if kind == NORMAL:
            tokens[index] = tokens[index][1:] if tokens[index].startswith(_SPACE) else f"##{tokens[index]}"
    unknown = own.get("unknown_token_id")
    return {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": tokens[int(unknown)] if unknown is not None else "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": _numbers(tokens),
        },
    }  # fmt: skip


def _unigram(tokens: list[str], kinds: list[int], own: Mapping[str, Any]) -> dict[str, Any] | str:
    pieces = [[token, float(score)] for token, score in zip(tokens, own["scores"], strict=True)]
    unknown = own.get("unknown_token_id", next((index for index, kind in enumerate(kinds) if kind == UNKNOWN), None))
    prefix = bool(own.get("add_space_prefix", True))
    steps: list[dict[str, Any]] = []
    if "precompiled_charsmap" in own:
        charsmap = bytes(bytearray(int(b) & 0xFF for b in own["precompiled_charsmap"]))
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if own.get("remove_extra_whitespaces"):
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    space = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if prefix else "never",
        "split": True,
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": None if unknown is None else int(unknown),
            "vocab": pieces,
            "byte_fallback": False,
        },
    }


_MODELS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram}
