"""Real loaders open what fewbit writes: the sample model, rounded by plain RTN, in each format, against a dense float32 twin of the same codes.

Weight-only schemes loaded in float32 must agree to rounding of the matrix products. Loaders that compute in 16 bits, or quantise activations, are
held to a bound on the logits (their spread is about 3) and must put the same token first nearly always.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_models import PROMPTS, write_pair
from harness import load_arrays, run_driver

pytestmark = pytest.mark.engines
LAYERS = 2
EXACT, HALF, ACTIVATIONS = 2e-3, 0.2, 0.7

# format, scheme, environment, job, bound on the worst logit
TRANSFORMERS = [
    ("compressed-tensors", "int4-g128", "hf", {}, EXACT), ("compressed-tensors", "int3-g128", "hf", {}, EXACT), ("compressed-tensors", "int5-channel", "hf", {}, EXACT),
    ("compressed-tensors", "int8-channel", "hf", {}, EXACT), ("compressed-tensors", "int4-g128-asym", "hf", {"dequantize": True}, 0.05),
    ("compressed-tensors", "int4-g128-asym", "hf-ct17", {}, EXACT), ("compressed-tensors", "fp8-e4m3-channel", "hf", {}, EXACT),
    ("compressed-tensors", "fp8-e4m3-block128", "hf", {}, EXACT), ("compressed-tensors", "int8-channel+int8-token", "hf", {}, ACTIVATIONS),
    ("compressed-tensors", "fp8-e4m3-channel+fp8-e4m3-token", "hf", {}, ACTIVATIONS), ("compressed-tensors", "nvfp4", "hf", {"dtype": "bfloat16"}, HALF),
    ("compressed-tensors", "mxfp4", "hf", {"dtype": "bfloat16"}, HALF), ("compressed-tensors", "mxfp8", "hf", {"dtype": "bfloat16"}, HALF),
    ("fp8", "fp8-e4m3-block128", "hf", {"dtype": "bfloat16"}, HALF), ("bitsandbytes", "nf4-flat64-dq", "hf", {}, HALF), ("bitsandbytes", "nf4-flat64", "hf", {}, HALF),
    ("bitsandbytes", "bnbfp4-flat64", "hf", {}, HALF), ("bitsandbytes", "int8-channel", "hf", {}, ACTIVATIONS),
    ("gptq", "int4-g128", "gptqmodel", {}, HALF), ("gptq", "int8-g128", "gptqmodel", {}, HALF), ("gptq", "int2-g32", "gptqmodel", {}, HALF),
    ("gptq-v2", "int4-g128-asym", "gptqmodel", {}, HALF), ("gptq-v2", "int8-g64-asym", "gptqmodel", {}, HALF), ("awq", "int4-g128-asym", "gptqmodel", {}, HALF),
]  # fmt: skip


def agreement(reference: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> tuple[float, float]:
    """(worst difference of a logit, share of positions with the same best token)."""
    assert reference.keys() == found.keys()
    worst = max(float(np.abs(reference[key] - found[key]).max()) for key in reference)
    same = np.concatenate([reference[key].argmax(-1) == found[key].argmax(-1) for key in reference])
    return worst, float(same.mean())


@pytest.mark.parametrize(
    ("form", "spelling", "env", "job", "bound"),
    TRANSFORMERS,
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_transformers(form: str, spelling: str, env: str, job: dict[str, Any], bound: float, tmp_path: Path) -> None:
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    run_driver("hf", "transformers", {"model": twin, "prompts": PROMPTS, "logits": tmp_path / "twin.npz"})
    result = run_driver(
        env, "transformers", {"model": ours, "prompts": PROMPTS, "logits": tmp_path / "ours.npz", "generate": 4, **job}
    )
    assert not result["missing_keys"] and not result["mismatched_keys"], result
    assert not [key for key in result["unexpected_keys"] if not key.endswith("g_idx")], result["unexpected_keys"]
    worst, same = agreement(load_arrays(tmp_path / "twin.npz"), load_arrays(tmp_path / "ours.npz"))
    assert worst < bound and same > (0.99 if bound == EXACT else 0.85), (worst, same)
    assert all(len(ids) == 4 for ids in result["generated"])


@pytest.mark.parametrize("form,spelling", [("compressed-tensors", "int4-g128-asym")])
def test_what_transformers_does_not_load(form: str, spelling: str, tmp_path: Path) -> None:
    """The refusals that `formats.engines` states are still true; when this fails the table is too strict."""
    ours, _ = write_pair(form, spelling, tmp_path, layers=LAYERS)
    assert not run_driver("hf", "transformers", {"model": ours, "prompts": PROMPTS[:1]}, check=False)["ok"]


VLLM = [
    ("gptq", "int4-g128", 0.05), ("gptq-v2", "int4-g128", 0.05), ("awq", "int4-g128-asym", 0.05), ("compressed-tensors", "int4-g128", 0.05),
    ("compressed-tensors", "int4-g128-asym", 0.05), ("compressed-tensors", "int8-channel+int8-token", 0.15),
    ("compressed-tensors", "fp8-e4m3-channel+fp8-e4m3-token", 0.15), ("fp8", "fp8-e4m3-block128", 0.15),
]  # fmt: skip


@pytest.mark.parametrize(("form", "spelling", "bound"), VLLM)
def test_vllm_on_cpu(form: str, spelling: str, bound: float, tmp_path: Path) -> None:
    """Log probabilities of the prompts' own tokens, in bfloat16, against transformers' float32 of the twin."""
    if "block" in spelling and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM has CPU kernels for FP8 tiles on processors with AMX only")
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    run_driver("hf", "transformers", {"model": twin, "prompts": PROMPTS, "logits": tmp_path / "twin.npz"})
    result = run_driver(
        "vllm", "vllm", {"model": ours, "prompts": PROMPTS, "logprobs": tmp_path / "ours.npz", "generate": 4, "top": 5}
    )
    logits, ours_logprobs = load_arrays(tmp_path / "twin.npz"), load_arrays(tmp_path / "ours.npz")
    for index, ids in enumerate(PROMPTS):
        rows = logits[str(index)].astype(np.float64)
        expected = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(expected - ours_logprobs[f"own_{index}"]).mean() < bound, (
            expected[:5],
            ours_logprobs[f"own_{index}"][:5],
        )
    assert all(len(ids) == 4 for ids in result["generated"])


@pytest.mark.parametrize(
    ("form", "spelling", "engine", "env"),
    [
        ("compressed-tensors", "int4-g128", "transformers", "hf"),
        ("bitsandbytes", "nf4-flat64-dq", "transformers", "hf"),
        ("gptq", "int4-g128", "vllm", "vllm"),
    ],
)
def test_verify_opens_the_real_loader(form: str, spelling: str, engine: str, env: str, tmp_path: Path) -> None:
    from harness import interpreter, require_env

    from fewbit.eval.verify import verify

    require_env(env)
    ours, _ = write_pair(form, spelling, tmp_path, layers=LAYERS)
    found = verify(ours, engine=engine, python=str(interpreter(env)))
    assert found.ok and any(engine in note for note in found.notes), found


def test_verify_notices_that_a_loader_reads_other_numbers(tmp_path: Path) -> None:
    """A loader that reads one scale otherwise than we do gives other log probabilities."""
    from harness import interpreter, require_env
    from safetensors.torch import load_file, save_file

    from fewbit.eval.engines.check import open_with
    from fewbit.run.source import open_source

    require_env("hf")
    ours, _ = write_pair("compressed-tensors", "int4-g128", tmp_path, layers=LAYERS)
    with open_source(ours) as source:
        tensors = load_file(ours / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight_scale"] *= 3
        save_file(tensors, ours / "changed.safetensors", metadata={"format": "pt"})
        spoilt = tmp_path / "spoilt"
        spoilt.mkdir()
        (ours / "changed.safetensors").rename(spoilt / "model.safetensors")
        for file in ours.glob("*.json"):
            (spoilt / file.name).write_bytes(file.read_bytes())

        class Elsewhere:
            """The good checkpoint's numbers with the damaged one's path: what a loader sees when a file goes bad."""

            root = spoilt

            def __getattr__(self, name: str) -> Any:
                return getattr(source, name)

        opened = open_with("transformers", Elsewhere(), python=str(interpreter("hf")))  # type: ignore[arg-type]
    assert not opened.ok and "nats" in (opened.problem or "")
