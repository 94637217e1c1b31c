"""Device memory of calibrated runs on CUDA, planned without a device: what lies where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit import api
from fewbit.base.errors import InputError, Refusals, ResourceError
from fewbit.plan.calibrated import CONTEXT_BYTES, LOGITS, MODEL_BYTES, STAGING_BYTES, calibrated_budget
from fewbit.plan.resources import BASE_BYTES, MARGIN
from fewbit.run.limits import device_memory
from fewbit.run.settings import chosen_device, device_bytes, require_device, settings

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
WORDS = {"to": "compressed-tensors:int4-g128-asym", "method": "gptq", "calib_samples": 64, "calib_length": 256,
         "compute": "float32"}  # fmt: skip
LOTS = 64 << 30
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_weights_and_statistics_on_the_device_hidden_states_in_host_memory() -> None:
    plan = api.plan_quantize(SAMPLE, **WORDS, device="cpu")
    with api.open(SAMPLE) as source:
        host = calibrated_budget(plan, source.manifest, LOTS, 2)
        both = calibrated_budget(plan, source.manifest, LOTS, 2, LOTS)
    assert host.device_peak == 0 and not host.device_phases
    base, staging = BASE_BYTES + MODEL_BYTES, 2 * 8192 * 256 * STAGING_BYTES
    for name, taken in host.phases.items():  # the two parts are the whole, but for what each side needs for itself
        assert both.phases[name] - base - staging + both.device_phases[name] - CONTEXT_BYTES == taken - base
    states = 64 * 256 * 256 * 4  # sequences x length x width, float32
    assert both.phases["text"] == base + staging + 2 * states, "both streams wait in host memory"
    tokens, trunk = 16 * 256, 8192 * 256 + 256
    assert both.device_phases["text"] == CONTEXT_BYTES + 4 * trunk + 3 * tokens * 256 * 4
    logits = CONTEXT_BYTES + 4 * trunk + 20 * min(LOGITS, tokens * 8192) + tokens * 256 * 4
    assert both.device_phases["loss"] >= logits, "or one block in the backward pass, if that is more"
    assert both.device_peak == max(both.device_phases.values()) > both.device_phases["text"]


def test_fewer_weights_at_once_where_the_device_is_small() -> None:
    keep = [{"pattern": "*down_proj*", "scheme": "keep"}]  # else the largest weight is alone in its stage
    few = {**WORDS, "calib_samples": 8, "calib_length": 32, "rules": keep}
    plan = api.plan_quantize(SAMPLE, **few, options={"loss_weighting": False}, device="cpu")
    with api.open(SAMPLE) as source:
        plenty = calibrated_budget(plan, source.manifest, LOTS, 4, LOTS)
        least = calibrated_budget(plan, source.manifest, LOTS, 1, LOTS)
        assert plenty.workers == 4 and plenty.device_peak > least.device_peak
        tight = calibrated_budget(plan, source.manifest, LOTS, 4, least.device_peak)
        assert tight.workers == 1 and tight.device_peak == least.device_peak
        with pytest.raises(
            ResourceError, match=r"of device memory at its peak \((blocks|text)\), --vram allows"
        ) as error:
            calibrated_budget(plan, source.manifest, LOTS, 4, least.device_peak - 1)
        assert error.value.code == "FB-E0512"
        with pytest.raises(ResourceError) as error:
            calibrated_budget(plan, source.manifest, 650_000_000, 4, LOTS)
        assert error.value.code == "FB-E0510"
        spilled = calibrated_budget(plan, source.manifest, int(MARGIN * least.phases["text"]) - 1, 4, LOTS)
        assert spilled.spill and spilled.device_peak <= plenty.device_peak


def test_a_run_is_planned_for_a_device_that_is_not_here() -> None:
    plan = api.plan_quantize(SAMPLE, **WORDS, device="cuda", vram=8 << 30)
    assert 0 < plan.device_bytes <= 8 << 30 and plan.record()["device_bytes"] == plan.device_bytes
    assert api.plan_quantize(SAMPLE, **WORDS, device="cpu").device_bytes == 0
    with pytest.raises(Refusals) as refused:
        api.plan_quantize(SAMPLE, **WORDS, device="cuda:0", vram=600_000_000)
    assert [error.code for error in refused.value.errors] == ["FB-E0512"]


def test_words_without_effect_are_told() -> None:
    plan = api.plan_quantize(SAMPLE, **WORDS, device="cpu", vram=1 << 30)
    assert any("--vram has no effect" in text for text in plan.warnings)
    free = api.plan_quantize(SAMPLE, to="dense:int4-g128", device="cuda", vram=1 << 30)
    assert free.device_bytes == 0 and any("for calibrated methods" in text for text in free.warnings)


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_a_word_that_is_no_device(word: str) -> None:
    with pytest.raises(InputError) as error:
        chosen_device(word)
    assert error.value.code == "FB-E0513"


@no_cuda
def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    assert chosen_device("auto") == "cpu" and device_bytes("cpu", 5) is None and settings(device="auto").vram == 0
    for call in (lambda: require_device("cuda"), lambda: device_bytes("cuda:1")):
        with pytest.raises(InputError, match="sees no CUDA device") as error:
            call()
        assert error.value.code == "FB-E0513"
    with pytest.raises(Refusals) as refused:
        api.quantize(SAMPLE, **WORDS, out=tmp_path / "out", device="cuda")
    assert refused.value.errors[0].code == "FB-E0513"
    with pytest.raises(InputError, match="sees no CUDA device"):
        api.quantize(SAMPLE, **WORDS, out=tmp_path / "out", device="cuda", vram=8 << 30)
    assert not (tmp_path / "out").exists()


def test_running_out_of_device_memory_is_a_typed_error() -> None:
    with pytest.raises(ResourceError, match=r"ran out of the 2\.00 GB") as error, device_memory("cuda", 2_000_000_000):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB\nmore words")
    assert error.value.code == "FB-E0512"
    with pytest.raises(torch.OutOfMemoryError), device_memory("cpu", 0):
        raise torch.OutOfMemoryError("not of a device")


def test_learned_rotations_hold_the_whole_model() -> None:
    words = {"to": "dense:int4-channel", "calib_samples": 8, "calib_length": 64, "device": "cpu"}
    plain = api.plan_quantize(SAMPLE, **words, rewrites=["rotate"])
    spun = api.plan_quantize(SAMPLE, **words, rewrites=["spin"])
    weights = sum(job.numel for job in spun.outputs[0].jobs)
    assert spun.peak_bytes > BASE_BYTES + MODEL_BYTES + 8 * 4 * weights > plain.peak_bytes
    with pytest.raises(Refusals) as refused:
        api.plan_quantize(SAMPLE, **words, rewrites=["spin"], ram=800_000_000)
    assert "(rotate)" in str(refused.value.errors[0])
