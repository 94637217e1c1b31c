"""A checkpoint run by MLX through mlx-lm's own loader and model code. Runs under the interpreter that has mlx_lm."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
wire = importlib.import_module("wire")


def run(job: dict[str, Any]) -> tuple[int, str, Any]:
    mx, np = importlib.import_module("mlx.core"), importlib.import_module("numpy")
    model, _ = importlib.import_module("mlx_lm.utils").load_model(Path(job["model"]), strict=True)
    model.set_dtype(getattr(mx, job.get("dtype", "float32")))

    def logits(ids: list[int]) -> Any:
        return np.ascontiguousarray(np.array(model(mx.array([ids]))[0].astype(mx.float32)))

    vocab = int(logits(job["tokens"][0][:2]).shape[-1])
    return vocab, f"mlx {importlib.import_module('importlib.metadata').version('mlx')}", map(logits, job["tokens"])


if __name__ == "__main__":
    wire.serve(run)
