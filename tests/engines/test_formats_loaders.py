"""Real loaders open what fewbit writes: the sample model, rounded by plain RTN, in each format, against a dense float32 twin of the same codes.

The twin is run by transformers in float32. Weight-only schemes that a loader computes in float32 agree to the rounding of matrix products
(FLOAT32); loaders that compute in 16 bits (HALF), or quantise activations to 8 bits (ACTIVATIONS), are held to bounds on the logits, whose spread
is about 3, and must put the same token first nearly always. vLLM gives log probabilities, held by their mean difference in nats.

What was measured goes to the file named by $FEWBIT_RECORD_ENGINES, from which dev/engines_page.py makes docs/engines.md.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_models import PROMPTS, SAMPLE, write_pair
from harness import has_module, interpreter, is_built, load_arrays, require_env, run_driver, run_jobs
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engines
LAYERS = 2
FLOAT32, HALF, ACTIVATIONS, NATS = 2e-3, 0.2, 0.6, 0.05


@dataclass(frozen=True, eq=False)
class Case:
    """One checkpoint for one loader: `needs` is a module that the loader's environment must have besides; `job` goes to the driver."""

    format: str
    scheme: str
    env: str
    driver: str = "transformers"
    bound: float = FLOAT32
    job: dict[str, Any] = field(default_factory=dict)
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.env}-{self.driver}-{self.format}-{self.scheme}"


BF16 = {"dtype": "bfloat16"}
CT, BNB, MLX = "compressed-tensors", "bitsandbytes", "mlx"
CASES = [
    *(Case(CT, scheme, "hf") for scheme in ("int4-g128", "int2-g32", "int3-g128", "int5-channel", "int8-channel", "fp8-e4m3-channel", "fp8-e4m3-block128")),
    *(Case(CT, scheme, "hf", bound=0.05) for scheme in ("int4-g128-asym", "int8-channel-asym", "int3-g32-asym")), Case(CT, "int4-g128-asym", "hf-ct17", bound=0.05),
    *(Case(CT, scheme, "hf", bound=ACTIVATIONS) for scheme in ("int8-channel+int8-token", "fp8-e4m3-channel+fp8-e4m3-token")),
    *(Case(CT, scheme, "hf", bound=HALF, job=BF16) for scheme in ("nvfp4", "mxfp4", "mxfp8")),
    Case("fp8", "fp8-e4m3-block128", "hf", bound=HALF, job=BF16),
    *(Case(BNB, scheme, "hf", bound=HALF, needs="bitsandbytes") for scheme in ("nf4-flat64-dq", "nf4-flat64", "bnbfp4-flat64", "bnbfp4-flat64-dq")),
    Case(BNB, "int8-channel", "hf", bound=ACTIVATIONS, needs="bitsandbytes"),
    *(Case(MLX, scheme, "hf", "mlx", FLOAT32, needs="mlx_lm") for scheme in (
        "uint2-g32-min", "uint3-g64-min", "uint4-g64-min", "uint6-g64-min", "uint8-g32-min", "mxfp4", "mxfp8", "fp4-g16-fp8-e4m3")),
    *(Case("gptq", scheme, "gptqmodel", bound=HALF) for scheme in ("int4-g128", "int8-g128", "int2-g32", "int3-g128", "int4-g128-asym", "int2-g32-asym")),
    *(Case("gptq-v2", scheme, "gptqmodel", bound=HALF) for scheme in ("int4-g128-asym", "int8-g64-asym", "int2-g32-asym", "int3-g32-asym")),
    Case("awq", "int4-g128-asym", "gptqmodel", bound=HALF), Case("auto-round", "int4-g128", "autoround", bound=HALF),
    Case("gptq", "int4-g32", "gptqmodel", "gptqmodel", HALF), Case("gptq-v2", "int4-g32-asym", "gptqmodel", "gptqmodel", HALF),
    Case("awq", "int4-g32-asym", "gptqmodel", "gptqmodel", HALF),
]  # fmt: skip


def record(engine: str, case: Any, measured: float, unit: str, bound: float, versions: dict[str, str | None]) -> None:
    """Adds a line to the file that docs/engines.md is made from."""
    if place := os.environ.get("FEWBIT_RECORD_ENGINES"):
        line = {
            "engine": engine,
            "format": case[0],
            "scheme": case[1],
            "measured": measured,
            "unit": unit,
            "bound": bound,
        }
        known = {name: number for name, number in versions.items() if number}
        with open(place, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"versions": known}) + "\n")


def agreement(reference: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> tuple[float, float]:
    """(worst difference of a logit, share of positions with the same best token)."""
    assert reference.keys() == found.keys()
    worst = max(float(np.abs(reference[key] - found[key]).max()) for key in reference)
    same = np.concatenate([reference[key].argmax(-1) == found[key].argmax(-1) for key in reference])
    return worst, float(same.mean())


class Loads:
    """The cases of the development environment's loaders, written and opened in one process at the first question; the others one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[tuple[str, str], dict[Case, dict[str, Any]]] = {}
        self.twins: dict[Case, dict[str, np.ndarray]] = {}
        self.versions: dict[str, str | None] = {}

    def of(self, case: Case) -> tuple[dict[str, Any], Path]:
        """(the loader's answer, folder of the case)."""
        key = (case.env, case.driver)
        if case not in self.answers.get(key, {}):
            require_env(*key)
            alike = [one for one in CASES if (one.env, one.driver) == key and present(one)]
            cases = alike if case.env == "hf" else [case]  # the others keep too much between two models
            folders = {one: self.folder / str(one) for one in cases}
            pairs = {one: write_pair(one.format, one.scheme, folders[one], layers=LAYERS) for one in cases}
            jobs = [self._job(pairs[one][0], folders[one] / "ours.npz", generate=4) | one.job for one in cases]
            twins = [self._job(pairs[one][1], folders[one] / "twin.npz") for one in cases]
            if case.driver == "transformers":
                results = run_jobs(*key, [*jobs, *twins])
            else:
                results = run_jobs(*key, jobs) + run_jobs(case.env, "transformers", twins)
            assert all(one["ok"] for one in results[len(jobs) :]), results[-1]
            self.answers.setdefault(key, {}).update(zip(cases, results, strict=False))
        return self.answers[key][case], self.folder / str(case)

    @staticmethod
    def _job(model: Path, logits: Path, **more: Any) -> dict[str, Any]:
        return {"model": str(model), "prompts": PROMPTS, "logits": str(logits), **more}


def present(case: Case) -> bool:
    """Whether what a case needs besides its environment is there."""
    return not case.needs or is_built(case.env) or has_module(case.needs)


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    return Loads(tmp_path_factory.mktemp("loads"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads_and_agrees(case: Case, loads: Loads) -> None:
    require_env(case.env, case.driver)
    if not present(case):
        pytest.skip(f"SKIPPED FOR LACK OF AN ENGINE: no {case.needs}; pip install it, or python dev/envs.py {case.env}")
    result, folder = loads.of(case)
    assert result["ok"], f"{result['error']}: {result['message']}\n{result['traceback']}"
    assert not result.get("missing_keys") and not result.get("mismatched_keys"), result
    assert not [key for key in result.get("unexpected_keys", ()) if not key.endswith("g_idx")], result
    worst, same = agreement(load_arrays(folder / "twin.npz"), load_arrays(folder / "ours.npz"))
    loader = case.driver if case.env != "gptqmodel" else f"{case.driver} with gptqmodel".replace("gptqmodel with ", "")
    packages = {"hf-ct17": "compressed-tensors 0.17", "autoround": "auto-round"}
    record(
        f"transformers with {packages[case.env]}" if case.env in packages else loader,
        (case.format, case.scheme),
        worst,
        "logits",
        case.bound,
        {},
    )
    assert worst < case.bound and same > (0.99 if case.bound == FLOAT32 else 0.85), (worst, same)
    assert all(len(ids) == 4 for ids in result["generated"])


def without_dequantising(place: Path) -> Path:
    """The checkpoint as llm-compressor would write it: nothing tells transformers to decode at loading."""
    config = json.loads((place / "config.json").read_text())
    assert config["quantization_config"].pop("dequantize")
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_packed_zero_points_load_only_decoded(tmp_path: Path) -> None:
    """Why our config says `dequantize`: without it transformers refuses the file. When this fails the key is no longer needed."""
    require_env("hf", "transformers")
    ours, _ = write_pair("compressed-tensors", "int4-g128-asym", tmp_path, layers=1)
    result = run_driver(
        "hf", "transformers", {"model": without_dequantising(ours), "prompts": PROMPTS[:1]}, check=False
    )
    assert not result["ok"] and "mismatched" in result["message"], result


def with_cache_scales(place: Path) -> Path:
    """The sample in int4 with calibrated scales of its cache."""
    from fewbit import api

    words: dict[str, Any] = {"kv": "fp8", "calib_samples": 4, "calib_length": 128}
    return api.quantize(SAMPLE, to="compressed-tensors:int4-g128", out=place, **words).outputs[0]


def test_cache_scales_in_transformers(tmp_path: Path) -> None:
    """transformers finds a scale for every attention, rounds keys and values under it, and says nearly the same."""
    require_env("hf", "transformers")
    ours = with_cache_scales(tmp_path / "kv")
    plain = shutil.copytree(ours, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (plain / "config.json").write_text(json.dumps(config))
    jobs = [
        {"model": str(p), "prompts": PROMPTS, "logits": str(tmp_path / f"{p.name}.npz"), "generate": 4}
        for p in (ours, plain)
    ]
    result, other = run_jobs("hf", "transformers", jobs)
    assert result["ok"] and other["ok"], (result, other)
    left = result.get("unexpected_keys") or []
    assert not result.get("missing_keys") and all(key.endswith((".k_scale", ".v_scale")) for key in left), result
    if left:  # compressed-tensors 0.20.1 finds attentions by `past_key_values`, which transformers 5.24 calls `cache`
        pytest.skip(
            f"this pair of transformers and compressed-tensors reads no scales of caches: {left[0]} and others were left"
        )
    worst, same = agreement(load_arrays(tmp_path / "plain.npz"), load_arrays(tmp_path / "kv.npz"))
    record("transformers", (CT, "int4-g128, cache fp8"), worst, "logits", ACTIVATIONS, {})
    assert 0 < worst < ACTIVATIONS and same > 0.85, (worst, same)
    assert all(len(ids) == 4 for ids in result["generated"])


def test_cache_scales_in_vllm(tmp_path: Path) -> None:
    """vLLM takes the scales of its cache; E4M3 in the cache alone moves this model's log probabilities by .05 nats, in each engine another way."""
    require_env("vllm")
    ours = with_cache_scales(tmp_path / "kv")
    job = {
        "model": ours,
        "prompts": PROMPTS,
        "logprobs": tmp_path / "kv.npz",
        "generate": 4,
        "top": 5,
        "kv_dtype": "fp8",
    }
    result = run_driver("vllm", "vllm", job)
    run_driver("hf", "transformers", {"model": ours, "prompts": PROMPTS, "logits": tmp_path / "hf.npz"})
    difference = own_logprob_difference(load_arrays(tmp_path / "hf.npz"), load_arrays(tmp_path / "kv.npz"))
    record("vLLM on CPU", (CT, "int4-g128, cache fp8"), difference, "nats", 0.2, {})
    assert difference < 0.2 and all(len(ids) == 4 for ids in result["generated"]), difference


VLLM = [
    ("gptq", "int4-g128", NATS), ("gptq-v2", "int4-g128", NATS), ("awq", "int4-g128-asym", NATS), ("compressed-tensors", "int4-g128", NATS),
    ("compressed-tensors", "int4-g128-asym", NATS), ("compressed-tensors", "int8-channel+int8-token", 0.1),
    ("compressed-tensors", "fp8-e4m3-channel+fp8-e4m3-token", 0.1), ("fp8", "fp8-e4m3-block128", 0.1),
]  # fmt: skip


def own_logprob_difference(logits: dict[str, np.ndarray], logprobs: dict[str, np.ndarray]) -> float:
    """Worst mean difference, over prompts, of the log probabilities of a prompt's own tokens: transformers' logits against vLLM's."""
    found = []
    for index, ids in enumerate(PROMPTS):
        rows = logits[str(index)].astype(np.float64)
        expected = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
        found.append(float(np.abs(expected - logprobs[f"own_{index}"]).mean()))
    return max(found)


@pytest.mark.parametrize(("form", "spelling", "bound"), VLLM)
def test_vllm_on_cpu(form: str, spelling: str, bound: float, tmp_path: Path) -> None:
    """Log probabilities of the prompts' own tokens, in bfloat16, against transformers' float32 of the twin."""
    require_env("vllm")
    if "block" in spelling and "amx_tile" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM has CPU kernels for FP8 tiles on processors with AMX only")
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    run_driver("hf", "transformers", {"model": twin, "prompts": PROMPTS, "logits": tmp_path / "twin.npz"})
    result = run_driver(
        "vllm", "vllm", {"model": ours, "prompts": PROMPTS, "logprobs": tmp_path / "ours.npz", "generate": 4, "top": 5}
    )
    difference = own_logprob_difference(load_arrays(tmp_path / "twin.npz"), load_arrays(tmp_path / "ours.npz"))
    record("vLLM on CPU", (form, spelling), difference, "nats", bound, {})
    assert difference < bound, difference
    assert all(len(ids) == 4 for ids in result["generated"])


def test_what_vllm_on_cpu_does_not_load(tmp_path: Path) -> None:
    """Layers that it fuses, under a scale each: when this loads, the table is too strict."""
    require_env("vllm")
    ours, _ = write_pair("fp8", "fp8-e4m3-tensor+fp8-e4m3-tensor", tmp_path, layers=1)
    result = run_driver("vllm", "vllm", {"model": ours, "prompts": PROMPTS[:1], "generate": 1}, check=False)
    assert not result["ok"] and "static_scaled_fp8_quant" in result["message"], result


LLAMA_CPP = [("gptq", "int4-g128"), ("awq", "int4-g32-asym"), ("compressed-tensors", "int8-channel"), ("compressed-tensors", "mxfp4"), ("modelopt", "nvfp4"), ("mlx", "uint4-g32-min")]  # fmt: skip


@pytest.mark.parametrize(("form", "spelling"), LLAMA_CPP)
def test_llama_cpp_loads_what_was_converted(form: str, spelling: str, tmp_path: Path) -> None:
    """Codes carried into a GGUF mean the same to llama.cpp; it rounds activations to 8 bits."""
    from fewbit.run.convert import convert

    require_env("llamacpp")
    ours, twin = write_pair(form, spelling, tmp_path, layers=LAYERS)
    done = convert(ours, "gguf", tmp_path / "gguf")
    assert done.exact
    (file,) = done.out.glob("*.gguf")
    run_driver("hf", "transformers", {"model": twin, "prompts": PROMPTS, "logits": tmp_path / "twin.npz"})
    job = {"model": file, "prompts": PROMPTS, "logits": tmp_path / "ours.npz", "generate": 4}
    result = run_driver("llamacpp", "llamacpp", job)
    worst, same = agreement(load_arrays(tmp_path / "twin.npz"), load_arrays(tmp_path / "ours.npz"))
    scheme = next(iter(done.plan.weights.values())).scheme
    record("llama.cpp", (f"{form} -> gguf", str(scheme)), worst, "logits", ACTIVATIONS, {})
    assert worst < ACTIVATIONS and same > 0.85, (worst, same)
    assert all(len(ids) == 4 for ids in result["generated"])


CHECKS = [
    ("compressed-tensors", "int4-g128", "transformers", "hf"), ("bitsandbytes", "nf4-flat64-dq", "transformers", "hf"), ("mlx", "uint4-g64-min", "mlx", "hf"),
    ("gptq", "int4-g128", "vllm", "vllm"), ("gptq-v2", "int4-g32-asym", "gptqmodel", "gptqmodel"), ("gguf", "q8_0", "llama.cpp", "llamacpp"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "spelling", "engine", "env"), CHECKS)
def test_verify_opens_the_real_loader(form: str, spelling: str, engine: str, env: str, tmp_path: Path) -> None:
    from fewbit.eval.verify import verify
    from fewbit.run.convert import convert

    driver = {"mlx": "mlx", "bitsandbytes": "bitsandbytes"}.get(form, "transformers")
    require_env(env, driver)
    if form == "gguf":
        ours = convert(
            write_pair("compressed-tensors", "int8-channel", tmp_path, layers=LAYERS)[0], "gguf:q8_0", tmp_path / "gguf"
        ).out
    else:
        ours, _ = write_pair(form, spelling, tmp_path, layers=LAYERS)
    found = verify(ours, engine=engine, python=str(interpreter(env)))
    assert found.ok and any(engine in note for note in found.notes), found


def test_verify_notices_that_a_loader_reads_other_numbers(tmp_path: Path) -> None:
    """A loader that reads one scale otherwise than we do gives other log probabilities."""
    from fewbit.eval.engines.check import open_with
    from fewbit.run.source import open_source

    require_env("hf", "transformers")
    ours, _ = write_pair("compressed-tensors", "int4-g128", tmp_path, layers=LAYERS)
    with open_source(ours) as source:
        tensors = load_file(ours / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight_scale"] *= 3
        spoilt = tmp_path / "spoilt"
        spoilt.mkdir()
        save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
        for file in ours.glob("*.json"):
            (spoilt / file.name).write_bytes(file.read_bytes())

        class Elsewhere:
            """The good checkpoint's numbers with the damaged one's path: what a loader sees when a file goes bad."""

            root = spoilt

            def __getattr__(self, name: str) -> Any:
                return getattr(source, name)

        opened = open_with("transformers", Elsewhere(), python=str(interpreter("hf")))  # type: ignore[arg-type]
    assert not opened.ok and "nats" in (opened.problem or "")


def test_verify_notices_what_a_loader_fills_in(tmp_path: Path) -> None:
    """transformers loads a checkpoint without one scale, with a line in a log: the probe reports it."""
    from fewbit.eval.engines.check import open_with
    from fewbit.run.source import open_source

    require_env("hf", "transformers")
    ours, _ = write_pair("compressed-tensors", "int4-g128", tmp_path, layers=1)
    tensors = load_file(ours / "model.safetensors")
    lost = "model.layers.0.self_attn.v_proj.weight_scale"
    broken = shutil.copytree(ours, tmp_path / "broken")
    kept = {name: t for name, t in tensors.items() if name != lost}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with open_source(ours) as source:  # which would not open what is broken; the loader shall
        source.checkpoint.root = broken
        opened = open_with("transformers", source, python=str(interpreter("hf")))
    assert not opened.ok and opened.missing, opened


def test_a_loader_that_refuses_is_a_finding(tmp_path: Path) -> None:
    from fewbit.eval.verify import verify

    require_env("hf", "transformers")
    ours = without_dequantising(write_pair("compressed-tensors", "int4-g128-asym", tmp_path, layers=1)[0])
    found = verify(ours, engine="transformers", python=str(interpreter("hf")))
    assert [finding.kind for finding in found.findings] == ["engine"] and "did not run" in found.summary
