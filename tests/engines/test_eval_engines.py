"""Evaluation against strangers: llama.cpp's own arithmetic, and candidates run in the real engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import interpreter, load_arrays, require_env
from llama_arithmetic import kl_divergence

from fewbit.base.errors import InputError
from fewbit.eval.engines.engine import find_engine
from fewbit.eval.fidelity import Options, study
from fewbit.eval.measures import compare

pytestmark = pytest.mark.engines

TEXT = str(Path(__file__).resolve().parents[2] / "samples" / "text" / "wikitext2-test.txt")
Engine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def q4_k_m(sample_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as Q4_K_M by the real llama-quantize."""
    from harness import run_driver

    out = tmp_path_factory.mktemp("q4") / "sample-q4_k_m.gguf"
    run_driver("llamacpp", "llamacpp", {"model": sample_gguf, "quantize": {"out": out, "ftype": 15}})
    return out


def test_kl_and_perplexity_are_llama_perplexitys(
    engine: Engine, sample: Path, sample_gguf: Path, q4_k_m: Path, tmp_path: Path
) -> None:
    chosen = study([sample], sample, Options(text=TEXT, tokens=1024, length=512, skip=256)).windows
    arrays = []
    for model in (sample_gguf, q4_k_m):
        engine(
            "llamacpp", "llamacpp", {"model": model, "prompts": chosen.tokens.tolist(), "logits": tmp_path / "l.npz"}
        )
        found = load_arrays(tmp_path / "l.npz")
        arrays.append(np.stack([found[str(i)] for i in range(len(found))]))
    theirs = kl_divergence(arrays[0], arrays[1], chosen.tokens.numpy(), 256)
    p, q = (torch.from_numpy(array[:, 256:-1].reshape(-1, array.shape[-1])) for array in arrays)
    ours = compare(p, q, chosen.tokens[:, 257:].reshape(-1))
    assert float(ours["kl"].mean()) == pytest.approx(theirs["kl"], rel=2e-3)  # theirs is rounded to 16 bits
    assert float(ours["nll"].mean()) == pytest.approx(theirs["nll"], rel=1e-6)
    assert float(ours["base_nll"].mean()) == pytest.approx(theirs["base_nll"], rel=1e-4)
    assert float(ours["delta_p"].square().mean()) == pytest.approx(theirs["p_diff2"], rel=1e-3)
    assert float(ours["top1"].mean()) == pytest.approx(theirs["same"], abs=0.006)  # ties of the 16-bit base

    through_us = study([q4_k_m], sample, Options(text=TEXT, tokens=1024, length=512, skip=256)).scores[0]
    assert through_us.tokens == 510
    assert through_us.measures["perplexity"][0] == pytest.approx(
        np.exp(theirs["nll"]), rel=0.01
    )  # llama.cpp rounds activations to 8 bits
    assert through_us.measures["kl"][0] == pytest.approx(theirs["kl"], rel=0.12)


def test_llama_cpp_runs_a_candidate_beside_the_reference_path(sample: Path, sample_gguf: Path) -> None:
    require_env("llamacpp")
    engine = find_engine("llama.cpp", str(interpreter("llamacpp")))
    found = study([sample_gguf], sample, Options(text=TEXT, tokens=256, length=128), engine=engine)
    reference, real = found.scores
    assert (reference.path, real.path) == ("reference", "llama.cpp")
    assert (
        reference.measures["kl"][0] < 1e-9 and real.measures["kl"][0] < 1e-5
    )  # an F32 file; the engine's cache is in 16 bits
    assert found.extras["engines"]["rows"][0][1] == "llama.cpp"


def test_transformers_runs_a_candidate(sample: Path, tmp_path: Path) -> None:
    require_env("hf")
    from fewbit import api

    out = api.quantize(
        sample, to="compressed-tensors:int4-g128", out=tmp_path / "x", verify=False, options={"search": "absmax"}
    ).outputs[0]
    found = study(
        [out],
        sample,
        Options(text=TEXT, tokens=256, length=128),
        engine=find_engine("transformers", str(interpreter("hf"))),
    )
    reference, real = found.scores
    assert real.measures["kl"][0] == pytest.approx(reference.measures["kl"][0], rel=0.02)
    assert found.extras["engines"]["rows"][0][2]["value"] < 0.02 * reference.measures["kl"][0]


def test_vllm_runs_a_candidate(sample: Path) -> None:
    require_env("vllm")
    found = study(
        [sample], sample, Options(text=TEXT, tokens=64, length=32), engine=find_engine("vllm", str(interpreter("vllm")))
    )
    assert found.scores[1].measures["kl"][0] < 1e-5 and found.scores[1].measures["top1"][0] > 0.98


def test_an_engine_that_refuses_says_why(sample: Path) -> None:
    require_env("llamacpp")
    engine = find_engine("llama.cpp", str(interpreter("llamacpp")))
    with pytest.raises(InputError, match=re.escape("FB-E0810")):
        study([sample], sample, Options(text=TEXT, tokens=64, length=32), engine=engine)  # a safetensors folder
    with pytest.raises(InputError, match=re.escape("FB-E0809")):
        find_engine("llama.cpp", "/no/such/python")
    with pytest.raises(InputError, match=re.escape("FB-E0809")):
        find_engine("tensorrt")
