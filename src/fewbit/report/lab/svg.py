"""Small plots as inline SVG, coloured by the page's CSS variables so that they suit light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, MARGIN = 760, 24


def _nice_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** floor(log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    return [round(index * step, 12) for index in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, body: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def number_lines(
    rows: Sequence[tuple[str, Sequence[float], Sequence[float]]], low: float, high: float, label: str
) -> str:
    """Number lines under one another on one axis: (name, values that exist, points to mark).

    A mark is drawn with a line to the value it is rounded to.
    """
    left, right, step = MARGIN + 86, WIDTH - MARGIN, 46
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return left + (value - low) / span * (right - left)

    body = []
    for index, (name, levels, marks) in enumerate(rows):
        y = 26 + index * step
        body.append(_text(left - 12, y + 4, name, "name", "end"))
        body.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" class="axis"/>')
        inside = [level for level in levels if low <= level <= high]
        body += [
            f'<line x1="{at(v):.2f}" x2="{at(v):.2f}" y1="{y - 7}" y2="{y + 7}" class="level"><title>{v:g}</title></line>'
            for v in inside
        ]
        for mark in marks:
            if not low <= mark <= high:
                continue
            nearest = min(inside, key=lambda level: abs(level - mark)) if inside else mark
            body.append(f'<path d="M{at(mark):.2f} {y - 13} L{at(nearest):.2f} {y}" class="move"/>')
            body.append(
                f'<circle cx="{at(mark):.2f}" cy="{y - 13}" r="3.5" class="mark"><title>{mark:g} becomes {nearest:g}</title></circle>'
            )
    foot = 26 + len(rows) * step - 14
    body += [_text(at(tick), foot + 6, f"{tick:g}") for tick in _nice_ticks(low, high)]
    return _svg(foot + 16, body, label)


def error_bars(errors: Sequence[float], limit: float, label: str) -> str:
    """Signed bars, one an entry, with dashed lines at +-limit (half a step)."""
    height, middle = 170, 80
    left, right = MARGIN + 40, WIDTH - MARGIN
    top = max([abs(error) for error in errors] + [limit]) or 1.0
    wide = (right - left) / max(1, len(errors))
    body = [f'<line x1="{left}" x2="{right}" y1="{middle}" y2="{middle}" class="axis"/>']
    for sign in (1, -1):
        y = middle - sign * limit / top * 64
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="limit"/>')
        body.append(_text(left - 6, y + 4, f"{sign * limit:+.2g}", "tick", "end"))
    for index, error in enumerate(errors):
        tall = error / top * 64
        y, x = (middle - tall if tall > 0 else middle), left + index * wide + wide * 0.15
        body.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(0.6, wide * 0.7):.2f}" height="{abs(tall):.2f}" class="bar"><title>weight {index}: {error:+.6g}</title></rect>'
        )
        if len(errors) <= 32:
            body.append(_text(x + wide * 0.35, height - 8, f"{index}"))
    return _svg(height, body, label)


def histogram(values: Sequence[float], label: str, bins: int = 24) -> str:
    """How many values lie where."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / span * bins))] += 1
    height, left, right, base = 160, MARGIN + 40, WIDTH - MARGIN, 124
    wide, most = (right - left) / bins, max(counts)
    body = [
        f'<line x1="{left}" x2="{right}" y1="{base}" y2="{base}" class="axis"/>',
        _text(left - 6, 20, f"{most}", "tick", "end"),
    ]
    for index, count in enumerate(counts):
        tall = count / most * 108
        body.append(
            f'<rect x="{left + index * wide + 1:.2f}" y="{base - tall:.2f}" width="{wide - 2:.2f}" height="{tall:.2f}" class="bar"><title>{count}</title></rect>'
        )
    body += [
        _text(left + (tick - low) / span * (right - left), base + 18, f"{tick:g}") for tick in _nice_ticks(low, high, 6)
    ]
    return _svg(height, body, label)


def shares(parts: Sequence[tuple[str, float]], label: str) -> str:
    """One bar cut into named parts."""
    total = sum(size for _, size in parts) or 1.0
    left, right, x = MARGIN, WIDTH - MARGIN, float(MARGIN)
    body = []
    for index, (name, size) in enumerate(parts):
        wide = size / total * (right - left)
        body.append(
            f'<rect x="{x:.2f}" y="10" width="{max(0.5, wide - 1):.2f}" height="34" class="share s{index % 4}"><title>{escape(name)}: {size:.4g}</title></rect>'
        )
        if wide > 70:
            body.append(_text(x + wide / 2, 32, f"{name} {size:.4g}", "inside"))
        x += wide
    legend = " · ".join(f"{name} {size:.4g}" for name, size in parts)
    return _svg(66, [*body, _text(left, 60, legend, "tick", "start")], label)
