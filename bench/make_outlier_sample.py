"""The sample with outlier channels: norm gains of a few channels times 30, the columns that read them divided. The same function.

    python bench/make_outlier_sample.py [--model samples/sample] [--factor 30] [--channels 4] -o OUT

Large models have such channels of their own; this makes a small one that behaves like them when activations are rounded. Stored in float32,
so that dividing loses nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewbit.arch.rewrite import apply_steps, merge, scale
from fewbit.arch.rewrite_spaces import spaces
from fewbit.run.source import open_source

ROOT = Path(__file__).parents[1]


def make(model: Path, out: Path, factor: float = 30.0, channels: int = 4, seed: int = 0) -> dict[str, list[int]]:
    """Writes the variant of a checkpoint; returns the channels chosen per space."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[int]] = {}
    with open_source(model) as source:
        found = spaces(source.manifest, source.config)
        parts = []
        for space in found.scalable(("attn_in", "mlp_in")):
            picks = torch.randperm(space.size, generator=generator)[:channels]
            s = torch.ones(space.size, dtype=torch.float64)
            s[picks] = 1 / factor
            parts.append(scale(space, s, found.family.norm_offset if found.family else 0.0))
            chosen[space.key] = sorted(picks.tolist())
        steps = merge(*parts)
        tensors = {name: apply_steps(source.read(name), steps.get(name, ())).contiguous() for name in source.manifest}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps({**source.config, "torch_dtype": "float32"}, indent=1))
        for path in source.checkpoint.aux_files:
            if path.name not in ("config.json", "README.md"):
                shutil.copy(path, out / path.name)
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "sample")
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    words = parser.parse_args()
    print(json.dumps(make(words.model, words.out, words.factor, words.channels, words.seed), indent=1))
