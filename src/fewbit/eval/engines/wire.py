"""What an engine's process says: one JSON line, then the logits of each window as raw float32, window after window.

Imported by the scripts beside it, which run under the engine's own interpreter; needs nothing but the standard library there.

    job     argv[1], JSON: {"model": path, "tokens": [[ids of a window], …], "threads": n, "device": …}
    answer  {"ok": true, "vocab": n, "engine": "name version", "missing": [parameters filled with random numbers]}, or {"ok": false, "message": …}
    frames  float32 [length, vocab] for each window, in the machine's byte order
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

Frames = Iterator[Any]
"""Arrays float32 [length, vocab]; anything with the buffer protocol."""


def serve(run: Callable[[dict[str, Any]], tuple[Any, ...]]) -> None:
    """Runs a job: `run` gives the vocabulary's size, the engine's name and version, the frames, and perhaps a list of lost parameters."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the engine prints goes to stderr
    try:
        with open(sys.argv[1], encoding="utf-8") as file:
            job = json.load(file)
        vocab, engine, frames, *lost = run(job)
        head = {"ok": True, "vocab": vocab, "engine": engine, "missing": lost[0] if lost else []}
        answer.write(json.dumps(head).encode() + b"\n")
        for frame in frames:
            answer.write(memoryview(frame).cast("B"))
        answer.flush()
    except Exception as error:  # a stranger's refusal is an answer, whatever its type
        traceback.print_exc()
        answer.write(json.dumps({"ok": False, "message": f"{type(error).__name__}: {error}"[:2000]}).encode() + b"\n")
        answer.flush()
    sys.stderr.flush()
    os._exit(0)  # engines leave threads and workers behind that would hang a normal exit
