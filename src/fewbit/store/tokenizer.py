"""Do the tokenizer's files fit the model? Asked before text is turned into tokens, so that no id leads beyond the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.store import strictjson
from fewbit.store.config import find_embedding, text_config

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "sentencepiece.bpe.model",
)
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_MAX_BYTES, _MAX_VALUES = 256 << 20, 8_000_000


def check_tokenizer(root: Path, config: dict[str, Any], manifest: Manifest) -> None:
    """Checks vocabulary and special ids against the number of rows of the embedding.

    Args:
        root: folder of the checkpoint.
        config: its config.
        manifest: its tensors.

    Raises:
        InputError FB-E0210: no tokenizer. FB-E0211: malformed, a token or id twice, an id without a row in the embedding.
    """
    present = [name for name in _FILES if (root / name).is_file()]
    if not present and not any(root.glob("*.tiktoken")):
        raise InputError("FB-E0210", "the folder has no tokenizer", file=root)
    embedding = find_embedding(manifest)
    rows = embedding.shape[0] if embedding else text_config(config).get("vocab_size")
    if not isinstance(rows, int):
        return
    if "tokenizer.json" in present:
        path = root / "tokenizer.json"
        content = strictjson.load_object(path, "FB-E0211", max_bytes=_MAX_BYTES, max_values=_MAX_VALUES)
        _check_ids(_vocabulary(content, path), rows, path)
        _check_ids(_added(content, path), rows, path)
    _check_special(root, config, rows)


def _vocabulary(content: dict[str, Any], path: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of the model's vocabulary: an object, or a list of [token, score] whose order gives the ids."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from vocab.items()
    elif isinstance(vocab, list):
        for index, item in enumerate(vocab):
            if not isinstance(item, list) or not item or not isinstance(item[0], str):
                raise InputError("FB-E0211", f"entry {index} of the vocabulary is {str(item)[:40]!r}", file=path)
            yield item[0], index
    else:
        raise InputError("FB-E0211", "tokenizer.json has no vocabulary", file=path)


def _added(content: dict[str, Any], path: Path) -> Iterator[tuple[str, object]]:
    for item in content.get("added_tokens") or ():
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise InputError("FB-E0211", f"an added token is {str(item)[:40]!r}", file=path)
        yield item["content"], item.get("id")


def _check_ids(tokens: Iterator[tuple[str, object]], rows: int, path: Path) -> None:
    ids: set[int] = set()
    seen: set[str] = set()
    for token, number in tokens:
        if type(number) is not int or number < 0:
            raise InputError("FB-E0211", f"the token {token[:40]!r} has the id {str(number)[:40]!r}", file=path)
        if number >= rows:
            what = f"the token {token[:40]!r} has the id {number}, the embedding has only {rows} rows"
            raise InputError("FB-E0211", what, file=path)
        if number in ids or token in seen:
            raise InputError("FB-E0211", f"the token {token[:40]!r} or its id {number} is listed twice", file=path)
        ids.add(number)
        seen.add(token)


def _check_special(root: Path, config: dict[str, Any], rows: int) -> None:
    """Special ids; null and -1 mean there is none."""
    sources = {"config.json": text_config(config)}
    generation = root / "generation_config.json"
    if generation.is_file():
        sources["generation_config.json"] = strictjson.load_object(generation, "FB-E0211", max_bytes=1 << 20)
    for file, content in sources.items():
        for key in _SPECIAL:
            value = content.get(key)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and (type(number) is not int or not -1 <= number < rows):
                    what = f"{key} is {str(number)[:40]!r}, the embedding has {rows} rows"
                    raise InputError("FB-E0211", what, file=root / file)
