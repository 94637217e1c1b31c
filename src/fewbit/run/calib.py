"""Calibration text: where it comes from, how it becomes tokens, and what is in it.

Documents are shuffled with the recipe's seed, tokenised, and either packed (joined by the end-of-text token and cut into windows) or cut
each at the window length. The same file, tokenizer and seed give the same token ids on every machine; their hash goes into the journal.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import InputError

TEXT_KEYS = ("text", "content", "document", "prompt", "instruction")
FILES = (
    ".txt",
    ".json",
    ".jsonl",
    ".parquet",
    ".csv",
    ".gz",
    ".md",
)  # what ends so is a file, not the name of a dataset


@dataclass(frozen=True)
class Document:
    """One passage: its text, or a conversation, and the kind of text it is, where the source says."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    domain: str = ""


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens and what is in them.

    Attributes:
        tokens: int64 [samples, length].
        digest: sha256 of the token ids, hex.
        summary: counts for the report: documents, samples, length, domains, share of the vocabulary that occurs, distinct tokens.
        warnings: sentences.
    """

    tokens: torch.Tensor
    digest: str
    summary: dict[str, Any]
    warnings: tuple[str, ...]


def read_documents(name: str) -> list[Document]:
    """Documents of `default` (the bundled mix), a .txt, .jsonl, .json, .parquet file, a folder of such, or a Hugging Face dataset name, with `#split`.

    Raises:
        InputError: FB-E0730 when it cannot be read or holds no text.
    """
    if name == "default":
        packed = resources.files("fewbit.run").joinpath("data/calibration.jsonl.gz").read_bytes()
        return list(_json_lines(gzip.decompress(packed).decode("utf-8"), "the bundled calibration text"))
    path = Path(name).expanduser()
    if path.is_file():
        found = _read_file(path)
    else:
        _check_place(name)
        found = _read_dataset(name)
    if not any(doc.text.strip() or doc.messages for doc in found):
        raise InputError("FB-E0730", "the calibration source holds no text", file=path)
    return found


def _check_place(name: str) -> None:
    """Tells a missing file and a folder without data from a dataset's name, before that is looked for on the hub."""
    place = Path(name.partition("#")[0]).expanduser()
    if place.is_dir():
        if not any(path.suffix in FILES for folder in (place, place / "data") for path in folder.glob("*.*")):
            raise InputError("FB-E0730", f"the folder {name!r} holds no {', '.join(FILES)} files", file=place)
    elif place.is_absolute() or name.startswith((".", "~")) or place.suffix in FILES:
        raise InputError("FB-E0730", f"the text {name!r} is not there", file=place)


def _read_file(path: Path) -> list[Document]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            return [_document(row) for row in parquet.read_table(path).to_pylist()]
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError) as error:  # what is no UTF-8 and no parquet is a ValueError
        raise InputError("FB-E0730", f"the calibration text cannot be read: {error}", file=path) from None
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return list(_json_lines(text, path))
    return [Document(text=part) for part in _split_plain(text)]


def _split_plain(text: str, size: int = 20_000) -> Iterator[str]:
    """A long plain text as passages of some 20,000 characters, cut at line ends, so that shuffling mixes it."""
    part: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size:
            yield "".join(part)
            part, length = [], 0
    if part:
        yield "".join(part)


def _json_lines(text: str, file: object) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield _document(json.loads(line))
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    "FB-E0730",
                    f"line {number} of the calibration text is not a JSON record with text: {error}",
                    file=file,
                ) from None


def _document(row: Any) -> Document:
    if isinstance(row, str):
        return Document(text=row)
    messages = row.get("messages") or row.get("conversations")
    domain = str(row.get("domain") or row.get("kind") or row.get("source") or "")
    if messages:
        turns = [
            {"role": m.get("role") or m.get("from") or "user", "content": m.get("content") or m.get("value") or ""}
            for m in messages
        ]
        return Document(messages=tuple(turns), domain=domain)
    key = next((key for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if key is None:
        raise ValueError(f"no field of {', '.join(TEXT_KEYS)}")
    return Document(text=row[key], domain=domain)


def _read_dataset(name: str) -> list[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("FB-E0730", f"{name!r} is no file, and dataset names need `pip install datasets`") from None
    path, _, split = name.partition("#")
    try:
        rows = load_dataset(path, split=split or "train", streaming=True)
        return [_document(row) for row, _ in zip(rows, range(4096), strict=False)]
    except Exception as error:  # whatever a name or the hub provokes in that library is bad input, named as such
        reason = str(error).strip().splitlines()[:1] or [""]
        what = f"{name!r} is no file and cannot be loaded as a dataset: {type(error).__name__}: {reason[0][:300]}"
        raise InputError("FB-E0730", what) from None


class Tokens:
    """The checkpoint's tokenizer, from its own files; no code of the checkpoint is run."""

    def __init__(self, root: Path) -> None:
        """Raises InputError FB-E0731 when the folder has no tokenizer that can be loaded."""
        try:
            from transformers import AutoTokenizer

            self.inner = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer file provokes is bad input, named as such
            raise InputError(
                "FB-E0731",
                f"no tokenizer can be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                file=root,
            ) from None

    def ids(self, document: Document) -> list[int]:
        """Token ids of a document; a conversation goes through the model's chat template."""
        if document.messages:
            if not getattr(self.inner, "chat_template", None):
                text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in document.messages)
                return self.inner(text, add_special_tokens=True)["input_ids"]
            found = self.inner.apply_chat_template(list(document.messages), tokenize=True, return_dict=True)
            return list(found["input_ids"])
        return self.inner(document.text, add_special_tokens=True, verbose=False)["input_ids"]

    @property
    def separator(self) -> list[int]:
        end = self.inner.eos_token_id
        return [] if end is None else [end]


def calibration(
    name: str, root: Path, samples: int, length: int, seed: int, vocab: int, packed: bool = True
) -> Calibration:
    """Calibration tokens [samples, length] of a text for a checkpoint.

    Args:
        name: see `read_documents`. root: folder with the tokenizer. vocab: rows of the embedding.
        packed: join documents and cut windows; otherwise each window is the beginning of one document.

    Raises:
        InputError: FB-E0730, FB-E0731, FB-E0732 when the text is too short or its ids exceed the embedding.
    """
    files = [Path(name).expanduser(), *sorted(root.glob("tokenizer*"))]
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file())
    return _calibration(name, root, samples, length, seed, vocab, packed, stamps)


@functools.lru_cache(maxsize=1)  # a run looks at its text before it begins, and takes it when its turn comes
def _calibration(
    name: str, root: Path, samples: int, length: int, seed: int, vocab: int, packed: bool, stamps: tuple[Any, ...]
) -> Calibration:
    documents = read_documents(name)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    tokenizer = Tokens(root)
    domains: Counter[str] = Counter()
    windows = list(
        _packed(documents, order, tokenizer, samples, length, domains)
        if packed
        else _heads(documents, order, tokenizer, samples, length, domains)
    )
    if not windows:
        raise InputError("FB-E0732", f"the calibration text {name} gives no window of {length} tokens")
    tokens = torch.tensor(windows, dtype=torch.int64)
    if int(tokens.max()) >= vocab:
        raise InputError("FB-E0732", f"token id {int(tokens.max())} exceeds the embedding's {vocab} rows", file=root)
    distinct = int(tokens.unique().numel())
    warnings = []
    if len(windows) < samples:
        warnings.append(
            f"the calibration text gives {len(windows)} windows of {length} tokens, {samples} were asked for"
        )
    if distinct < min(1000, vocab // 8):
        warnings.append(f"the calibration text uses only {distinct} distinct tokens of {vocab}")
    summary = {
        "source": name,
        "documents": len(documents),
        "samples": len(windows),
        "length": length,
        "tokens": tokens.numel(),
        "distinct_tokens": distinct,
        "vocabulary_share": distinct / max(1, vocab),
        "domains": dict(domains.most_common(12)),
    }
    return Calibration(tokens, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), summary, tuple(warnings))


def _packed(
    documents: list[Document], order: list[int], tokenizer: Tokens, samples: int, length: int, domains: Counter[str]
) -> Iterator[list[int]]:
    """Windows of the documents joined; every document gives at most a fair share, so that one long book does not fill them all."""
    share = max(2, -(-2 * samples // max(1, len(documents))))
    stream: list[int] = []
    made = 0
    for index in order:
        document = documents[index]
        ids = tokenizer.ids(document)
        start = random.Random(index).randrange(0, max(1, len(ids) - share * length)) if len(ids) > share * length else 0
        domains[document.domain or "unnamed"] += min(len(ids), share * length)
        stream += ids[start : start + share * length] + tokenizer.separator
        while len(stream) >= length and made < samples:
            yield stream[:length]
            stream = stream[length:]
            made += 1
        if made >= samples:
            return


def _heads(
    documents: list[Document], order: list[int], tokenizer: Tokens, samples: int, length: int, domains: Counter[str]
) -> Iterator[list[int]]:
    made = 0
    for index in order:
        ids = tokenizer.ids(documents[index])
        if len(ids) >= length and made < samples:
            domains[documents[index].domain or "unnamed"] += length
            made += 1
            yield ids[:length]
