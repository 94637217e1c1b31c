"""Linear layers of torchao and bitsandbytes under the clock; started by torch_kernels.py with the Python of their environment.

python bench/torch_kernels_peers.py SPEC OUT       SPEC and OUT: JSON, see torch_kernels.py
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

torch.set_grad_enabled(False)


def torchao(config: str, home: str = "torchao.quantization", **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        holder = nn.Sequential(layer)
        quantize_(holder, getattr(importlib.import_module(home), config)(**options))
        return holder

    return make


def bnb_4bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return made.to("cpu").eval()


def bnb_8bit(threshold: float) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=threshold
        )
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        return made.to("cpu").eval()

    return make


PEERS: dict[str, tuple[str, float, Callable[[nn.Linear], nn.Module]]] = {  # name -> (our scheme, bytes per weight, maker)
    "torchao int8 dynamic": ("w8a8", 1, torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao int8 weight-only": ("int8", 1, torchao("Int8WeightOnlyConfig")),
    "torchao int4 weight-only g128": (
        "int4-g128", 0.5, torchao("PrototypeInt4WeightOnlyConfig", "torchao.prototype.quantization.int4", group_size=128),
    ),
    "torchao fp8 weight-only": ("fp8", 1, torchao("Float8WeightOnlyConfig")),
    "bitsandbytes nf4 double": ("nf4-g64-dq", 0.516, bnb_4bit),
    "bitsandbytes int8": ("w8a8", 1, bnb_8bit(0.0)),
    "bitsandbytes LLM.int8() threshold 6": ("w8a8 threshold 6", 1, bnb_8bit(6.0)),
}  # fmt: skip


def clock(calls: list[Callable[[], Any]], seconds: float, least: int) -> dict[str, float]:
    """Median and quartiles of the calls in turn, milliseconds."""
    for call in calls[:2]:
        call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < seconds and len(times) < 400):
        began = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(1e3 * (time.perf_counter() - began))
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": round(median, 4), "q1_ms": round(low, 4), "q3_ms": round(high, 4), "calls": len(times)}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["threads"])
    out: dict[str, Any] = {"versions": {n: importlib.metadata.version(n) for n in ("torch", "torchao", "bitsandbytes")}}
    for rows, cols in spec["shapes"]:
        torch.manual_seed(0)
        weight = (torch.randn(rows, cols) / cols**0.5).to(torch.bfloat16)
        for name, (scheme, size, make) in PEERS.items():
            if spec.get("only") and not any(word in name for word in spec["only"]):
                continue
            layer = nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            record: dict[str, Any] = {"scheme": scheme}
            try:
                made = make(layer)
                for tokens in spec["tokens"]:
                    x = torch.randn(tokens, cols).to(torch.bfloat16)
                    count = max(2, int(spec["cold_bytes"] / (rows * cols * size))) if tokens == 1 else 1
                    layers = [made, *(copy.deepcopy(made) for _ in range(count - 1))]
                    error = (layers[0](x).float() - x.float() @ weight.float().T).norm() / (
                        x.float() @ weight.float().T
                    ).norm()
                    record[str(tokens)] = {
                        **clock([lambda m=m, x=x: m(x) for m in layers], spec["seconds"], 3),
                        "layers": count,
                        "relative_error": round(float(error), 5),
                    }
            except Exception as problem:
                record["failed"] = (
                    f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
                )
            out[f"{name} {rows}x{cols}"] = record
    return out


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text())), indent=1))
