"""The state of a training run on disk, so that a killed run is finished by the same command.

    <out>.training/state.safetensors      what learns, the optimiser's averages; in the header: who the run is, its step and its curve
    <out>.training/lock                   held while a run writes there

The state is written beside the old one and then takes its name, so one of the two is always whole. The folder goes when the output is in place.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewbit.base.errors import InputError, ResourceError
from fewbit.run.journal import check_identity
from fewbit.run.stop import Stop
from fewbit.runtime.distil import Point, State
from fewbit.store.fileio import free_bytes
from fewbit.store.writer import lock

EVERY = 60.0  # seconds between two states at least
SHARE = 0.05  # of the time that writing them may take
STATE_BYTES = 12  # of a number that learns: its value and two averages


def training_path(out: Path) -> Path:
    """Where the state of a training run lies: beside its output."""
    return out.with_name(out.name + ".training")


class Kept:
    """Reads the state that an earlier run left, and writes the present one now and then and when a stop is asked for."""

    def __init__(self, out: Path, identity: Mapping[str, Any], stop: Stop) -> None:
        """
        Raises:
            InputError: FB-E0142 when another run is writing there.
        """
        self.folder = training_path(out.absolute())
        self.path = self.folder / "state.safetensors"
        self.identity, self.stop = dict(identity), stop
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / "lock")
        self.written, self.took = time.monotonic(), 0.0

    def load(self) -> State | None:
        """The state that lies there.

        Raises:
            InputError: FB-E0411 when it is of a run with other settings, FB-E0919 when it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                said = json.loads(file.metadata()["fewbit"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            points = tuple(Point(**record) for record in said["points"])
            state = State(said["step"], tensors, tuple(said["losses"]), points, said["seconds"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError("FB-E0919", f"the state cannot be read: {error}", file=self.path) from None
        remedy = f"run the original command to finish it, or delete {self.folder.name} to start again"
        check_identity(said["identity"], self.identity, self.path, remedy)
        return state

    def require_room(self, learning: int) -> None:
        """Refuses before the run what would fill the disk during it: two states, the old and the new.

        Raises:
            ResourceError: FB-E0501.
        """
        held = self.path.stat().st_size if self.path.exists() else 0
        needed, free = 2 * STATE_BYTES * learning - held, free_bytes(self.folder)
        if needed > free:
            what = f"the training's state needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            raise ResourceError("FB-E0501", what, file=self.folder)

    def after_step(self, take: Callable[[], State]) -> None:
        """Writes the state when it is time.

        Raises:
            Interrupted: FB-E0511 once a stop was asked for, with the state written.
        """
        if self.stop.is_set() or time.monotonic() - self.written > max(EVERY, self.took / SHARE):
            self.write(take())
            self.stop.check()

    def write(self, state: State) -> None:
        started = time.monotonic()
        said = {"identity": self.identity, "step": state.step, "losses": state.losses, "seconds": state.seconds}
        said["points"] = [asdict(point) for point in state.points]
        beside = self.path.with_suffix(".new")
        try:
            tensors = {key: tensor.cpu().contiguous() for key, tensor in state.tensors.items()}
            save_file(tensors, beside, metadata={"fewbit": json.dumps(said)})
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            what = f"the training's state could not be written at step {state.step}: {error}"
            raise ResourceError("FB-E0502", what, file=self.path) from error
        self.written = time.monotonic()
        self.took = self.written - started

    def close(self, done: bool) -> None:
        """Ends the lock; with `done`, or where no step was kept, the folder goes."""
        os.close(self._lock)
        if done or not self.path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
