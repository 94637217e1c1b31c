"""Learned rotations: orthogonal to the last digits, downhill, kept only when they help, and found again after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_rewrites_run import CALIB, checkpoint, hashes, hidden

from fewbit import api
from fewbit.arch.rotate import dense, rotation
from fewbit.arch.spin import Turner, cayley, nearest_orthogonal
from fewbit.run.source import open_source


def test_cayley_steps_stay_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    one = Turner(dense(rotation(48, 3)).matrix)
    for _ in range(40):
        one.step(torch.randn(48, 48, dtype=torch.float64, generator=generator), 0.3)
    eye = torch.eye(48, dtype=torch.float64)
    assert float((one.matrix @ one.matrix.T - eye).abs().max()) < 1e-13
    before = one.matrix.clone()
    one.step(torch.full((48, 48), torch.nan), 0.3)
    assert torch.equal(one.matrix, before)


def test_a_step_turns_by_the_rate_that_was_asked_for() -> None:
    skew = torch.zeros(2, 2, dtype=torch.float64)
    skew[0, 1], skew[1, 0] = 1.0, -1.0
    angle = 2 * torch.atan(torch.tensor(0.05, dtype=torch.float64))
    wanted = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert torch.allclose(cayley(skew, 0.1, torch.eye(2, dtype=torch.float64)), wanted, atol=1e-12)
    assert torch.allclose(nearest_orthogonal(wanted * (1 + 1e-6)), wanted, atol=1e-11)


@pytest.mark.parametrize("n", [7, 16])
def test_a_known_rotation_is_found(n: int) -> None:
    """Least squares over the rotations has one answer; the walk ends there from a start that is near enough to be of its kind."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4 * n, n, dtype=torch.float64, generator=generator)
    start = dense(rotation(n, 1)).matrix
    skew = torch.randn(n, n, dtype=torch.float64, generator=generator) * 0.3
    target = cayley(skew - skew.T, 1.0, start)
    one = Turner(start)
    for step in range(300):
        gradient = (x @ one.matrix.T - x @ target.T).T @ x
        one.step(gradient, 0.2 * (1 - step / 300))
    assert float((one.matrix - target).abs().max()) < 1e-2


def outliers(folder: Path) -> Path:
    """A small model whose norms have a few large gains: what rotations are for."""
    model = checkpoint(folder, dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("layernorm.weight"):
            value[[3, 17]] *= 30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


WORDS: dict[str, Any] = {
    "to": "dense:int3-channel",
    "rewrites": ["spin"],
    "options": {"spin.steps": 12, "spin.batch": 2, "spin.rate": 0.05},
    "verify": False,
    **{**CALIB, "calib_samples": 10},
}


def test_what_is_learned_is_kept_when_it_helps_and_found_again(tmp_path: Path) -> None:
    model = outliers(tmp_path / "model")
    whole = api.quantize(model, out=tmp_path / "whole", **WORDS)
    (said,) = whole.notes["rotations"]
    assert said.startswith("learned rotations: KL on held-out"), said
    before, after = (float(word) for word in said.replace(",", "").split() if word.startswith("0."))
    assert after < before
    seen = []

    def stop(event: dict[str, Any]) -> None:
        seen.append(event.get("text", ""))
        if event["event"] == "job":
            raise RuntimeError("stopped here")

    with pytest.raises(RuntimeError, match="stopped here"):
        api.quantize(model, out=tmp_path / "cut", on_event=stop, **WORDS)
    assert any(text.startswith("rotations: step 12 of 12") for text in seen)
    again: list[str] = []
    api.quantize(model, out=tmp_path / "cut", on_event=lambda event: again.append(event.get("text", "")), **WORDS)
    assert not any(text.startswith("rotations: step") for text in again), "learned once, then read"
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_what_is_written_is_the_same_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    fine = {**WORDS, "to": "dense:int8-g16", "options": {"spin.steps": 6, "spin.batch": 1, "spin.rate": 0.5}}
    result = api.quantize(model, out=tmp_path / "out", **fine)
    tokens = torch.randint(5, 8000, (2, 24), generator=torch.Generator().manual_seed(0))
    with open_source(model) as source, open_source(result.outputs[0]) as after:
        wanted, found = hidden(source, tokens), hidden(after, tokens)
    assert float((found - wanted).norm() / wanted.norm()) < 0.04
    config = json.loads((result.outputs[0] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_activations_are_rounded_while_learning(tmp_path: Path) -> None:
    model = outliers(tmp_path / "model")
    words = {**WORDS, "to": "compressed-tensors:int8-channel+int4-token", "options": {"spin.steps": 3, "spin.batch": 1}}
    plain = api.quantize(model, out=tmp_path / "plain", **{**words, "to": "compressed-tensors:int8-channel"})
    result = api.quantize(model, out=tmp_path / "out", **words)
    kl = [float(r.notes["rotations"][0].split("text ")[1].split()[0]) for r in (plain, result)]
    assert kl[1] > 2 * kl[0], "four bits of activations show in the loss"
