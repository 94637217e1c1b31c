"""What `fewbit advise` prints: the best option, the ranked rest, the steps of the decision, and what is out and why."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fewbit.plan.advise import Advice, Option
from fewbit.plan.devices import Device
from fewbit.plan.shapes import Model
from fewbit.report.plan_words import BAD, DIM, GOOD, gb, heading, kl_words, loss_words, model_line, speed_words, tokens
from fewbit.report.text import render, table


def advice_page(model: Model, device: Device, advice: Advice, limit: int = 4) -> str:
    """The page of `fewbit advise`: the best option, the ranked rest, the steps, what is out and why."""
    usable = [option for option in advice.options if not option.refused]
    parts: list[Any] = [model_line(model)]
    if usable:
        parts.append(_first(usable[0], device))
        parts += [heading("Ranked options", f"on {device.name}"), _ranking(usable)]
        parts += _options(usable[1:limit], usable[0].warnings)
    else:
        parts.append(Text("\nno option works here: see the reasons below", style=BAD))
    parts += [heading("How this was decided"), *(_step(number, step) for number, step in enumerate(advice.steps, 1))]
    refused = [option for option in advice.options if option.refused]
    if refused:
        reasons: dict[str, list[str]] = {}
        for option in refused:
            reasons.setdefault(option.refused, []).append(option.name)
        line = heading("Left out")
        for reason, names in reasons.items():
            line.append(f"\n{', '.join(names)}: {reason}", style=DIM)
        parts.append(line)
    return render(*parts)


def _first(option: Option, device: Device) -> Text:
    line = heading(f"Choose {option.name}")
    fit = "fits whole" if option.fits else f"{option.on_device} of {option.layers} layers fit {device.name}"
    line.append(
        f"\n{gb(option.size.total)} GB of weights ({option.size.bits_per_weight:.2f} bits each), {gb(option.needed.total)} GB in all: {fit}"
    )
    line.append(f"\n{loss_words(option)}; {speed_words(option)}")
    for warning in option.warnings:
        line.append(f"\nnote: {warning}", style="yellow")
    line.append(f"\n$ {option.command}" if option.command else "\nno conversion needed", style="bold")
    return line


def _ranking(options: list[Option]) -> Any:
    rows = []
    for rank, option in enumerate(options, 1):
        fit = (
            Text("whole", style=GOOD) if option.fits else Text(f"{option.on_device}/{option.layers} layers", style=BAD)
        )
        ratio = Text(
            "?" if not option.speed.decode else f"{option.speedup:.2f} x", style="" if option.speedup >= 0.98 else BAD
        )
        risk = Text(option.risk, style={"low": GOOD, "medium": "yellow", "high": BAD}[option.risk])
        rows.append(
            (
                f"{rank}", option.name, gb(option.size.total), gb(option.needed.total), fit, tokens(option.context) if option.context else "-",
                ratio, f"{option.prefill_ratio:.2f} x" if option.speed.prefill else "?", kl_words(option), risk,
            )
        )  # fmt: skip
    columns = (
        ("", "right"), ("option", "left"), ("weights GB", "right"), ("needed GB", "right"), ("fits", "left"), ("longest context", "right"),
        ("decode vs BF16", "right"), ("prompt vs BF16", "right"), ("KL", "right"), ("risk", "left"),
    )  # fmt: skip
    return table(columns, rows)


def _options(options: list[Option], said: tuple[str, ...]) -> list[Any]:
    """The next options; notes that were already given for one above are not repeated."""
    found, known = [], set(said)
    for option in options:
        line = Text(f"\n{option.name}", style="bold")
        line.append(f"   {loss_words(option)}; {speed_words(option)}")
        line.append(f"\n  {option.source}", style=DIM)
        for warning in option.warnings:
            if warning not in known:
                line.append(f"\n  note: {warning}", style="yellow")
        known |= set(option.warnings)
        if option.command:
            line.append(f"\n  $ {option.command}")
        found.append(line)
    return found


def _step(number: int, step: Any) -> Text:
    line = Text(f"{number}. {step.question} ", style="bold")
    return line.append(step.answer, style="").append(f"\n   so: {step.therefore}", style=DIM)
