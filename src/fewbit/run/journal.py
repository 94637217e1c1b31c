"""The journal: which jobs of a run are done, so that a killed run can be finished.

A file of JSON lines beside the partial output. The first line is the identity of the run (source, recipe, versions); each further
line is one finished job with the sha256 of every tensor that it wrote. A line is added only after the data it speaks of reached
the file system; a torn last line (the machine died while writing it) is ignored. A run with another identity is refused, naming
the fields that differ.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.record import canonical_json


class Journal:
    """Append-only record of finished jobs; safe to use from several threads."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Opens or begins the journal of a run.

        Raises:
            InputError: FB-E0411 when the journal belongs to a run with another identity.
        """
        self.path = path
        self._lock = threading.Lock()
        self.done: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        lines = _whole_lines(path)
        if lines:
            check_identity(lines[0], identity, path)
            for line in lines[1:]:
                (self.notes if line.get("kind") == "note" else self.done)[line["key"]] = line
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115  kept open for the whole run, closed by `close`
        if not lines:
            self._file.truncate(0)
            self._append(identity)
        else:
            self._file.truncate(_length_of(path, len(lines)))

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(canonical_json(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self, key: str, line: dict[str, Any]) -> None:
        """Notes that the job `key` is done; `line` is plain data (hashes, loss, notes)."""
        with self._lock:
            entry = {"key": key, **line}
            self.done[key] = entry
            self._append(entry)

    def note(self, key: str, line: dict[str, Any]) -> None:
        """Keeps a fact that a resumed run needs but that is no finished job."""
        with self._lock:
            entry = {"kind": "note", "key": key, **line}
            self.notes[key] = entry
            self._append(entry)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Closes and deletes the journal, after the output was renamed to its place."""
        self.close()
        self.path.unlink(missing_ok=True)


def journal_path(out: Path) -> Path:
    """Where the journal of an output lies: beside it."""
    return out.with_name(out.name + ".fewbit-journal")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """All lines that were written whole."""
    if not path.exists():
        return []
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(raw))
        except ValueError:
            break
    return lines


def _length_of(path: Path, lines: int) -> int:
    """Bytes of the first `lines` lines."""
    return sum(len(raw) + 1 for raw in path.read_bytes().split(b"\n")[:lines])


def check_identity(found: dict[str, Any], wanted: dict[str, Any], path: Path, remedy: str | None = None) -> None:
    """
    Raises:
        InputError: FB-E0411 when an interrupted run was begun as another one, naming the fields that differ.
    """
    wanted = json.loads(canonical_json(wanted))
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        shown = "; ".join(f"{key}: then {_short(found.get(key))}, now {_short(wanted.get(key))}" for key in differing)
        what = f"an interrupted run with other settings lies here: {shown}"
        raise InputError("FB-E0411", what, file=path, remedy=remedy)


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 120 else text[:117] + "…"
