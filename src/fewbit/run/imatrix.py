"""Importance matrices: how much each input column of a weight matters, exchanged with llama.cpp in both of its formats.

    GGUF     general.type "imatrix"; per weight `<name>.in_sum2` F32 [experts, columns], sums of squared inputs, and `<name>.counts` F32 [experts, 1]
    binary   i32 entries; per entry: name, i32 calls, i32 values, f32 values (means times calls); then i32 calls in all and the data set's name

An importance matrix belongs to a GGUF: names and row orders are GGUF's. Columns are the inputs of a matrix, which no row order touches.
An expert that saw no token takes the mean of those that did; where none did, every column counts the same, as in llama.cpp.

Source: tools/imatrix/README.md and imatrix-loader of ggml-org/llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.ops import stack_quantised
from fewbit.formats.gguf.plan import PlannedTensor
from fewbit.math.stats import Stats
from fewbit.plan.jobs import Job
from fewbit.solve.table import Solved
from fewbit.store.fileio import OpenFile
from fewbit.store.gguf import open_gguf
from fewbit.store.gguf_write import file_bytes, write_file

_SUMS, _COUNTS = ".in_sum2", ".counts"
MAX_ENTRIES = 1 << 17
MAX_VALUES = 1 << 28


@dataclass(frozen=True)
class Entry:
    """What calibration saw of one weight.

    Attributes:
        sums: float32 [experts, columns], sums of squared inputs; one expert for a plain matrix.
        counts: float32 [experts], tokens that were summed.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def unseen(self) -> int:
        """Experts that no token reached."""
        return int((self.counts == 0).sum())

    def importance(self) -> np.ndarray:
        """float32 [experts, columns]: mean squared inputs, gaps filled as described above."""
        seen = self.counts > 0
        if not seen.any():
            return np.ones_like(self.sums)
        means = self.sums / np.where(seen, self.counts, 1)[:, None]
        means[~seen] = means[seen].mean(axis=0)
        return means.astype(np.float32)


@dataclass(frozen=True)
class ImportanceMatrix:
    """Entries by the GGUF name of their weight, and where they came from.

    Attributes:
        datasets: names of the calibration texts.
        chunks, chunk_size: pieces of text that were run, and tokens in each.
    """

    entries: dict[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 512


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix of either format.

    Raises:
        InputError: FB-E0326 for what is neither, or holds impossible numbers; FB-E03xx for a malformed GGUF.
    """
    file = OpenFile(path)
    try:
        head = bytearray(min(4, file.stamp.size))
        file.read_into(memoryview(head), 0)
    finally:
        file.close()
    return _read_gguf(path) if bytes(head) == meta.MAGIC else _read_binary(path)


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Writes llama.cpp's GGUF format, atomically."""
    write_file(path, *_as_gguf(matrix))


def imatrix_bytes(matrix: ImportanceMatrix) -> bytes:
    """The file that `write_imatrix` writes."""
    return file_bytes("imatrix", *_as_gguf(matrix))


def _as_gguf(matrix: ImportanceMatrix) -> tuple[meta.Metadata, dict[str, tuple[str, tuple[int, ...], np.ndarray]]]:
    tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = {}
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        tensors[name + _SUMS] = ("F32", entry.sums.shape, entry.sums.astype(np.float32))
        tensors[name + _COUNTS] = ("F32", (len(entry.counts), 1), entry.counts.astype(np.float32))
    facts = {
        "general.type": meta.text("imatrix"),
        "imatrix.datasets": meta.texts(list(matrix.datasets)),
        "imatrix.chunk_count": meta.u32(matrix.chunks),
        "imatrix.chunk_size": meta.u32(matrix.chunk_size),
    }
    return facts, tensors


def write_binary(path: Path, matrix: ImportanceMatrix) -> None:
    """Writes the older binary format, for older readers. It knows one count per weight, so experts are written as means."""
    calls = max(matrix.chunks, 1)
    parts = [struct.pack("<i", len(matrix.entries))]
    for name in sorted(matrix.entries):
        values = (matrix.entries[name].importance() * calls).astype("<f4").ravel()
        raw = name.encode("utf-8")
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size), values.tobytes()]
    dataset = (matrix.datasets[0] if matrix.datasets else "").encode("utf-8")
    parts += [struct.pack("<ii", calls, len(dataset)), dataset]
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(b"".join(parts))
    beside.replace(path)


def _fail(path: Path, what: str, tensor: str | None = None) -> NoReturn:
    raise InputError("FB-E0326", what, tensor=tensor, file=path)


def _checked(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    if sums.ndim != 2 or counts.shape != (sums.shape[0],):
        _fail(path, f"sums of shape {list(sums.shape)} and {counts.size} counts do not go together", name)
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
        _fail(path, "it holds numbers that are negative or not finite", name)
    return Entry(sums, counts)


def _read_gguf(path: Path) -> ImportanceMatrix:
    source = open_gguf(path)
    try:
        typed = source.metadata
        kind = typed["general.type"].data if "general.type" in typed else None
        if kind != "imatrix":
            _fail(path, f"it is a GGUF file of type {kind!r}, not an importance matrix")
        entries = {}
        for name, info in source.manifest.items():
            if not name.endswith(_SUMS):
                continue
            weight = name.removesuffix(_SUMS)
            counts = source.manifest.get(weight + _COUNTS)
            if counts is None or {info.dtype, counts.dtype} != {"F32"} or len(info.shape) > 3:
                _fail(path, "it has no counts, or they are not F32", weight)
            sums = source.read(info).reshape(-1, info.shape[-1]).numpy()
            entries[weight] = _checked(path, weight, sums, source.read(counts).reshape(-1).numpy())
        datasets = typed["imatrix.datasets"].data if "imatrix.datasets" in typed else ()
        numbers = {
            key: int(typed[f"imatrix.{key}"].data) if f"imatrix.{key}" in typed else 0
            for key in ("chunk_count", "chunk_size")
        }
    finally:
        source.close()
    if not entries:
        _fail(path, "it holds no entries")
    return ImportanceMatrix(entries, tuple(map(str, datasets)), numbers["chunk_count"], numbers["chunk_size"] or 512)


class _Reader:
    """Little-endian pieces of the binary format, held against what is left."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            _fail(self.path, f"byte {self.at:,}: {what} takes {count:,} bytes, {len(self.data) - self.at:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def i32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little", signed=True)


def _read_binary(path: Path) -> ImportanceMatrix:
    if path.stat().st_size > 4 * MAX_VALUES:
        _fail(path, "it is larger than any importance matrix")
    reader = _Reader(path)
    count = reader.i32("the number of entries")
    if not 1 <= count <= MAX_ENTRIES:
        _fail(path, f"it announces {count:,} entries, 1 to {MAX_ENTRIES:,} are allowed")
    entries = {}
    for _ in range(count):
        size = reader.i32("the length of a name")
        if not 1 <= size <= meta.MAX_NAME_BYTES:
            _fail(path, f"byte {reader.at - 4:,}: a name of {size:,} bytes, 1 to {meta.MAX_NAME_BYTES} are allowed")
        name = reader.take(size, "a name").decode("utf-8", "replace")
        calls, values = reader.i32("the calls"), reader.i32("the number of values")
        if values < 1 or name in entries:
            _fail(path, f"{values:,} values, or a second entry of this name", name)
        sums = np.frombuffer(reader.take(4 * values, "the values"), "<f4").reshape(1, -1)
        entries[name] = _checked(path, name, sums, np.array([calls], np.float32))
    chunks, dataset = 0, ""
    if reader.at < len(reader.data):  # files before March 2024 end here
        chunks = reader.i32("the calls in all")
        dataset = reader.take(reader.i32("the length of a name"), "the data set's name").decode("utf-8", "replace")
    return ImportanceMatrix(entries, (dataset,) * bool(dataset), max(chunks, 0))


def importance_of(matrix: ImportanceMatrix, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """What a solver needs of a GGUF tensor: float32 [columns], or [experts, columns] for a stack; None when it was not seen.

    Raises:
        InputError: FB-E0326 when the matrix is of another model: the widths differ.
    """
    entry = matrix.entries.get(name)
    if entry is None:
        return None
    importance, experts = entry.importance(), shape[0] if len(shape) > 2 else 1
    if importance.size == experts * shape[-1]:  # the binary format keeps experts in one row
        importance = importance.reshape(experts, shape[-1])
    if importance.shape[-1] != shape[-1] or importance.shape[0] not in (1, experts):
        what = f"the importance matrix has {list(importance.shape)} for a tensor of shape {list(shape)}"
        raise InputError("FB-E0326", what, tensor=name)
    found = torch.from_numpy(np.ascontiguousarray(importance))
    return found[0] if len(shape) <= 2 else found.expand(experts, -1)


def weighted(
    matrix: ImportanceMatrix, job: Job, call: Callable[[Any, Stats | None], Solved], weight: torch.Tensor
) -> Solved:
    """Solves a job of a GGUF output under the matrix's importance, a stack expert by expert.

    Args:
        job: its target is the GGUF name.
        call: (weight, statistics) -> Solved, for weights [rows, columns].
        weight: [rows, columns] or [experts, rows, columns].
    """
    importance = importance_of(matrix, job.target, job.shape)
    if importance is None:
        solved = call(weight, None)
        return replace(solved, notes=(*solved.notes, "not in the importance matrix: every column counts the same"))
    if importance.ndim == 1:
        return call(weight, Stats(count=1, sumsq=importance.double()))
    parts = [call(one, Stats(count=1, sumsq=own.double())) for one, own in zip(weight, importance, strict=True)]
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    q = stack_quantised([part.q for part in parts])
    return replace(parts[0], q=q, loss=sum(part.loss for part in parts), notes=notes)


def imatrix_from_stats(
    stats: Mapping[str, Stats],
    tensors: Iterable[PlannedTensor],
    datasets: tuple[str, ...] = (),
    chunks: int = 0,
    chunk_size: int = 512,
) -> ImportanceMatrix:
    """The importance matrix that calibration gives a GGUF.

    Args:
        stats: name of a weight in the checkpoint -> statistics of its inputs (one per expert where experts are tensors of their own).
        tensors: of the GGUF's plan; those whose columns are not the inputs of a weight are left out.
    """
    entries = {}
    for tensor in tensors:
        held = [stats.get(name) for name in tensor.reads]
        sums = [_sums(one) for one in held]
        if not sums or all(one is None for one in sums) or (tensor.scheme is None and len(tensor.shape) < 2):
            continue
        columns = tensor.shape[-1]
        if any(one is not None and one.shape[-1] != columns for one in sums):
            continue
        filled = np.stack([np.zeros(columns) if one is None else one for one in sums]).astype(np.float32)
        counts = np.array([0 if one is None else one.count for one in held], np.float32)
        entries[tensor.name] = Entry(filled, counts)
    return ImportanceMatrix(entries, datasets, chunks, chunk_size)


def _sums(stats: Stats | None) -> np.ndarray | None:
    """float64 [columns]: sums of squared inputs."""
    importance = stats.importance if stats is not None else None
    return None if stats is None or importance is None else importance.double().cpu().numpy() * stats.count
