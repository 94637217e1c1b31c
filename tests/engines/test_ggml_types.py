"""Our GGUF block types against llama.cpp's own C library: decoding bit for bit, every block valid, and less error than its encoder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fewbit.formats.gguf.codecs import from_blocks, to_blocks
from fewbit.formats.gguf.types import FLOATS, TYPES
from fewbit.math.scales import quantize

QUANTISED = tuple(name for name in TYPES if name not in FLOATS)
STRICT = tuple(name for name in QUANTISED if name.endswith("_K") or name.startswith("IQ"))
LAYERS = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
    "model.layers.7.mlp.gate_proj.weight",
)


@cache
def sample_rows(folder: Path, name: str, rows: int) -> np.ndarray:
    """The first rows of a tensor of the sample, float32."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_slice(name)[:rows].float().numpy()


def random_rows(kind: str, rows: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng(hash(kind) % 1000 if kind not in ("gauss", "laplace", "heavy") else len(kind))
    draw = {
        "gauss": rng.standard_normal,
        "laplace": lambda size: rng.laplace(size=size),
        "heavy": lambda size: rng.standard_t(3, size=size),
    }
    return (draw[kind]((rows, cols)) * 0.02).astype(np.float32)


def importance(cols: int) -> np.ndarray:
    """Mean squares of activations as they look in models: log-normal."""
    return np.exp(np.random.default_rng(cols).standard_normal(cols)).astype(np.float32)


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))


@pytest.mark.parametrize("name", QUANTISED)
def test_sizes(ggml: ModuleType, name: str) -> None:
    assert ggml.traits(name) == (TYPES[name].block, TYPES[name].nbytes)


@pytest.mark.parametrize("name", QUANTISED)
def test_random_bytes_decode_bit_for_bit(ggml: ModuleType, name: str) -> None:
    row = TYPES[name]
    data = np.random.default_rng(7).integers(0, 256, (257, 5 * row.nbytes), dtype=np.uint8)
    if name in ("MXFP4", "NVFP4"):
        data[data == 255] = 254  # a scale of 255 is refused by ggml's own check (MXFP4) or beyond E4M3 (NVFP4)
    theirs = ggml.dequantize(name, data, 5 * row.block)
    ours = from_blocks(name, torch.from_numpy(data), theirs.shape).dequantize().numpy()
    same = same_bits(ours, theirs)
    assert same.all(), f"{(~same).sum()} differ, first at {np.argwhere(~same)[0]}"


@pytest.mark.parametrize("name", QUANTISED)
def test_real_blocks_decode_bit_for_bit_and_come_back(ggml: ModuleType, sample: Path, name: str) -> None:
    for layer in LAYERS:
        w = sample_rows(sample, layer, 16)
        data = ggml.quantize(name, w, importance(w.shape[1]))
        theirs = ggml.dequantize(name, data, w.shape[1])
        q = from_blocks(name, torch.from_numpy(data), w.shape)
        assert same_bits(q.dequantize().numpy(), theirs).all()
        assert torch.equal(to_blocks(name, q), torch.from_numpy(data))


def compare(ggml: ModuleType, name: str, w: np.ndarray, h: np.ndarray | None) -> float:
    """Our weighted error over ggml's; what we wrote is valid and decoded alike by both."""
    theirs = ggml.dequantize(name, ggml.quantize(name, w, h), w.shape[1])
    q = quantize(TYPES[name].scheme, torch.from_numpy(w), None if h is None else torch.from_numpy(h))
    data = to_blocks(name, q).numpy()
    assert ggml.validate(name, data)
    ours = ggml.dequantize(name, data, w.shape[1])
    assert same_bits(from_blocks(name, torch.from_numpy(data), w.shape).dequantize().numpy(), ours).all()
    assert np.array_equal(q.dequantize().numpy(), ours)
    weight = 1.0 if h is None else h.astype(np.float64)
    return float(
        (weight * (ours.astype(np.float64) - w) ** 2).sum() / (weight * (theirs.astype(np.float64) - w) ** 2).sum()
    )


@pytest.mark.parametrize("name", QUANTISED)
def test_error_with_importance(ggml: ModuleType, sample: Path, name: str) -> None:
    cases = {layer: sample_rows(sample, layer, 64) for layer in LAYERS}
    cases |= {kind: random_rows(kind, 24, 1024) for kind in ("gauss", "laplace", "heavy")}
    ratios = {case: compare(ggml, name, w, importance(w.shape[1])) for case, w in cases.items()}
    worst = max(ratios.values())
    assert worst < 1.0 if name in STRICT else worst <= 1.0 + 1e-6, ratios


@pytest.mark.parametrize("name", [name for name in QUANTISED if name not in ("IQ1_S", "IQ2_XXS", "IQ2_XS")])
def test_error_without_importance(ggml: ModuleType, sample: Path, name: str) -> None:
    cases = {LAYERS[0]: sample_rows(sample, LAYERS[0], 64), "gauss": random_rows("gauss", 24, 1024)}
    ratios = {case: compare(ggml, name, w, None) for case, w in cases.items()}
    assert max(ratios.values()) <= 1.0 + 1e-6, ratios


@pytest.mark.parametrize("name", QUANTISED)
def test_awkward_rows_are_valid(ggml: ModuleType, name: str) -> None:
    w = random_rows("heavy", 6, 512)
    w[0], w[1], w[2, 40:], w[3] = 0.0, 1e-30, 0.0, 3e4
    w[4] *= 1e-7
    w[5, 3] = 6e4
    h = importance(512)
    h[32:96] = 0.0
    q = quantize(TYPES[name].scheme, torch.from_numpy(w), torch.from_numpy(h))
    data = to_blocks(name, q).numpy()
    assert ggml.validate(name, data)
    assert np.isfinite(ggml.dequantize(name, data, 512)).all()
