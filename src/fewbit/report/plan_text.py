"""What `fewbit plan` and `fewbit advise` print: one recommendation first, tables with units, the reasons below."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fewbit.plan.advise import Advice
from fewbit.plan.devices import GIB, Device, devices
from fewbit.plan.kv import KV_BITS, kv_bytes, kv_summary
from fewbit.plan.memory import Use, assumptions, longest_context
from fewbit.plan.overview import SHOWN, OnDevice, Overview, Row
from fewbit.plan.sizes import count_by_kind
from fewbit.report.plan_words import (
    BAD,
    DIM,
    GOOD,
    clock,
    gb,
    heading,
    kl_words,
    loss_words,
    model_line,
    speed_words,
    tokens,
)
from fewbit.report.text import render, table


def page(made: Overview) -> str:
    """The whole page of `fewbit plan`."""
    parts: list[Any] = [model_line(made.model)]
    for device, advice in zip(made.devices, made.advices, strict=True):
        parts.append(_recommendation(made, device, advice))
    if made.by_memory:
        parts += _by_memory(made)
    parts += _storages(made)
    for index, device in enumerate(made.devices):
        parts += _device(made, device, [row.devices[index] for row in made.rows])
    if not made.devices:
        parts += _holders(made)
    parts += [*_kinds(made), *_cache(made), *_training(made), *_cost(made), *_assumptions(made)]
    return render(*parts)


def use_words(use: Use) -> str:
    return (
        f"{use.context:,} tokens" + (f" x {use.batch} sequences" if use.batch > 1 else "") + f", {use.kv_dtype} cache"
    )


def _recommendation(made: Overview, device: Device, advice: Advice) -> Text:
    line = heading(f"Recommended for {device.name}", use_words(made.use))
    best = advice.best
    if best is None:
        candidates = [option for option in advice.options if not option.refused]
        line.append("\nnothing fits whole", style=BAD)
        if candidates:
            near = candidates[0]
            line.append(
                f"; nearest: {near.name} with {near.on_device} of {near.layers} layers on the device, {gb(near.needed.total)} GB needed"
            )
            line.append(f"\n$ {near.command}", style="bold") if near.command else None
        return line
    line.append(f"\n{best.name}", style=f"bold {GOOD}")
    line.append(
        f"   {gb(best.size.total)} GB of weights, {gb(best.needed.total)} GB in all; {loss_words(best)}; {speed_words(best)}"
    )
    if best.command:
        line.append(f"\n$ {best.command}", style="bold")
    line.append("\nwhy, and what else: fewbit advise", style=DIM)
    return line


def _by_memory(made: Overview) -> list[Any]:
    rows = []
    for index, (size, option) in enumerate(made.by_memory):
        if index and option and (previous := made.by_memory[index - 1][1]) and previous.name == option.name:
            continue  # a larger card changes nothing until a better scheme fits
        if option is None:
            rows.append((f"{size} GB", Text("nothing fits", style=DIM), "", "", ""))
        else:
            rows.append(
                (
                    f"{size} GB",
                    Text(option.name, style=GOOD),
                    gb(option.needed.total),
                    kl_words(option),
                    option.command or "as it is",
                )
            )
    columns = (("card from", "right"), ("choose", "left"), ("needs GB", "right"), ("KL", "right"), ("command", "left"))
    note = f"least loss that fits {use_words(made.use)}; name a --device for speed too"
    return [heading("Recommended by memory", note), table(columns, rows)]


def _storages(made: Overview) -> list[Any]:
    moe = made.model.experts > 0
    columns = [
        ("scheme", "left"),
        ("weights", "right"),
        ("bits/weight", "right"),
        ("metadata", "right"),
        ("cache", "right"),
        ("working", "right"),
        ("needed GB", "right"),
    ]
    columns += [("read a token", "right")] if moe else []
    rows = []
    for row in made.rows:
        cells: list[Any] = [
            row.label, gb(row.size.total), f"{row.size.bits_per_weight:.2f}", f"{row.size.metadata / row.size.total:.1%}",
            gb(row.needed.kv), gb(row.needed.activations), Text(gb(row.needed.total), style="bold"),
        ]  # fmt: skip
        rows.append(cells + ([gb(row.step_bytes)] if moe else []))
    return [
        heading("Memory to run it", f"GB of 10^9 bytes; {use_words(made.use)}; the device's own overhead comes on top"),
        table(columns, rows),
    ]


def _device(made: Overview, device: Device, fits: list[OnDevice]) -> list[Any]:
    facts = [
        f"{device.memory_bytes / GIB:.4g} GiB ({gb(device.memory_bytes)} GB), {gb(device.budget)} GB of it for the model"
    ]
    if device.bandwidth:
        facts.append(f"{device.bandwidth / 1e9:,.0f} GB/s")
    rates = [
        f"{label} {device.rate(dtype) / 1e12:,.0f}"
        for dtype, label in (("bf16", "16-bit"), ("fp8", "FP8"), ("int8", "INT8"), ("fp4", "FP4"))
        if device.rate(dtype)
    ]
    facts += [f"TFLOPS: {', '.join(rates)}"] if rates else []
    rows = []
    for row, on in zip(made.rows, fits, strict=True):
        held = on.fits
        verdict = (
            Text("fits", style=GOOD)
            if held
            else Text(f"{on.split.on_device}/{on.split.layers} layers" if on.split.on_device else "no", style=BAD)
        )
        decode = on.speed.decode if held else on.offloaded_decode
        rows.append(
            (
                row.label, gb(row.needed.total), verdict, tokens(on.context) if on.context else "-", tokens(decode) if decode else "?",
                tokens(on.speed.prefill) if held and on.speed.prefill else "-", on.speed.compute or "?",
            )
        )  # fmt: skip
    columns = (
        ("scheme", "left"), ("needed GB", "right"), ("whole?", "left"), ("longest context", "right"), ("decode tok/s <=", "right"),
        ("prompt tok/s <=", "right"), ("multiplies in", "left"),
    )  # fmt: skip
    return [heading(device.name, " · ".join(facts)), table(columns, rows)]


def _holders(made: Overview) -> list[Any]:
    shown = [devices()[name] for name in SHOWN]
    rows = []
    for row in made.rows:
        cells: list[Any] = [row.label, gb(row.needed.total)]
        for device in shown:
            held = device.name in row.holders
            cells.append(Text(tokens(_context(made, row, device)), style=GOOD) if held else Text("·", style=DIM))
        rows.append(cells)
    columns = [("scheme", "left"), ("GB", "right")] + [(_short(device), "right") for device in shown]
    return [
        heading(
            "Devices that hold it",
            "and the longest context of one that does; · is too small. `fewbit plan --devices` lists all",
        ),
        table(columns, rows),
    ]


def _context(made: Overview, row: Row, device: Device) -> int:
    return longest_context(made.model, row.size, made.layers, made.use, device)


def _short(device: Device) -> str:
    name = (
        device.name.removeprefix("RTX ")
        .removeprefix("Apple ")
        .replace(" 128GB", "")
        .replace("Desktop ", "")
        .replace(" 64GB", "")
    )
    return f"{name}\n{device.memory_bytes / GIB:.0f}"


def _kinds(made: Overview) -> list[Any]:
    total = made.model.params
    rows = [
        (kind, f"{count:,}", f"{params:,}", f"{params / total:.1%}", gb(nbytes))
        for kind, (count, params, nbytes) in count_by_kind(made.model).items()
    ]
    columns = (
        ("part", "left"),
        ("tensors", "right"),
        ("parameters", "right"),
        ("share", "right"),
        ("GB as given", "right"),
    )
    return [heading("Where the parameters are"), table(columns, rows)]


def _cache(made: Overview) -> list[Any]:
    if not made.layers:
        return []
    limit = made.model.max_context or 1 << 20
    contexts = sorted({made.use.context, *(size for size in (2048, 8192, 32768, 131072) if size <= limit)})
    dtypes = [dtype for dtype in ("f16", "fp8", "q8_0", "q4_0") if dtype in KV_BITS]
    rows = [
        (f"{context:,}", *(gb(kv_bytes(made.layers, context, made.use.batch, dtype)) for dtype in dtypes))
        for context in contexts
    ]
    columns = [("tokens", "right")] + [(f"{dtype} GB", "right") for dtype in dtypes]
    return [heading("Key-value cache", kv_summary(made.layers)), table(columns, rows)]


def _training(made: Overview) -> list[Any]:
    rows = [
        (
            row.label, f"{row.trained / 1e9:.3g}B" if row.trained >= 1e9 else f"{row.trained / 1e6:.0f}M", gb(row.weights), gb(row.gradients),
            gb(row.optimizer), gb(row.checkpointed), gb(row.activations), Text(gb(row.total), style="bold"), row.note,
        )
        for row in made.trainings
    ]  # fmt: skip
    columns = (
        ("recipe", "left"), ("trained", "right"), ("weights", "right"), ("gradients", "right"), ("optimiser", "right"), ("activations", "right"),
        ("unchecked", "right"), ("total GB", "right"), ("", "left"),
    )  # fmt: skip
    return [
        heading(
            "Memory to train it",
            "one sequence; activations with gradient checkpointing, and without it; LoRA of rank 16 on every linear layer",
        ),
        table(columns, rows),
    ]


def _cost(made: Overview) -> list[Any]:
    rows = [
        (row.label, gb(row.cost.peak), gb(row.cost.disk), gb(row.cost.read), clock(row.cost.seconds))
        for row in made.rows
        if row.target and row.label != "FP32"
    ]
    columns = (
        ("to", "left"),
        ("peak RAM GB", "right"),
        ("disk GB", "right"),
        ("read GB", "right"),
        ("time, roughly", "right"),
    )
    return [
        heading(
            "Quantising it here",
            "data-free; calibrated methods run the model once more, see `fewbit quantize --dry-run`",
        ),
        table(columns, rows),
    ]


def _assumptions(made: Overview) -> list[Any]:
    line = heading("What this rests on")
    line.append("\nweights and cache: exact, from shapes", style=DIM)
    found = assumptions(made.model, made.use, made.devices[0] if made.devices else None)
    for name, text in found.items():
        line.append(f"\n{name}: {text}", style=DIM)
    line.append(
        "\nspeeds are ceilings (bandwidth over bytes read; operations over peak rate): real engines reach 50 to 90 % of the first",
        style=DIM,
    )
    return [line]


def device_page() -> str:
    """`fewbit plan --devices`."""
    rows = []
    for device in devices().values():
        rates = [
            f"{device.tflops[dtype]:,.4g}" if dtype in device.tflops else "·"
            for dtype in ("fp16", "bf16", "int8", "fp8", "fp4")
        ]
        rows.append(
            (device.name, device.kind, f"{device.memory_bytes / GIB:.4g}", f"{device.bandwidth / 1e9:,.0f}", *rates)
        )
    columns = (
        ("device", "left"), ("kind", "left"), ("GiB", "right"), ("GB/s", "right"), ("FP16", "right"), ("BF16", "right"), ("INT8", "right"),
        ("FP8", "right"), ("FP4", "right"),
    )  # fmt: skip
    return render(
        heading("Devices", "rates in 10^12 operations a second, dense; · is not multiplied natively"),
        table(columns, rows),
    )
