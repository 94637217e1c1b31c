"""Does QLoRA (nf4-g64-dq) learn a new text as well as LoRA in BF16, at a quarter of the weight memory? On the sample, over seeds.

    python bench/qlora.py [--steps 40] [--seeds 3] > bench/results/qlora.json

New text: WikiText-2 test (the sample never saw its domain), the first two thirds to learn from, windows of the rest to measure on. Both arms have the same adapters (rank 16 on every linear
layer), data order, schedule and BF16 arithmetic; only the base differs. Loss in nats per token. `drop` is how far training lowered it; the arms agree when the mean
difference of drops is within two standard errors over the seeds. `weight_bytes` counts linear layers, `model_bytes` the embedding too, which stays BF16 in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit.nn import QuantLinear, quantize_
from fewbit.runtime.distil import Schedule, train
from fewbit.runtime.qlora import attach, merge

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "samples" / "sample"
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"
LENGTH, RANK = 128, 16


def tokens_of() -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to learn from and windows to measure on, [n, LENGTH]."""
    text = TEXT.read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(BASE)(text, verbose=False)["input_ids"])
    windows = ids[: ids.numel() // LENGTH * LENGTH].reshape(-1, LENGTH)
    cut = len(windows) * 2 // 3
    return windows[:cut], windows[cut:]


def base(scheme: str | None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    if scheme:
        quantize_(model, scheme)
    return model


def memory(model: nn.Module) -> dict[str, int]:
    """Bytes of the linear layers' weights, and of all parameters, without adapters."""
    weights = 0
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            weights += layer.nbytes
        elif isinstance(layer, nn.Linear) and layer is not model.lm_head:
            weights += layer.weight.numel() * layer.weight.element_size()
    kinds = (QuantLinear, nn.Linear)
    rest = {
        id(p): p.numel() * p.element_size()
        for m in model.modules()
        if not isinstance(m, kinds)
        for p in m._parameters.values()
        if p is not None
    }
    return {"weight_bytes": weights, "model_bytes": weights + sum(rest.values())}


def measure(test: torch.Tensor) -> Any:
    def loss(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            losses = [float(model(batch, labels=batch).loss) for batch in test.split(8)]
        return {"nll": sum(losses) / len(losses)}

    return loss


def run(
    scheme: str | None, seed: int, learn: torch.Tensor, test: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    model = base(scheme)
    held = memory(model)
    torch.manual_seed(seed)
    if scheme:
        tuned = attach(model, r=RANK)
    else:
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(model, config)
    schedule = Schedule(steps=args.steps, batch=4, lr=args.lr, every=max(1, args.steps // 4), seed=seed)
    say = lambda point: print(scheme or "bf16", seed, point.record(), file=sys.stderr, flush=True)  # noqa: E731
    curve = train(tuned, learn, schedule, evaluate=measure(test), on_point=say)
    first, last = curve[0].measures["nll"], curve[-1].measures["nll"]
    row = {
        "seed": seed,
        "before": first,
        "after": last,
        "drop": first - last,
        "seconds": curve[-1].seconds,
        "adapter_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        **held,
        "curve": [point.record() for point in curve],
    }
    if scheme and seed == 0:
        merged, rows = merge(tuned, scheme)
        row["merged"] = {
            **measure(test)(merged),
            "scheme": scheme,
            "mean_error": statistics.mean(one.error for one in rows),
            "mean_update": statistics.mean(one.update for one in rows),
            "mean_lost": statistics.mean(one.lost for one in rows),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scheme", default="nf4-g64-dq")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure on")
    args = parser.parse_args()
    learn, test = tokens_of()
    test = test[:: max(1, len(test) // args.windows)][: args.windows]
    arms = {"lora-bf16": None, "qlora": args.scheme}
    rows = {name: [] for name in arms}
    for seed in range(args.seeds):
        for name, scheme in arms.items():
            rows[name].append(run(scheme, seed, learn, test, args))
    gaps = [q["drop"] - f["drop"] for f, q in zip(rows["lora-bf16"], rows["qlora"], strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    summary = {
        "mean_drop": {name: statistics.mean(row["drop"] for row in found) for name, found in rows.items()},
        "drop_gap": statistics.mean(gaps),
        "drop_gap_error": error,
        "weight_share": rows["qlora"][0]["weight_bytes"] / rows["lora-bf16"][0]["weight_bytes"],
        "model_share": rows["qlora"][0]["model_bytes"] / rows["lora-bf16"][0]["model_bytes"],
    }
    setup = {
        "scheme": args.scheme,
        "rank": RANK,
        "steps": args.steps,
        "lr": args.lr,
        "windows": len(test),
        "length": LENGTH,
    }
    print(json.dumps({"torch": torch.__version__, "setup": setup, "summary": summary, "arms": rows}, indent=1))


if __name__ == "__main__":
    main()
