"""What running a model takes beside its weights, what then fits a device, and what quantising it takes.

    needed  =  weights  +  KV cache  +  activations  +  runtime overhead

Weights and cache are exact. Activations follow a stated formula; the runtime's overhead is an assumption of the device table. Both are
printed with every plan.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fewbit.base.errors import FewbitError
from fewbit.formats.table import format_named
from fewbit.num.scheme import Scheme
from fewbit.plan.devices import Device
from fewbit.plan.jobs import Job, Parts
from fewbit.plan.kv import KvLayer, kv_bits, kv_bytes
from fewbit.plan.resources import BASE_BYTES, budget
from fewbit.plan.shapes import Model, Weight
from fewbit.plan.sizes import Size, Storage, all_bytes, held, size_of

CHUNK = 2048  # tokens of a prompt that an engine runs through the layers at once
LONGEST = 1 << 24


@dataclass(frozen=True)
class Use:
    """How a model is to be run: sequences at once, tokens each, dtype of their cache."""

    context: int = 8192
    batch: int = 1
    kv_dtype: str = "f16"


@dataclass(frozen=True)
class Needed:
    """Bytes that running takes."""

    weights: int
    kv: int
    activations: int
    overhead: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.overhead


def width(model: Model) -> int:
    """Values alive for one token inside a layer: residual stream, norms, attention's inputs and outputs, the feed-forward's halves."""
    text = model.text
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 1)
    head_dim = int(text.get("head_dim") or model.hidden_size // max(1, heads))
    if text.get("kv_lora_rank"):
        head_dim = int(text.get("qk_nope_head_dim") or 0) + int(text.get("qk_rope_head_dim") or 0)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    return 3 * model.hidden_size + 2 * heads * head_dim + 2 * kv_heads * head_dim + 3 * feed_forward(model)


def feed_forward(model: Model) -> int:
    """Inner width of the feed-forward that one token passes, chosen and shared experts together."""
    text = model.text
    dense = int(text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim") or 4 * model.hidden_size)
    if not model.experts:
        return dense
    shared = int(text.get("shared_expert_intermediate_size") or 0)
    each = int(text.get("moe_intermediate_size") or dense)
    shared += int(text.get("n_shared_experts") or 0) * each
    return max(model.experts_per_token * each + shared, dense if text.get("first_k_dense_replace") else 0)


def activation_bytes(model: Model, use: Use) -> int:
    """Working memory of inference: a chunk of the prompt through one layer in 16 bits, and one row of float32 logits a sequence.

    Attention is taken to be fused (no matrix of scores).
    """
    tokens = min(CHUNK, use.context * use.batch)
    return tokens * width(model) * 2 + use.batch * model.vocab_size * 4


def needed(model: Model, size: Size, layers: tuple[KvLayer, ...], use: Use, device: Device | None = None) -> Needed:
    """What running a model in one storage takes (with `device`, its runtime's overhead too)."""
    overhead = device.overhead_bytes * device.count if device else 0
    return Needed(
        size.total, kv_bytes(layers, use.context, use.batch, use.kv_dtype), activation_bytes(model, use), overhead
    )


def fits(model: Model, size: Size, layers: tuple[KvLayer, ...], use: Use, device: Device) -> bool:
    """Whether weights, cache and activations go into what the device leaves for them."""
    return needed(model, size, layers, use).total <= device.budget


def longest_context(model: Model, size: Size, layers: tuple[KvLayer, ...], use: Use, device: Device) -> int:
    """The most tokens a sequence may have so that all fits; 0 when not even one does, the model's own limit at most."""
    room = device.budget - size.total
    alike = tuple(Counter(layers).items())
    bits = kv_bits(use.kv_dtype)

    def taken(context: int) -> int:
        values = sum(count * layer.values * layer.tokens(context) for layer, count in alike)
        state = sum(count * layer.state * layer.state_bits for layer, count in alike)
        cache = -(-int(use.batch * (values * bits + state)) // 8)
        return cache + activation_bytes(model, Use(context, use.batch, use.kv_dtype))

    limit = model.max_context or LONGEST
    if taken(limit) <= room:
        return limit
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= room else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Split:
    """Layers on the device and layers left in main memory."""

    on_device: int
    layers: int
    device_bytes: int
    host_bytes: int


def offload(model: Model, storage: Storage, layers: tuple[KvLayer, ...], use: Use, device: Device) -> Split:
    """How many layers, from the last to the first, go onto a device together with their cache; head and norms go first, the embedding stays."""
    per_layer, outside, embedding = _bytes_by_layer(model, storage)
    order = sorted(per_layer, reverse=True)
    room = device.budget - activation_bytes(model, use) - outside
    each = {layer: kv_bytes((layer,), use.context, use.batch, use.kv_dtype) for layer in set(layers)}
    cache = [each[layers[index]] if index < len(layers) else 0 for index in order]
    sums = accumulate(per_layer[index] + cached for index, cached in zip(order, cache, strict=True))
    placed = sum(total <= room for total in sums) if room > 0 else 0
    on_device = outside + sum(per_layer[index] for index in order[:placed]) if outside <= device.budget else 0
    total = sum(per_layer.values()) + outside + embedding
    return Split(placed, len(order), on_device, total - on_device)


@functools.lru_cache(maxsize=64)
def _bytes_by_layer(model: Model, storage: Storage) -> tuple[dict[int, int], int, int]:
    """(bytes of each layer, bytes outside that belong on the device, bytes of the embedding, which main memory can serve)."""
    per_layer: dict[int, int] = {}
    outside = embedding = 0
    for weight, nbytes in zip(model.weights, all_bytes(model, storage), strict=True):
        if weight.layer is not None and weight.kind != "vision":
            per_layer[weight.layer] = per_layer.get(weight.layer, 0) + nbytes
        elif weight.role == "embed" and not model.tied:
            embedding += nbytes
        else:
            outside += nbytes
    return per_layer, outside, embedding


# ---- what quantising takes


@dataclass(frozen=True)
class Cost:
    """What making one output takes.

    Attributes:
        peak: bytes of resident memory.
        disk: bytes of the output.
        read: bytes read.
        seconds: a rough time without calibration, by `nanoseconds_per_weight`, if `workers` cores are free.
    """

    peak: int
    disk: int
    read: int
    seconds: float


# Rough times of one core for one weight in nanoseconds: rounding to nearest with the default search, measured on two cores with AVX-512
# (bench/plan_peak.py, 243 million weights, 21 November 2026; Q4_K_M from 8 billion). Copying is bound by the disk.
NANOSECONDS = {
    "FP8": 28, "INT8 W8A8": 24, "Q8_0": 32, "Q6_K": 35, "Q5_K_M": 35, "Q4_K_M": 36, "Q3_K_M": 35, "Q2_K": 40, "IQ4_XS": 180, "INT4 g128": 27,
    "NF4": 48, "NVFP4": 860, "MXFP4": 1400,
}  # fmt: skip
COPY_NANOSECONDS = 1.0
OTHER_NANOSECONDS = 150


def nanoseconds_per_weight(storage: Storage) -> float:
    """Time of one core for one weight, roughly."""
    return COPY_NANOSECONDS if storage.plain else NANOSECONDS.get(storage.label, OTHER_NANOSECONDS)


def quantize_cost(model: Model, storage: Storage, *, workers: int = 2, ram: int = 1 << 50) -> Cost:
    """Peak memory, disk and time of a data-free run for one output."""
    pairs = list(zip(model.weights, held(model, storage), strict=True))
    alike = {(w.shape, w.dtype, w.kept, w.role, row.nbytes): (w, row.scheme, row.nbytes) for w, row in pairs}
    jobs = [_job(storage, *row) for row in alike.values() for _ in range(workers)]
    peak = quantize_memory(jobs, ram, workers)
    disk = size_of(model, storage).total
    weights = sum(weight.numel for weight, row in pairs if row.scheme is not None)
    seconds = weights * nanoseconds_per_weight(storage) * 1e-9 / max(1, workers)
    return Cost(peak, disk, sum(weight.nbytes for weight in model.weights), seconds)


def quantize_memory(jobs: list[Job], ram: int, workers: int) -> int:
    """Peak bytes of resident memory of a data-free run, by the engine's own budget (`plan.resources`)."""
    try:
        return budget(jobs, ram, workers).peak
    except FewbitError:
        return budget(jobs, 1 << 60, 1).peak


def _job(storage: Storage, weight: Weight, scheme: Scheme | None, nbytes: int) -> Job:
    """One of the engine's jobs, as far as its memory goes."""
    shape = weight.matrix if scheme is not None else weight.shape
    ops = ("transpose",) if shape != weight.shape else ()
    gguf, form = storage.container == "gguf", storage.target.partition(":")[0]
    writes: Parts = {weight.name: ("U8", (nbytes // max(1, weight.count),))}
    if scheme is not None and form and not gguf:
        writes = format_named(form).parts(weight.name.replace("*", "0"), scheme, shape)
    by_rows = gguf and scheme is not None and len(shape) == 2
    name = weight.name
    return Job(
        name, name, (name,), ops, shape, weight.dtype, weight.role, weight.layer, scheme, "rtn", "", writes, by_rows
    )


def assumptions(model: Model, use: Use, device: Device | None) -> Mapping[str, Any]:
    """What the numbers rest on, in words."""
    found = {
        "activations": f"{min(CHUNK, use.context * use.batch):,} tokens at once x {width(model):,} values x 2 bytes + float32 logits; fused attention",
        "cache": f"{use.kv_dtype} keys and values, allocated for the whole context",
        "quantising": f"data-free; tensors are streamed, so memory follows the largest tensor; {BASE_BYTES / 1e9:.2f} GB for the program itself",
    }
    if device is not None and device.kind != "memory":
        found["device"] = (
            f"{device.usable:.0%} of the memory usable, {device.overhead_bytes * device.count / 1e9:.1f} GB for the runtime"
        )
    return found
