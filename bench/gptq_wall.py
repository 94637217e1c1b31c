"""Wall time and memory of GPTQ on the sample beside llm-compressor's, in turn on a machine that does nothing else.

    FEWBIT_ENVS=… python bench/gptq_wall.py [--rounds 2] > bench/results/gptq_wall.json

int4 g128 asymmetric, the same 128 x 512 calibration tokens. `plain` does what llm-compressor does (no drift correction, no loss weighting, no sweeps), `full` is our
default. Ours are whole processes, imports and all; of llm-compressor both figures are given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.run.calib import calibration
from peers_kl import LENGTH, SAMPLE, SEQUENCES, command, peer

PLAIN = ("drift=false", "loss_weighting=false", "sweeps=0", "trial=false", "search=minmax")
WORK = Path("/tmp/fewbit-gptq-wall")


def ours(sets: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> dict[str, Any]:
    out = WORK / "ours"
    shutil.rmtree(out, ignore_errors=True)
    words = ["quantize", str(SAMPLE), "--to", "compressed-tensors:int4-g128-asym", "--method", "gptq", "-o", str(out)]
    return command([*words, "--no-verify", *flags, *(word for one in sets for word in ("--set", one))])


def theirs(dtype: str) -> dict[str, Any]:
    started = time.perf_counter()
    found = peer("llmcompressor-gptq", 4, WORK / f"theirs-{dtype}", WORK / "tokens.npy", 0, dtype)
    wall = time.perf_counter() - started
    return {"wall": wall, "without_imports": found["seconds"], "cpu": found["cpu"], "peak_mb": found["peak_mb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    np.save(WORK / "tokens.npy", calibration("default", SAMPLE, SEQUENCES, LENGTH, 0, 8192).tokens.numpy())
    runs = {
        "plain": lambda: ours(PLAIN),
        "llmcompressor bfloat16 (its default here)": lambda: theirs("bfloat16"),
        "plain under --ram 0.95GB": lambda: ours(PLAIN, ("--ram", "0.95GB")),
        "llmcompressor float32": lambda: theirs("float32"),
        "plain, --compute float32": lambda: ours(PLAIN, ("--compute", "float32")),
        "full": ours,
    }
    rows = []
    for _ in range(given.rounds):
        for who, run in runs.items():
            rows.append({"who": who, **run()})
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"bench": "gptq_wall", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
