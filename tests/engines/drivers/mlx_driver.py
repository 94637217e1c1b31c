"""Decodes and runs MLX checkpoints with mlx on the CPU (Linux). Env: hf.

Job:  model         directory with model.safetensors and config.json
      weights       .npz to write: every weight, quantised ones through mx.dequantize, float32, by module name
      prompts, logits, generate     as in transformers_driver.py, through mlx-lm's own loader and model code
      dtype         what to compute in (default "float32")
      quantize      {"weight": .npy float32 [out, in], "out": .npz, "bits": 4, "group_size": 64, "mode": "affine" | "mxfp4" | ...}:
                    mx.quantize instead; writes codes (uint32), scales, biases (affine only), dequantised
Result: quantised (module -> its parameters), generated, load_seconds
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _wire import Job, Result, serve

PARAMETERS = ("bits", "group_size", "mode")


def float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def quantize(job: Job) -> Result:
    wish = job["quantize"]
    parameters = {name: wish[name] for name in PARAMETERS if name in wish}
    parts = mx.quantize(mx.array(np.load(wish["weight"])), **parameters)
    names = ("codes", "scales", "biases")[: len(parts)]
    arrays = {
        name: np.array(part) if part.dtype in (mx.uint32, mx.uint8) else float32(part)
        for name, part in zip(names, parts, strict=True)
    }
    np.savez(wish["out"], dequantised=float32(mx.dequantize(*parts, **parameters)), **arrays)
    return {"shapes": {name: list(array.shape) for name, array in arrays.items()}}


def module_parameters(config: dict[str, Any], module: str) -> dict[str, Any]:
    """What config.json says of one module: its own entry, else the defaults."""
    quantization = config["quantization"]
    own = quantization.get(module)
    return {name: value for name, value in (own or quantization).items() if name in PARAMETERS}


def decode(job: Job) -> dict[str, Any]:
    """Write every dense weight; answer which modules were quantised, and how."""
    home = Path(job["model"])
    config = json.loads((home / "config.json").read_text())
    tensors: dict[str, mx.array] = {}
    for shard in sorted(home.glob("*.safetensors")):
        tensors |= mx.load(str(shard))
    dense, quantised = {}, {}
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" not in tensors:
            dense[name] = float32(array)
            continue
        quantised[module] = parameters = module_parameters(config, module)
        parts = (array, tensors[f"{module}.scales"], tensors.get(f"{module}.biases"))
        dense[name] = float32(mx.dequantize(*parts, **parameters))
    np.savez(job["weights"], **dense)
    return quantised


def handle(job: Job) -> Result:
    if job.get("quantize"):
        return quantize(job)
    result: Result = {"quantised": decode(job)} if job.get("weights") else {}
    if not job.get("prompts"):
        return result
    from mlx_lm.utils import load_model

    start = time.monotonic()
    model, _ = load_model(Path(job["model"]), strict=True)
    model.set_dtype(getattr(mx, job.get("dtype", "float32")))
    result["load_seconds"] = round(time.monotonic() - start, 3)
    logits = [float32(model(mx.array([ids]))[0]) for ids in job["prompts"]]
    if job.get("logits"):
        np.savez(job["logits"], **{str(i): array for i, array in enumerate(logits)})
    if job.get("generate"):
        result["generated"] = [greedy(model, ids, job["generate"]) for ids in job["prompts"]]
    return result


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    grown = list(ids)
    for _ in range(count):
        grown.append(int(mx.argmax(model(mx.array([grown]))[0, -1]).item()))
    return grown[len(ids) :]


if __name__ == "__main__":
    serve(handle, ("mlx", "mlx-lm"))
