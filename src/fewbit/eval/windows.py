"""Evaluation text as windows of tokens: plain text, JSON lines, datasets, conversations.

A plain text file is one long stream cut into consecutive windows. Records of a JSONL, parquet or dataset are documents of their own: each
is cut into windows, the last one padded, and a limited number of windows is drawn evenly from all documents. A conversation goes
through the model's chat template; only what the assistant says is scored.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.run.calib import Document, Tokens, read_documents

MANY_CLUSTERS = 6  # documents from which on they, not windows, are the independent units
LEAST_TOKENS = 16  # a document's remainder below this is left out
PLAIN = (".txt", ".md", ".raw", ".tokens")


@dataclass(frozen=True)
class Windows:
    """Evaluation tokens.

    Attributes:
        tokens: int64 [windows, length].
        clusters: int64 [windows], the document that each window is from (or the window itself where documents are few).
        scored: bool [windows, length - 1]; whether the prediction made at a position counts.
        source: name of the text. warnings: sentences.
    """

    tokens: torch.Tensor
    clusters: torch.Tensor
    scored: torch.Tensor
    source: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the tokens and of what is scored, hex."""
        state = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for part in (self.tokens, self.scored):
            state.update(part.contiguous().numpy().tobytes())
        return state.hexdigest()

    def head(self, count: int) -> Windows:
        """The first windows."""
        return Windows(self.tokens[:count], self.clusters[:count], self.scored[:count], self.source)


def windows(
    text: str,
    root: Path,
    length: int,
    limit: int | None,
    vocab: int,
    *,
    skip: int = 0,
    chat: bool = False,
    most: int | None = None,
) -> Windows:
    """Windows of a text under the base's tokenizer.

    Args:
        text: a .txt, .jsonl, .json or .parquet file, `default` (the bundled text, held out from calibration), or a dataset name `name#split`.
        root: folder with the tokenizer. length: tokens of a window. limit: how many tokens at most, rounded up to whole windows.
        vocab: rows of the embedding.
        skip: positions at each window's start that are not scored; length // 2 is llama.cpp's protocol.
        chat: put plain documents into the chat template too, as a request and its answer.
        most: the model's longest context.

    Raises:
        InputError: FB-E0801 for a text too short, FB-E0804 for an impossible length, FB-E0730 to FB-E0732 for text or tokenizer.
    """
    if not 0 <= skip < length - 1:
        raise InputError("FB-E0804", f"skipping {skip} of {length} tokens leaves nothing to score")
    tokenizer = Tokens(root)
    documents = _documents(text)
    wanted = None if limit is None else max(1, -(-limit // length))
    plain = text.lower().removesuffix(".gz").endswith(PLAIN) and not chat
    warnings = []
    if most is not None and length > most:
        warnings.append(f"windows of {length} tokens are longer than the model's context of {most}")
    rows = list(
        _stream(documents, tokenizer, length, wanted) if plain else _each(documents, tokenizer, length, wanted, chat)
    )
    if not rows:
        raise InputError("FB-E0801", f"the text gives no window of {length} tokens", file=text)
    tokens = torch.tensor([row for _, row, _ in rows], dtype=torch.int64)
    if int(tokens.max()) >= vocab:
        raise InputError("FB-E0732", f"token id {int(tokens.max())} exceeds the embedding's {vocab} rows", file=root)
    scored = torch.tensor([mask for _, _, mask in rows], dtype=torch.bool)[:, 1:]
    scored[:, :skip] = False
    if not bool(scored.any()):
        raise InputError("FB-E0801", "no position of the text is scored", file=text)
    clusters = torch.tensor([index for index, _, _ in rows])
    if int(clusters.unique().numel()) < MANY_CLUSTERS:
        clusters = torch.arange(len(rows))
    if int(clusters.unique().numel()) < 10:
        warnings.append(
            f"only {int(clusters.unique().numel())} independent documents or windows: the error bars themselves are rough"
        )
    return Windows(tokens, clusters, scored, text, tuple(warnings))


def _documents(text: str) -> list[Document]:
    if text != "default":
        return read_documents(text)
    packed = resources.files("fewbit.eval").joinpath("data/heldout.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return [Document(text=row["text"], domain=row["domain"]) for row in rows]


Row = tuple[int, list[int], list[bool]]
"""(document, token ids of a window, whether each token's prediction is scored)."""


def _stream(documents: list[Document], tokenizer: Tokens, length: int, wanted: int | None) -> Iterator[Row]:
    """All documents as one stream, in order."""
    stream: list[int] = []
    made = 0
    for index, document in enumerate(documents):
        stream += tokenizer.ids(document)
        while len(stream) >= length:
            if wanted is not None and made >= wanted:
                return
            yield index, stream[:length], [True] * length
            stream = stream[length:]
            made += 1


def _each(documents: list[Document], tokenizer: Tokens, length: int, wanted: int | None, chat: bool) -> Iterator[Row]:
    """Windows of the documents by turns: the first of each, then the second of each, until there are enough."""
    known: dict[int, tuple[list[int], list[bool]]] = {}
    filler = (tokenizer.separator or [0])[0]
    made, start, left = 0, 0, list(range(len(documents)))
    while left:
        still = []
        for index in left:
            if wanted is not None and made >= wanted:
                return
            if index not in known:
                known[index] = _spoken(documents[index], tokenizer, chat)
            ids, mask = known[index][0][start : start + length], known[index][1][start : start + length]
            if len(ids) < min(LEAST_TOKENS, length) or not any(mask[1:]):
                if len(ids) == length:
                    still.append(index)
                continue
            yield index, ids + [filler] * (length - len(ids)), mask + [False] * (length - len(mask))
            made += 1
            still.append(index)
        left, start = still, start + length


def _spoken(document: Document, tokenizer: Tokens, chat: bool) -> tuple[list[int], list[bool]]:
    """Token ids of a document, and which of them count: all of a plain text, the assistant's of a conversation."""
    messages: tuple[dict[str, str], ...] = document.messages
    if chat and not messages:
        cut = document.text.find("\n", len(document.text) // 8) + 1 or len(document.text) // 8
        messages = (
            {"role": "user", "content": "Continue this text:\n\n" + document.text[:cut]},
            {"role": "assistant", "content": document.text[cut:]},
        )
    if not messages:
        ids = tokenizer.ids(document)
        return ids, [True] * len(ids)
    ids = _ids(tokenizer, messages, False)
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = len(_ids(tokenizer, messages[:turn], True)), len(_ids(tokenizer, messages[: turn + 1], False))
            mask[start:stop] = [True] * (min(stop, len(ids)) - min(start, len(ids)))
    return ids, mask if any(mask) else [True] * len(ids)


def _ids(tokenizer: Tokens, messages: tuple[dict[str, str], ...], prompt: bool) -> list[int]:
    """A conversation under the chat template; without one, as `role: text` lines."""
    if getattr(tokenizer.inner, "chat_template", None):
        made: Any = tokenizer.inner.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        return list(made["input_ids"])
    lines = [f"{turn['role']}: {turn['content']}\n" for turn in messages] + (["assistant:"] if prompt else [])
    return tokenizer.inner("".join(lines), add_special_tokens=True)["input_ids"]
