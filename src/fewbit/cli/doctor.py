"""`fewbit doctor`: what this machine has and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Annotated, Any

import typer

from fewbit.cli.output import print_json

OPTIONAL = {
    "transformers": ("fewbit[eval]", "calibrated methods, eval, run"),
    "gguf": ("fewbit[gguf]", "GGUF output and i-quant tables"),
    "matplotlib": ("fewbit[eval]", "plots in reports"),
    "pyarrow": ("fewbit[eval]", "parquet calibration text"),
    "peft": ("fewbit[train]", "QLoRA"),
    "lm_eval": ("fewbit[tasks]", "eval --tasks"),
    "llama_cpp": ("llama-cpp-python", "run through llama.cpp"),
}


def command(json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False) -> None:
    """Versions, devices, memory, optional packages and what each is for."""
    found = examine()
    if json:
        print_json("fewbit.doctor/1", found)
        return
    from fewbit.report.text import human_bytes, render, table

    machine = found["machine"]
    lines = [
        f"fewbit {found['fewbit']}, Python {found['python']}, {machine['system']}",
        f"{machine['cores']} cores ({machine['vectors']}), {human_bytes(machine['memory'])} memory, {human_bytes(machine['memory_free'])} free, "
        f"{human_bytes(machine['disk_free'])} free here",
        f"torch {found['torch']['version']}, {found['torch']['devices'] or 'no GPU: everything runs on the CPU'}",
        f"numba {found['numba']['version']}: {found['numba']['state']}",
    ]
    rows = [
        (name, item["version"] or "missing", item["for"], "" if item["version"] else f"pip install '{item['install']}'")
        for name, item in found["optional"].items()
    ]
    print(render(*lines, "", table([("package", "left"), ("version", "left"), ("for", "left"), ("", "left")], rows)))


def examine() -> dict[str, Any]:
    """All findings as plain data."""
    import psutil
    import torch

    from fewbit import __version__

    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    memory = psutil.virtual_memory()
    return {
        "fewbit": __version__,
        "python": sys.version.split()[0],
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "memory": memory.total,
            "memory_free": memory.available,
            "disk_free": shutil.disk_usage(".").free,
        },
        "torch": {"version": torch.__version__, "devices": ", ".join(devices)},
        "numba": _numba(),
        "optional": {
            name: {"version": _version(name), "install": install, "for": purpose}
            for name, (install, purpose) in OPTIONAL.items()
        },
    }


def _numba() -> dict[str, str]:
    """Whether a kernel compiles here."""
    import numba

    try:
        numba.njit(lambda x: x + 1)(1)
        state = "kernels compile"
    except Exception as error:  # whatever a broken toolchain raises is the finding
        state = f"kernels do not compile ({type(error).__name__}: {error}); the plain paths are used"
    return {"version": numba.__version__, "state": state}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    packages = importlib.metadata.packages_distributions().get(name, [name])
    return importlib.metadata.version(packages[0])
