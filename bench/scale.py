"""Data-free quantisation at scale: peak memory over model sizes, and time against plain copying of the same files on the same disk.

    python bench/scale.py --sizes 1 2 4 8 --folder /big/disk --to compressed-tensors:int4-g128 [--set search=absmax]

For each size: a random checkpoint is made, then in turn (median of --rounds) the input is read and the output written by plain copying, and
the job is run in a process of its own whose peak memory is what the kernel counted. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from make_checkpoint import make

CHUNK = 8 << 20


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that each measurement reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_time(source: Path, output: Path, place: Path) -> float:
    """Seconds to read every byte of the input and to write as many bytes as the output has, fsync included."""
    forget(source)
    started = time.perf_counter()
    for path in source.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
    total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    block = os.urandom(CHUNK)
    with open(place, "wb", buffering=0) as file:
        for _ in range(0, total, CHUNK):
            file.write(block)
        os.fsync(file.fileno())
    place.unlink()
    return time.perf_counter() - started


def job(source: Path, output: Path, target: str, options: list[str]) -> tuple[float, int, dict]:
    """(seconds, peak bytes, the job's own record)."""
    forget(source)
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "fewbit.cli.main",
        "quantize",
        str(source),
        "--to",
        target,
        "-o",
        str(output),
        "--json",
        "--no-verify",
        *options,
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        json.loads(done.stdout),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--to", default="compressed-tensors:int4-g128")
    parser.add_argument("--set", dest="options", action="append", default=[])
    parser.add_argument("--ram", default="2GB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    flags = ["--ram", given.ram, *(word for option in given.options for word in ("--set", option))]
    rows = []
    for size in given.sizes:
        source = given.folder / f"random-{size}b"
        if not source.exists():
            make(source, size)
        output, place = given.folder / f"out-{size}b", given.folder / "copy.tmp"
        seconds, copies, peaks, record = [], [], [], {}
        for _ in range(given.rounds):
            took, _, record = job(source, output, given.to, flags)
            seconds.append(took)
            peaks.append(record["peak_bytes"])
            copies.append(copy_time(source, output, place))
        rows.append(
            {
                "billions": size,
                "target": given.to,
                "options": given.options,
                "input_bytes": sum(path.stat().st_size for path in source.rglob("*.safetensors")),
                "output_bytes": record["outputs"][0]["bytes"],
                "job_seconds": statistics.median(seconds),
                "copy_seconds": statistics.median(copies),
                "speed_relative_to_copying": statistics.median(copies) / statistics.median(seconds),
                "peak_bytes": max(peaks),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(output)
    print(json.dumps({"bench": "scale", "cores": os.cpu_count(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
