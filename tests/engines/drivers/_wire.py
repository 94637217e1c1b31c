"""The wire between the tests and a stranger: one JSON job on stdin, one JSON result line on stdout.

Whatever the stranger's libraries print goes to stderr, so the result stays alone on stdout. Arrays travel in .npz files that the job
names. A result always has `ok`; a failure carries `error`, `message` and `traceback` instead of the driver's own fields.

A job {"jobs": [job, …]} is done one after another in the same process, for starting a stranger takes longer than asking it: its result has
`results`, one for each.
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
    job = json.load(sys.stdin)
    result = (
        {"ok": True, "results": [answer(handle, one) for one in job["jobs"]]} if "jobs" in job else answer(handle, job)
    )
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


def answer(handle: Callable[[Job], Result], job: Job) -> Result:
    try:
        return {"ok": True, **handle(job)}
    except Exception as error:  # the wire's whole purpose: a stranger's refusal is an answer, whatever its type
        return {
            "ok": False,
            "error": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": traceback.format_exc()[-8000:],
        }


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
