"""Whole checkpoints from format to format: values, refusals, and what is written beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_verify import CONFIG, base, quantised, write  # noqa: F401

from fewbit.base.errors import InputError, Refusals
from fewbit.eval.verify import verify
from fewbit.run.convert import convert, plan_conversion
from fewbit.run.source import open_source

CHAINS = [
    ("compressed-tensors", "int4-g32-asym", ["gptq-v2", "awq", "compressed-tensors", "hqq", "gptq-v2", "dense-f32"]),
    ("gptq", "int4-g32", ["compressed-tensors", "auto-round", "awq"]),
    ("gptq", "int8-g64", ["compressed-tensors", "gptq-v2"]),
    ("compressed-tensors", "nvfp4", ["modelopt", "compressed-tensors"]),
    ("compressed-tensors", "mxfp4", ["mlx", "compressed-tensors"]),
    ("mlx", "mxfp8", ["modelopt", "compressed-tensors", "mlx"]),
    ("fp8", "fp8-e4m3-block128", ["compressed-tensors", "fp8"]),
    ("bitsandbytes", "nf4-flat64-dq", ["dense-f32"]),
    ("bitsandbytes", "int8-channel-f32", ["compressed-tensors", "bitsandbytes"]),
]


def values(place: Path) -> dict[str, torch.Tensor]:
    with open_source(place) as source:
        return {name: source.read(name).float() for name in source.manifest}


@pytest.mark.parametrize(("form", "spelling", "targets"), CHAINS)
def test_chains_change_no_value(form: str, spelling: str, targets: list[str], base: Path, tmp_path: Path) -> None:  # noqa: F811
    place = write(tmp_path / "start", *quantised(form, spelling))
    first = values(place)
    for index, target in enumerate(targets):
        done = convert(place, target, tmp_path / f"{index}-{target}")
        assert done.exact, (target, done.plan.counts, done.errors)
        if done.plan.source != "hqq":  # whether its float zero points are whole shows only in the data
            assert done.plan.counts == {"exact": len(done.plan.weights)}, (target, done.plan.counts)
        json.dumps(done.record())
        place = done.out
        after = values(place)
        assert after.keys() == first.keys()
        assert all(torch.equal(after[name], first[name]) for name in first), target
        assert verify(place, base).ok, verify(place, base).summary


def test_what_moves_is_measured(tmp_path: Path) -> None:
    place = write(tmp_path / "start", *quantised("bitsandbytes", "nf4-flat64"))
    seen = []
    done = convert(
        place,
        "awq:int4-g32-asym",
        tmp_path / "out",
        on_weight=lambda name, planned, error: seen.append((planned.kind, planned.error, error)),
    )
    assert not done.exact and {kind for kind, _, _ in seen} == {"re-gridded"}
    assert all(0.3 * predicted < measured < 2 * predicted for _, predicted, measured in seen), seen[:3]
    assert json.loads((done.out / "fewbit-manifest.json").read_text())["converted"]["from"] == "bitsandbytes"


def test_lossy_conversions_need_leave(tmp_path: Path) -> None:
    place = write(tmp_path / "start", *quantised("compressed-tensors", "int8-channel"))
    with pytest.raises(Refusals) as caught:
        convert(place, "awq", tmp_path / "out")
    assert len(caught.value.errors) == 18 and not (tmp_path / "out").exists()
    assert not convert(place, "awq", tmp_path / "out", allow_lossy=True).exact


def test_impossible_conversions_say_why(tmp_path: Path) -> None:
    place = write(tmp_path / "start", *quantised("compressed-tensors", "int4-g32-asym"))
    with pytest.raises(Refusals, match="groups of 32, 64 or 128"):
        convert(place, "mlx:uint4-g16-min", tmp_path / "out")


def test_plain_and_gguf_are_refused(base: Path, tmp_path: Path) -> None:  # noqa: F811
    with open_source(base) as source, pytest.raises(InputError, match="FB-E0622"):
        plan_conversion(source, "awq")


def test_config_loses_its_old_words(tmp_path: Path) -> None:
    place = write(tmp_path / "start", *quantised("mlx", "uint4-g32-min"))
    out = convert(place, "dense-f32", tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    assert (
        "quantization" not in config
        and "quantization_config" not in config
        and config["hidden_size"] == CONFIG["hidden_size"]
    )


def test_scales_of_cached_keys_and_values_go_along(tmp_path: Path) -> None:
    """Every format has its own name for them, and says in its config that they are there; GPTQ has no place, and the plan says so."""
    tensors, config = quantised("compressed-tensors", "fp8-e4m3-tensor")
    scales = {
        f"model.layers.{layer}.self_attn.{which}_scale": torch.tensor([0.01 * layer + 0.02])
        for layer in range(2)
        for which in "kv"
    }
    place = write(tmp_path / "start", {**tensors, **scales}, config)
    for target, name in (
        ("modelopt", "self_attn.k_proj.k_scale"),
        ("fp8:fp8-e4m3-tensor", "self_attn.k_scale"),
        ("compressed-tensors", "self_attn.k_scale"),
    ):
        done = convert(place, target, tmp_path / target.replace(":", "-"), allow_lossy=True)
        place = done.out
        assert torch.equal(values(place)[f"model.layers.1.{name}"], torch.tensor([0.03])), target
        words = json.loads((place / "config.json").read_text())["quantization_config"]
        assert target.startswith("fp8") or words["kv_cache_scheme"]["num_bits"] == 8
        if target == "modelopt":
            assert (
                json.loads((place / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
            )
        assert verify(place).ok, verify(place).summary
    done = convert(place, "gptq", tmp_path / "gptq", allow_lossy=True)
    assert len(done.plan.dropped) == 4 and not [name for name in values(done.out) if name.endswith("_scale")]
