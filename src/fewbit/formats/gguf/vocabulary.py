"""Tokenisers as GGUF metadata: byte-level BPE, SentencePiece BPE and unigram (llama.cpp's `llama` and `t5`) and WordPiece (`bert`).

Works on the contents of tokenizer.json, tokenizer.model, tokenizer_config.json and their companions, handed over as bytes by name. The
rule is to refuse what llama.cpp would tokenise differently, never to guess.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.base.errors import InputError
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.metadata import Metadata
from fewbit.formats.gguf.pretokenize import pre_name
from fewbit.formats.gguf.sentencepiece import BPE, parse_model
from fewbit.formats.gguf.token_files import (
    BYTE,
    CONTROL,
    FILES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenizerFiles,
    looks_special,
)

__all__ = ["BYTE", "CONTROL", "FILES", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocabulary", "read_vocabulary"]
_SPACE = "\u2581"
_ID_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}


@dataclass
class Vocabulary:
    """A tokeniser as llama.cpp holds it.

    Attributes:
        model: `gpt2`, `llama`, `t5` or `bert`.
        pre: name of the pre-tokeniser.
        tokens, types, scores: by id; no scores for BPE and WordPiece.
        merges: "left right" in order of rank.
        ids: bos, eos, unk, sep, pad, cls, mask -> token id.
        adds: bos, eos -> whether it is put around every text; space_prefix -> whether a space is put before it.
        charsmap: normalisation table of a unigram model, as SentencePiece compiles it; squeeze: whether runs of spaces count as one.
        templates: chat templates by name; "default" is the main one.
        notes: what is worth saying.
    """

    model: str
    pre: str
    tokens: list[str | bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    charsmap: bytes = b""
    squeeze: bool = False

    def metadata(self) -> Metadata:
        """The `tokenizer.*` keys."""
        found: Metadata = {
            "tokenizer.ggml.model": meta.text(self.model),
            "tokenizer.ggml.pre": meta.text(self.pre),
            "tokenizer.ggml.tokens": meta.texts(self.tokens),
        }
        if self.scores:
            found["tokenizer.ggml.scores"] = meta.array("f32", self.scores)
        found["tokenizer.ggml.token_type"] = meta.array("i32", self.types)
        if self.merges:
            found["tokenizer.ggml.merges"] = meta.texts(self.merges)
        for name, token in self.ids.items():
            found[f"tokenizer.ggml.{_ID_KEYS[name]}_token_id"] = meta.u32(token)
        for name, value in self.adds.items():
            key = "add_space_prefix" if name == "space_prefix" else f"add_{name}_token"
            found[f"tokenizer.ggml.{key}"] = meta.boolean(value)
        if self.model == "t5":
            found["tokenizer.ggml.remove_extra_whitespaces"] = meta.boolean(self.squeeze)
        if self.charsmap:
            found["tokenizer.ggml.precompiled_charsmap"] = meta.array("u8", self.charsmap)
        if "default" in self.templates:
            found["tokenizer.chat_template"] = meta.text(self.templates["default"])
        others = sorted(set(self.templates) - {"default"})
        if others:
            found["tokenizer.chat_templates"] = meta.texts(others)
            found |= {f"tokenizer.chat_template.{name}": meta.text(self.templates[name]) for name in others}
        return found


def read_vocabulary(
    files: Mapping[str, bytes], config: Mapping[str, Any], kinds: tuple[str, ...], rows: int, pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a checkpoint.

    Args:
        files: contents of the tokeniser files by name (see `FILES`).
        config: the model's config, for special token ids.
        kinds: what llama.cpp allows for this architecture, in the order to try: "spm", "bpe", "wpm".
        rows: rows of the embedding; the vocabulary is padded to them.
        pre: name of the BPE pre-tokeniser, in place of recognising it.

    Raises:
        InputError: FB-E0321 when no kind fits, with the reason.
    """
    source = TokenizerFiles(files)
    data = source.json("tokenizer.json")
    if "tokenizer.model" in files and "spm" in kinds:
        made = _sentencepiece(source)
    elif not data:
        raise InputError(
            "FB-E0321", "there is neither a tokenizer.json nor a tokenizer.model that llama.cpp could use here"
        )
    else:
        made = _from_json(data, source, kinds, pre)
    _pad(made, rows)
    _special_ids(made, source, config)
    _templates(made, source)
    if len(set(made.tokens)) < len(made.tokens):
        twice = next(token for token in made.tokens if made.tokens.count(token) > 1)
        raise InputError(
            "FB-E0321", f"the token {twice!r} stands in the vocabulary twice; llama.cpp refuses such a file"
        )
    return made


def _from_json(data: Mapping[str, Any], source: TokenizerFiles, kinds: tuple[str, ...], pre: str | None) -> Vocabulary:
    model = data.get("model", {})
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind == "WordPiece" and "wpm" in kinds:
        return _wordpiece(data, source)
    if kind == "BPE" and _is_byte_level(data) and "bpe" in kinds:
        return _byte_level(data, source, pre)
    if kind == "BPE" and not _is_byte_level(data) and "spm" in kinds:
        return _sentencepiece_from_json(data, source)
    if kind == "Unigram" and "ugm" in kinds:
        return _unigram(data, source)
    raise InputError(
        "FB-E0321", f"the tokeniser is a {kind} model; llama.cpp takes {', '.join(kinds)} for this architecture"
    )


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    def types(part: Mapping[str, Any] | None) -> set[str]:
        inner = (part or {}).get("pretokenizers") or (part or {}).get("decoders") or ()
        return {(part or {}).get("type", "")}.union(*(types(item) for item in inner)) if part else set()

    return "ByteLevel" in types(data.get("pre_tokenizer")) | types(data.get("decoder"))


def _by_id(
    vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], default: int = NORMAL
) -> tuple[list[Any], list[int]]:
    """Tokens and their types in the order of their ids; gaps are filled with unused ones."""
    size = max([*vocab.values(), *added, -1]) + 1
    if size > 1 << 22:
        raise InputError("FB-E0321", f"the vocabulary goes up to id {size - 1:,}")
    tokens: list[Any] = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for token, index in vocab.items():
        tokens[index], types[index] = token, default
    for index, entry in added.items():
        token = entry["content"]
        control = entry.get("special") or looks_special(token)
        tokens[index] = token if control else token.replace(_SPACE, " ")
        types[index] = CONTROL if control else USER_DEFINED
    return tokens, types


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]


def _byte_level(data: Mapping[str, Any], source: TokenizerFiles, pre: str | None) -> Vocabulary:
    model = data["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError("FB-E0321", f"the tokeniser marks words by {key}, llama.cpp's BPE has no such mark")
    tokens, types = _by_id(model["vocab"], source.added())
    bos, eos = _surroundings(data, source)
    adds = {"bos": bos, "eos": eos}
    return Vocabulary("gpt2", pre or pre_name(data), tokens, types, merges=_merges(model), adds=adds)


def _wordpiece(data: Mapping[str, Any], source: TokenizerFiles) -> Vocabulary:
    model = data["model"]
    if model.get("continuing_subword_prefix", "##") != "##":
        raise InputError("FB-E0321", "WordPiece with another mark than ## is not known to llama.cpp")
    if not (data.get("normalizer") or {}).get("lowercase", True):
        raise InputError("FB-E0321", "llama.cpp's WordPiece lowers all letters, this tokeniser keeps capitals")
    tokens, types = _by_id(model["vocab"], source.added())
    spaced = [
        token
        if kind == CONTROL or token.startswith("[PAD")
        else token[2:]
        if token.startswith("##")
        else _SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary("bert", "default", spaced, types)


def _sentencepiece(source: TokenizerFiles) -> Vocabulary:
    model = parse_model(source.files["tokenizer.model"])
    if model.model_type != BPE:
        raise InputError(
            "FB-E0321",
            "the SentencePiece model is a unigram one; llama.cpp runs these for encoders alone, from their tokenizer.json",
        )
    tokens: list[Any] = [meta.decoded(piece) for piece, _, _ in model.pieces]
    scores, types = [score for _, score, _ in model.pieces], [kind for _, _, kind in model.pieces]
    for index, entry in source.added().items():
        _place_added(tokens, scores, types, index, entry)
    bos, eos = _surroundings(source.json("tokenizer.json"), source, default=True)
    prefix = source.json("tokenizer_config.json").get("add_prefix_space")
    adds = {"bos": bos, "eos": eos, "space_prefix": model.add_dummy_prefix if prefix is None else bool(prefix)}
    return Vocabulary("llama", "default", tokens, types, scores, adds=adds)


def _place_added(
    tokens: list[Any], scores: list[float], types: list[int], index: int, entry: Mapping[str, Any]
) -> None:
    while len(tokens) <= index:
        tokens.append(f"[PAD{len(tokens)}]")
        scores.append(-10000.0)
        types.append(UNUSED)
    token = entry["content"]
    if types[index] in (UNKNOWN, BYTE) and tokens[index] == token:
        return
    control = entry.get("special") or looks_special(token)
    tokens[index] = token if control else token.replace(_SPACE, " ")
    scores[index], types[index] = -1000.0, CONTROL if control else USER_DEFINED


def _sentencepiece_from_json(data: Mapping[str, Any], source: TokenizerFiles) -> Vocabulary:
    """SentencePiece BPE that was converted to tokenizer.json: scores are the ranks of the merges that make each token."""
    model = data["model"]
    if not model.get("byte_fallback"):
        raise InputError(
            "FB-E0321", "a BPE tokeniser with neither ByteLevel nor byte_fallback is not known to llama.cpp"
        )
    added = source.added()
    tokens, types = _by_id(model["vocab"], {})
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
        elif token == model.get("unk_token"):
            types[index] = UNKNOWN
    for index, entry in added.items():
        _place_added(tokens, scores, types, index, entry)
    bos, eos = _surroundings(data, source, default=True)
    return Vocabulary(
        "llama", "default", tokens, types, scores, adds={"bos": bos, "eos": eos, "space_prefix": _space_prefix(data)}
    )


def _flat(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokeniser and all that it is a sequence of."""
    inner = (part or {}).get("normalizers") or (part or {}).get("pretokenizers") or ()
    return [part, *(item for own in inner for item in _flat(own))] if part else []


def _unigram(data: Mapping[str, Any], source: TokenizerFiles) -> Vocabulary:
    """SentencePiece unigram, from tokenizer.json: pieces with their scores, and the table that normalises text."""
    model = data["model"]
    pieces = [(str(piece), float(score)) for piece, score in model.get("vocab", ())]
    steps = [*_flat(data.get("normalizer")), *_flat(data.get("pre_tokenizer"))]
    known = {"Sequence", "Precompiled", "Replace", "Strip", "WhitespaceSplit", "Metaspace", "Prepend", "Nmt", "NFKC"}
    if strange := sorted({str(step.get("type")) for step in steps} - known):
        raise InputError(
            "FB-E0321", f"the unigram tokeniser has a step {', '.join(strange)}, llama.cpp's has none such"
        )
    squeeze = any(step["type"] in ("WhitespaceSplit", "Strip") for step in steps) or any(
        step["type"] == "Replace" and "{2,}" in str(step.get("pattern")) for step in steps
    )
    tokens: list[Any] = [piece for piece, _ in pieces]
    scores, types = [score for _, score in pieces], [NORMAL] * len(pieces)
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
    for index, entry in source.added().items():
        _place_added(tokens, scores, types, index, entry)
        scores[index] = pieces[index][1] if index < len(pieces) else 0.0
    if model.get("unk_id") is not None:
        types[int(model["unk_id"])] = UNKNOWN
    coded = next((step.get("precompiled_charsmap") for step in steps if step["type"] == "Precompiled"), None)
    bos, eos = _surroundings(data, source)
    adds = {"bos": bos, "eos": eos, "space_prefix": _space_prefix(data)}
    return Vocabulary(
        "t5",
        "default",
        tokens,
        types,
        scores,
        adds=adds,
        charsmap=base64.b64decode(coded) if coded else b"",
        squeeze=squeeze,
    )


def _space_prefix(data: Mapping[str, Any]) -> bool:
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in [*_flat(data.get("normalizer")), *_flat(data.get("pre_tokenizer"))]
    )


def _surroundings(data: Mapping[str, Any], source: TokenizerFiles, default: bool = False) -> tuple[bool, bool]:
    """Whether the tokeniser puts bos before and eos after a text."""
    config = source.json("tokenizer_config.json")
    processor = data.get("post_processor") or {}
    parts = [item for item in processor.get("processors", [processor]) if item.get("type") == "TemplateProcessing"]
    if parts:
        kinds = [next(iter(item)) for item in parts[-1].get("single", ())]
        return kinds[:1] == ["SpecialToken"], len(kinds) > 1 and kinds[-1] == "SpecialToken"
    return bool(config.get("add_bos_token", default)), bool(config.get("add_eos_token", False))


def _pad(made: Vocabulary, rows: int) -> None:
    if len(made.tokens) > rows:
        what = f"the tokeniser has {len(made.tokens):,} tokens, the embedding {rows:,} rows"
        unused = all(kind in (UNUSED, USER_DEFINED, CONTROL) for kind in made.types[rows:])
        if not unused:
            raise InputError("FB-E0321", what)
        made.notes.append(f"{what}; added tokens beyond them are left out")
        del made.tokens[rows:], made.types[rows:], made.scores[rows:]
    for index in range(len(made.tokens), rows):
        made.tokens.append(f"[PAD{index}]")
        made.types.append(UNUSED)
        if made.scores:
            made.scores.append(-10000.0)


def _special_ids(made: Vocabulary, source: TokenizerFiles, config: Mapping[str, Any]) -> None:
    numbers = {token: index for index, token in reversed(list(enumerate(made.tokens)))}
    stated = source.json("special_tokens_map.json") | source.json("tokenizer_config.json")
    generation = source.json("generation_config.json")
    for name in _ID_KEYS:
        entry = stated.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = numbers.get(text) if isinstance(text, str) else None
        if number is None:
            candidates = (config.get(f"{name}_token_id"), generation.get(f"{name}_token_id"))
            number = next(
                (value for value in candidates if isinstance(value, int) and 0 <= value < len(made.tokens)), None
            )
        if number is not None:
            made.ids[name] = number


def _templates(made: Vocabulary, source: TokenizerFiles) -> None:
    template = source.json("tokenizer_config.json").get("chat_template") or source.json("chat_template.json").get(
        "chat_template"
    )
    if "chat_template.jinja" in source.files:
        template = source.files["chat_template.jinja"].decode("utf-8", "replace")
    if isinstance(template, str):
        made.templates["default"] = template
    elif isinstance(template, list):
        made.templates |= {
            entry["name"]: entry["template"] for entry in template if isinstance(entry, dict) and "template" in entry
        }
