"""A GPTQ or AWQ checkpoint run by GPTQModel's own loader and plain torch kernels. Runs under the interpreter that has gptqmodel."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
wire = importlib.import_module("wire")


def run(job: dict[str, Any]) -> tuple[int, str, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with its default of one its loader's pool of two cannot start
    torch, gptqmodel = importlib.import_module("torch"), importlib.import_module("gptqmodel")
    device = job.get("device", "cpu")
    backend = gptqmodel.BACKEND("torch" if device == "cpu" else "auto")
    model = gptqmodel.GPTQModel.load(job["model"], backend=backend, device=device).model.eval()

    def logits(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([ids], device=device)).logits[0].float().cpu().contiguous().numpy()

    vocab = int(logits(job["tokens"][0][:2]).shape[-1])
    return vocab, f"gptqmodel {gptqmodel.__version__}", map(logits, job["tokens"])


if __name__ == "__main__":
    wire.serve(run)
