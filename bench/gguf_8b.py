"""The whole job: a Hugging Face checkpoint in BF16 to a GGUF in one command under a memory limit, beside convert + llama-quantize.

    FEWBIT_ENVS=… python bench/gguf_8b.py --model random-8b --folder /big/disk [--to Q4_K_M] [--ram 2GB] [--pair] [--out FILE.json]

Ours is one process of its own; its peak of resident memory is what the kernel counted, its time the wall clock from an empty page cache.
--verify lets it also decode every tensor again, as it does by default. --pair makes the same file llama.cpp's way: a BF16 GGUF (written by us:
upstream's converter would have to hold it too) and then llama.cpp's own llama_model_quantize on it, in a process of its own; both are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE_TYPES = {"Q4_K_M": 15, "Q4_K_S": 14, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q3_K_M": 12, "Q2_K": 10}


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that each measurement reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], environment: dict[str, str], stdin: str = "") -> dict[str, Any]:
    """Wall and CPU seconds and the peak of resident bytes of a command, and what it printed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment)
        feed = threading.Thread(target=lambda: (process.stdin.write(stdin.encode()), process.stdin.close()))
        feed.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        feed.join()
        out.seek(0)
        err.seek(0)
        text, said = out.read().decode(), err.read().decode("utf-8", "replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    seconds = time.perf_counter() - started
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "printed": text,
    }


def ours(model: Path, target: str, out: Path, ram: str, verify: bool) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    forget(model)
    words = ["quantize", str(model), "--to", f"gguf:{target}", "-o", str(out), "--ram", ram, "--json"]
    command = [sys.executable, "-m", "fewbit.cli.main", *words, *([] if verify else ["--no-verify"])]
    found = timed(command, {**os.environ, "PYTHONPATH": str(ROOT / "src")})
    found.pop("printed")
    file = next(out.glob("*.gguf"))
    return {**found, "bytes": file.stat().st_size, "file": str(file)}


def theirs(gguf: Path, target: str, out: Path, threads: int) -> dict[str, Any]:
    """llama_model_quantize of a BF16 GGUF."""
    forget(gguf.parent)
    python = Path(os.environ["FEWBIT_ENVS"]) / "llamacpp" / "bin" / "python"
    job = {"model": str(gguf), "quantize": {"out": str(out), "ftype": FILE_TYPES[target]}, "threads": threads}
    command = [str(python), str(ROOT / "tests" / "engines" / "drivers" / "llamacpp_driver.py")]
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    found = timed(command, clean, json.dumps(job))
    answer = json.loads(found.pop("printed").strip().splitlines()[-1])
    if not answer["ok"]:
        raise RuntimeError(f"llama.cpp: {answer['message']}")
    return {**found, "bytes": out.stat().st_size}


def weights_of(model: Path) -> int:
    """Parameters of a checkpoint, from its headers."""
    sys.path.insert(0, str(ROOT / "src"))
    from fewbit.store.checkpoint import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        return sum(info.numel for info in checkpoint.manifest.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--to", default="Q4_K_M", choices=FILE_TYPES)
    parser.add_argument("--ram", default="2GB")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--pair", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    count, threads = weights_of(given.model), os.cpu_count() or 1
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "bench": "gguf_8b", "model": given.model.name, "weights": count, "to": given.to, "ram": given.ram, "threads": threads,
        "input_bytes": sum(path.stat().st_size for path in given.model.glob("*.safetensors")),
        "machine": platform.processor() or platform.machine(), "load": os.getloadavg(), "verify": given.verify,
    }  # fmt: skip
    result["fewbit"] = ours(given.model, given.to, folder / "ours", given.ram, given.verify)
    result["fewbit"]["ns_per_weight"] = round(result["fewbit"]["seconds"] * 1e9 / count, 2)
    if given.pair:
        shutil.rmtree(folder / "ours")
        converted = ours(given.model, "BF16", folder / "bf16", given.ram, False)
        made = theirs(Path(converted["file"]), given.to, folder / "theirs.gguf", threads)
        seconds = converted["seconds"] + made["seconds"]
        result["llama.cpp"] = {
            "convert": converted,
            "quantize": made,
            "seconds": seconds,
            "ns_per_weight": round(seconds * 1e9 / count, 2),
        }
        result["ratio"] = round(seconds / result["fewbit"]["seconds"], 2)
        spent = converted["cpu_seconds"] + made["cpu_seconds"]  # what to trust on a machine that does other work
        result["cpu_ratio"] = round(spent / result["fewbit"]["cpu_seconds"], 2)
        result["peak_ratio"] = round(
            result["fewbit"]["peak_bytes"] / max(converted["peak_bytes"], made["peak_bytes"]), 2
        )
        (folder / "theirs.gguf").unlink()
        shutil.rmtree(folder / "bf16")
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
