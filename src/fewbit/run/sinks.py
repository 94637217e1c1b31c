"""Sinks: where finished tensors go, one per output, with the journal that remembers them.

A sink knows the container (a folder of safetensors, a GGUF file) so that the engine does not. Data is written first, then made
durable, then journalled: a job in the journal is on the disk.
"""

from __future__ import annotations

import importlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fewbit.base.errors import QualityError
from fewbit.base.manifest import data_bytes
from fewbit.base.record import readable_json
from fewbit.formats.table import format_named
from fewbit.math.stats import Stats
from fewbit.num.qtensor import QTensor
from fewbit.plan.jobs import Job, Output
from fewbit.plan.resources import COPY_BUFFER
from fewbit.run.journal import Journal
from fewbit.run.source import Source
from fewbit.solve.table import Solved
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.layout import lay_out
from fewbit.store.tensors import as_bytes
from fewbit.store.writer import ShardWriter

SYNC_EVERY = 5.0  # seconds between journal entries reaching the disk; a crash loses at most this much work


class Sink(Protocol):
    """Takes the finished tensors of one output."""

    def open_journal(self, identity: dict[str, Any]) -> None: ...

    def is_done(self, job: Job) -> bool: ...

    def done(self, job: Job) -> dict[str, Any]: ...

    def put(self, job: Job, solved: Solved) -> None: ...

    def put_rows(self, job: Job, start: int, solved: Solved) -> None: ...

    def end_rows(self, job: Job) -> None: ...

    def saw(self, name: str, stats: Mapping[int | None, Stats]) -> None: ...

    def copy(self, job: Job, source: Source) -> None: ...

    def finish(self, record: dict[str, Any]) -> Path: ...

    def flush(self) -> None: ...

    def note(self, key: str, line: dict[str, Any]) -> None: ...

    @property
    def notes(self) -> dict[str, dict[str, Any]]: ...

    @property
    def scratch(self) -> Path: ...

    def close(self) -> None: ...


# container -> "module:class" taking (output, source, out, overwrite, shard_bytes)
SINKS: dict[str, str] = {
    "safetensors": "fewbit.run.sinks:SafetensorsSink",
    "gguf": "fewbit.run.gguf_sink:GgufSink",
}


def open_sink(output: Output, source: Source, out: Path, overwrite: bool, shard_bytes: int) -> Sink:
    """The sink of an output, ready to write (or to go on writing what an interrupted run left)."""
    module, _, name = SINKS[format_named(output.format).container].partition(":")
    return getattr(importlib.import_module(module), name)(output, source, out, overwrite, shard_bytes)


class Ledger:
    """Journal entries that wait for their data to reach the disk; flushed together every few seconds."""

    def __init__(self, path: Path, identity: dict[str, Any], sync: Callable[[], None]) -> None:
        self._journal = Journal(path, identity)
        self._sync = sync
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._entries: dict[str, dict[str, Any]] = dict(self._journal.done)
        self._lock = threading.Lock()
        self._flushed = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def entry(self, key: str) -> dict[str, Any]:
        return self._entries.get(key, {})

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        return self._journal.notes

    def note(self, key: str, line: dict[str, Any]) -> None:
        self._journal.note(key, line)

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Notes a finished job; it counts as done for this process at once, for a later one after the next flush."""
        with self._lock:
            self._entries[key] = line
            self._waiting.append((key, line))
            due = time.monotonic() - self._flushed >= SYNC_EVERY
        if due:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._flushed = time.monotonic()
        if waiting:
            self._sync()
            for key, line in waiting:
                self._journal.record(key, line)

    def close(self) -> None:
        self.flush()
        self._journal.close()


@dataclass
class Rows:
    """A tensor that is written tile by tile: what was written so far."""

    crc32: int = 0
    size: int = 0
    loss: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, view: memoryview, solved: Solved) -> None:
        self.crc32 = zlib.crc32(view, self.crc32)
        self.size += len(view)
        self.loss += solved.loss
        self.notes += [note for note in solved.notes if note not in self.notes]


class ShardSink:
    """What all sinks share: a writer of files laid out beforehand, and the ledger of what is done. Abstract."""

    def __init__(self, output: Output, source: Source, writer: ShardWriter) -> None:
        self.output, self.source, self.writer = output, source, writer
        self.ledger: Ledger | None = None
        self._rows: dict[str, Rows] = {}

    def open_journal(self, identity: dict[str, Any]) -> None:
        self.ledger = Ledger(self.writer.scratch / "journal.jsonl", identity, self.writer.sync)

    @property
    def _ledger(self) -> Ledger:
        assert self.ledger is not None, "open_journal comes first"
        return self.ledger

    @property
    def scratch(self) -> Path:
        """Folder for a run's own records; it goes when the output is whole."""
        return self.writer.scratch

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        return self._ledger.notes

    def note(self, key: str, line: dict[str, Any]) -> None:
        self._ledger.note(key, line)

    def flush(self) -> None:
        self._ledger.flush()

    def is_done(self, job: Job) -> bool:
        """Whether an earlier run wrote this job; what it wrote is read back and compared with the journal's checksums."""
        if job.target not in self._ledger:
            return False
        found = self._ledger.entry(job.target).get("crc32", {})
        return set(found) == set(job.writes) and all(
            self.writer.checksum(name) == value for name, value in found.items()
        )

    def done(self, job: Job) -> dict[str, Any]:
        return self._ledger.entry(job.target)

    def put(self, job: Job, solved: Solved) -> None:
        checksums = {}
        for name, tensor in self.encode(job, solved.q).items():
            view = as_bytes(tensor.contiguous())
            self.writer.write_at(name, 0, view)
            checksums[name] = zlib.crc32(view)
        self._ledger.add(job.target, {"crc32": checksums, "loss": solved.loss, "notes": list(solved.notes)})

    def put_rows(self, job: Job, start: int, solved: Solved) -> None:
        """Writes the rows of a tensor from row `start` on; tiles come in order, for jobs that say `by_rows`, which store one tensor."""
        (name,) = job.writes
        part = {name: (job.writes[name][0], (solved.q.shape[0], *job.writes[name][1][1:]))}
        view = as_bytes(self.encode(replace(job, writes=part), solved.q)[name].contiguous())
        done = self._rows.setdefault(job.target, Rows())
        self.writer.write_at(name, done.size, view)
        done.add(view, solved)

    def end_rows(self, job: Job) -> None:
        """Journals a tensor all of whose rows are written."""
        done = self._rows.pop(job.target)
        (name,) = job.writes
        self._ledger.add(job.target, {"crc32": {name: done.crc32}, "loss": done.loss, "notes": done.notes})

    def saw(self, name: str, stats: Mapping[int | None, Stats]) -> None:
        """Takes note of what calibration saw of the inputs of a stored weight, per expert of a stack; most outputs have no use for it."""

    def encode(self, job: Job, q: QTensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a job, exactly those that the plan announced."""
        form = format_named(self.output.format)
        parts = form.encode(job.target, q)
        announced = {name: data_bytes(dtype, shape) for name, (dtype, shape) in job.writes.items()}
        made = {name: tensor.numel() * tensor.element_size() for name, tensor in parts.items()}
        if made != announced:
            raise QualityError(
                "FB-E0412", f"{form.name} made {made}, planned were {announced} bytes", tensor=job.target
            )
        return parts

    def copy_pieces(self, job: Job, pieces: Iterator[torch.Tensor]) -> None:
        """Writes a kept tensor piece by piece, from its first byte on."""
        (name,) = job.writes
        at = checksum = 0
        for piece in pieces:
            view = as_bytes(piece.contiguous())
            self.writer.write_at(name, at, view)
            checksum = zlib.crc32(view, checksum)
            at += len(view)
        self._ledger.add(job.target, {"crc32": {name: checksum}, "loss": None, "notes": []})

    def close_journal(self) -> None:
        """Flushes the journal: everything is on the disk."""
        self._ledger.close()
        self.ledger = None

    def close(self) -> None:
        if self.ledger is not None:
            self.close_journal()
        self.writer.close()


def row_pieces(source: Source, name: str) -> Iterator[torch.Tensor]:
    """A tensor in pieces of rows that fit the copy buffer."""
    info = source.manifest[name]
    rows = info.shape[0] if info.shape else 1
    step = rows if info.nbytes <= COPY_BUFFER else max(1, rows * COPY_BUFFER // info.nbytes)
    if step >= rows:
        yield source.read(name)
        return
    for start in range(0, rows, step):
        yield source.read_rows(name, start, min(rows, start + step))


class SafetensorsSink(ShardSink):
    """An output folder of safetensors shards."""

    def __init__(self, output: Output, source: Source, out: Path, overwrite: bool, shard_bytes: int) -> None:
        parts = [(name, *spec) for job in output.jobs for name, spec in job.writes.items()]
        layout = lay_out(parts, max_shard_bytes=shard_bytes)
        super().__init__(output, source, ShardWriter(out, layout, overwrite=overwrite, sources=[source.root]))

    def encode(self, job: Job, q: QTensor) -> dict[str, torch.Tensor]:
        """As announced; a weight that was turned round for solving is turned back."""
        parts = super().encode(job, q)
        if "transpose" in job.ops:
            parts = {name: tensor.transpose(-1, -2).contiguous() for name, tensor in parts.items()}
        return parts

    def copy(self, job: Job, source: Source) -> None:
        """Copies a kept tensor, through a buffer of bounded size."""
        ((dtype, _),) = job.writes.values()
        self.copy_pieces(job, (_cast(piece, dtype) for piece in row_pieces(source, job.name)))

    def finish(self, record: dict[str, Any]) -> Path:
        self.close_journal()
        small = {"config.json": readable_json(self.output.config).encode()}
        beside = {**self.source.small_files, **self.output.small_files}
        small |= {name: readable_json(data).encode() for name, data in beside.items()}
        copies = [path for path in self.source.checkpoint.aux_files if path.name not in small]
        place = self.writer.finish(small, copies, facts_of(self.output, record))
        audit(self.output, place)
        return place


def facts_of(output: Output, record: dict[str, Any]) -> dict[str, Any]:
    """What `fewbit-manifest.json` says of an output."""
    schemes = {job.target: str(job.scheme) for job in output.quantised}
    return {**record, "target": output.target, "format": output.format, "schemes": schemes}


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A decoded tensor in the dtype that the plan promised (a kept tensor of a quantised source)."""
    wanted = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(dtype)
    return tensor.to(wanted) if wanted is not None and tensor.dtype != wanted and tensor.is_floating_point() else tensor


def audit(output: Output, place: Path) -> None:
    """Opens what was written and compares every tensor with the plan.

    Raises:
        QualityError: FB-E0412 naming the first tensor that is missing, extra, or of another dtype, shape or size.
    """
    planned = {name: spec for job in output.jobs for name, spec in job.writes.items()}
    with open_checkpoint(place) as written:
        found = {name: (info.dtype, info.shape) for name, info in written.manifest.items()}
    for name in planned.keys() | found.keys():
        if planned.get(name) != found.get(name):
            raise QualityError(
                "FB-E0412", f"planned {planned.get(name)}, written {found.get(name)}", tensor=name, file=place
            )
