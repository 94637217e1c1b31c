"""How fast a model can run at most: two ceilings that no implementation passes.

    decoding    every step reads all active weights and the cache once    tokens/s <= bandwidth / bytes read, times the batch
    prefill     2 operations a parameter and token, plus attention        tokens/s <= operations a second / operations a token

Real engines reach some 50 to 90 % of the first and less of the second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fewbit.plan.devices import Device
from fewbit.plan.kv import KvLayer, kv_bytes
from fewbit.plan.memory import Split, Use
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import Size, Storage, active_bytes, all_bytes

HOST_BANDWIDTH = 64e9  # main memory read by a CPU for layers that did not fit, an assumption


@dataclass(frozen=True)
class Speed:
    """Ceilings in tokens a second; 0 where the device's figures are unknown.

    Attributes:
        decode: of the whole batch.
        prefill: of one prompt of the whole context.
        bound: what limits decoding at this batch: "memory", "compute", or "main memory" where layers did not fit.
        compute: dtype in which it multiplies on this device.
    """

    decode: float
    prefill: float
    bound: str
    compute: str


def decode_bytes(model: Model, storage: Storage, layers: tuple[KvLayer, ...], use: Use) -> int:
    """Bytes that one decoding step reads: active weights, and the cache of every sequence.

    A batch of b tokens that each choose k of E experts at random touches E (1 - (1 - k/E)^b) of them.
    """
    return _weight_bytes_read(model, storage, use.batch) + kv_bytes(layers, use.context, use.batch, use.kv_dtype)


@functools.lru_cache(maxsize=256)
def _weight_bytes_read(model: Model, storage: Storage, batch: int) -> int:
    touched = 1 - (1 - model.active_share) ** batch
    total = 0
    for weight, nbytes in zip(model.weights, all_bytes(model, storage), strict=True):
        total += round(nbytes * touched) if weight.kind == "experts" else active_bytes(model, weight, nbytes)
    return total


@functools.lru_cache(maxsize=8)
def matmul_params(model: Model) -> int:
    """Parameters that one token is multiplied by, head included."""
    return sum(
        round(weight.numel * model.share(weight))
        for weight in model.weights
        if len(weight.shape) >= 2
        and weight.kind != "vision"
        and weight.role != "position"
        and (weight.role != "embed" or model.tied)
    )


def prefill_operations(model: Model, layers: tuple[KvLayer, ...], context: int) -> float:
    """Operations of a prompt: the head serves its last token only; causal attention sees half of the square of the context.

    A window w lets a token see w earlier ones: w c - w^2 / 2 pairs in all.
    """
    head = model.vocab_size * model.hidden_size
    heads = int(model.text.get("num_attention_heads") or model.text.get("n_head") or 0)
    head_dim = int(model.text.get("head_dim") or model.hidden_size // max(1, heads))
    if model.text.get("kv_lora_rank"):
        head_dim = (
            int(model.text["qk_nope_head_dim"]) + int(model.text["qk_rope_head_dim"]) + int(model.text["v_head_dim"])
        ) // 2
    seen = sum(
        layer.tokens(context) - layer.tokens(context) ** 2 / (2 * max(1, context)) for layer in layers if layer.values
    )
    attention = 2 * 2 * heads * head_dim * context * seen
    return 2.0 * (matmul_params(model) - head) * context + 2.0 * head + attention


def compute_dtype(storage: Storage, device: Device) -> str:
    """The dtype in which a device multiplies this storage: its own where the hardware has it, else 16 (or 32) bits."""
    if storage.compute in device.tflops:
        return storage.compute
    return next((dtype for dtype in ("bf16", "fp16", "fp32") if dtype in device.tflops), "")


def speed(model: Model, size: Size, layers: tuple[KvLayer, ...], use: Use, device: Device) -> Speed:
    """Ceilings of a model in one storage on a device that holds it all."""
    read = decode_bytes(model, size.storage, layers, use)
    dtype = compute_dtype(size.storage, device)
    rate = device.rate(dtype)
    by_memory = use.batch * device.bandwidth / read if read else 0.0
    by_compute = rate / (2.0 * matmul_params(model)) if rate else 0.0
    prefill = use.context * rate / prefill_operations(model, layers, use.context) if rate else 0.0
    bound = "compute" if by_compute and by_memory > by_compute else "memory"
    decode = min(by_memory, by_compute) if by_memory and by_compute else by_memory or by_compute
    return Speed(decode, prefill, bound, dtype)


def step_seconds(
    model: Model, size: Size, layers: tuple[KvLayer, ...], use: Use, device: Device, efficiency: float = 1.0
) -> float:
    """Least time of one decoding step when matrices and attention follow one another, for comparing schemes; 0 when unknown.

    Args:
        efficiency: share of the device's rate that the kernels reach: below 1 where low-bit weights are widened first.
    """
    rate = device.rate(compute_dtype(size.storage, device)) * efficiency
    if not rate or not device.bandwidth:
        return 0.0
    read = _weight_bytes_read(model, size.storage, use.batch) / device.bandwidth
    cache = kv_bytes(layers, use.context, use.batch, use.kv_dtype) / device.bandwidth
    return max(read, 2.0 * matmul_params(model) * use.batch / rate) + cache


def offloaded_decode(size: Size, split: Split, layers: tuple[KvLayer, ...], use: Use, device: Device) -> float:
    """Ceiling of one sequence when layers stay in main memory: each part is read at its own speed, one after the other.

    The same share of each part is taken to be active; 0 where the device's bandwidth is unknown.
    """
    if not device.bandwidth:
        return 0.0
    share = size.active / max(1, size.total)
    cache = kv_bytes(layers, use.context, 1, use.kv_dtype)
    return 1.0 / ((split.device_bytes * share + cache) / device.bandwidth + split.host_bytes * share / HOST_BANDWIDTH)
