"""A checkpoint run by vLLM: log probabilities of the whole vocabulary at every prompt position. Runs under vLLM's interpreter.

Log probabilities are logits up to a constant for each position, which no measure depends on.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
wire = importlib.import_module("wire")


def run(job: dict[str, Any]) -> tuple[int, str, Any]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm, np = importlib.import_module("vllm"), importlib.import_module("numpy")
    length = max(len(ids) for ids in job["tokens"])
    engine = vllm.LLM(
        model=job["model"], dtype=job.get("dtype", "float32"), skip_tokenizer_init=True, enforce_eager=True, max_model_len=length + 1,
        max_logprobs=-1, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    wish = vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=-1, detokenize=False)
    vocab = int(engine.llm_engine.model_config.get_vocab_size())

    def frames() -> Any:
        for ids in job["tokens"]:
            (output,) = engine.generate([{"prompt_token_ids": ids}], wish, use_tqdm=False)
            table = np.full((len(ids), vocab), -1e4, np.float32)
            for position, row in enumerate(
                output.prompt_logprobs[1:]
            ):  # row i + 1 is the prediction made at position i
                table[position, list(row)] = [entry.logprob for entry in row.values()]
            yield table  # the last position predicts nothing that is scored

    return vocab, f"vllm {vllm.__version__}", frames()


if __name__ == "__main__":
    wire.serve(run)
