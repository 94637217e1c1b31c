"""Quantises a model directory with llm-compressor, as a rival to compare with. Env: llmcompressor.

Job:  model         directory;  out: directory to write (compressed-tensors)
      method        "rtn" (default) | "gptq" | "awq" (AWQ scaling, then rtn) | "awq+gptq"
      weights       compressed-tensors QuantizationArgs, e.g. {"num_bits": 4, "type": "int", "symmetric": false,
                    "strategy": "group", "group_size": 128};  activations: the same for inputs (default none)
      ignore        module names or "re:" patterns left alone (default ["lm_head"])
      calibration   lists of token ids, or an .npy of shape [sequences, tokens] (not for rtn)
      options       more arguments of GPTQModifier: dampening_frac, actorder, block_size
      dtype         "float32" | "bfloat16" (default: as stored);  batch: calibration batch (default 1)
Result: quantize_seconds, save_seconds, files (name -> bytes)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from _wire import Job, Result, calibration, serve
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

if not torch.accelerator.is_available():  # AWQ pins its cache even where there is nothing to pin it for, and fails
    IntermediatesCache.pin_memory = lambda self, batch_index: None


def recipe(job: Job) -> list[Any]:
    method = job.get("method", "rtn")
    group = {"targets": ["Linear"], "weights": job["weights"], "input_activations": job.get("activations")}
    common = {"config_groups": {"group_0": group}, "ignore": job.get("ignore", ["lm_head"])}
    steps: list[Any] = [AWQModifier()] if method.startswith("awq") else []
    if method.endswith("gptq"):
        return [*steps, GPTQModifier(**common, **job.get("options", {}))]
    return [*steps, QuantizationModifier(**common)]


def handle(job: Job) -> Result:
    dtype = getattr(torch, job["dtype"]) if job.get("dtype") else "auto"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True)
    rows = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        for ids in calibration(job)
    ]
    arguments: dict[str, Any] = {"model": model, "recipe": recipe(job)}
    if rows:
        loader = DataLoader(rows, batch_size=job.get("batch", 1))
        arguments |= {
            "dataset": loader,
            "num_calibration_samples": len(rows),
            "max_seq_length": max(len(r["input_ids"]) for r in rows),
        }
    start = time.monotonic()
    oneshot(**arguments)
    quantize_seconds, start = time.monotonic() - start, time.monotonic()
    model.save_pretrained(job["out"], save_compressed=True)
    return {
        "quantize_seconds": round(quantize_seconds, 3),
        "save_seconds": round(time.monotonic() - start, 3),
        "files": {path.name: path.stat().st_size for path in sorted(Path(job["out"]).iterdir())},
    }


if __name__ == "__main__":
    serve(handle, ("llmcompressor", "compressed-tensors", "transformers", "torch"))
