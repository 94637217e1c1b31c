"""Every stranger opens the sample model (or a small weight) and they agree with one another: the oracles, checked before they judge us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from harness import DriverFailed, load_arrays, run_driver

pytestmark = pytest.mark.engines

Engine = Callable[..., dict[str, Any]]
PROMPTS = [[0, 10, 200, 300, 400, 17, 29], [5, 6, 7]]
TEXT = 'Hello, world\'s 123 \n\n  x = fox("é")'
IMATRIX_TYPES = ("Q4_0", "Q4_K", "IQ2_XXS", "IQ4_XS")


@pytest.fixture(scope="module")
def reference(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers makes of the sample in float32."""
    out = tmp_path_factory.mktemp("reference") / "logits.npz"
    result = run_driver("hf", "transformers", {"model": sample, "prompts": PROMPTS, "logits": out, "generate": 5})
    return result | {"logits": load_arrays(out)}


def worst(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def test_transformers_loads_every_tensor(reference: dict[str, Any]) -> None:
    assert not reference["missing_keys"] + reference["unexpected_keys"] + reference["mismatched_keys"]
    assert [array.shape for array in reference["logits"].values()] == [(len(ids), 8192) for ids in PROMPTS]
    assert [len(ids) for ids in reference["generated"]] == [5, 5]


def test_llamacpp_agrees_with_transformers(
    engine: Engine, reference: dict[str, Any], sample_gguf: Path, tmp_path: Path
) -> None:
    job = {"model": sample_gguf, "prompts": PROMPTS, "logits": tmp_path / "l.npz", "generate": 5, "texts": [TEXT]}
    result = engine("llamacpp", "llamacpp", job)
    assert worst(load_arrays(tmp_path / "l.npz"), reference["logits"]) < 1e-4
    assert result["generated"] == reference["generated"]
    assert "".join(result["pieces"][0]).startswith("Hello, world's 123")


def test_llamacpp_quantises_and_opens_its_own_q4_k(engine: Engine, sample_gguf: Path, tmp_path: Path) -> None:
    wish = {"out": tmp_path / "q.gguf", "ftype": 15}
    engine("llamacpp", "llamacpp", {"model": sample_gguf, "quantize": wish})
    assert wish["out"].stat().st_size < 0.4 * sample_gguf.stat().st_size
    result = engine("llamacpp", "llamacpp", {"model": wish["out"], "prompts": PROMPTS[:1], "generate": 2})
    assert result["metadata"]["general.file_type"] == "15"


def test_llamacpp_refusal_is_an_answer(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(DriverFailed, match="refuses") as failure:
        engine("llamacpp", "llamacpp", {"model": tmp_path / "bad.gguf"})
    assert failure.value.result["error"] == "RuntimeError"


def test_mlx_agrees_with_transformers(engine: Engine, reference: dict[str, Any], sample: Path, tmp_path: Path) -> None:
    engine("hf", "mlx", {"model": sample, "prompts": PROMPTS, "logits": tmp_path / "l.npz"})
    assert worst(load_arrays(tmp_path / "l.npz"), reference["logits"]) < 1e-3


def test_vllm_agrees_with_transformers(engine: Engine, reference: dict[str, Any], sample: Path, tmp_path: Path) -> None:
    job = {
        "model": sample,
        "dtype": "float32",
        "prompts": PROMPTS,
        "logprobs": tmp_path / "l.npz",
        "generate": 5,
        "top": 5,
    }
    result = engine("vllm", "vllm", job)
    found = load_arrays(tmp_path / "l.npz")
    for index, ids in enumerate(PROMPTS):
        logits = reference["logits"][str(index)].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = expected[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(found[f"own_{index}"] - own).max() < 1e-3
        assert found[f"ids_{index}"].shape == (len(ids) - 1, 5)
    assert result["generated"] == reference["generated"]


def test_gptqmodel_makes_gptq_that_two_loaders_read_alike(engine: Engine, sample: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(2, 8192, (8, 64)).tolist()
    wish = {"out": tmp_path / "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    engine("gptqmodel", "gptqmodel", {"model": sample, "quantize": wish, "calibration": rows})
    job = {"model": wish["out"], "prompts": PROMPTS}
    own = engine("gptqmodel", "gptqmodel", job | {"logits": tmp_path / "own.npz"})
    assert sum(own["kernels"].values()) == 56
    engine("gptqmodel", "transformers", job | {"logits": tmp_path / "hf.npz", "dtype": "bfloat16"})
    assert worst(load_arrays(tmp_path / "own.npz"), load_arrays(tmp_path / "hf.npz")) < 0.5


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_llmcompressor_writes_what_transformers_reads(
    engine: Engine, sample: Path, tmp_path: Path, method: str
) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    job: dict[str, Any] = {"model": sample, "out": tmp_path / "out", "method": method, "weights": weights}
    if method == "gptq":
        job["calibration"] = np.random.default_rng(0).integers(2, 8192, (4, 64)).tolist()
    result = engine("llmcompressor", "llmcompressor", job)
    assert result["files"]["model.safetensors"] < 8_000_000
    loaded = engine("hf", "transformers", {"model": tmp_path / "out", "prompts": PROMPTS, "logits": tmp_path / "l.npz"})
    assert not loaded["missing_keys"] + loaded["unexpected_keys"]
    assert all(np.isfinite(array).all() for array in load_arrays(tmp_path / "l.npz").values())


def test_autoround_writes_what_it_says(engine: Engine, sample: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(2, 8192, (4, 64)).tolist()
    result = engine(
        "autoround", "autoround", {"model": sample, "out": tmp_path / "out", "iters": 1, "calibration": rows}
    )
    assert (Path(result["model_dir"]) / "config.json").exists()


@pytest.mark.parametrize(
    ("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_bitsandbytes_decodes_its_own_codes(engine: Engine, tmp_path: Path, kind: str, double: bool) -> None:
    weight = np.random.default_rng(1).normal(0, 0.05, (64, 256)).astype(np.float32)
    np.save(tmp_path / "w.npy", weight)
    job = {"weight": tmp_path / "w.npy", "kind": kind, "double": double, "out": tmp_path / "q.npz"}
    engine("hf", "bitsandbytes", job)
    made = load_arrays(tmp_path / "q.npz")
    assert np.abs(made["dequantised"] - weight).max() < (0.002 if kind == "int8" else 0.04)
    if kind != "int8":
        again = {
            "state": tmp_path / "q.npz",
            "kind": kind,
            "double": double,
            "shape": [64, 256],
            "out": tmp_path / "d.npz",
        }
        engine("hf", "bitsandbytes", again)
        assert np.array_equal(load_arrays(tmp_path / "d.npz")["dequantised"], made["dequantised"])


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("affine", 4, 64), ("affine", 3, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
)
def test_mlx_quantises(engine: Engine, tmp_path: Path, mode: str, bits: int, group: int) -> None:
    weight = np.random.default_rng(1).normal(0, 0.05, (64, 256)).astype(np.float32)
    np.save(tmp_path / "w.npy", weight)
    wish = {"weight": tmp_path / "w.npy", "out": tmp_path / "q.npz", "mode": mode, "bits": bits, "group_size": group}
    engine("hf", "mlx", {"quantize": wish})
    made = load_arrays(tmp_path / "q.npz")
    assert made["codes"].shape == (64, 256 * bits // 32)
    assert np.abs(made["dequantised"] - weight).max() < 0.05


def every_type() -> list[str]:
    import ggml

    return list(ggml.QUANTISED)


@pytest.mark.parametrize("name", every_type())
def test_ggml_round_trip_and_gguf_py(ggml: ModuleType, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows = np.random.default_rng(2).normal(0, 0.05, (4, 512)).astype(np.float32)
    imatrix = np.ones(512, np.float32) if ggml.requires_imatrix(name) else None
    packed = ggml.quantize(name, rows, imatrix)
    values = ggml.dequantize(name, packed, 512)
    assert packed.shape == (4, ggml.row_bytes(name, 512))
    assert ggml.validate(name, packed)
    assert np.array_equal(packed, ggml.quantize(name, rows, imatrix, threads=2))
    limit = 1.0 if name == "Q2_0" or name.startswith("TQ") else 0.65  # ternary grids cannot hold normal noise
    assert np.sqrt(((values - rows) ** 2).mean() / (rows**2).mean()) < limit
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    if kind is not None and name != "Q1_0":  # gguf-py 0.19 cannot decode Q1_0 and has never heard of Q2_0
        assert np.array_equal(
            gguf.quants.dequantize(packed, kind).reshape(4, 512).view(np.uint32), values.view(np.uint32)
        )


@pytest.mark.parametrize("name", IMATRIX_TYPES)
def test_ggml_importance_matters(ggml: ModuleType, name: str) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 0.05, (16, 256)).astype(np.float32)
    weights = rng.gamma(0.3, 1.0, 256).astype(np.float32) + 1e-3

    def loss(imatrix: np.ndarray) -> float:
        values = ggml.dequantize(name, ggml.quantize(name, rows, imatrix), 256)
        return float((weights * (values - rows) ** 2).sum())

    assert loss(weights) < loss(np.ones(256, np.float32))


def test_ggml_refuses_in_python_what_would_abort(ggml: ModuleType) -> None:
    rows = np.zeros((1, 256), np.float32)
    with pytest.raises(ValueError, match="importance matrix"):
        ggml.quantize("IQ2_XXS", rows)
    with pytest.raises(ValueError, match="divisible by 256"):
        ggml.quantize("Q4_K", rows[:, :100])
    with pytest.raises(ValueError, match="not finite"):
        ggml.quantize("Q8_0", np.full((1, 32), np.nan, np.float32))


def test_ggml_sees_a_nan_scale(ggml: ModuleType) -> None:
    packed = ggml.quantize("Q8_0", np.ones((1, 32), np.float32))
    packed[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert not ggml.validate("Q8_0", packed)
