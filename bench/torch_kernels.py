"""Linear layers under the clock: ours, torch's in BF16 and float32, torchao's and bitsandbytes', one run, medians.

    python bench/torch_kernels.py [--peers PYTHON] [--out bench/results/torch_kernels.json]

Decoding: one token, through copies of a layer that together are larger than any cache, so each weight comes from memory; stated as GB/s of stored weight
and as a share of what the machine reads (a float32 sum over 512 MB). Prefill: 512 tokens through one layer. `relative_error` is against float32
products with the unquantised weight. Peers run in a process of their own with the same threads, right after.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fewbit.math.scales import Search, quantize
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.linear import QuantLinear
from torch_kernels_peers import clock

SHAPES = ((4096, 4096), (14336, 4096))  # [rows, columns]
COLD = 640 << 20  # bytes that a decoding round reads before it comes back to the same layer
OURS = (  # (scheme, kernel, threshold, whether prefill and decoding are of interest)
    ("w8a8", None, 0.0), ("w8a8", None, 6.0), ("int4-g128", "int4", 0.0), ("int4-g128", "direct", 0.0), ("q4_k", "direct", 0.0),
    ("int8", "int8", 0.0), ("int8", "direct", 0.0), ("nf4-g64-dq", "direct", 0.0), ("fp8", "direct", 0.0), ("mxfp4", "direct", 0.0),
    ("nvfp4", "direct", 0.0),
)  # fmt: skip


def bandwidth(seconds: float) -> float:
    """GB/s of reading float32."""
    data = torch.ones(1 << 27)
    found = clock([lambda: data.sum()], seconds, 5)
    return 0.001 * 4 * data.numel() / found["median_ms"] / 1e3


def copies(layer: QuantLinear, count: int) -> list[QuantLinear]:
    """The layer and as many with the same numbers in other memory as make `count`."""
    out = [layer]
    for _ in range(count - 1):
        made = QuantLinear.__new__(QuantLinear)
        torch.nn.Module.__init__(made)
        made.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in ("_buffers",)})
        made._buffers = {name: tensor.clone() for name, tensor in layer._buffers.items()}
        out.append(made)
    return out


def ours(rows: int, cols: int, weight: torch.Tensor, spec: dict[str, Any], only: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    float_weight = weight.float()
    for word, kernel, threshold in OURS:
        scheme = parse_scheme(word)
        name = f"fewbit {word}{f' threshold {threshold:g}' if threshold else ''} {kernel or ''}".strip()
        if only and not any(part in name for part in only):
            continue
        q = quantize(scheme.weights_only, float_weight, search=Search("absmax"))
        q = QTensor(scheme, q.shape, q.codes, q.scale, q.code_shift, q.value_shift)
        layer = QuantLinear(q, dtype=torch.bfloat16, kernel=kernel, threshold=threshold)
        record: dict[str, Any] = {
            "scheme": f"{word}{f' threshold {threshold:g}' if threshold else ''}", "bits_per_weight": round(8 * layer.nbytes / weight.numel(), 4),
        }  # fmt: skip
        for tokens in spec["tokens"]:
            x = torch.randn(tokens, cols).to(torch.bfloat16)
            layers = copies(layer, max(2, spec["cold_bytes"] // layer.nbytes) if tokens == 1 else 1)
            wanted = x.float() @ float_weight.T
            record[str(tokens)] = {
                **clock([lambda m=m, x=x: m(x) for m in layers], spec["seconds"], 3),
                "layers": len(layers),
                "relative_error": round(float((layer(x).float() - wanted).norm() / wanted.norm()), 5),
            }
            if tokens == 1:
                record["1"]["gb_per_s"] = round(layer.nbytes / record["1"]["median_ms"] / 1e6, 3)
        out[f"{name} {rows}x{cols}"] = record
    return out


def plain(rows: int, cols: int, weight: torch.Tensor, spec: dict[str, Any]) -> dict[str, Any]:
    """torch's own linear layer in BF16 and float32."""
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        record: dict[str, Any] = {"scheme": "none"}
        held = weight.to(dtype)
        for tokens in spec["tokens"]:
            count = max(2, spec["cold_bytes"] // (held.numel() * held.element_size())) if tokens == 1 else 1
            weights, x = [held, *(held.clone() for _ in range(count - 1))], torch.randn(tokens, cols).to(dtype)
            record[str(tokens)] = clock(
                [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], spec["seconds"], 3
            )
            if tokens == 1:
                record["1"]["gb_per_s"] = round(held.numel() * held.element_size() / record["1"]["median_ms"] / 1e6, 3)
        out[f"torch {str(dtype).removeprefix('torch.')} {rows}x{cols}"] = record
    return out


def peers(python: Path, spec: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "spec.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(spec))
        subprocess.run([python, Path(__file__).with_name("torch_kernels_peers.py"), asked, told], check=True)
        return json.loads(told.read_text())


def against(rows: dict[str, Any], read: float) -> None:
    """Adds to every row how it stands to BF16 in the same run, and to the machine's bandwidth."""
    for name, record in rows.items():
        shape = name.rpartition(" ")[2]
        for tokens in ("1", "512"):
            base = rows.get(f"torch bfloat16 {shape}", {}).get(tokens)
            if base and tokens in record:
                record[tokens]["times_bf16"] = round(base["median_ms"] / record[tokens]["median_ms"], 3)
        if "gb_per_s" in record.get("1", {}):
            record["1"]["share_of_bandwidth"] = round(record["1"]["gb_per_s"] / read, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="Python of an environment with torchao and bitsandbytes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "torch_kernels.json")
    parser.add_argument("--seconds", type=float, default=0.8, help="per layer and number of tokens")
    parser.add_argument("--only", action="append", default=[], help="part of a row's name; may be given again")
    words = parser.parse_args()
    torch.set_grad_enabled(False)
    spec = {
        "threads": torch.get_num_threads(), "shapes": SHAPES, "tokens": [1, 512], "cold_bytes": COLD, "seconds": words.seconds, "only": words.only,
    }  # fmt: skip
    read = bandwidth(words.seconds)
    rows: dict[str, Any] = {}
    for shape in SHAPES:
        torch.manual_seed(0)
        weight = (torch.randn(shape) / shape[1] ** 0.5).to(torch.bfloat16)
        rows |= plain(*shape, weight, spec) | ours(*shape, weight, spec, words.only)
    found = peers(words.peers, spec) if words.peers else {"versions": {}}
    versions = {"torch": torch.__version__, **found.pop("versions")}
    rows |= found
    against(rows, read)
    record = {
        "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "threads": spec["threads"], "load": os.getloadavg(), "versions": versions,
        "native_bf16": torch.cpu._is_avx512_bf16_supported(), "read_gb_per_s": round(read, 2), "cold_bytes": COLD, "rows": rows,
    }  # fmt: skip
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
