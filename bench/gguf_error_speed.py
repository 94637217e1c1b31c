"""Error and speed of every GGUF block type against llama.cpp's ggml_quantize_chunk, both in one run on the same weights and threads.

    FEWBIT_ENVS=... PYTHONPATH=src python bench/gguf_error_speed.py [--types Q4_K,IQ2_S] [--threads 1] [--repeat 5] [--out FILE.json]

Error: sum h (w - w_hat)^2 of ours over ggml's, per type, with importance h, on three layers of the sample model and on Gaussian, Laplace and
Student-t (3 degrees of freedom) rows; `worst` is the largest of these. Speed: nanoseconds per weight from float32 rows to packed
bytes with importance, ours and ggml's in turn, medians over the repetitions (of the ratios too, so that what slows the machine down for a while
slows both), as wall clock and as CPU time of the process (the one to trust on a machine that does other work).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "engines"), str(ROOT / "src")]

import ggml  # noqa: E402

from fewbit.formats.gguf.codecs import to_blocks  # noqa: E402
from fewbit.formats.gguf.types import FLOATS, TYPES  # noqa: E402
from fewbit.math.scales import quantize  # noqa: E402

LAYERS = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
    "model.layers.7.mlp.gate_proj.weight",
)
SLOW = 96 * 1024  # weights that ggml is timed on where it takes hundreds of nanoseconds each


def weights(sample: Path) -> dict[str, np.ndarray]:
    """Named float32 matrices."""
    rng, found = np.random.default_rng(1), {}
    with safe_open(sample / "model.safetensors", framework="pt") as file:
        for name in LAYERS:
            found[name] = file.get_tensor(name).float().numpy()
    shape = (64, 4096)
    found["gauss"], found["laplace"] = rng.standard_normal(shape), rng.laplace(size=shape)
    found["student-t"] = rng.standard_t(3, size=shape)
    return {name: np.ascontiguousarray(w * (1 if "." in name else 0.02), np.float32) for name, w in found.items()}


def importance(cols: int) -> np.ndarray:
    return np.exp(np.random.default_rng(cols).standard_normal(cols)).astype(np.float32)


def ours(name: str, w: np.ndarray, h: np.ndarray | None) -> np.ndarray:
    q = quantize(TYPES[name].scheme, torch.from_numpy(w), None if h is None else torch.from_numpy(h))
    return to_blocks(name, q).numpy()


def error(name: str, data: np.ndarray, w: np.ndarray, h: np.ndarray) -> float:
    back = ggml.dequantize(name, data, w.shape[1]).astype(np.float64)
    return float((h * (back - w) ** 2).sum())


def timed(function: Callable[[], Any], count: int) -> tuple[float, float]:
    """(wall, CPU) nanoseconds per weight."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return (time.perf_counter() - wall) * 1e9 / count, (time.process_time() - cpu) * 1e9 / count


def speed(name: str, w: np.ndarray, h: np.ndarray | None, threads: int, repeat: int) -> dict[str, float]:
    few = w[: max(1, SLOW // w.shape[1])] if name.startswith("IQ") else w
    ours(name, w, h)
    ggml.quantize(name, few[:1], h)
    mine, theirs = [], []
    for _ in range(repeat):
        mine.append(timed(lambda: ours(name, w, h), w.size))
        theirs.append(timed(lambda: ggml.quantize(name, few, h, threads), few.size))
    found = {}
    for at, clock in enumerate(("wall", "cpu")):
        a, b = statistics.median(t[at] for t in mine), statistics.median(t[at] for t in theirs)
        ratio = statistics.median(other[at] / own[at] for own, other in zip(mine, theirs, strict=True))
        found |= {f"ours_{clock}_ns": round(a, 2), f"ggml_{clock}_ns": round(b, 2), f"{clock}_ratio": round(ratio, 2)}
    return found


def measure(name: str, cases: dict[str, np.ndarray], threads: int, repeat: int) -> dict[str, Any]:
    ratios, valid = {}, True
    for case, w in cases.items():
        h = importance(w.shape[1])
        data = ours(name, w, h)
        valid = valid and ggml.validate(name, data)
        ratios[case] = round(error(name, data, w, h) / error(name, ggml.quantize(name, w, h), w, h), 4)
    w = np.tile(cases["gauss"], (4, 1))
    row = {
        "error": ratios,
        "worst": max(ratios.values()),
        "valid": valid,
        "speed": speed(name, w, importance(w.shape[1]), threads, repeat),
    }
    if not ggml.requires_imatrix(name):
        row["speed_without_importance"] = speed(name, w, None, threads, repeat)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(name for name in TYPES if name not in FLOATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--sample", type=Path, default=Path(os.environ.get("FEWBIT_SAMPLE", ROOT / "samples" / "sample"))
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    numba.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    cases = weights(options.sample)
    result: dict[str, Any] = {
        "threads": options.threads,
        "repeat": options.repeat,
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg(),
        "types": {},
    }
    for name in options.types.split(","):
        row = result["types"][name] = measure(name, cases, options.threads, options.repeat)
        pace = row["speed"]
        print(
            f"{name:8} worst error {row['worst']:.4f}  ours {pace['ours_cpu_ns']:7.2f}  ggml {pace['ggml_cpu_ns']:7.2f} ns  x{pace['cpu_ratio']}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
