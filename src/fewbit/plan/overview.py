"""Everything that `fewbit plan` shows, as data: sizes, memory, devices, ceilings, training and the cost of quantising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewbit.plan.advise import Advice, Option, Wish, advise
from fewbit.plan.devices import GIB, Device, devices
from fewbit.plan.kv import KV_BITS, KvLayer, kv_bytes, kv_layers, kv_summary
from fewbit.plan.memory import (
    Cost,
    Needed,
    Split,
    Use,
    assumptions,
    fits,
    longest_context,
    needed,
    offload,
    quantize_cost,
)
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import LISTED, STORAGES, Size, count_by_kind, size_of
from fewbit.plan.throughput import Speed, decode_bytes, offloaded_decode, speed
from fewbit.plan.training import Training, training

CLASSES = (8, 12, 16, 24, 32, 48, 80, 141, 192)  # memories that cards come with
# the devices of the short table; --json lists all
SHOWN = (
    "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "RTX PRO 6000", "H100", "H200", "B200", "Apple M4 Max 128GB", "Desktop DDR5 64GB",
)  # fmt: skip


@dataclass(frozen=True)
class OnDevice:
    """One storage on one device."""

    device: str
    fits: bool
    context: int
    split: Split
    speed: Speed
    offloaded_decode: float


@dataclass(frozen=True)
class Row:
    """One storage: its size, what running it takes, and how it does on the devices asked for."""

    label: str
    spelling: str
    target: str
    size: Size
    needed: Needed
    cost: Cost
    step_bytes: int
    devices: tuple[OnDevice, ...]
    holders: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """The whole page."""

    model: Model
    use: Use
    layers: tuple[KvLayer, ...]
    rows: tuple[Row, ...]
    trainings: tuple[Training, ...]
    devices: tuple[Device, ...]
    advices: tuple[Advice, ...]
    by_memory: tuple[tuple[int, Option | None], ...]

    def record(self) -> dict[str, Any]:
        """The page as plain data, for `--json`."""
        model = self.model
        facts = {
            "name": model.name, "model_type": model.model_type, "source": model.source, "params": model.params, "active_params": model.active_params,
            "layers": model.layers, "hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "max_context": model.max_context,
            "experts": model.experts, "experts_per_token": model.experts_per_token, "tied": model.tied, "disk_bytes": model.disk_bytes,
            "notes": list(model.notes),
        }  # fmt: skip
        return {
            "model": facts,
            "use": self.use,
            "kinds": {
                kind: dict(zip(("tensors", "params", "bytes"), row, strict=True))
                for kind, row in count_by_kind(model).items()
            },
            "kv": {
                "summary": kv_summary(self.layers),
                "bytes": kv_bytes(self.layers, self.use.context, self.use.batch, self.use.kv_dtype),
            },
            "kv_bytes": {dtype: kv_bytes(self.layers, self.use.context, self.use.batch, dtype) for dtype in KV_BITS},
            "storages": [_row_record(row) for row in self.rows],
            "training": [
                {**row.__dict__, "total": row.total, "total_unchecked": row.total_unchecked} for row in self.trainings
            ],
            "recommendations": {
                device.name: option_record(advice.best) if advice.best else None
                for device, advice in zip(self.devices, self.advices, strict=True)
            },
            "by_memory_gib": {str(size): option.name if option else None for size, option in self.by_memory},
            "assumptions": assumptions(model, self.use, self.devices[0] if self.devices else None),
        }


def _row_record(row: Row) -> dict[str, Any]:
    size = row.size
    return {
        "label": row.label, "scheme": row.spelling, "to": row.target, "weight_bytes": size.total, "bits_per_weight": size.bits_per_weight,
        "metadata_bytes": size.metadata, "quantised_share": size.quantised, "active_bytes": size.active, "bytes_by_kind": size.by_kind,
        "needed": {**row.needed.__dict__, "total": row.needed.total}, "decode_step_bytes": row.step_bytes, "quantize": row.cost,
        "devices": row.devices, "held_by": row.holders,
    }  # fmt: skip


def option_record(option: Option) -> dict[str, Any]:
    """One option of an advice as plain data."""
    return {
        "name": option.name, "refused": option.refused or None, "fits": option.fits, "weight_bytes": option.size.total,
        "bits_per_weight": option.size.bits_per_weight, "needed_bytes": option.needed.total, "longest_context": option.context,
        "layers_on_device": option.on_device, "layers": option.layers, "decode_ceiling": option.speed.decode, "prefill_ceiling": option.speed.prefill,
        "bound": option.speed.bound, "decode_vs_bf16": option.speedup, "prefill_vs_bf16": option.prefill_ratio, "expected_kl": option.kl,
        "basis": option.basis, "source": option.source, "risk": option.risk, "warnings": list(option.warnings), "score": option.score,
        "command": option.command,
    }  # fmt: skip


def overview(
    model: Model,
    use: Use,
    chosen: tuple[Device, ...] = (),
    *,
    wish: Wish | None = None,
    sequence: int = 2048,
    workers: int = 2,
) -> Overview:
    """Everything known about running, training and quantising a model."""
    layers = kv_layers(model.text)
    wanted = wish or Wish(model.name, use)
    made = (_row(model, label, layers, use, chosen, workers) for label in LISTED)
    rows = tuple(sorted(made, key=lambda row: -row.size.total))
    advices = tuple(advise(model, layers, device, wanted) for device in chosen)
    by_memory = () if chosen else _best_by_memory(model, layers, wanted)
    return Overview(model, use, layers, rows, training(model, sequence=sequence), chosen, advices, by_memory)


def _row(
    model: Model, label: str, layers: tuple[KvLayer, ...], use: Use, chosen: tuple[Device, ...], workers: int
) -> Row:
    storage = STORAGES[label]
    size = size_of(model, storage)
    needs = needed(model, size, layers, use)
    on = []
    for device in chosen:
        split = offload(model, storage, layers, use, device)
        on.append(
            OnDevice(
                device.name, fits(model, size, layers, use, device), longest_context(model, size, layers, use, device), split,
                speed(model, size, layers, use, device), offloaded_decode(size, split, layers, use, device),
            )
        )  # fmt: skip
    holders = tuple(name for name, device in devices().items() if needs.total <= device.budget)
    cost = quantize_cost(model, storage, workers=workers)
    return Row(
        label,
        storage.spelling,
        storage.target,
        size,
        needs,
        cost,
        decode_bytes(model, storage, layers, use),
        tuple(on),
        holders,
    )


def _best_by_memory(model: Model, layers: tuple[KvLayer, ...], wish: Wish) -> tuple[tuple[int, Option | None], ...]:
    """(GiB, the option that loses least among those that fit so much memory and that any engine loads) for the usual cards.

    What an option needs, loses and risks is the same on all of them, so they are judged once.
    """
    cards = {gib: Device(f"{gib} GiB", "memory", "any", gib * GIB, 0.97, int(0.8e9), 0.0, {}) for gib in CLASSES}
    options = [option for option in advise(model, layers, cards[CLASSES[-1]], wish).options if not option.refused]

    def best(card: Device) -> Option | None:
        fitting = [option for option in options if option.needed.total - option.needed.overhead <= card.budget]
        bearable = [option for option in fitting if option.risk != "high"]
        return min(bearable or fitting, key=lambda option: (option.kl, option.size.total), default=None)

    return tuple((gib, best(card)) for gib, card in cards.items())
