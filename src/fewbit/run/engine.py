"""The engine: carries out a plan tensor by tensor, within a memory budget, so that it can be killed at any moment.

    plan ──> groups (jobs that solve the same tensor the same way, over all outputs)
               │  worker threads, as many as the byte gate lets through
               ▼
             read a tile of rows ─> solve ─> … ─> encode once per output ─> write at the final place ─> journal
               │
               ▼
             finish: small files, manifest, rename ─> audit

A job is done when its bytes are written and the journal says so; the order of jobs changes no byte. Calibrated runs use the
same sinks: they only come by their `Solved` in another way (see `run.block`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.base.errors import FewbitError, InputError
from fewbit.base.record import digest
from fewbit.base.resident import peak_resident
from fewbit.math.stats import Stats
from fewbit.plan.jobs import Job, Plan
from fewbit.plan.recipe import parse_size
from fewbit.plan.resources import Budget, budget, job_bytes, tile_rows
from fewbit.run.imatrix import read_imatrix, weighted
from fewbit.run.limits import ByteGate, torch_threads
from fewbit.run.pieces import join_rows, read_weight
from fewbit.run.settings import Settings
from fewbit.run.sinks import Sink, open_sink
from fewbit.run.source import Source
from fewbit.run.static import with_inputs
from fewbit.run.stop import Stop
from fewbit.solve.table import SOLVERS, Solved

LONG_SHARE = 20  # a tensor of more than this part of the work goes before the others


@dataclass(frozen=True)
class Group:
    """Jobs of one or more outputs that need the same tensor solved in the same way.

    Attributes:
        key: stands for the group in the journal.
        jobs: (index of the output, job).
    """

    key: str
    jobs: tuple[tuple[int, Job], ...]

    @property
    def job(self) -> Job:
        return self.jobs[0][1]


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        outputs: final paths, in the order of the plan's outputs.
        losses: output target -> weight name -> what the solver minimised (see `Solved.loss`).
        notes: weight name -> what a solver had to say.
        seconds: wall time of this run; resumed: jobs that an earlier run had done.
        peak_bytes: peak of resident memory of the process so far.
    """

    outputs: tuple[Path, ...]
    losses: dict[str, dict[str, float]]
    notes: dict[str, tuple[str, ...]]
    seconds: float
    resumed: int
    peak_bytes: int


def groups_of(plan: Plan) -> list[Group]:
    """All groups of a plan, in the order of their first job."""
    found: dict[str, list[tuple[int, Job]]] = {}
    for index, output in enumerate(plan.outputs):
        for job in output.jobs:
            key = digest([job.reads, job.ops, str(job.scheme) if job.scheme else None, job.solver])[:24]
            found.setdefault(key, []).append((index, job))
    return [Group(key, tuple(jobs)) for key, jobs in found.items()]


def identity(plan: Plan, source: Source) -> dict[str, Any]:
    """What must be equal for an interrupted run to be resumed."""
    return {
        "fewbit": fewbit.__version__,
        "torch": torch.__version__.split("+")[0],
        "source": source.fingerprint(),
        **{f"recipe.{name}": value for name, value in plan.recipe.items()},
    }


def run_plan(
    plan: Plan, source: Source, out: Path, settings: Settings, calibrated: Callable[..., Any] | None = None
) -> Outcome:
    """Carries out a plan.

    Args:
        plan: from `plan.resolve`.
        source: the open checkpoint.
        out: output folder; with several outputs, each gets a folder in it.
        settings: memory, workers, events.
        calibrated: for plans with `needs`: a generator function (groups, plan, source, settings, journal) -> (Group, Solved), block by block.

    Raises:
        ResourceError: before any work when it cannot fit; during it when the disk is full (resumable).
        InputError: FB-E0411 when an interrupted run with other options lies there.
        Interrupted: FB-E0511 on Ctrl-C or SIGTERM; resumable.
        QualityError: FB-E0412 when the audit finds the output incomplete.
    """
    started = time.monotonic()
    groups = groups_of(plan)
    room = budget([group.job for group in groups], settings.ram, settings.workers)
    shard_bytes = parse_size(plan.recipe["max_shard_size"])
    with Stop().listening() as stop:  # before the first file, so that every file that a stop leaves is spoken of
        sinks = _open_sinks(plan, source, out, settings, shard_bytes)
        try:
            run = _Run(plan, source, settings, room, sinks, identity(plan, source), stop)
            source.decide(run)
            run.work(groups, calibrated)
            stop.check()
            outputs = tuple(sink.finish(_record(plan, source, run)) for sink in sinks)
        finally:
            for sink in sinks:
                sink.close()
    if stop.is_set():  # while the outputs were given their names: they are whole, what follows is not wanted
        raise KeyboardInterrupt
    settings.on_event({"event": "done", "seconds": time.monotonic() - started})
    return Outcome(outputs, run.losses, run.notes, time.monotonic() - started, run.resumed, peak_resident())


def _open_sinks(plan: Plan, source: Source, out: Path, settings: Settings, shard_bytes: int) -> list[Sink]:
    sinks: list[Sink] = []
    try:
        for index, output in enumerate(plan.outputs):
            place = out if len(plan.outputs) == 1 else out / output_folder(plan, index)
            sinks.append(open_sink(output, source, place, settings.overwrite, shard_bytes))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def output_folder(plan: Plan, index: int) -> str:
    """Folder name of one of several outputs: its target, made safe for file systems."""
    safe = [
        ("".join(c if c.isalnum() or c in "._-" else "-" for c in output.target)).strip("-") for output in plan.outputs
    ]
    return safe[index] if safe.count(safe[index]) == 1 else f"{safe[index]}-{index + 1}"


class _Run:
    """State of one run: what is done, what is in flight, whether to stop."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        settings: Settings,
        room: Budget,
        sinks: list[Sink],
        who: dict[str, Any],
        stop: Stop,
    ) -> None:
        self.plan, self.source, self.settings, self.room, self.sinks = plan, source, settings, room, sinks
        self.stop = stop
        self.gate = ByteGate(room.bytes)
        self.losses: dict[str, dict[str, float]] = {output.target: {} for output in plan.outputs}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.resumed = 0
        self.total = sum(group.job.numel for group in groups_of(plan))
        self.finished = 0
        self.imatrix = read_imatrix(Path(plan.recipe["imatrix"])) if plan.recipe.get("imatrix") else None
        for sink in sinks:
            sink.open_journal(who)

    def work(self, groups: list[Group], calibrated: Callable[..., Any] | None) -> None:
        todo = []
        for group in groups:
            if all(self.sinks[index].is_done(job) for index, job in group.jobs):
                self.resumed += len(group.jobs)
                self._remember(group)
                self.finished += group.job.numel
            else:
                todo.append(group)
        self.settings.on_event(
            {"event": "start", "total": self.total, "done": self.finished, "jobs": len(groups), "resumed": self.resumed}
        )
        if self.plan.needs:
            if calibrated is None:
                raise InputError("FB-E0406", "this method needs calibration, which this call was given no engine for")
            wanted = [group for group in todo if group.job.scheme is not None and not self._data_free(group.job)]
            todo = [group for group in todo if group not in wanted]
            self._pool(todo)
            for group, solved in calibrated(groups, {group.key for group in wanted}, self) if wanted else ():
                self.stop.check()
                self.emit(group, solved)
        else:
            self._pool(todo)

    def _data_free(self, job: Job) -> bool:
        """Whether a job needs no calibration run: its solver needs nothing, or only what the importance matrix file gives."""
        needs = job.needs
        return not needs or (self.imatrix is not None and needs <= {"importance"})

    def _pool(self, todo: list[Group]) -> None:
        """Runs data-free groups on worker threads; the first failure stops the rest."""
        pending: set[Future[None]] = set()
        large = sum(group.job.numel for group in todo) / LONG_SHARE
        # the large first: else one of them may be all that is left at the end
        queue = iter(sorted(todo, key=lambda group: group.job.numel < large))
        with torch_threads(self.room.workers), ThreadPoolExecutor(max_workers=self.room.workers) as pool:
            try:
                while True:
                    while len(pending) < 2 * self.room.workers and (group := next(queue, None)) is not None:
                        pending.add(pool.submit(self._one, group))
                    if not pending:
                        break
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED, timeout=0.5)
                    for future in finished:
                        future.result()
                    self.stop.check()
            except BaseException:
                self.stop.set()
                raise

    def _one(self, group: Group) -> None:
        if self.stop.is_set():
            return
        with self.gate.hold(job_bytes(group.job)):
            if group.job.scheme is None:
                self._copy(group)
            elif all(job.by_rows for _, job in group.jobs):
                self._by_rows(group)
            else:
                self.emit(group, self.solve(group.job))

    def _by_rows(self, group: Group) -> None:
        """Solves a group tile by tile and writes each tile at once, so that a large tensor is never held whole."""
        for start, solved in self._tiles(group.job):
            for index, job in group.jobs:
                self.sinks[index].put_rows(job, start, solved)
        for index, job in group.jobs:
            self.sinks[index].end_rows(job)
        self._finished(group)

    def solve(self, job: Job) -> Solved:
        """The data-free answer for one job."""
        tiles = [solved for _, solved in self._tiles(job)]
        return tiles[0] if len(tiles) == 1 else join_rows(job.wanted, job.shape, tiles)

    def _tiles(self, job: Job) -> Iterator[tuple[int, Solved]]:
        """(first row, answer) of each tile of rows of a data-free job."""
        scheme, solver = job.wanted, SOLVERS[job.solver]
        options = self.options_for(job)
        seed = self.plan.recipe["seed"]
        step, rows = tile_rows(scheme, job.shape, job.ops), job.shape[-2] if len(job.shape) > 1 else 1

        def answer(weight: torch.Tensor) -> Solved:
            def call(w: torch.Tensor, stats: Stats | None) -> Solved:
                return solver(w, stats, scheme, seed=seed, options=options)

            matrix = self.imatrix
            return self._located(
                job, lambda: call(weight, None) if matrix is None else weighted(matrix, job, call, weight)
            )

        if step >= rows:
            yield 0, answer(read_weight(self.source, job))
            return
        for start in range(0, rows, step):
            yield start, answer(self.source.read_rows(job.name, start, min(rows, start + step)))

    def options_for(self, job: Job) -> dict[str, Any]:
        """The recipe's solver options that this job's solver has."""
        return {
            name: value for name, value in self.plan.recipe["options"].items() if name in SOLVERS[job.solver].options
        }

    def options_all(self, job: Job) -> dict[str, Any]:
        """All options of this job's solver, defaults included."""
        return {**SOLVERS[job.solver].options, **self.options_for(job)}

    def _located(self, job: Job, call: Callable[[], Solved]) -> Solved:
        """Adds the tensor's name to an error that does not know it."""
        try:
            return call()
        except FewbitError as error:
            if error.tensor is None:
                error.tensor = job.name
            raise

    def emit(self, group: Group, solved: Solved) -> None:
        """Encodes and writes a solved tensor to every output that wants it, and journals it."""
        for index, job in group.jobs:
            self.sinks[index].put(job, replace(solved, q=with_inputs(solved.q, job.wanted)))
        self._finished(group)

    def _copy(self, group: Group) -> None:
        for index, job in group.jobs:
            self.sinks[index].copy(job, self.source)
        self._finished(group)

    def _finished(self, group: Group) -> None:
        self._remember(group)
        self.finished += group.job.numel
        self.settings.on_event({"event": "job", "name": group.job.name, "done": self.finished, "total": self.total})

    def _remember(self, group: Group) -> None:
        for index, job in group.jobs:
            entry = self.sinks[index].done(job)
            if entry.get("loss") is not None:
                self.losses[self.plan.outputs[index].target][job.target] = entry["loss"]
            if entry.get("notes"):
                self.notes[job.target] = tuple(entry["notes"])


def _record(plan: Plan, source: Source, run: _Run) -> dict[str, Any]:
    """What `fewbit-manifest.json` says of the run."""
    return {
        "fewbit": fewbit.__version__,
        "source": plan.source,
        "source_fingerprint": source.fingerprint(),
        "recipe": plan.recipe,
    }
