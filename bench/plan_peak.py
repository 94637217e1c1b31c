"""Peak memory of `fewbit quantize`: what the plan foretells against what the system counted, for several formats and shapes.

    python bench/plan_peak.py --folder /work/tmp/peak [--targets compressed-tensors:int4-g128 gguf:Q4_K_M …] > bench/results/plan_peak.json

Models are made of a few random BF16 matrices: large ones, so that the work outweighs the program itself, and both flat and tall ones. Each job
is a process of its own, which says its own peak (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SAMPLE = Path(__file__).parents[1] / "samples" / "sample"
TARGETS = (
    "compressed-tensors:int4-g128", "compressed-tensors:fp8-channel", "compressed-tensors:w8a8", "gptq:int4-g128", "awq:int4-g128-asym",
    "bitsandbytes:nf4-flat64-dq", "compressed-tensors:nvfp4+nvfp4-static", "compressed-tensors:mxfp4", "mlx:uint4-g64-min",
    "gguf:Q8_0", "gguf:Q4_K_M", "gguf:Q2_K", "gguf:IQ4_XS",
)  # fmt: skip
SHAPES = {
    "small": (512, 1408, 2),
    "middle": (2048, 5632, 2),
    "wide": (4096, 14336, 1),
}  # hidden width, inner width, layers


def write_model(folder: Path, hidden: int, inner: int, layers: int) -> Path:
    """A Llama of random weights with the sample's vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    tensors = {"model.embed_tokens.weight": made(8192, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    heads = hidden // 64
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": made(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": made(inner, hidden) for name in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = made(hidden, inner)
        for norm in ("input", "post_attention"):
            tensors[f"{prefix}.{norm}_layernorm.weight"] = torch.ones(hidden).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 8192, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in SAMPLE.glob("tokenizer*"):  # a GGUF holds a vocabulary
        shutil.copy(file, folder)
    return folder


def measure(model: Path, target: str, out: Path, *more: str) -> dict[str, Any]:
    """(predicted, measured) peak bytes of one job, and its seconds."""
    command = [
        sys.executable,
        "-m",
        "fewbit.cli.main",
        "quantize",
        str(model),
        "--to",
        target,
        "-o",
        str(out),
        "--no-verify",
        "--json",
        *more,
    ]
    for folder in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    found = json.loads(done.stdout)
    if "error" in found:
        raise SystemExit(f"{target}: {found['error']}")
    shutil.rmtree(out, ignore_errors=True)
    predicted, measured = found["predicted_peak_bytes"], found["peak_bytes"]
    return {
        "target": target,
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
        "seconds": found["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--more", nargs="*", default=[], help="further words of the command, e.g. --set=search=absmax")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    given = parser.parse_args()
    rows = []
    for name in given.shapes:
        model = given.folder / name
        if not model.exists():
            write_model(model, *SHAPES[name])
        for target in given.targets:
            rows.append({"model": name, **measure(model, target, given.folder / "out", *given.more)})
            print(
                f"{name:8}{target:40}{rows[-1]['measured'] / 1e6:8.0f} MB {rows[-1]['ratio']:.3f} {rows[-1]['seconds']} s",
                file=sys.stderr,
                flush=True,
            )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
