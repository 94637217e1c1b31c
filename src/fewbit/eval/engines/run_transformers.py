"""A checkpoint run by transformers with its own quantised layers. Runs under the engine's interpreter, not fewbit's."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
wire = importlib.import_module("wire")


def run(job: dict[str, Any]) -> tuple[int, str, Any, list[str]]:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(job["threads"])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=getattr(torch, job.get("dtype", "float32")),
        local_files_only=True,
        output_loading_info=True,
    )
    lost = sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]))
    model = model.to(job.get("device", "cpu")).eval()

    def frames() -> Any:
        with torch.inference_mode():
            for ids in job["tokens"]:
                yield model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().contiguous().numpy()

    with torch.inference_mode():
        vocab = int(model(torch.tensor([job["tokens"][0][:2]], device=model.device)).logits.shape[-1])
    return vocab, f"transformers {transformers.__version__}", frames(), lost


if __name__ == "__main__":
    wire.serve(run)
