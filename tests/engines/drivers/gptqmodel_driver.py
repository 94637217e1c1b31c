"""Opens GPTQ and AWQ checkpoints with gptqmodel's own loader, or quantises with it as a rival. Env: gptqmodel.

For loading through transformers in the same environment, use transformers_driver.py.

Job:  model         directory
      backend       gptqmodel's kernel (default "torch")
      prompts, logits, generate     as in transformers_driver.py
      quantize      {"out": directory, "bits", "group_size", "sym", "desc_act", "format": "gptq" | "gptq_v2" | ..., ...}: QuantizeConfig
                    arguments; `calibration`: lists of token ids, or an .npy of shape [sequences, tokens]
Result: load_seconds, generated, kernels (class name -> count), or quantize_seconds, save_seconds, files, losses
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from _wire import Job, Result, calibration, serve

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # with its default of one on a small machine the loader's pool of two cannot start

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def quantize(job: Job) -> Result:
    wish = dict(job["quantize"])
    out = wish.pop("out")
    model = GPTQModel.load(job["model"], QuantizeConfig(device="cpu", **wish))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration(job)]
    start = time.monotonic()
    model.quantize(rows, batch_size=1)
    quantize_seconds, start = time.monotonic() - start, time.monotonic()
    model.save(out)
    return {
        "quantize_seconds": round(quantize_seconds, 3),
        "save_seconds": round(time.monotonic() - start, 3),
        "files": {path.name: path.stat().st_size for path in sorted(Path(out).iterdir())},
    }


def handle(job: Job) -> Result:
    if job.get("quantize"):
        return quantize(job)
    start = time.monotonic()
    loaded = GPTQModel.load(job["model"], backend=BACKEND(job.get("backend", "torch")), device="cpu")
    model = loaded.model.eval()
    result: Result = {"load_seconds": round(time.monotonic() - start, 3)}
    result["kernels"] = dict(Counter(type(m).__name__ for m in model.modules() if hasattr(m, "qweight")))
    prompts = [torch.tensor([ids], dtype=torch.long) for ids in job.get("prompts", ())]
    with torch.inference_mode():
        if job.get("logits"):
            np.savez(job["logits"], **{str(i): model(ids).logits[0].float().numpy() for i, ids in enumerate(prompts)})
        if job.get("generate"):
            count = job["generate"]
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            grown = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in prompts]
            result["generated"] = [g[0, ids.shape[1] :].tolist() for g, ids in zip(grown, prompts, strict=True)]
    return result


if __name__ == "__main__":
    serve(handle, ("gptqmodel", "transformers", "optimum", "torch"))
