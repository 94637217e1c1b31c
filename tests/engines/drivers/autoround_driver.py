"""Quantises a model directory with AutoRound, as a rival to compare with. Env: autoround.

Job:  model         directory;  out: directory to write
      bits, group_size, sym     (default 4, 128, true);  data_type: "int" (default) | "mx_fp" | "nv_fp" | ...
      iters         signed-gradient steps per block (default 200; 0 is round to nearest)
      calibration   lists of token ids of equal length, or an .npy of shape [sequences, tokens]
      format        "auto_round" (default) | "auto_gptq" | "auto_awq" | "llm_compressor" | "gguf:q4_k_m" | ...
      batch         tuning batch (default 8);  options: more arguments of AutoRound (lr, enable_alg_ext, ...)
Result: seconds (tuning and saving together, as AutoRound does both at once), model_dir (AutoRound picks a folder below `out`),
        files (name -> bytes)
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from _wire import Job, Result, calibration, serve
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def handle(job: Job) -> Result:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    ids = torch.tensor(calibration(job), dtype=torch.long)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    batch = min(job.get("batch", 8), max(len(rows), 1))
    start = time.monotonic()
    rounder = AutoRound(
        model,
        tokenizer,
        bits=job.get("bits", 4),
        group_size=job.get("group_size", 128),
        sym=job.get("sym", True),
        data_type=job.get("data_type", "int"),
        iters=job.get("iters", 200),
        dataset=DataLoader(rows, batch_size=batch),
        nsamples=len(rows),
        seqlen=ids.shape[1] if len(rows) else 512,
        batch_size=batch,
        device_map="cpu",
        enable_torch_compile=False,
        **job.get("options", {}),
    )
    rounder.quantize_and_save(job["out"], format=job.get("format", "auto_round"))
    written = sorted(path for path in Path(job["out"]).rglob("*") if path.is_file())
    homes = [path.parent for path in written if path.name == "config.json" or path.suffix == ".gguf"]
    return {
        "seconds": round(time.monotonic() - start, 3),
        "model_dir": str(homes[0]) if homes else None,
        "files": {path.name: path.stat().st_size for path in written},
    }


if __name__ == "__main__":
    serve(handle, ("auto-round", "transformers", "torch"))
