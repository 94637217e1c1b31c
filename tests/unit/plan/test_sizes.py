"""Bytes of models in every storage: known answers, overheads, and the formats' own layouts."""

from __future__ import annotations

from math import prod

import pytest

from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.formats.gguf.plan import gguf_plan
from fewbit.num.scheme import parse_scheme
from fewbit.plan.shapes import Model, Weight
from fewbit.plan.sizes import LISTED, STORAGES, Storage, size_of

from .models import PUBLISHED, config_of, model_of


def one_matrix(billions: float) -> Model:
    """A model that is one matrix of so many billion parameters."""
    rows = int(billions * 1e9) // 1280
    weight = Weight("w.weight", (rows, 1280), "BF16", 1, "q", "attention", 0, (rows, 1280), False)
    return Model("one", {}, {}, (weight,), "config")


@pytest.mark.parametrize(("billions", "gigabytes"), [(7, (28, 14, 7, 3.5)), (70, (280, 140, 70, 35))])
def test_the_sizes_everybody_quotes(billions: float, gigabytes: tuple[float, ...]) -> None:
    """FP32, FP16, INT8, INT4: exact for codes alone."""
    model = one_matrix(billions)
    for spelling, expected in zip(("f32", "f16"), gigabytes, strict=False):
        assert size_of(model, Storage("x", spelling, "")).total == expected * 1e9
    for spelling, expected in (("int8-tensor", gigabytes[2]), ("int4-tensor", gigabytes[3])):
        size = size_of(model, Storage("x", spelling, ""))
        assert size.total - size.metadata == expected * 1e9
        assert size.metadata == 2


@pytest.mark.parametrize(
    ("spelling", "share"),
    [
        ("int4-g128", 16 / (128 * 4)),  # 3.1 %
        ("int4-g128-asym", 20 / (128 * 4)),  # 3.9 %
        ("int4-g32", 16 / (32 * 4)),  # 12.5 %
        ("uint4-g32-min", 32 / (32 * 4)),
        ("nf4-g64", 32 / (64 * 4)),
        ("mxfp4", 8 / (32 * 4)),
        ("q4_k", 0.5 / 4),
        ("q8_0", 16 / (32 * 8)),
    ],
)
def test_metadata_overhead_is_exact(spelling: str, share: float) -> None:
    shape = (4096, 4096)
    codes = prod(shape) * float(parse_scheme(spelling).grid.bits)
    assert parse_scheme(spelling).storage_bits(shape) - codes == share * codes


@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v3", "gpt-oss-20b", "gemma-3-4b", "gpt2"])
@pytest.mark.parametrize("label", LISTED)
def test_parts_add_up(name: str, label: str) -> None:
    model, storage = model_of(name), STORAGES[label]
    size = size_of(model, storage)
    extra = 4 * 64 if name == "llama-3.1-8b" and storage.container == "gguf" else 0
    assert sum(size.by_kind.values()) + extra == size.total
    assert 0 <= size.metadata < size.total
    assert size.active <= size.total


@pytest.mark.parametrize("name", PUBLISHED)
def test_plain_dtypes_are_parameters_times_bytes(name: str) -> None:
    assert size_of(model_of(name), STORAGES["FP32"]).total == 4 * PUBLISHED[name]
    assert size_of(model_of(name), STORAGES["BF16"]).total == 2 * PUBLISHED[name]


def test_kept_weights_keep_their_dtype() -> None:
    model = model_of("llama-3.1-8b")
    size = size_of(model, STORAGES["INT4 g128"])
    assert size.by_kind["embedding"] == size.by_kind["head"] == 128256 * 4096 * 2
    body = sum(weight.numel for weight in model.weights if not weight.kept)
    shapes = 7 * 32 * 16  # compressed-tensors keeps the shape of each matrix as two int64
    assert size.by_kind["attention"] + size.by_kind["mlp"] == body * 33 // 64 + shapes  # 4.125 bits
    assert size.quantised == body / model.params


def test_rows_that_are_no_whole_number_of_groups_stay_as_they_are() -> None:
    weight = Weight("w.weight", (64, 100), "BF16", 1, "q", "attention", 0, (64, 100), False)
    model = Model("odd", {}, {}, (weight,), "config")
    assert size_of(model, STORAGES["INT4 g128"]).total == 64 * 100 * 2


def _manifest(name: str) -> dict[str, TensorInfo]:
    tensors = {}
    for weight in model_of(name).weights:
        for expert in range(weight.count):
            full = weight.name.replace("*", str(expert))
            tensors[full] = TensorInfo(full, weight.dtype, weight.shape, data_bytes(weight.dtype, weight.shape))
    return tensors


GGUF_MODELS = (
    "llama-3.1-8b", "llama-3.1-70b", "qwen3-0.6b", "qwen3-8b", "qwen2.5-7b", "mistral-7b-v0.1", "mixtral-8x7b", "qwen3-30b-a3b", "gemma-2-9b",
    "gemma-3-1b", "phi-3-mini-4k", "gpt-oss-20b", "deepseek-v2-lite", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_sizes_are_those_of_the_file_that_would_be_written(name: str) -> None:
    """Dense, GQA, stacked experts, tied, latent attention, sliding windows: against the GGUF writer's own plan, byte for byte."""
    tensors = _manifest(name)
    config = {key: value for key, value in config_of(name).items() if key != "quantization_config"}
    for label, storage in STORAGES.items():
        if storage.container == "gguf":
            planned = gguf_plan(tensors, config, {}, storage.target.removeprefix("gguf:"))
            assert size_of(model_of(name), storage).total == planned.nbytes, label


@pytest.mark.parametrize(
    ("name", "label", "gigabytes"),
    [
        ("llama-3.1-8b", "Q4_K_M", 4.92),
        ("llama-3.1-8b", "Q8_0", 8.54),
        ("llama-3.1-8b", "Q6_K", 6.60),
        ("llama-3.1-8b", "Q2_K", 3.18),
        ("llama-3.1-70b", "Q4_K_M", 42.5),
        ("qwen3-8b", "Q4_K_M", 5.03),
    ],
)
def test_gguf_sizes_are_those_of_public_files(name: str, label: str, gigabytes: float) -> None:
    """Files on the hub are a little larger: their metadata holds a vocabulary of some 8 MB."""
    assert size_of(model_of(name), STORAGES[label]).total / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_manifest_of_a_test_is_whole() -> None:
    assert Manifest(_manifest("qwen3-0.6b")).numel == PUBLISHED["qwen3-0.6b"]
