"""Drives strangers: real loaders and rival quantisers, each in an environment of its own, by one JSON job and one JSON result.

    result = run_driver("hf", "transformers", {"model": path, "prompts": [[1, 2, 3]], "logits": tmp_path / "logits.npz"})
    logits = load_arrays(tmp_path / "logits.npz")

The fields of a job and of its result are listed at the head of each file in drivers/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAMP = "fewbit-env.stamp"


class DriverFailed(AssertionError):
    """A stranger refused or crashed; `result` is what it answered, if it did."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def envs_root() -> Path:
    return Path(os.environ.get("FEWBIT_ENVS") or Path.home() / ".cache" / "fewbit-envs").expanduser()


# what the development environment itself can stand in for: env -> modules that it must have, by driver
OURSELVES = {
    "hf": {
        "transformers": ("transformers", "accelerate", "compressed_tensors"),
        "bitsandbytes": ("bitsandbytes",),
        "mlx": ("mlx.core", "mlx_lm"),
    }
}


def interpreter(env: str) -> Path:
    """The Python of an environment; our own where it is not built and ours has all that it is asked for."""
    built = envs_root() / env / "bin" / "python"
    return built if is_built(env) or env not in OURSELVES else Path(sys.executable)


def is_built(env: str) -> bool:
    return (envs_root() / env / STAMP).exists()


def serves(env: str, driver: str) -> bool:
    """Whether an environment, or ours in its place, has what a driver needs."""
    needed = OURSELVES.get(env, {}).get(driver)
    return is_built(env) or (needed is not None and all(map(has_module, needed)))


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def require_env(env: str, driver: str = "") -> None:
    """Skip the test, saying how to build what it lacks; with FEWBIT_REQUIRE_ENGINES set, fail instead."""
    if serves(env, driver):
        return
    message = f"SKIPPED FOR LACK OF AN ENGINE: no {env!r} below {envs_root()}; build it with: python dev/envs.py {env}"
    if os.environ.get("FEWBIT_REQUIRE_ENGINES"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def run_driver(env: str, driver: str, job: dict[str, Any], timeout: float = 280, check: bool = True) -> dict[str, Any]:
    """Run drivers/<driver>_driver.py under the interpreter of `env`; the result, or DriverFailed unless `check` is False."""
    require_env(env, driver)
    script = HERE / "drivers" / f"{driver}_driver.py"
    command = [str(interpreter(env)), str(script)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "env": clean_environment()}
    try:
        done = subprocess.run(command, input=json.dumps(job, default=as_json), timeout=timeout, check=False, **options)
    except subprocess.TimeoutExpired as late:
        raise DriverFailed(
            f"{driver} in {env}: no answer within {timeout:.0f} s", {"ok": False, "error": "Timeout"}
        ) from late
    lines = done.stdout.strip().splitlines()
    crash = {"ok": False, "error": "Crash", "message": f"exit status {done.returncode} and no answer", "traceback": ""}
    result: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else crash
    result["stderr"] = done.stderr[-8000:]
    if check and not result["ok"]:
        raise DriverFailed(
            f"{driver} in {env}: {result['error']}: {result['message']}\n{result['traceback']}\n{done.stderr[-2000:]}",
            result,
        )
    return result


def run_jobs(env: str, driver: str, jobs: list[dict[str, Any]], timeout: float = 900) -> list[dict[str, Any]]:
    """Several jobs in one process of `env`: a result for each, refusals too."""
    return run_driver(env, driver, {"jobs": jobs}, timeout)["results"]


def clean_environment() -> dict[str, str]:
    """Our environment without what would leak our Python into theirs, and with the network off."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}


def as_json(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a job cannot carry a {type(value).__name__}; write arrays to a file and name it")


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def sample_model() -> Path:
    """The shipped sample model: samples/ of this checkout, or the folder shared beside it."""
    places = (ROOT / "samples" / "sample", ROOT / "samples", ROOT.parent / "shared" / "models" / "sample")
    for place in places:
        if (place / "config.json").exists():
            return place
    pytest.skip(f"SKIPPED FOR LACK OF THE SAMPLE MODEL: none of {', '.join(map(str, places))} has a config.json")
