"""Starting an engine's process and reading its logits, one window in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from fewbit.base.errors import InputError

# name -> (script beside this file, module that its interpreter must have, what to install)
ENGINES = {
    "llama.cpp": ("run_llamacpp.py", "llama_cpp", "llama-cpp-python"),
    "vllm": ("run_vllm.py", "vllm", "vllm"),
    "transformers": ("run_transformers.py", "transformers", "transformers"),
    "gptqmodel": ("run_gptqmodel.py", "gptqmodel", "gptqmodel"),
    "mlx": ("run_mlx.py", "mlx_lm", "mlx-lm"),
}
HIDDEN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP"}


@dataclass(frozen=True)
class Engine:
    """An engine that can run checkpoints.

    Attributes:
        name: of `ENGINES`. python: interpreter that has it. device: "cpu" or "cuda". options: further fields of the job (dtype, cache).
        timeout: seconds after which its process is ended; None to wait as long as it takes.
    """

    name: str
    python: Path
    device: str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()
    timeout: float | None = None

    @contextlib.contextmanager
    def open(self, model: str, tokens: torch.Tensor) -> Iterator[Frames]:
        """While this lasts: (window, positions) -> logits float32 [positions, vocab], windows asked for in order.

        Raises:
            InputError: FB-E0810 when the engine refuses the model or dies.
        """
        with tempfile.TemporaryDirectory(prefix="fewbit-engine-") as folder:
            job = Path(folder) / "job.json"
            facts = {
                "model": str(self._file(model)),
                "tokens": tokens.tolist(),
                "threads": torch.get_num_threads(),
                "device": self.device,
                **dict(self.options),
            }
            job.write_text(json.dumps(facts), encoding="utf-8")
            script = Path(__file__).with_name(ENGINES[self.name][0])
            with open(Path(folder) / "stderr", "w+b") as errors:
                process = subprocess.Popen(
                    [str(self.python), str(script), str(job)], stdout=subprocess.PIPE, stderr=errors, env=_environment()
                )
                watch = threading.Timer(self.timeout, process.kill) if self.timeout else None
                try:
                    assert process.stdout is not None
                    if watch is not None:
                        watch.start()
                    yield Frames(process.stdout, tokens.shape[1], self.name, model, Path(errors.name))
                finally:
                    if watch is not None:
                        watch.cancel()
                    process.kill()
                    process.wait()
                    assert process.stdout is not None
                    process.stdout.close()

    def _file(self, model: str) -> Path:
        """llama.cpp wants the file, not its folder."""
        path = Path(model).expanduser().absolute()
        found = sorted(path.glob("*.gguf")) if self.name == "llama.cpp" and path.is_dir() else []
        return found[0] if found else path


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Frames:
    """The windows of an engine's answer, read as they come; called with a window and positions it gives their logits.

    Attributes:
        version: what the engine calls itself, after the first window.
        missing: parameters that it did not find and filled with random numbers, where it says so.
    """

    def __init__(self, stream: IO[bytes], length: int, engine: str, model: str, errors: Path) -> None:
        self._stream, self._length, self._engine, self._model, self._errors = stream, length, engine, model, errors
        self._window, self._vocab = -1, 0
        self._frame = torch.empty(0)
        self.version, self.missing = "", tuple[str, ...]()

    def __call__(self, window: int, positions: torch.Tensor) -> torch.Tensor:
        if self._window < 0:
            self._begin()
        while self._window < window:
            data = self._stream.read(4 * self._length * self._vocab)
            if len(data) != 4 * self._length * self._vocab:
                raise self._error(f"ended in window {window}")
            self._frame = torch.frombuffer(bytearray(data), dtype=torch.float32).view(self._length, self._vocab)
            self._window += 1
        return self._frame[positions]

    def _begin(self) -> None:
        head = self._stream.readline()
        silent = {"ok": False, "message": "it gave no answer"}
        answer: dict[str, Any] = json.loads(head) if head.startswith(b"{") else silent
        if not answer["ok"]:
            raise self._error(answer["message"])
        self._vocab = int(answer["vocab"])
        self.version, self.missing = str(answer.get("engine", "")), tuple(answer.get("missing", ()))

    def _error(self, what: str) -> InputError:
        last = (
            [line for line in self._errors.read_text(errors="replace").splitlines() if line.strip()][-1:]
            if self._errors.exists()
            else []
        )
        return InputError(
            "FB-E0810", f"{self._engine}: {what}{'; it said: ' + last[0][:300] if last else ''}", file=self._model
        )


def find_engine(name: str, python: str | None = None, device: str = "cpu") -> Engine:
    """An engine by name, in the interpreter given or in ours.

    Raises:
        InputError: FB-E0809 when there is no such engine, or the interpreter lacks it.
    """
    if name not in ENGINES:
        raise InputError("FB-E0809", f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
    _, module, package = ENGINES[name]
    interpreter = Path(python).expanduser() if python else Path(sys.executable)
    check = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 1)"
    try:
        found = (
            subprocess.run(
                [str(interpreter), "-c", check, module], env=_environment(), capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError as error:
        raise InputError("FB-E0809", f"the interpreter cannot be started: {error}", file=interpreter) from None
    if not found:
        raise InputError(
            "FB-E0809",
            f"{interpreter} cannot import {module}",
            remedy=f"pip install {package} there, or name its interpreter with --engine-python",
        )
    return Engine(name, interpreter, device)
