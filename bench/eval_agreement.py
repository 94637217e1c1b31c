"""How far `fewbit eval` is to be trusted: its figures against strangers' and against its own exact computation, on the shipped sample.

FEWBIT_ENVS=… python bench/eval_agreement.py --candidates Q8_0=a.gguf Q4_K_M=b.gguf > bench/results/eval_agreement.json

perplexity     our stream of blocks against a direct loop over the transformers model (1e-4 relative is asked)
llama_cpp      KL and perplexity of GGUF files: logits of base and candidate by llama.cpp's library, summed up as `llama-perplexity
               --kl-divergence` does and as we do; and our own decoded weights on the same tokens, without llama.cpp's rounding of activations
cache          bytes of the compact base as a share of its logits, the stated bound on KL's error, and the error
passes         forward passes that six candidates take
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbit import api
from fewbit.eval.engines.engine import find_engine
from fewbit.eval.fidelity import Options, study
from fewbit.eval.measures import compare

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engines"))
import harness  # noqa: E402
import llama_arithmetic  # noqa: E402

SAMPLE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


def perplexity(tokens: int) -> dict[str, float]:
    """Ours and a plain loop's."""
    import transformers

    found = study([SAMPLE], SAMPLE, Options(text=TEXT, tokens=tokens))
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for row in found.windows.tokens:
            total += float(model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss)
    theirs, ours = math.exp(total / found.windows.tokens.shape[0]), found.scores[0].measures["perplexity"][0]
    return {"tokens": found.scores[0].tokens, "ours": ours, "transformers": theirs, "relative": abs(ours / theirs - 1)}


def llama_cpp(candidates: dict[str, Path], tokens: int) -> list[dict[str, Any]]:
    """Each candidate three times: llama.cpp's logits by its arithmetic, the same by ours, our own logits."""
    engine = find_engine("llama.cpp", str(harness.interpreter("llamacpp")))
    options = Options(text=TEXT, tokens=tokens, length=512, skip=256)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        base = api.quantize(SAMPLE, to="gguf:F32", out=Path(work) / "f32", verify=False).outputs[0]
        chosen = study([SAMPLE], SAMPLE, options).windows
        p = _logits(engine, base, chosen.tokens)
        for name, path in candidates.items():
            q = _logits(engine, path, chosen.tokens)
            theirs = llama_arithmetic.kl_divergence(p.numpy(), q.numpy(), chosen.tokens.numpy(), 256)
            flat = (part[:, 256:-1].reshape(-1, part.shape[-1]) for part in (p, q))
            same = compare(*flat, chosen.tokens[:, 257:].reshape(-1))
            reference = study([path], SAMPLE, options).scores[0].measures
            rows.append(
                {
                    "candidate": name, "tokens": int(same["kl"].numel()),
                    "kl": {"llama-perplexity": theirs["kl"], "ours, same logits": float(same["kl"].mean()), "ours, decoded weights": reference["kl"]},
                    "perplexity": {
                        "llama-perplexity": math.exp(theirs["nll"]), "ours, same logits": math.exp(float(same["nll"].mean())),
                        "ours, decoded weights": reference["perplexity"],
                    },
                }
            )  # fmt: skip
    return rows


def _logits(engine: Any, model: Path, tokens: torch.Tensor) -> torch.Tensor:
    """All logits of an engine, float32 [windows, length, vocab]."""
    everywhere = torch.arange(tokens.shape[1])
    with engine.open(str(model), tokens) as logits:
        return torch.stack([logits(window, everywhere).clone() for window in range(tokens.shape[0])])


def cache(candidate: Path, tokens: int) -> dict[str, float]:
    """What the compact base costs in bytes and in certainty."""
    exact = study([candidate], SAMPLE, Options(text=TEXT, tokens=tokens)).scores[0].measures["kl"][0]
    with tempfile.TemporaryDirectory() as work:
        found = study([candidate], SAMPLE, Options(text=TEXT, tokens=tokens, cache=Path(work)))
    kl, bound = found.scores[0].measures["kl"][0], found.scores[0].kl_slack
    share = found.resources["cache_bytes"] / found.resources["full_logits_bytes"]
    return {
        "tokens": found.scores[0].tokens, "share_of_logits": share, "kl_exact": exact, "kl_from_cache": kl,
        "error": abs(kl - exact) / exact, "stated_bound": bound / exact,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", required=True, help="NAME=FILE.gguf, the one of Q4_K's loss first")
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    candidates = {name: Path(path) for name, _, path in (word.partition("=") for word in given.candidates)}
    first = next(iter(candidates.values()))
    six = study([first] * 6, SAMPLE, Options(text=TEXT, tokens=1024))
    found = {
        "perplexity": perplexity(given.tokens),
        "llama_cpp": llama_cpp(candidates, given.tokens),
        "cache": cache(first, given.tokens),
        "passes": {"candidates": 6, "forward_passes": six.resources["forward_passes"]},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
