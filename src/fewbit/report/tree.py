"""A checkpoint as a tree: what `fewbit inspect` prints."""

from __future__ import annotations

from typing import Any

from fewbit.report.text import human_bytes, human_count, render, table

COLUMNS = [
    ("tensor", "left"), ("stored as", "left"), ("shape", "left"), ("tensors", "right"), ("bits", "right"), ("bits/w", "right"),
    ("bytes", "right"), ("method", "left"),
]  # fmt: skip


def survey_page(found: dict[str, Any], tensors: bool = False) -> str:
    """What a checkpoint holds; with `tensors` every tensor on a line of its own instead of branches of layers that are alike."""
    head = [
        f"{found['path']}: {found['format']}, {found['model_type'] or 'unknown model type'}",
        f"{human_count(found['weights'])} weights in {found['tensors']} tensors, {human_bytes(found['bytes'])}, "
        f"{found['bits_per_weight']:.3f} bits per weight",
    ]
    items = [{**item, "path": item["name"], "tensors": 1} for item in found["list"]] if tensors else found["tree"]
    parts: list[Any] = [*head, "", table(COLUMNS, _lines(items))]
    parts += [f"warning: {text}" for text in found["warnings"]]
    return render(*parts)


def _lines(items: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    root: dict[str, Any] = {}
    for index, item in enumerate(items):
        place = root
        *above, last = item["path"].split(".")
        for word in above:
            place = place.setdefault(word, {})
        place[f"{last}\0{index}"] = item  # schemes may differ under one name
    return list(_walk(root, ""))


def _walk(node: dict[str, Any], indent: str) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for position, (word, below) in enumerate(node.items()):
        final = position == len(node) - 1
        branch, inner = (indent + ("└─ " if final else "├─ "), indent + ("   " if final else "│  "))
        if "\0" in word:
            lines.append((branch + word.partition("\0")[0], *_cells(below)))
            continue
        while len(below) == 1 and "\0" not in (only := next(iter(below))):
            word, below = f"{word}.{only}", below[only]
        if len(below) == 1:  # a module with one tensor needs no line of its own
            only, item = next(iter(below.items()))
            lines.append((f"{branch}{word}.{only.partition(chr(0))[0]}", *_cells(item)))
            continue
        lines.append((branch + word, *[""] * (len(COLUMNS) - 1)))
        lines += _walk(below, inner)
    return lines


def _cells(item: dict[str, Any]) -> tuple[str, ...]:
    bits = "" if item["bits"] is None else f"{item['bits']:g}"
    shape = "x".join(map(str, item["shape"]))
    size = human_bytes(item["bytes"])
    return (
        item["stored"],
        shape,
        str(item["tensors"]),
        bits,
        f"{item['bits_per_weight']:.3f}",
        size,
        item["method"] or "",
    )
