"""GPTQ of one linear: ours, a straightforward torch loop, and llm-compressor's own function in its own environment. JSON on stdout.

    python bench/gptq_linear.py [--rows 4096 --cols 14336 --tokens 16384 --scheme int4-g128-asym] [--peer /work/env/llmcompressor/bin/python]

All three get the same weights and the same gram, min-max group scales, block 128, damping 0.01. Ours is measured three times: bare (same work as the
others), as it comes (scale search, trial, sweeps, comparison with rounding to nearest), and by parts: gram, factorisation, loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve import gptq
from fewbit.solve.gptq import SOLVER

BARE = {"search": "minmax", "refit": False, "trial": False, "sweeps": 0, "drift": False}

PEER = """
import json, sys, time, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
torch.set_num_threads(int(sys.argv[2]))
held = torch.load(sys.argv[1])
w, gram = held["w"], held["gram"]
group = w.view(w.shape[0], -1, 128)
low, high = group.amin(-1).clamp(max=0), group.amax(-1).clamp(min=0)
scale = ((high - low) / 15).clamp(min=1e-8)
zero = (-low / scale).round().clamp(0, 15).to(torch.int8) - 8
args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=128)
start = time.perf_counter()
quantised = quantize_weight(w[None].clone(), gram[None].clone(), scale[None], zero[None], None, args)[0][0]
seconds = time.perf_counter() - start
miss = (quantised - w).double()
loss = sum(float(((miss[i : i + 256] @ gram.double()) * miss[i : i + 256]).sum()) for i in range(0, len(w), 256))
print(json.dumps({"seconds": seconds, "loss": loss}))
"""


def plain_gptq(w: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """GPTQ as papers print it: inverse by Cholesky, blocks of 128, column by column in torch; int4, groups of 128, min-max."""
    w, h = w.clone(), gram.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.zeros_like(w)
    for a in range(0, w.shape[1], 128):
        b = min(a + 128, w.shape[1])
        block, local = w[:, a:b].clone(), inverse[a:b, a:b]
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-8)
        zero = (-low / scale).round()
        errors = torch.zeros_like(block)
        for j in range(b - a):
            value = ((block[:, j] / scale + zero).round().clamp(0, 15) - zero) * scale
            error = (block[:, j] - value) / local[j, j]
            block[:, j:] -= error[:, None] * local[j, j:]
            out[:, a + j], errors[:, j] = value, error
        w[:, b:] -= errors @ inverse[a:b, b:]
    return out


def output_error(w: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    total = 0.0
    for i in range(0, len(w), 512):
        miss = found[i : i + 512] - w[i : i + 512]
        total += float(((miss @ gram) * miss).double().sum())
    return total


@contextmanager
def clocked(module, name: str, spent: dict[str, float]):
    """While this lasts, seconds spent in a function of a module are added up under its name."""
    real = getattr(module, name)

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, real)


def timed(function, *args):
    start = time.perf_counter()
    found = function(*args)
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 4096), ("cols", 14336), ("tokens", 16384), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scheme", default="int4-g128-asym")
    parser.add_argument("--peer", default="/work/env/llmcompressor/bin/python")
    parser.add_argument("--no-full", action="store_true", help="leave out our solver as it comes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(args.rows, args.cols, generator=gen) * 0.02
    gram, gram_seconds = torch.zeros(args.cols, args.cols), 0.0
    mix = torch.randn(256, args.cols, generator=gen)
    for _ in range(0, args.tokens, 2048):
        x = torch.randn(2048, args.cols, generator=gen) + 0.3 * torch.randn(2048, 256, generator=gen) @ mix
        part, seconds = timed(lambda x: x.T @ x, x)
        gram += part
        gram_seconds += seconds
    del x, part
    scheme, stats = parse_scheme(args.scheme), Stats(args.tokens, gram=gram, cross_gram=gram)
    small = Stats(100, gram=gram[:256, :256].contiguous(), cross_gram=gram[:256, :256])
    SOLVER(w[:64, :256].contiguous(), small, scheme)  # compile
    SOLVER(w[:64, :256].contiguous(), small, scheme, options=BARE)
    result: dict = {"shape": [args.rows, args.cols], "scheme": args.scheme, "threads": args.threads}
    spent: dict[str, float] = {}
    with clocked(gptq, "feedback_factor", spent), clocked(gptq, "run_loop", spent):
        found, bare = timed(lambda: SOLVER(w, stats, scheme, options=BARE))
    result["ours bare"] = {"seconds": bare, "loss": output_error(w, found.q.dequantize(), gram)}
    whole = bare + gram_seconds
    parts = {"hessian": gram_seconds, "factorisation": spent["feedback_factor"], "loop": spent["run_loop"]}
    parts["the rest"] = bare - parts["factorisation"] - parts["loop"]
    result["parts of ours bare"] = {name: {"seconds": s, "share": s / whole} for name, s in parts.items()}
    print(json.dumps(result), file=sys.stderr)
    if not args.no_full:
        found, full = timed(lambda: SOLVER(w, stats, scheme))
        result["ours as it comes"] = {"seconds": full, "loss": output_error(w, found.q.dequantize(), gram)}
    plain, seconds = timed(plain_gptq, w, gram)
    result["plain torch"] = {"seconds": seconds, "loss": output_error(w, plain, gram)}
    if Path(args.peer).exists():
        result["llm-compressor"] = peer(args, w, gram)
    print(json.dumps(result, indent=1))


def peer(args: argparse.Namespace, w: torch.Tensor, gram: torch.Tensor) -> dict:
    """The peer's function on the same arrays, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"w": w, "gram": gram}, Path(folder) / "in.pt")
        command = [args.peer, "-c", PEER, str(Path(folder) / "in.pt"), str(args.threads)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"error": ran.stderr[-500:]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
