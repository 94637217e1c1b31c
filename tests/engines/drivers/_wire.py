"""The wire between the tests and a stranger: one JSON job on stdin, one JSON result line on stdout.

Whatever the stranger's libraries print goes to stderr, so the result stays alone on stdout. Arrays travel in .npz files that the job
names. A result always has `ok`; a failure carries `error`, `message` and `traceback` instead of the driver's own fields.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

Job = dict[str, Any]
Result = dict[str, Any]

_answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # at import, for some libraries print while they are imported


def serve(handle: Callable[[Job], Result], packages: Iterable[str]) -> None:
    """Read a job, run `handle` on it, and write its result with versions, seconds and peak memory."""
    start = time.monotonic()
    try:
        result: Result = {"ok": True, **handle(json.load(sys.stdin))}
    except Exception as error:  # the wire's whole purpose: a stranger's refusal is an answer, whatever its type
        result = {
            "ok": False,
            "error": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": traceback.format_exc()[-8000:],
        }
    result["wall_seconds"] = round(time.monotonic() - start, 3)
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    result["versions"] = {name: version(name) for name in packages}
    _answer.write(json.dumps(result) + "\n")
    _answer.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0 if result["ok"] else 1
    )  # engines leave threads and worker processes behind that would hang a normal exit


def calibration(job: Job) -> list[list[int]]:
    """The job's calibration sequences: lists of token ids, or the path of an .npy of shape [sequences, tokens]."""
    given = job.get("calibration") or []
    if not isinstance(given, str):
        return given
    import numpy

    return numpy.load(given).tolist()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
