"""What people read in a terminal: plans, outcomes, contents of checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fewbit.plan.jobs import Output, Plan
    from fewbit.run.result import Result


def human_bytes(nbytes: float) -> str:
    """12.3 MB, decimal units as disks and vendors count them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 1000 or unit == "TB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return ""


def human_count(number: float) -> str:
    """1.24 B, 8.39 M, 512."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def render(*parts: Any, width: int | None = None) -> str:
    """Rich parts as text, coloured only on a terminal."""
    import os
    import sys

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    page = io.StringIO()
    console = Console(
        file=page,
        force_terminal=colour,
        width=width or (None if colour else 120),
        highlight=False,
        markup=False,
    )
    for part in parts:
        console.print(part)
    return page.getvalue().rstrip()


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A plain table; a column is (heading, "left" | "right")."""
    made = Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold"
    )
    for heading, side in columns:
        made.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def plan_page(plan: Plan) -> str:
    """A plan as `fewbit quantize --dry-run` shows it: what happens to every kind of tensor, sizes, warnings."""
    parts: list[Any] = []
    for output in plan.outputs:
        parts += [_output_table(output), _totals(output), ""]
    parts += [f"rewrite, {text}" for text in plan.rewrites]
    parts += [f"warning: {text}" for text in plan.warnings]
    parts.append(
        f"memory: {human_bytes(plan.peak_bytes)} at its peak (predicted){_on_device(plan)}; disk: {human_bytes(plan.disk_bytes)}"
    )
    if plan.needs:
        parts.append(f"calibration statistics: {', '.join(plan.needs)}")
    return render(*parts)


def _on_device(plan: Plan) -> str:
    return f", {human_bytes(plan.device_bytes)} on the device" if plan.device_bytes else ""


def _output_table(output: Output) -> Table:
    rows = [
        (role, stored, count, human_count(numel), human_bytes(nbytes), f"{8 * nbytes / max(1, numel):.3f}", reason)
        for (role, stored, reason), count, numel, nbytes in output.groups()
    ]
    columns = [
        ("role", "left"),
        ("stored as", "left"),
        ("tensors", "right"),
        ("weights", "right"),
        ("bytes", "right"),
        ("bits/w", "right"),
        ("because", "left"),
    ]
    return table(columns, rows, title=output.target)


def _totals(output: Output) -> str:
    return (
        f"total {human_bytes(output.nbytes)}, {output.bits_per_weight:.3f} bits per weight over all tensors; "
        f"{output.coverage:.1%} of the weights quantised"
    )


def outcome_page(result: Result) -> str:
    """What a run made: per output the path, the size, the coverage, and what the solvers and the check had to say."""
    parts: list[Any] = []
    for output, path, nbytes in zip(result.plan.outputs, result.outputs, result.nbytes, strict=True):
        parts.append(Text(f"{output.target} -> {path}", style="bold"))
        parts.append(f"  {human_bytes(nbytes)} on disk; {_totals(output)}")
    for text in result.warnings:
        parts.append(f"warning: {text}")
    for name, lines in list(result.notes.items())[:10]:
        parts.append(f"note: {name}: {'; '.join(lines)}")
    if len(result.notes) > 10:
        parts.append(f"… notes on {len(result.notes) - 10} more tensors; --json lists all")
    if result.verified is not None:
        parts += [f"verified: {getattr(item, 'summary', item)}" for item in result.verified]
    resumed = f", {result.resumed} tensors from an earlier run" if result.resumed else ""
    parts.append(f"{result.seconds:.1f} s, {human_bytes(result.peak_bytes)} peak memory{resumed}")
    return render(*parts)


def conversion_page(plan: Any, done: Any = None) -> str:
    """What becomes of the weights of a checkpoint in another format, grouped by what happens to them."""
    from collections import Counter

    groups = Counter((one.kind, str(one.scheme) if one.scheme else "-", one.how) for one in plan.weights.values())
    worst: dict[tuple[str, str, str], float] = {}
    for one in plan.weights.values():
        key = (one.kind, str(one.scheme) if one.scheme else "-", one.how)
        worst[key] = max(worst.get(key, 0.0), one.error or 0.0)
    columns = [("what", "left"), ("weights", "right"), ("scheme", "left"), ("how", "left"), ("error at most", "right")]
    rows = [
        (kind, count, scheme, how, f"{worst[kind, scheme, how]:.3g}") for (kind, scheme, how), count in groups.items()
    ]
    parts: list[Any] = [
        table(columns, rows, title=f"{plan.source} -> {plan.target}"),
        f"{len(plan.kept)} other tensors are copied as they are",
    ]
    if plan.dropped:
        parts.append(
            f"{len(plan.dropped)} scales of cached keys and values have no place in {plan.target} and are left out"
        )
    if done is not None:
        moved = (
            "no value changed"
            if done.exact
            else f"{len(done.errors)} weights changed, by {max(done.errors.values()):.3g} at most (relative)"
        )
        parts.append(f"{done.out}: {human_bytes(done.nbytes)}; {moved}")
    return render(*parts)


def verified_page(found: Any) -> str:
    """What `verify` found: findings first, then the weights that keep least of their source."""
    held = found.format or ("plain weights" if found.tensors else "cannot be read")
    parts: list[Any] = [f"{found.path}: {held}", found.summary]
    if found.compared:
        rows = [
            (item.tensor, item.scheme, f"{item.sqnr_db:.1f}", f"{item.expected_db:.1f}") for item in found.compared[:5]
        ]
        columns = [("least alike", "left"), ("scheme", "left"), ("SQNR dB", "right"), ("plain rounding", "right")]
        parts += ["", table(columns, rows)]
    parts += [f"note: {note}" for note in found.notes]
    parts += ["", "ok" if found.ok else "NOT ok"]
    return render(*parts)
