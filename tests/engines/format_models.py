"""Real checkpoints for the engine tests of formats: the sample model, rounded by plain RTN and written in a format, and its dense twin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fewbit.formats.table import Assignment, format_named
from fewbit.math.scales import Search, quantize
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme, parse_scheme

SAMPLE = Path(__file__).parents[2] / "samples" / "sample"
PROMPTS = [[5, 17, 300, 42, 1001, 77, 8, 512, 900, 33], list(range(100, 148))]


def quantised_sample(
    scheme: Scheme, layers: int | None = None
) -> tuple[dict, dict[str, torch.Tensor], dict[str, QTensor]]:
    """(config, kept float tensors, quantised linear weights) of the sample, or of its first `layers` blocks."""
    config = json.loads((SAMPLE / "config.json").read_text())
    tensors = load_file(SAMPLE / "model.safetensors")
    if layers is not None:
        config["num_hidden_layers"] = layers
        tensors = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < layers}
    kept, quantised = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and ".layers." in name:
            quantised[name] = quantize(scheme, tensor.float(), search=Search(method="absmax"))
        else:
            kept[name] = tensor
    return config, kept, quantised


def write_pair(
    format_name: str,
    spelling: str,
    out: Path,
    *,
    dtype: str = "BF16",
    layers: int | None = None,
    options: dict | None = None,
) -> tuple[Path, Path]:
    """Write the sample in a format and as a dense float32 twin of the same codes; returns both directories."""
    target = format_named(format_name)
    scheme = target.conform(parse_scheme(spelling), dtype)
    config, kept, quantised = quantised_sample(scheme, layers)
    reason = next((why for q in quantised.values() if (why := target.accepts(q.scheme, q.shape))), None)
    assert reason is None, reason
    assignment = Assignment(
        {name: q.scheme for name, q in quantised.items()},
        tuple(n for n in kept if kept[n].dim() > 1),
        options=options or {},
    )
    written, beside = target.config(config, assignment)
    stored = dict(kept)
    for name, q in quantised.items():
        stored |= target.encode(name, q)
    _write(out / "quantised", written, beside, stored)
    dense = {name: tensor.float() for name, tensor in kept.items()} | {
        name: q.dequantize() for name, q in quantised.items()
    }
    _write(out / "dense", {**config, "torch_dtype": "float32"}, {}, dense)
    return out / "quantised", out / "dense"


def _write(folder: Path, config: dict, beside: dict, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name, data in beside.items():
        (folder / name).write_text(json.dumps(data, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(SAMPLE / name, folder / name)
