"""What the lab's results look like: each function turns results into one `Page`. Results come in as data; nothing is computed here but layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, TypeAlias

from fewbit.base.record import plain
from fewbit.report.lab import svg
from fewbit.report.lab.sections import Page, Plot, Section, Table, columns, listed, number

# results of `eval.lab_*`, which lives beside this package: they are handed in, and told apart by name only
FormatFacts: TypeAlias = Any
NumberIn: TypeAlias = Any
Quantized: TypeAlias = Any
Granularity: TypeAlias = Any
OutlierDemo: TypeAlias = Any
BitsLine: TypeAlias = Any


def format_page(facts: Sequence[FormatFacts], spacings: Mapping[str, Mapping[float, float]]) -> Page:
    """One or several number formats side by side."""
    first = facts[0]
    fields = " + ".join(f"{bits} {name}" for name, bits in first.fields.items())
    lead = f"{first.kind}, {first.bits:g} bits a value" + (f" = {fields}" if fields else "") + f"; {first.special}"
    rows = [
        ("bits", *(f"{f.bits:g}" for f in facts)),
        ("fields", *(" + ".join(f"{bits} {name}" for name, bits in f.fields.items()) or "-" for f in facts)),
        ("exponent bias", *("-" if f.bias is None else f"{f.bias}" for f in facts)),
        ("largest", *(number(f.high) for f in facts)),
        ("smallest", *(number(f.low) for f in facts)),
        ("least above zero", *(number(f.smallest, 4) for f in facts)),
        ("least normal", *(number(f.smallest_normal, 4) for f in facts)),
        ("epsilon (1 to the next)", *("-" if f.epsilon is None else f"{f.epsilon:.2e}" for f in facts)),
        ("decimal digits", *("-" if f.digits is None else f"{f.digits:.1f}" for f in facts)),
        ("finite values", *(f"{f.count:,}" for f in facts)),
    ]
    at = list(next(iter(spacings.values())))
    spaces = [
        (f"{value:g}", *("-" if not spacings[f.name][value] else f"{spacings[f.name][value]:.4g}" for f in facts))
        for value in at
    ]
    names = tuple(f"{f.name}>" for f in facts)
    sections = [
        Section("Side by side" if len(facts) > 1 else "Facts", tables=(Table(columns("", *names), tuple(rows)),)),
        Section(
            "Distance between neighbours",
            ("How far apart two values of the format are, near a given one.",),
            (Table(columns("near>", *names), tuple(spaces)),),
        ),
    ]
    drawn = [f for f in facts if f.values]
    if drawn:
        reach = 1.04 * max(abs(drawn[0].low), drawn[0].high)
        lines = svg.number_lines(
            [(f.name, f.values, ()) for f in drawn], -reach if drawn[0].low < 0 else 0.0, reach, "number lines"
        )
        plot = Plot(
            lines,
            f"every value there is, over the range of {drawn[0].name}; float formats crowd round zero, integers are even",
        )
        words = tuple(f"{f.name}: {listed(f.values)}" if len(drawn) > 1 else listed(f.values) for f in drawn)
        sections += [Section("Number lines", plots=(plot,)), Section("All values", words)]
    return Page(
        f"Number format {first.name}",
        lead,
        tuple(sections),
        {"formats": plain(facts), "spacing": {k: {f"{a:g}": s for a, s in v.items()} for k, v in spacings.items()}},
    )


def number_page(value: float, found: Sequence[NumberIn], around: Mapping[str, Sequence[float]]) -> Page:
    """One number in several formats; `around` holds the neighbouring values of each format."""
    rows = tuple(
        (
            f.format, f"{f.bits:g}", f"{f.value:.9g}", f.pattern, f.words, f"{f.error:+.3g}" if isfinite(f.error) else "-",
            f"{abs(f.relative):.2%}" if isfinite(f.relative) and abs(f.relative) > 1e-4 else number(abs(f.relative), 2), number(f.spacing, 3), f.note,
        )
        for f in found
    )  # fmt: skip
    heads = columns("format", "bits>", "becomes>", "bit pattern", "which is", "error>", "relative>", "spacing>", "")
    wide = max((abs(f.value - value) for f in found if isfinite(f.value)), default=1.0) * 2.2 or 1.0
    lines = svg.number_lines(
        [(f.format, around[f.format], (value,)) for f in found if isfinite(f.value)],
        value - wide,
        value + wide,
        "the number between its neighbours",
    )
    plot = Plot(lines, "the red dot is the number; the lines are the values that each format has near it")
    return Page(
        f"{value:g} in {len(found)} formats",
        "what is kept of one number",
        (Section("Nearest values", tables=(Table(heads, rows),), plots=(plot,)),),
        {"number": value, "formats": plain(found)},
    )


def quantize_page(
    found: Quantized,
    blocks: Sequence[Granularity],
    searched: Quantized | None,
    stored: Quantized | None,
    summary: dict[str, Any],
) -> Page:
    """Numbers quantised step by step, then compared."""
    count = sum(len(block.weights) for block in found.blocks)
    note = f"; 16-bit scales are kept in float32 here, as with a pencil ({found.scheme})" if found.exact else ""
    sections = [_block_section(block, len(found.blocks)) for block in found.blocks[:16]]
    if len(found.blocks) > 16:
        sections.append(Section("More blocks", (f"{len(found.blocks) - 16} more blocks are in --json",)))
    if found.nested:
        sections.append(Section("The scales are stored in few bits too", found.nested, mono=True))
    sections.append(_error_section(found, searched, stored))
    if len(blocks) > 1:
        sections.append(_granularity_section(blocks))
    others = {"granularity": plain(blocks), "searched": plain(searched), "stored": plain(stored)}
    lead = f"{found.bits:.4g} bits a weight for so few numbers{note}"
    return Page(f"{count} numbers in {found.asked}", lead, tuple(sections), {**plain(found), **summary, **others})


def _error_section(found: Quantized, searched: Quantized | None, stored: Quantized | None) -> Section:
    words = [
        f"largest error {found.max_error:.6f}, mean {found.mean_error:.6f}, root mean square {found.rms_error:.6f}"
    ]
    if stored is not None:
        words.append(
            f"with scales as files store them: largest error {stored.max_error:.6f}, mean {stored.mean_error:.6f}"
        )
    if searched is not None:
        gain = 1 - searched.rms_error / found.rms_error if found.rms_error else 0.0
        verdict = f", {gain:.0%} less" if gain > 0.005 else ", no better here"
        words.append(
            f"with a searched scale, as `fewbit quantize` does it: root mean square {searched.rms_error:.6f}{verdict}"
        )
    errors = [step.error for block in found.blocks for step in block.weights]
    half = max((block.scale for block in found.blocks), default=0.0) / 2
    caption = "error of each weight; the dashed lines are half a step of the coarsest block"
    plots = [Plot(svg.error_bars(errors[:256], half, "errors"), caption)]
    if len(errors) >= 4:
        bins = min(24, max(6, len(errors)))
        plots.append(Plot(svg.histogram(errors, "error histogram", bins=bins), "how often which error occurs"))
    return Section("Errors", tuple(words), plots=tuple(plots))


def _granularity_section(blocks: Sequence[Granularity]) -> Section:
    rows = tuple(
        (
            block.blocks,
            ", ".join(f"{scale:.4g}" for scale in block.scales[:6]) + (" …" if len(block.scales) > 6 else ""),
            f"{block.max_error:.6f}",
            f"{block.mean_error:.6f}",
            f"{block.rms_error:.6f}",
            f"{block.bits:.3g}",
        )
        for block in blocks
    )
    heads = columns("scale", "steps", "largest error>", "mean>", "root mean square>", "bits/weight>")
    words = "Smaller groups follow the weights more closely and pay for it in scales."
    return Section("One scale for all, or one a group", (words,), (Table(heads, rows),))


def _block_section(block: Any, count: int) -> Section:
    title = (
        "By hand"
        if count == 1
        else f"Block {block.index}: weights {block.weights[0].index} to {block.weights[-1].index}"
    )
    words = (f"smallest {block.low:g}, largest {block.high:g}", *block.how)
    zero = block.zero is not None
    inner = "w / scale" if block.minimum is None else "(w - minimum) / scale"
    heads = columns(
        "", "weight>", f"{inner}{' + zero' if zero else ''}>", "code>", "level>", "comes back as>", "error>"
    )
    rows = tuple(
        (
            f"{s.index}",
            f"{s.value:g}",
            f"{s.units:.4f}",
            f"{s.code}",
            f"{s.level:g}",
            f"{s.recovered:.6f}",
            f"{s.error:+.6f}",
        )
        for s in block.weights[:256]
    )
    levels = sorted({s.recovered for s in block.weights})
    reach = max(abs(block.low), abs(block.high)) * 1.08 or 1.0
    line = svg.number_lines(
        [("weights", levels, [s.value for s in block.weights[:64]])],
        -reach,
        reach,
        "weights and the values they become",
    )
    return Section(title, words, (Table(heads, rows),), (Plot(line, "red: the weights; grey: what they become"),))


def bits_page(
    spelling: str, scheme: str, shape: tuple[int, ...], lines: Sequence[BitsLine], sentence: str, total: int
) -> Page:
    """Where the bits of a scheme go."""
    weights = 1
    for size in shape:
        weights *= size
    heads = columns("stored", "as", "entries>", "weights each>", "bits each>", "bits/weight>", "bytes>", "share>")
    rows = tuple(
        (
            line.path, line.grid, f"{line.entries:,}", f"{float(line.per):,.6g}", f"{float(line.bits_each):g}", f"{line.per_weight:.6f}",
            f"{line.bits / 8:,.0f}", f"{line.bits / total:.2%}",
        )
        for line in lines
    )  # fmt: skip
    meta = sum(line.bits for line in lines[1:])
    words = (
        sentence,
        f"codes {lines[0].bits / 8:,.0f} bytes + metadata {meta / 8:,.0f} bytes = {total / 8:,.0f} bytes; metadata is {meta / max(1, lines[0].bits):.2%} of the codes",
    )
    plot = Plot(
        svg.shares([(line.path, line.per_weight) for line in lines if line.per_weight > 1e-4], "bits a weight"),
        "bits a weight",
    )
    data = {
        "scheme": scheme,
        "shape": list(shape),
        "bits": total,
        "bits_per_weight": total / weights,
        "metadata_share": meta / max(1, lines[0].bits),
        "parts": plain(lines),
    }
    return Page(
        f"Bits of {spelling}",
        f"{scheme}, for a weight of {' x '.join(map(str, shape))}",
        (Section("Arithmetic", words, (Table(heads, rows),), (plot,)),),
        data,
    )


def outlier_page(demo: OutlierDemo) -> Page:
    """The outlier problem and its remedies."""
    x = tuple((f"token {index}", *(f"{value:.4g}" for value in row)) for index, row in enumerate(demo.activations))
    names = columns("X", *(f"channel {index}>" for index in range(len(demo.activations[0]))))
    sections = [
        Section(
            "The activations",
            (
                "One channel in eight is a thousand times larger, as in real transformers. A layer computes Y = X W with weights of about 0.3.",
            ),
            (Table(names, x),),
            (_activation_plot(demo),),
        )
    ]
    sections.append(
        _remedies(
            "Activations in 8 bits",
            "The step of an 8-bit grid is its largest value / 127: the small activations all become 0.",
            demo.act_remedies,
            "activations that survive",
        )
    )
    sections.append(
        _remedies(
            "Weights in 4 bits",
            "Weights have no such outliers, but those that meet the large inputs matter most.",
            demo.weight_remedies,
            "salient weights that survive",
        )
    )
    return Page(
        "The outlier problem",
        "one 127.4 among 0.1s: what it does to a quantised product, and three remedies in numbers",
        tuple(sections),
        plain(demo),
    )


def _activation_plot(demo: OutlierDemo) -> Plot:
    """The small activations of one token on the grid that the outlier leaves them, and on their own."""
    marks = [value for value in demo.activations[0] if abs(value) < 1]
    rows = []
    for remedy in (demo.act_remedies[0], demo.act_remedies[2]):
        most = min(127, int(0.2 / remedy.scale) + 1)
        rows.append(
            (remedy.name.removeprefix("INT8, "), [remedy.scale * code for code in range(-most, most + 1)], marks)
        )
    return Plot(
        svg.number_lines(rows, -0.2, 0.2, "activations of one token"),
        "token 0 without channel 5: with one scale for all, 0 is the only level within reach; without the outlier there are hundreds",
    )


def _remedies(title: str, words: str, remedies: Sequence[Any], survive: str) -> Section:
    heads = columns("method", "step>", f"{survive}>", "error of Y>", "error without the outlier's part>")
    rows = tuple(
        (
            r.name,
            f"{r.scale:.4g}",
            f"{r.survivors[0]} of {r.survivors[1]}",
            f"{r.relative_error:.3%}",
            f"{r.ordinary_error:.2%}",
        )
        for r in remedies
    )
    details = tuple(f"{r.name}: {r.idea}. {'; '.join(r.detail)}" for r in remedies)
    return Section(title, (words, *details), (Table(heads, rows),))


def code_page(code: str, row: Mapping[str, str]) -> Page:
    """One error code."""
    return Page(
        f"{code} {row['title']}", row["explain"], (Section("What to do", (row["remedy"],)),), {"code": code, **row}
    )


def codes_page(rows: Mapping[str, Mapping[str, str]]) -> Page:
    """All error codes."""
    table = Table(
        columns("code", "what", "remedy"),
        tuple((code, row["title"], row["remedy"]) for code, row in sorted(rows.items())),
    )
    return Page(
        "Error codes",
        f"{len(rows)} codes; `fewbit explain CODE` says more",
        (Section("All codes", tables=(table,)),),
        {"codes": {code: dict(row) for code, row in rows.items()}},
    )
