"""Experts that too few tokens reach: topped up by tokens sent to them, else rounded by their weights alone and counted by --strict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_calibrated import make

from fewbit import api
from fewbit.base.errors import QualityError
from fewbit.math.stats import Stats

RECIPE = {"to": "dense:int4-g32-asym", "method": "imatrix", "options": {"steps": 3}, "calib_length": 64}


def without_tokens(folder: Path, expert: int) -> None:
    """A gpt-oss of which one expert is never chosen: its router has a bias."""
    make("gpt_oss", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[expert] = -100.0
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_expert_without_tokens_is_sent_some(tmp_path: Path) -> None:
    without_tokens(tmp_path / "model", 3)
    result = api.quantize(
        tmp_path / "model", calib_samples=16, out=tmp_path / "out", verify=False, strict=True, **RECIPE
    )
    for name in (f"model.layers.{layer}.mlp.experts.{part}_proj" for layer in (0, 1) for part in ("gate_up", "down")):
        notes = [note for note in result.notes[name] if note.startswith("expert 3:")]
        assert notes == ["expert 3: 0 calibration tokens, topped up to 128 by tokens sent to it"]
        assert any(note.startswith("expert 0:") and "topped" not in note for note in result.notes[name])


def test_too_little_text_falls_back_and_strict_says_so(tmp_path: Path) -> None:
    without_tokens(tmp_path / "model", 3)
    recipe = {**RECIPE, "calib_length": 8, "calib_samples": 2}
    result = api.quantize(tmp_path / "model", out=tmp_path / "out", verify=False, **recipe)
    assert any("fallback to rtn" in note for notes in result.notes.values() for note in notes)
    with pytest.raises(QualityError, match="fell back") as error:
        api.quantize(tmp_path / "model", out=tmp_path / "strict", verify=False, strict=True, **recipe)
    assert error.value.code == "FB-E0710"


def test_sums_in_place_and_scaled_tokens() -> None:
    needs = frozenset({"gram", "cross_gram", "absmax", "importance"})
    x, y = torch.randn(3, 20, 8).unbind(0)[:2]
    whole = Stats().add(torch.cat([x, y]), torch.cat([y, x]), needs=needs)
    parts = Stats().take(x, y, needs=needs).take(y, x, needs=needs)
    for name in ("gram", "cross_gram", "absmax", "sumsq"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    half = whole.scaled(0.5, 20)
    assert half.count == 20 and torch.allclose(half.importance, whole.importance)
