"""Evaluations as the terminal shows them, from the plain data of `Study.record`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from fewbit.report.text import human_bytes, render, table

Record = Mapping[str, Any]


def with_error(value: float | None, error: float | None, scale: float = 1.0, unit: str = "") -> str:
    """Value ± standard error, to two digits of the error."""
    if value is None:
        return "overflow"
    value, error = value * scale, (error or 0.0) * scale
    if not error or not math.isfinite(error):
        return f"{value:.4g}{unit}"
    power = math.floor(math.log10(abs(value))) if value else 0
    if power < -3:  # 1.35e-4 ± 0.04e-4
        return f"{_rounded(value / 10.0**power, error / 10.0**power)}e{power}{unit}".replace(" ± ", f"e{power} ± ")
    return f"{_rounded(value, error)}{unit}"


def _rounded(value: float, error: float) -> str:
    """To the error's first digit, its second where the first is 1 or 2; never less than three digits of the value."""
    digits = -math.floor(math.log10(error))
    digits = max(0, digits + (error * 10**digits < 3), 2 - math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def estimate(record: Record, scale: float = 1.0, unit: str = "") -> str:
    """A measure of `Score.record` in words."""
    return with_error(record["value"], record["stderr"], scale, unit)


def short(path: str) -> str:
    """A path's last part; what is no path as it is."""
    return path.rstrip("/").rpartition("/")[2] or path


def study_page(record: Record) -> str:
    """The table of `fewbit eval`: warnings first, then every candidate with its errors, then what limits the figures."""
    scores, text, used = record["scores"], record["text"], record["resources"]
    parts: list[Any] = [f"warning: {line}" for line in record["warnings"]]
    head = f"{text['scored']:,} tokens of {text['source']} in {text['windows']} windows of {text['length']}"
    if scores:
        parts.append(f"base {record['base']['name']}: perplexity {estimate(scores[0]['base_perplexity'])} over {head}")
    parts += ["", _table(scores), ""]
    for key in ("engines", "generation", "tasks", "embedding"):
        if key in record:
            parts += [_extra(record[key]), Text(record[key]["note"], style="dim"), ""]
    if record["noise_floor"]:
        floors = ", ".join(f"{short(item['name'])} {item['kl']['value']:.2g}" for item in record["noise_floor"])
        parts.append(Text(f"noise floor, KL of the base with itself: {floors}", style="dim"))
    bound = max((item["kl_error_bound"] for item in scores), default=0.0)
    if bound:
        share = max(item["kl_error_bound"] / item["kl"]["value"] for item in scores if item["kl"]["value"])
        size = used["cache_bytes"] / used["full_logits_bytes"]
        line = f"base kept in {human_bytes(used['cache_bytes'])}, {size:.1%} of its logits; KL exact to {bound:.1g} nats ({share:.1%} at most)"
        parts.append(Text(line, style="dim"))
    groups = scores[0]["clusters"] if scores else 0
    line = f"± is one standard error over {groups} independent documents or windows; {used['forward_passes']} forward passes"
    parts.append(
        Text(
            f"{line}, {human_bytes(used['peak_bytes'])} peak memory (at most {human_bytes(used['predicted_peak_bytes'])} foreseen)",
            style="dim",
        )
    )
    return render(*parts, width=190)


def _table(scores: Sequence[Record]) -> Any:
    columns = [
        ("candidate", "left"),
        ("path", "left"),
        ("bytes", "right"),
        ("bits/w", "right"),
        ("perplexity", "right"),
        ("ratio", "right"),
        ("KL, nats", "right"),
    ]
    columns += [
        ("median", "right"),
        ("99 %", "right"),
        ("99.9 %", "right"),
        ("max", "right"),
        ("same top 1", "right"),
        ("top 5", "right"),
        ("RMS Δp", "right"),
    ]
    several = len({item["path"] for item in scores}) > 1
    columns = columns if several else [column for column in columns if column[0] != "path"]
    rows = []
    for item in scores:
        quantiles = item["kl_quantiles"]
        cells = [
            short(item["name"]), item["path"], human_bytes(item["bytes"]), f"{item['bits_per_weight']:.3f}", estimate(item["perplexity"]),
            estimate(item["perplexity_ratio"]), estimate(item["kl"]), *(f"{quantiles[q]['value']:.3g}" for q in ("0.5", "0.99", "0.999", "1.0")),
            estimate(item["top1"], 100, " %"), estimate(item["top5"], 100, " %"), estimate(item["rms_delta_p"], 100, " %"),
        ]  # fmt: skip
        rows.append(cells if several else [*cells[:1], *cells[2:]])
    return table(columns, rows)


def _extra(found: Record) -> Any:
    """A table that `eval` made besides: cells are words or {"value", "stderr"}."""
    columns = [(head, "left" if index == 0 else "right") for index, head in enumerate(found["heads"])]
    return table(
        columns,
        [[estimate(cell) if isinstance(cell, Mapping) else short(str(cell)) for cell in row] for row in found["rows"]],
    )
