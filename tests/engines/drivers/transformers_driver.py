"""Loads a checkpoint directory with transformers on the CPU. Env: hf (hf-ct17 for asymmetric compressed-tensors; gptqmodel for GPTQ, AWQ).

Job:  model         directory
      dtype         "float32" (default) | "bfloat16" | "float16"
      prompts       lists of token ids
      logits        .npz to write: one float32 [tokens, vocab] per prompt, named "0", "1", ...
      generate      greedy tokens to add to each prompt (default 0)
      dequantize    true: ask for dense weights at load (compressed-tensors, fp8, mxfp4)
      weights       .npz to write: the loaded model's dense floating parameters, float32, by name
      attention     attention implementation (default "eager")
Result: missing_keys, unexpected_keys, mismatched_keys, generated, parameters, load_seconds
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from _wire import Job, Result, serve

DEQUANTISING = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}


def load_options(job: Job) -> dict[str, object]:
    options: dict[str, object] = {
        "dtype": getattr(torch, job.get("dtype", "float32")),
        "attn_implementation": job.get("attention", "eager"),
        "local_files_only": True,
        "output_loading_info": True,
    }
    if job.get("dequantize"):
        config = json.loads((Path(job["model"]) / "config.json").read_text())
        method = config["quantization_config"]["quant_method"]
        options["quantization_config"] = getattr(transformers, DEQUANTISING[method])(dequantize=True)
    return options


def handle(job: Job) -> Result:
    start = time.monotonic()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(job["model"], **load_options(job))
    model.eval()
    result: Result = {
        "load_seconds": round(time.monotonic() - start, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        result[kind] = sorted(str(key) for key in info.get(kind, ()))
    prompts = [torch.tensor([ids], dtype=torch.long) for ids in job.get("prompts", ())]
    with torch.inference_mode():
        if job.get("logits"):
            arrays = {str(i): model(ids).logits[0].float().numpy() for i, ids in enumerate(prompts)}
            np.savez(job["logits"], **arrays)
        if job.get("generate"):
            result["generated"] = [greedy(model, ids, job["generate"]) for ids in prompts]
        if job.get("weights"):
            dense = {name: t.float().numpy() for name, t in model.state_dict().items() if t.dtype.is_floating_point}
            np.savez(job["weights"], **dense)
    return result


def greedy(model: transformers.PreTrainedModel, ids: torch.Tensor, count: int) -> list[int]:
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    grown = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return grown[0, ids.shape[1] :].tolist()


if __name__ == "__main__":
    serve(handle, ("transformers", "compressed-tensors", "torch", "bitsandbytes", "torchao", "gptqmodel", "optimum"))
