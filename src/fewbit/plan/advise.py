"""Which scheme to choose: a decision procedure over facts, every step of it in words.

Facts come from the plan (sizes, cache, ceilings), from `devices.toml` (what the hardware multiplies natively), and from `measured.toml`
(what each scheme is known to cost in quality, what engines load, what tasks bear). Options that cannot work are kept, with the reason.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any

from fewbit.base.errors import InputError
from fewbit.plan.advise_engine import Engine, engine_on, measured, misfits, refusal
from fewbit.plan.devices import Device
from fewbit.plan.kv import KvLayer
from fewbit.plan.memory import Needed, Use, longest_context, needed, offload
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import STORAGES, Size, size_of
from fewbit.plan.throughput import Speed, compute_dtype, matmul_params, offloaded_decode, speed, step_seconds

# (quality, speed, size): how much each counts
PRIORITIES = {
    "balanced": (1.0, 1.0, 0.5),
    "quality": (3.0, 0.4, 0.2),
    "speed": (0.7, 3.0, 0.5),
    "size": (0.7, 0.5, 3.0),
}
WIDENING_LOSS = 0.7  # weight-only kernels past the point where compute limits: 0.6 to 0.75 of BF16's rate (vLLM's Marlin beyond batch 128)


@dataclass(frozen=True)
class Wish:
    """What the user wants."""

    model_id: str
    use: Use
    engine: str = ""
    task: str = "chat"
    priority: str = "balanced"
    calibration: bool = True
    finetune: bool = False


@dataclass(frozen=True)
class Step:
    """One question of the procedure, its answer, and what follows from it."""

    question: str
    answer: str
    therefore: str


@dataclass(frozen=True)
class Option:
    """One scheme judged.

    Attributes:
        refused: why it cannot be used here, "" when it can.
        kl: expected mean KL divergence from the 16-bit model, nats a token.
        speedup: decoding ceiling against BF16's on the same memory, after what kernels lose.
        warnings: what the user should know before choosing it.
        command: what makes it, "" for the model as it is.
    """

    name: str
    size: Size
    needed: Needed
    fits: bool
    context: int
    on_device: int
    layers: int
    speed: Speed
    speedup: float
    prefill_ratio: float
    kl: float
    basis: str
    source: str
    risk: str
    warnings: tuple[str, ...]
    command: str
    refused: str = ""
    score: float = 0.0


@dataclass(frozen=True)
class Advice:
    """The answer: options best first (those refused last), and the steps that led there."""

    steps: tuple[Step, ...]
    options: tuple[Option, ...]

    @property
    def best(self) -> Option | None:
        return next((option for option in self.options if not option.refused and option.fits), None)


def task_row(name: str) -> Mapping[str, Any]:
    """What a task bears.

    Raises:
        InputError: FB-E0455 with the names that exist.
    """
    table = measured()["task"]
    if name.lower() not in table:
        raise InputError("FB-E0455", f"no task is called {name!r}; there are {', '.join(table)}")
    return table[name.lower()]


def size_factor(params: int) -> float:
    """How much more (or less) a model of this size loses than one of 8B."""
    return next(row["factor"] for row in measured()["size"]["factors"] if params <= row["upto"] * 1e9)


def advise(model: Model, layers: tuple[KvLayer, ...], device: Device, wish: Wish) -> Advice:
    """Ranked options for a model on a device, with the steps of the decision.

    Raises:
        InputError: FB-E0454, FB-E0455, FB-E0456 for words that name nothing.
    """
    if wish.priority not in PRIORITIES:
        raise InputError("FB-E0456", f"no priority is called {wish.priority!r}; there are {', '.join(PRIORITIES)}")
    rows = measured()["option"]
    engine = engine_on(wish.engine, device)
    task = task_row(wish.task)
    base = size_of(model, STORAGES["BF16"])
    options = [_judge(name, row, model, layers, device, wish, engine, base) for name, row in rows.items()]
    scored = [_scored(option, base, task["bears"], wish.priority) for option in options]
    ranked = sorted(scored, key=lambda option: (bool(option.refused), not option.fits, -option.score))
    return Advice(tuple(_steps(model, layers, device, wish, task, base, engine)), tuple(ranked))


def _judge(
    name: str,
    row: Mapping[str, Any],
    model: Model,
    layers: tuple[KvLayer, ...],
    device: Device,
    wish: Wish,
    engine: Engine | None,
    base: Size,
) -> Option:
    storage = STORAGES[row["storage"]]
    size = size_of(model, storage)
    use = wish.use
    needs = needed(model, size, layers, use, device)
    fit = needs.total - needs.overhead <= device.budget
    split = offload(model, storage, layers, use, device)
    ceiling = speed(model, size, layers, use, device)
    ratio, prefill, notes = _against_bf16(model, size, base, layers, use, device)
    if not fit:  # BF16 does not fit either: both are held up by what they read from main memory
        slow = offloaded_decode(size, split, layers, use, device)
        other = offloaded_decode(base, offload(model, base.storage, layers, use, device), layers, use, device)
        ceiling, ratio = replace(ceiling, decode=slow, bound="main memory"), slow / other if other else 1.0
        notes.append(
            "layers in main memory set the pace: a smaller scheme, a shorter context or a second device helps most"
        )
    calibrated = row.get("calibration", False) and wish.calibration
    kl = (row["kl"] if calibrated or "kl_without" not in row else row["kl_without"]) * size_factor(model.params)
    risk, risks = _risk(kl, row, model, wish)
    odd, total, reason = misfits(model, row.get("to", ""))
    if odd:
        risks.append(f"{odd:,} of {total:,} matrices stay in 16 bits: {reason}")
    return Option(
        name, size, needs, fit, longest_context(model, size, layers, use, device), split.on_device, split.layers, ceiling, ratio, prefill, kl,
        row["basis"], row["source"], risk, tuple(notes + risks), _command(model, row, wish), _refusal(model, row, device, wish, engine),
    )  # fmt: skip


def _refusal(model: Model, row: Mapping[str, Any], device: Device, wish: Wish, engine: Engine | None) -> str:
    """Why an option cannot be used, or nothing."""
    flags = row.get("flags", "")
    needs = [method for flag, method in (("--method gptq", "GPTQ"), ("--rewrites awq", "AWQ")) if flag in flags]
    if needs and not wish.calibration:
        return f"{needs[0]} needs calibration text, which is not at hand"
    return refusal(model, row, engine, device)


def _against_bf16(
    model: Model, size: Size, base: Size, layers: tuple[KvLayer, ...], use: Use, device: Device
) -> tuple[float, float, list[str]]:
    """(decoding ratio, prefill ratio, warnings) against BF16 on the same device, had it the memory."""
    storage = size.storage
    native = storage.compute in device.tflops or storage.plain
    widened = not native or (storage.compute == "bf16" and not storage.plain)
    efficiency = WIDENING_LOSS if widened else 1.0
    own, other = (
        step_seconds(model, size, layers, use, device, efficiency),
        step_seconds(model, base, layers, use, device),
    )
    ceiling, reference = speed(model, size, layers, use, device), speed(model, base, layers, use, device)
    ratio = other / own if own else 1.0
    prefill = efficiency * ceiling.prefill / reference.prefill if reference.prefill else 1.0
    notes = []
    if ratio < 0.98 and storage.label != "BF16":
        notes.append("slower than BF16 here: at this batch compute limits, and low-bit weights must be widened first")
    elif prefill < 0.98 and storage.label != "BF16":
        notes.append("prompts run somewhat slower than in BF16: weights are widened before they are multiplied")
    if storage.compute in ("fp8", "int8", "fp4") and not native and device.tflops:
        notes.append(f"this device does not multiply {storage.compute.upper()} natively: it saves memory, not compute")
    return ratio, prefill, notes


def _risk(kl: float, row: Mapping[str, Any], model: Model, wish: Wish) -> tuple[str, list[str]]:
    """low, medium or high, and what to know."""
    bears = task_row(wish.task)["bears"]
    notes = []
    if row["basis"] != "measured":
        notes.append("the expected loss is estimated, not measured: run `fewbit eval`")
    if model.experts and row.get("calibration") and wish.calibration:
        notes.append("experts that calibration text reaches rarely get rough statistics: use more text")
    risk = "low" if kl <= bears / 2 else "medium" if kl <= bears else "high"
    if risk == "high":
        notes.append(f"expected KL {kl:.3f} is more than {wish.task} bears ({bears:g})")
    return risk, notes


def _command(model: Model, row: Mapping[str, Any], wish: Wish) -> str:
    """The exact command that makes an option."""
    if "to" not in row:
        return ""
    source = model.name if wish.model_id.endswith(".json") else wish.model_id
    name = source.rstrip("/").rsplit("/", 1)[-1]
    words = ["fewbit quantize", shlex.quote(source), f"--to {row['to']}"]
    if wish.calibration or "--calib" not in row.get("flags", ""):
        words.append(row.get("flags", ""))
    if misfits(model, row["to"])[0]:
        words.append("--on-misfit keep")
    words.append(f"-o {shlex.quote(f'{name}-' + row['to'].replace(':', '-'))}")
    return " ".join(filter(None, words))


def _scored(option: Option, base: Size, bears: float, priority: str) -> Option:
    quality, fast, small = PRIORITIES[priority]
    loss = option.kl / bears
    score = -quality * (loss + max(0.0, loss - 1.0) * 3.0)
    score += fast * (log2(max(option.speedup, 1e-3)) + 0.25 * log2(max(option.prefill_ratio, 1e-3)))
    score += small * log2(base.total / option.size.total)
    return Option(**{**option.__dict__, "score": score})


def _steps(
    model: Model,
    layers: tuple[KvLayer, ...],
    device: Device,
    wish: Wish,
    task: Mapping[str, Any],
    base: Size,
    engine: Engine | None,
) -> list[Step]:
    """The procedure in words."""
    use = wish.use
    needs = needed(model, base, layers, use, device)
    room = device.budget / 1e9
    factor = size_factor(model.params)
    fit = needs.total - needs.overhead <= device.budget
    return [
        Step(
            "How big is it?",
            f"{model.params / 1e9:.2f}B parameters"
            + (f", {model.active_params / 1e9:.2f}B active a token" if model.experts else ""),
            f"expect {factor:g} x the loss of an 8B model"
            if factor != 1
            else "expect the loss of the 8B models that were measured",
        ),
        Step(
            "Does it fit as it is?",
            f"BF16 needs {(needs.total - needs.overhead) / 1e9:.1f} GB for {use.context:,} tokens x {use.batch}, {device.name} leaves {room:.1f} GB",
            "quantise for speed, or not at all"
            if fit
            else f"at most {max(0.0, _bits_that_fit(model, needs, device)):.1f} bits a weight fit",
        ),
        _native_step(device),
        _bound_step(model, layers, device, use, base),
        _engine_step(wish, engine),
        Step(
            "How hard is the task?",
            task["why"],
            f"expected KL up to {task['bears']:g} nats a token is taken as bearable",
        ),
        Step(
            "Is calibration text at hand?",
            "yes (--calib default is built in)" if wish.calibration else "no",
            "GPTQ, AWQ and importance matrices are in" if wish.calibration else "only data-free methods are in",
        ),
        Step(
            "Will it be fine-tuned?",
            "yes" if wish.finetune else "no",
            "train with QLoRA on NF4, then quantise the merged model again" if wish.finetune else "nothing follows",
        ),
    ]


def _engine_step(wish: Wish, engine: Engine | None) -> Step:
    question = "What does the engine load?"
    if engine is None:
        return Step(question, "no engine named", "every format stays in")
    name = engine.label if wish.engine else f"none named, {engine.label} is usual on such a device"
    return Step(question, f"{name}: {', '.join(engine.formats)}", "other formats are out")


def _bits_that_fit(model: Model, needs: Needed, device: Device) -> float:
    return 8 * (device.budget - needs.kv - needs.activations) / max(1, model.params)


def _native_step(device: Device) -> Step:
    names = {"fp8": "FP8", "int8": "INT8", "fp4": "FP4"}
    if not device.tflops:
        return Step("What does the device multiply natively?", "unknown", "speed cannot be judged")
    has = [label for dtype, label in names.items() if device.native(dtype)]
    lacks = [label for dtype, label in names.items() if not device.native(dtype)]
    answer = (f"{', '.join(has)}" if has else "16-bit floats only") + (
        f"; not {', '.join(lacks)}" if has and lacks else ""
    )
    return Step(
        "What does the device multiply natively?",
        answer,
        "those can speed up prompts and large batches; the rest saves memory and bandwidth only",
    )


def _bound_step(model: Model, layers: tuple[KvLayer, ...], device: Device, use: Use, base: Size) -> Step:
    question = f"What limits decoding at batch {use.batch}?"
    dtype = compute_dtype(STORAGES["BF16"], device)
    if not device.bandwidth or not dtype:
        return Step(question, "unknown: no bandwidth is known for this device", "fewer bytes are taken to be faster")
    crossing = device.rate(dtype) * base.active / (2.0 * matmul_params(model) * device.bandwidth)
    bound = speed(model, base, layers, use, device).bound
    answer = f"{bound}; compute takes over at a batch of some {crossing:,.0f}"
    return Step(
        question,
        answer,
        "fewer bytes mean more tokens a second" if bound == "memory" else "only natively multiplied dtypes help",
    )
