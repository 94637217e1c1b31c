"""The real loader's word: an engine opens a checkpoint in a process of its own, and its log probabilities are held against ours.

The engine may live in another Python environment, so it gets a small program and answers with one file; nothing of fewbit is imported there. Ours are
computed from the decoded weights, with activations quantised as the scheme says. For every position of some fixed tokens the log probability of the next one is
compared: engines compute in 16 bits, so the mean difference has a bound, not a zero.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.base.record import plain
from fewbit.eval.stream import Runner
from fewbit.run.source import Source

WINDOWS, LENGTH = 2, 48
BOUND = 0.1  # mean |difference| of log probabilities, nats; a lost scale or a wrong zero point costs several

_TRANSFORMERS = """
import json, sys
import numpy as np, torch, transformers
job = json.load(open(sys.argv[1]))
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    job["model"], dtype=getattr(torch, job["dtype"]), local_files_only=True, output_loading_info=True)
missing = sorted(map(str, info.get("missing_keys", ()))) + sorted(map(str, info.get("mismatched_keys", ())))
ids = torch.tensor(job["tokens"])
with torch.inference_mode():
    scores = torch.log_softmax(model.eval()(ids).logits.double(), -1)[:, :-1]
own = scores.gather(-1, ids[:, 1:, None])[..., 0]
np.savez(job["out"], own=own.numpy(), missing=np.array(missing, dtype=str), version=transformers.__version__)
"""
_VLLM = """
import json, os, sys
job = json.load(open(sys.argv[1]))
for key, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(key, value)
import numpy as np, vllm
engine = vllm.LLM(model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, disable_log_stats=True)
wish = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["tokens"]], wish, use_tqdm=False)
own = [[table[token].logprob for token, table in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in outputs]
np.savez(job["out"], own=np.array(own), missing=np.array([], dtype=str), version=vllm.__version__)
sys.stdout.flush()
os._exit(0)
"""
# engine -> (program, dtype it computes in)
PROBES: dict[str, tuple[str, str]] = {"transformers": (_TRANSFORMERS, "float32"), "vllm": (_VLLM, "bfloat16")}


@dataclass(frozen=True)
class Opened:
    """What an engine made of a checkpoint.

    Attributes:
        engine, version: who opened it.
        problem: why it is not well, None when it is.
        difference: mean |difference| of log probabilities from ours, nats; NaN when it did not load.
        missing: parameters that the engine did not find and filled with random numbers.
    """

    engine: str
    version: str
    problem: str | None
    difference: float
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.problem is None

    def record(self) -> dict[str, object]:
        return {**plain(self), "ok": self.ok}


def open_with(
    engine: str, source: Source, *, python: str | None = None, timeout: float = 1800.0, bound: float = BOUND
) -> Opened:
    """Opens a checkpoint with a real loader and compares log probabilities with ours.

    Args:
        engine: transformers or vllm.
        source: the checkpoint, open.
        python: interpreter of the environment that has the engine; None for our own.
        timeout: seconds for loading and running.
        bound: what the mean difference may be, nats.

    Raises:
        InputError: FB-E0821 for an engine that there is no probe for.
    """
    if engine not in PROBES:
        raise InputError("FB-E0821", f"no loader is called {engine!r}; there are {', '.join(PROBES)}")
    tokens, ours = own_logprobs(source)
    program, dtype = PROBES[engine]
    with tempfile.TemporaryDirectory(prefix="fewbit-engine-") as work:
        script, job, out = Path(work) / "probe.py", Path(work) / "job.json", Path(work) / "out.npz"
        script.write_text(program)
        job.write_text(
            json.dumps({"model": str(source.root), "tokens": tokens.tolist(), "dtype": dtype, "out": str(out)})
        )
        try:
            done = subprocess.run(
                [python or sys.executable, str(script), str(job)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Opened(engine, "", f"gave no answer within {timeout:.0f} s", float("nan"))
        if not out.is_file():
            last = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
            return Opened(engine, "", f"did not load it: {last[-1][:500]}", float("nan"))
        with np.load(out) as answer:
            theirs, missing, version = answer["own"], tuple(answer["missing"].tolist()), str(answer["version"])
    difference = float(np.abs(theirs - ours.numpy()).mean())
    problem = None
    if missing:
        problem = (
            f"did not find {len(missing)} parameter(s) and filled them with random numbers: {', '.join(missing[:3])}"
        )
    elif not difference <= bound:
        problem = f"differs from the decoded weights by {difference:.3g} nats a token, {bound:g} allowed"
    return Opened(engine, version, problem, difference, missing)


def own_logprobs(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64 [windows, length], log probability of each next token float64 [windows, length - 1]) from the decoded weights."""
    runner = Runner(source)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, runner.vocab, (WINDOWS, LENGTH), generator=generator)
    store = runner.hidden(tokens)
    rows = torch.cat([store.get(batch) for batch in range(len(store))])
    found = []
    for window in range(WINDOWS):
        scores = torch.log_softmax(runner.logits(tokens[window : window + 1], rows[window : window + 1]).double(), -1)
        found.append(scores[:-1].gather(-1, tokens[window, 1:, None])[:, 0])
    return tokens, torch.stack(found)
