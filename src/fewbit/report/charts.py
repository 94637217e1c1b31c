"""Charts of the report as inline SVG. Colours are the page's CSS variables, so that one drawing suits light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 860, 78, 18, 16, 44


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot: label, x, y, the interval of y, and its kind: "candidate", "reference"."""

    label: str
    x: float
    y: float
    low: float
    high: float
    kind: str = "candidate"


def svg(height: float, body: Sequence[str], label: str, width: int = WIDTH) -> str:
    """A drawing that scales with the page and names itself to screen readers."""
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def size_against_loss(marks: Sequence[Mark], floor: float | None, x_label: str, y_label: str) -> str:
    """Size along x, loss along y (logarithmic): candidates with their intervals, reference points in grey, the noise floor dashed."""
    positive = [mark for mark in marks if mark.y > 0]
    if not positive:
        return ""
    height = 430
    xs = [mark.x for mark in marks]
    x_low, x_high = min(xs) - 0.4, max(xs) + 0.9
    y_low = math.log10(min([mark.y for mark in positive] + ([floor] if floor else []))) - 0.25
    y_high = math.log10(max(max(mark.y, mark.high) for mark in positive)) + 0.15

    def at_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        share = (math.log10(max(value, 10.0**y_low)) - y_low) / (y_high - y_low)
        return height - BOTTOM - share * (height - TOP - BOTTOM)

    body = [line(at_x(tick), TOP, at_x(tick), height - BOTTOM, "grid") for tick in ticks(x_low, x_high)]
    body += [text(at_x(tick), height - BOTTOM + 18, f"{tick:g}") for tick in ticks(x_low, x_high)]
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        body += [line(LEFT, at_y(10.0**power), WIDTH - RIGHT, at_y(10.0**power), "grid")]
        body += [text(LEFT - 8, at_y(10.0**power) + 4, f"{10.0**power:g}", "tick", "end")]
    body += [text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "axis-name")]
    body += [
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" class="axis-name" text-anchor="middle">{escape(y_label)}</text>'
    ]
    if floor:
        body += [
            line(LEFT, at_y(floor), WIDTH - RIGHT, at_y(floor), "floor"),
            text(LEFT + 6, at_y(floor) - 5, f"noise floor {floor:.2g}", "note", "start"),
        ]
    body += _marks(marks, at_x, at_y)
    return svg(height, body, f"{y_label} against {x_label}")


Scale = Callable[[float], float]
Box = tuple[float, float, float, float]


def _marks(marks: Sequence[Mark], at_x: Scale, at_y: Scale) -> list[str]:
    """Points and their labels, candidates first; a label moves until it covers nothing, and one that finds no place is left to the pointer."""
    body, labels = [], []
    ordered = sorted((mark for mark in marks if mark.y > 0), key=lambda mark: (mark.kind == "reference", mark.x))
    taken: list[Box] = [(at_x(mark.x) - 5, at_y(mark.y) - 5, at_x(mark.x) + 5, at_y(mark.y) + 5) for mark in ordered]
    for index, mark in enumerate(ordered):
        x, y = at_x(mark.x), at_y(mark.y)
        reference = mark.kind == "reference"
        kind = "ref" if reference else f"c{index % 8}"
        if not reference:
            body.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(max(mark.low, 1e-12)):.1f}" y2="{at_y(max(mark.high, 1e-12)):.1f}" class="bar {kind}"/>'
            )
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if reference else 5}" class="dot {kind}"><title>{escape(mark.label)}: {mark.y:.4g}</title></circle>'
        )
        spot = _spot(mark.label, x, y, 5.6 if reference else 7.2, taken)
        if spot is not None:
            labels.append(text(*spot[:2], mark.label, "note" if reference else "label", spot[2]))
    return [*reversed(body), *labels]


_PLACES = (
    (9, 4, "start"),
    (-9, 4, "end"),
    (8, -10, "start"),
    (8, 18, "start"),
    (-8, -10, "end"),
    (-8, 18, "end"),
    (0, -16, "middle"),
    (0, 24, "middle"),
    (8, 32, "start"),
    (8, -26, "start"),
)


def _spot(label: str, x: float, y: float, letter: float, taken: list[Box]) -> tuple[float, float, str] | None:
    wide = letter * len(label)
    for dx, dy, anchor in _PLACES:
        left = x + dx - (wide if anchor == "end" else wide / 2 if anchor == "middle" else 0)
        box = (left, y + dy - 11, left + wide, y + dy + 3)
        inside = box[0] > LEFT and box[2] < WIDTH - 2 and box[1] > 2
        if inside and not any(box[0] < b[2] and box[2] > b[0] and box[1] < b[3] and box[3] > b[1] for b in taken):
            taken.append(box)
            return x + dx, y + dy, anchor
    return None


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: dict[tuple[int, int], float],
    label: str,
    form: str = "{:.2g}",
    invert: bool = False,
) -> str:
    """A table of shades: rows x columns; deeper is worse. Numbers stand in the cells while there is room."""
    if not values:
        return ""
    left, cell_high = 96, 24
    cell = min(96.0, (WIDTH - left - RIGHT) / max(1, len(columns)))
    low, high = min(values.values()), max(values.values())
    body = [text(left + (j + 0.5) * cell, 12, name) for j, name in enumerate(columns) if cell > 22 or j % 4 == 0]
    for i, name in enumerate(rows):
        y = 20 + i * cell_high
        body.append(text(left - 8, y + 16, name, "tick", "end"))
        for j in range(len(columns)):
            value = values.get((i, j))
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            depth = 0.06 + 0.9 * ((1 - share) if invert else share)
            shown = form.format(value)
            tip = f"<title>{escape(name)}, block {escape(columns[j])}: {shown}</title>"
            body.append(
                f'<rect x="{left + j * cell + 1:.1f}" y="{y}" width="{cell - 2:.1f}" height="{cell_high - 2}" rx="2" class="heat" fill-opacity="{depth:.2f}">{tip}</rect>'
            )
            if cell > 34:
                body.append(text(left + (j + 0.5) * cell, y + 15, shown, "cell deep" if depth > 0.55 else "cell"))
    return svg(26 + len(rows) * cell_high, body, label)


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars: (name, value, words after it); negative values go in another colour."""
    if not rows:
        return ""
    left, step = 250, 22
    top = max(abs(value) for _, value, _ in rows) or 1.0
    room = WIDTH - left - 150
    body = []
    for index, (name, value, words) in enumerate(rows):
        y = 6 + index * step
        wide = abs(value) / top * room
        body.append(text(left - 8, y + 13, name, "tick", "end"))
        body.append(
            f'<rect x="{left}" y="{y}" width="{max(1, wide):.1f}" height="{step - 6}" rx="2" class="{"fill" if value >= 0 else "fill minus"}"/>'
        )
        body.append(text(left + wide + 8, y + 13, words, "note", "start"))
    return svg(12 + len(rows) * step, body, label)


def curves(
    series: Sequence[tuple[str, Sequence[float]]], label: str, x_label: str, over: Sequence[float] | None = None
) -> str:
    """Lines from zero up, over ascending numbers; over 0, 1, 2 … without them."""
    series = [item for item in series if item[1]]
    if not series:
        return ""
    height = 240
    count = max(len(values) for _, values in series)
    top = max(max(values) for _, values in series) * 1.08 or 1.0
    over = range(count) if over is None else over
    first, wide = over[0], over[count - 1] - over[0] or 1

    def at(index: int, value: float) -> tuple[float, float]:
        x = LEFT + (over[index] - first) / wide * (WIDTH - LEFT - RIGHT - 20)
        return x, height - BOTTOM - value / top * (height - TOP - BOTTOM)

    body = [line(LEFT, at(0, tick)[1], WIDTH - RIGHT, at(0, tick)[1], "grid") for tick in ticks(0, top, 5)]
    body += [text(LEFT - 8, at(0, tick)[1] + 4, f"{tick:g}", "tick", "end") for tick in ticks(0, top, 5)]
    body += [text(at(i, 0)[0], height - BOTTOM + 18, f"{over[i]:g}") for i in range(count) if count <= 24 or i % 4 == 0]
    body += [text(WIDTH / 2, height - 6, x_label, "axis-name")]
    for index, (name, values) in enumerate(series):
        points = " ".join("{:.1f},{:.1f}".format(*at(i, value)) for i, value in enumerate(values))
        body.append(f'<polyline points="{points}" class="curve c{index % 8}"/>')
        body += [
            f'<circle cx="{at(i, v)[0]:.1f}" cy="{at(i, v)[1]:.1f}" r="3" class="dot c{index % 8}"><title>{escape(name)}, {over[i]:g}: {v:.4g}</title></circle>'
            for i, v in enumerate(values)
        ]
        body.append(text(LEFT + 12, TOP + 12 + 16 * index, name, f"label t{index % 8}", "start"))
    return svg(height, body, label)


def histograms(low: float, high: float, series: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """Counts over equal bins from low to high, drawn over one another: the first filled, further ones as outlines."""
    height = 220
    top = max((max(counts) for _, counts in series if counts), default=0.0)
    if top <= 0 or high <= low:
        return ""
    body = [line(LEFT, height - BOTTOM, WIDTH - RIGHT, height - BOTTOM, "axis")]
    for tick in ticks(low, high, 8):
        body.append(
            text(LEFT + (tick - low) / (high - low) * (WIDTH - LEFT - RIGHT), height - BOTTOM + 18, f"{tick:g}")
        )
    for index, (name, counts) in enumerate(series):
        wide = (WIDTH - LEFT - RIGHT) / len(counts)
        for at, count in enumerate(counts):
            tall = count / top * (height - TOP - BOTTOM)
            kind = "fill" if index == 0 else "outline"
            body.append(
                f'<rect x="{LEFT + at * wide:.1f}" y="{height - BOTTOM - tall:.1f}" width="{max(0.8, wide - 1):.1f}" height="{tall:.1f}" class="{kind}"/>'
            )
        body.append(text(WIDTH - RIGHT, TOP + 12 + 16 * index, name, "label t1" if index else "label t0", "end"))
    return svg(height, body, label)
