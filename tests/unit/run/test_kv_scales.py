"""Scales of cached keys and values: what a real cache would have held, in every format that has a place for them, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from fewbit import api
from fewbit.base.errors import InputError
from fewbit.eval.verify import verify
from fewbit.run.calib import calibration
from fewbit.run.convert import convert
from fewbit.run.kv import KvSource, attentions
from fewbit.run.source import open_source

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
SHORT = {"kv": "fp8", "calib_samples": 3, "calib_length": 64}
SCHEMES = {"compressed-tensors": "int8-channel", "fp8": "fp8-e4m3-block128", "modelopt": "fp8-e4m3-channel"}


@pytest.fixture(scope="module")
def outputs(two_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with all formats that store them, and one that cannot."""
    targets = [f"{form}:{scheme}" for form, scheme in SCHEMES.items()] + ["mlx:uint4-g64-min"]
    result = api.quantize(two_blocks, to=targets, out=tmp_path_factory.mktemp("out") / "all", **SHORT)
    assert [warning for warning in result.warnings if "no place" in warning], result.warnings
    return dict(zip([*SCHEMES, "mlx"], result.outputs, strict=True))


@pytest.fixture(scope="module")
def expected(two_blocks: Path) -> dict[str, float]:
    """Largest magnitudes in a real cache after the same text, over 448."""
    tokens = calibration("default", two_blocks, 3, 64, 0, 8192).tokens
    model = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
    found = {}
    for index, layer in enumerate(cache.layers):
        for which, held in (("k", layer.keys), ("v", layer.values)):
            found[f"model.layers.{index}.self_attn.{which}"] = float(held.abs().max()) / 448
    return found


@pytest.mark.parametrize("form", SCHEMES)
def test_scales_are_those_of_a_real_cache(form: str, outputs: dict[str, Path], expected: dict[str, float]) -> None:
    stored = load_file(outputs[form] / "model.safetensors")
    for name, value in expected.items():
        module, _, which = name.rpartition(".")
        place = f"{module}.{which}_proj.{which}_scale" if form == "modelopt" else f"{module}.{which}_scale"
        assert float(stored[place]) == pytest.approx(value, rel=1e-5), place
    assert sum("k_scale" in name or "v_scale" in name for name in stored) == len(expected)


def test_configs_say_so(outputs: dict[str, Path]) -> None:
    words = {form: json.loads((place / "config.json").read_text())["quantization_config"] for form, place in outputs.items() if form != "mlx"}  # fmt: skip
    assert words["compressed-tensors"]["kv_cache_scheme"]["num_bits"] == 8
    assert words["modelopt"]["kv_cache_scheme"]["type"] == "float"
    beside = json.loads((outputs["modelopt"] / "hf_quant_config.json").read_text())
    assert beside["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert not any("k_scale" in name for name in load_file(outputs["mlx"] / "model.safetensors"))


def test_verified_and_converted(two_blocks: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    for place in outputs.values():
        assert verify(place, two_blocks).ok, place
    done = convert(outputs["compressed-tensors"], "modelopt:fp8-e4m3-channel", tmp_path / "m", allow_lossy=True)
    back = convert(done.out, "compressed-tensors", tmp_path / "c", allow_lossy=True)
    first, last = (load_file(place / "model.safetensors") for place in (outputs["compressed-tensors"], back.out))
    scales = [name for name in first if name.endswith((".k_scale", ".v_scale"))]
    assert len(scales) == 4 and all(torch.equal(first[name], last[name]) for name in scales)
    assert json.loads((back.out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert verify(back.out).ok
    assert len(convert(outputs["compressed-tensors"], "gptq", tmp_path / "g").plan.dropped) == 4


def test_a_lost_or_negative_scale_is_found(outputs: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(outputs["compressed-tensors"] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((outputs["compressed-tensors"] / "config.json").read_bytes())
    lost = "model.layers.1.self_attn.v_scale"
    save_file({name: t for name, t in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    assert [(f.kind, f.tensor) for f in verify(tmp_path).findings if f.kind != "skipped"] == [("config", lost)]
    save_file(tensors | {lost: -tensors[lost]}, tmp_path / "model.safetensors")
    assert [(f.kind, f.tensor) for f in verify(tmp_path).findings] == [("codes", lost)]


def test_models_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 8}))
    save_file({"x.layers.0.mlp.fc1.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert not attentions(source.manifest, source.config)
        with pytest.raises(InputError, match="FB-E0733"):
            KvSource(source)
