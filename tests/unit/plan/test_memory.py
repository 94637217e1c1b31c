"""What running and training takes, what fits, and the ceilings on speed."""

from __future__ import annotations

import pytest

from fewbit.base.errors import InputError, ResourceError
from fewbit.plan.devices import GIB, Device, device_named, devices
from fewbit.plan.kv import kv_bytes, kv_layers
from fewbit.plan.memory import Use, activation_bytes, fits, longest_context, needed, offload, quantize_cost
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import STORAGES, size_of
from fewbit.plan.throughput import decode_bytes, matmul_params, prefill_operations, speed
from fewbit.plan.training import RECIPES, adapter_params, require_memory, through_rounding, training

from .models import PUBLISHED, model_of
from .test_sizes import one_matrix


def parts(name: str, label: str):
    model = model_of(name)
    return model, size_of(model, STORAGES[label]), kv_layers(model.text)


def test_a_35_gigabyte_model_does_not_fit_a_24_gigabyte_card() -> None:
    model = one_matrix(70)
    size = size_of(model, STORAGES["INT4 g128"])
    assert size.total >= 35e9
    assert not fits(model, size, (), Use(1), device_named("RTX 4090"))
    assert fits(model, size, (), Use(1), device_named("2x RTX 4090"))


def test_needed_is_the_sum_of_its_parts() -> None:
    model, size, layers = parts("llama-3.1-8b", "BF16")
    found = needed(model, size, layers, Use(8192), device_named("RTX 4090"))
    assert found.weights == 2 * PUBLISHED["llama-3.1-8b"]
    assert found.kv == 1_073_741_824
    assert (
        found.activations
        == activation_bytes(model, Use(8192))
        == 2048 * (3 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336) * 2 + 128256 * 4
    )
    assert found.total == found.weights + found.kv + found.activations + found.overhead


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "gemma-3-27b", "deepseek-v2-lite", "qwen3-30b-a3b", "qwen3-next-80b-a3b"]
)
@pytest.mark.parametrize("label", ["BF16", "Q8_0", "INT4 g128"])
def test_the_longest_context_fits_and_one_more_token_does_not(name: str, label: str) -> None:
    model, size, layers = parts(name, label)
    for device in (device_named("RTX 4090"), device_named("H100")):
        for batch in (1, 7):
            longest = longest_context(model, size, layers, Use(1, batch), device)
            if longest:
                assert fits(model, size, layers, Use(longest, batch), device)
            if longest < model.max_context:
                assert not fits(model, size, layers, Use(longest + 1, batch), device)


def test_offload_places_as_many_layers_as_fit() -> None:
    model, size, layers = parts("llama-3.1-70b", "Q4_K_M")
    device = device_named("RTX 4090")
    split = offload(model, size.storage, layers, Use(8192), device)
    assert 0 < split.on_device < split.layers == 80
    cache = kv_bytes(layers[: split.on_device], 8192)
    taken = split.device_bytes + cache + activation_bytes(model, Use(8192))
    assert taken <= device.budget < taken + size.total / 80 * 1.2
    assert split.device_bytes + split.host_bytes == pytest.approx(size.total, abs=1024)


def test_offload_of_what_fits_leaves_only_the_embedding() -> None:
    model, size, layers = parts("llama-3.1-8b", "Q4_K_M")
    split = offload(model, size.storage, layers, Use(8192), device_named("RTX 4090"))
    assert split.on_device == 32
    assert split.host_bytes == size.by_kind["embedding"]


def test_training_a_7b_model_with_adam_takes_112_gigabytes() -> None:
    model = one_matrix(7)
    by_label = {row.label: row for row in training(model)}
    full, mixed = by_label["Full, FP32 Adam"], by_label["Full, BF16 mixed"]
    assert full.weights + full.gradients + full.optimizer == mixed.weights + mixed.gradients + mixed.optimizer == 112e9
    eight = by_label["Full, BF16 + 8-bit Adam"]
    assert (eight.weights + eight.gradients + eight.optimizer) / 7e9 == 6 + 8 / 256


def test_lora_trains_rank_times_in_plus_out() -> None:
    model = model_of("llama-3.1-8b")
    layer = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert adapter_params(model, 16) == 16 * 32 * layer == 41_943_040
    rows = {row.label: row for row in training(model)}
    assert rows["LoRA on BF16"].trained == 41_943_040
    assert rows["QLoRA on NF4"].weights == size_of(model, STORAGES["NF4"]).total + 4 * 41_943_040
    assert rows["QLoRA on NF4"].total < 10e9 < rows["LoRA on BF16"].total < 24e9


def test_checkpointing_saves_activations() -> None:
    for row in training(model_of("llama-3.1-8b"), sequence=4096)[: len(RECIPES)]:
        assert row.checkpointed < row.activations
        assert row.total < row.total_unchecked
    longer, shorter = training(model_of("qwen3-8b"), sequence=4096), training(model_of("qwen3-8b"), sequence=2048)
    assert longer[0].activations == 2 * shorter[0].activations
    assert {recipe.label for recipe in RECIPES} | {"QAT, full", "QAT, floats"} == {row.label for row in longer}


def test_training_through_the_rounding_holds_two_float_models() -> None:
    model = model_of("llama-3.1-8b")
    full, floats, scales = (through_rounding(model, recipe, 2048) for recipe in ("full", "floats", "scales"))
    # student and teacher 8, values 4, gradient 4, averages 8 bytes of every number, and a few for the scales
    assert 24 * model.params < full.total - full.activations < 25 * model.params
    embeddings = 2 * 128_256 * 4096  # with the head, which is not tied
    assert floats.trained - scales.trained == pytest.approx(embeddings, rel=0.01)
    assert scales.total < floats.total < full.total
    with pytest.raises(ResourceError, match=r"FB-E0514 recipe full with 2,048 tokens .* --ram allows 64.00 GB"):
        require_memory(model, "full", 2048, 7_000_000_000, 64 * 10**9)
    with pytest.raises(ResourceError, match=r"of cuda's memory, are free there: 80.00 GB"):
        require_memory(model, "full", 2048, 7_000_000_000, 80 * 10**9, "cuda")
    assert require_memory(model, "scales", 2048, 7_000_000_000, 160 * 10**9) < 160e9


def test_int8_tensor_cores_run_twice_fp16s_rate() -> None:
    """Not four times, as popular pages have it."""
    rows = [device for device in devices().values() if device.backend == "cuda" and device.native("int8")]
    assert len(rows) > 20
    for device in rows:
        assert device.rate("int8") / device.rate("fp16") == pytest.approx(2.0, rel=0.03), device.name


def test_every_device_is_sane() -> None:
    for device in devices().values():
        assert 1 * GIB <= device.memory_bytes <= 1024 * GIB
        assert 10e9 <= device.bandwidth <= 10e12
        assert 0 < device.budget < device.memory_bytes
        assert set(device.tflops) <= {"fp32", "fp16", "bf16", "int8", "fp8", "fp4"}
        assert all(rate > 0 for rate in device.tflops.values())
        assert device.rate("int8") == 0 or device.rate("int8") >= device.rate("fp16")


@pytest.mark.parametrize(
    ("text", "name"),
    [("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("h100", "H100"), ("a100-80gb", "A100 80GB"), ("M4 Max", "Apple M4 Max 128GB"), ("mi300x", "MI300X")],
)  # fmt: skip
def test_devices_are_found_by_the_names_people_use(text: str, name: str) -> None:
    assert device_named(text).name == name


def test_a_bare_memory_is_a_device_without_speed() -> None:
    assert device_named("24GB").memory_bytes == 24_000_000_000
    assert device_named("24 GiB").memory_bytes == 24 * GIB
    assert device_named("24GB").bandwidth == 0


def test_several_devices_add_up() -> None:
    one, two = device_named("H100"), device_named("2x H100")
    assert (two.memory_bytes, two.bandwidth, two.rate("fp8")) == (
        2 * one.memory_bytes,
        2 * one.bandwidth,
        2 * one.rate("fp8"),
    )
    assert two.budget == pytest.approx(2 * one.budget, abs=2)


@pytest.mark.parametrize("text", ["RTX 9999", "", "2x", "potato", "-5GB"])
def test_an_unknown_device_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        device_named(text)
    assert caught.value.code == "FB-E0452"


def test_decoding_is_bandwidth_over_bytes_read() -> None:
    model, size, layers = parts("llama-3.1-8b", "BF16")
    device = device_named("H100")
    read = (
        2 * (PUBLISHED["llama-3.1-8b"] - 128256 * 4096) + 1_073_741_824
    )  # one row of the embedding is as good as nothing
    assert decode_bytes(model, size.storage, layers, Use(8192)) == read
    assert speed(model, size, layers, Use(8192), device).decode == pytest.approx(3350e9 / read)


def test_a_batch_shares_the_weights_until_compute_limits() -> None:
    model, size, layers = parts("llama-3.1-8b", "BF16")
    device = device_named("H100")
    rates = [speed(model, size, layers, Use(128, batch), device) for batch in (1, 16, 256, 4096)]
    assert [rate.bound for rate in rates] == ["memory", "memory", "memory", "compute"]
    assert rates[1].decode == pytest.approx(16 * rates[0].decode, rel=0.05)
    assert rates[3].decode == pytest.approx(989.4e12 / (2 * matmul_params(model)))


def test_a_batch_touches_more_experts() -> None:
    model, size, layers = parts("mixtral-8x7b", "BF16")
    experts = 2 * 32 * 8 * 3 * 4096 * 14336
    one, two = (
        decode_bytes(model, size.storage, layers, Use(1, batch)) - kv_bytes(layers, 1, batch) for batch in (1, 2)
    )
    assert one == pytest.approx(2 * model.active_params - 2 * 32000 * 4096, rel=1e-9)
    assert two - one == pytest.approx(experts * ((1 - 0.75**2) - 0.25), rel=1e-9)


def test_prefill_counts_two_operations_a_parameter_and_attention() -> None:
    model, _, layers = parts("llama-3.1-8b", "BF16")
    body = matmul_params(model) - 128256 * 4096
    attention = 2 * 2 * 32 * 128 * 1000 * (1000 / 2) * 32
    assert prefill_operations(model, layers, 1000) == pytest.approx(2 * body * 1000 + 2 * 128256 * 4096 + attention)


def test_weight_only_schemes_multiply_in_16_bits() -> None:
    model, size, layers = parts("llama-3.1-8b", "INT4 g128")
    assert speed(model, size, layers, Use(), device_named("RTX 5090")).compute == "bf16"
    fp8 = size_of(model, STORAGES["FP8"])
    assert speed(model, fp8, layers, Use(), device_named("H100")).compute == "fp8"
    assert speed(model, fp8, layers, Use(), device_named("A100 80GB")).compute == "bf16"


def test_without_a_bandwidth_there_is_no_speed() -> None:
    model, size, layers = parts("llama-3.1-8b", "BF16")
    assert speed(model, size, layers, Use(), device_named("24GB")).decode == 0


def test_the_cost_of_quantising_follows_the_largest_tensor() -> None:
    small, large = model_of("llama-3.1-8b"), model_of("llama-3.1-405b")
    for label in ("INT4 g128", "Q4_K_M"):
        first, second = (quantize_cost(model, STORAGES[label]) for model in (small, large))
        assert first.disk == size_of(small, STORAGES[label]).total
        assert first.read == 2 * PUBLISHED["llama-3.1-8b"]
        assert second.peak < 20e9 < second.disk  # 405B streams through a few GB
        assert second.seconds / first.seconds == pytest.approx(
            PUBLISHED["llama-3.1-405b"] / PUBLISHED["llama-3.1-8b"], rel=0.2
        )


def test_a_model_without_config_has_weights_only() -> None:
    model = Model("bare", {}, {}, one_matrix(1).weights, "headers")
    size = size_of(model, STORAGES["BF16"])
    assert kv_layers(model.text) == ()
    assert needed(model, size, (), Use()).kv == 0
    assert isinstance(device_named("H100"), Device)
