"""What commands print: JSON documents with a schema, and progress with an ETA on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fewbit.base.record import plain

EVERY = 10.0  # seconds between lines where stderr is no terminal


def print_json(schema: str, data: Any) -> None:
    """One JSON document on stdout: {"schema": …, **data}."""
    print(json.dumps({"schema": schema, **plain(data)}, indent=2, ensure_ascii=False))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for the events of a run: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""
    if quiet:
        yield lambda event: None
    elif not sys.stderr.isatty():
        yield _Lines().take
    else:
        yield from _bar()


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.first = 0

    def take(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["event"] == "start":
            self.first = event["done"]
            print(event.get("text") or _weights(event), file=sys.stderr, flush=True)
        elif event["event"] == "note":
            print(event["text"], file=sys.stderr, flush=True)
        elif event["event"] == "job" and now - self.last >= EVERY:
            self.last = now
            share = event["done"] / max(1, event["total"])
            fresh = event["done"] - self.first
            left = (event["total"] - event["done"]) * (now - self.started) / max(1, fresh)
            print(f"{share:6.1%}  {_clock(left)} left  {event['name']}", file=sys.stderr, flush=True)


def _weights(event: dict[str, Any]) -> str:
    """How a run over a checkpoint's tensors begins."""
    resumed = f", {event['resumed']} done before" if event.get("resumed") else ""
    return f"{event['jobs']} tensors, {event['total'] / 1e6:.1f} million weights{resumed}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def take(event: dict[str, Any]) -> None:
            if event["event"] == "start":
                shown.update(task, total=event["total"], completed=event["done"])
            elif event["event"] == "job":
                shown.update(task, completed=event["done"], description=event["name"])
            elif event["event"] == "note":
                shown.console.print(event["text"])

        yield take
