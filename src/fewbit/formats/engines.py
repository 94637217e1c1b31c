"""Which engine loads which scheme of a format, and why not: sentences for the planner and the advisor, from shapes alone.

    engine_accepts("gptq", scheme, shape, "vllm")  ->  None, or "vLLM runs GPTQ at 4 and 8 bits only, got 3"

An engine that reads a format at all stands in the format's own row (`Format.engines`); the rules here are about schemes and shapes. Versions that the
rules were read in or seen on: transformers 5.23 with compressed-tensors 0.20, vLLM 0.32 (CPU: seen; GPU: read), SGLang 0.5 (read), TensorRT-LLM 1.x
(read), llama.cpp 0c1e57098, mlx-lm 0.32 (facts.md B1, B2).
"""

from __future__ import annotations

from collections.abc import Callable

from fewbit.formats.kinds import Affine, affine_of, as_affine, fp8_scale, is_nvfp4, mx_element
from fewbit.formats.modelopt import algorithm
from fewbit.formats.table import format_named
from fewbit.num.blocks import TENSOR
from fewbit.num.grid import E2M3
from fewbit.num.scheme import Scheme

ENGINES: dict[str, str] = {
    "transformers": "transformers", "vllm": "vLLM", "vllm-cpu": "vLLM on CPU", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM",
    "llama.cpp": "llama.cpp", "mlx": "MLX", "gptqmodel": "GPTQModel",
}  # fmt: skip
MARLIN_GROUPS = (0, 32, 64, 128)  # 0: whole rows
Rule = Callable[[Scheme, tuple[int, ...]], str | None]


def engine_accepts(format_name: str, scheme: Scheme, shape: tuple[int, ...], engine: str) -> str | None:
    """None when the engine loads a weight of this scheme and shape in this format, else a sentence.

    Raises:
        InputError: FB-E0604 for an unknown format.
    """
    label = ENGINES.get(engine, engine)
    target = format_named(format_name)
    if (reason := target.accepts(scheme, shape)) is not None:
        return reason
    if engine not in target.engines:
        return f"{label} does not read {format_name}"
    rule = _RULES.get((format_name, engine))
    problem = rule(scheme, shape) if rule is not None else None
    return f"{label} {problem}" if problem else None


def _shape_must_fit_marlin(affine: Affine, shape: tuple[int, ...]) -> str | None:
    if affine.blocks.cols not in MARLIN_GROUPS:
        return f"has kernels for whole rows and groups of 32, 64 or 128, got {affine.blocks.spelling}"
    return (
        f"needs out_features % 64 == 0 and in_features % 128 == 0, got {list(shape[-2:])}"
        if shape[-2] % 64 or shape[-1] % 128
        else None
    )


def _ct_vllm(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    affine, inputs = affine_of(scheme), scheme.activation
    if affine is not None and inputs is None:
        if affine.blocks == TENSOR:
            return "has no kernel for one scale per tensor with integer weights"
        if affine.zero == "code" and affine.bits not in (4, 8):
            return f"runs asymmetric integer weights at 4 and 8 bits only, got {affine.bits}"
        return _shape_must_fit_marlin(affine, shape)
    if affine is not None and (affine.bits != 8 or affine.blocks.cols):
        return f"runs integer activations with 8-bit weights per channel or tensor only, got {scheme}"
    if fp8_scale(scheme) is not None and scheme.blocks.cols and inputs is None:
        return "runs FP8 tiles with quantised activations only (+fp8-e4m3-g128)"
    if mx_element(scheme) == E2M3:
        return "has no MXFP6 kernel"
    return None


def _ct_vllm_cpu(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    affine = affine_of(scheme)
    if affine is not None and scheme.activation is None and affine.bits != 4:
        return f"runs integer weights at 4 bits only, got {affine.bits}"
    if is_nvfp4(scheme) or mx_element(scheme) is not None:
        return f"has no kernel for {scheme}"
    if fp8_scale(scheme) is not None and (scheme.blocks.cols or scheme.blocks == TENSOR):
        return _fp8_vllm_cpu(scheme, shape)
    return _ct_vllm(scheme, shape)


def _ct_sglang(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    affine = affine_of(scheme)
    if affine is not None and scheme.activation is None and (affine.bits not in (4, 8) or affine.zero != "none"):
        return f"runs integer weights at 4 and 8 bits, symmetric, got {scheme}"
    if mx_element(scheme) is not None:
        return f"has no kernel for {scheme} in compressed-tensors"
    return _ct_vllm(scheme, shape)


def _gptq_bits(bits: tuple[int, ...], symmetric: bool) -> Rule:
    def rule(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        affine = as_affine(scheme)
        if affine.bits not in bits:
            return f"runs GPTQ at {' and '.join(map(str, bits))} bits only, got {affine.bits}"
        if symmetric and affine.zero != "none":
            return "runs symmetric GPTQ only; asymmetric weights go to awq or compressed-tensors"
        return _shape_must_fit_marlin(affine, shape) if symmetric else None

    return rule


def _gptq_llamacpp(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    if scheme.code_shift is not None:
        return "misreads zero points of 0 in version 1: use gptq-v2 for asymmetric weights"
    return _gptq_bits((2, 4, 8), False)(scheme, shape)


def _awq_groups(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    affine = as_affine(scheme)
    return _shape_must_fit_marlin(affine, shape)


def _autoround_vllm(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    return _awq_groups(scheme, shape) if scheme.code_shift is not None else _gptq_bits((4, 8), True)(scheme, shape)


def _fp8_transformers(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    if scheme.blocks == TENSOR:
        return "expects weight_scale_inv where vLLM's per-tensor files have weight_scale: use tiles (fp8-e4m3-block128)"
    if shape[-2] % scheme.blocks.rows or shape[-1] % scheme.blocks.cols:
        return f"needs whole tiles of {scheme.blocks.rows}x{scheme.blocks.cols} to dequantise, got {list(shape[-2:])}"
    return None


def _fp8_vllm(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    if scheme.blocks.cols and shape[-1] % scheme.blocks.cols:
        return f"needs in_features % {scheme.blocks.cols} == 0, got {shape[-1]}"
    return None


def _fp8_vllm_cpu(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    if scheme.blocks.cols:
        return "runs FP8 tiles on processors with AMX only (Sapphire Rapids or newer)"
    # it fuses q, k, v and gate, up, and its CPU build lacks the operation that brings their scales together
    if scheme.blocks == TENSOR:
        return "cannot fuse layers that have an FP8 scale each: use one per row (compressed-tensors:fp8-e4m3-channel+fp8-e4m3-token)"
    return _fp8_vllm(scheme, shape)


def _modelopt(*known: str) -> Rule:
    def rule(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        name = algorithm(scheme)
        return None if name in known else f"reads {', '.join(known)} of ModelOpt, got {name}"

    return rule


_RULES: dict[tuple[str, str], Rule] = {
    ("compressed-tensors", "vllm"): _ct_vllm,
    ("compressed-tensors", "vllm-cpu"): _ct_vllm_cpu,
    ("compressed-tensors", "sglang"): _ct_sglang,
    ("gptq", "vllm"): _gptq_bits((4, 8), True),
    ("gptq", "vllm-cpu"): _gptq_bits((4,), True),
    ("gptq", "sglang"): _gptq_bits((4, 8), True),
    ("gptq", "llama.cpp"): _gptq_llamacpp,
    ("gptq-v2", "llama.cpp"): _gptq_bits((2, 4, 8), False),
    ("gptq-v2", "vllm"): _gptq_bits((4, 8), True),
    ("gptq-v2", "vllm-cpu"): _gptq_bits((4,), True),
    ("awq", "vllm"): _awq_groups,
    ("awq", "vllm-cpu"): _awq_groups,
    ("awq", "sglang"): _awq_groups,
    ("auto-round", "vllm"): _autoround_vllm,
    ("auto-round", "sglang"): _autoround_vllm,
    ("fp8", "transformers"): _fp8_transformers,
    ("fp8", "vllm"): _fp8_vllm,
    ("fp8", "vllm-cpu"): _fp8_vllm_cpu,
    ("fp8", "sglang"): _fp8_vllm,
    ("modelopt", "vllm"): _modelopt("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8"),
    ("modelopt", "sglang"): _modelopt("FP8", "NVFP4"),
    ("modelopt", "tensorrt-llm"): _modelopt(
        "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ", "W4A8_AWQ", "MXFP8"
    ),
}
