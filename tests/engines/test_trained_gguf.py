"""What was trained through the rounding, written as GGUF, computes in llama.cpp what the trained model computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from format_models import PROMPTS
from harness import load_arrays, require_env, run_driver

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_trained_gguf_in_llama_cpp(kind: str, two_blocks: Path, tmp_path: Path) -> None:
    from fewbit.run.gguf_source import open_gguf_as_checkpoint
    from fewbit.run.training import load_float
    from fewbit.train import Schedule, train_checkpoint

    require_env("llamacpp")
    schedule = Schedule(steps=3, batch=2, every=3)
    done = train_checkpoint(two_blocks, f"gguf:{kind}", tmp_path / "out", schedule=schedule, samples=8, length=64)
    assert done.curve[-1].measures["kl"] <= done.curve[0].measures["kl"] + 1e-3
    (file,) = done.out.glob("*.gguf")
    with open_gguf_as_checkpoint(file) as source:
        model = load_float(source)
    job = {"model": file, "prompts": PROMPTS, "logits": tmp_path / "theirs.npz"}
    run_driver("llamacpp", "llamacpp", job)
    theirs = load_arrays(tmp_path / "theirs.npz")
    with torch.no_grad():
        ours = {str(i): model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(PROMPTS)}
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    assert worst < 0.3, worst  # llama.cpp rounds activations to 8 bits; logits spread over some 3
